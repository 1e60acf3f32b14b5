"""Training learns, repeats itself exactly, and goes on exactly from wherever it was ended."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training import Prepare, Spawn, end, fit, result, seen_step, stop_at, torn
from transformers import GPT2Config, GPT2LMHeadModel

from tunewright import chat, generate, models
from tunewright.data import prepare as preparing
from tunewright.errors import DataError, RecipeError, StageError
from tunewright.models import ModelRef
from tunewright.run import Run, read_json
from tunewright.testing import tiny_model
from tunewright.train import checkpoints
from tunewright.train.weights import sha256

LORA = {
    "method": "lora",
    "learning_rate": 5e-3,
    "batch_size": 3,
    "gradient_accumulation_steps": 2,
    "epochs": 3,
    "lora": {"r": 4, "lora_dropout": 0.2},
    "save_steps": 3,
    "logging_steps": 2,
}
"""Dropout, accumulation with a rest at the epoch's end, checkpoints amid epochs and amid what a log line averages."""
FULL = {
    "method": "full",
    "learning_rate": 1e-3,
    "batch_size": 4,
    "epochs": 3,
    "weight_decay": 0.1,
    "neftune_noise_alpha": 3.0,
    "train_sampling_strategy": "group_by_length",
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.2,
    "save_steps": 4,
    "eval_strategy": "epoch",
}
METHODS = pytest.mark.parametrize("train", [LORA, FULL], ids=["lora", "full"])


def with_validation(tmp_path: Path, train: dict[str, Any]) -> dict[str, Any]:
    return {"validation": str(tmp_path / "data" / "test.jsonl")} if "eval_strategy" in train else {}


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    """What unbroken runs gave, by what they were asked."""
    return {}


@pytest.fixture
def unbroken(prepare: Prepare, tmp_path: Path, known: dict[str, Any]) -> Any:
    """Train in one go; gives the result and a fresh run that was asked for the same."""

    def of(**options: Any) -> tuple[tuple[dict[str, str], str, int], Run]:
        options["data"] = with_validation(tmp_path, options["train"])
        asked = json.dumps({key: value for key, value in options.items() if key != "data"}, sort_keys=True)
        if asked not in known:
            whole = prepare(**options)
            fit(whole)
            known[asked] = result(whole)
        return known[asked], prepare(**options)

    return of


def losses(run: Run) -> list[float]:
    return [entry["loss"] for entry in run.metrics() if "loss" in entry]


# --- it learns, and repeats itself ---


@METHODS
def test_training_lowers_the_loss_and_keeps_its_account(
    prepare: Prepare, tmp_path: Path, train: dict[str, Any]
) -> None:
    run = prepare(train=train | {"epochs": 4}, data=with_validation(tmp_path, train))
    manifest = fit(run)
    assert sum(losses(run)[-2:]) < sum(losses(run)[:2]) * 0.97
    assert manifest["final_loss"] == losses(run)[-1]
    steps = {"lora": 4 * 4, "full": 6 * 4}[train["method"]]
    assert manifest["steps"] == steps
    assert manifest["epochs"] == 4
    assert manifest["examples"] == 24
    assert run.trained(train["method"]).is_dir()
    assert not list(run.path.glob("train/**/*.bin"))
    whole = train["method"] == "full"
    assert (manifest["trainable_parameters"] == manifest["parameters"]) is whole
    assert 0 < manifest["trainable_parameters"] <= manifest["parameters"]


@METHODS
def test_the_same_recipe_and_seed_give_the_same_weights(
    prepare: Prepare, tmp_path: Path, train: dict[str, Any]
) -> None:
    options = {"train": train, "data": with_validation(tmp_path, train)}
    one, other = prepare(**options), prepare(**options)
    fit(one)
    torch.rand(7)  # the state that a process happens to be in does not matter
    fit(other)
    assert result(one) == result(other)
    third = prepare(**options | {"train": train | {"seed": 7}})
    fit(third)
    assert result(third)[0] != result(one)[0]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_accumulating_four_batches_of_one_equals_a_batch_of_four(prepare: Prepare, method: str) -> None:
    """Rows have answers of different lengths, so this holds only where each target counts the same."""
    train = {"method": method, "optim": "sgd", "learning_rate": 0.1, "max_steps": 5, "max_grad_norm": 0}
    train["train_sampling_strategy"] = "sequential"
    weights = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        run = prepare(train=train | {"batch_size": batch_size, "gradient_accumulation_steps": accumulation})
        fit(run)
        weights.append((losses(run), models_of(run)))
    for other_losses, other in weights[1:]:
        assert other_losses == pytest.approx(weights[0][0], rel=1e-6)
        for name, weight in weights[0][1].items():
            torch.testing.assert_close(other[name], weight, rtol=0, atol=1e-6)


