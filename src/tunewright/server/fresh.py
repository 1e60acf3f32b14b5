"""Answers that are looked up at most once a second, however many requests want them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")

FRESH_S = 1.0
"""How long an answer is taken as it was: so long a change made by another server may go unnoticed."""
REMEMBERED = 10_000


class Fresh(Generic[T]):
    """Answers by what was asked. Requests that ask the same while it is looked up wait for one look-up.

    A look-up that raises is remembered by nobody: what was not there a moment ago may be there now.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[Hashable, tuple[float, T]] = {}
        self._asked: dict[Hashable, asyncio.Task[T]] = {}
        self._age = 0

    def known(self, key: Hashable) -> T | None:
        """The answer, if it was looked up within the last second."""
        found = self._known.get(key)
        return found[1] if found is not None and self._clock() - found[0] < FRESH_S else None

    async def get(self, key: Hashable, look: Callable[[], Awaitable[T]]) -> T:
        """The answer, looked up where it is not known."""
        if (known := self.known(key)) is not None:
            return known
        asked = self._asked.get(key)
        if asked is None:
            asked = self._asked[key] = asyncio.ensure_future(self._look(key, look))
        return await asyncio.shield(asked)  # one caller that leaves does not take the answer from the others

    def forget(self) -> None:
        """Look everything up again; also what is being looked up at this moment. Any thread may call it."""
        self._age += 1
        self._known = {}
        self._asked = {}

    async def _look(self, key: Hashable, look: Callable[[], Awaitable[T]]) -> T:
        age, began = self._age, self._clock()
        task = asyncio.current_task()
        try:
            found = await look()
        finally:
            if self._asked.get(key) is task:
                del self._asked[key]
        if age == self._age:
            if len(self._known) >= REMEMBERED:
                self._known = {}
            self._known[key] = (began, found)
        return found
