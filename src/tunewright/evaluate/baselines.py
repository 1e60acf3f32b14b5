"""What the tuned model has to beat, besides its own base."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from tunewright import chat
from tunewright.chat import Example, Message


def majority(train: Sequence[Example], test: Sequence[Example]) -> list[str]:
    """The most frequent class of the training rows, for every test row."""
    (label, _), *_ = Counter(str(example.label) for example in train).most_common(1)
    return [label] * len(test)


def tfidf(train: Sequence[Example], test: Sequence[Example], labels: Sequence[str], seed: int) -> tuple[list[str], Any]:
    """TF-IDF over words and word pairs into logistic regression: predictions, and probabilities (rows x labels)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b|[^\w\s]"),
        LogisticRegression(C=10.0, max_iter=1000, random_state=seed),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit([words(example) for example in train], [example.label for example in train])
    texts = [words(example) for example in test]
    places = [list(labels).index(label) for label in model.classes_]
    probabilities = np.zeros((len(test), len(labels)))
    probabilities[:, places] = model.predict_proba(texts)
    return [labels[place] for place in probabilities.argmax(axis=1)], probabilities


def few_shot(
    train: Sequence[Example], count: int, seed: int, *, tokenizer: Any, room: int
) -> list[tuple[Message, ...]]:
    """Training conversations to show the base before each question, as many of `count` as fit into `room` tokens.

    One of each class in turn where there are classes; short ones first, so that more fit.
    """
    generator = np.random.default_rng(seed)
    order = [train[row] for row in generator.permutation(len(train))]
    queues: dict[str, list[Example]] = {}
    for example in order:
        queues.setdefault(str(example.label), []).append(example)
    for queue in queues.values():
        queue[:50] = sorted(queue[:50], key=lambda example: sum(len(one.content) for one in example.messages))
    shots: list[tuple[Message, ...]] = []
    while len(shots) < count and any(queues.values()):
        for queue in queues.values():
            if not queue or len(shots) == count:
                continue
            turns = tuple(message for message in queue.pop(0).messages if message.role != "system")
            shown = [message for shot in (*shots, turns) for message in shot]
            if len(chat.render_prompt(tokenizer, [*shown, Message("user", "")])) > room:
                return shots
            shots.append(turns)
    return shots


def words(example: Example) -> str:
    return "\n".join(message.content for message in example.prompt)
