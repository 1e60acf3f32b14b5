"""Training rows whose label is probably wrong.

Each row is judged by a classifier that has not seen it: five times, a fifth of the rows is put aside, TF-IDF and a
linear classifier learn from the rest, and say how probable the given label of each row put aside is ("self-confidence":
Northcutt, Jiang and Chuang, Confident Learning, 2021, arXiv:1911.00068). It knows words alone. Where words do not tell
the labels apart, neither can it, and `accuracy` says how well they do.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunewright.chat import Example
from tunewright.evaluate.baselines import words

FOLDS = 5
MOST_WORK = 1_000_000
"""Rows times labels that are judged (three quarters of it took 6 s); of more rows so many are drawn at random."""
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Suspect:
    """A row whose label others would not have given it."""

    row: int
    """Its number among the training rows."""
    score: float
    """One less the probability of its own label."""
    instead: str
    """The label that the judge would have given."""


@dataclass(frozen=True)
class Suspects:
    """The rows that are judged to have another label, the likeliest first."""

    rows: list[Suspect]
    looked_at: int
    accuracy: float
    """The share of the rows that the judge gave their own label."""


def suspects(train: Sequence[Example], labels: Sequence[str], *, seed: int) -> Suspects | None:
    """Judge every row; None where there are too few of each label to put some aside."""
    most = MOST_WORK // max(1, len(labels))
    drawn = np.sort(np.random.default_rng(seed).permutation(len(train))[:most])
    counts = Counter(str(train[row].label) for row in drawn)
    order = np.array([row for row in drawn if counts[str(train[row].label)] >= FOLDS], dtype=int)
    if len({str(train[row].label) for row in order}) < 2:
        return None
    given = np.array([list(labels).index(str(train[row].label)) for row in order])
    known, probabilities = self_confidence([words(train[row]) for row in order], given, seed=seed)
    own = probabilities[np.arange(len(order)), np.searchsorted(known, given)]
    best = known[probabilities.argmax(axis=1)]
    found = [
        Suspect(int(order[place]), float(1 - own[place]), labels[best[place]])
        for place in np.argsort(own, kind="stable")
        if best[place] != given[place]
    ]
    return Suspects(found, len(order), float((best == given).mean()))


def self_confidence(texts: Sequence[str], given: Array, *, seed: int) -> tuple[Array, Array]:
    """The labels that occur (sorted), and each text's probability of each, judged by what was learnt from others."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import SGDClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    judge = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b|[^\w\s]"),
        SGDClassifier(loss="log_loss", alpha=1e-4, average=True, random_state=seed),
    )
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        probabilities = cross_val_predict(judge, list(texts), given, cv=folds, method="predict_proba")
    return np.unique(given), probabilities
