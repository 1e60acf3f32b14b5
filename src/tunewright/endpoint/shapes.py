"""OpenAI's shapes: requests for completions read and checked, replies and errors written.

A parameter that would change the answer and cannot be honoured is an error. Any other that is not known here is
ignored, since clients send parameters that are newer than the server.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from tunewright import chat
from tunewright.endpoint.answers import Call, End, Piece
from tunewright.endpoint.spelling import Speller
from tunewright.generate import Token

MESSAGE, PARAM = 4000, 256
"""Characters of an error at most: what a client sent is repeated in it."""
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
        message = _sayable(message, MESSAGE)
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        param = param if param is None else _sayable(param, PARAM)
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @classmethod
    def received(cls, status: int, body: Any, headers: Mapping[str, str] | None = None) -> ApiError:
        """What another process of ours answered."""
        said = body.get("error") if isinstance(body, dict) else None
        if not isinstance(said, dict):
            return cls(status, str(body)[:500], kind="server_error", code="server_error", headers=headers)
        error = cls(status, str(said.get("message")), headers=headers)
        error.body = {"error": said}
        return error


def read_request(body: bytes, *, named: bool = False) -> ChatRequest:
    """A chat completion request.

    Args:
        named: the model is known from elsewhere, so the request need not name one.

    Raises:
        ApiError: it is not JSON, says something that is not allowed, or asks for what cannot be done here (400).
    """
    request = _read(ChatRequest, body, named=named)
    if request.model_extra:
        _refuse(request.model_extra, REFUSED)
    for number, message in enumerate(request.messages):
        _check_message(message, f"messages[{number}]")
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise ApiError(
            400,
            "'max_tokens' and 'max_completion_tokens' are both set; send one of them.",
            param="max_tokens",
            code="invalid_parameter_combination",
        )
    if request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs", "'top_logprobs' needs 'logprobs': true.")
    if request.tools or request.tool_choice is not None:
        _check_choice(request)
    return request


def read_text_request(body: bytes, *, named: bool = False) -> TextRequest:
    """A (legacy) completion request.

    Raises:
        ApiError: as `read_request`.
    """
    request = _read(TextRequest, body, named=named)
    if request.model_extra:
        _refuse(request.model_extra, REFUSED_IN_TEXT)
    if request.best_of is not None and request.best_of < (request.n or 1):
        raise invalid("best_of", "'best_of' is the number of answers to choose 'n' from, so it is at least as large.")
    if request.stream and (request.best_of or 1) > (request.n or 1):
        raise invalid("best_of", "'best_of' cannot be streamed: the best is known when all are written.")
    return request


R = TypeVar("R", bound="Asking")


def _read(kind: type[R], body: bytes, *, named: bool) -> R:
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise explained(error.errors(include_url=False, include_context=False)[0]) from None
    if request.model is None and not named:
        if "model" in request.model_fields_set:
            raise invalid("model", "Invalid 'model': input should be a valid string.", code="invalid_type")
        raise invalid("model", "Missing required parameter: 'model'.", code="missing_required_parameter")
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options", "'stream_options' needs 'stream': true.")
    return request


def invalid(param: str, message: str, *, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def _check_message(message: MessageIn, where: str) -> None:
    if message.model_extra:
        _refuse(message.model_extra, REFUSED_IN_MESSAGES, f"{where}.")
    if message.tool_calls and message.role != "assistant":
        raise invalid(f"{where}.tool_calls", f"Invalid '{where}.tool_calls': only an assistant calls tools.")
    if message.content is None and not message.tool_calls:
        param = f"{where}.content"
        if "content" in message.model_fields_set:
            raise invalid(param, f"Invalid '{param}': input should be a valid string.", code="invalid_type")
        raise invalid(param, f"Missing required parameter: '{param}'.", code="missing_required_parameter")


def _check_choice(request: ChatRequest) -> None:
    choice = request.tool_choice
    wanted = choice["function"]["name"] if isinstance(choice, dict) else None
    if choice is not None and choice != "none" and not request.tools and (wanted or choice == "required"):
        raise invalid("tool_choice", "'tool_choice' asks for a call, and there are no 'tools'.")
    if wanted is not None and wanted not in [tool.function.name for tool in request.tools]:
        raise invalid("tool_choice", f"'tool_choice' names '{wanted}', which is none of the 'tools'.")


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


Flag = Annotated[bool, BeforeValidator(_not_null, json_schema_input_type=bool | None)]


class Part(BaseModel):
    """A part of a request: exact types, so that "1" is no number; what is not declared is kept for `_refuse`."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)


