"""What a request may bring, and how long it may take over it: a body that is too large or too slow is refused before it
is read to its end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunewright.endpoint.shapes import ApiError
from tunewright.server import arm

DISCARDED = 64 << 20
DISCARD_S = 5.0
"""Bytes of a refused body that are read, and for how long: many clients look for an answer when they have sent all of
it, and would see no more than a connection that was cut off."""
BODY_S = 20.0
BODY_RATE = 1000
"""How long the server waits for a body all in all: seconds, and one more for so many bytes that have come."""


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
        if (refused := _refused(scope, most)) is not None:
            if not any(name == b"expect" for name, _ in scope["headers"]):  # else none of the body has been sent
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(_discard(receive), DISCARD_S)
            await _closing(refused, scope)(scope, receive, send)
            return
        error: ApiError | None = None
        taken, waited_s, whole, begun = 0, 0.0, False, False

        async def counted() -> Message:
            nonlocal taken, waited_s, whole, error
            if whole:
                return await receive()
            began = time.monotonic()
            try:
                async with asyncio.timeout(BODY_S + taken / BODY_RATE - waited_s):
                    message = await receive()
            except TimeoutError:
                error = too_slow(taken)
                raise error from None
            waited_s += time.monotonic() - began
            taken += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if taken > most:
                error = too_large(most)
                raise error
            return message

        async def judged(message: Message) -> None:
            nonlocal begun
            if error is None or begun:
                begun = True
                await send(message)
            elif message["type"] == "http.response.start":  # whatever whoever read the body made of it
                await _closing(error, scope)(scope, receive, send)

        await self.app(scope, counted, judged)


def too_large(most: int) -> ApiError:
    return ApiError(
        413,
        f"The body of the request is larger than {most / (1 << 20):,.0f} MB, the most that is taken here.",
        code="request_too_large",
    )


def too_slow(taken: int) -> ApiError:
    return ApiError(
        408,
        f"The body of the request did not come in time: {taken:,} bytes of it had when the server stopped waiting.",
        code="request_timeout",
    )


def _refused(scope: Scope, most: int) -> ApiError | None:
    """What is wrong with a request as far as its head tells."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > most:
            return too_large(most)
        if name == b"content-encoding" and value.lower() not in (b"", b"identity"):
            said = value.decode("latin-1")
            return ApiError(
                415, f"A body with content-encoding '{said}' is not read here; send it plain.",
                code="unsupported_content_encoding",
            )  # fmt: skip
    return None


def _closing(error: ApiError, scope: Scope) -> JSONResponse:
    """What is left of the body is not read: the connection cannot be used again."""
    body = arm.body(error) if arm.is_path(scope["path"]) else error.body
    return JSONResponse(body, error.status, {"connection": "close"})


async def _discard(receive: Receive) -> None:
    taken = 0
    while taken < DISCARDED:
        message = await receive()
        taken += len(message.get("body", b""))
        if not message.get("more_body", False):
            return
