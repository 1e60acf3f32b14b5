"""The verdict for parts of the test rows: by class, by length, by a column of the user's.

Among many slices some look better or worse by chance alone, so their p-values are corrected together (Holm, A simple
sequentially rejective multiple test procedure, 1979): the chance that even one slice without a difference is called
better or worse stays below 5%.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from tunewright.chat import Example
from tunewright.evaluate import compare

FEWEST_ROWS = 10
"""A smaller slice says nothing; its rows are counted under `REST`."""
MOST_VALUES = 40
"""Slices of one kind, those with most rows; the rows of the others are counted under `REST`."""
REST = "(others)"
LENGTH = "prompt tokens"
LENGTHS = 4
"""Parts of as many rows each that the lengths are cut into."""


def slices(test: Sequence[Example], lengths: Sequence[int]) -> list[tuple[str, str, Any]]:
    """What the rows are sliced by, a value of it, and the numbers of its rows.

    Args:
        lengths: of each row's prompt, in tokens.
    """
    kinds: dict[str, list[str]] = {}
    if all(example.label is not None for example in test):
        kinds["label"] = [str(example.label) for example in test]
    if (by_length := _quarters(lengths)) is not None:
        kinds[LENGTH] = by_length
    for column in test[0].slices or ():
        kinds[column] = [(example.slices or {}).get(column, "") for example in test]
    found = []
    for kind, values in kinds.items():
        counts = Counter(values)
        kept = [value for value, rows in counts.most_common(MOST_VALUES) if rows >= FEWEST_ROWS]
        order = sorted(kept, key=_beginning) if kind == LENGTH else kept
        places: dict[str, list[int]] = {value: [] for value in kept}
        rest: list[int] = []
        for row, value in enumerate(values):
            places.get(value, rest).append(row)
        found += [(kind, value, np.array(places[value])) for value in order]
        if rest and kept:
            found.append((kind, REST, np.array(rest)))
    return found


def judge(
    parts: Sequence[tuple[str, str, Any]],
    tuned: Any,
    other: Any,
    *,
    binary: bool,
    resamples: int,
    seed: int,
    sign: int = 1,
) -> list[dict[str, Any]]:
    """Tuned against another on each slice.

    Args:
        tuned: each row's score, the higher the better.
        other: the same of the model that it is compared with.
        binary: each score is right (1) or wrong (0).
        sign: -1 where the scores are a metric turned round (a loss): both models' means are given as the metric is.
    """
    found: list[dict[str, Any]] = []
    for kind, value, rows in parts:
        one, two = np.asarray(tuned, float)[rows], np.asarray(other, float)[rows]
        p_value = compare.mcnemar(one == 1, two == 1) if binary else compare.permutation(one - two, seed=seed)
        between = compare.interval(_mean(one - two), len(rows), resamples=resamples, seed=seed)
        found.append(
            {
                "by": kind,
                "value": value,
                "rows": len(rows),
                "tuned": sign * float(one.mean()),
                "baseline_value": sign * float(two.mean()),
                "difference": float((one - two).mean()),
                "interval": between,
                "p_value": p_value,
            }
        )
    for one, corrected in zip(found, holm([one["p_value"] for one in found]), strict=True):
        one["p_corrected"] = corrected
        one["verdict"] = _verdict(one["difference"], corrected)
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for how many they are: each times the number of those not smaller, never falling."""
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected


def _beginning(part: str) -> int:
    return int(part.split()[0].replace(",", ""))


def _mean(differences: Any) -> compare.Statistic:
    return lambda chosen: float(differences[chosen].mean())


def _verdict(difference: float, p_value: float) -> str:
    if p_value >= 1 - compare.LEVEL:
        return "no evidence"
    return "better" if difference > 0 else "not better"


def _quarters(lengths: Sequence[int]) -> list[str] | None:
    """For each row, which of the parts by length it is in; None where all are about as long."""
    edges = sorted(set(np.quantile(lengths, np.linspace(0, 1, LENGTHS + 1)[1:-1], method="lower").astype(int).tolist()))
    bounds = [min(lengths), *(edge + 1 for edge in edges if edge < max(lengths)), max(lengths) + 1]
    if len(bounds) < 3:
        return None
    places = np.searchsorted(bounds, lengths, side="right") - 1
    return [f"{bounds[place]:,} to {bounds[place + 1] - 1:,}" for place in places]
