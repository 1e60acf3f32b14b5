"""Keys: made once, kept as hashes, each for one scope.

A key is 32 random bytes, so a plain SHA-256 of it gives nothing away: there is no list of likely keys to try.
"""

from __future__ import annotations

import hashlib
import math
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, insert, select, update

from tunewright.errors import EndpointError
from tunewright.server import tables
from tunewright.server.store import Store, new_id, now

Scope = Literal["admin", "training", "inference"]
SCOPES: dict[str, tuple[str, ...]] = {
    "admin": ("admin", "training", "inference"),
    "training": ("training", "inference"),
    "inference": ("inference",),
}
"""What each scope of a key opens."""

FRESH_S = 2.0
"""How long a key that was looked up is taken as it was: a revoked one may open the door for so long."""
REMEMBERED = 10_000
"""Keys, known and unknown ones, that are remembered at most."""

UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@dataclass(frozen=True)
class Key:
    """Who asks."""

    id: str
    name: str
    scope: str
    expires_at: int | None
    account: str | None = None

    def opens(self, scope: Scope) -> bool:
        return scope in SCOPES[self.scope]


def create(
    store: Store, name: str, *, scope: str = "training", expires_s: int | None = None, account: str | None = None
) -> str:
    """Make a key; gives the key itself, which is kept nowhere.

    Raises:
        EndpointError: the name is taken by a key that still opens, or the scope is none.
    """
    if scope not in SCOPES:
        raise EndpointError(f"--scope {scope}: no such scope; there are {', '.join(SCOPES)}")
    if not re.fullmatch(r"[^\x00-\x1f]{1,128}", name):
        raise EndpointError("a key's name has 1 to 128 characters, and no line breaks")
    key = f"tw-{secrets.token_urlsafe(32)}"
    with store.begin() as connection:
        if any(one["name"] == name and _alive(one) for one in rows(connection)):
            raise EndpointError(f"there is a key {name!r} already; `tunewright keys revoke` ends it, or choose another")
        expires_at = None if expires_s is None else now() + expires_s
        add(connection, new_key_id(), key, name, scope=scope, expires_at=expires_at, account=account)
    return key


def new_key_id() -> str:
    return new_id("key_", size=16)


def add(
    connection: Connection,
    id: str,
    key: str,
    name: str,
    *,
    scope: str,
    expires_at: int | None = None,
    account: str | None = None,
) -> None:
    """Note a key: its hash, and what it opens."""
    said = {"id": id, "name": name, "sha256": hashed(key), "scope": scope, "created_at": now()}
    connection.execute(insert(tables.keys).values(**said, expires_at=expires_at, account=account))


def rotate(store: Store, name: str, *, grace_s: int = 0) -> str:
    """Make a new key in the place of the one of that name, with the same scope and end; gives the key itself.

    Args:
        grace_s: how long the old key still opens, so that its clients can be changed over.

    Raises:
        EndpointError: there is no key of that name that still opens.
    """
    key = f"tw-{secrets.token_urlsafe(32)}"
    with store.begin() as connection:
        living = [one for one in rows(connection) if one["name"] == name and _alive(one)]
        if not living:
            raise _none(name)
        if living[0]["account"] is not None:
            raise EndpointError(f"the key {name!r} is an account's, whose regenerateKey makes it anew")
        until = now() + grace_s
        for one in living:  # more than one where an earlier one is still in its time of grace
            end = until if one["expires_at"] is None else min(until, one["expires_at"])
            ended = {"expires_at": end} if grace_s else {"revoked_at": now()}
            connection.execute(update(tables.keys).where(tables.keys.c.id == one["id"]).values(**ended))
        said = {column: living[0][column] for column in ("scope", "expires_at", "account")}
        add(connection, new_key_id(), key, name, **said)
    return key


def revoke(store: Store, name: str) -> None:
    """End every key of a name.

    Raises:
        EndpointError: there is none that still opens.
    """
    with store.begin() as connection:
        ended = connection.execute(
            update(tables.keys)
            .where(tables.keys.c.name == name, tables.keys.c.revoked_at.is_(None))
            .values(revoked_at=now())
        )
    if not ended.rowcount:
        raise _none(name)


def rows(connection: Connection) -> list[dict[str, Any]]:
    """All keys, the newest first, without their hashes."""
    columns = [column for column in tables.keys.c if column.name != "sha256"]
    query = select(*columns).order_by(tables.keys.c.number.desc())
    return [dict(one) for one in connection.execute(query).mappings()]


def duration(text: str, option: str = "--expires") -> int:
    """Seconds of a duration such as 30d, 12h or 90m.

    Raises:
        EndpointError: it is none.
    """
    found = re.fullmatch(r"([0-9]{1,6})([mhdw])", text)
    if not found or not int(found[1]):
        raise EndpointError(f"{option} {text}: not a duration such as 90m, 12h, 30d or 4w")
    return int(found[1]) * UNITS[found[2]]


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class Keyring:
    """Keys by what clients send; each is looked up in the database at most every `FRESH_S`."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._known: dict[str, tuple[float, Key | None]] = {}
        self._lock = threading.Lock()

    def remembered(self, sent: str) -> tuple[bool, Key | None]:
        """Whether the key was looked up lately, and what was found; asks nobody."""
        looked, key = self._known.get(hashed(sent), (-math.inf, None))
        fresh = self._clock() - looked < FRESH_S
        return fresh, key if fresh and _in_time(key) else None

    def find(self, sent: str) -> Key | None:
        """The key that a client sent, None where it opens nothing (any more)."""
        fresh, key = self.remembered(sent)
        if fresh:
            return key
        digest = hashed(sent)
        with self._store.read() as connection:
            found = connection.execute(select(tables.keys).where(tables.keys.c.sha256 == digest)).mappings().first()
        key = None
        if found is not None and found["revoked_at"] is None:
            key = Key(found["id"], found["name"], found["scope"], found["expires_at"], found["account"])
        with self._lock:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[digest] = (self._clock(), key)
        return key if _in_time(key) else None

    def forget(self) -> None:
        """Look everything up again."""
        with self._lock:
            self._known.clear()


def _none(name: str) -> EndpointError:
    return EndpointError(f"there is no key {name!r}; `tunewright keys list` shows them")


def _alive(one: dict[str, Any]) -> bool:
    return one["revoked_at"] is None and (one["expires_at"] is None or one["expires_at"] > now())


def _in_time(key: Key | None) -> bool:
    return key is not None and (key.expires_at is None or key.expires_at > now())
