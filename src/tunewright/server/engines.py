"""Engines: child processes that hold weights, one for a base and all its adapters, one for each whole model.

An engine starts when it is first asked, and loads an adapter when that is first asked for. What stands behind a
request that was under way when an engine died is told to send it again; the next request starts another. Beyond a
limit, the one that was asked longest ago finishes its answers and makes room; idle ones end by themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

import httpx2
from pydantic_core import from_json, to_json

from tunewright.endpoint.shapes import ApiError

if TYPE_CHECKING:
    from tunewright.server.models import Target

logger = logging.getLogger("tunewright.server")

ADAPTERS = 32
"""Adapters that one engine holds at most."""
STOP_S = 10.0
"""How long an engine has to end by itself."""
LOG_BYTES = 16 << 20
"""A log that is larger when its engine starts is put aside."""


class Answers(Protocol):
    """Whatever answers requests: `Engines`, or `testing.EchoEngines`."""

    async def ask(self, target: Target, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """A whole reply.

        Cancelling this stops the work on it.

        Raises:
            ApiError: the request is refused, nothing can answer it, or what did ended meanwhile.
        """
        ...

    def stream(self, target: Target, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """A reply's chunks as they come, without the [DONE] behind them. Closing this stops the work on it.

        Raises:
            ApiError: as `ask`; also between chunks.
        """
        ...

    async def aclose(self) -> None:
        """Let go of everything."""
        ...


class Engines:
    """The engines of one server. Belongs to one event loop.

    Args:
        logs: a folder for what engines print.
        most: engines at once.
        idle_s: how long one stays that nobody asks.
    """

    def __init__(self, logs: Path, *, most: int = 2, idle_s: float = 900.0) -> None:
        self._logs = logs
        self._most = most
        self._idle_s = idle_s
        self._engines: dict[str, Engine] = {}
        self._leaving: dict[asyncio.Task[None], Engine] = {}
        """Those that take no more requests; each counts until its process has ended."""
        self._changing = asyncio.Lock()
        self._tidying: asyncio.Task[None] | None = None

    async def ask(self, target: Target, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """As `Answers.ask`."""
        async with self._asked(target) as engine:
            reply = await engine.client.post(path, content=to_json(body), headers=_headers(target))
            if reply.status_code != 200:
                raise _error(reply)
            found: dict[str, Any] = from_json(reply.content)
            return found

    async def stream(self, target: Target, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """As `Answers.stream`."""
        async with (
            self._asked(target) as engine,
            engine.client.stream("POST", path, content=to_json(body), headers=_headers(target)) as reply,
        ):
            if reply.status_code != 200:
                await reply.aread()
                raise _error(reply)
            async for line in reply.aiter_lines():
                if line == "data: [DONE]":
                    return
                if line:
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        raise ApiError.received(500, chunk)
                    yield chunk
            raise httpx2.RemoteProtocolError("the stream broke off")

    def running(self) -> dict[str, int]:
        """The engines that there are, with the requests that each is asked right now."""
        asked: Counter[str] = Counter()
        for engine in (*self._engines.values(), *self._leaving.values()):
            asked[engine.id] += engine.asked
        return dict(asked)

    async def aclose(self) -> None:
        """End all engines."""
        if self._tidying is not None:
            self._tidying.cancel()
            await asyncio.gather(self._tidying, return_exceptions=True)
        engines = [*self._engines.values(), *self._leaving.values()]
        leaving = list(self._leaving)
        self._engines = {}
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        await asyncio.gather(*(engine.stop() for engine in engines))

    @contextlib.asynccontextmanager
    async def _asked(self, target: Target) -> AsyncIterator[Engine]:
        """The engine of a model, ready, for as long as it is asked."""
        engine = self._alive(target) or await self._made(target)
        folder = str(target.folder) if target.kind == "adapter" else None
        engine.asked += 1
        engine.using[folder] += 1
        try:
            await asyncio.shield(engine.started)
            if folder is not None:
                await engine.adapter(folder)
            yield engine
        except httpx2.TransportError:
            engine.broken = True
            raise _ended(target) from None
        finally:
            engine.using[folder] -= 1
            engine.asked -= 1
            engine.last = time.monotonic()
            if not engine.asked:
                engine.quiet.set()

    def _alive(self, target: Target) -> Engine | None:
        engine = self._engines.get(target.engine)
        return engine if engine is not None and not engine.is_dead else None

    async def _made(self, target: Target) -> Engine:
        async with self._changing:
            if (engine := self._alive(target)) is not None:
                return engine
            if (dead := self._engines.get(target.engine)) is not None:
                logger.warning("engine %s ended with %s; starting another", target.engine, dead.exit_code)
                await asyncio.wait([self._leave(target.engine)])
            while len(self._engines) + len(self._leaving) >= self._most:
                await self._make_room()
            engine = self._engines[target.engine] = Engine(target, self._logs / f"{target.engine}.log")
            if self._tidying is None:
                self._tidying = asyncio.create_task(self._tidy())
            return engine

    async def _make_room(self) -> None:
        """End the engine that was asked longest ago, an idle one if there is any. Who asks for it now waits, as for
        one that is not there."""
        if not self._leaving:
            self._leave(min(self._engines, key=lambda one: (self._engines[one].asked > 0, self._engines[one].last)))
        await asyncio.wait(self._leaving, return_when=asyncio.FIRST_COMPLETED)

    def _leave(self, id: str) -> asyncio.Task[None]:
        """Take no more requests to an engine, and end it once it is done. That goes on whoever stops waiting for it."""
        engine = self._engines.pop(id)
        task = asyncio.create_task(_stop(engine))
        self._leaving[task] = engine
        task.add_done_callback(self._leaving.pop)
        return task

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(min(30.0, self._idle_s / 4))
            for id in list(self._engines):
                async with self._changing:
                    engine = self._engines.get(id)  # as it is now: the one before took its time to end
                    if engine is not None and not engine.asked and engine.last < time.monotonic() - self._idle_s:
                        logger.info("engine %s was idle for %d s and ends", id, self._idle_s)
                        await asyncio.wait([self._leave(id)])


class Engine:
    """One child process."""

    def __init__(self, target: Target, log: Path) -> None:
        self.asked = 0
        self.using: Counter[str | None] = Counter()
        self.last = time.monotonic()
        self.broken = False
        """It hung up: its process has ended or is about to, which shows a moment later."""
        self.quiet = asyncio.Event()
        """Set when nobody is left who asks."""
        self.id = target.engine
        self._target = target
        self._log = log
        self._adapters: dict[str, asyncio.Task[None]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._spawning: asyncio.Task[int] | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="tunewright-"))  # a socket's path must be short
        self._socket = self._folder / "engine.sock"
        self.client = httpx2.AsyncClient(
            transport=httpx2.AsyncHTTPTransport(
                uds=str(self._socket), limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64)
            ),
            base_url="http://engine",
            timeout=httpx2.Timeout(None),
            trust_env=False,
        )
        self.started = _task(self._start())

    @property
    def is_dead(self) -> bool:
        failed = self.started.done() and (self.started.cancelled() or self.started.exception() is not None)
        return failed or self.broken or (self._process is not None and self._process.poll() is not None)

    @property
    def exit_code(self) -> int | None:
        return None if self._process is None else self._process.poll()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def adapter(self, folder: str) -> None:
        """See that an adapter is loaded.

        Raises:
            ApiError: it cannot be.
        """
        task = self._adapters.pop(folder, None)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = _task(self._load(folder))
        self._adapters[folder] = task  # the one that was asked last stands last
        await asyncio.shield(task)

    async def finished(self) -> None:
        """Until nobody asks any more."""
        while self.asked:
            self.quiet.clear()
            await self.quiet.wait()

    async def stop(self) -> None:
        """End the process, and what is left of it."""
        self.started.cancel()
        for task in self._adapters.values():
            task.cancel()
        await asyncio.gather(self.started, *self._adapters.values(), return_exceptions=True)
        if self._spawning is not None:  # its thread cannot be stopped, and has a process to show for it
            await asyncio.gather(self._spawning, return_exceptions=True)
        try:
            await self.client.aclose()
        finally:
            if self._process is not None:
                await asyncio.to_thread(_end, self._process)
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _start(self) -> None:
        began = time.monotonic()
        self._spawning = asyncio.create_task(asyncio.to_thread(self._spawn))
        size = await asyncio.shield(self._spawning)
        assert self._process is not None
        while True:
            try:
                (await self.client.get("/healthz")).raise_for_status()
                break
            except httpx2.TransportError:
                if self._process.poll() is not None:
                    raise self._refused(size) from None
                await asyncio.sleep(0.05)
        logger.info(
            "engine %s (%d) serves %s after %.1f s", self._target.engine, self._process.pid,
            self._target.folder if self._target.kind == "full" else self._target.source, time.monotonic() - began,
        )  # fmt: skip

    def _spawn(self) -> int:
        """Start the process; gives how long its log was before."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        if self._log.exists() and self._log.stat().st_size > LOG_BYTES:
            os.replace(self._log, self._log.with_suffix(".log.1"))
        options = ["--socket", str(self._socket), "--source", self._target.source]
        if self._target.revision is not None:
            options += ["--revision", self._target.revision]
        if self._target.kind == "full":
            options += ["--folder", str(self._target.folder)]
        with self._log.open("ab") as log:
            size = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tunewright.work", "engine", *options],
                stdin=subprocess.PIPE,  # never written to: its end is this server's end
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
            )
        return size

    def _refused(self, size: int) -> ApiError:
        """Why the process ended before it was ready: its last words."""
        with self._log.open("rb") as file:
            file.seek(size)
            lines = file.read().decode(errors="replace").strip().splitlines()
        said = lines[-1] if lines else f"its process ended with {self.exit_code}"
        return _unavailable(self._target.name, said)

    async def _load(self, folder: str) -> None:
        over = max(0, len(self._adapters) - ADAPTERS)
        for old in [one for one in self._adapters if not self.using[one]][:over]:
            self._adapters.pop(old)
            await self.client.post("/adapters/unload", json={"folder": old})
        reply = await self.client.post("/adapters", json={"folder": folder})
        if reply.status_code != 200:
            raise _unavailable(Path(folder).name, str(reply.json()["error"]["message"]))


async def _stop(engine: Engine) -> None:
    try:
        if not engine.is_dead:
            await engine.finished()
        await engine.stop()
    except Exception:
        logger.exception("engine %s could not be stopped", engine.id)


def _task(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task whose error is for those who wait for it, if anybody does."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task


def _headers(target: Target) -> dict[str, str]:
    headers = {"content-type": "application/json"}
    if target.kind == "adapter":
        headers["x-adapter"] = quote(str(target.folder))
    return headers


def _error(reply: httpx2.Response) -> ApiError:
    try:
        body = reply.json()
    except ValueError:
        body = reply.text
    return ApiError.received(reply.status_code, body)


def _ended(target: Target) -> ApiError:
    return ApiError(
        503,
        f"The engine of '{target.name}' ended while it was asked; another starts with the next request. Send it again.",
        kind="server_error",
        code="engine_ended",
        headers={"retry-after": "1"},
    )


def _unavailable(name: str, said: str) -> ApiError:
    return ApiError(
        500,
        f"The model '{name}' cannot be served: {said}",
        kind="server_error",
        code="model_not_available",
        headers={"x-should-retry": "false"},  # nothing changes by itself
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
