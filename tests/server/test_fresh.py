"""Answers that are looked up at most once a second."""

from __future__ import annotations

import asyncio

import pytest

from tunewright.server.fresh import FRESH_S, Fresh


class Source:
    """Counts how often it is asked; fails while `broken`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.asked = 0
        self.broken = False
        self.gate: asyncio.Event | None = None

    def clock(self) -> float:
        return self.now

    async def look(self) -> int:
        self.asked += 1
        found = self.asked
        if self.gate is not None:
            await self.gate.wait()
        if self.broken:
            raise LookupError("nothing there")
        return found


def test_requests_at_once_wait_for_one_look_and_later_ones_for_none() -> None:
    async def run() -> None:
        source = Source()
        fresh: Fresh[int] = Fresh(source.clock)
        assert await asyncio.gather(*(fresh.get("a", source.look) for _ in range(50))) == [1] * 50
        source.now += FRESH_S / 2
        assert await fresh.get("a", source.look) == 1
        assert await fresh.get("b", source.look) == 2
        source.now += FRESH_S
        assert await fresh.get("a", source.look) == 3

    asyncio.run(run())


def test_what_was_not_there_is_looked_up_again() -> None:
    async def run() -> None:
        source = Source()
        fresh: Fresh[int] = Fresh(source.clock)
        source.broken = True
        with pytest.raises(LookupError):
            await fresh.get("a", source.look)
        source.broken = False
        assert await fresh.get("a", source.look) == 2

    asyncio.run(run())


def test_what_is_being_looked_up_while_all_is_forgotten_is_not_remembered() -> None:
    async def run() -> None:
        source = Source()
        source.gate = asyncio.Event()
        fresh: Fresh[int] = Fresh(source.clock)
        old = asyncio.create_task(fresh.get("a", source.look))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        fresh.forget()
        source.gate.set()
        assert await fresh.get("a", source.look) == 2
        assert await old == 1
        assert fresh.known("a") == 2

    asyncio.run(run())


def test_a_caller_that_leaves_does_not_take_the_answer_from_the_others() -> None:
    async def run() -> None:
        source = Source()
        source.gate = asyncio.Event()
        fresh: Fresh[int] = Fresh(source.clock)
        leaves = asyncio.create_task(fresh.get("a", source.look))
        stays = asyncio.create_task(fresh.get("a", source.look))
        await asyncio.sleep(0)
        leaves.cancel()
        source.gate.set()
        assert await stays == 1
        assert source.asked == 1

    asyncio.run(run())