def models_of(run: Run) -> dict[str, torch.Tensor]:
    (path,) = run.trained(run.recipe().train.method).glob("*.safetensors")
    return dict(load_file(path))


def test_the_trained_model_is_saved_with_its_own_settings(prepare: Prepare, base: Path) -> None:
    """Trainer turns the cache off while it trains; whoever loads the result wants it on."""
    run = prepare(train={"method": "full", "max_steps": 2, "batch_size": 2})
    fit(run)
    for folder in (run.trained("full"), run.checkpoints / "checkpoint-2"):
        assert read_json(folder / "config.json")["use_cache"] is read_json(base / "config.json")["use_cache"] is True


@pytest.mark.parametrize("method", ["full", "lora"])
def test_gradient_checkpointing_does_not_change_the_result(prepare: Prepare, method: str) -> None:
    train = {"method": method, "max_steps": 4, "batch_size": 4, "learning_rate": 1e-3}
    plain, sparing = prepare(train=train), prepare(train=train | {"gradient_checkpointing": True})
    fit(plain)
    fit(sparing)
    assert losses(sparing) == pytest.approx(losses(plain), abs=1e-5)


# --- it goes on ---


@METHODS
@pytest.mark.parametrize("moment", ["in a step", "in a checkpoint"])
def test_a_killed_run_ends_as_an_unbroken_one(unbroken: Any, spawn: Spawn, train: dict[str, Any], moment: str) -> None:
    whole, broken = unbroken(train=train, rows=40)
    for after in (4, 10):
        when = (lambda run, after=after: seen_step(run, after)) if moment == "in a step" else torn
        assert end(broken, spawn, signal.SIGKILL, when) == -signal.SIGKILL
        assert not broken.manifest_file("train").exists()
    assert fit(broken)["resumed_from"] is not None or moment == "in a checkpoint"
    assert result(broken) == whole


def test_a_torn_checkpoint_is_removed_and_said_so(prepare: Prepare) -> None:
    run = prepare(train=LORA)
    fit(run)
    done = result(run)
    run.manifest_file("train").unlink()
    last = checkpoints.latest(run.checkpoints)
    assert last is not None
    (last / "optimizer.pt").write_bytes(b"half")
    fit(run)
    said = [event for event in run.events() if event["event"] == "torn checkpoint removed"]
    assert [event["checkpoint"] for event in said] == [last.name]
    assert result(run) == done


@METHODS
def test_sigterm_stops_at_the_end_of_a_step_and_goes_on_exactly(
    unbroken: Any, spawn: Spawn, train: dict[str, Any]
) -> None:
    whole, broken = unbroken(train=train, rows=40)
    assert end(broken, spawn, signal.SIGTERM, lambda run: seen_step(run, 4)) == 130
    failure = read_json(broken.failure_file("train"))
    last = checkpoints.latest(broken.checkpoints)
    assert last is not None
    step = checkpoints.step(last)
    assert failure == {"kind": "Interrupted", "message": f"stopped at step {step} of {whole[2]}"}
    assert fit(broken)["resumed_from"] == last.name
    assert result(broken) == whole


@pytest.mark.parametrize("at", [1, 4, 5, 7, 8, 11])
def test_a_stop_at_any_step_goes_on_exactly(unbroken: Any, at: int) -> None:
    """Ends of epochs, steps with a log line, steps with a checkpoint, and others; logs and evaluation by epoch."""
    train = FULL | {"eval_strategy": "epoch", "logging_strategy": "epoch", "save_steps": 5, "epochs": 3}
    whole, broken = unbroken(train=train, rows=16)
    with pytest.raises(InterruptedError, match=f"stopped at step {at} of 12"):
        stop_at(broken, at)
    assert at in (checkpoints.step(one) for one in broken.checkpoints.iterdir())
    fit(broken)
    assert result(broken) == whole


def test_the_process_heeds_sigterm_as_before_once_training_is_over(prepare: Prepare) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run = prepare(train={"max_steps": 2})
    fit(run)
    assert signal.getsignal(signal.SIGTERM) is before
    broken = prepare(train={"method": "full", "learning_rate": 1e30, "max_steps": 5})
    with pytest.raises(StageError):
        fit(broken)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("save", [{"save_steps": 4}, {"save_strategy": "epoch"}], ids=["steps", "epoch"])
