"""What every route has in common: who asks, on which surface, and how errors and pages look there.

A surface is a family of routes: OpenAI's under /v1, Azure's under /openai, Azure's control plane under
/subscriptions. The same handlers answer on the first two; what differs is in the forms of errors, quota headers,
result files and model names.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import Depends, Query, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from sqlalchemy import Connection, Select, Table

from tunewright.endpoint.shapes import ApiError
from tunewright.server import store
from tunewright.server.keys import Key, Scope
from tunewright.server.state import Server

Surface = Literal["openai", "azure", "management"]

JSON_BYTES = 16 << 20
"""Largest body of a request that is no upload."""


def server(request: Request) -> Server:
    found: Server = request.app.state.server
    return found


def surface(path: str) -> Surface:
    if path.startswith("/openai"):
        return "azure"
    return "management" if path.lower().startswith("/subscriptions") else "openai"


@dataclass(frozen=True)
class Caller:
    """Who asks, and where."""

    key: Key
    surface: Surface


class Door:
    """A dependency: the caller, whose key must open `scope`.

    Raises:
        ApiError: 401 without a key that is known, 403 where it is for something else.
    """

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    async def __call__(self, request: Request) -> Caller:
        return await authenticated(request, self.scope)


class Route(APIRoute):
    """A route whose body FastAPI reads: the key is asked for before the body is, and the body is strict JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        door = next((one.call for one in self.dependant.dependencies if isinstance(one.call, Door)), None)

        async def handled(request: Request) -> Response:
            if door is not None and self.body_field is not None:
                await door(request)
            return await handle(_Strict(request.scope, request.receive))

        return handled


class Plain(APIRoute):
    """A route whose handler takes the request and what its path names, and reads the rest itself: nothing is looked
    for that is not there, which costs as much as all that a completion's handler does before an engine is asked."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle: Callable[..., Coroutine[Any, Any, Response]] = self.endpoint

        async def handled(request: Request) -> Response:
            return await handle(request, **request.path_params)

        return handled


class _Strict(Request):
    """A request whose JSON is what RFC 8259 allows, as on the routes of completions: no NaN, no half of a surrogate
    pair, which no answer could carry again; nothing that nests deeper than 200."""

    async def json(self) -> Any:
        raw = await self.body()
        try:
            value = from_json(raw, allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from None
        await check_storable(raw)
        return value


async def check_storable(raw: bytes) -> None:
    """Look for what a body of JSON may say and no database can keep: NUL, and numbers beyond all floats.

    Raises:
        ApiError: 400, there is such a thing.
    """
    if not UNUSUAL.search(raw):
        return
    found = await asyncio.to_thread(lambda: _unstorable(from_json(raw)))
    if found is not None:
        place, what = found
        said = f"Invalid '{place}': it holds {what}." if place else f"The body holds {what}."
        raise ApiError(400, said, param=place or None, code="invalid_value")


UNUSUAL = re.compile(rb"\\u0000|[eE]\+?[0-9]{3}|[0-9]{300}")
"""What a body has that has to be looked through; others, nearly all, are not."""


async def authenticated(request: Request, scope: Scope) -> Caller:
    """As `caller`."""
    where = surface(request.scope["path"])  # request.url is put together anew for each request, which takes long
    sent = _sent_key(request)
    if not sent:
        raise _unauthorized(where, "No API key was given. Send it as Authorization: Bearer KEY, or as api-key: KEY.")
    keyring = server(request).keyring
    fresh, key = keyring.remembered(sent)
    if not fresh:
        key = await asyncio.to_thread(keyring.find, sent)
    if key is None:
        raise _unauthorized(
            where, f"Incorrect API key provided: {_masked(sent)}. `tunewright keys create` makes one on the server."
        )
    if not key.opens(scope):
        raise ApiError(
            403,
            f"The key '{key.name}' is for {key.scope}; this needs one for {scope}.",
            kind="permission_error",
            code="insufficient_permissions" if where == "openai" else "403",
        )
    return Caller(key, where)


Admin = Annotated[Caller, Depends(Door("admin"))]
Training = Annotated[Caller, Depends(Door("training"))]
Inference = Annotated[Caller, Depends(Door("inference"))]


def not_found(what: str, id: str, *, param: str, code: str | None = None) -> ApiError:
    return ApiError(404, f"No such {what}: '{id}'.", param=param, code=code)


Limit20 = Annotated[int, Query(ge=1, le=100)]
After = Annotated[str | None, Query(max_length=256)]


def listed(
    connection: Connection,
    query: Select[Any],
    table: Table,
    shape: Callable[[dict[str, Any]], dict[str, Any]],
    *,
    after: str | None,
    limit: int,
    newest_first: bool = True,
    what: str,
) -> dict[str, Any]:
    """A page in OpenAI's form.

    Raises:
        ApiError: `after` names nothing.
    """
    number = None
    if after is not None:
        before = store.row(connection, table, id=after)
        if before is None:
            raise ApiError(400, f"Invalid 'after': there is no {what} '{after}'.", param="after", code="invalid_value")
        number = before["number"]
    rows, more = store.page(connection, query, table, after=number, limit=limit, newest_first=newest_first)
    data = [shape(one) for one in rows]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": more,
    }


def asked_metadata(request: Request) -> Mapping[str, str] | None:
    """What `metadata[key]=value` in a query asks for; None for the literal `metadata=null` (rows without any)."""
    if request.query_params.get("metadata") == "null":
        return None
    found = {}
    for name, value in request.query_params.multi_items():
        if match := re.fullmatch(r"metadata\[(.+)\]", name, re.DOTALL):
            if not store.storable(match[1]) or not store.storable(value):
                raise _bad_metadata("it holds a NUL character")
            found[match[1]] = value
    if len(found) > 16:
        raise _bad_metadata("a job has at most 16 pairs")
    return found


def _bad_metadata(why: str) -> ApiError:
    return ApiError(400, f"Invalid 'metadata': {why}.", param="metadata", code="invalid_value")


def _unstorable(value: Any, place: str = "") -> tuple[str, str] | None:
    """Where in a JSON value something cannot be kept, and what; "" is the value itself."""
    parts: Iterable[tuple[str, Any]] = ()
    if isinstance(value, float) and math.isinf(value):
        return place, "a number that is too large"
    if isinstance(value, str) and "\x00" in value:
        return place, "a NUL character"
    if isinstance(value, dict):
        if any("\x00" in key for key in value):
            return place, "a NUL character"
        parts = ((f"{place}.{key}" if place else key, part) for key, part in value.items())
    elif isinstance(value, list):
        parts = ((f"{place}[{number}]", part) for number, part in enumerate(value))
    return next((found for name, part in parts if (found := _unstorable(part, name)) is not None), None)


def _sent_key(request: Request) -> str:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and given.strip():
        return given.strip()
    return request.headers.get("api-key", "").strip()


def _masked(sent: str) -> str:
    """Enough of a key for its owner to know it by."""
    return f"{sent[:5]}***{sent[-4:]}" if len(sent) >= 16 else "***"


def _unauthorized(where: Surface, message: str) -> ApiError:
    return ApiError(
        401,
        message,
        kind="authentication_error",
        code="invalid_api_key" if where == "openai" else "401",
        headers={"www-authenticate": "Bearer"},
    )
