"""The two keys of an account, which its owner may ask for again (listKeys), although no key is kept.

A key is computed when it is asked for: HMAC-SHA256 of its row's id, with a secret that lies in the data folder,
readable for the server's user alone. Whoever reads the database has hashes and ids, and no key; whoever has the
secret alone has none either. Renewing a key makes a row with another id and ends the one before.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, select, update

from tunewright.endpoint.shapes import ApiError
from tunewright.server import keys, tables
from tunewright.server.state import Server
from tunewright.server.store import now

NAMES = ("key1", "key2")
FILE = "account-keys.secret"


def both(server: Server, account: str) -> dict[str, str]:
    """An account's keys by name; one that it does not have yet, or that was revoked, is made.

    Raises:
        ApiError: 409, a key was made with another secret.
    """
    secret = _secret(server.settings.data)
    with server.store.begin() as connection:
        _lock(connection, account)
        found = {}
        for which in NAMES:
            row = _row(connection, account, which)
            found[which] = _shown(secret, row, which) if row is not None else _made(connection, secret, account, which)
    return found


def renew(server: Server, account: str, which: str) -> dict[str, str]:
    """Make one of the keys anew; the one before opens nothing from now on (in other servers, within seconds)."""
    secret = _secret(server.settings.data)
    with server.store.begin() as connection:
        _lock(connection, account)
        _end(connection, account, which)
        _made(connection, secret, account, which)
    server.keyring.forget()
    return both(server, account)


def end(connection: Connection, account: str) -> None:
    """End all keys of an account."""
    for which in NAMES:
        _end(connection, account, which)


def _lock(connection: Connection, account: str) -> None:
    """Two servers that are asked at once make one key."""
    connection.execute(select(tables.accounts.c.number).where(tables.accounts.c.name == account).with_for_update())


def _row(connection: Connection, account: str, which: str) -> dict[str, Any] | None:
    table = tables.keys
    query = select(table).where(
        table.c.account == account, table.c.name == f"{account}/{which}", table.c.revoked_at.is_(None)
    )
    found = connection.execute(query).mappings().first()
    return dict(found) if found is not None else None


def _made(connection: Connection, secret: bytes, account: str, which: str) -> str:
    id = keys.new_key_id()
    key = _key(secret, id)
    keys.add(connection, id, key, f"{account}/{which}", scope="training", account=account)
    return key


def _end(connection: Connection, account: str, which: str) -> None:
    table = tables.keys
    connection.execute(
        update(table)
        .where(table.c.account == account, table.c.name == f"{account}/{which}", table.c.revoked_at.is_(None))
        .values(revoked_at=now())
    )


def _shown(secret: bytes, row: dict[str, Any], which: str) -> str:
    key = _key(secret, row["id"])
    if keys.hashed(key) != row["sha256"]:
        raise ApiError(
            409,
            f"{which} was made by a server whose data folder has another {FILE}. Copy that file here and start the "
            f"server again, or regenerate {which}.",
            code="KeyOfAnotherServer",
        )
    return key


def _key(secret: bytes, id: str) -> str:
    digest = hmac.digest(secret, id.encode(), hashlib.sha256)
    return f"tw-{base64.urlsafe_b64encode(digest).decode().rstrip('=')}"


def _secret(data: Path) -> bytes:
    """The server's secret, made at its first use; complete or absent, however many servers begin at once."""
    path = data / FILE
    if not path.exists():
        temporary = data / f".{FILE}.{secrets.token_hex(8)}"
        with open(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
        temporary.unlink()
    return bytes.fromhex(path.read_text("ascii"))