def test_a_kill_after_the_last_checkpoint_costs_no_step_and_adds_none(prepare: Prepare, save: dict[str, Any]) -> None:
    run = prepare(train=LORA | {"max_steps": 6, "epochs": 9} | save)  # 6 is amid the second epoch
    fit(run)
    done = result(run)
    run.manifest_file("train").unlink()
    fit(run)
    assert result(run) == done


def test_loss_before_training_is_measured_once(unbroken: Any) -> None:
    whole, broken = unbroken(train=FULL | {"eval_on_start": True, "max_steps": 9})
    with pytest.raises(InterruptedError):
        stop_at(broken, 5)
    fit(broken)
    assert next(entry["step"] for entry in broken.metrics() if "eval_loss" in entry) == 0
    assert result(broken) == whole


def test_time_spent_is_that_of_all_processes(prepare: Prepare) -> None:
    run = prepare(train=FULL | {"eval_strategy": "no"})
    with pytest.raises(InterruptedError):
        stop_at(run, 8)
    last = checkpoints.latest(run.checkpoints)
    assert last is not None
    seal = checkpoints.facts(last)
    (last / checkpoints.SEAL).write_text(json.dumps(seal | {"seconds": 1000.0}))
    assert 1000 < fit(run)["seconds"] < 1100


# --- it stops where there is nothing to gain ---


@pytest.mark.parametrize(
    ("logging", "save"), [({}, {}), ({"logging_strategy": "no"}, {}), ({"logging_steps": 50}, {"save_steps": 1})]
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_a_loss_that_is_no_number_stops_with_step_and_checkpoint(
    prepare: Prepare, logging: dict[str, Any], save: dict[str, Any]
) -> None:
    run = prepare(train={"method": "full", "learning_rate": 1e30, "max_steps": 20, "batch_size": 4} | logging | save)
    last = "checkpoint-1" if save else "there is no checkpoint yet"
    with pytest.raises(
        StageError, match=rf"is (nan|inf) at step \d \(rows .*train.jsonl:\d+, .*\); .*{last}.*learning_rate"
    ):
        fit(run)
    assert not run.manifest_file("train").exists()
    assert all(math.isfinite(loss) for loss in losses(run))
    for checkpoint in run.checkpoints.glob("checkpoint-*"):
        assert all(weight.isfinite().all() for weight in load_file(checkpoint / "model.safetensors").values())


def test_rows_that_do_not_fill_a_batch_are_refused_where_the_rest_is_dropped(prepare: Prepare) -> None:
    for batch_size, accumulation in ((8, 1), (2, 4)):
        train = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation, "dataloader_drop_last": True}
        run = prepare(rows=4, train=train | {"max_steps": 3})
        with pytest.raises(DataError, match="4 training rows do not fill one step of 8"):
            fit(run)


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"lora": {"target_modules": ["nothing"]}}, "nothing"),
        ({"tf32": True}, "tf32"),
    ],
)
def test_what_cannot_be_done_is_the_recipes_fault(prepare: Prepare, train: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=rf"^train.*{said}"):
        fit(prepare(train=train))


# --- validation ---


def test_validation_loss_counts_every_target_the_same(prepare: Prepare, tmp_path: Path) -> None:
    train = FULL | {"epochs": 1, "per_device_eval_batch_size": 3, "neftune_noise_alpha": None}
    run = prepare(train=train, data=with_validation(tmp_path, train))
    fit(run)
    (logged,) = [entry for entry in run.metrics() if "eval_loss" in entry]
    model = models.load_folder(run.trained("full"))
    tokenizer = models.load_tokenizer(ModelRef.from_dict(run.resolved()["model"]))
    chat.equip(tokenizer)
    total, count, right = 0.0, 0, 0
    for example in preparing.examples(run, "validation"):
        rendering = chat.render(tokenizer, example.messages)
        with torch.no_grad():
            logprobs = model(torch.tensor([rendering.ids])).logits[0].double().log_softmax(-1)
        for place in range(1, len(rendering.ids)):
            if rendering.mask[place]:
                total -= float(logprobs[place - 1, rendering.ids[place]])
                count += 1
                right += int(logprobs[place - 1].argmax()) == rendering.ids[place]
    assert logged["eval_loss"] == pytest.approx(total / count, abs=1e-5)
    assert logged["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert logged["eval_mean_token_accuracy"] == pytest.approx(right / count)
    assert logged["step"] == 6


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_best_checkpoint_is_kept_and_loaded(prepare: Prepare, tmp_path: Path, method: str) -> None:
    """The learning rate rises until it does harm, so that the best checkpoint is not the last."""
    train = {
        "method": method,
        "learning_rate": {"full": 1.0, "lora": 3.0}[method],
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 20,
        "max_steps": 20,
        "batch_size": 8,
        "epochs": 20,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
    }
    run = prepare(train=train, data=with_validation(tmp_path, train))
    manifest = fit(run)
    measured = {entry["step"]: entry["eval_loss"] for entry in run.metrics() if "eval_loss" in entry}
    best = min(measured, key=lambda step: measured[step])
    assert best < max(measured), "this test needs a best checkpoint that is not the last"
    kept = sorted(checkpoints.step(one) for one in run.checkpoints.iterdir())
    assert kept == [best, 20]
    weights = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}[method]
    assert manifest["sha256"][weights] == sha256(run.checkpoints / f"checkpoint-{best}" / weights)
    assert manifest["trainable_parameters"] > 0
    done = result(run)
    run.manifest_file("train").unlink()
    fit(run)
    assert result(run) == done


