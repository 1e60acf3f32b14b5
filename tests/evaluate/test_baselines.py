"""Baselines learn from the training rows alone, and say what they are said to say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tunewright import chat, models
from tunewright.chat import Example, Message
from tunewright.evaluate import baselines
from tunewright.testing import WORDS, tiny_model


def example(number: int, text: str, label: str | None, *, system: str | None = None) -> Example:
    before = (Message("system", system),) if system else ()
    messages = (*before, Message("user", text), Message("assistant", label or f"answer {number}"))
    return Example(f"r{number}", f"r{number}", messages, label)


def rows(labels: list[str], *, start: int = 0) -> list[Example]:
    generator = np.random.default_rng(start)
    return [
        example(start + number, " ".join(generator.choice(WORDS[label], 3)), label)
        for number, label in enumerate(labels)
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found = models.load_tokenizer(models.find(str(tiny_model(tmp_path_factory.mktemp("baselines") / "tiny"))))
    chat.equip(found)
    return found


def test_majority_says_the_training_rows_most_frequent_class() -> None:
    train = rows(["good", "bad", "bad"])
    assert baselines.majority(train, rows(["good", "good"], start=9)) == ["bad", "bad"]


def test_tfidf_learns_and_repeats_itself() -> None:
    train, test = rows(["good", "bad"] * 30), rows(["good", "bad"] * 10, start=100)
    predicted, probabilities = baselines.tfidf(train, test, ["bad", "good"], 0)
    assert predicted == [one.label for one in test]
    assert probabilities.sum(axis=1) == pytest.approx(np.ones(20))
    assert [["bad", "good"][place] for place in probabilities.argmax(axis=1)] == predicted
    again, _ = baselines.tfidf(train, test, ["bad", "good"], 0)
    assert again == predicted


def test_tfidf_keeps_the_order_of_the_labels_also_of_those_it_never_saw() -> None:
    train, test = rows(["good", "bad"] * 10), rows(["good"], start=100)
    predicted, probabilities = baselines.tfidf(train, test, ["ugly", "good", "bad"], 0)
    assert predicted == ["good"]
    assert probabilities[0, 0] == 0.0
    assert probabilities[0].argmax() == 1


def test_tfidf_reads_every_script_and_marks_of_punctuation() -> None:
    train = [example(n, text, label) for n, (text, label) in enumerate([("!!", "good"), ("??", "bad")] * 4)]
    assert baselines.tfidf(train, [example(9, "!", "good")], ["good", "bad"], 0)[0] == ["good"]


def test_the_test_rows_labels_are_not_looked_at() -> None:
    train, test = rows(["good", "bad"] * 20), rows(["good", "bad"] * 5, start=50)
    lying = [Example(one.id, one.source, (*one.prompt, Message("assistant", "bad")), "bad") for one in test]
    assert baselines.tfidf(train, test, ["good", "bad"], 0)[0] == baselines.tfidf(train, lying, ["good", "bad"], 0)[0]
    assert baselines.majority(train, test) == baselines.majority(train, lying)


def shots_of(train: list[Example], count: int, tokenizer: Any, *, seed: int = 0, room: int = 10_000) -> Any:
    return baselines.few_shot(train, count, seed, tokenizer=tokenizer, room=room)


def test_shots_show_the_classes_in_turn(tokenizer: Any) -> None:
    shots = shots_of(rows(["good", "bad"] * 20), 4, tokenizer)
    answers = [shot[-1].content for shot in shots]
    assert sorted(answers[:2]) == sorted(answers[2:]) == ["bad", "good"]
    assert [[message.role for message in shot] for shot in shots] == [["user", "assistant"]] * 4
    assert len({shot[0].content for shot in shots}) == 4


def test_as_many_shots_as_there_is_room_for(tokenizer: Any) -> None:
    train = rows(["good", "bad"] * 20)
    everything = shots_of(train, 4, tokenizer)
    size = len(chat.render_prompt(tokenizer, [*everything[0], *everything[1], Message("user", "")]))
    assert shots_of(train, 4, tokenizer, room=size) == everything[:2]
    assert shots_of(train, 4, tokenizer, room=3) == []


def test_a_few_training_rows_are_all_the_shots_there_are(tokenizer: Any) -> None:
    train = [example(number, f"question {number}", None, system="Be brief.") for number in range(3)]
    shots = shots_of(train, 8, tokenizer)
    assert sorted(shot[0].content for shot in shots) == [f"question {number}" for number in range(3)]
    assert {message.role for shot in shots for message in shot} == {"user", "assistant"}


def test_another_seed_shows_other_shots(tokenizer: Any) -> None:
    train = rows(["good", "bad"] * 200)
    one, same, other = (shots_of(train, 4, tokenizer, seed=seed) for seed in (0, 0, 1))
    assert one == same != other
