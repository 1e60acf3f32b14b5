"""OpenAI's shapes: a chat request read and checked, replies and errors written.

A parameter that would change the answer and cannot be honoured is an error. Any other that is not known here is
ignored, since clients send parameters that are newer than the server.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from tunewright import chat
from tunewright.endpoint.answers import End, Piece
from tunewright.endpoint.spelling import Speller
from tunewright.generate import Token

UNLIKELY = -9999.0
"""What OpenAI writes for a log-probability that JSON has no number for."""


class ApiError(Exception):
    """An error in OpenAI's envelope; raised anywhere while a request is answered."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def read_request(body: bytes) -> ChatRequest:
    """A chat completion request.

    Raises:
        ApiError: it is not JSON, says something that is not allowed, or asks for what cannot be done here (400).
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise explained(error.errors(include_url=False, include_context=False)[0]) from None
    _refuse(request.model_extra or {}, REFUSED)
    for number, message in enumerate(request.messages):
        _refuse(message.model_extra or {}, REFUSED_IN_MESSAGES, f"messages[{number}].")
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise ApiError(
            400,
            "'max_tokens' and 'max_completion_tokens' are both set; send one of them.",
            param="max_tokens",
            code="invalid_parameter_combination",
        )
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "'top_logprobs' needs 'logprobs': true.", param="top_logprobs", code="invalid_value")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "'stream_options' needs 'stream': true.", param="stream_options", code="invalid_value")
    return request


def _content(value: Any) -> Any:
    """A message's content as one string; text parts are joined, as the training data's are."""
    if not isinstance(value, list):
        return value
    for place, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            said = f"a part of type {kind!r}" if kind else "a part without a type"
            raise PydanticCustomError("part", f"part {place} is {said}; only text parts are supported")
        if not isinstance(part.get("text"), str):
            raise PydanticCustomError("part", f"part {place} has no text")
    return "".join(part["text"] for part in value)


def _role(value: str) -> str:
    if value not in chat.ROLES:
        raise PydanticCustomError("role", f"{value!r} is no role; supported: {', '.join(chat.ROLES)}")
    return value


def _listed(value: Any) -> Any:
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


def _not_null(value: Any) -> Any:
    return False if value is None else value


Flag = Annotated[bool, BeforeValidator(_not_null)]


class Part(BaseModel):
    """A part of a request: exact types, so that "1" is no number; what is not declared is kept for `_refuse`."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)


class MessageIn(Part):
    role: Annotated[str, AfterValidator(_role)]
    content: Annotated[str, BeforeValidator(_content)]


class StreamOptions(Part):
    include_usage: Flag = False


class ChatRequest(Part):
    model: str
    messages: list[MessageIn] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_listed)] = Field(
        default=[], max_length=4
    )
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    n: int | None = Field(default=None, ge=1, le=8)
    logprobs: Flag = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    stream: Flag = False
    stream_options: StreamOptions | None = None

    @property
    def conversation(self) -> tuple[chat.Message, ...]:
        return tuple(chat.Message(one.role, one.content) for one in self.messages)


REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("tools", "functions"), ("this endpoint calls no tools", ())),
    **dict.fromkeys(("tool_choice", "function_call"), ("this endpoint calls no tools", ("none", "auto"))),
    "response_format": ("this endpoint writes plain text", ({"type": "text"},)),
    "modalities": ("this endpoint writes plain text", (["text"],)),
    **dict.fromkeys(("audio", "web_search_options", "moderation"), ("this endpoint writes plain text", ())),
    **dict.fromkeys(
        ("logit_bias", "frequency_penalty", "presence_penalty", "top_k", "min_p", "stop_token_ids", "min_tokens"),
        ("tokens are drawn by temperature and top_p alone", (0, -1)),
    ),
    "repetition_penalty": ("tokens are drawn by temperature and top_p alone", (1,)),
    "reasoning_effort": ("the model has no reasoning to set", ("none",)),
    "verbosity": ("the model has no verbosity to set", ("medium",)),
    "store": ("this endpoint keeps no completions", ()),
    **dict.fromkeys(
        ("chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message", "echo"),
        ("the model is asked the way it was trained", ()),
    ),
}
"""Parameters (OpenAI's, and those that other servers have added) that would change the answer: why they cannot be
honoured, and the values that ask for what happens anyway. Null, false and empty ones always do."""