# --- models of other shapes ---


def rendered_prompt(run: Run, tokenizer: Any) -> list[int]:
    return chat.render_prompt(tokenizer, preparing.examples(run, "test")[0].prompt)


@pytest.mark.parametrize("tied", [True, False])
def test_a_base_without_end_of_sequence_learns_to_stop(prepare: Prepare, tmp_path: Path, tied: bool) -> None:
    folder = sharpened(tiny_model(tmp_path / "endless", eos=False), tied=tied)
    run = prepare(model=folder, train={"learning_rate": 1e-2, "epochs": 20, "batch_size": 8, "lora": {"r": 8}})
    fit(run)
    ref = ModelRef.from_dict(run.resolved()["model"])
    tokenizer = models.load_tokenizer(ref)
    equipment = chat.equip(tokenizer)
    assert equipment.added_tokens == [chat.END_OF_TURN]
    base = models.load_model(ref)
    models.grow(base, len(tokenizer))
    new = equipment.end_of_turn_id
    assert new == len(tokenizer) - 1 == ref.vocab_size
    before = base.get_input_embeddings().weight.detach().clone(), base.get_output_embeddings().weight.detach().clone()
    merged = models.merge(base, run.trained("lora"))
    for old, now in zip(before, (merged.get_input_embeddings(), merged.get_output_embeddings()), strict=True):
        assert torch.equal(old[:new], now.weight[:new])
    assert not torch.equal(before[1][new], merged.get_output_embeddings().weight[new])
    completer = generate.LocalCompleter(merged, tokenizer, equipment)
    *_, last = completer.stream(rendered_prompt(run, tokenizer), max_new_tokens=20)
    assert last.id == new
    assert completer.answer(preparing.examples(run, "test")[0].prompt, max_new_tokens=20) in ("good", "bad")


def sharpened(folder: Path, *, tied: bool) -> Path:
    """The model with larger embeddings: an adapter cannot change those, and random ones hardly tell tokens apart."""
    model = models.load_folder(folder)
    model.get_input_embeddings().weight.data *= 10
    if not tied:
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    with models.quiet():
        model.save_pretrained(str(folder))
    return folder


def gpt2(folder: Path, base: Path) -> Path:
    """A random model of GPT-2's shape with the tiny model's tokenizer."""
    tokenizer = models.load_folder_tokenizer(base)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    with models.quiet():
        GPT2LMHeadModel(config).save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_model_of_gpt2s_shape_learns(prepare: Prepare, tmp_path: Path, base: Path, method: str) -> None:
    """Its projections are Conv1D, transposed linear layers."""
    train = {"method": method, "learning_rate": 1e-2, "epochs": 6, "batch_size": 8}
    run = prepare(model=gpt2(tmp_path / "gpt2", base), train=train)
    fit(run)
    assert losses(run)[-1] < losses(run)[0] * 0.95
    if method == "lora":
        ref = ModelRef.from_dict(run.resolved()["model"])
        merged = models.merge(models.load_model(ref), run.trained("lora"))
        assert any(
            not torch.equal(one, other)
            for one, other in zip(merged.parameters(), models.load_model(ref).parameters(), strict=True)
        )


def test_an_adapter_holds_no_copy_of_the_embeddings(prepare: Prepare, tmp_path: Path) -> None:
    run = prepare(model=tiny_model(tmp_path / "endless", eos=False), train={"max_steps": 2, "lora": {"r": 2}})
    fit(run)
    assert not [name for name, weight in models_of(run).items() if weight.numel() >= 300 * 32]
    assert not (run.trained("lora") / "README.md").exists()
