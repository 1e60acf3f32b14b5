"""The endpoint's own process: a port, the model, and a clean end on SIGTERM."""

from __future__ import annotations

import contextlib
import errno
import logging
import signal
import socket
import sys
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from tunewright.endpoint.app import create_app
from tunewright.endpoint.connections import Connection, most_connections
from tunewright.endpoint.diary import logger
from tunewright.endpoint.served import load
from tunewright.errors import EndpointError
from tunewright.run import Run

GRACE_S = 10
"""How long running answers may take to finish after SIGTERM."""

BACKLOG = 2048


def serve(run: Run, *, host: str, port: int) -> None:
    """Serve a run's packaged model until SIGTERM, then let running answers finish. Call it in the main thread.

    The port is taken before the weights are loaded; clients that connect meanwhile wait. Port 0 is any free one, and
    the log's line `serving NAME at URL` says which.

    Raises:
        EndpointError: the port cannot be had, a key is missing, or the model is refused (see `load`).
    """
    recipe = run.recipe()
    keys = {_key(run.key_file): True, _key(run.test_key_file): False}
    with contextlib.closing(listen(host, port)) as listener:
        served = load(run)
        app = create_app(
            served, name=recipe.endpoint_name, keys=keys, tokens_per_minute=recipe.deploy.tokens_per_minute
        )
        logging.basicConfig(stream=sys.stdout, level=logging.WARNING, format="%(asctime)s %(message)s", force=True)
        logging.getLogger("tunewright").setLevel(logging.INFO)
        shown = f"[{host}]" if ":" in host else host
        logger.info("serving %s at http://%s:%d/v1", recipe.endpoint_name, shown, listener.getsockname()[1])
        until_sigterm(app, listener, grace_s=GRACE_S)
        logger.info("stopped")


def until_sigterm(app: FastAPI, listener: socket.socket, *, grace_s: int, keep_alive_s: int = 75) -> None:
    """Answer requests until SIGTERM, then let running answers finish for `grace_s`. Call it in the main thread."""
    config = uvicorn.Config(
        app,
        http=Connection,
        limit_concurrency=most_connections(),
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="on",
        ws="none",
        server_header=False,
        timeout_keep_alive=keep_alive_s,
        timeout_graceful_shutdown=grace_s,
    )
    server = uvicorn.Server(config)

    def stop(*_signal: object) -> None:
        server.should_exit = True

    # uvicorn raises the signal once more when it has ended; without a handler that would end the process with the
    # signal's status instead of 0.
    signal.signal(signal.SIGTERM, stop)
    server.run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        EndpointError: the port is in use, may not be taken, or the host is not an address of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
        # Connections inherit it. asyncio would set it, but not on a socket that was made without naming TCP; without
        # it an answer's body waits 40 ms for the client to acknowledge its head.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except socket.gaierror:
        raise EndpointError(
            f"host {host}: no such address; set deploy.host to 127.0.0.1 or one of this machine's"
        ) from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            said = f"port {port} on {host} is in use"
        elif error.errno == errno.EACCES:
            said = f"port {port} on {host} may not be taken by this user"
        else:
            raise EndpointError(f"port {port} on {host} cannot be taken: {error.strerror or error}") from None
        raise EndpointError(f"{said}; set deploy.port to another, or leave it out for any free one") from None


def _key(path: Path) -> str:
    try:
        key = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        key = ""
    if not key:
        raise EndpointError(f"{path}: no key there; `tunewright deploy` writes one")
    return key
