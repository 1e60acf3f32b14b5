"""How much a request may bring: a body beyond its limit is refused before it is read to its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunewright.endpoint.shapes import ApiError

DISCARDED = 64 << 20
DISCARD_S = 5.0
"""Bytes of a refused body that are read, and for how long: many clients look for an answer when they have sent all of
it, and would see no more than a connection that was cut off."""


class BodyLimit:
    """ASGI middleware.

    Args:
        limit: bytes that a request to a path may bring.
    """

    def __init__(self, app: ASGIApp, *, limit: Callable[[str], int]) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        most = self.limit(scope["path"])
        said = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        if said.isdigit() and int(said) > most:
            error = too_large(most)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(_discard(receive), DISCARD_S)
            # What is left of the body is not read: the connection cannot be used again.
            await JSONResponse(error.body, error.status, {"connection": "close"})(scope, receive, send)
            return
        taken, begun = 0, False

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > most:
                raise too_large(most)
            return message

        async def judged(message: Message) -> None:
            nonlocal begun
            if taken > most and not begun:  # whatever whoever read the body made of it
                error = too_large(most)
                begun = True
                await JSONResponse(error.body, error.status, {"connection": "close"})(scope, receive, send)
            elif taken <= most:
                begun = True
                await send(message)

        await self.app(scope, counted, judged)


def too_large(most: int) -> ApiError:
    return ApiError(
        413,
        f"The body of the request is larger than {most / (1 << 20):,.0f} MB, the most that is taken here.",
        code="request_too_large",
    )


async def _discard(receive: Receive) -> None:
    taken = 0
    while taken < DISCARDED:
        message = await receive()
        taken += len(message.get("body", b""))
        if not message.get("more_body", False):
            return
