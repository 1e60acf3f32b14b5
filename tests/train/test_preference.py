"""Preference training learns from pairs, in our ids, repeats itself exactly, and goes on exactly when it was ended."""

from __future__ import annotations

import json
import math
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from training import Spawn, end, fit, result, seen_step, stop_at, torn

from tunewright import chat, life, models, work
from tunewright import recipe as recipes
from tunewright.chat import Example, Message
from tunewright.data import prepare as preparing
from tunewright.errors import DataError, RecipeError
from tunewright.evaluate import measure
from tunewright.generate import LocalCompleter
from tunewright.models import ModelRef
from tunewright.run import Run, read_json
from tunewright.testing import tiny_model
from tunewright.tracking import Tracker
from tunewright.train import preference

LORA = {"method": "lora", "learning_rate": 5e-3, "batch_size": 4, "epochs": 3, "save_steps": 4, "logging_steps": 3}
"""Checkpoints amid epochs and amid what a log line averages."""
FULL = {
    "method": "full",
    "learning_rate": 2e-3,
    "batch_size": 3,
    "gradient_accumulation_steps": 2,
    "epochs": 3,
    "save_steps": 5,
    "logging_steps": 2,
    "eval_strategy": "epoch",
}
METHODS = pytest.mark.parametrize("train", [LORA, FULL], ids=["lora", "full"])
Begin = Callable[..., Run]


def pairs(count: int, *, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": f"say {number}" + " please" * (number % 3), "chosen": "lovely great", "rejected": "awful poor"}
        for number in range(start, start + count)
    ]


@pytest.fixture
def begin(base: Path, tmp_path: Path) -> Begin:
    """A fresh run of pairs up to `prepare`."""

    def start(*, rows: list[dict[str, Any]] | None = None, model: Path = base, **sections: Any) -> Run:
        for name, held in (("train", rows or pairs(24)), ("test", pairs(6, start=100))):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
        data = {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl")}
        if "eval_strategy" in sections.get("train", {}):
            data["validation"] = data["test"]
        sections["data"] = data | sections.get("data", {})
        given = {"name": "t", "model": str(model), "task": "preference", "tracking": {"enabled": False}}
        run = life.start(recipes.loads(yaml.safe_dump(given | sections)), tmp_path / "runs", resume=False)
        life.advance(run, until="check")
        work.prepare(run)
        return run

    return start


def tools(run: Run) -> tuple[ModelRef, Any, chat.Equipment]:
    ref = ModelRef.from_dict(run.resolved()["model"])
    tokenizer = models.load_tokenizer(ref)
    return ref, tokenizer, chat.equip(tokenizer)


@METHODS
def test_it_raises_the_reward_margin_on_held_out_pairs(begin: Begin, train: dict[str, Any]) -> None:
    run = begin(train=train, evaluate={"bootstrap": 200})
    manifest = fit(run)
    measure.evaluate(run, Tracker(run))
    report = run.manifest("evaluate")
    assert report["models"]["tuned"]["reward_margin"] > 0.05
    assert report["models"]["tuned"]["reward_accuracy"] == 1.0
    assert report["comparison"]["verdict"] == "better"
    assert manifest["algorithm"] == "DPO"
    assert manifest["beta"] == 0.1
    assert manifest["examples"] == 24


def test_training_and_evaluation_mean_the_same_margin(begin: Begin) -> None:
    """TRL's margin on the validation rows after the last step is evaluation's on the same rows."""
    run = begin(train=FULL | {"gradient_accumulation_steps": 1}, evaluate={"bootstrap": 200})
    fit(run)
    measure.evaluate(run, Tracker(run))
    last = [entry for entry in run.metrics() if "eval_loss" in entry][-1]
    tuned = run.manifest("evaluate")["models"]["tuned"]
    assert last["eval_rewards/margins"] == pytest.approx(tuned["reward_margin"], abs=1e-4)
    assert last["eval_rewards/accuracies"] == tuned["reward_accuracy"]


@METHODS
@pytest.mark.parametrize("bf16", [False, True])
def test_the_first_loss_is_that_of_a_model_that_is_still_the_base(
    begin: Begin, train: dict[str, Any], bf16: bool
) -> None:
    """In bfloat16 too, where rows in another batch are rounded otherwise: but not as float32 differs from it."""
    run = begin(train=train | {"max_steps": 1, "logging_steps": 1, "bf16": bf16})
    fit(run)
    first = run.metrics()[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3 if bf16 else 1e-5)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=2e-3 if bf16 else 1e-4)


