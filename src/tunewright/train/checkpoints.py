"""Checkpoints that can be trusted after a kill.

A checkpoint is a folder that Transformers' Trainer wrote, with `complete.json` written into it last, by atomic rename.
One without it was torn by a kill and is removed before training goes on.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from tunewright.errors import RunError
from tunewright.run import read_json, write_json

SEAL = "complete.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_config.json", "model.safetensors", "config.json")
"""Of a checkpoint's files, those that are the model (not the optimizer's state)."""


def seal(checkpoint: Path, **facts: Any) -> None:
    """Mark a checkpoint as whole: every file is on disk and has the size that is written down beside `facts`."""
    sizes = {}
    for path in sorted(checkpoint.iterdir()):
        if path.is_file() and path.name != SEAL:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
            sizes[path.name] = path.stat().st_size
    write_json(checkpoint / SEAL, {"step": step(checkpoint), "files": sizes, **facts})


def facts(checkpoint: Path) -> dict[str, Any]:
    """What was written down when the checkpoint was sealed."""
    sealed: dict[str, Any] = read_json(checkpoint / SEAL)
    return sealed


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was sealed and its files still have their sizes."""
    try:
        sizes = facts(checkpoint)["files"]
    except RunError:  # no seal, or a damaged one
        return False
    return all(
        (checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size for name, size in sizes.items()
    )


def latest(folder: Path) -> Path | None:
    """The last whole checkpoint, None if there is none."""
    return max((one for one in _all(folder) if is_whole(one)), key=step, default=None)


def sweep(folder: Path) -> list[Path]:
    """Remove torn checkpoints; gives what was removed."""
    torn = [one for one in _all(folder) if not is_whole(one)]
    for one in torn:
        shutil.rmtree(one)
    return torn


def rotate(folder: Path, keep: int | None, *, best: str | None = None) -> None:
    """Remove the oldest checkpoints beyond `keep`, never the best one."""
    if keep is None:
        return
    whole = sorted((one for one in _all(folder) if is_whole(one)), key=step)
    for one in whole[:-keep]:
        if best is None or Path(best).name != one.name:
            shutil.rmtree(one)


def step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _all(folder: Path) -> list[Path]:
    return [one for one in folder.glob("checkpoint-*") if one.name.rpartition("-")[2].isdigit()]
