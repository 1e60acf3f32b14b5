"""Each number is that of scikit-learn, of the rouge_score library, or of a pocket calculator."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sklearn import metrics as theirs

from tunewright.evaluate import metrics

LABELS = ["joy", "anger", "fear", "calm"]

rows = st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1, max_size=40)


@given(rows=rows)
@settings(max_examples=30)
def test_classification_equals_scikit_learn(rows: list[tuple[str, str]]) -> None:
    truth, predicted = [one for one, _ in rows], [other for _, other in rows]
    found = metrics.classification(truth, predicted, LABELS)
    assert found["accuracy"] == pytest.approx(theirs.accuracy_score(truth, predicted))
    for average in ("macro", "weighted"):
        for name, function in (
            ("precision", theirs.precision_score),
            ("recall", theirs.recall_score),
            ("f1", theirs.f1_score),
        ):
            expected = function(truth, predicted, average=average, zero_division=0)
            assert found[f"{name}_{average}"] == pytest.approx(expected)
    assert found["confusion"] == theirs.confusion_matrix(truth, predicted, labels=LABELS).tolist()
    assert sum(one["support"] for one in found["per_class"].values()) == len(rows)
    assert list(found["per_class"]) == LABELS


def test_classification_by_hand() -> None:
    truth = ["joy", "joy", "joy", "anger"]
    predicted = ["joy", "joy", "anger", "anger"]
    found = metrics.classification(truth, predicted, LABELS)
    assert found["accuracy"] == 0.75
    assert found["per_class"]["joy"] == {"precision": 1.0, "recall": pytest.approx(2 / 3), "f1": 0.8, "support": 3}
    assert found["per_class"]["anger"] == {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "support": 1}
    assert found["per_class"]["fear"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert found["f1_macro"] == pytest.approx((0.8 + 2 / 3) / 2), "over the classes that occur"
    assert found["f1_weighted"] == pytest.approx((3 * 0.8 + 2 / 3) / 4)
    assert found["confusion"][0] == [2, 1, 0, 0]
    assert "loss" not in found


@given(st.lists(st.lists(st.floats(-300, 0), min_size=3, max_size=3), min_size=1, max_size=8))
def test_probabilities_are_a_distribution_in_the_order_of_the_scores(scores: list[list[float]]) -> None:
    found = metrics.probabilities(scores)
    assert found.sum(axis=1) == pytest.approx(np.ones(len(scores)))
    assert (found >= 0).all()
    for given_row, row in zip(scores, found, strict=True):
        assert row == pytest.approx(np.exp(given_row) / np.exp(given_row).sum())
        assert np.argmax(given_row) == row.argmax() or math.isclose(row.max(), row[np.argmax(given_row)])


def drawn(confidence: Any, right: Any) -> tuple[list[str], list[str], Any]:
    """Rows of two classes with a given confidence, right where `right` says so."""
    truth = ["joy" if one else "anger" for one in right]
    return truth, ["joy"] * len(truth), np.stack([confidence, 1 - confidence], axis=1)


def test_who_is_right_as_often_as_sure_has_no_calibration_error() -> None:
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.5, 1.0, 20_000)
    truth, predicted, distribution = drawn(confidence, generator.random(20_000) < confidence)
    found = metrics.calibration(truth, predicted, ["joy", "anger"], distribution)
    assert found["ece"] < 0.02
    assert sum(one["count"] for one in found["calibration"]) == 20_000
    assert all(one["low"] < one["confidence"] <= one["high"] for one in found["calibration"])


def test_who_is_always_sure_and_half_the_time_right_has_an_error_of_a_half() -> None:
    truth, predicted, distribution = drawn(np.ones(10), np.arange(10) % 2 == 0)
    found = metrics.calibration(truth, predicted, ["joy", "anger"], distribution)
    assert found["ece"] == pytest.approx(0.5)
    (only,) = found["calibration"]
    assert only == {"low": 0.9, "high": 1.0, "count": 10, "confidence": 1.0, "accuracy": 0.5}


def test_loss_is_the_mean_of_the_true_class_and_is_never_infinite() -> None:
    truth = ["joy", "anger"]
    found = metrics.classification(truth, ["joy", "joy"], ["joy", "anger"], [[0.8, 0.2], [1.0, 0.0]])
    assert found["loss"] == pytest.approx(-(math.log(0.8) + math.log(1e-12)) / 2)
    sure = metrics.classification(truth, truth, ["joy", "anger"], [[0.8, 0.2], [0.4, 0.6]])
    assert sure["loss"] == pytest.approx(theirs.log_loss([0, 1], [[0.8, 0.2], [0.4, 0.6]]))


def test_exact_match_forgives_white_space_at_the_ends_alone() -> None:
    assert metrics.exact_match([" yes\n", "Yes", "y es", ""], ["yes", "yes", "yes", ""]) == [1.0, 0.0, 0.0, 1.0]


words = st.lists(st.sampled_from(["the", "cat", "sat", "On", "mat.", "2nd", "it's", "a_b", "-"]), max_size=8)


@given(answer=words, truth=words)
def test_rouge_l_equals_the_library_on_plain_english(answer: list[str], truth: list[str]) -> None:
    said, wanted = " ".join(answer), " ".join(truth)
    (found,) = metrics.rouge_l([said], [wanted])
    assert found == pytest.approx(RougeScorer(["rougeL"]).score(wanted, said)["rougeL"].fmeasure)


def test_rouge_l_by_hand() -> None:
    # LCS "police the gunman": precision 3/4, recall 3/4
    assert metrics.rouge_l(["police kill the gunman"], ["police killed the gunman"]) == [pytest.approx(0.75)]
    assert metrics.rouge_l(["", "a", "."], ["a", "", "a"]) == [0.0, 0.0, 0.0]


def test_probabilities_of_very_unlikely_labels_are_numbers() -> None:
    assert metrics.probabilities([[-5000.0, -5000.0], [-9000.0, 0.0]]).tolist() == [[0.5, 0.5], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("Пицца очень вкусная", "пицца вкусная", 0.8),
        ("我喜欢猫", "我喜欢狗", 0.75),
        ("café crème", "café noir", 0.5),
        ("こんにちは", "こんばんは", 0.6),
        ("한국어 좋아요", "한국어 싫어요", 0.5),
    ],
)
def test_rouge_l_reads_every_script(answer: str, truth: str, score: float) -> None:
    """The library's own words are of a-z and 0-9: all of these would score 0."""
    assert metrics.rouge_l([answer], [truth]) == [pytest.approx(score)]
    assert metrics.rouge_l([answer], [answer]) == [1.0]


def test_text_counts_every_token_the_same() -> None:
    found = metrics.text([(2.0, 1), (4.0, 3)], num_bytes=8)
    assert found == {
        "loss": 1.5,
        "perplexity": pytest.approx(math.exp(1.5)),
        "tokens": 4,
        "bits_per_byte": pytest.approx(6 / math.log(2) / 8),
    }
    assert metrics.text([(1e6, 1)])["perplexity"] == pytest.approx(math.exp(700))
