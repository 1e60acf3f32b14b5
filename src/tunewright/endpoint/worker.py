"""One thread for the model, so that one request is computed at a time and the event loop stays free."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Worker:
    """Runs iterators in its thread, one after the other, in the order in which they came."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")

    async def run(self, make: Callable[[], Iterator[T]]) -> AsyncGenerator[T]:
        """The items of `make()`, made in the thread.

        Closing this iterator stops the work at its next item, or takes it out of the queue. What the work raises is
        raised here.
        """
        loop = asyncio.get_running_loop()
        items: asyncio.Queue[tuple[T] | None] = asyncio.Queue()
        left = threading.Event()

        def work() -> None:
            try:
                for item in make():
                    if left.is_set():
                        return
                    loop.call_soon_threadsafe(items.put_nowait, (item,))
            finally:
                if not left.is_set():
                    loop.call_soon_threadsafe(items.put_nowait, None)

        future = self._pool.submit(work)
        try:
            while (item := await items.get()) is not None:
                yield item[0]
            await asyncio.wrap_future(future)
        finally:
            left.set()
            future.cancel()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