def _object(value: str) -> str:
    try:
        given = json.loads(value)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise PydanticCustomError("arguments", "the arguments of a call are a JSON object, as text")
    return value


def _tool_choice(value: Any) -> Any:
    if value in (None, "none", "auto", "required"):
        return value
    named = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if isinstance(named, dict) and isinstance(named.get("name"), str):
        return value
    raise PydanticCustomError("choice", "it is none, auto, required, or a function by its name")


def _response_format(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if value is None or kind in ("text", "json_object"):
        return value
    if kind == "json_schema":
        said = value.get("json_schema")
        if isinstance(said, dict) and isinstance(said.get("schema", {}), dict):
            return value
        raise PydanticCustomError("format", "json_schema needs an object 'json_schema' with an object 'schema'")
    raise PydanticCustomError("format", "its type is text, json_object or json_schema")


TOOL_CHOICE: dict[str, Any] = {
    "anyOf": [
        {"enum": ["none", "auto", "required", None]},
        {
            "type": "object",
            "required": ["type", "function"],
            "properties": {
                "type": {"const": "function"},
                "function": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
            },
        },
    ]
}
RESPONSE_FORMAT: dict[str, Any] = {
    "anyOf": [
        {"type": "null"},
        {
            "type": "object",
            "required": ["type"],
            "properties": {
                "type": {"enum": ["text", "json_object", "json_schema"]},
                "json_schema": {
                    "type": "object",
                    "properties": {"name": {"type": "string"}, "schema": {"type": "object"}},
                },
            },
        },
    ]
}
"""As the OpenAPI document shows what the two functions above check."""


class CalledFunction(Part):
    name: str
    arguments: Annotated[str, AfterValidator(_object)]


class CallIn(Part):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class TextPart(Part):
    """As the OpenAPI document shows a part of a message's content; `_content` reads it."""

    type: Literal["text"]
    text: str


class MessageIn(Part):
    role: Annotated[str, AfterValidator(_role), Field(json_schema_extra={"enum": list(chat.ROLES)})]
    content: Annotated[str | None, BeforeValidator(_content, json_schema_input_type=str | list[TextPart] | None)] = None
    tool_calls: list[CallIn] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    @property
    def message(self) -> chat.Message:
        calls = tuple(chat.ToolCall(one.function.name, one.function.arguments, one.id) for one in self.tool_calls or ())
        answers = self.role == "tool"
        return chat.Message(
            self.role,
            self.content or "",
            tool_calls=calls,
            tool_call_id=self.tool_call_id if answers else None,
            name=self.name if answers else None,
        )


class StreamOptions(Part):
    include_usage: Flag = False


class FunctionIn(Part):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolIn(Part):
    type: Literal["function"]
    function: FunctionIn
    _sent: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, value: Any, read: ModelWrapValidatorHandler[ToolIn]) -> ToolIn:
        tool = read(value)
        tool._sent = value
        return tool

    @property
    def sent(self) -> dict[str, Any]:
        """As the request has it, its keys in their order: templates write them so, in training too."""
        return self._sent


StopText = Annotated[str, Field(min_length=1)]
Stop = Annotated[
    list[StopText],
    BeforeValidator(_listed, json_schema_input_type=StopText | Annotated[list[StopText], Field(max_length=4)] | None),
    Field(default=[], max_length=4),
]
Bias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    BeforeValidator(lambda value: {} if value is None else value),
]
Penalty = Annotated[float, Field(ge=-2, le=2)] | None


