"""Interleaved repeats of rivals, so that a busy moment of the machine hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

REPEATS = 5


def race(rivals: dict[str, Callable[[], object]], *, repeats: int = REPEATS) -> dict[str, list[float]]:
    """Seconds of each repeat of each rival, after one warm-up of each."""
    for run in rivals.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(repeats):
        for name, run in rivals.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def table(title: str, seconds: dict[str, list[float]], *, unit: str, count: int, peer: str) -> None:
    """Print a Markdown table: rate (median, lowest and highest) and the median of the repeats' ratios to the peer."""
    print(f"### {title}\n\n| | {unit}/s (min to max) | times {peer} (min to max) |\n| --- | ---: | ---: |")
    for name, times in seconds.items():
        rates = [count / one for one in times]
        ratios = [theirs / ours for ours, theirs in zip(times, seconds[peer], strict=True)]
        print(f"| {name} | {_spread(rates)} | {_spread(ratios)} |")
    print()


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
