"""What every route has in common: who asks, on which surface, and how errors and pages look there.

A surface is a family of routes: OpenAI's under /v1, Azure's under /openai, Azure's control plane under
/subscriptions. The same handlers answer on the first two; what differs is in the forms of errors, quota headers,
result files and model names.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import Depends, Query, Request
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


def caller(scope: Scope) -> Callable[[Request], Awaitable[Caller]]:
    """A dependency: the caller, whose key must open `scope`.

    Raises:
        ApiError: 401 without a key that is known, 403 where it is for something else.
    """

    async def authenticate(request: Request) -> Caller:
        return await authenticated(request, scope)

    return authenticate


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


Admin = Annotated[Caller, Depends(caller("admin"))]
Training = Annotated[Caller, Depends(caller("training"))]
Inference = Annotated[Caller, Depends(caller("inference"))]


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
        if match := re.fullmatch(r"metadata\[(.+)\]", name):
            found[match[1]] = value
    return found


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
