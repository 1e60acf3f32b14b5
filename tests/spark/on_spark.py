"""What the tests of whole runs on a cluster share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from tunewright import life
from tunewright import recipe as recipes
from tunewright.run import Run, read_json

TRAIN = {"method": "full", "epochs": 2, "learning_rate": 2e-3, "batch_size": 6, "save_steps": 4, "bf16": False}


def start(folder: Path, model: Path, data: dict[str, Any], backend: dict[str, Any], **sections: Any) -> Run:
    """A run of a small classification recipe, not begun."""
    given = {
        "name": "spark",
        "model": str(model),
        "task": "classification",
        "data": data,
        "train": TRAIN,
        "evaluate": {"bootstrap": 200},
        "deploy": {"test_rows": 5},
        "tracking": {"enabled": False},
        "backend": backend,
    }
    return life.start(recipes.loads(yaml.safe_dump(given | sections)), folder / "runs", resume=False)


def command(run: Run, until: str = "train") -> subprocess.Popen[str]:
    """`tunewright run RUN`, in a process that can be killed."""
    words = [sys.executable, "-m", "tunewright.cli", "run", str(run.path), "--until", until]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def when(what: Callable[[], Any], *, limit_s: float = 180) -> Any:
    """Wait until something is true; gives it."""
    deadline = time.monotonic() + limit_s
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)
    return found


def seen_step(run: Run, step: int) -> bool:
    return run.metrics_file.is_file() and f'"step": {step},' in run.metrics_file.read_text()


def pid_of_rank(run: Run, rank: int) -> int:
    return int(read_json(run.path / "jobs" / "ranks" / f"rank-{rank}.json")["pid"])


def executor_of_rank(run: Run, rank: int) -> psutil.Process:
    """The executor (JVM) that a training process is a descendant of."""
    above = psutil.Process(pid_of_rank(run, rank)).parents()
    return next(one for one in above if "CoarseGrainedExecutorBackend" in " ".join(one.cmdline()))


def executors(cluster: Path) -> list[psutil.Process]:
    """The executors (JVMs) of the cluster in a folder."""
    return [one for one in _of(cluster) if "CoarseGrainedExecutorBackend" in " ".join(one.cmdline())]


def worker(cluster: Path, number: int) -> psutil.Process:
    state = read_json(cluster / "cluster.json")
    return psutil.Process(next(one["pid"] for one in state["processes"] if one["name"] == f"worker-{number}"))


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def losses(run: Run) -> list[float]:
    return [entry["loss"] for entry in run.metrics() if "loss" in entry]


def _of(cluster: Path) -> list[psutil.Process]:
    found = []
    for one in psutil.process_iter(["pid"]):
        try:
            if Path(one.cwd()).is_relative_to(cluster):
                found.append(one)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