def test_what_trl_is_given_are_the_ids_of_our_rendering(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    class Watched(preference.PreferenceTrainer):
        def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *rest: Any) -> Any:
            seen.append({key: value.clone() for key, value in inputs.items()})
            return super()._compute_loss(model, inputs, *rest)

    monkeypatch.setattr(preference, "PreferenceTrainer", Watched)
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hm"}]
    rows: list[dict[str, Any]] = [
        {"prompt": [*talk, {"role": "user", "content": f"say {number}"}], "chosen": "great", "rejected": "so poor"}
        for number in range(4)
    ]
    run = begin(
        rows=rows,
        train=LORA | {"max_steps": 1, "train_sampling_strategy": "sequential"},
        data={"system": "Be kind."},
    )
    fit(run)
    _, tokenizer, _ = tools(run)
    expected, masks = [], []
    for answer in ("great", "so poor"):
        for number in range(4):
            prompt = (
                Message("system", "Be kind."),
                *(Message(one["role"], one["content"]) for one in talk),
                Message("user", f"say {number}"),
            )
            whole = chat.render(tokenizer, (*prompt, Message("assistant", answer)))
            asked = chat.render_prompt(tokenizer, prompt)
            assert whole.ids[: len(asked)] == asked
            expected.append(whole.ids)
            masks.append([0] * len(asked) + [1] * (len(whole.ids) - len(asked)))
    (batch,) = seen
    for row, (ids, mask) in enumerate(zip(expected, masks, strict=True)):
        assert batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist() == ids
        assert batch["completion_mask"][row][: len(mask)].tolist() == mask


def test_a_long_pair_loses_the_end_of_its_prompt_and_is_named(begin: Begin) -> None:
    long = {"prompt": "say " + "very " * 80 + "much", "chosen": "ok", "rejected": "not at all, never, no"}
    run = begin(rows=[*pairs(6), long], train=LORA | {"max_length": 64})
    (finding,) = run.manifest("prepare")["findings"]
    assert finding["code"] == "over_length"
    assert "the answer is whole" in finding["message"]
    fitted = preparing.examples(run, "train")[-1]
    _, tokenizer, _ = tools(run)
    pair = chat.render_pair(tokenizer, fitted)
    assert (fitted.answer, fitted.rejected) == ("ok", long["rejected"])
    assert len(pair.prompt) + len(pair.chosen) < len(pair.prompt) + len(pair.rejected) <= 64
    assert fit(run)["examples"] == 7


def test_both_answers_end_with_the_end_of_turn(base: Path) -> None:
    tokenizer = models.load_tokenizer(models.find(str(base)))
    equipment = chat.equip(tokenizer)
    example = Example("a", "a", (Message("user", "q"), Message("assistant", "yes")), rejected="no")
    pair = chat.render_pair(tokenizer, example)
    assert pair.chosen == chat.render_answer(tokenizer, equipment, "yes")
    assert pair.rejected == chat.render_answer(tokenizer, equipment, "no")
    assert Example.from_dict(json.loads(json.dumps(example.to_dict()))) == example


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
    whole, broken = begin(train=LORA), begin(train=LORA)
    fit(whole)
    for at in (1, 4, 5, 6, 11):  # the first, a checkpoint's, amid an epoch and a log line, an epoch's end, another
        with pytest.raises(InterruptedError, match=f"stopped at step {at} of 18"):
            stop_at(broken, at)
    assert fit(broken)["resumed_from"] == "checkpoint-11"
    assert result(broken) == result(whole)


# --- what TRL would do besides ---


def test_nothing_is_left_but_our_own_files_and_the_bases_settings(begin: Begin, base: Path) -> None:
    run = begin(train=FULL | {"max_steps": 2, "save_steps": 1})
    fit(run)
    assert not list((run.path / "train").rglob("README.md"))
    for folder in (run.trained("full"), run.checkpoints / "checkpoint-2"):
        ours, theirs = read_json(folder / "config.json"), read_json(base / "config.json")
        assert {key: ours.get(key) for key in theirs} == theirs
    assert all("runtime" not in key for entry in run.metrics() for key in entry)


