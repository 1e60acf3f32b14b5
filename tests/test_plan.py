"""A plan counts what will be computed."""

from __future__ import annotations

from typing import Any

import pytest

from tunewright import recipe as recipes
from tunewright.backends.local import LocalBackend
from tunewright.plan import estimate


def planned(task: str, facts: dict[str, Any], **evaluate: Any) -> dict[str, Any]:
    """The plan of a run with 100 training rows of 40 tokens and 10 test rows of 50, 4 of them the answer."""
    given = {"name": "one", "model": "m", "task": task, "data": {"train": "a.jsonl"}, "evaluate": evaluate}
    if task == "reward":
        given["grader"] = {"type": "string_check", "input": "a", "reference": "a", "operation": "eq"}
    recipe = recipes.Recipe.model_validate(given)
    train = {"used": 100, "sequences": 100, "tokens": {"sum": 4000, "total": {"mean": 40.0, "max": 60}}}
    test = {"used": 10, "sequences": 10, "tokens": {"sum": 500, "answer": {"mean": 4.0}}, **facts}
    model = {"parameters": 1000, "vocab_size": 100, "context": 1024}
    settled = {"method": "lora", "method_why": "", "bf16_why": "", "memory_bytes": 1}
    resolved = {
        "model": model,
        "max_length": 64,
        "data": {"train": train, "test": test},
        "warnings": [],
        "train": settled,
    }
    return estimate(recipe, resolved | {"tracking": {"uri": ""}}, LocalBackend({}))


@pytest.mark.parametrize(("baselines", "models"), [(["zero-shot"], 2), (["zero-shot", "few-shot"], 3)])
def test_every_model_computes_each_prompt_and_the_labels_behind_it(baselines: list[str], models: int) -> None:
    plan = planned("classification", {"label_nodes": 7}, baselines=baselines)
    assert plan["tokens"]["evaluate"] == models * (10 * 46 + 10 * 7)
    assert plan["tokens"]["test"] == 500


def test_a_conversation_is_read_for_its_loss_and_again_for_its_answer() -> None:
    once = 500 + 460 + 10 * 32
    assert planned("chat", {}, baselines=[], max_new_tokens=32)["tokens"]["evaluate"] == 2 * once
    shown = 2 * 10 * 3 * 40
    told = planned("chat", {}, baselines=["few-shot"], few_shot=3, max_new_tokens=32)
    assert told["tokens"]["evaluate"] == 3 * once + shown


def test_a_text_is_read_once_by_each_model() -> None:
    assert planned("pretraining", {}, baselines=[])["tokens"]["evaluate"] == 2 * 500


def test_pairs_are_read_once_and_prompts_are_answered_by_each_model() -> None:
    assert planned("preference", {}, baselines=[])["tokens"]["evaluate"] == 2 * 500
    graded = planned("reward", {}, baselines=[])
    assert graded["tokens"]["evaluate"] == 2 * (500 + 10 * 128)


def test_more_evaluation_takes_longer() -> None:
    short, long = (planned("classification", {"label_nodes": nodes}) for nodes in (1, 10**9))
    assert long["seconds"][0] > short["seconds"][1]
    assert long["train_seconds"][1] < long["seconds"][0]
