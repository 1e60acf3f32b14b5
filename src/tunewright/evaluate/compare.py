"""Intervals, the paired test and the verdict.

All on the same rows: each resample draws rows, and takes both models' results for them, so what is hard for both
cancels out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

LEVEL = 0.95
LARGER_IS_BETTER = {
    "accuracy": True,
    "f1_macro": True,
    "exact_match": True,
    "rouge_l": True,
    "loss": False,
    "reward_margin": True,
    "preference_accuracy": True,
    "reward": True,
}
PER_HALF_WIDTH = 2.8 / 1.96
"""A true difference of 2.8 standard errors is found four times in five (power 80%, level 5%: Cohen, 1988);
the half-width of the interval is 1.96 of them."""
PERMUTATIONS = 10_000
AT_ONCE = 200
"""Permutations held in memory together."""
EXACT_LIMIT = 14
"""Up to this many differing rows the permutation test goes through all sign flips."""
ROUNDING = 1e-9
"""Two sums whose ratio differs from 1 by less than this are equal but for rounding."""

Statistic = Callable[[Any], float]
"""Row numbers (with repeats) -> the metric on them."""


def interval(statistic: Statistic, rows: int, *, resamples: int, seed: int) -> list[float]:
    """95% percentile bootstrap interval over rows (Efron and Tibshirani, 1993, chapter 13)."""
    generator = np.random.default_rng(seed)
    values = [statistic(generator.integers(0, rows, rows)) for _ in range(resamples)]
    tail = (1 - LEVEL) / 2
    return [float(np.quantile(values, tail)), float(np.quantile(values, 1 - tail))]


def mcnemar(tuned_right: Sequence[bool], baseline_right: Sequence[bool]) -> float:
    """Two-sided exact McNemar test: could the rows on which just one of the two is right fall like this by chance?

    Source: McNemar, 1947; the exact form is a binomial test on the discordant pairs.
    """
    from scipy.stats import binomtest

    one, other = np.asarray(tuned_right, bool), np.asarray(baseline_right, bool)
    only_tuned, only_baseline = int((one & ~other).sum()), int((~one & other).sum())
    if only_tuned + only_baseline == 0:
        return 1.0
    return float(binomtest(only_tuned, only_tuned + only_baseline, 0.5).pvalue)


def permutation(differences: Sequence[float], *, seed: int) -> float:
    """Two-sided paired permutation test: signs of the rows' differences are flipped at random.

    Source: Fisher, 1935; Noreen, 1989. All 2^n flips where few rows differ, else 10,000 random ones.
    """
    array = np.asarray([difference for difference in differences if difference != 0], dtype=float)
    if array.size == 0 or not np.isfinite(array).all():
        return 1.0
    seen = abs(array.sum()) * (1 - ROUNDING)
    if array.size <= EXACT_LIMIT:
        signs = 1 - 2 * ((np.arange(2**array.size)[:, None] >> np.arange(array.size)) & 1)
        return float((np.abs(signs @ array) >= seen).mean())
    generator = np.random.default_rng(seed)
    extreme = 0
    for _ in range(PERMUTATIONS // AT_ONCE):
        signs = 1 - 2 * generator.integers(0, 2, size=(AT_ONCE, array.size), dtype=np.int8)
        extreme += int((np.abs(signs @ array) >= seen).sum())
    return (extreme + 1) / (PERMUTATIONS + 1)


def exchange(difference: Statistic, rows: int, *, seed: int) -> float:
    """As `permutation`, for a metric that is no mean over rows: at random rows the two models' answers change places.

    Args:
        difference: which rows change places (a truth value for each) -> the difference of the metric then.

    Source: Noreen, 1989; Yeh, More accurate tests for the statistical significance of result differences, 2000.
    """
    seen = abs(difference(np.zeros(rows, dtype=bool))) * (1 - ROUNDING)
    if not seen > 0:
        return 1.0
    generator = np.random.default_rng(seed)
    extreme = sum(abs(difference(generator.random(rows) < 0.5)) >= seen for _ in range(PERMUTATIONS))
    return (extreme + 1) / (PERMUTATIONS + 1)


def verdict(difference_interval: Sequence[float], p_value: float) -> str:
    """better or not better where the interval leaves out zero and the test agrees; else no evidence."""
    low, high = difference_interval
    if p_value < 1 - LEVEL and low > 0:
        return "better"
    if p_value < 1 - LEVEL and high < 0:
        return "not better"
    return "no evidence"


def compare(
    *,
    metric: str,
    baseline: str,
    tuned: Statistic,
    other: Statistic,
    rows: int,
    p_value: float,
    test: str,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Tuned against one baseline on the same rows; a positive difference means that tuned is better.

    `smallest_detectable` is the true difference that so many rows like these would show four times in five.
    """
    sign = 1 if LARGER_IS_BETTER[metric] else -1
    everything = np.arange(rows)
    tuned_value, other_value = tuned(everything), other(everything)
    between = interval(lambda chosen: sign * (tuned(chosen) - other(chosen)), rows, resamples=resamples, seed=seed)
    return {
        "baseline": baseline,
        "metric": metric,
        "tuned": tuned_value,
        "baseline_value": other_value,
        "difference": sign * (tuned_value - other_value),
        "interval": between,
        "p_value": p_value,
        "test": test,
        "verdict": verdict(between, p_value),
        "smallest_detectable": PER_HALF_WIDTH * (between[1] - between[0]) / 2,
    }
