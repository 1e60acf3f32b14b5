"""A proxy on loopback between the SDKs and our server, which counts calls and puts faults in."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

SLOW_S = 15
"""Longer than the clients of these tests wait."""
HOP = ("transfer-encoding", "connection", "content-length", "host")
MAKES = re.compile(r"POST /(openai/)?v1/(files|fine_tuning/jobs)$|PUT /subscriptions/.*/(accounts|deployments)/[^/]+$")
"""Calls that make something."""


@dataclass
class Fault:
    """What happens to calls that match; the first `after` of them go through."""

    call: str
    how: str
    """A status, cut (acted on, not answered), kill (acted on, then a process is killed) or slow (never answered)."""
    times: int = 1
    after: int = 0
    pid: int = 0
    headers: tuple[tuple[str, str], ...] = ()


class Between:
    """The proxy; `url` is what clients are told."""

    def __init__(self, server: str) -> None:
        self.server = urlsplit(server)
        self.calls: list[str] = []
        self.seen: list[str] = []
        """Heads and bodies of everything that was asked."""
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        between = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                """Nothing: `calls` has them."""

            def answer(self) -> None:
                between.pass_on(self)

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = answer

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def fault(self, call: str, how: str, times: int = 1, *, after: int = 0, pid: int = 0, **headers: str) -> None:
        named = tuple((key.replace("_", "-"), value) for key, value in headers.items())
        self.faults.append(Fault(call, how, times, after, pid, named))

    def made(self) -> list[str]:
        return [call for call in self.calls if MAKES.match(call)]

    def pass_on(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        call = f"{request.command} {urlsplit(request.path).path}"
        with self.lock:
            self.calls.append(call)
            fault = self._fault(call)
        if fault is not None and fault.how.isdigit():
            said = {"error": {"message": "as it was told", "type": "server_error", "param": None, "code": None}}
            self._reply(request, int(fault.how), json.dumps(said).encode(), dict(fault.headers))
            return
        connection = http.client.HTTPConnection(self.server.hostname or "", self.server.port, timeout=120)
        with contextlib.closing(connection):
            headers = {key: value for key, value in request.headers.items() if key.lower() not in HOP}
            host = request.headers["Host"]
            connection.request(request.command, request.path, body, {**headers, "Host": host})
            answer = connection.getresponse()
            content = answer.read()
            given = {key: value for key, value in answer.getheaders() if key.lower() not in HOP}
        if fault is not None and fault.how != "pass":
            if fault.how == "slow":
                threading.Event().wait(SLOW_S)
            if fault.how == "kill":
                os.kill(fault.pid, signal.SIGKILL)
            request.close_connection = True
            with contextlib.suppress(OSError):
                request.connection.close()
            return
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._reply(request, answer.status, content, given)

    def _fault(self, call: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and re.search(fault.call, call):
                if fault.after:
                    fault.after -= 1
                    return None
                fault.times -= 1
                return fault
        return None

    def _reply(self, request: BaseHTTPRequestHandler, status: int, content: bytes, headers: dict[str, str]) -> None:
        request.send_response_only(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command != "HEAD" and status != 204:
            request.wfile.write(content)

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@contextlib.contextmanager
def between(server: str) -> Iterator[Between]:
    made = Between(server)
    try:
        yield made
    finally:
        made.close()
