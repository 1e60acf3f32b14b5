"""`tunewright serve` and `tunewright worker`: processes, their beginning and their clean end."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

from tunewright.endpoint.process import listen, until_sigterm
from tunewright.errors import DONE
from tunewright.server import logs
from tunewright.server.app import create_app
from tunewright.server.state import Server, Settings

GRACE_S = 30
"""How long running answers may take to finish after SIGTERM."""
WORKER_GRACE_S = 90
"""How long a worker has to stop its job at a step's end, with a checkpoint."""
RESTART_S = 2.0

logger = logging.getLogger("tunewright.server")


def serve(settings: Settings, *, host: str, port: int, workers: int = 1) -> None:
    """Serve until SIGTERM, with so many worker processes beside; then let running answers finish.

    Raises:
        EndpointError: the port, the database or the file store cannot be had.
    """
    with contextlib.closing(listen(host, port)) as listener:
        server = Server.open(settings)
        logs.to_stdout(settings.log_format)
        app = create_app(server)
        with _workers(settings, workers):
            shown = f"[{host}]" if ":" in host else host
            gc.collect()
            gc.freeze()  # what stands now stays; looking through it again and again held answers up for 100 ms
            logger.info("serving at http://%s:%d/v1", shown, listener.getsockname()[1])
            until_sigterm(app, listener, grace_s=GRACE_S)
        logger.info("stopped")


def work(settings: Settings, *, with_parent: bool = False) -> None:
    """Work on jobs until SIGTERM or Ctrl-C; what is being worked on is given back with a checkpoint.

    Args:
        with_parent: end when standard input ends, so that no worker outlives the server that started it.
    """
    from tunewright.server.worker import CHECKING, TRAINING, Worker

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    logs.to_stdout(settings.log_format)
    server = Server.open(settings)
    threads = [
        threading.Thread(target=Worker(server, statuses, stop).run, name=statuses[-1])
        for statuses in (CHECKING, TRAINING)
    ]
    for thread in threads:
        thread.start()
    if with_parent:
        threading.Thread(target=_until_input_ends, args=(stop,), daemon=True).start()
    logger.info("worker %d waits for jobs", os.getpid())
    for thread in threads:
        while thread.is_alive():  # a join without a limit would keep signals waiting
            thread.join(0.5)
    server.close()
    logger.info("worker %d stopped", os.getpid())


@contextlib.contextmanager
def _workers(settings: Settings, count: int) -> Iterator[None]:
    """Worker processes beside the server; one that dies is started again."""
    ended = threading.Event()
    threads = [threading.Thread(target=_keep_one, args=(settings, ended), daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def _keep_one(settings: Settings, ended: threading.Event) -> None:
    while not ended.is_set():
        child = subprocess.Popen(
            _worker_command(settings),
            stdin=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, **_worker_environment(settings)},
        )
        assert child.stdin is not None
        while child.poll() is None and not ended.wait(0.2):
            pass
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(WORKER_GRACE_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        child.stdin.close()
        if not ended.is_set():
            level = logging.INFO if child.returncode == DONE else logging.WARNING
            logger.log(level, "worker %d ended with %d; starting another", child.pid, child.returncode)
            ended.wait(RESTART_S)


def _worker_command(settings: Settings) -> Sequence[str]:
    options = ["--data", str(settings.data), "--with-parent"]
    options += ["--log-format", settings.log_format]
    for override in settings.overrides:
        options += ["--set", override]
    return [sys.executable, "-m", "tunewright.cli", "worker", *options]


def _worker_environment(settings: Settings) -> dict[str, str]:
    """What may hold a password, and must not be seen in the list of processes."""
    said = {"TUNEWRIGHT_DATABASE": settings.database, "TUNEWRIGHT_FILES": settings.files}
    return {name: value for name, value in said.items() if value is not None}


def _until_input_ends(stop: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        continue
    stop.set()
