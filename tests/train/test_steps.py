"""Steps that do not go as they should: too little memory, a loss that runs away, nothing more to gain."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training import Prepare, Spawn, end, fit, result, stop_at
from transformers import AutoConfig, AutoModelForCausalLM

from tunewright import chat, models
from tunewright.data import prepare as preparing
from tunewright.errors import ModelError, RecipeError, RunError, StageError
from tunewright.evaluate import measure
from tunewright.generate import LocalCompleter
from tunewright.models import ModelRef
from tunewright.run import Run
from tunewright.testing import tiny_data
from tunewright.train import supervised

PLAIN = {"bf16": False, "epochs": 2, "batch_size": 8, "learning_rate": 1e-3}


def losses(run: Run) -> list[float]:
    return [entry["loss"] for entry in run.metrics() if "loss" in entry]


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(next(run.trained(run.method).glob("*.safetensors")))


@contextlib.contextmanager
def memory_for(tokens: int) -> Iterator[None]:
    """A machine on which a forward of more than so many tokens does not fit: torch's own allocator refuses it."""

    class Small(supervised.SupervisedTrainer):
        def compute_loss(self, model: Any, inputs: Any, *given: Any, **options: Any) -> Any:
            loss = super().compute_loss(model, inputs, *given, **options)
            if inputs["input_ids"].numel() > tokens:
                loss.backward()  # half done: the gradients of what does not fit must not stay
                torch.empty(2**50)
            return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervised, "SupervisedTrainer", Small)
        yield


@pytest.mark.parametrize("method", ["full", "lora"])
def test_out_of_memory_halves_the_forwards_says_so_and_changes_no_number(
    prepare: Prepare, method: str, capfd: pytest.CaptureFixture[str]
) -> None:
    plain, short = (prepare(train=PLAIN | {"method": method}) for _ in range(2))
    fit(plain)
    with memory_for(60):
        fit(short)
    said = [event for event in short.events() if event["event"] == "out of memory"]
    assert said
    assert said[-1]["tokens_per_forward"] <= 60
    assert "out of memory at step 1" in capfd.readouterr().err
    assert losses(short) == pytest.approx(losses(plain), rel=1e-5)
    for name, weight in weights(short).items():
        torch.testing.assert_close(weight, weights(plain)[name], rtol=1e-3, atol=1e-5)


def test_a_run_that_was_short_of_memory_goes_on_with_what_fits(prepare: Prepare) -> None:
    unbroken, broken = (prepare(train=PLAIN | {"save_steps": 1}) for _ in range(2))
    with memory_for(60):
        fit(unbroken)
        with pytest.raises(InterruptedError):
            stop_at(broken, 3)
        fit(broken)
    assert result(broken) == result(unbroken)
    assert len([event for event in broken.events() if event["event"] == "out of memory"]) == len(
        [event for event in unbroken.events() if event["event"] == "out of memory"]
    )


def test_a_row_that_does_not_fit_by_itself_stops_with_what_to_do(prepare: Prepare) -> None:
    run = prepare(train=PLAIN)
    with (
        memory_for(1),
        pytest.raises(StageError, match=r"out of memory at step 1: .* one row, .*gradient_checkpointing"),
    ):
        fit(run)


def test_another_error_is_not_taken_for_a_lack_of_memory(prepare: Prepare) -> None:
    class Broken(supervised.SupervisedTrainer):
        def compute_loss(self, *given: Any, **options: Any) -> Any:
            raise RuntimeError("something else")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervised, "SupervisedTrainer", Broken)
        with pytest.raises(RuntimeError, match="something else"):
            fit(prepare(train=PLAIN))


def test_a_loss_that_runs_away_stops_with_step_and_rows(prepare: Prepare) -> None:
    run = prepare(
        train=PLAIN | {"method": "full", "learning_rate": 30.0, "epochs": 40, "lr_scheduler_type": "constant"}
    )
    with pytest.raises(StageError, match=r"the loss has risen to [\d.]+ at step \d+ \(rows .*train.jsonl:\d+"):
        fit(run)
    event = run.events()[-1]
    assert event["event"] == "diverged"
    assert len(event["rows"]) == 8
    assert not run.manifest_file("train").exists()


def test_the_guard_against_a_loss_that_runs_away_remembers_what_was_before_a_resume(prepare: Prepare) -> None:
    train = PLAIN | {"method": "full", "learning_rate": 3.0, "epochs": 40, "lr_scheduler_type": "constant"}
    unbroken, broken = (prepare(train=train | {"save_steps": 1}) for _ in range(2))
    with pytest.raises(StageError, match="has risen to") as first:
        fit(unbroken)
    for _ in range(2):  # again and again: a ceiling that is found anew each time would rise with the loss
        with pytest.raises(StageError, match="has risen to") as again:
            fit(broken)
        assert said(again.value) == said(first.value)


def said(error: Exception) -> str:
    """What an error says of the loss and the step."""
    return str(error).partition(" (rows")[0]


