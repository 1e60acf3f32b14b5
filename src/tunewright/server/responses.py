"""Responses, OpenAI's newer form of completions: the same engines are asked, in the chat form; what was said is kept,
so that a later request can go on from it.

What is not covered: background work, tools that the server itself would run, reasoning, images, stored conversations
of other kinds than `previous_response_id`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import AfterValidator, Field, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError, to_json
from sqlalchemy import delete, insert

from tunewright.endpoint.answering import while_connected
from tunewright.endpoint.diary import CLIENT_LEFT, entry
from tunewright.endpoint.shapes import ApiError, Flag, Part, explained, invalid
from tunewright.server import documents, store, tables, web
from tunewright.server.chat import CHAT, Job, let_in, streamed
from tunewright.server.state import Server
from tunewright.server.store import new_id, now
from tunewright.server.web import Caller, Inference

router = APIRouter(tags=["responses"])


def _items(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, dict) for one in value)):
        return value
    raise PydanticCustomError("input", "it is a text or a list of items")


INPUT = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}


class ResponseRequest(Part):
    model: str | None = None
    input: Annotated[Any, AfterValidator(_items), WithJsonSchema(INPUT)] = Field(default=[])
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    parallel_tool_calls: bool | None = None
    previous_response_id: Annotated[str, Field(max_length=128)] | None = None
    store: bool | None = None
    stream: Flag = False
    temperature: float | None = Field(default=None, ge=0, le=2)
    text: dict[str, Any] | None = None
    tool_choice: Any = None
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=128)
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    top_p: float | None = Field(default=None, ge=0, le=1)
    truncation: Literal["auto", "disabled"] | None = None
    include: list[str] | None = None

    @property
    def kept(self) -> bool:
        return self.store is not False

    @property
    def logprobs(self) -> bool:
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())


REFUSED = {
    "background": "answers are written while the client waits",
    "conversation": "what was said is kept by response; send previous_response_id",
    "prompt": "there are no stored prompts here; send instructions and input",
    "max_tool_calls": "the server runs no tools",
}
"""What would change the answer and cannot be honoured: why."""


@router.post(
    "/responses",
    openapi_extra=documents.reads(ResponseRequest),
    responses=documents.shows(documents.Response, streamed=True),
)
async def create_response(request: Request) -> Response:
    caller = await web.authenticated(request, "inference")
    server = web.server(request)
    raw = await request.body()
    wanted = _read(raw)
    await web.check_storable(raw)
    said = await _earlier(server, caller, wanted)
    said += _messages(wanted)
    try:
        job = await let_in(server, caller, CHAT, to_json(_chat(wanted, said)))
    except ApiError as error:
        raise _renamed(error) from None
    writing = Writing(server, caller, wanted, job, said)
    note = entry(request)
    note.headers |= job.headers
    note.notes["model"] = job.route.deployment or job.route.target.name
    if wanted.stream:
        return await streamed(request, note, writing.events(), _named, "")
    answer = await while_connected(request, writing.whole())
    if answer is None:
        return Response(status_code=CLIENT_LEFT)
    return Response(to_json(answer), media_type="application/json")


@router.get("/responses/{response_id}", responses=documents.shows(documents.Response))
def retrieve_response(request: Request, caller: Inference, response_id: str) -> dict[str, Any]:
    found: dict[str, Any] = _find(web.server(request), caller, response_id)["body"]
    return found


@router.delete("/responses/{response_id}", responses=documents.shows(documents.Deleted))
def delete_response(request: Request, caller: Inference, response_id: str) -> dict[str, Any]:
    server = web.server(request)
    _find(server, caller, response_id)
    with server.store.begin() as connection:
        connection.execute(delete(tables.responses).where(tables.responses.c.id == response_id))
    return {"id": response_id, "object": "response", "deleted": True}


@dataclass
class Writing:
    """One response while it is written."""

    server: Server
    caller: Caller
    wanted: ResponseRequest
    job: Job
    said: list[dict[str, Any]]
    """The conversation so far, as chat messages; the instructions are not among them."""
    id: str = field(default_factory=lambda: new_id("resp_", size=48))
    created: int = field(default_factory=lambda: int(time.time()))
    output: list[dict[str, Any]] = field(default_factory=list)
    number: int = -1

    async def whole(self) -> dict[str, Any]:
        """Raises:
        ApiError: the engine refuses the request, or has ended.
        """
        try:
            reply = await self.job.reply()
        except ApiError as error:
            raise _renamed(error) from None
        [choice] = reply["choices"]
        message = choice["message"]
        if message.get("content") or not message.get("tool_calls"):
            content = (choice.get("logprobs") or {}).get("content") or ()
            self.output.append(_message(message.get("content") or "", list(map(_logprob, content))))
        self.output += [_call(one["id"], one["function"]) for one in message.get("tool_calls") or ()]
        return await self._settled(choice["finish_reason"], reply["usage"])

    async def events(self) -> AsyncGenerator[dict[str, Any]]:
        """The response as named events, as it is written."""
        chunks = self.job.chunks()
        async with contextlib.aclosing(chunks):
            try:
                first = await anext(chunks)
            except ApiError as error:
                raise _renamed(error) from None
            yield self._event("response.created", response=self._shape("in_progress"))
            yield self._event("response.in_progress", response=self._shape("in_progress"))
            finish, usage = "stop", None
            try:
                async for chunk in _chained(first, chunks):
                    usage = chunk.get("usage") or usage
                    for choice in chunk["choices"]:
                        finish = choice["finish_reason"] or finish
                        for one in self._told(choice):
                            yield one
            except ApiError as error:
                failed = self._shape("failed")
                failed["error"] = {"code": "server_error", "message": str(error)}
                yield self._event("response.failed", response=failed)
                return
        if not self.output:
            for one in self._begin_text():
                yield one
        for one in self._end_item():
            yield one
        answer = await self._settled(finish, usage or {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0})
        yield self._event(f"response.{answer['status']}", response=answer)

    def _told(self, choice: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of one chunk."""
        delta = choice["delta"]
        if delta.get("content"):
            if not self.output or self.output[-1]["type"] != "message":
                yield from self._end_item()
                yield from self._begin_text()
            logprobs = [_logprob(one) for one in (choice.get("logprobs") or {}).get("content") or ()]
            [part] = self.output[-1]["content"]
            part["text"] += delta["content"]
            part["logprobs"] += logprobs
            yield self._part("response.output_text.delta", delta=delta["content"], logprobs=logprobs)
        for call in delta.get("tool_calls") or ():
            if "id" in call:
                yield from self._end_item()
                self.output.append(_call(call["id"], {**call["function"], "arguments": ""}, status="in_progress"))
                yield self._item("response.output_item.added")
            if more := call["function"].get("arguments"):
                self.output[-1]["arguments"] += more
                yield self._of_item("response.function_call_arguments.delta", delta=more)

    def _begin_text(self) -> Iterator[dict[str, Any]]:
        item = _message("", [], status="in_progress")
        [part] = item["content"]
        self.output.append(item)
        yield self._event("response.output_item.added", output_index=len(self.output) - 1, item={**item, "content": []})
        yield self._part("response.content_part.added", part=dict(part))

    def _end_item(self) -> Iterator[dict[str, Any]]:
        """The events that end the item that is being written, if there is one."""
        if not self.output:
            return
        item = self.output[-1]
        item["status"] = "completed"
        if item["type"] == "message":
            [part] = item["content"]
            yield self._part("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
            yield self._part("response.content_part.done", part=part)
        else:
            yield self._of_item("response.function_call_arguments.done", name=item["name"], arguments=item["arguments"])
        yield self._item("response.output_item.done")

    def _event(self, kind: str, **values: Any) -> dict[str, Any]:
        self.number += 1
        return {"type": kind, "sequence_number": self.number, **values}

    def _item(self, kind: str) -> dict[str, Any]:
        return self._event(kind, output_index=len(self.output) - 1, item=dict(self.output[-1]))

    def _of_item(self, kind: str, **values: Any) -> dict[str, Any]:
        return self._event(kind, item_id=self.output[-1]["id"], output_index=len(self.output) - 1, **values)

    def _part(self, kind: str, **values: Any) -> dict[str, Any]:
        return self._of_item(kind, content_index=0, **values)

    async def _settled(self, finish: str, usage: Mapping[str, int]) -> dict[str, Any]:
        """The whole response, kept where it is to be."""
        reason = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(finish)
        answer = self._shape("incomplete" if reason else "completed")
        answer["incomplete_details"] = {"reason": reason} if reason else None
        answer["completed_at"] = None if reason else int(time.time())
        answer["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        if reason and self.output:
            self.output[-1]["status"] = "incomplete"
        if self.wanted.kept:
            await asyncio.to_thread(self._keep, answer)
        return answer

    def _shape(self, status: str) -> dict[str, Any]:
        wanted = self.wanted
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": wanted.instructions,
            "max_output_tokens": wanted.max_output_tokens,
            "metadata": wanted.metadata or {},
            "model": self.job.route.target.name,
            "output": list(self.output),
            "parallel_tool_calls": wanted.parallel_tool_calls is not False,
            "previous_response_id": wanted.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": wanted.kept,
            "temperature": 1.0 if wanted.temperature is None else wanted.temperature,
            "text": {"format": {"type": "text"}, **(wanted.text or {})},
            "tool_choice": wanted.tool_choice or "auto",
            "tools": wanted.tools or [],
            "top_logprobs": wanted.top_logprobs or 0,
            "top_p": 1.0 if wanted.top_p is None else wanted.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def _keep(self, answer: dict[str, Any]) -> None:
        row = {"id": self.id, "created_at": now(), "key_id": self.caller.key.id, "body": answer}
        with self.server.store.begin() as connection:
            conversation = [*self.said, *_spoken(self.output)]
            connection.execute(insert(tables.responses).values(**row, conversation=conversation))


def _read(raw: bytes) -> ResponseRequest:
    try:
        wanted = ResponseRequest.model_validate_json(raw)
    except ValidationError as error:
        raise explained(error.errors(include_url=False, include_context=False)[0]) from None
    if wanted.model is None:
        raise invalid("model", "Missing required parameter: 'model'.", code="missing_required_parameter")
    extra = wanted.model_extra or {}
    for param, reason in REFUSED.items():
        if extra.get(param):
            raise _unsupported(param, reason)
    if isinstance(thinking := extra.get("reasoning"), dict) and thinking.get("effort") not in (None, "none"):
        raise _unsupported("reasoning", "the model has no reasoning to set")
    if wanted.truncation == "auto":
        raise _unsupported("truncation", "nothing is left out of a conversation; shorten it")
    if not wanted.input and wanted.previous_response_id is None:
        raise invalid("input", "Missing required parameter: 'input'.", code="missing_required_parameter")
    return wanted


def _unsupported(param: str, reason: str) -> ApiError:
    return ApiError(400, f"'{param}' cannot be honoured: {reason}.", param=param, code="unsupported_parameter")


async def _earlier(server: Server, caller: Caller, wanted: ResponseRequest) -> list[dict[str, Any]]:
    """The conversation that a request goes on with."""
    if wanted.previous_response_id is None:
        return []
    try:
        found = await asyncio.to_thread(_find, server, caller, wanted.previous_response_id)
    except ApiError:
        raise invalid(
            "previous_response_id",
            f"Previous response with id '{wanted.previous_response_id}' not found.",
            code="previous_response_not_found",
        ) from None
    return list(found["conversation"])


def _find(server: Server, caller: Caller, response_id: str) -> dict[str, Any]:
    """A response's row; only for the key that it was written for, and for administrators."""
    found = None
    if response_id.isprintable():  # PostgreSQL takes no NUL
        with server.store.read() as connection:
            found = store.row(connection, tables.responses, id=response_id)
    if found is None or (found["key_id"] != caller.key.id and not caller.key.opens("admin")):
        raise web.not_found("response", response_id[:128], param="response_id")
    return found


def _messages(wanted: ResponseRequest) -> list[dict[str, Any]]:
    """What is said anew, as chat messages."""
    if isinstance(wanted.input, str):
        return [{"role": "user", "content": wanted.input}]
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(wanted.input):
        where = f"input[{number}]"
        match item.get("type", "message"):
            case "message":
                messages.append({"role": item.get("role"), "content": _content(item.get("content"), where)})
            case "function_call":
                function = {"name": item.get("name"), "arguments": item.get("arguments")}
                call = {"id": item.get("call_id"), "type": "function", "function": function}
                _add_call(messages, call)
            case "function_call_output":
                content = _content(item.get("output"), where)
                messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
            case "reasoning":
                continue
            case other:
                raise invalid(where, f"Invalid '{where}': items of type {str(other)[:64]!r} are not supported.")
    return messages


def _add_call(messages: list[dict[str, Any]], call: dict[str, Any]) -> None:
    """A call is part of the assistant's message before it."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    messages[-1].setdefault("tool_calls", []).append(call)


def _content(value: Any, where: str) -> Any:
    """Text, or parts of it in the chat form."""
    if not isinstance(value, list):
        return value
    parts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text", "text"):
            raise invalid(where, f"Invalid '{where}': a part of type {str(kind)[:64]!r}; only text is supported.")
        parts.append({"type": "text", "text": part.get("text")})
    return parts


def _chat(wanted: ResponseRequest, said: list[dict[str, Any]]) -> dict[str, Any]:
    """The request in the chat form."""
    instructions = [{"role": "system", "content": wanted.instructions}] if wanted.instructions else []
    body = {
        "model": wanted.model,
        "messages": [*instructions, *said],
        "max_completion_tokens": wanted.max_output_tokens,
        "temperature": wanted.temperature,
        "top_p": wanted.top_p,
        "tools": [_tool(tool, place) for place, tool in enumerate(wanted.tools or ())],
        "tool_choice": _choice(wanted.tool_choice),
        "parallel_tool_calls": wanted.parallel_tool_calls,
        "response_format": _format(wanted.text),
        "logprobs": wanted.logprobs,
        "top_logprobs": wanted.top_logprobs,
        "stream": wanted.stream,
        "stream_options": {"include_usage": True} if wanted.stream else None,
    }
    return {key: value for key, value in body.items() if value is not None and value != []}


def _tool(tool: dict[str, Any], place: int) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise _unsupported(f"tools[{place}].type", f"there is no tool {str(tool.get('type'))[:64]!r} on this server")
    function = {key: tool[key] for key in ("name", "description", "parameters", "strict") if tool.get(key) is not None}
    return {"type": "function", "function": function}


def _choice(choice: Any) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _format(text: dict[str, Any] | None) -> Any:
    given = (text or {}).get("format")
    if not isinstance(given, dict) or given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {key: given[key] for key in given if key != "type"}}


def _renamed(error: ApiError) -> ApiError:
    """An error of the chat form, with the parameter's name in this one."""
    names = {"messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text.format"}
    said = error.body["error"]
    for name, ours in names.items():
        if said.get("param") and said["param"].startswith(name):
            message = said["message"].replace(f"'{said['param']}'", f"'{ours}'")
            error.body = {"error": {**said, "param": ours, "message": message}}
    return error


def _message(text: str, logprobs: list[dict[str, Any]], status: str = "completed") -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
    return {"id": new_id("msg_"), "type": "message", "status": status, "role": "assistant", "content": [part]}


def _call(call_id: str, function: Mapping[str, Any], status: str = "completed") -> dict[str, Any]:
    called = {"call_id": call_id, "name": function["name"], "arguments": function["arguments"]}
    return {"id": new_id("fc_"), "type": "function_call", "status": status, **called}


def _logprob(token: dict[str, Any]) -> dict[str, Any]:
    top = [one | {"bytes": one["bytes"] or []} for one in token["top_logprobs"]]
    return token | {"bytes": token["bytes"] or [], "top_logprobs": top}


def _spoken(output: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What an assistant said, as chat messages."""
    messages: list[dict[str, Any]] = []
    for item in output:
        if item["type"] == "message":
            messages.append({"role": "assistant", "content": item["content"][0]["text"]})
        else:
            function = {"name": item["name"], "arguments": item["arguments"]}
            _add_call(messages, {"id": item["call_id"], "type": "function", "function": function})
    return messages


async def _chained(first: dict[str, Any], rest: AsyncGenerator[dict[str, Any]]) -> AsyncGenerator[dict[str, Any]]:
    yield first
    async for one in rest:
        yield one


def _named(value: dict[str, Any]) -> str:
    """A server-sent event with its name. ASCII, since some clients split lines at U+2028 and its kin too."""
    return f"event: {value['type']}\ndata: {json.dumps(value, allow_nan=False)}\n\n"
