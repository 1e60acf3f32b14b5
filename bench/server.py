"""The server's HTTP layer with engines that echo: requests a second, waiting times, uploads, long lists.

The server has one core to itself and the clients another, where the machine has two. Keys, quota, content filter and
metrics are on; the deployment's quota is large enough never to refuse.

Peers: the same app with nothing on the way (one route that answers a constant), so the ratio says what keys, shapes,
quota, filter and metrics cost; and LiteLLM's proxy, one worker on the same core, with its key checked, its own mock of
an answer, and no database. It is installed into an environment of its own (`bench/` beside the interpreter's packages).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

CONNECTIONS = 64
SECONDS = 8.0
REPEATS = 5
JOBS = 100_000
UPLOAD = 512 << 20
LITELLM, LITELLM_KEY = ("litellm[proxy]==1.96.2", "fastapi==0.136.3"), "sk-bench"

BODY = json.dumps(
    {
        "model": "echo",
        "messages": [{"role": "user", "content": "How many letters are in this sentence?"}],
        "max_tokens": 16,
    }
).encode()


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as started:
        server, port, key = _start(Path(folder), started)
        core = psutil.Process(server.pid).cpu_affinity()
        rivals = {
            "one route that answers a constant": (port, "/bare", key),
            "chat: key, quota, filter, metrics": (port, "/v1/chat/completions", key),
            "LiteLLM's proxy: key": (_start_litellm(Path(folder), started, core), "/v1/chat/completions", LITELLM_KEY),
        }
        rates: dict[str, list[float]] = {name: [] for name in rivals}
        waits: dict[str, list[list[float]]] = {name: [] for name in rivals}
        for _ in range(REPEATS):
            for name, rival in rivals.items():
                found = asyncio.run(_load(*rival))
                rates[name].append(len(found) / SECONDS)
                waits[name].append(sorted(found))
        listed = _list_jobs(port, key)
        before, peak = _upload(port, key, server.pid)
    print(f"### The server's HTTP layer, {CONNECTIONS} connections\n")
    print(
        "| | requests/s (min to max) | times LiteLLM (min to max) | p50, ms | p99, ms (min to max) |\n"
        "| --- | ---: | ---: | ---: | ---: |"
    )
    *_, peer = rivals
    for name, found in waits.items():
        halves = [1000 * one[len(one) // 2] for one in found]
        tails = [1000 * one[int(0.99 * len(one))] for one in found]
        ratios = [ours / theirs for ours, theirs in zip(rates[name], rates[peer], strict=True)]
        numbers = (_spread(rates[name], 0), _spread(ratios, 1), f"{statistics.median(halves):.1f}", _spread(tails, 1))
        print(f"| {name} | {' | '.join(numbers)} |")
    print(f"\nFirst page of {JOBS:,} jobs: {_spread(listed, 1)} ms. ", end="")
    print(f"{UPLOAD >> 20} MB uploaded: {(peak - before) / 1e6:.0f} MB more memory at the peak.\n")


def serve(folder: Path) -> None:
    """The server's process: its port and a key as one line of JSON, then requests until SIGTERM."""
    from fastapi.responses import JSONResponse
    from sqlalchemy import insert

    from tunewright import starter
    from tunewright.endpoint.process import listen, until_sigterm
    from tunewright.server import keys, models, tables
    from tunewright.server.app import create_app
    from tunewright.server.state import Server, Settings
    from tunewright.testing import EchoEngines

    server = Server.open(Settings(folder))
    server.engines = EchoEngines()
    models.add_base(server.store, "echo", str(starter.model_path()))
    key = keys.create(server.store, "bench", scope="admin")
    row = {
        "created_at": 1, "key_id": "k", "surface": "openai", "model": "echo", "seed": 1, "training_file": "file-1",
        "method": {"type": "supervised", "supervised": {}}, "hyperparameters": {}, "status": "succeeded",
        "wanted": "run", "result_files": [],
    }  # fmt: skip
    with server.store.begin() as connection:
        connection.execute(insert(tables.jobs), [row | {"id": f"ftjob-{number}"} for number in range(JOBS)])
    app = create_app(server)

    @app.post("/bare")
    async def bare() -> JSONResponse:
        return JSONResponse({"answer": "a constant"})

    app.router.routes.insert(0, app.router.routes.pop())
    gc.collect()
    gc.freeze()  # as `tunewright serve` does
    listener = listen("127.0.0.1", 0)
    print(json.dumps({"port": listener.getsockname()[1], "key": key}), flush=True)
    until_sigterm(app, listener, grace_s=1)


def _start(folder: Path, started: contextlib.ExitStack) -> tuple[subprocess.Popen[str], int, str]:
    cores = sorted(os.sched_getaffinity(0))
    server = _begin([sys.executable, "-W", "ignore", "-m", "bench.server", str(folder)], started)
    assert server.stdout is not None
    said = json.loads(server.stdout.readline())
    if len(cores) > 1:
        os.sched_setaffinity(server.pid, cores[:1])
        os.sched_setaffinity(0, cores[1:2])
    _deploy(said["port"], said["key"])
    return server, said["port"], said["key"]


