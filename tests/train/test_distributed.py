"""Training by several processes on one machine, with gloo, through the backend that users start it with."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from training import Prepare, Spawn, fit, fit_by, seen_step, several

from tunewright import ranks
from tunewright.backends.local import LocalBackend
from tunewright.run import Run, read_json
from tunewright.train import checkpoints

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
    together = prepare(train=TRAIN | options | {"batch_size": 8}, backend=TOGETHER)
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


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_number_of_processes_changes_nothing_that_is_learnt(prepare: Prepare, spawn: Spawn, method: str) -> None:
    """25 rows in steps of 8: the last step of an epoch has one row, which one of three processes gets."""
    train = TRAIN | {"method": method, "batch_size": 8, "learning_rate": 1e-3 if method == "full" else 5e-3}
    alone = prepare(train=train, rows=25)
    fit(alone)
    for world in (2, 3):
        run = prepare(train=train, rows=25)
        manifest = fit_by(run, spawn, world)
        assert manifest["steps"] == alone.manifest("train")["steps"] == 8
        same_training(run, alone)
        assert not list((run.path / "jobs" / "ranks").glob("*failure*"))


def same_training(one: Run, other: Run) -> None:
    """Losses to 1e-5 of their size, weights to 1e-5."""
    ours, theirs = ([entry["loss"] for entry in run.metrics() if "loss" in entry] for run in (one, other))
    assert ours == pytest.approx(theirs, rel=1e-5)
    name = "model.safetensors" if one.method == "full" else "adapter_model.safetensors"
    mine, its = (load_file(run.trained(one.method) / name) for run in (one, other))
    for key, weight in mine.items():
        torch.testing.assert_close(weight, its[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (3, 2)])
def test_another_number_of_processes_goes_on_with_the_same_samples(
    prepare: Prepare, spawn: Spawn, before: int, after: int
) -> None:
    train = TRAIN | {"batch_size": 8, "save_steps": 3, "save_strategy": "steps"}
    unbroken = prepare(train=train, rows=25)
    fit(unbroken)
    run = prepare(train=train, rows=25)
    processes = several(run, spawn, before) if before > 1 else [spawn(run)]
    while not (checkpoints.latest(run.checkpoints) and seen_step(run, 5)):
        assert any(one.is_alive() for one in processes), (run.path / "train.out").read_text()
        time.sleep(0.001)
    for one in processes:
        one.kill()
        one.join(60)
    if run.manifest_file("train").is_file():
        pytest.fail("training was over before it could be killed")
    if after > 1:
        fit_by(run, spawn, after)
    else:
        fit(run)
    same_training(run, unbroken)
    assert "another number of processes" in [event["event"] for event in run.events()]


def test_a_process_that_raises_ends_the_others_and_is_the_one_that_is_named(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare(train=TRAIN | {"batch_size": 8}, backend=TOGETHER)
    monkeypatch.setenv("PYTHONPATH", str(saboteur(run.path, "raise ValueError('the second process has had enough')")))
    backend = LocalBackend(run.recipe().backend.model_extra or {})
    job = backend.submit("train", run)
    while not (ranks.folder(run) / "rank-1-failure.json").is_file():
        assert backend.poll(job, run).state == "running"
        time.sleep(0.05)
    failed_at = time.monotonic()
    while (status := backend.poll(job, run)).state == "running":
        time.sleep(0.1)
        assert time.monotonic() - failed_at < 30
    assert status.state == "failed"
    assert status.message.startswith("training process 1 of 2: train failed: ValueError: the second process")
    trace = read_json(ranks.folder(run) / "rank-1-failure.json")["traceback"]
    assert "training_step" in trace


def test_a_process_that_hangs_is_named_with_its_step(prepare: Prepare, spawn: Spawn) -> None:
    run = prepare(train=TRAIN | {"batch_size": 8, "epochs": 500, "save_strategy": "no"})
    shutil.rmtree(ranks.folder(run), ignore_errors=True)
    lookout = ranks.Lookout(run, patience_s=6)
    processes = several(run, spawn, 2)
    try:
        while not (beat := ranks.folder(run) / "rank-1.json").is_file() or not read_json(beat)["step"]:
            time.sleep(0.01)
        os.kill(processes[1].pid or 0, signal.SIGSTOP)
        deadline = time.monotonic() + 60
        while (said := lookout.hangs()) is None:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert said.startswith("training process 1 of 2 (")
        assert "no sign of life" in said
        assert re.search(r"\(in step \d+, \w+\)", said)
    finally:
        for one in processes:
            one.kill()
            one.join(60)


def test_of_processes_that_all_beat_the_one_behind_is_named(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare(train=TRAIN | {"batch_size": 8}, backend=TOGETHER)
    monkeypatch.setenv("PYTHONPATH", str(saboteur(run.path, "import time; time.sleep(600)")))
    backend = LocalBackend(run.recipe().backend.model_extra or {})
    job = backend.submit("train", run)
    try:
        deadline = time.monotonic() + 300
        while not seen_step(run, 1):  # starting takes longer than the patience on a busy machine
            assert backend.poll(job, run).state == "running"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        lookout = ranks.Lookout(run, patience_s=8)
        while (said := lookout.hangs()) is None:
            assert backend.poll(job, run).state == "running"
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert said.startswith("training process 1 of 2 (")
        assert "in step 2, assembling" in said
        assert said.endswith("and the others wait for it")
    finally:
        for process in run_processes(job.id):
            process.kill()


def saboteur(folder: Path, does: str) -> Path:
    """A folder for PYTHONPATH, with which process 1 does something in the forward of its second step."""
    (folder / "sitecustomize.py").write_text(
        f"""
import os
if os.environ.get("RANK") == "1":
    from tunewright.train import steps
    plain = steps.Steps.training_step
    def training_step(self, *given, **options):
        if self.state.global_step == 1:
            from tunewright import ranks
            ranks.enter("assembling")
            {does}
        return plain(self, *given, **options)
    steps.Steps.training_step = training_step
"""
    )
    return folder


def run_processes(pid: str) -> list[psutil.Process]:
    parent = psutil.Process(int(pid))
    return [parent, *parent.children(recursive=True)]
