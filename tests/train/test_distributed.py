"""Training by several processes on one machine, with gloo, through the backend that users start it with."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training import Prepare, fit

from tunewright.backends.local import LocalBackend
from tunewright.run import Run

TRAIN = {"method": "full", "epochs": 2, "learning_rate": 1e-3, "bf16": False, "seed": 3}


def train_by(run: Run, processes: int) -> dict[str, Any]:
    backend = LocalBackend({"processes": processes, "threads": 1})
    job = backend.submit("train", run)
    while (status := backend.poll(job, run)).state == "running":
        time.sleep(0.2)
    assert status.state == "done", (status, run.log_file("train").read_text())
    return run.manifest("train")


def test_two_processes_end_with_the_loss_and_weights_of_one(prepare: Prepare) -> None:
    together = prepare(train=TRAIN | {"batch_size": 4})
    manifest = train_by(together, 2)
    alone = prepare(train=TRAIN | {"batch_size": 8})
    fit(alone)
    assert manifest["steps"] == alone.manifest("train")["steps"] == 6
    ours, theirs = ([entry["loss"] for entry in run.metrics() if "loss" in entry] for run in (together, alone))
    assert ours == pytest.approx(theirs, rel=1e-5)
    one, other = (load_file(run.trained("full") / "model.safetensors") for run in (together, alone))
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], rtol=1e-3, atol=1e-5)
    events = [event["event"] for event in together.events() if event["stage"] == "train"]
    assert events.count("started") == 1
    assert not list(together.path.rglob("*.new"))


def losses(run: Run) -> list[float]:
    return [entry["loss"] for entry in run.metrics() if "loss" in entry]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_sharded_weights_end_as_those_of_one_process(prepare: Prepare, method: str) -> None:
    train = TRAIN | {"method": method}
    together = prepare(
        train=train | {"batch_size": 4, "fsdp": "full_shard"}, backend={"kind": "local", "processes": 2, "threads": 1}
    )
    train_by(together, 2)
    alone = prepare(train=train | {"batch_size": 8})
    fit(alone)
    print(together.log_file("train").read_text())
    print(losses(together), losses(alone))
    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)
