"""Curves for a terminal: a training loss as text, with or without colour.

It draws and returns a string; printing it is the caller's business. The page for people is `report.py`.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence


def plot_loss(
    points: Sequence[tuple[float, float]],
    width: int = 72,
    height: int = 16,
    title: str = "training loss",
    *,
    colour: bool | None = None,
) -> str:
    """Draw `(step, loss)` points, `width` columns by `height` rows; with fewer than two points, say so in a line.

    Points that are not numbers are left out of the line, and a last line names their steps: a loss of NaN is news.
    Colour is used where standard output is a terminal and NO_COLOR is unset or empty; `colour` decides otherwise.
    """
    drawn = [(step, loss) for step, loss in points if math.isfinite(step) and math.isfinite(loss)]
    if len(drawn) >= 2:
        text = _draw(points, width, height, title, _wants_colour() if colour is None else colour)
    elif drawn:
        text = f"{title}: {drawn[0][1]:.4g} at step {drawn[0][0]:g} (one point; a curve needs two)"
    else:
        text = f"{title}: no points yet"
    lost = [step for step, loss in points if not (math.isfinite(step) and math.isfinite(loss))]
    return f"{text}\n{_name_lost(lost)}" if lost else text


def _wants_colour() -> bool:
    return not os.environ.get("NO_COLOR") and sys.stdout.isatty()


def _draw(points: Sequence[tuple[float, float]], width: int, height: int, title: str, colour: bool) -> str:
    import plotext

    steps: list[float] = []
    losses: list[float] = []
    breaks: list[int] = []  # where the line starts again, after points that are not numbers
    for before, (step, loss) in zip([(0.0, 0.0), *points], points, strict=False):
        if math.isfinite(step) and math.isfinite(loss):
            if not math.isfinite(before[1]):
                breaks.append(len(steps))
            steps.append(step)
            losses.append(loss)
    figure = plotext.figure  # plotext has one figure for the whole process: leave it as clean as it was found
    plotext.terminal.limit(False, False)
    try:
        figure.clear()
        figure.plot_size(width, height)
        figure.theme("colorless")  # the terminal's own colours, dark or light, for all but the line
        figure.title(title)
        figure.label("step", "x")
        line = figure.signal(steps, losses, marker=plotext.marker("braille", "cyan")).lines()
        for index in breaks:
            line.line(index, False)
        figure.draw(line)
        # Two labels that fall on one row overwrite each other, so a small plot has few.
        for axis, values, count, least in (("x", steps, width // 14, 1.0), ("y", losses, (height - 4) // 3, 0.0)):
            ticks = _ticks(min(values), max(values), max(1, count), least)
            figure.ruler(axis).ticks(ticks, [f"{tick:g}" for tick in ticks])
        text = figure.build().string(colorless=not colour)
    finally:
        figure.clear()
        plotext.terminal.limit()
    return "\n".join(line.rstrip() for line in text.rstrip("\n").split("\n"))


def _ticks(low: float, high: float, count: int, least: float) -> list[float]:
    """Round values between low and high, about `count` of them and `least` or more apart."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = max(least, next(power * nice for nice in (1, 2, 5, 10) if power * nice >= rough * 0.7))
    return [round(index * step, 12) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _name_lost(steps: list[float]) -> str:
    named = ", ".join(f"{step:g}" for step in steps[:5]) + (", ..." if len(steps) > 5 else "")
    return f"not a number at {len(steps)} {'point' if len(steps) == 1 else 'points'}: step {named}"
