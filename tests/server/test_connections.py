"""Clients that are slow, silent, too many or gone: the others are answered, and nothing waits for ever."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from management_client import add_base
from serving import make_base

from endpoint_fixtures import running
from server_running import Running
from tunewright.endpoint.connections import Connection
from tunewright.server import keys, limits, models
from tunewright.server.app import create_app
from tunewright.server.models import Target
from tunewright.server.state import Server, Settings
from tunewright.testing import EchoEngines

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)

HEAD_S = 0.6
CHAT = b'{"model": "base", "stream": true, "messages": [{"role": "user", "content": "a"}]}'


class Hasty(Connection):
    head_s = HEAD_S
    head_bytes = 8 << 10
    reader_s = 0.6


class Endless(EchoEngines):
    """An answer without an end: how much of it was made, and whether it is still being made."""

    made = 0
    open = 0

    async def stream(self, target: Target, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        text = "x" * 10_000
        choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
        self.open += 1
        try:
            while True:
                self.made += len(text)
                yield {"object": "chat.completion.chunk", "model": body["model"], "choices": [choice], "usage": None}
        finally:
            self.open -= 1


@pytest.fixture
def start(open_server: Callable[[], Server]) -> Iterator[Callable[..., Running]]:
    """Starts the server with engines that echo."""
    with contextlib.ExitStack() as stack:

        def one(engines: EchoEngines | None = None, *, most: int | None = None) -> Running:
            server = open_server()
            server.engines = engines or EchoEngines()
            add_base(server, "base")
            made = [keys.create(server.store, scope, scope=scope) for scope in ("training", "inference", "admin")]
            url = stack.enter_context(running(create_app(server), connection=Hasty, most=most))
            return stack.enter_context(contextlib.closing(Running(server, url, *made)))

        yield one


def connect(served: Running, *, buffer: int | None = None) -> socket.socket:
    host = urlsplit(served.url)
    made = socket.socket()
    if buffer is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    made.settimeout(10)
    made.connect((host.hostname, host.port))
    return made


def head(served: Running, path: str, *lines: str, method: str = "POST", key: str | None = None) -> bytes:
    said = [f"{method} {path} HTTP/1.1", "host: x", f"authorization: Bearer {key or served.key}", *lines]
    return "\r\n".join([*said, "content-type: application/json", "", ""]).encode()


def rest(client: socket.socket) -> bytes:
    """All that comes until the server closes the connection; a reset behind it is for what was still being sent."""
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := client.recv(65536):
            got += chunk
    return got


def error(reply: bytes) -> tuple[int, dict[str, Any]]:
    top, _, body = reply.partition(b"\r\n\r\n")
    found: dict[str, Any] = json.loads(body)["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert b"connection: close" in top.lower()
    return int(top.split()[1]), found


def trickle(client: socket.socket, data: bytes, every_s: float = 0.05) -> threading.Thread:
    """Send a byte at a time until the other side closes."""

    def send() -> None:
        with contextlib.suppress(OSError):
            for place in range(len(data)):
                client.sendall(data[place : place + 1])
                time.sleep(every_s)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def is_quick(served: Running) -> None:
    began = time.monotonic()
    reply = httpx2.get(f"{served.url}/v1/models", headers={"authorization": f"Bearer {served.key}"}, trust_env=False)
    assert reply.status_code == 200
    assert time.monotonic() - began < 2


def test_heads_that_trickle_hold_nobody_up_and_end(start: Callable[..., Running]) -> None:
    served = start()
    slow = [connect(served) for _ in range(20)]
    began = time.monotonic()
    threads = [trickle(one, b"GET /v1/models HTTP/1.1\r\nx-long: " + b"a" * 1000) for one in slow]
    is_quick(served)
    for one in slow:
        with one:
            status, said = error(rest(one))
            assert (status, said["code"]) == (408, "request_timeout")
    assert HEAD_S * 0.9 < time.monotonic() - began < 5
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("sent", [b"", b"\r\n" * 200], ids=["nothing", "empty lines"])
def test_a_connection_on_which_nothing_is_asked_ends(start: Callable[..., Running], sent: bytes) -> None:
    served = start()
    with connect(served) as client:
        thread = trickle(client, sent)
        assert rest(client) == b""
        thread.join()


def test_a_second_head_has_its_time_too(start: Callable[..., Running]) -> None:
    served = start()
    with connect(served) as client:
        client.sendall(head(served, "/v1/models", method="GET"))
        assert b" 200 " in client.recv(65536)
        client.sendall(b"GET /v1/models HT")
        assert error(rest(client))[0] == 408


def test_a_body_that_trickles_ends(start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_S", 0.5)
    served = start()
    for path in ("/v1/chat/completions", "/v1/fine_tuning/jobs", "/openai/files", "/v1/responses"):
        with connect(served) as client:
            kind = "multipart/form-data; boundary=edge" if path.endswith("files") else "application/json"
            top = head(served, path, "content-length: 1000").replace(b"application/json", kind.encode())
            client.sendall(top)
            thread = trickle(client, b"--edge\r\n" if path.endswith("files") else b'{"model": "base", ' + b" " * 100)
            is_quick(served)
            status, said = error(rest(client))
            assert (status, said["code"]) == (408, "request_timeout"), path
            thread.join()


def test_a_body_that_comes_slowly_but_comes_is_taken(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BODY_S", 0.3)
    served = start()
    body = CHAT.replace(b"true", b"false").replace(b'"a"', b'"' + b"a" * 3000 + b'"')
    with connect(served) as client:
        client.sendall(head(served, "/v1/chat/completions", f"content-length: {len(body)}"))
        for place in range(0, len(body), 400):
            client.sendall(body[place : place + 400])
            time.sleep(0.1)
        assert b" 200 " in client.recv(65536)


def test_what_is_left_of_a_body_that_was_answered_is_not_waited_for(start: Callable[..., Running]) -> None:
    served = start()
    with connect(served) as client:
        client.sendall(head(served, "/v1/dreams", "content-length: 1000"))
        thread = trickle(client, b"x" * 900)
        began = time.monotonic()
        assert rest(client).startswith(b"HTTP/1.1 404 ")
        assert time.monotonic() - began < 5
        thread.join()


def test_a_client_that_leaves_in_its_body_is_no_error_of_ours(
    start: Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    served = start()
    with caplog.at_level("INFO", logger="tunewright.endpoint"):
        for path in ("/v1/chat/completions", "/v1/files"):
            with connect(served) as client:
                top = head(served, path, "content-length: 1000")
                client.sendall(top.replace(b"application/json", b"multipart/form-data; boundary=edge") + b"--edge\r\n")
                time.sleep(0.1)
        deadline = time.monotonic() + 5
        while not (said := [one for one in caplog.messages if " 499 " in one and "/v1/files" in one]):
            assert time.monotonic() < deadline, caplog.messages
            time.sleep(0.02)
    assert not [one for one in caplog.messages if "failed" in one]
    assert len(said) == 1


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /v1/models HTTP/1.1\r\nx: " + b"a" * 20_000, 431),
        (b"GET /" + b"a" * 20_000, 431),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /\xff\xfe HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\ncontent-length: x\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ],
    ids=["long header", "long path", "no HTTP", "no ASCII", "no length", "two lengths", "TLS"],
)
def test_what_is_no_request_is_told_so(start: Callable[..., Running], sent: bytes, status: int) -> None:
    served = start()
    with connect(served) as client:
        client.sendall(sent)
        assert error(rest(client))[0] == status


def test_one_connection_too_many_is_told_so(start: Callable[..., Running]) -> None:
    served = start(most=3)
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(connect(served)) for _ in range(3)]
        for one in held:
            one.sendall(head(served, "/v1/models", method="GET"))
            assert b" 200 " in one.recv(65536)
        with connect(served) as late:
            late.sendall(head(served, "/v1/models", method="GET"))
            reply = rest(late)
            status, said = error(reply)
            assert (status, said["code"]) == (503, "too_many_connections")
            assert b"retry-after: 1" in reply
    deadline = time.monotonic() + 5
    while True:  # there is room again as soon as the server has seen them go
        with connect(served) as later:
            later.sendall(head(served, "/v1/models", "connection: close", method="GET"))
            if b" 200 " in rest(later):
                break
        assert time.monotonic() < deadline


def test_an_answer_that_nobody_reads_is_not_made_without_end(start: Callable[..., Running]) -> None:
    engines = Endless()
    served = start(engines)
    with connect(served, buffer=4096) as client:
        client.sendall(head(served, "/v1/chat/completions", f"content-length: {len(CHAT)}") + CHAT)
        client.recv(100)
        deadline = time.monotonic() + 10
        made = -1
        while made != engines.made:  # what the system's buffers hold, and no more
            assert time.monotonic() < deadline
            made = engines.made
            time.sleep(0.2)
        assert 0 < made < 16 << 20
        is_quick(served)
        until(lambda: engines.open == 0)  # after `reader_s` the client is left


def test_an_answer_ends_when_its_reader_goes(start: Callable[..., Running]) -> None:
    engines = Endless()
    served = start(engines)
    with connect(served) as client:
        client.sendall(head(served, "/v1/chat/completions", f"content-length: {len(CHAT)}") + CHAT)
        client.recv(100)
        assert engines.open == 1
    until(lambda: engines.open == 0, seconds=0.5)  # sooner than `reader_s`


def test_a_reader_that_is_slow_but_reads_is_kept(start: Callable[..., Running]) -> None:
    engines = Endless()
    served = start(engines)
    with connect(served, buffer=4096) as client:
        client.sendall(head(served, "/v1/chat/completions", f"content-length: {len(CHAT)}") + CHAT)
        end = time.monotonic() + 4 * Hasty.reader_s
        while time.monotonic() < end:
            assert client.recv(64 << 10)
            time.sleep(0.005)
        assert engines.open == 1


def until(holds: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_body_of_413_is_not_asked_for(start: Callable[..., Running]) -> None:
    served = start()
    for path in ("/v1/chat/completions", "/v1/files", "/subscriptions/x/locations"):
        with connect(served) as client:
            client.sendall(head(served, path, f"content-length: {2 << 30}", "expect: 100-continue"))
            reply = rest(client)
            assert reply.startswith(b"HTTP/1.1 413 "), reply  # and no 100 before it
            assert b"than" in json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["message"].encode()


def test_a_body_in_chunks_is_refused_before_its_end(start: Callable[..., Running]) -> None:
    served = start()
    with connect(served) as client:
        client.sendall(head(served, "/v1/chat/completions", "transfer-encoding: chunked"))
        sent = 0
        with contextlib.suppress(OSError):  # where the server has closed
            for _ in range(64):
                client.sendall(b"100000\r\n" + b"x" * (1 << 20) + b"\r\n")
                sent += 1
        assert 16 <= sent < 64
        with contextlib.suppress(ConnectionResetError):
            assert rest(client)[:13] == b"HTTP/1.1 413 "


@pytest.mark.parametrize(
    ("soft", "hard", "most"), [(256, 4096, 1984), (1024, 1024, 448), (100, 100, 1)], ids=["raised", "low", "very low"]
)
def test_as_many_connections_as_files_may_be_open(soft: int, hard: int, most: int, database: str | None) -> None:
    code = (
        "import logging, resource, sys; logging.basicConfig(stream=sys.stdout, format='%(message)s')\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
        "from tunewright.endpoint.connections import most_connections\n"
        "print(most_connections(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == f"{most} {hard}"
    assert ("ulimit -Hn" in said) == (most < 1000)


@pytest.fixture
def many_files() -> Iterator[None]:
    """This process holds the other ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096
    if hard not in (resource.RLIM_INFINITY,) and hard < wanted:
        pytest.skip(f"1,000 connections need a hard limit of {wanted} open files; here it is {hard}")
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def process(data: Path) -> Iterator[str]:
    """`tunewright serve` as a process of its own that may open 256 files until it asks for more; gives its URL."""
    command = [sys.executable, "-u", "-m", "tunewright.cli", "serve", "--data", str(data), "--port", "0"]
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    child = subprocess.Popen(
        [*command, "--workers", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard)),
    )
    assert child.stdout is not None
    try:
        url = next(found[1] for line in child.stdout if (found := re.search(r"serving at (http://\S+)/v1", line)))
        reading = threading.Thread(target=child.stdout.read)
        reading.start()
        yield url
        assert child.poll() is None, "the server is still up"
        child.terminate()
        assert child.wait(60) == 0
        reading.join()
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


