"""Training whose weights are sharded over two processes, with gloo: what comes out is what one process makes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_distributed import TOGETHER, TRAIN, train_by_its_backend
from training import Prepare, Spawn, fit, fit_by_two, result, seen_step, two
from transformers import AutoConfig, AutoModelForCausalLM

from tunewright import models
from tunewright.backends.local import LocalBackend
from tunewright.data import prepare as preparing
from tunewright.errors import RecipeError
from tunewright.run import Run, read_json
from tunewright.testing import tiny_data, tiny_model
from tunewright.train import checkpoints, exact
from tunewright.train.assembling import into_bins
from tunewright.train.weights import Base

SHARDED = {"fsdp": "full_shard", "batch_size": 8}
OF_TWO = {"optimizer.bin", "rng_state_0.pth", "rng_state_1.pth"}
"""Files that a checkpoint of two sharding processes has instead of those of one: the optimizer's state is whole too."""
FEW_TOKENS = 57
"""Tokens of a forward, with which the two processes need different numbers of forwards."""
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},  # its output layer shares the embeddings' weights
    "bloom": {},  # rows are padded
    "gemma2": {"num_key_value_heads": 1, "head_dim": 16, "final_logit_softcapping": 0.01},  # the loss is its own
}


def model_of(kind: str, folder: Path) -> Path:
    tiny_model(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **sizes | tokens | {"intermediate_size": 64} | KINDS[kind])
    with models.quiet():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(next(run.trained(run.method).glob("*.safetensors")))


def numbers(run: Run) -> list[dict[str, float]]:
    """All that the log says: losses, the gradients' norms, what was measured on the validation rows."""
    return [dict(entry) for entry in run.metrics()]


def assert_same(together: Run, alone: Run, rel: float = 2e-5, atol: float = 1e-5) -> None:
    assert [list(entry) for entry in numbers(together)] == [list(entry) for entry in numbers(alone)]
    for ours, theirs in zip(numbers(together), numbers(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=rel)
    ours, theirs = weights(together), weights(alone)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=atol)


