"""What a fine-tuning job asks for, as a recipe: OpenAI's parameters and rules, and the operator's settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tunewright import recipe as recipes
from tunewright.errors import RecipeError
from tunewright.recipe import Grpo, Recipe
from tunewright.server import models, store, tables
from tunewright.server.state import Server

KEPT_CHECKPOINTS = 3
PIECE = 1 << 20
"""Bytes of a file that are looked at together."""


def recipe_of(server: Server, job: dict[str, Any]) -> tuple[Recipe, list[str]]:
    """What a job asks for, as a recipe; and which of the operator's settings for all jobs are not for one like this.

    Raises:
        TunewrightError: it cannot be one; the message is about the job.
    """
    start = models.find(server, job["model"])
    kind = job["method"]["type"]
    asked = job["method"][kind].get("hyperparameters", {})
    training = server.blobs.local(job["training_file"], ".jsonl")
    rows = count_lines(training)
    task = {"supervised": "chat", "dpo": "preference", "reinforcement": "reward"}[kind]
    train: dict[str, Any] = {
        "epochs": _given(asked, "n_epochs", lambda: _epochs(rows)),
        "batch_size": _given(asked, "batch_size", lambda: _batch_size(rows)),
        "seed": job["seed"],
        "save_strategy": "epoch",
        "save_total_limit": KEPT_CHECKPOINTS,
    }
    if start.kind == "adapter":
        train["adapter"] = str(start.folder)
    data: dict[str, Any] = {"train": str(training)}
    if job["validation_file"] is not None:
        validation = str(server.blobs.local(job["validation_file"], ".jsonl"))
        data["test"] = validation
        if kind != "reinforcement":  # which has no loss to measure there
            data["validation"] = validation
            train["eval_strategy"] = "epoch"
    else:
        data["split"] = {"test": 0}  # every row is trained on, as where the client's code comes from
    if kind == "dpo":
        beta = asked.get("beta", "auto")
        train["dpo"] = {} if beta == "auto" else {"beta": beta}
    made: dict[str, Any] = {
        "name": job["id"],
        "model": str(start.folder) if start.kind == "full" else start.source,
        "task": task,
        "data": data,
        "train": train,
        "evaluate": {"must_beat": None},
        "package": {"formats": ["safetensors"]},
    }
    if start.revision is not None and start.kind != "full":
        made["revision"] = start.revision
    if kind == "reinforcement":
        train["batch_size"] *= Grpo().num_generations  # of prompts there, of drawn answers here
        made["grader"] = job["method"][kind]["grader"]
    with server.store.begin() as connection:
        named = store.row(connection, tables.bases, name=start.base)
    settings = [*(named["recipe"] if named else ()), *server.settings.overrides]
    base, unused = _with_settings(json.dumps(made), job["id"], settings, plain=task == "chat" and start.kind == "base")
    multiplier = asked.get("learning_rate_multiplier", "auto")
    if multiplier == "auto" or not multiplier:
        return base, unused
    rate = base.train.learning_rate
    if rate is None:
        rate = recipes.default_rate(base.task, base.train.method)
    faster = base.train.model_copy(update={"learning_rate": rate * multiplier})
    return base.model_copy(update={"train": faster}), unused


def _with_settings(made: str, job_id: str, settings: Sequence[str], *, plain: bool) -> tuple[Recipe, list[str]]:
    """A job's recipe with the operator's settings, which were made for supervised jobs on a base (`plain`). One that
    another kind of job cannot have, such as the form of a fresh adapter where one is gone on with, is left out."""
    try:
        return recipes.loads(made, job_id, settings), []
    except RecipeError:
        if plain:
            raise
    used: list[str] = []
    unused = []
    for one in settings:
        try:
            recipes.loads(made, job_id, [*used, one])
            used.append(one)
        except RecipeError as error:
            unused.append(f"The setting {one} is not used for this job: {error}")
    return recipes.loads(made, job_id, used), unused


def _given(asked: dict[str, Any], key: str, otherwise: Callable[[], Any]) -> Any:
    value = asked.get(key, "auto")
    return otherwise() if value in ("auto", None) else value


def _epochs(rows: int) -> int:
    """OpenAI's own rule (its cookbook's data check): three, more for few examples, fewer for very many."""
    if rows * 3 < 100:
        return max(1, min(25, 100 // max(rows, 1)))
    return max(1, 25000 // rows) if rows * 3 > 25000 else 3


def _batch_size(rows: int) -> int:
    """A five-hundredth of the examples, as OpenAI has it; 4 for a small set, so that a step is no guess."""
    return int(max(1, min(256, max(rows // 500, min(4, rows // 10)))))


def count_lines(path: Path) -> int:
    """Lines that say something, however long they are."""
    counted, says = 0, False
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            going_on, *fresh = piece.split(b"\n")
            says = says or bool(going_on.strip())
            for part in fresh:
                counted, says = counted + says, bool(part.strip())
    return counted + says