def test_noise_on_a_rows_embeddings_does_not_depend_on_the_rows_beside_it(prepare: Prepare) -> None:
    """Its largest value is alpha / sqrt(tokens of the row x hidden size), whatever else lies in the forward."""
    seen: list[tuple[list[int], torch.Tensor]] = []

    class Watched(supervised.SupervisedTrainer):
        def compute_loss(self, model: Any, inputs: Any, *given: Any, **options: Any) -> Any:
            embeddings = model.get_input_embeddings()
            ids = inputs["input_ids"]
            noise = embeddings(ids) - torch.nn.functional.embedding(ids, embeddings.weight)
            seen.append(([len(row.ids) for row in self.at_work], noise.detach()))
            return super().compute_loss(model, inputs, *given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervised, "SupervisedTrainer", Watched)
        fit(prepare(train=PLAIN | {"method": "full", "epochs": 1, "neftune_noise_alpha": 5.0}))
    assert any(len(lengths) > 1 for lengths, _ in seen)
    for lengths, noise_BTD in seen:
        for length, noise_TD in zip(lengths, noise_BTD[0].split(lengths), strict=True):
            largest = 5.0 / (length * noise_TD.shape[-1]) ** 0.5
            assert 0.9 * largest < float(noise_TD.abs().max()) <= largest * 1.0001


VALIDATED = PLAIN | {
    "epochs": 6,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
    "early_stopping_patience": 2,
}


@pytest.fixture
def validated(prepare: Prepare, tmp_path: Path) -> Any:
    rows = tiny_data(tmp_path / "more", train=12, test=4)

    def begin(**train: Any) -> Run:
        return prepare(train=VALIDATED | train, data={"validation": rows["train"]})

    return begin


def test_training_stops_once_the_validation_metric_gets_no_better(validated: Any) -> None:
    run = validated(learning_rate=0.0)
    manifest = fit(run)
    assert manifest["epochs"] == 3  # one that is the best, and two that are no better
    assert [entry["eval_accuracy"] for entry in run.metrics() if "eval_accuracy" in entry] == [
        pytest.approx(run.metrics()[3]["eval_accuracy"])
    ] * 3


@pytest.mark.parametrize("at", [4, 8])
def test_a_stop_and_a_resume_wait_as_long_for_something_better(validated: Any, at: int) -> None:
    unbroken, broken = validated(learning_rate=0.0), validated(learning_rate=0.0)
    fit(unbroken)
    with pytest.raises(InterruptedError):
        stop_at(broken, at)
    fit(broken)
    assert result(broken) == result(unbroken)


def test_validation_accuracy_is_what_evaluation_would_find(validated: Any) -> None:
    run = validated(epochs=1, early_stopping_patience=None, learning_rate=5e-3)
    fit(run)
    said = next(entry["eval_accuracy"] for entry in run.metrics() if "eval_accuracy" in entry)
    ref = ModelRef.from_dict(run.resolved()["model"])
    tokenizer = models.load_tokenizer(ref)
    completer = LocalCompleter(measure.tuned_model(run, run.recipe(), ref, tokenizer), tokenizer, chat.equip(tokenizer))
    rows, labels = preparing.examples(run, "validation"), run.manifest("prepare")["labels"]
    scores = completer.score([chat.render_prompt(tokenizer, row.prompt) for row in rows], completer.tree(labels))
    right = [
        labels[max(range(len(labels)), key=one.__getitem__)] == row.label for one, row in zip(scores, rows, strict=True)
    ]
    assert said == pytest.approx(sum(right) / len(right))


def test_kills_at_random_moments_end_in_the_same_weights_and_log(prepare: Prepare, spawn: Spawn) -> None:
    train = {"epochs": 3, "batch_size": 2, "save_steps": 2, "lora": {"lora_dropout": 0.1}}
    unbroken, killed = prepare(train=train), prepare(train=train)
    fit(unbroken)
    steps = unbroken.manifest("train")["steps"]
    seed = random.randrange(2**32)
    chosen = sorted(random.Random(seed).sample(range(1, steps), 3))
    for step in chosen:
        end(killed, spawn, signal.SIGKILL, lambda run, step=step: any(e["step"] >= step for e in _read(run)))
    assert end(killed, spawn, signal.SIGKILL, lambda run: False) in (0, None)
    assert result(killed) == result(unbroken), f"killed at {chosen} (seed {seed})"


def _read(run: Run) -> list[dict[str, Any]]:
    """The log as far as it is written: its last line may be torn at this moment."""
    try:
        return run.metrics() if run.metrics_file.is_file() else []
    except RunError:
        return []


def test_an_earlier_adapter_is_gone_on_with(prepare: Prepare) -> None:
    first = prepare(train=PLAIN)
    fit(first)
    still = prepare(train={"adapter": str(first.path), "learning_rate": 0.0, "epochs": 1})
    fit(still)
    for name, weight in weights(still).items():
        assert torch.equal(weight, weights(first)[name])
    further = prepare(train=PLAIN | {"adapter": str(first.trained("lora")), "epochs": 1})
    fit(further)
    assert losses(further)[0] < losses(first)[0]


def test_an_adapter_of_another_base_is_refused(prepare: Prepare, base: Path, tmp_path: Path) -> None:
    first = prepare(train=PLAIN)
    fit(first)
    other = shutil.copytree(base, tmp_path / "other")
    config = AutoConfig.from_pretrained(str(base), hidden_size=48)
    AutoModelForCausalLM.from_config(config).save_pretrained(str(other))
    run = prepare(model=other, train={"adapter": str(first.path)})
    with pytest.raises(RecipeError, match=r"train.adapter: .* does not fit this base"):
        fit(run)


def test_an_adapter_that_is_not_there_is_found_before_training(prepare: Prepare, tmp_path: Path) -> None:
    with pytest.raises((RecipeError, ModelError), match="is neither an adapter"):
        prepare(train={"adapter": str(tmp_path / "nowhere")})
