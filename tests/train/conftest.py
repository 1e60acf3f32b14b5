"""Runs of a tiny model that are prepared and not trained yet, and training in a process that can be killed."""

from __future__ import annotations

import multiprocessing
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import training
import yaml
from training import Prepare, Spawn

from tunewright import life, work
from tunewright import recipe as recipes
from tunewright.run import Run
from tunewright.testing import tiny_data, tiny_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("train") / "model")


@pytest.fixture
def prepare(base: Path, tmp_path: Path) -> Prepare:
    """A fresh run up to `prepare`; keywords are sections of the recipe."""

    def begin(*, model: Path = base, rows: int = 24, **sections: Any) -> Run:
        data = tiny_data(tmp_path / "data", train=rows, test=8)
        sections["data"] = data | sections.get("data", {})
        given = {"name": "t", "model": str(model), "task": "classification", "tracking": {"enabled": False}}
        run = life.start(recipes.loads(yaml.safe_dump(given | sections)), tmp_path / "runs", resume=False)
        life.advance(run, until="check")
        work.prepare(run)
        return run

    return begin


@pytest.fixture(scope="session")
def spawn() -> Spawn:
    """Start `python -m tunewright.work train RUN` in a process of its own, forked from one that has the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["training", "tunewright.train.supervised", "tunewright.train.reward", "tunewright.train.preference", "peft"]
    )

    def start(run: Run, **environment: str) -> BaseProcess:
        process = context.Process(target=training.child, args=(str(run.path), environment))
        process.start()
        return process

    return start
