"""The rows that matter: for each error the training rows that it probably comes from, and rows whose label looks wrong.

evaluate/nearest.jsonl and evaluate/suspects.jsonl hold them all; both can be given to `data.without`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tunewright.chat import Example, Message
from tunewright.evaluate import influence, suspects
from tunewright.evaluate.baselines import words
from tunewright.recipe import Recipe
from tunewright.run import Run, write_json_lines

MOST_ROWS = 50_000
"""Training rows that are looked at; of more, so many drawn at random."""
MOST_ERRORS = 200
"""Errors that are traced, the gravest first."""
NEAREST = 5
"""Training rows named for an error."""
SHOWN_ERRORS, SHOWN_NEAREST, SHOWN_SUSPECTS = 5, 3, 20
"""Of each, how many the report has."""
EXCERPT = 400

Sketch = Callable[[Sequence[Example]], Any]
"""Examples -> the gradient of each, in short (`influence.sketches`)."""
Array = np.ndarray[Any, Any]


def trace_errors(
    run: Run,
    recipe: Recipe,
    train: Sequence[Example],
    test: Sequence[Example],
    tuned: dict[str, Any],
    labels: Sequence[str] | None,
    sketch: Sketch | None,
) -> dict[str, Any] | None:
    """Look for the training rows that speak most for what was said instead of the right answer, write them down, and
    give what the report says of them; None where no answer is right or wrong, or nobody asks."""
    wrong = _gravest(test, tuned, labels)
    if wrong is None or not recipe.evaluate.traced_rows:
        return None
    rows = wrong[:MOST_ERRORS]
    asked = [_saying(test[row], tuned["prediction"][row]) for row in rows]
    among = _candidates(train, asked, recipe.evaluate.traced_rows)
    near: list[list[tuple[int, float]]] = []
    if rows and sketch is not None:
        made = sketch([*asked, *(train[row] for row in among)])
        near = influence.nearest(made[: len(rows)], made[len(rows) :], NEAREST)
    elif rows:
        near = _by_words(asked, [train[row] for row in among])
    found: list[dict[str, Any]] = []
    for row, nearest in zip(rows, near, strict=True):
        shown: dict[str, Any] = {"source": test[row].source, "text": _text(test[row]), "label": _right(test[row])}
        shown |= {"tuned": tuned["prediction"][row], "confidence": _confidence(tuned, row)}
        found.append(shown | {"nearest": [_named(train[among[place]], near) for place, near in nearest]})
    lines = [
        {"error": {key: one[key] for key in ("source", "label", "tuned")}} | nearest
        for one in found
        for nearest in one["nearest"]
    ]
    write_json_lines(run.nearest_file, lines)
    return {
        "wrong": len(wrong),
        "traced": len(rows),
        "by": "gradients" if sketch is not None else "words",
        "among": len(among),
        "of": _used(run),
        "rows": [one | {"nearest": one["nearest"][:SHOWN_NEAREST]} for one in found[:SHOWN_ERRORS]],
    }


def find_suspects(
    run: Run, recipe: Recipe, train: Sequence[Example], labels: Sequence[str] | None
) -> dict[str, Any] | None:
    """Look for training rows whose label looks wrong, write them down, and give what the report says of them; None
    where there are no classes, or too few rows of them."""
    if labels is None:
        return None
    found = suspects.suspects(train, labels, seed=recipe.evaluate.seed)
    if found is None:
        return None
    lines = [_named(train[one.row], one.score) | {"instead": one.instead} for one in found.rows]
    write_json_lines(run.suspects_file, lines)
    return {
        "found": len(lines),
        "looked_at": found.looked_at,
        "of": _used(run),
        "accuracy": found.accuracy,
        "rows": lines[:SHOWN_SUSPECTS],
    }


def _used(run: Run) -> int:
    used: int = run.manifest("prepare")["splits"]["train"]["used"]
    return used


def _gravest(test: Sequence[Example], tuned: dict[str, Any], labels: Sequence[str] | None) -> list[int] | None:
    """Rows that are answered wrongly: the surest first, or the answers that are farthest from what was expected."""
    if labels is not None:
        wrong = [row for row, example in enumerate(test) if tuned["prediction"][row] != example.label]
        return sorted(wrong, key=lambda row: -(_confidence(tuned, row) or 0.0))
    if "rouge_l" in tuned:
        wrong = [row for row, match in enumerate(tuned["exact_match"]) if not match]
        return sorted(wrong, key=lambda row: tuned["rouge_l"][row])
    return None


def _saying(example: Example, said: str) -> Example:
    """A test row as if what the model said of it were right."""
    return replace(example, messages=(*example.messages[:-1], Message("assistant", said or " ")), label=said)


def _candidates(train: Sequence[Example], asked: Sequence[Example], most: int) -> list[int]:
    """The training rows that errors are traced to: all, or those that are nearest to any error in their words."""
    if len(train) <= most or not asked:
        return list(range(min(len(train), most)))
    ours, theirs = _vectors(asked, train)
    closest = np.zeros(len(train), dtype=np.float32)
    for start in range(0, len(asked), 32):
        products = ours[start : start + 32] @ theirs.T
        closest = np.maximum(closest, products.max(axis=0).toarray().ravel())
    return sorted(np.argsort(-closest, kind="stable")[:most].tolist())


def _by_words(asked: Sequence[Example], among: Sequence[Example]) -> list[list[tuple[int, float]]]:
    """As `influence.nearest`, by the words of the prompts: where nobody has the weights."""
    ours, theirs = _vectors(asked, among)
    return influence.nearest(ours.toarray(), theirs, NEAREST)


def _vectors(asked: Sequence[Example], among: Sequence[Example]) -> tuple[Any, Any]:
    """Words of the prompts, rare ones weighing more, each text of length one."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b|[^\w\s]")
    theirs = vectorizer.fit_transform([words(one) for one in among])
    return vectorizer.transform([words(one) for one in asked]), theirs


def _named(example: Example, score: float) -> dict[str, Any]:
    return {
        "source": example.source,
        "sha256": example.sha256(),
        "score": round(score, 4),
        "text": _text(example),
        "label": _right(example),
    }


def _right(example: Example) -> str:
    return str(example.label) if example.label is not None else example.answer[:EXCERPT]


def _text(example: Example) -> str:
    text = "\n\n".join(message.content for message in example.prompt)
    return text[:EXCERPT] + ("..." if len(text) > EXCERPT else "")


def _confidence(tuned: dict[str, Any], row: int) -> float | None:
    probabilities = tuned.get("probabilities")
    return None if probabilities is None else float(np.max(probabilities[row]))
