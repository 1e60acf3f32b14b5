"""Numbers for one model from its answers. Nothing here knows where the answers came from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tunewright import graders

MEANS = ("exact_match", "rouge_l", "reward_margin", "preference_accuracy", "reward_accuracy", "reward")
"""Metrics that are means over the rows."""
OTHER = "(none of the classes)"
"""The class of an answer that names none: where a model writes what it likes, and is not held to the labels."""
BINS = 10
"""Equal-width bins of confidence for calibration."""


def classification(
    truth: Sequence[str],
    predicted: Sequence[str],
    labels: Sequence[str],
    probabilities: Any | None = None,
) -> dict[str, Any]:
    """Accuracy; macro and weighted precision, recall and F1; per class; confusion; calibration.

    Args:
        truth: the class of each row.
        predicted: the model's class for each row.
        labels: all classes, in the order of the confusion matrix. Macro means are over the classes that occur in
            `truth` or `predicted`, as scikit-learn has it.
        probabilities: rows x labels; where given, adds `loss` (mean negative log-likelihood of the true class among
            the classes, in nats), `ece` and `calibration`.
    """
    from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

    present = sorted(set(truth) | set(predicted), key=list(labels).index)
    result: dict[str, Any] = {"accuracy": float(accuracy_score(truth, predicted))}
    for average in ("macro", "weighted"):
        precision, recall, f1, _ = precision_recall_fscore_support(
            truth, predicted, labels=present, average=average, zero_division=0
        )
        result |= {f"precision_{average}": precision, f"recall_{average}": recall, f"f1_{average}": f1}
    each = precision_recall_fscore_support(truth, predicted, labels=list(labels), average=None, zero_division=0)
    result["per_class"] = {
        label: {"precision": precision, "recall": recall, "f1": f1, "support": int(support)}
        for label, precision, recall, f1, support in zip(labels, *each, strict=True)
    }
    result["confusion"] = confusion_matrix(truth, predicted, labels=list(labels)).tolist()
    if probabilities is not None:
        result |= calibration(truth, predicted, labels, np.asarray(probabilities))
    return result


def calibration(
    truth: Sequence[str], predicted: Sequence[str], labels: Sequence[str], probabilities: Any
) -> dict[str, Any]:
    """Does "90% sure" mean right nine times in ten? Expected calibration error over equal-width bins.

    Source: Guo et al., On Calibration of Modern Neural Networks, 2017, equation 3.
    """
    confidence = probabilities.max(axis=1)
    right = np.array([one == other for one, other in zip(truth, predicted, strict=True)], dtype=float)
    index = {label: place for place, label in enumerate(labels)}
    of_truth = probabilities[np.arange(len(truth)), [index[label] for label in truth]]
    bins = []
    ece = 0.0
    for number in range(BINS):
        low, high = number / BINS, (number + 1) / BINS
        inside = (confidence > low) & (confidence <= high)
        if not inside.any():
            continue
        mean_confidence, accuracy = float(confidence[inside].mean()), float(right[inside].mean())
        ece += float(inside.mean()) * abs(mean_confidence - accuracy)
        bins.append(
            {"low": low, "high": high, "count": int(inside.sum()), "confidence": mean_confidence, "accuracy": accuracy}
        )
    return {"loss": float(-np.log(np.clip(of_truth, 1e-12, 1)).mean()), "ece": ece, "calibration": bins}


def probabilities(scores: Any) -> Any:
    """Log-probabilities of labels (rows x labels) as a distribution over the labels."""
    array = np.asarray(scores, dtype=float)
    shifted = np.exp(array - array.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def exact_match(answers: Sequence[str], truths: Sequence[str]) -> list[float]:
    """1 where the answer is the truth, white space at the ends aside."""
    return [float(answer.strip() == truth.strip()) for answer, truth in zip(answers, truths, strict=True)]


def rouge_l(answers: Sequence[str], truths: Sequence[str]) -> list[float]:
    """F-measure of the longest common subsequence of words, per row (Lin, 2004; the rouge_score library)."""
    return [graders.rouge(answer, truth, "rougeL") for answer, truth in zip(answers, truths, strict=True)]


def margins(tuned: Sequence[tuple[float, float]], base: Sequence[tuple[float, float]], beta: float) -> list[float]:
    """For each pair, by how much the implicit reward of the better answer is above that of the worse one.

    An answer's implicit reward is beta times its log-probability under the model less that under the base (Rafailov et
    al., 2023, equation 5, less a part that is the same for all answers to a prompt), so the base's own margins are 0.

    Args:
        tuned: log-probabilities (nats) of the better and of the worse answer, summed over their tokens.
        base: as `tuned`, under the base.
    """
    return [
        beta * ((chosen - base_chosen) - (rejected - base_rejected))
        for (chosen, rejected), (base_chosen, base_rejected) in zip(tuned, base, strict=True)
    ]


def prefers(pairs: Sequence[tuple[float, float]]) -> list[float]:
    """1 for each pair whose better answer is the more probable one, 0.5 for a tie, else 0."""
    return [0.5 * (1.0 + np.sign(chosen - rejected)) for chosen, rejected in pairs]


def text(losses: Sequence[tuple[float, int]], num_bytes: int | None = None) -> dict[str, Any]:
    """Mean loss per token (nats) and perplexity; bits per byte where the text's size in bytes is given.

    Args:
        losses: for each row, its summed negative log-likelihood and its number of tokens.
    """
    total = sum(loss for loss, _ in losses)
    tokens = sum(count for _, count in losses)
    mean = total / tokens
    result: dict[str, Any] = {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "tokens": tokens}
    if num_bytes:
        result["bits_per_byte"] = total / math.log(2) / num_bytes
    return result
