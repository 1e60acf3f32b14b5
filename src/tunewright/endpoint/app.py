"""The routes: health, models and chat completions, with keys and a quota.

Every error on every route is in OpenAI's envelope, so that the SDK's error has its class, code and param.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from tunewright.endpoint.answers import Ask, Piece
from tunewright.endpoint.diary import CLIENT_LEFT, Diary, Entry, entry, server_error
from tunewright.endpoint.quota import Quota
from tunewright.endpoint.served import Served
from tunewright.endpoint.shapes import (
    ApiError,
    ChatRequest,
    Choice,
    Reply,
    event,
    model_card,
    read_request,
)
from tunewright.endpoint.worker import Worker
from tunewright.errors import DataError

T = TypeVar("T")

logger = logging.getLogger("tunewright.endpoint")

DONE = "data: [DONE]\n\n"


def create_app(
    served: Served,
    *,
    name: str,
    keys: Mapping[str, bool],
    tokens_per_minute: int | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> FastAPI:
    """The endpoint's app.

    Args:
        served: the model.
        name: what clients call it.
        keys: the keys that open the endpoint; True for those that the quota holds for.
        tokens_per_minute: the quota; None for none.
        clock: seconds, for the quota's minute.
    """
    worker = Worker()
    quota = Quota(tokens_per_minute, clock) if tokens_per_minute is not None else None

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        worker.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.add_middleware(Diary)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)

    @app.get("/healthz")
    async def health() -> Response:
        return JSONResponse({"status": "ok", "model": name, "pid": os.getpid()})

    @app.get("/v1/models")
    async def list_models(request: Request) -> Response:
        _authenticate(request, keys)
        return JSONResponse({"object": "list", "data": [model_card(name, served.created)]})

    @app.get("/v1/models/{model:path}")
    async def retrieve_model(request: Request, model: str) -> Response:
        _authenticate(request, keys)
        _check_model(model, name)
        return JSONResponse(model_card(name, served.created))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        metered = _authenticate(request, keys)
        wanted = read_request(await request.body())
        _check_model(wanted.model, name)
        ask = await _ask(served, wanted)
        note = entry(request)
        note.notes["prompt_tokens"] = len(ask.prompt)
        if quota is not None and metered:
            _admit(quota, served.estimate(ask), name, note)
        reply = Reply(
            id=f"chatcmpl-{secrets.token_hex(12)}",
            created=int(time.time()),
            model=name,
            speller=served.speller,
            logprobs=wanted.logprobs,
            include_usage=wanted.stream_options is not None and wanted.stream_options.include_usage,
        )
        if wanted.stream:
            return StreamingResponse(
                _stream(served, worker, ask, reply, note),
                media_type="text/event-stream",
                headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
            )
        choices = await _while_connected(request, _collect(served, worker, ask, note))
        if choices is None:
            return Response(status_code=CLIENT_LEFT)
        return JSONResponse(reply.whole(choices, len(ask.prompt)))

    return app


def _authenticate(request: Request, keys: Mapping[str, bool]) -> bool:
    """Whether the quota holds for the request's key. Every key is compared, so that time tells nothing about them."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    sent = given.strip().encode("latin-1")
    matches = [metered for key, metered in keys.items() if hmac.compare_digest(sent, key.encode())]
    if scheme.lower() != "bearer" or not sent:
        message = "No API key was given. Send it in the header Authorization: Bearer YOUR_KEY."
    elif not matches:
        message = "Incorrect API key provided. The endpoint's key is in its run folder, in deploy/key."
    else:
        return matches[0]
    raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def _check_model(asked: str, name: str) -> None:
    if asked != name:
        raise ApiError(
            404,
            f"The model '{asked}' does not exist; this endpoint serves '{name}'.",
            param="model",
            code="model_not_found",
        )


async def _ask(served: Served, wanted: ChatRequest) -> Ask:
    """The request in tokens, known to fit into the model's context."""
    try:
        prompt = await asyncio.to_thread(served.prompt, wanted.conversation)
    except DataError as error:
        raise ApiError(400, f"Invalid 'messages': {error}.", param="messages", code="invalid_value") from None
    ask = Ask(
        prompt=prompt,
        max_tokens=wanted.max_completion_tokens or wanted.max_tokens,
        temperature=wanted.temperature,
        top_p=1.0 if wanted.top_p is None else wanted.top_p,
        seed=wanted.seed,
        n=wanted.n or 1,
        stop=tuple(wanted.stop),
        num_top=wanted.top_logprobs or 0,
    )
    context, needed = served.completer.context, served.needed(ask)
    if context is not None and len(prompt) + needed > context:
        raise ApiError(
            400,
            f"This model's maximum context length is {context} tokens. However, you requested {len(prompt) + needed} "
            f"tokens ({len(prompt)} in the messages, {needed} in the completion). Please reduce the length of the "
            "messages or completion.",
            param="messages",
            code="context_length_exceeded",
        )
    return ask


def _admit(quota: Quota, tokens: int, name: str, note: Entry) -> None:
    verdict = quota.admit(tokens)
    note.headers |= verdict.headers
    if verdict.admitted:
        return
    if verdict.fits:
        said, then = "Rate limit reached", f"Please try again in {verdict.headers['x-ratelimit-reset-tokens']}."
    else:
        said, then = "Request too large", "Shorten the messages or ask for fewer tokens; waiting does not help."
    raise ApiError(
        429,
        f"{said} for {name} on tokens per min (TPM): Limit {verdict.limit}, Used {verdict.used}, Requested {tokens}. "
        f"{then}",
        kind="tokens",
        code="rate_limit_exceeded",
    )


async def _collect(served: Served, worker: Worker, ask: Ask, note: Entry) -> list[Choice]:
    choices = [Choice() for _ in range(ask.n)]
    async with contextlib.aclosing(worker.run(lambda: served.answer(ask))) as events:
        async for index, said in events:
            choices[index].add(said)
    note.notes["completion_tokens"] = sum(choice.num_tokens for choice in choices)
    return choices


async def _stream(served: Served, worker: Worker, ask: Ask, reply: Reply, note: Entry) -> AsyncIterator[str]:
    """The answer as server-sent events. An error on the way is the last event, for the status is already sent."""
    speaking = -1
    pieces = finished = completion_tokens = 0
    try:
        async with contextlib.aclosing(worker.run(lambda: served.answer(ask))) as events:
            async for index, said in events:
                if index != speaking:
                    speaking = index
                    yield reply.first(index)
                if isinstance(said, Piece):
                    pieces += 1
                    if said.text or said.tokens:
                        yield reply.piece(index, said)
                else:
                    finished += 1
                    completion_tokens += said.num_tokens
                    yield reply.last(index, said)
        if reply.include_usage:
            yield reply.usage(len(ask.prompt), completion_tokens)
        yield DONE
    except Exception:
        logger.exception("%s failed while streaming", note.id)
        yield event(server_error(note).body)
    finally:
        note.notes["completion_tokens"] = completion_tokens
        if finished < ask.n:
            note.notes |= {"completion_tokens": pieces, "cut_off": "yes"}


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` gives; None where the client left before, and then the work is stopped."""

    async def until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.create_task(work), asyncio.create_task(until_gone())
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router says: no such route, or not with this method."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    if error.status_code == 405:
        said = ApiError(405, f"Not allowed: {where}.", code="method_not_supported", headers=error.headers)
    elif error.status_code == 404:
        said = ApiError(404, f"Unknown request URL: {where}.", code="unknown_url")
    else:
        said = ApiError(error.status_code, str(error.detail), headers=error.headers)
    return JSONResponse(said.body, said.status, said.headers)