REFUSED_IN_MESSAGES: dict[str, tuple[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("tool_calls", "function_call"), ("this endpoint calls no tools", ())),
    "audio": ("this endpoint reads plain text", ()),
    "refusal": ("only content is read", ()),
}


@dataclass
class Reply:
    """What the replies to one request have in common."""

    id: str
    created: int
    model: str
    speller: Speller
    logprobs: bool
    include_usage: bool = False

    def whole(self, choices: list[Choice], prompt_tokens: int) -> dict[str, Any]:
        """A reply that is sent at once."""
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": "".join(choice.texts), "refusal": None},
                    "logprobs": self._logprobs(choice.tokens),
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": usage(prompt_tokens, sum(choice.num_tokens for choice in choices)),
        }

    def first(self, index: int) -> str:
        """The chunk that says who speaks."""
        return self._chunk(index, {"role": "assistant", "content": "", "refusal": None})

    def piece(self, index: int, piece: Piece) -> str:
        return self._chunk(index, {"content": piece.text}, logprobs=self._logprobs(piece.tokens))

    def last(self, index: int, end: End) -> str:
        return self._chunk(index, {}, finish_reason=end.finish_reason)

    def usage(self, prompt_tokens: int, completion_tokens: int) -> str:
        """The chunk behind all choices that stream_options.include_usage asks for."""
        return event({**self._common(), "choices": [], "usage": usage(prompt_tokens, completion_tokens)})

    def _chunk(self, index: int, delta: dict[str, Any], *, logprobs: Any = None, finish_reason: Any = None) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        shown = {**self._common(), "choices": [choice]}
        return event({**shown, "usage": None} if self.include_usage else shown)

    def _common(self) -> dict[str, Any]:
        return {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model}

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = [
            {
                **self._spelled(token.id, token.logprob),
                "top_logprobs": [self._spelled(one, logprob) for one, logprob in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _spelled(self, token: int, logprob: float) -> dict[str, Any]:
        text, raw = self.speller.spell(token)
        return {"token": text, "logprob": max(logprob, UNLIKELY), "bytes": raw}


@dataclass
class Choice:
    """One answer while it is collected."""

    texts: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str = ""
    num_tokens: int = 0

    def add(self, event: Piece | End) -> None:
        if isinstance(event, Piece):
            self.texts.append(event.text)
            self.tokens += event.tokens
        else:
            self.finish_reason, self.num_tokens = event.finish_reason, event.num_tokens


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def model_card(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "tunewright"}


def event(value: dict[str, Any]) -> str:
    """One server-sent event. ASCII, since some clients split lines at U+2028 and its kin too."""
    return f"data: {json.dumps(value, allow_nan=False)}\n\n"


def _refuse(given: Mapping[str, Any], refused: Mapping[str, tuple[str, tuple[Any, ...]]], where: str = "") -> None:
    for name, value in given.items():
        reason, harmless = refused.get(name, ("", ()))
        if reason and value and value not in harmless:
            raise ApiError(
                400, f"'{where}{name}' cannot be honoured: {reason}.", param=where + name, code="unsupported_parameter"
            )


def explained(problem: ErrorDetails) -> ApiError:
    """Pydantic's first finding, in OpenAI's words."""
    if problem["type"] == "json_invalid":
        return ApiError(400, f"The body of the request is not JSON: {problem['msg'].removeprefix('Invalid JSON: ')}.")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).removeprefix(".")
    if not param:
        return ApiError(400, "The body of the request is not a JSON object.")
    if problem["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    code = "invalid_type" if problem["type"].endswith("_type") else "invalid_value"
    message = problem["msg"][:1].lower() + problem["msg"][1:]
    return ApiError(400, f"Invalid '{param}': {message}.", param=param, code=code)