class Asking(Part):
    """What requests for completions of both kinds have in common."""

    model: str | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    stop: Stop
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    n: int | None = Field(default=None, ge=1, le=128)
    stream: Flag = False
    stream_options: StreamOptions | None = None
    frequency_penalty: Penalty = None
    presence_penalty: Penalty = None
    logit_bias: Bias = Field(default={}, max_length=1024)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Asking):
    messages: list[MessageIn] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: Flag = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: Annotated[list[ToolIn], BeforeValidator(lambda value: [] if value is None else value)] = Field(
        default=[], max_length=128
    )
    tool_choice: Annotated[Any, AfterValidator(_tool_choice), WithJsonSchema(TOOL_CHOICE)] = None
    parallel_tool_calls: bool | None = None
    response_format: Annotated[Any, AfterValidator(_response_format), WithJsonSchema(RESPONSE_FORMAT)] = None

    @property
    def conversation(self) -> tuple[chat.Message, ...]:
        return tuple(one.message for one in self.messages)

    @property
    def tool_dicts(self) -> tuple[dict[str, Any], ...]:
        """The tools as templates take them: as they were sent."""
        return tuple(one.sent for one in self.tools)

    @property
    def most(self) -> int | None:
        """Tokens of an answer at most."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def schema_asked(self) -> dict[str, Any] | None:
        """The JSON Schema that the answer is held to; None where it is text."""
        match (self.response_format or {}).get("type"):
            case "json_object":
                return {"type": "object"}
            case "json_schema":
                found: dict[str, Any] = self.response_format["json_schema"].get("schema") or {"type": "object"}
                return found
        return None


def _prompts(value: Any) -> Any:
    """One prompt or several, as text or ids, as a list of them."""
    if value is None:
        return [[]]
    if isinstance(value, str) or (value and isinstance(value, list) and all(type(one) is int for one in value)):
        return [value]
    return value


def _prompt(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)):
        return value
    raise PydanticCustomError("prompt", "a prompt is a text or a list of token ids, and there may be a list of them")


Ids = list[Annotated[int, Field(ge=0)]]
Prompts = str | Ids | list[str | Ids] | None


class TextRequest(Asking):
    """A request to the older completions route."""

    prompt: Annotated[
        list[Annotated[Any, AfterValidator(_prompt)]], BeforeValidator(_prompts, json_schema_input_type=Prompts)
    ] = Field(default=[[]], min_length=1, max_length=2048)
    max_tokens: int | None = Field(default=None, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: Flag = False
    best_of: int | None = Field(default=None, ge=1, le=128)

    @property
    def most(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens


OLD_CALLS = "it is the older form of tools; send 'tools' and 'tool_choice'"

REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "functions": (OLD_CALLS, ()),
    "function_call": (OLD_CALLS, ("none", "auto")),
    "modalities": ("this endpoint writes plain text", (["text"],)),
    **dict.fromkeys(("audio", "web_search_options", "moderation"), ("this endpoint writes plain text", ())),
    **dict.fromkeys(
        ("top_k", "min_p", "stop_token_ids", "min_tokens"),
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
    "function_call": (OLD_CALLS, ()),
    "audio": ("this endpoint reads plain text", ()),
    "refusal": ("only content is read", ()),
}

REFUSED_IN_TEXT: dict[str, tuple[str, tuple[Any, ...]]] = {
    "suffix": ("the model only goes on from a prompt; it fills no gaps", ()),
    **{name: REFUSED[name] for name in ("top_k", "min_p", "stop_token_ids", "min_tokens", "repetition_penalty")},
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
                    "message": _said(choice),
                    "logprobs": self._logprobs(choice.tokens),
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": usage(prompt_tokens, sum(choice.num_tokens for choice in choices)),
        }

    def first(self, index: int) -> list[str]:
        """The chunk that says who speaks."""
        return [self._chunk(index, {"role": "assistant", "content": "", "refusal": None})]

    def piece(self, index: int, piece: Piece) -> str:
        return self._chunk(index, {"content": piece.text}, logprobs=self._logprobs(piece.tokens))

    def call(self, index: int, place: int, call: Call) -> list[str]:
        """The chunks of an answer's call number `place`: its name, then its arguments."""
        head = {"index": place, "id": call.id, "type": "function", "function": {"name": call.name, "arguments": ""}}
        rest = {"index": place, "function": {"arguments": call.arguments}}
        return [self._chunk(index, {"tool_calls": [head]}), self._chunk(index, {"tool_calls": [rest]})]

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
class TextReply:
    """What the replies to one request to the older route have in common."""

    id: str
    created: int
    model: str
    speller: Speller
    num_top: int | None
    """None where no log-probabilities are wanted."""
    include_usage: bool = False
    offsets: dict[int, int] = field(default_factory=dict)
    """For each choice, where in prompt and answer the next token's text begins."""

    def whole(self, choices: list[Choice], prompt_tokens: int) -> dict[str, Any]:
        shown = [
            self._choice(index, "".join(choice.texts), choice.tokens, choice.finish_reason)
            for index, choice in enumerate(choices)
        ]
        counted = usage(prompt_tokens, sum(choice.num_tokens for choice in choices))
        return {**self._common(), "choices": shown, "usage": counted}

    def first(self, _index: int) -> list[str]:
        """Nobody is said to speak here."""
        return []

    def piece(self, index: int, piece: Piece) -> str:
        return self._chunk([self._choice(index, piece.text, piece.tokens, None)])

    def call(self, _index: int, _place: int, _call: Call) -> list[str]:
        raise AssertionError("there are no tools on this route")

    def last(self, index: int, end: End) -> str:
        return self._chunk([self._choice(index, "", [], end.finish_reason)])

    def usage(self, prompt_tokens: int, completion_tokens: int) -> str:
        return event({**self._common(), "choices": [], "usage": usage(prompt_tokens, completion_tokens)})

    def _chunk(self, choices: list[dict[str, Any]]) -> str:
        shown = {**self._common(), "choices": choices}
        return event({**shown, "usage": None} if self.include_usage else shown)

    def _common(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}

    def _choice(self, index: int, text: str, tokens: Sequence[Token], finish_reason: str | None) -> dict[str, Any]:
        logprobs = None if self.num_top is None else self._logprobs(index, tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        """The older form: lists side by side. The first token of an echoed prompt has no log-probability."""
        offset = self.offsets.get(index, 0)
        texts = [self.speller.spell(token.id)[0] for token in tokens]
        offsets = []
        for token, text in zip(tokens, texts, strict=True):
            offsets.append(offset)
            offset += len(token.text or text) if not text.startswith("bytes:") else len(token.text)
        self.offsets[index] = offset
        return {
            "tokens": texts,
            "token_logprobs": [None if math.isnan(token.logprob) else max(token.logprob, UNLIKELY) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens] if self.num_top else None,
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> dict[str, float] | None:
        if math.isnan(token.logprob):
            return None
        best = {**dict(token.top), token.id: token.logprob}
        return {self.speller.spell(one)[0]: max(logprob, UNLIKELY) for one, logprob in best.items()}


@dataclass
class Choice:
    """One answer while it is collected."""

    texts: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    finish_reason: str = ""
    num_tokens: int = 0

    def add(self, event: Piece | Call | End) -> None:
        if isinstance(event, Piece):
            self.texts.append(event.text)
            self.tokens += event.tokens
        elif isinstance(event, Call):
            self.calls.append(event)
        else:
            self.finish_reason, self.num_tokens = event.finish_reason, event.num_tokens


def _said(choice: Choice) -> dict[str, Any]:
    """An assistant's message."""
    text = "".join(choice.texts)
    said: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if choice.calls:
        calls = [
            {"id": one.id, "type": "function", "function": {"name": one.name, "arguments": one.arguments}}
            for one in choice.calls
        ]
        said |= {"content": text or None, "tool_calls": calls}
    return said


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def no_embeddings(name: str) -> ApiError:
    return ApiError(
        400,
        f"The model '{name}' makes no embeddings: it is a causal language model, and its hidden states were not "
        "trained to be compared.",
        param="model",
        code="unsupported_model",
    )


def model_card(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "tunewright"}


def event(value: dict[str, Any]) -> str:
    """One server-sent event. ASCII, since some clients split lines at U+2028 and its kin too."""
    return f"data: {json.dumps(value, allow_nan=False)}\n\n"


def _sayable(text: str, most: int) -> str:
    """What an answer can carry: no half of a surrogate pair, and not all of what was too long."""
    shown = text if len(text) <= most else f"{text[:most]}..."
    return shown if shown.isascii() else shown.encode("utf-8", "backslashreplace").decode()


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
