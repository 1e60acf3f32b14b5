"""The verdict says 'better' where it is better, and rarely where nothing changed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, kstest

from tunewright.evaluate import compare
from tunewright.evaluate.compare import PERMUTATIONS


def mean_of(values: Any) -> compare.Statistic:
    array = np.asarray(values, dtype=float)
    return lambda chosen: float(array[chosen].mean())


def judged(metric: str, tuned: Any, other: Any, p_value: float, *, resamples: int = 400) -> dict[str, Any]:
    return compare.compare(
        metric=metric,
        baseline="base",
        tuned=mean_of(tuned),
        other=mean_of(other),
        rows=len(tuned),
        p_value=p_value,
        test="t",
        resamples=resamples,
        seed=1,
    )


# --- intervals ---


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    inside = 0
    for number in range(200):
        sample = generator.random(120) < 0.7
        low, high = compare.interval(mean_of(sample), 120, resamples=300, seed=number)
        inside += low <= 0.7 <= high
    assert 0.90 <= inside / 200 <= 0.99


def test_the_interval_is_that_of_the_normal_law_where_it_should_be() -> None:
    sample = np.random.default_rng(1).normal(5, 2, 2000)
    low, high = compare.interval(mean_of(sample), 2000, resamples=2000, seed=0)
    half = 1.96 * sample.std() / math.sqrt(2000)
    assert [low, high] == pytest.approx([sample.mean() - half, sample.mean() + half], abs=0.01)


def test_the_same_seed_gives_the_same_interval_and_another_one_does_not() -> None:
    sample = np.random.default_rng(1).random(50)
    first = compare.interval(mean_of(sample), 50, resamples=200, seed=3)
    assert first == compare.interval(mean_of(sample), 50, resamples=200, seed=3)
    assert first != compare.interval(mean_of(sample), 50, resamples=200, seed=4)


def test_the_interval_of_a_difference_is_paired() -> None:
    """Hard rows are hard for both, so the difference varies less than either."""
    generator = np.random.default_rng(2)
    hard = generator.normal(0, 10, 300)
    found = judged("rouge_l", hard + 1 + generator.normal(0, 0.1, 300), hard, 0.001)
    low, high = found["interval"]
    assert 0.9 < low < 1 < high < 1.1
    assert found["smallest_detectable"] == pytest.approx(2.8 / 1.96 * (high - low) / 2)


# --- tests ---


@given(only_tuned=st.integers(0, 30), only_other=st.integers(0, 30), both=st.integers(0, 5), neither=st.integers(0, 5))
def test_mcnemar_is_the_binomial_law_on_discordant_rows(
    only_tuned: int, only_other: int, both: int, neither: int
) -> None:
    tuned = [True] * only_tuned + [False] * only_other + [True] * both + [False] * neither
    other = [False] * only_tuned + [True] * only_other + [True] * both + [False] * neither
    count = only_tuned + only_other
    expected = min(1.0, 2 * binom.cdf(min(only_tuned, only_other), count, 0.5)) if count else 1.0
    assert compare.mcnemar(tuned, other) == pytest.approx(expected)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=9))
def test_few_rows_are_flipped_in_every_way(differences: list[float]) -> None:
    flips = np.array(np.meshgrid(*[[1, -1]] * len(differences))).reshape(len(differences), -1).T
    sums = np.abs((flips * np.asarray(differences)).sum(axis=1))
    expected = float((sums >= abs(sum(differences)) * (1 - 1e-9)).mean())
    assert compare.permutation(differences, seed=0) == pytest.approx(expected)


def test_the_largest_of_all_flips_counts_whatever_the_rounding() -> None:
    """Summed in another order, the observed flip itself may come out a little smaller."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        differences = generator.uniform(100, 10_000, 14)
        assert compare.permutation(differences, seed=0) == 2 / 2**14


def test_many_rows_give_the_same_as_all_flips_would() -> None:
    generator = np.random.default_rng(3)
    differences = generator.normal(0.5, 1, 14)
    exact = compare.permutation(differences, seed=0)
    tiny = np.full(20, 1e-12)  # more rows than are flipped in every way, that change nothing
    assert compare.permutation([*differences, *tiny], seed=0) == pytest.approx(exact, abs=0.015)


def test_p_is_never_zero_and_rows_that_agree_say_nothing() -> None:
    assert compare.permutation([1.0] * 100, seed=0) == pytest.approx(1 / (PERMUTATIONS + 1))
    assert compare.permutation([0.0] * 100, seed=0) == 1.0
    assert compare.permutation([], seed=0) == 1.0
    assert compare.permutation([1.0] * 5 + [0.0] * 500, seed=0) == 2 / 2**5