def test_an_adapter_has_no_twin(begin: Begin) -> None:
    """TRL makes a second adapter as the reference; the base's numbers are in the rows."""
    run = begin(train=LORA | {"max_steps": 2, "save_steps": 1})
    manifest = fit(run)
    assert sorted(path.name for path in run.trained("lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    supervised = 2 * 2 * 16 * sum((32 + 32, 32 + 16, 32 + 16, 32 + 32)) // 2
    assert manifest["trainable_parameters"] == supervised + 2 * 16 * 3 * (32 + 64)


def test_gradient_checkpointing_does_not_change_the_result(begin: Begin) -> None:
    train = LORA | {"max_steps": 3, "logging_steps": 1}
    plain, sparing = begin(train=train), begin(train=train | {"gradient_checkpointing": True})
    fit(plain)
    fit(sparing)
    losses = [[entry["loss"] for entry in run.metrics() if "loss" in entry] for run in (plain, sparing)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize("loss_type", ["hinge", "ipo", ["sigmoid", "sft"]])
def test_another_loss_of_trls_is_taken(begin: Begin, loss_type: Any) -> None:
    plain = begin(train=LORA | {"max_steps": 2})
    other = begin(train=LORA | {"max_steps": 2, "dpo": {"loss_type": loss_type}})
    fit(plain)
    fit(other)
    assert result(other)[0] != result(plain)[0]


# --- what is refused ---


def test_an_adapter_cannot_learn_a_token_that_the_base_lacks(begin: Begin, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "endless", eos=False)
    with pytest.raises(RecipeError, match=r"no end-of-sequence token.*train\.method: full"):
        fit(begin(model=model, train=LORA))
    assert fit(begin(model=model, train=FULL | {"max_steps": 2}))["steps"] == 2


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapter_on_the_output_layer_is_refused(begin: Begin) -> None:
    with pytest.raises(RecipeError, match="lm_head"):
        fit(begin(train=LORA | {"lora": {"target_modules": ["lm_head"]}}))


def test_pairs_that_do_not_fill_a_batch_are_refused_where_the_rest_is_dropped(begin: Begin) -> None:
    with pytest.raises(DataError, match="3 pairs do not fill one batch of 4"):
        fit(begin(rows=pairs(3), train=LORA | {"dataloader_drop_last": True}))


# --- on real pairs ---


@pytest.mark.slow
def test_real_pairs_raise_the_margin_of_a_real_small_model(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "hh-helpful-preference"
    rows = [line for name in ("train", "test") for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    (tmp_path / "train.jsonl").write_text("\n".join(rows[:1000]) + "\n")
    (tmp_path / "test.jsonl").write_text("\n".join(rows[1000:]) + "\n")  # many, since answers differ so much in length
    given = {
        "name": "hh",
        "model": str(shared / "models" / "stories260k"),
        "task": "preference",
        "tracking": {"enabled": False},
        "data": {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl")},
        "train": {
            "method": "full",
            "epochs": 1,
            "learning_rate": 4e-5,
            "warmup_ratio": 0.1,
            "batch_size": 8,
            "max_length": 512,
            "logging_steps": 10,
            "save_strategy": "no",
        },
    }
    run = life.start(recipes.loads(yaml.safe_dump(given)), tmp_path / "runs")
    life.advance(run, until="check")
    work.prepare(run)
    fit(run)
    measure.evaluate(run, Tracker(run))
    report = run.manifest("evaluate")
    assert report["models"]["tuned"]["reward_margin"] > 0.05
    assert report["comparison"]["verdict"] == "better"
    assert report["intervals"]["tuned"]["reward_accuracy"][0] > 0.5, "better than guessing"


def test_the_bases_log_probabilities_are_evaluations(begin: Begin) -> None:
    run = begin(train=LORA)
    ref, tokenizer, equipment = tools(run)
    completer = LocalCompleter(models.load_model(ref), tokenizer, equipment)
    examples = preparing.examples(run, "test")
    found = preference.log_probabilities(completer, [chat.render_pair(tokenizer, one) for one in examples])
    whole = [chat.render(tokenizer, one.messages) for one in examples]
    assert [chosen for chosen, _ in found] == pytest.approx([-loss for loss, _ in completer.losses(whole)], rel=1e-6)
