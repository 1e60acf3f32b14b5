"""What every request gets, whatever answers it: an id, OpenAI's headers, one line in the log, and an envelope around
what went wrong.

The line names neither prompts nor keys.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from dataclasses import dataclass, field

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunewright.endpoint.shapes import ApiError

logger = logging.getLogger("tunewright.endpoint")

CLIENT_LEFT = 499
"""The status in the log where there was nobody left to answer."""


@dataclass
class Entry:
    """One request in the diary."""

    id: str
    headers: dict[str, str] = field(default_factory=dict)
    """Sent with the reply, whether it is an answer or an error."""
    notes: dict[str, object] = field(default_factory=dict)
    """Written into the log line."""


def entry(request: Request) -> Entry:
    found: Entry = request.scope["tunewright.entry"]
    return found


class Diary:
    """ASGI middleware; nothing but the server's own guard stands outside it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        entry = scope["tunewright.entry"] = Entry(f"req_{secrets.token_hex(16)}")
        started = time.perf_counter()
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = {
                    "x-request-id": entry.id,
                    "openai-version": "2020-10-01",
                    "openai-processing-ms": f"{_ms_since(started)}",
                    **entry.headers,
                }
                message["headers"] = [
                    *message.get("headers", ()),
                    *((name.encode(), value.encode()) for name, value in headers.items()),
                ]
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except ClientDisconnect:  # in the middle of its body: there is nobody to answer
            status = status or CLIENT_LEFT
        except Exception:
            logger.exception("%s failed", entry.id)
            if not status:
                await _send(server_error(entry), scope, receive, send_with_headers)
        except asyncio.CancelledError:
            # Nothing cancels a request but a server whose time to stop has run out. A stream just breaks off.
            if not status:
                stopping = ApiError(503, "The server is stopping.", kind="server_error", code="server_stopping")
                await _send(stopping, scope, receive, send_with_headers)
        finally:
            path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")
            notes = "".join(f" {name}={value}" for name, value in entry.notes.items())
            took_ms, told = _ms_since(started), status or CLIENT_LEFT
            logger.info(
                "%s %s %d %d ms %s%s",
                scope["method"],
                path,
                told,
                took_ms,
                entry.id,
                notes,
                extra={
                    "request": {
                        "method": scope["method"],
                        "path": path,
                        "status": told,
                        "ms": took_ms,
                        "id": entry.id,
                        **entry.notes,
                    }
                },
            )


def server_error(entry: Entry) -> ApiError:
    """Says no more than where to look: the traceback is in the log, under the same id."""
    return ApiError(
        500,
        f"The server had an error while processing your request; its log has the reason under {entry.id}.",
        kind="server_error",
        code="server_error",
    )


async def _send(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse(error.body, error.status)(scope, receive, send)


def _ms_since(started: float) -> int:
    return round((time.perf_counter() - started) * 1000)
