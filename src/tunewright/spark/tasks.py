"""What a task says: its value, or an error for a person, which is a value too, since Spark would hide its words in a
traceback of its own. What is no error for a person still fails the job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tunewright.errors import TunewrightError, from_name


def guarded(work: Callable[[], Any]) -> Iterator[tuple[str, Any]]:
    """In a task: what it says of its work."""
    try:
        yield "done", work()
    except TunewrightError as error:
        yield "failed", (type(error).__name__, str(error))


def values(found: Iterable[tuple[str, Any]]) -> Iterator[Any]:
    """In the driver: the values, in the order of the tasks.

    Raises:
        TunewrightError: the first error among them, in its own words.
    """
    for what, value in found:
        if what == "failed":
            raise from_name(*value)
        yield value