def test_a_loss_that_is_no_number_proves_nothing() -> None:
    assert compare.permutation([math.nan, *[1.0] * 40], seed=0) == 1.0
    assert judged("loss", [math.nan] * 40, [1.0] * 40, 0.001)["verdict"] == "no evidence"


def test_many_rows_fit_into_memory() -> None:
    """25,000 rows times 10,000 flips would be 2 GB at once."""
    import tracemalloc

    differences = np.random.default_rng(0).normal(0, 1, 5_000)
    tracemalloc.start()
    compare.permutation(differences, seed=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60e6


def exchanged(tuned: Any, other: Any, *, seed: int = 0) -> float:
    one, two = np.asarray(tuned, float), np.asarray(other, float)

    def difference(places: Any) -> float:
        return float(np.where(places, two, one).mean() - np.where(places, one, two).mean())

    return compare.exchange(difference, len(one), seed=seed)


def test_exchanging_answers_is_flipping_signs_where_the_metric_is_a_mean() -> None:
    generator = np.random.default_rng(4)
    one, two = generator.normal(0.15, 1, 60), generator.normal(0, 1, 60)
    assert exchanged(one, two) == pytest.approx(compare.permutation(one - two, seed=1), abs=0.02)
    assert exchanged(one, one) == 1.0


def test_p_values_are_spread_evenly_where_nothing_differs() -> None:
    generator = np.random.default_rng(5)
    values = [compare.permutation(generator.normal(0, 1, 40), seed=number) for number in range(200)]
    assert kstest(values, "uniform").pvalue > 0.01


# --- the verdict ---


def test_nothing_changed_is_rarely_called_a_change() -> None:
    """Two models of the same skill, 200 times: accuracy by McNemar, text by permutation."""
    generator = np.random.default_rng(6)
    wrong = 0
    for number in range(100):
        skill = generator.random(120)
        tuned, other = generator.random(120) < skill, generator.random(120) < skill
        wrong += judged("accuracy", tuned, other, compare.mcnemar(tuned, other))["verdict"] != "no evidence"
        one, two = generator.normal(skill, 0.2), generator.normal(skill, 0.2)
        p_value = compare.permutation(one - two, seed=number)
        wrong += judged("rouge_l", one, two, p_value)["verdict"] != "no evidence"
    assert wrong <= 14


@pytest.mark.parametrize(("gain", "verdict"), [(0.25, "better"), (-0.25, "not better"), (0.0, "no evidence")])
def test_a_planted_gain_is_found(gain: float, verdict: str) -> None:
    generator = np.random.default_rng(7)
    draw = generator.random(400)
    base, tuned = draw < 0.6, (draw < 0.6 + gain) ^ (generator.random(400) < 0.02)
    found = judged("accuracy", tuned, base, compare.mcnemar(tuned, base))
    assert found["verdict"] == verdict
    assert found["difference"] == pytest.approx(found["tuned"] - found["baseline_value"])
    if gain:
        assert found["interval"][0] < found["difference"] < found["interval"][1]


def test_a_lower_loss_is_better() -> None:
    generator = np.random.default_rng(8)
    base = generator.normal(3, 1, 200)
    tuned = base - 0.5 + generator.normal(0, 0.1, 200)
    p_value = compare.permutation(tuned - base, seed=0)
    down, up = judged("loss", tuned, base, p_value), judged("loss", base, tuned, p_value)
    assert (down["verdict"], up["verdict"]) == ("better", "not better")
    assert down["difference"] == pytest.approx(0.5, abs=0.05)
    assert up["difference"] == pytest.approx(-down["difference"])
    assert 0 < down["interval"][0] < down["difference"] < down["interval"][1]
    assert down["tuned"] < down["baseline_value"]


@pytest.mark.parametrize(
    ("interval", "p_value", "verdict"),
    [
        ((0.01, 0.2), 0.04, "better"),
        ((-0.2, -0.01), 0.04, "not better"),
        ((0.01, 0.2), 0.06, "no evidence"),
        ((-0.01, 0.2), 0.04, "no evidence"),
        ((0.0, 0.0), 1.0, "no evidence"),
        ((math.nan, math.nan), 0.01, "no evidence"),
    ],
)
def test_both_interval_and_test_must_agree(interval: tuple[float, float], p_value: float, verdict: str) -> None:
    assert compare.verdict(interval, p_value) == verdict
