"""Requests and tokens by key, day and model: counted in memory, written to the database every second.

A server that is killed loses the last second's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql, sqlite

from tunewright.server import tables
from tunewright.server.store import Store

Line = tuple[str, str, str]
"""Key, day (UTC, 2026-11-25) and model."""


class Usage:
    """What was used and is not written yet. Counting is for the server's own thread."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._counted: dict[Line, list[int]] = {}
        self._today = (-1, "")

    def add(self, key_id: str, model: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Count one request."""
        counts = self._counted.setdefault((key_id, self._day(), model), [0, 0, 0])
        counts[0] += 1
        counts[1] += prompt_tokens
        counts[2] += completion_tokens

    def taken(self) -> dict[Line, list[int]]:
        """What was counted; from here on it is counted anew."""
        counted, self._counted = self._counted, {}
        return counted

    def give_back(self, counted: dict[Line, list[int]]) -> None:
        """Count again what could not be written."""
        for line, counts in counted.items():
            held = self._counted.setdefault(line, [0, 0, 0])
            for place, count in enumerate(counts):
                held[place] += count

    def write(self, counted: dict[Line, list[int]]) -> None:
        """Add it to the database; for another thread."""
        if not counted:
            return
        with self._store.begin() as connection:
            for (key_id, day, model), counts in sorted(counted.items()):  # one order, so that servers do not cross
                _add(connection, key_id, day, model, counts)

    def _day(self) -> str:
        number = int(self._clock() // 86400)
        if number != self._today[0]:
            self._today = (number, time.strftime("%Y-%m-%d", time.gmtime(number * 86400)))
        return self._today[1]


def _add(connection: Connection, key_id: str, day: str, model: str, counts: list[int]) -> None:
    table = tables.usage
    values: dict[str, Any] = {"key_id": key_id, "day": day, "model": model[:256]}
    values |= dict(zip(("requests", "prompt_tokens", "completion_tokens"), counts, strict=True))
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    wanted = dialect.insert(table).values(**values)
    added = {name: table.c[name] + wanted.excluded[name] for name in ("requests", "prompt_tokens", "completion_tokens")}
    connection.execute(wanted.on_conflict_do_update(index_elements=["key_id", "day", "model"], set_=added))
