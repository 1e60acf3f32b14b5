"""The database: SQLite by default, PostgreSQL by URL. Statements stand with the code that needs them.

Transactions are short: no file is read, no process asked and no network used inside one.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import Connection, Engine, Select, Table, event, func, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from tunewright.errors import EndpointError

BUSY_S = 30
"""How long a writer waits for another one (SQLite has one at a time)."""


AWAY = (OperationalError, InterfaceError, PoolTimeout)
"""What is raised where the database does not answer, or has more to do than it can: later perhaps not."""


class Store:
    """A database at the newest schema.

    Args:
        url: an SQLAlchemy URL: `sqlite:///FILE` or `postgresql+psycopg://...` (`postgresql://` is taken for it).

    Raises:
        EndpointError: the URL is none, the database cannot be reached, or a newer version has written it.
    """

    def __init__(self, url: str) -> None:
        self.engine = _engine(url)
        try:
            self._migrate()
        except BaseException:
            self.engine.dispose()
            raise

    @contextlib.contextmanager
    def begin(self) -> Iterator[Connection]:
        """A transaction: committed at the end of the block, undone where it raises."""
        with self.engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads, and so waits for no writer."""
        with self.engine.connect().execution_options(read_only=True) as connection, connection.begin():
            yield connection

    def close(self) -> None:
        self.engine.dispose()

    def answers(self) -> bool:
        """Whether the database can be asked right now."""
        try:
            with self.read() as connection:
                connection.execute(select(1))
        except AWAY:
            return False
        return True

    def _migrate(self) -> None:
        from alembic import command
        from alembic.config import Config
        from alembic.util import CommandError

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
        try:
            with self.begin() as connection:
                if connection.dialect.name == "postgresql":  # two servers that start at once
                    connection.execute(select(func.pg_advisory_xact_lock(7263919)))
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
        except OperationalError as error:
            raise EndpointError(f"the database cannot be reached: {_said(error)}; see --database") from None
        except CommandError as error:
            raise EndpointError(
                f"the database was written by a newer version of Tunewright ({error}); install that one"
            ) from None


def new_id(prefix: str, *, size: int = 24) -> str:
    """An id as OpenAI's look: a prefix and letters and digits that nobody can guess."""
    alphabet = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    return prefix + "".join(secrets.choice(alphabet) for _ in range(size))


def now() -> int:
    """Unix time in whole seconds."""
    return int(time.time())


def row(connection: Connection, table: Table, **where: Any) -> dict[str, Any] | None:
    """The one row of a table with these values, None if there is none."""
    if not all(storable(value) for value in where.values() if isinstance(value, str)):
        return None
    found = connection.execute(select(table).filter_by(**where)).mappings().first()
    return dict(found) if found is not None else None


def storable(text: str) -> bool:
    """Whether the database can hold a text. PostgreSQL has no NUL, and neither has half of a surrogate pair."""
    return "\x00" not in text and (text.isascii() or not any("\ud800" <= one <= "\udfff" for one in text))


def page(
    connection: Connection,
    query: Select[Any],
    table: Table,
    *,
    after: int | None,
    limit: int,
    newest_first: bool = True,
) -> tuple[list[dict[str, Any]], bool]:
    """A page of a table in the order of its numbers, and whether more follow.

    Args:
        after: the number of the last row of the page before.
        limit: rows of a page.
    """
    number = table.c.number
    if after is not None:
        query = query.where(number < after if newest_first else number > after)
    query = query.order_by(number.desc() if newest_first else number).limit(limit + 1)
    found = [dict(one) for one in connection.execute(query).mappings()]
    return found[:limit], len(found) > limit


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        if parsed.get_backend_name() not in ("sqlite", "postgresql"):
            raise EndpointError(f"--database: {parsed.get_backend_name()} is not supported; use sqlite or postgresql")
        if parsed.get_backend_name() == "postgresql":
            return sqlalchemy.create_engine(
                parsed, pool_pre_ping=True, pool_size=10, max_overflow=20, hide_parameters=True
            )
        engine = sqlalchemy.create_engine(parsed, connect_args={"timeout": BUSY_S}, hide_parameters=True)
    except ArgumentError:
        raise EndpointError("--database: not a URL such as sqlite:///file.db or postgresql://user@host/name") from None
    except ModuleNotFoundError as error:
        raise EndpointError(f"--database: {error.name} is not installed; pip install 'tunewright[postgres]'") from None
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # else the driver begins transactions when it likes (`_begin_sqlite` does)
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    """Ask for the write lock at once: a transaction that reads first and writes later could not get it any more."""
    read_only = connection.get_execution_options().get("read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def _said(error: OperationalError) -> str:
    return str(error.orig).strip().splitlines()[0] if error.orig else str(error)
