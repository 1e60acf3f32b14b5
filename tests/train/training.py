"""What the tests of training share besides fixtures."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tunewright import work
from tunewright.run import Run
from tunewright.tracking import Tracker
from tunewright.train import supervised

Prepare = Callable[..., Run]
Spawn = Callable[[Run], BaseProcess]


def fit(run: Run) -> dict[str, Any]:
    """Train in this process, without tracking; gives the manifest."""
    supervised.fit(run, Tracker(run))
    return run.manifest("train")


def child(path: str) -> None:
    """What a spawned process does: `python -m tunewright.work train RUN`, its output into a file."""
    torch.set_num_threads(1)
    with open(Path(path) / "train.out", "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.exit(work.main(["train", path]))
