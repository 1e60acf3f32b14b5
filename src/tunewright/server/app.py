"""The server's app: its parts put together, its routes on their surfaces, its errors in one form."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import cast

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException

from tunewright import __version__
from tunewright.endpoint.diary import Diary, entry
from tunewright.endpoint.shapes import ApiError, explained
from tunewright.server import (
    accounts,
    admission,
    arm,
    batches,
    chat,
    documents,
    files,
    grading,
    jobs,
    management,
    metrics,
    models,
    moderations,
    organization,
    responses,
    store,
    web,
)
from tunewright.server.limits import BodyLimit
from tunewright.server.state import Server

logger = logging.getLogger("tunewright.server")

PREFIXES = ("/v1", "/openai/v1", "/openai")
"""Where the routes that OpenAI and Azure share are found."""

SETTLE_S = 0.5
"""How often deployments that are being made are looked at."""
FLUSH_S = 1.0
"""How often what was used is written down."""
EXPIRE_S = 60.0
"""How often files and deployments whose time is over are removed."""


def create_app(server: Server) -> FastAPI:
    """The app. It closes the server's parts when it ends."""

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with _background(server), batches.working(server):
            yield
        await server.engines.aclose()
        server.close()

    app = FastAPI(
        title="Tunewright",
        version=__version__,
        description=(
            "The OpenAI and Azure OpenAI fine-tuning API on a machine of your own. What is under /v1 is under /openai "
            "and /openai/v1 too, where errors and headers look as Azure's do."
        ),
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.server = server
    app.add_middleware(BodyLimit, limit=_most_bytes)
    app.add_middleware(Diary)
    app.add_middleware(metrics.Measured, metrics=server.metrics)
    app.add_middleware(arm.AnyCase)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    for away in store.AWAY:
        app.add_exception_handler(away, _database_error)
    for prefix in PREFIXES:
        for router in ROUTERS:
            app.include_router(router, prefix=prefix, include_in_schema=prefix == "/v1", responses=documents.ERRORS)
    app.include_router(management.router, responses=documents.ARM_ERRORS)
    app.include_router(metrics.router)
    app.include_router(health)
    app.openapi = lambda: documents.document(app)  # type: ignore[method-assign]
    return app


health = APIRouter()


@health.get("/healthz", responses=documents.shows(documents.Health))
async def alive() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@health.get("/readyz", responses=documents.shows(documents.Health, 200, 503))
def ready(request: Request) -> Response:
    """The database answers too."""
    if web.server(request).store.answers():
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "the database does not answer"}, 503)


ROUTERS: tuple[APIRouter, ...] = (
    chat.router,  # routes are tried in their order, and these are asked a thousand times as often as the others
    responses.router,
    files.router,
    jobs.router,
    grading.router,
    models.router,
    batches.router,
    moderations.router,
    organization.router,
)


@contextlib.asynccontextmanager
async def _background(server: Server) -> AsyncIterator[None]:
    """What the server does by itself. What was used until the end is written down at the end."""
    await asyncio.to_thread(accounts.ensure_local, server)
    stop = asyncio.Event()
    tasks = [
        asyncio.create_task(_every(SETTLE_S, stop, lambda: asyncio.to_thread(management.settle, server))),
        asyncio.create_task(_every(FLUSH_S, stop, lambda: admission.flush(server))),
        asyncio.create_task(_every(EXPIRE_S, stop, lambda: _remove_expired(server))),
    ]
    yield
    stop.set()
    await asyncio.gather(*tasks)
    await admission.flush(server)
    await server.classifier.close()


async def _remove_expired(server: Server) -> None:
    await asyncio.to_thread(files.remove_expired, server)
    await asyncio.to_thread(management.remove_expired, server)


async def _every(seconds: float, stop: asyncio.Event, do: Callable[[], Awaitable[None]]) -> None:
    """Do something again and again until `stop`; a failure is in the log, and the next time comes all the same."""
    while not stop.is_set():
        try:
            await do()
        except Exception:
            logger.exception("something that is done every %g seconds failed", seconds)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), seconds)


def _most_bytes(path: str) -> int:
    if path.endswith("/files"):
        return files.FILE_BYTES + web.JSON_BYTES
    if path.endswith("/parts"):
        return files.PART_BYTES + web.JSON_BYTES
    return web.JSON_BYTES


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    body = arm.body(error) if web.surface(request.scope["path"]) == "management" else error.body
    return JSONResponse(body, error.status, error.headers)


async def _database_error(request: Request, error: Exception) -> Response:
    """The database is away, or has more to do than it can: later perhaps not."""
    logger.error("%s: the database does not answer", entry(request).id, exc_info=error)
    said = ApiError(
        503,
        f"The database does not answer; the server's log has the reason under {entry(request).id}. Try again later.",
        kind="server_error",
        code="database_unavailable",
        headers={"retry-after": "1"},
    )
    return await _api_error(request, said)


async def _invalid(request: Request, error: Exception) -> Response:
    """FastAPI's findings, in OpenAI's words; the first of them."""
    assert isinstance(error, RequestValidationError)
    problem = dict(error.errors()[0])
    place, *rest = problem["loc"]
    problem["loc"] = tuple(rest)
    if problem["type"] == "json_invalid":
        problem |= {"loc": (), "msg": problem["ctx"]["error"]}
    if place == "body" and not rest and problem["type"] == "missing":
        problem["loc"] = ()
    return await _api_error(request, explained(cast(ErrorDetails, problem)))


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router says: no such route, or not with this method."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.scope['path']}"
    if error.status_code == 405:
        said = ApiError(405, f"Not allowed: {where}.", code="method_not_supported", headers=error.headers)
    elif error.status_code == 404:
        said = ApiError(404, f"Unknown request URL: {where}.", code="unknown_url")
    else:
        said = ApiError(error.status_code, str(error.detail), headers=error.headers)
    return await _api_error(request, said)
