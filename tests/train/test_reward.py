"""Reward training raises its own reward, on our ids, repeats itself exactly, and goes on exactly when it was ended."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from training import Spawn, end, fit, result, seen_step, stop_at, torn

from tunewright import chat, life, models, work
from tunewright import recipe as recipes
from tunewright.chat import Message
from tunewright.data import prepare as preparing
from tunewright.errors import GraderError, RecipeError
from tunewright.evaluate import measure
from tunewright.models import ModelRef
from tunewright.run import Run, read_json
from tunewright.tracking import Tracker
from tunewright.train import reward

LORA = {
    "method": "lora",
    "learning_rate": 5e-3,
    "batch_size": 8,
    "epochs": 3,
    "save_steps": 4,
    "logging_steps": 3,
    "grpo": {"num_generations": 4, "max_completion_length": 6},
}
FULL = {
    "method": "full",
    "learning_rate": 5e-3,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "epochs": 2,
    "save_steps": 3,
    "logging_steps": 2,
    "grpo": {"num_generations": 4, "max_completion_length": 6, "beta": 0.02, "num_iterations": 2},
}
"""With a reference, and checkpoints amid the steps on the same answers."""
METHODS = pytest.mark.parametrize("train", [LORA, FULL], ids=["lora", "full"])
HAS = {"type": "string_check", "reference": "{{ item.want }}", "operation": "like"}
Begin = Callable[..., Run]


def prompts(count: int, *, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"say {number}", "want": "e"} for number in range(start, start + count)]


@pytest.fixture
def begin(base: Path, tmp_path: Path) -> Begin:
    """A fresh run of prompts up to `prepare`."""

    def start(*, rows: list[dict[str, Any]] | None = None, **sections: Any) -> Run:
        for name, held in (("train", rows or prompts(11)), ("test", prompts(8, start=100))):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
        data = {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl")}
        sections["data"] = data | sections.get("data", {})
        given = {"name": "t", "model": str(base), "task": "reward", "grader": HAS, "tracking": {"enabled": False}}
        run = life.start(recipes.loads(yaml.safe_dump(given | sections)), tmp_path / "runs", resume=False)
        life.advance(run, until="plan")
        work.prepare(run)
        return run

    return start


def test_it_raises_its_own_reward_on_held_out_prompts(begin: Begin) -> None:
    train = {"method": "full", "learning_rate": 1e-2, "batch_size": 16, "epochs": 3, "save_strategy": "no"}
    train["grpo"] = {"num_generations": 8, "max_completion_length": 6}
    run = begin(rows=prompts(24), train=train, evaluate={"bootstrap": 200})
    manifest = fit(run)
    measure.evaluate(run, Tracker(run))
    rewards = [entry["reward"] for entry in run.metrics() if "reward" in entry]
    assert sum(rewards[-8:]) / 8 > sum(rewards[:8]) / 8 + 0.3
    report = run.manifest("evaluate")
    assert report["models"]["tuned"]["reward"] > report["models"]["base"]["reward"] + 0.5
    assert report["comparison"]["verdict"] == "better"
    assert report["training"]["curve_of"] == "reward"
    assert manifest["algorithm"] == "GRPO"
    assert manifest["repeats_exactly"] == "yes"
    assert manifest["steps"] == read_json(run.path / "plan.json")["steps"] == 36
    assert manifest["tokens"] > 36 * 16


def test_the_grader_gets_the_row_and_the_text_that_an_endpoint_would_say(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[int], int, dict[str, Any]]] = []

    class Watched(reward.RewardTrainer):
        def _generate(self, given: list[list[int]]) -> Any:
            answered = super()._generate(given)
            seen.extend((prompt, 0, {"ids": ids}) for prompt, ids in zip(answered[0], answered[1], strict=True))
            return answered

        def grader(self, completion_ids: Any, row: Any, **rest: Any) -> list[float]:
            scores = super().grader(completion_ids, row, **rest)
            for place, (number, score) in enumerate(zip(row, scores, strict=True)):
                prompt, _, known = seen[place - len(row)]
                seen[place - len(row)] = (prompt, number, known | {"score": score})
            return scores

    monkeypatch.setattr(reward, "RewardTrainer", Watched)
    rows = [{"prompt": [{"role": "user", "content": f"say {n}"}], "want": "es"[n % 2]} for n in range(4)]
    run = begin(rows=rows, train=LORA | {"max_steps": 2}, data={"system": "Be kind."})
    fit(run)
    tokenizer = models.load_tokenizer(ModelRef.from_dict(run.resolved()["model"]))
    equipment = chat.equip(tokenizer)
    assert len(seen) == 16
    for prompt, number, known in seen:
        asked = (Message("system", "Be kind."), Message("user", f"say {number}"))
        assert prompt == chat.render_prompt(tokenizer, asked)
        ids = known["ids"]
        assert not set(ids[:-1]) & set(equipment.stop_ids), "an answer ends with its end of turn"
        text = tokenizer.decode([one for one in ids if one not in equipment.stop_ids])
        assert known["score"] == float("es"[number % 2] in text)


def test_a_failing_grader_stops_training_with_the_row(begin: Begin) -> None:
    source = "def grade(sample, item):\n    return 1 / (item['number'] - 3)\n"
    rows = [{"prompt": f"say {n}", "number": n} for n in range(6)]
    run = begin(rows=rows, train=LORA, grader={"type": "python", "source": source})
    with pytest.raises(GraderError, match=r"train\.jsonl:4: the python grader raised ZeroDivisionError.*line 2"):
        fit(run)
    assert not run.manifest_file("train").exists()


def test_the_parts_of_a_formula_are_in_the_log(begin: Begin) -> None:
    short = {"type": "python", "source": "def grade(sample, item):\n    return len(sample['output_text']) < 4\n"}
    grader = {"type": "multi", "graders": {"has": HAS, "short": short}, "calculate_output": "0.8 * has + 0.2 * short"}
    run = begin(train=LORA | {"max_steps": 2, "logging_steps": 1}, grader=grader)
    assert fit(run)["repeats_exactly"] == "as far as the python grader answers the same each time"
    for entry in run.metrics()[:2]:
        parts = entry["rewards/has"], entry["rewards/short"]
        assert entry["reward"] == pytest.approx(0.8 * parts[0] + 0.2 * parts[1], abs=1e-6)


# --- exactness ---


@METHODS
def test_the_same_recipe_and_seed_give_the_same_weights(begin: Begin, train: dict[str, Any]) -> None:
    one, other = begin(train=train), begin(train=train)
    fit(one)
    torch.rand(7)
    fit(other)
    assert result(one) == result(other)


@METHODS
def test_a_run_killed_at_any_moment_ends_as_an_unbroken_one(begin: Begin, spawn: Spawn, train: dict[str, Any]) -> None:
    whole, broken = begin(train=train), begin(train=train)
    fit(whole)
    begun = time.monotonic()
    moment = random.SystemRandom().uniform(0, 1.5)

    def now(run: Run) -> bool:
        return seen_step(run, 6) and time.monotonic() - begun > moment

    for when in (torn, now):
        if not broken.manifest_file("train").exists():
            assert end(broken, spawn, signal.SIGKILL, when) in (-signal.SIGKILL, 0)
    if not broken.manifest_file("train").exists():
        fit(broken)
    assert result(broken) == result(whole)


def test_a_stop_at_any_step_goes_on_exactly(begin: Begin) -> None:
    whole, broken = begin(train=FULL), begin(train=FULL)
    fit(whole)
    steps = whole.manifest("train")["steps"]
    for at in (1, 4, 7, 12, 19):  # amid and between the steps on the same answers, amid epochs and at an end
        with pytest.raises(InterruptedError, match=f"stopped at step {at} of {steps}"):
            stop_at(broken, at)
    assert fit(broken)["resumed_from"] == "checkpoint-19"
    assert result(broken) == result(whole)


# --- the order of the rows ---


@pytest.mark.parametrize("rows", [1, 2, 5, 12])
def test_every_row_is_seen_in_every_epoch_in_whole_groups(rows: int) -> None:
    groups = reward.Groups(rows, group=3, together=2, repeats=2, seed=7)
    orders = []
    for epoch in range(3):
        groups.set_epoch(epoch)
        order = list(groups)
        assert len(order) == len(groups)
        assert set(order) == set(range(rows))
        assert max(Counter(order).values()) <= 2 * min(Counter(order).values())
        for start in range(0, len(order), 12):
            step = order[start : start + 12]
            assert step[:6] == step[6:], "asked for twice"
            assert step[:3] == [step[0]] * 3
            assert step[3:6] == [step[3]] * 3
        orders.append(order)
    assert rows < 5 or orders[0] != orders[1]
    groups.set_epoch(1)
    assert list(groups) == orders[1]


def test_without_a_seed_the_rows_keep_their_order() -> None:
    assert list(reward.Groups(3, group=1, together=2, repeats=1, seed=None)) == [0, 1, 2, 0]


# --- what is left, what is refused ---


def test_the_trained_model_is_saved_with_its_own_settings(begin: Begin, base: Path) -> None:
    run = begin(train=FULL | {"max_steps": 2, "save_steps": 1})
    fit(run)
    assert not list((run.path / "train").rglob("README.md"))
    for folder in (run.trained("full"), run.checkpoints / "checkpoint-2"):
        ours, theirs = read_json(folder / "config.json"), read_json(base / "config.json")
        assert {key: ours.get(key) for key in theirs} == theirs


def test_an_adapter_has_no_twin_where_there_is_a_reference(begin: Begin) -> None:
    run = begin(train=LORA | {"max_steps": 1, "grpo": LORA["grpo"] | {"beta": 0.1}})  # type: ignore[operator]
    fit(run)
    assert sorted(path.name for path in run.trained("lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_long_prompt_leaves_room_for_its_answer_and_is_named(begin: Begin) -> None:
    rows = [*prompts(4), {"prompt": "say " + "very " * 80 + "much", "want": "e"}]
    run = begin(rows=rows, train=LORA | {"max_length": 40})
    (finding,) = run.manifest("prepare")["findings"]
    assert (finding["code"], finding["where"].rpartition(":")[2]) == ("over_length", "5")
    tokenizer = models.load_tokenizer(ModelRef.from_dict(run.resolved()["model"]))
    chat.equip(tokenizer)
    lengths = [len(chat.render_prompt(tokenizer, one.prompt)) for one in preparing.examples(run, "train")]
    assert max(lengths) <= 40 - 6
    assert preparing.examples(run, "train")[-1].item == rows[-1], "the grader sees the row as it was"


def test_an_answer_that_leaves_no_room_for_a_prompt_is_refused(begin: Begin) -> None:
    with pytest.raises(RecipeError, match=r"max_completion_length is 36 of the 40 tokens.*fewer than 8"):
        begin(train=LORA | {"max_length": 40, "grpo": {"num_generations": 4, "max_completion_length": 36}})


@pytest.mark.slow
def test_the_starter_learns_to_say_what_is_rewarded(tmp_path: Path) -> None:
    """Messages to a shop; an answer is worth 1 where it says sorry."""
    given = {
        "name": "sorry",
        "model": "starter",
        "task": "reward",
        "tracking": {"enabled": False},
        "data": {
            "train": "starter:train.jsonl",
            "test": "starter:test.jsonl",
            "prompt": "text",
            "limit": {"train": 160, "test": 100},
        },
        "grader": {"type": "string_check", "reference": "sorry", "operation": "like"},
        "train": {
            "method": "full",
            "epochs": 1,
            "learning_rate": 5e-5,
            "batch_size": 32,
            "save_strategy": "no",
            "grpo": {"num_generations": 8, "max_completion_length": 24},
        },
    }
    run = life.start(recipes.loads(yaml.safe_dump(given)), tmp_path / "runs")
    life.advance(run, until="check")
    work.prepare(run)
    fit(run)
    measure.evaluate(run, Tracker(run))
    assert run.manifest("evaluate")["comparison"]["verdict"] == "better"
