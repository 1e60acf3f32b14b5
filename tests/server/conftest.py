"""A server on loopback for each kind of database: SQLite, and PostgreSQL where its programs are installed."""

from __future__ import annotations

import contextlib
import getpass
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from endpoint_fixtures import running
from server_running import Running
from tunewright.server import keys
from tunewright.server.app import create_app
from tunewright.server.state import Server, Settings

PROGRAMS = ("initdb", "pg_ctl")


def _program(name: str) -> str | None:
    """Debian keeps the server's programs out of PATH."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return shutil.which(name) or next((str(one / name) for one in folders if (one / name).is_file()), None)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL cluster of the tests' own, which ends with them."""
    programs = {name: _program(name) for name in PROGRAMS}
    if None in programs.values():
        pytest.skip("PostgreSQL's programs (initdb, pg_ctl) are not installed; Debian has them in `postgresql`")
    user = getpass.getuser()
    if os.geteuid() == 0:  # PostgreSQL does not run as root
        try:
            user = pwd.getpwnam("postgres").pw_name
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user `postgres`")
    as_user = {"user": user} if os.geteuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="tunewright-postgres-"))
    if as_user:
        shutil.chown(folder, user)
    data = str(folder / "data")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder, **as_user}
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off -c max_connections=200"
    try:
        subprocess.run([programs["initdb"], "-D", data, "-U", "tw", "--auth=trust", "-E", "UTF8"], **quiet)
        log = str(folder / "log")
        subprocess.run([programs["pg_ctl"], "-D", data, "-w", "-l", log, "-o", options, "start"], **quiet)
        try:
            yield f"postgresql://tw@127.0.0.1:{port}"
        finally:
            subprocess.run([programs["pg_ctl"], "-D", data, "-w", "-m", "immediate", "stop"], **quiet)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test of the server runs on both databases, on PostgreSQL with the slow ones; those that are about the
    database itself (`BOTH_EACH_TIME`) run on both each time."""
    if "database" not in metafunc.fixturenames or any(
        mark.name == "parametrize" and "database" in str(mark.args[0])
        for mark in metafunc.definition.iter_markers("parametrize")
    ):
        return
    slow = () if getattr(metafunc.module, "BOTH_EACH_TIME", False) else (pytest.mark.slow,)
    metafunc.parametrize("database", ["sqlite", pytest.param("postgresql", marks=slow)], indirect=True)


@pytest.fixture
def database(request: pytest.FixtureRequest) -> str | None:
    """A fresh database's URL; None is SQLite in the data folder. On PostgreSQL it is a schema: a database for each test
    would be a thousand files each."""
    if request.param == "sqlite":
        return None
    import psycopg

    cluster = request.getfixturevalue("postgres")
    name = f"test_{secrets.token_hex(4)}"
    with psycopg.connect(f"{cluster}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}")  # type: ignore[arg-type]
    return f"{cluster}/postgres?options=-csearch_path%3D{name}"


@pytest.fixture
def open_server(tmp_path: Path, database: str | None) -> Iterator[Callable[[], Server]]:
    """Opens servers on one database and one data folder, as often as it is called."""
    opened: list[Server] = []

    def one() -> Server:
        opened.append(Server.open(Settings(tmp_path / "data", database)))
        return opened[-1]

    yield one
    for server in opened:
        server.close()


@pytest.fixture
def served(open_server: Callable[[], Server]) -> Iterator[Running]:
    server = open_server()
    made = [keys.create(server.store, scope, scope=scope) for scope in ("training", "inference", "admin")]
    with running(create_app(server)) as url, contextlib.closing(Running(server, url, *made)) as served:
        yield served
