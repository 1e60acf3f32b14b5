"""The routes of one model: health, models, completions and their token ids, with keys and a quota.

Every error on every route is in OpenAI's envelope, so that the SDK's error has its class, code and param.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from tunewright.endpoint import answering
from tunewright.endpoint.diary import Diary, Entry
from tunewright.endpoint.quota import Quota
from tunewright.endpoint.served import Served
from tunewright.endpoint.shapes import ApiError, model_card, read_request, read_text_request
from tunewright.endpoint.worker import Worker


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

    def admit(tokens: int, note: Entry) -> None:
        if quota is not None:
            _admit(quota, tokens, name, note)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        worker.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.add_middleware(Diary)
    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)

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
        _check_model(str(wanted.model), name)
        return await answering.chat(request, served, worker, wanted, name=name, admit=admit if metered else None)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        metered = _authenticate(request, keys)
        wanted = read_text_request(await request.body())
        _check_model(str(wanted.model), name)
        return await answering.text(request, served, worker, wanted, name=name, admit=admit if metered else None)

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        """The ids that the model is given for a chat request, in vLLM's form."""
        _authenticate(request, keys)
        wanted = read_request(await request.body())
        _check_model(str(wanted.model), name)
        ids = await asyncio.to_thread(answering.prompt, served, wanted)
        return JSONResponse({"count": len(ids), "max_model_len": served.completer.context, "tokens": ids})

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


async def api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def http_error(request: Request, error: Exception) -> Response:
    """What the router says: no such route, or not with this method."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.scope['path']}"
    if error.status_code == 405:
        said = ApiError(405, f"Not allowed: {where}.", code="method_not_supported", headers=error.headers)
    elif error.status_code == 404:
        said = ApiError(404, f"Unknown request URL: {where}.", code="unknown_url")
    else:
        said = ApiError(error.status_code, str(error.detail), headers=error.headers)
    return JSONResponse(said.body, said.status, said.headers)
