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

TOGETHER = {"kind": "local", "processes": 2, "threads": 1}
TRAIN = {"method": "full", "epochs": 2, "learning_rate": 1e-3, "bf16": False, "seed": 3}


def train_by_its_backend(run: Run) -> dict[str, Any]:
    backend = LocalBackend(run.recipe().backend.model_extra or {})
    job = backend.submit("train", run)
    while (status := backend.poll(job, run)).state == "running":
        time.sleep(0.2)
    assert status.state == "done", (status, run.log_file("train").read_text())
    return run.manifest("train")


def test_two_processes_end_with_the_loss_and_weights_of_one(prepare: Prepare) -> None:
    options = {"ddp_bucket_cap_mb": 1, "ddp_find_unused_parameters": True, "ddp_broadcast_buffers": False}
    together = prepare(train=TRAIN | options | {"batch_size": 4}, backend=TOGETHER)
    manifest = train_by_its_backend(together)
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