def _start_litellm(folder: Path, started: contextlib.ExitStack, core: list[int]) -> int:
    """LiteLLM's proxy, on the same core as the server; gives its port."""
    config = {
        "model_list": [
            {
                "model_name": "echo",
                "litellm_params": {"model": "openai/echo", "api_key": "none", "mock_response": "How many letters?"},
            }
        ],
        "general_settings": {"master_key": LITELLM_KEY},
    }
    file = folder / "litellm.json"
    file.write_text(json.dumps(config))
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port: int = free.getsockname()[1]
    program = _environment("litellm", *LITELLM) / "bin" / "litellm"
    words = [str(program), "--config", str(file), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    proxy = _begin(words, started, env=environment, log=folder / "litellm.log")
    until = time.monotonic() + 120
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health/liveliness"):
            break
        ended = proxy.poll() is not None or time.monotonic() > until
        assert not ended, (folder / "litellm.log").read_text()
        time.sleep(0.5)
    process = psutil.Process(proxy.pid)
    for one in (process, *process.children(recursive=True)):
        one.cpu_affinity(core)
    return port


def _environment(name: str, *packages: str) -> Path:
    """A folder with packages that are installed where they are not there yet."""
    folder = Path(sys.prefix) / "bench" / name
    stamp, wanted = folder / ".made", "\n".join([sys.version, *packages])
    if not stamp.is_file() or stamp.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", *packages], check=True)
        stamp.write_text(wanted)
    return folder


def _begin(
    words: Sequence[str],
    started: contextlib.ExitStack,
    *,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> subprocess.Popen[str]:
    """A process that ends with `started`; what it says is read by the caller, or goes to `log`."""
    said = subprocess.PIPE if log is None else started.enter_context(log.open("w"))
    process = subprocess.Popen(words, stdout=said, stderr=None if log is None else said, text=True, env=env)
    started.callback(process.wait)
    started.callback(process.terminate)
    return process


def _deploy(port: int, key: str) -> None:
    """A deployment whose quota is counted and never used up."""
    account = "/subscriptions/00000000-0000-0000-0000-000000000000/resourceGroups/local/providers"
    where = f"{account}/Microsoft.CognitiveServices/accounts/local/deployments/fast?api-version=2025-09-01"
    wanted = {
        "sku": {"name": "Standard", "capacity": 1_000_000},
        "properties": {"model": {"name": "echo", "format": "OpenAI"}},
    }
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    while True:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{where}", data=json.dumps(wanted).encode(), headers=headers, method="PUT"
        )
        with urllib.request.urlopen(request) as reply:
            state = json.load(reply)["properties"]["provisioningState"]
        if state == "Succeeded":
            return
        assert state in ("Accepted", "Creating"), state
        time.sleep(0.5)


async def _load(port: int, path: str, key: str) -> list[float]:
    """Seconds of each request that was answered within SECONDS, by clients that each keep one connection."""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(BODY)}\r\n\r\n"
    ).encode()
    found: list[float] = []
    until = time.perf_counter() + SECONDS

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (began := time.perf_counter()) < until:
            writer.write(head + BODY)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200"), answer
            length = next(line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.split(b":")[1]))
            found.append(time.perf_counter() - began)
        writer.close()

    await asyncio.gather(*(one() for _ in range(CONNECTIONS)))
    return found


def _list_jobs(port: int, key: str) -> list[float]:
    """Milliseconds of each of some requests for the first page."""
    taken = []
    for _ in range(20):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/fine_tuning/jobs", headers={"authorization": f"Bearer {key}"}
        )
        began = time.perf_counter()
        with urllib.request.urlopen(request) as reply:
            assert len(json.load(reply)["data"]) == 20
        taken.append(1000 * (time.perf_counter() - began))
    return taken


def _upload(port: int, key: str, pid: int) -> tuple[int, int]:
    """Bytes of memory that the server has before an upload, and at most during it."""
    head = (
        b'--edge\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--edge\r\n'
        b'content-disposition: form-data; name="file"; filename="z"\r\n\r\n'
    )
    tail = b"\r\n--edge--\r\n"

    def body() -> Any:
        yield head
        for _ in range(UPLOAD >> 20):
            yield bytes(1 << 20)
        yield tail

    process = psutil.Process(pid)
    before = peak = process.memory_info().rss
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/files",
        data=body(),
        headers={
            "authorization": f"Bearer {key}",
            "content-type": "multipart/form-data; boundary=edge",
            "content-length": str(len(head) + UPLOAD + len(tail)),
        },
    )
    sending = threading.Thread(target=lambda: urllib.request.urlopen(request).close())
    sending.start()
    while sending.is_alive():
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.02)
    return before, peak


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