async def ask_at_once(url: str, requests: list[bytes]) -> list[bytes]:
    """All connections are made before the first request is sent."""
    host = urlsplit(url)

    async def connected() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(host.hostname, host.port)

    async def answered(ends: tuple[asyncio.StreamReader, asyncio.StreamWriter], request: bytes) -> bytes:
        reader, writer = ends
        writer.write(request)
        reply = await reader.read()
        writer.close()
        return reply

    ends = await asyncio.gather(*(connected() for _ in requests))
    return await asyncio.gather(*(answered(one, request) for one, request in zip(ends, requests, strict=True)))


def asked(key: str, method: str, path: str, body: Any = None) -> bytes:
    raw = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "host: x", f"authorization: Bearer {key}", "connection: close"]
    lines += ["content-type: application/json", f"content-length: {len(raw)}", "", ""]
    return "\r\n".join(lines).encode() + raw


@pytest.mark.usefixtures("many_files")
def test_a_thousand_connections_at_once_are_all_answered(tmp_path: Path, database: str | None) -> None:
    server = Server.open(Settings(tmp_path))
    key = keys.create(server.store, "k", scope="training")
    server.close()
    wanted = [
        asked(key, "GET", "/v1/models"),
        asked(key, "GET", "/openai/files"),
        asked(key, "POST", "/v1/chat/completions", {"model": "none", "messages": [{"role": "user", "content": "a"}]}),
        asked("tw-none", "GET", "/v1/fine_tuning/jobs"),
    ]
    with process(tmp_path) as url:
        began = time.monotonic()
        replies = asyncio.run(ask_at_once(url, wanted * 250))
        print(f"1,000 requests at once: {time.monotonic() - began:.1f} s")
        statuses = [int(reply.split(b" ", 2)[1]) for reply in replies]
        assert statuses == [200, 200, 404, 401] * 250
        assert httpx2.get(f"{url}/readyz", trust_env=False).status_code == 200


@pytest.mark.slow
@pytest.mark.usefixtures("many_files")
def test_a_thousand_completions_at_once_are_all_answered(tmp_path: Path, database: str | None) -> None:
    server = Server.open(Settings(tmp_path))
    models.add_base(server.store, "base", str(make_base(tmp_path / "base")))
    key = keys.create(server.store, "k", scope="inference")
    server.close()
    ask = {"model": "base", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    with process(tmp_path) as url:
        began = time.monotonic()
        replies = asyncio.run(ask_at_once(url, [asked(key, "POST", "/v1/chat/completions", ask)] * 1000))
        print(f"1,000 completions at once: {time.monotonic() - began:.1f} s")
        found: dict[int, int] = {}
        for reply in replies:
            status = int(reply.split(b" ", 2)[1])
            found[status] = found.get(status, 0) + 1
            body = json.loads(reply.partition(b"\r\n\r\n")[2])
            assert "choices" in body or body["error"]["message"]
        assert found == {200: 1000}
