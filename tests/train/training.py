"""What the tests of training share besides fixtures."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from tunewright import ranks, work
from tunewright.run import Run
from tunewright.tracking import Tracker
from tunewright.train import checkpoints, exact, supervised

Prepare = Callable[..., Run]
Spawn = Callable[..., BaseProcess]


def fit(run: Run) -> dict[str, Any]:
    """Train in this process, without tracking; gives the manifest."""
    task = run.recipe().task
    if task == "preference":
        from tunewright.train import preference

        preference.fit(run, Tracker(run))
    elif task == "reward":
        from tunewright.train import reward

        reward.fit(run, Tracker(run))
    else:
        supervised.fit(run, Tracker(run))
    return run.manifest("train")


def result(run: Run) -> tuple[dict[str, str], str, int]:
    """Everything that must not depend on how often a run was ended."""
    manifest = run.manifest("train")
    return manifest["sha256"], run.metrics_file.read_text(), manifest["steps"]


def seen_step(run: Run, step: int) -> bool:
    return run.metrics_file.is_file() and f'"step": {step},' in run.metrics_file.read_text()


def torn(run: Run) -> bool:
    """A checkpoint is being written at this moment."""
    return any(not (one / checkpoints.SEAL).exists() for one in run.checkpoints.glob("checkpoint-*"))


def end(run: Run, spawn: Spawn, how: signal.Signals, when: Any) -> int | None:
    """Train in a process of its own and send it a signal once `when(run)` holds; gives its exit code."""
    process = spawn(run)
    assert process.pid is not None
    while process.is_alive():
        if when(run):
            os.kill(process.pid, how)
            break
        time.sleep(0.0005)
    process.join(60)
    code = process.exitcode
    process.close()
    return code


def several(run: Run, spawn: Spawn, world: int) -> list[BaseProcess]:
    """Processes that train together, as torchrun would start them."""
    shutil.rmtree(ranks.folder(run), ignore_errors=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [spawn(run, **place, RANK=rank, LOCAL_RANK=rank) for rank in map(str, range(world))]


def two(run: Run, spawn: Spawn) -> list[BaseProcess]:
    return several(run, spawn, 2)


def fit_by(run: Run, spawn: Spawn, world: int) -> dict[str, Any]:
    """Train in several processes to the end; gives the manifest."""
    for process in several(run, spawn, world):
        process.join(240)
        assert process.exitcode == 0, (run.path / "train.out").read_text()
    return run.manifest("train")


def fit_by_two(run: Run, spawn: Spawn) -> dict[str, Any]:
    return fit_by(run, spawn, 2)


def stop_at(run: Run, step: int) -> None:
    """Train in this process, which gets a SIGTERM during a step."""

    class AtStep(exact.Watch):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "Watch", AtStep)
        fit(run)


def child(path: str, environment: dict[str, str]) -> None:
    """What a spawned process does: `python -m tunewright.work train RUN`, its output into a file."""
    os.environ |= environment
    torch.set_num_threads(1)
    with open(Path(path) / "train.out", "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.exit(work.main(["train", path]))
