"""Completions: read and checked here, let in on a deployment's terms, answered by an engine, annotated on the way out.

A request is parsed once and its reply written once, and no database is asked on the way: this is the path on which a
server spends its time.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import ValidationError
from pydantic_core import to_json

from tunewright.endpoint.answering import DONE, while_connected
from tunewright.endpoint.diary import CLIENT_LEFT, Entry, entry, server_error
from tunewright.endpoint.shapes import (
    ApiError,
    Asking,
    ChatRequest,
    Part,
    TextRequest,
    event,
    explained,
    invalid,
    no_embeddings,
    read_request,
    read_text_request,
)
from tunewright.server import documents, web
from tunewright.server.admission import Admission, Route
from tunewright.server.state import Server
from tunewright.server.web import Caller

logger = logging.getLogger("tunewright.server")

SCREENED = 64
"""Characters of a stream that are held until they have been screened together."""
TOKEN = 4
"""Characters of a token, about."""

router = APIRouter(tags=["completions"], route_class=web.Plain)


@dataclass(frozen=True)
class Kind:
    """One of the two routes that complete."""

    path: str
    read: Callable[..., ChatRequest | TextRequest]
    model: type[Asking]


CHAT = Kind("/chat/completions", read_request, ChatRequest)
TEXT = Kind("/completions", read_text_request, TextRequest)
KINDS = {f"/v1{kind.path}": kind for kind in (CHAT, TEXT)}


class EmbeddingRequest(Part):
    model: str | None = None
    input: Any


CHAT_BODY, TEXT_BODY = documents.reads(ChatRequest), documents.reads(TextRequest)
EMBEDDING_BODY = documents.reads(EmbeddingRequest)


@router.post(CHAT.path, openapi_extra=CHAT_BODY, responses=documents.shows(documents.ChatCompletion, streamed=True))
async def chat_completions(request: Request) -> Response:
    return await _respond(request, CHAT)


@router.post(TEXT.path, openapi_extra=TEXT_BODY, responses=documents.shows(documents.Completion, streamed=True))
async def completions(request: Request) -> Response:
    return await _respond(request, TEXT)


@router.post("/embeddings", openapi_extra=EMBEDDING_BODY, status_code=400, responses=documents.REFUSED)
async def embeddings(request: Request) -> Response:
    return await _refuse_embeddings(request)


@router.post(
    "/deployments/{deployment}/chat/completions",
    openapi_extra=CHAT_BODY,
    responses=documents.shows(documents.ChatCompletion, streamed=True),
)
async def deployed_chat_completions(request: Request, deployment: str) -> Response:
    return await _respond(request, CHAT, deployment)


@router.post(
    "/deployments/{deployment}/completions",
    openapi_extra=TEXT_BODY,
    responses=documents.shows(documents.Completion, streamed=True),
)
async def deployed_completions(request: Request, deployment: str) -> Response:
    return await _respond(request, TEXT, deployment)


@router.post(
    "/deployments/{deployment}/embeddings", openapi_extra=EMBEDDING_BODY, status_code=400, responses=documents.REFUSED
)
async def deployed_embeddings(request: Request, deployment: str) -> Response:
    return await _refuse_embeddings(request, deployment)


@dataclass
class Job:
    """A request that has been let in."""

    server: Server
    route: Route
    kind: Kind
    wanted: ChatRequest | TextRequest
    characters: int
    """Of the prompt."""
    annotations: Any
    """What the filter says of the prompt."""
    headers: dict[str, str]
    said: int = 0
    """Chunks with text that a stream has brought: tokens, about."""
    begun: bool = False
    """Whether a stream has brought anything; one that the engine refused has not, and is not counted."""

    @property
    def body(self) -> dict[str, Any]:
        """What the engine is asked: the request as it was checked, under the model's own name."""
        return self.wanted.model_dump(exclude_unset=True) | {"model": self.route.target.name}

    async def reply(self) -> dict[str, Any]:
        """Raises:
        ApiError: the engine refuses it, or has ended.
        """
        reply = await self.server.engines.ask(self.route.target, self.kind.path, self.body)
        usage = reply["usage"]
        self.route.used(usage["prompt_tokens"], usage["completion_tokens"])
        if self.route.screens:
            for choice in reply["choices"]:
                found, blocked = await self.route.screen_output(_text(choice))
                if blocked:
                    _blank(choice)
                if found is not None:
                    choice["content_filter_results"] = found
        if self.annotations is not None:
            reply["prompt_filter_results"] = self.annotations
        return reply

    async def chunks(self) -> AsyncGenerator[dict[str, Any]]:
        """As `reply`, in chunks. What was used is said at the end, whether or not the client asked to hear it."""
        annotations = self.annotations
        body = self.body | {"stream_options": {"include_usage": True}}
        engine = self._counted(self.server.engines.stream(self.route.target, self.kind.path, body))
        usage = None
        try:
            async with contextlib.aclosing(self._screened(engine) if self.route.screens else engine) as chunks:
                async for chunk in chunks:
                    if annotations is not None:  # not before the engine has taken the request
                        yield {**_EMPTY, "prompt_filter_results": annotations}
                        annotations = None
                    usage = chunk.get("usage") or usage
                    if self.wanted.include_usage:
                        yield chunk
                    elif chunk["choices"]:
                        chunk.pop("usage", None)
                        yield chunk
        finally:
            if usage is None and self.begun:  # it broke off, so the chunks that came are counted
                usage = {"prompt_tokens": self.characters // TOKEN, "completion_tokens": self.said}
            if usage is not None:
                self.route.used(usage["prompt_tokens"], usage["completion_tokens"])

    async def _counted(self, engine: AsyncGenerator[dict[str, Any]]) -> AsyncGenerator[dict[str, Any]]:
        async with contextlib.aclosing(engine):
            async for chunk in engine:
                self.begun = True
                self.said += any(_text(choice) for choice in chunk["choices"])
                yield chunk

    async def _screened(self, engine: AsyncGenerator[dict[str, Any]]) -> AsyncGenerator[dict[str, Any]]:
        """The chunks, held until the filter has let their text through. A choice that it stops says so and ends."""
        texts: dict[int, str] = {}
        held: dict[int, list[dict[str, Any]]] = {}
        seen: dict[int, int] = {}
        blocked: set[int] = set()
        async with contextlib.aclosing(engine):
            async for chunk in engine:
                if not chunk["choices"]:
                    yield chunk
                    continue
                [choice] = chunk["choices"]
                index = choice["index"]
                if index in blocked:
                    continue
                text = texts[index] = texts.get(index, "") + _text(choice)
                waiting = held.setdefault(index, [])
                waiting.append(chunk)
                if choice["finish_reason"] is None and len(text) - seen.get(index, 0) < SCREENED:
                    continue
                seen[index] = len(text)
                found, stop = await self.route.screen_output(text)
                if stop:
                    blocked.add(index)
                    waiting[:] = [_stopped(chunk)]
                if found is not None:
                    waiting[-1]["choices"][0]["content_filter_results"] = found
                for one in waiting:
                    yield one
                waiting.clear()
                if len(blocked) == (self.wanted.n or 1) and self.kind is CHAT:
                    return


async def let_in(
    server: Server, caller: Caller, kind: Kind, raw: bytes, *, deployment: str | None = None, metered: bool = True
) -> Job:
    """Read a request and take it past everything that stands before an engine.

    Args:
        deployment: named in the path; then the body need not name a model.
        metered: whether the deployment's quota counts it.

    Raises:
        ApiError: it is not let in.
    """
    wanted = kind.read(raw, named=deployment is not None)
    name = deployment if deployment is not None else str(wanted.model)
    route = await Admission.resolve(server, caller, name, deployment is not None)
    texts = list(_prompt(wanted))
    characters = sum(map(len, texts))
    headers: dict[str, str] = {}
    if isinstance(wanted, TextRequest):
        ids = sum(len(one) for one in wanted.prompt if not isinstance(one, str))
        if ids and route.policy.prompt.looks:
            raise _unreadable()
        characters += TOKEN * ids
        answers = len(wanted.prompt) * max(wanted.n or 1, wanted.best_of or 1)
    else:
        answers = wanted.n or 1
        if wanted.tools or wanted.response_format is not None:
            texts += _instructions(wanted)
    if metered:
        headers = route.admit(characters, wanted.most, answers)
    annotations = await route.screen_prompt(texts, from_users=list(_prompt(wanted, only=("user", "tool"))))
    return Job(server, route, kind, wanted, characters, annotations, headers)


async def _respond(request: Request, kind: Kind, deployment: str | None = None) -> Response:
    caller = await web.authenticated(request, "inference")
    job = await let_in(web.server(request), caller, kind, await request.body(), deployment=deployment)
    note = entry(request)
    note.headers |= job.headers
    note.notes["model"] = job.route.deployment or job.route.target.name
    if job.wanted.stream:
        return await streamed(request, note, job.chunks(), event, DONE)
    reply = await while_connected(request, job.reply())
    if reply is None:
        return Response(status_code=CLIENT_LEFT)
    return Response(to_json(reply), media_type="application/json")


async def streamed(
    request: Request,
    note: Entry,
    chunks: AsyncGenerator[dict[str, Any]],
    write: Callable[[dict[str, Any]], str],
    done: str,
) -> Response:
    """Chunks as server-sent events. What goes wrong before the first is an error with its status; what goes wrong
    later is the last event."""

    async def begin() -> dict[str, Any] | None:
        return await anext(chunks, None)

    first = await while_connected(request, begin())
    if first is None:
        await chunks.aclose()
        return Response(status_code=CLIENT_LEFT)

    async def events() -> AsyncGenerator[str]:
        async with contextlib.aclosing(chunks):
            try:
                yield write(first)
                async for chunk in chunks:
                    yield write(chunk)
                yield done
            except ApiError as error:
                yield event(error.body)
            except Exception:
                logger.exception("%s failed while streaming", note.id)
                yield event(server_error(note).body)

    return StreamingResponse(
        events(),
        media_type="text/event-stream",
        headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
    )


async def _refuse_embeddings(request: Request, deployment: str | None = None) -> Response:
    caller = await web.authenticated(request, "inference")
    try:
        wanted = EmbeddingRequest.model_validate_json(await request.body())
    except ValidationError as error:
        raise explained(error.errors(include_url=False, include_context=False)[0]) from None
    name = deployment if deployment is not None else wanted.model
    if name is None:
        raise invalid("model", "Missing required parameter: 'model'.", code="missing_required_parameter")
    await Admission.resolve(web.server(request), caller, name, deployment is not None)
    raise no_embeddings(name)


_EMPTY: dict[str, Any] = {"id": "", "object": "", "created": 0, "model": "", "choices": []}
"""The chunk in which Azure says what it thinks of a prompt."""


def _prompt(wanted: ChatRequest | TextRequest, *, only: Sequence[str] | None = None) -> Iterator[str]:
    """What a prompt says; `only` messages of these roles."""
    if isinstance(wanted, TextRequest):
        yield from (one for one in wanted.prompt if isinstance(one, str))
        return
    for message in wanted.messages:
        if only is not None and message.role not in only:
            continue
        if message.content:
            yield message.content
        if message.role == "tool" and message.name:
            yield message.name
        for call in message.tool_calls or ():
            yield call.function.name
            yield call.function.arguments


def _instructions(wanted: ChatRequest) -> Iterator[str]:
    """What an application tells the model beside its messages: a text for each tool, and one for the schema."""
    for tool in wanted.tools:
        one = tool.function  # templates show what is not declared, too
        said = [one.name, one.description, one.parameters, one.model_extra, tool.model_extra]
        yield "\n".join(_strings(said))
    if (wanted.response_format or {}).get("type") == "json_schema":
        schema = wanted.response_format["json_schema"]
        yield "\n".join(_strings([schema.get(key) for key in ("name", "description", "schema")]))


def _strings(value: Any) -> Iterator[str]:
    """The names, texts and numbers in a JSON value, as they are meant: as JSON, a new line would be a letter n."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield key
            yield from _strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)
    elif value is not None and not isinstance(value, bool):
        yield str(value)


def _unreadable() -> ApiError:
    return ApiError(
        400,
        "A prompt of token ids cannot be looked through by the content filter, which reads text. Send the prompt as "
        "text, or ask a deployment whose policy looks for nothing in prompts.",
        param="prompt",
        code="unsupported_value",
    )


def _text(choice: dict[str, Any]) -> str:
    """What a choice of a reply, or of a chunk, says."""
    if "text" in choice:
        return str(choice["text"])
    said = choice.get("message") or choice["delta"]
    calls: Sequence[dict[str, Any]] = said.get("tool_calls") or ()
    return (said.get("content") or "") + "".join(one["function"].get("arguments", "") for one in calls)


def _blank(choice: dict[str, Any]) -> None:
    """Take out what the filter holds back."""
    choice |= {"finish_reason": "content_filter", "logprobs": None}
    if "text" in choice:
        choice["text"] = ""
    else:
        choice["message"] = {"role": "assistant", "content": None, "refusal": None}


def _stopped(chunk: dict[str, Any]) -> dict[str, Any]:
    """A choice's last chunk, instead of what the filter holds back."""
    [choice] = chunk["choices"]
    ended: dict[str, Any] = {"index": choice["index"], "logprobs": None, "finish_reason": "content_filter"}
    if "text" in choice:
        ended["text"] = ""
    else:
        ended["delta"] = {}
    return chunk | {"choices": [ended]}
