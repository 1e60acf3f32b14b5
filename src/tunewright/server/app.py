"""The server's app: its parts put together, its routes on their surfaces, its errors in one form."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from tunewright import __version__
from tunewright.endpoint.diary import Diary
from tunewright.endpoint.shapes import ApiError, explained
from tunewright.server import batches, chat, files, jobs, models, responses, web
from tunewright.server.limits import BodyLimit
from tunewright.server.state import Server

logger = logging.getLogger("tunewright.server")

PREFIXES = ("/v1", "/openai/v1", "/openai")
"""Where the routes that OpenAI and Azure share are found."""


def create_app(server: Server) -> FastAPI:
    """The app. It closes the server's parts when it ends."""

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with batches.working(server):
            yield
        await server.engines.aclose()
        server.close()

    app = FastAPI(
        title="Tunewright",
        version=__version__,
        description="The OpenAI and Azure OpenAI fine-tuning API on a machine of your own.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.server = server
    app.add_middleware(BodyLimit, limit=_most_bytes)
    app.add_middleware(Diary)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    for prefix in PREFIXES:
        for router in ROUTERS:
            app.include_router(router, prefix=prefix, include_in_schema=prefix == "/v1")
    app.include_router(health)
    return app


health = APIRouter()


@health.get("/healthz")
async def alive() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@health.get("/readyz")
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
    models.router,
    batches.router,
)


def _most_bytes(path: str) -> int:
    if path.endswith("/files"):
        return files.FILE_BYTES + web.JSON_BYTES
    if path.endswith("/parts"):
        return files.PART_BYTES + web.JSON_BYTES
    return web.JSON_BYTES


async def _api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    """FastAPI's findings, in OpenAI's words; the first of them."""
    assert isinstance(error, RequestValidationError)
    problem = dict(error.errors()[0])
    place, *rest = problem["loc"]
    problem["loc"] = tuple(rest) if problem["type"] != "json_invalid" else ()
    if place == "body" and not rest and problem["type"] == "missing":
        problem["loc"] = ()
    return await _api_error(request, explained(problem))


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
    return await _api_error(request, said)
