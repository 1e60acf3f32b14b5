"""Training by several processes on one machine, with gloo, through the backend that users start it with."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training import Prepare, fit

from tunewright.backends.local import LocalBackend
from tunewright.run import Run
from tunewright.testing import tiny_data

TWO = {"kind": "local", "processes": 2}
TRAIN = {"method": "full", "epochs": 2, "learning_rate": 1e-3, "bf16": False, "seed": 3}


def train_by(run: Run, processes: int) -> dict[str, Any]:
    backend = LocalBackend({"processes": processes, "threads": 1})
    job = backend.submit("train", run)
    while (status := backend.poll(job, run)).state == "running":
        time.sleep(0.2)
    assert status.state == "done", run.log_file("train").read_text()[-4000:]
    return run.manifest("train")


def assert_same_training(together: Run, alone: Run, method: str) -> None:
    """The same losses, gradient norms and weights but for rounding."""
    for key in ("loss", "grad_norm", "eval_loss", "eval_accuracy"):
        ours, theirs = ([entry[key] for entry in run.metrics() if key in entry] for run in (together, alone))
        assert ours == pytest.approx(theirs, rel=1e-4)
    one, other = (weights_of(run, method) for run in (together, alone))
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], rtol=1e-3, atol=1e-5)


def weights_of(run: Run, method: str) -> dict[str, torch.Tensor]:
    (file,) = run.trained(method).glob("*.safetensors")  # type: ignore[arg-type]
    return load_file(file)


def test_two_processes_end_with_the_loss_and_weights_of_one(prepare: Prepare) -> None:
    together = prepare(train=TRAIN | {"batch_size": 4})
    manifest = train_by(together, 2)
    alone = prepare(train=TRAIN | {"batch_size": 8})
    fit(alone)
    assert manifest["steps"] == alone.manifest("train")["steps"] == 6
    assert_same_training(together, alone, "full")
    events = [event["event"] for event in together.events() if event["stage"] == "train"]
    assert events.count("started") == 1
    assert not list(together.path.rglob("*.new"))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_processes_that_share_the_weights_end_with_those_of_one_resumed_too(
    method: str, prepare: Prepare, tmp_path: Path
) -> None:
    """With FSDP; 40 tokens in a forward, so that the two differ in how many a step takes."""
    validation = tiny_data(tmp_path / "more", train=12, test=4)["train"]
    train = TRAIN | {"method": method, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    train["load_best_model_at_end"] = True
    shared = train | {"batch_size": 4, "fsdp": True, "tokens_per_forward": 40}
    together = prepare(train=shared, data={"validation": validation}, backend=TWO)
    manifest = train_by(together, 2)
    alone = prepare(train=train | {"batch_size": 8}, data={"validation": validation})
    fit(alone)
    assert manifest["steps"] == alone.manifest("train")["steps"] == 6
    assert manifest["trainable_parameters"] == alone.manifest("train")["trainable_parameters"]
    assert_same_training(together, alone, method)

    assert (together.checkpoints / "checkpoint-4" / "pytorch_model_fsdp.bin").is_file()  # not DDP after all

    unbroken = weights_of(together, method), together.metrics_file.read_text()
    together.manifest_file("train").unlink()
    shutil.rmtree(together.checkpoints / "checkpoint-6")
    shutil.rmtree(together.trained(method))
    assert train_by(together, 2)["resumed_from"] == "checkpoint-4"
    for name, weight in weights_of(together, method).items():
        torch.testing.assert_close(weight, unbroken[0][name], rtol=0, atol=0)
    assert together.metrics_file.read_text() == unbroken[1]
