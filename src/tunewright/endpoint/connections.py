"""Connections whose other end is slow, silent or one too many, which uvicorn would hold for ever.

What is not covered: how long a body takes, which the server's `BodyLimit` judges, since it knows what it waits for.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource

from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from tunewright.endpoint.shapes import ApiError

logger = logging.getLogger("tunewright.endpoint")

FILES = 65_536
"""Open files that are asked for at most; where they are unlimited, some libraries look through all there could be."""
RESERVED = 128
"""Files that are kept for what is not a client: the database, uploads, engines, logs."""
FEW = 1000
"""Connections: an operator hears of a limit below it."""


class Connection(HttpToolsProtocol):
    """One client's connection. `limit_concurrency` of uvicorn's configuration is how many there may be."""

    head_s = 20.0
    """From the beginning of a request, or of the connection, until its head has come."""
    head_bytes = 64 << 10
    reader_s = 60.0
    reader_bytes = 16 << 10
    """How much of an answer has to be taken, and in which time, while more of it waits than the system buffers."""

    _head_timer: asyncio.TimerHandle | None = None
    _reader_timer: asyncio.TimerHandle | None = None
    _in_head = False
    _head_size = 0
    _waiting = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        most, self.limit_concurrency = self.limit_concurrency, None
        if most is not None and len(self.connections) > most:
            self.app = _busy
        self._head_timer = self.loop.call_later(self.head_s, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        self._forget_reader()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head:
            self._head_size += len(data)
            if self._head_size > self.head_bytes:
                self._refuse(431, f"The head of the request is larger than {self.head_bytes >> 10} KB.")
                return
        answered = self.cycle is None or self.cycle.response_complete
        if answered and self.timeout_keep_alive_task is None and self._head_timer is None:
            # A head that is not whole; or what is left of a body that was answered before its end.
            self._head_timer = self.loop.call_later(self.head_s, self._head_is_late)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_size = True, 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._forget_head()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget_reader()

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self._in_head:
            self._refuse(408, f"The head of the request was not there after {self.head_s:g} seconds.")
        else:
            self.transport.close()

    def _watch_reader(self) -> None:
        self._waiting = self.transport.get_write_buffer_size()
        self._reader_timer = self.loop.call_later(self.reader_s, self._judge_reader)

    def _judge_reader(self) -> None:
        if self._waiting - self.transport.get_write_buffer_size() >= self.reader_bytes:
            self._watch_reader()
            return
        logger.warning("a client did not read its answer for %g seconds, and was left", self.reader_s)
        self.transport.abort()

    def _forget_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _forget_reader(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None

    def _refuse(self, status: int, message: str) -> None:
        """Answer without the app, which has not heard of the request."""
        codes = {408: "request_timeout", 431: "request_header_fields_too_large"}
        body = json.dumps(ApiError(status, message, code=codes.get(status)).body).encode()
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()


def most_connections() -> int:
    """How many connections there may be at once: half as many as this process may open files, after asking for more,
    since each may need one to an engine too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
    if soft == resource.RLIM_INFINITY:
        soft = FILES
    elif soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    most = max((soft - RESERVED) // 2, 1)
    if most < FEW:
        logger.warning(
            "this process may open no more than %d files, so no more than %d clients are answered at once; a higher "
            "hard limit (ulimit -Hn, LimitNOFILE=) allows more",
            soft,
            most,
        )
    return most


async def _busy(scope: Scope, receive: Receive, send: Send) -> None:
    error = ApiError(
        503,
        "The server has as many connections as it may have; try again in a moment.",
        kind="server_error",
        code="too_many_connections",
    )
    await JSONResponse(error.body, error.status, {"connection": "close", "retry-after": "1"})(scope, receive, send)