def forwards(run: Run) -> list[tuple[int, int]]:
    """How many bins each of the two processes has in each step, where the rows come in their order."""
    lengths = preparing.stored(run, "train", Base.of(run).tokenizer).lengths.tolist()
    size, budget = run.recipe().train.batch_size, run.resolved()["train"]["tokens_per_forward"]
    steps = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    shares = [(step[: len(step) // 2], step[len(step) // 2 :]) for step in steps]
    return [(len(into_bins(one, budget)), len(into_bins(other, budget))) for one, other in shares]


def test_processes_with_different_numbers_of_forwards_end_with_the_weights_of_one(prepare: Prepare) -> None:
    train = TRAIN | {"tokens_per_forward": FEW_TOKENS, "train_sampling_strategy": "sequential"}
    together = prepare(train=train | SHARDED, backend=TOGETHER)
    assert any(one != other for one, other in forwards(together))
    manifest = train_by_its_backend(together)
    alone = prepare(train=train | {"batch_size": 8})
    fit(alone)
    assert_same(together, alone)
    assert manifest["parameters"] == alone.manifest("train")["parameters"]
    assert manifest["parameters_held"] == pytest.approx(manifest["parameters"] / 2, rel=0.05)
    for name in ("config.json", "generation_config.json"):
        ours, theirs = (read_json(run.trained("full") / name) for run in (together, alone))
        assert ours == theirs
    one, other = (run.checkpoints / "checkpoint-6" for run in (together, alone))
    kept = {path.name for path in one.iterdir()}
    assert kept >= {name for name in checkpoints.WEIGHTS if (other / name).exists()}
    assert kept == {path.name for path in other.iterdir()} - {"optimizer.pt", "rng_state.pth"} | OF_TWO
    torch.testing.assert_close(load_file(one / "model.safetensors"), weights(together), rtol=0, atol=0)
    assert not list(together.path.rglob("*.new"))


@pytest.mark.parametrize(("method", "rate"), [pytest.param("full", 3e-3, marks=pytest.mark.slow), ("lora", 3e-3)])
def test_validation_and_the_best_checkpoint_are_those_of_one_process(
    prepare: Prepare, spawn: Spawn, tmp_path: Path, method: str, rate: float
) -> None:
    train = TRAIN | {"method": method, "learning_rate": rate, "tokens_per_forward": FEW_TOKENS, "epochs": 4}
    # The highest loss is called the best, so that it is not the last.
    best = {"load_best_model_at_end": True, "greater_is_better": True, "early_stopping_patience": 1}
    train |= {"eval_strategy": "epoch", "eval_on_start": True} | best
    data = {"validation": tiny_data(tmp_path / "valid", train=8, test=8)["test"]}
    together = prepare(train=train | SHARDED, data=data, backend=TOGETHER)
    manifest = fit_by_two(together, spawn)
    alone = prepare(train=train | {"batch_size": 8}, data=data)
    fit(alone)
    assert manifest["steps"] == alone.manifest("train")["steps"] == 6
    first = load_file(next((together.checkpoints / "checkpoint-3").glob("*model.safetensors")))
    torch.testing.assert_close(weights(together), first, rtol=0, atol=0)
    assert_same(together, alone, rel=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_a_killed_run_goes_on_to_the_very_same_weights(
    prepare: Prepare, spawn: Spawn, tmp_path: Path, method: str
) -> None:
    # This base lacks a token, so that the adapter has rows of the embeddings besides its matrices.
    base = tiny_model(tmp_path / "model", eos=False)
    train = TRAIN | SHARDED | {"method": method, "save_steps": 2, "logging_steps": 3, "max_steps": 7}
    whole, killed = (prepare(model=base, train=train, backend=TOGETHER) for _ in range(2))
    fit_by_two(whole, spawn)
    processes = two(killed, spawn)
    while not any(checkpoints.step(one) >= 4 for one in killed.checkpoints.glob("checkpoint-*")):
        assert all(process.is_alive() for process in processes), (killed.path / "train.out").read_text()
        time.sleep(0.001)
    for process in processes:
        process.kill()
        process.join()
    assert not killed.manifest_file("train").is_file()
    fit_by_two(killed, spawn)
    assert killed.manifest("train")["resumed_from"] is not None
    assert result(killed) == result(whole)


def test_both_stop_at_the_same_step_when_one_is_asked_to(prepare: Prepare, spawn: Spawn) -> None:
    train = TRAIN | SHARDED | {"epochs": 20, "save_strategy": "no", "learning_rate": 1e-4}
    stopped = prepare(train=train, backend=TOGETHER)
    processes = two(stopped, spawn)
    while not seen_step(stopped, 5):
        assert all(process.is_alive() for process in processes), (stopped.path / "train.out").read_text()
        time.sleep(0.001)
    os.kill(processes[1].pid or 0, signal.SIGTERM)
    for process in processes:
        process.join(60)
        assert process.exitcode == 130
    assert read_json(stopped.failure_file("train"))["kind"] == "Interrupted"
    last = checkpoints.latest(stopped.checkpoints)
    assert last is not None
    assert checkpoints.step(last) == stopped.metrics()[-1]["step"]


def test_weights_that_are_no_number_stop_all_of_them(prepare: Prepare, spawn: Spawn) -> None:
    train = TRAIN | SHARDED | {"learning_rate": 1e39, "lr_scheduler_type": "constant", "save_steps": 1}
    run = prepare(train=train, backend=TOGETHER)
    for process in two(run, spawn):
        process.join(60)
        assert process.exitcode == 1
    assert "the largest weight is inf at step 1" in read_json(run.failure_file("train"))["message"]
    assert checkpoints.latest(run.checkpoints) is None


def test_one_process_cannot_shard(prepare: Prepare) -> None:
    with pytest.raises(RecipeError, match=r"^train\.fsdp shards the weights over several processes, and backend"):
        prepare(train=TRAIN | SHARDED)
    run = prepare(train=TRAIN | SHARDED, backend=TOGETHER)
    with pytest.raises(RecipeError, match=r"^train\.fsdp shards the weights over processes, and there is one"):
        exact.arguments(run.recipe(), run, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "train"),
    [
        ("gpt2", {}),
        ("gpt2", {"method": "lora"}),
        ("bloom", {}),
        ("gemma2", {}),
        ("gemma2", {"method": "lora"}),
        ("llama", {"gradient_checkpointing": True}),
        ("llama", {"gradient_checkpointing": True, "method": "lora"}),
        ("llama", {"fsdp": "shard_grad_op"}),
        ("llama", {"fsdp": True, "fsdp_config": {"reshard_after_forward": False}}),
        ("llama", {"max_grad_norm": 0}),
        ("llama", {"optim": "adamw_torch"}),
        ("llama", {"optim": "sgd"}),
        ("llama", {"optim": "rmsprop"}),
        ("no eos", {"method": "lora"}),
        ("no eos", {"method": "full"}),
    ],
    ids=str,
)
def test_each_way_of_sharding_ends_with_the_weights_of_one_process(
    prepare: Prepare, spawn: Spawn, tmp_path: Path, kind: str, train: dict[str, Any]
) -> None:
    folder = tmp_path / "model"
    base = model_of(kind, folder) if kind in KINDS else tiny_model(folder, eos=kind != "no eos")
    train = TRAIN | {"tokens_per_forward": FEW_TOKENS} | train
    together = prepare(model=base, train=SHARDED | train, backend=TOGETHER)
    fit_by_two(together, spawn)
    plain = {key: value for key, value in train.items() if not key.startswith("fsdp")}
    alone = prepare(model=base, train=plain | {"batch_size": 8})
    fit(alone)
    layouts = {"bloom": "padded", "gemma2": "plain"}
    assert together.manifest("train")["layout"] == layouts.get(kind, "flat") == alone.manifest("train")["layout"]
    assert_same(together, alone)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_half_precision_is_near_that_of_one_process(prepare: Prepare, spawn: Spawn, method: str) -> None:
    train = TRAIN | {"method": method, "bf16": True}
    together, alone = prepare(train=train | SHARDED, backend=TOGETHER), prepare(train=train | {"batch_size": 8})
    fit_by_two(together, spawn)
    fit(alone)
    assert_same(together, alone, rel=1e-2, atol=1e-2)
    assert {weight.dtype for weight in weights(together).values()} == {torch.float32}


@pytest.mark.slow
def test_a_text_and_an_earlier_adapter_are_trained_as_by_one_process(
    prepare: Prepare, spawn: Spawn, tmp_path: Path
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"a text of its own, number {number}, long enough to learn" for number in range(40)))
    data = {"task": "pretraining", "data": {"train": str(texts), "test": str(texts), "text": None, "label": None}}
    train = TRAIN | {"method": "lora", "max_length": 64, "max_steps": 3}
    first = prepare(**data, train=train | {"batch_size": 8})
    fit(first)
    further = train | {"adapter": str(first.path)}
    together = prepare(**data, train=further | SHARDED, backend=TOGETHER)
    fit_by_two(together, spawn)
    alone = prepare(**data, train=further | {"batch_size": 8})
    fit(alone)
    assert_same(together, alone)


@pytest.mark.slow
def test_the_backend_stops_it_with_a_checkpoint_and_goes_on(prepare: Prepare) -> None:
    train = TRAIN | SHARDED | {"epochs": 40, "learning_rate": 1e-4}
    whole, stopped = (prepare(train=train, backend=TOGETHER) for _ in range(2))
    train_by_its_backend(whole)
    backend = LocalBackend(stopped.recipe().backend.model_extra or {})
    job = backend.submit("train", stopped)
    while not seen_step(stopped, 5):
        assert backend.poll(job, stopped).state == "running", stopped.log_file("train").read_text()
        time.sleep(0.001)
    backend.cancel(job, stopped)
    assert backend.poll(job, stopped).state == "cancelled"
    assert checkpoints.latest(stopped.checkpoints) is not None
    train_by_its_backend(stopped)
    assert result(stopped) == result(whole)
