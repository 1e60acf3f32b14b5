"""The database: both kinds, several at once, and what is said where it cannot be had."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import insert, select, text
from sqlalchemy.exc import IntegrityError

from tunewright.errors import EndpointError
from tunewright.server import models, tables
from tunewright.server import store as store_module
from tunewright.server.models import Target
from tunewright.server.state import Server, Settings
from tunewright.server.store import Store, new_id

BOTH_EACH_TIME = True
"""SQLite and PostgreSQL, in the fast tests too."""


def test_migrations_make_the_tables_that_the_code_has(open_server: Callable[[], Server]) -> None:
    with open_server().store.begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), tables.metadata) == []


def test_an_older_database_is_brought_up_to_date_with_what_is_in_it(tmp_path: Path, database: str | None) -> None:
    url = Settings(tmp_path / "data", database).prepared().database_url
    engine = store_module._engine(url)
    old = {"id": "ft:a", "created_at": 1, "job_id": "j", "base": "a", "source": "a", "folder": "f", "kind": "full"}
    with engine.begin() as connection:
        config = Config()
        config.set_main_option("script_location", str(Path(store_module.__file__).with_name("migrations")))
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(insert(tables.models).values(**old, checkpoint=False))
    engine.dispose()
    with contextlib.closing(Store(url)) as store:
        with store.read() as connection:
            assert connection.execute(select(tables.models.c.id)).scalar() == "ft:a"
            assert compare_metadata(MigrationContext.configure(connection), tables.metadata) == []
        with pytest.raises(IntegrityError), store.begin() as connection:  # it still names one model alone
            connection.execute(insert(tables.models).values(**old, checkpoint=False))


def test_several_servers_start_at_once(open_server: Callable[[], Server], tmp_path: Path, database: str | None) -> None:
    found: list[Store | Exception] = []

    def start() -> None:
        try:
            found.append(Store(Settings(tmp_path / "data", database).prepared().database_url))
        except Exception as error:  # noqa: BLE001 - a thread's is shown by the test
            found.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [type(one) for one in found] == [Store] * 4
    for one in found:
        assert isinstance(one, Store)
        assert one.answers()
        one.close()


def test_an_error_of_a_statement_does_not_tell_what_was_written(open_server: Callable[[], Server]) -> None:
    store = open_server().store
    row = {"id": "key_1", "name": "SECRET", "sha256": "x", "scope": "admin", "created_at": 1}
    with store.begin() as connection:
        connection.execute(insert(tables.keys).values(row))
    with pytest.raises(IntegrityError) as refused, store.begin() as connection:
        connection.execute(insert(tables.keys).values(row))
    assert "SECRET" not in str(refused.value)


def test_the_longest_names_fit(open_server: Callable[[], Server]) -> None:
    server = open_server()
    base = "b" * 128
    name = models.tuned_name(base, "s" * 64, "ftjob-12345678", surface="openai", step=10**9)
    start = Target(base, base, "folder", None, None, "base", 1)
    account = {"name": "a" * 64, "subscription": "s" * 90, "resource_group": "g" * 90, "location": "local"}
    with server.store.begin() as connection:
        models.record(connection, name, job_id="ftjob-1", start=start, folder="x", kind="adapter")
        connection.execute(insert(tables.accounts).values(**account, body={}, created_at=1))
    with server.store.read() as connection:
        assert models.known(connection, server.settings.data, name) is not None


def test_a_newer_database_is_refused(open_server: Callable[[], Server], tmp_path: Path, database: str | None) -> None:
    with open_server().store.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(EndpointError, match="newer version"):
        Store(Settings(tmp_path / "data", database).database_url)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://root@localhost/db", "mysql is not supported"),
        ("nonsense", "not a URL"),
        ("postgresql://tw@127.0.0.1:1/none", "cannot be reached"),
        ("sqlite:////nowhere/at/all.db", "cannot be reached"),
    ],
)
def test_what_is_no_database(url: str, said: str) -> None:
    with pytest.raises(EndpointError, match=said):
        Store(url)


def test_a_writer_that_reads_first_can_still_write(open_server: Callable[[], Server]) -> None:
    """With SQLite's deferred transactions this fails with `database is locked`, whatever the timeout."""
    server = open_server()
    errors: list[Exception] = []

    def write(number: int) -> None:
        try:
            for _ in range(20):
                with server.store.begin() as connection:
                    connection.execute(select(tables.keys)).all()
                    row = {"id": new_id("key_"), "name": "n", "sha256": new_id(""), "scope": "admin", "created_at": 1}
                    connection.execute(insert(tables.keys).values(**row))
        except Exception as error:  # noqa: BLE001 - a thread's is shown by the test
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with server.store.begin() as connection:
        assert len(connection.execute(select(tables.keys)).all()) == 80
