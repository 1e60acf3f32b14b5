"""The stage `train`: by the method that the recipe's task asks for, with MLflow told what is trained on what."""

from __future__ import annotations

import os

from tunewright import ranks, tracking
from tunewright.recipe import NOT_IN_EVERY_TASK
from tunewright.run import Run
from tunewright.train import preflight, together


def train(run: Run, attempt: str | None = None) -> None:
    """Train, in this process or in this one of several (RANK); train/manifest.json is written last. `attempt` is what
    `ranks.begin` was told, where somebody looks on."""
    with ranks.reporting(run, attempt):
        _train(run)
        together.leave()


def _train(run: Run) -> None:
    recipe = run.recipe()
    if recipe.task == "preference":
        from tunewright.train.preference import fit
    elif recipe.task == "reward":
        from tunewright.train.reward import fit
    else:
        from tunewright.train.supervised import fit
    preflight.before(run)
    unread = {key for key, tasks in NOT_IN_EVERY_TASK.items() if recipe.task not in tasks}
    if int(os.environ.get("RANK", 0)) > 0:
        fit(run, tracking.Tracker(run))  # the first process tells MLflow
        return
    with tracking.attach(run) as tracker:
        tracker.params(_flat(recipe.model_dump(mode="json", exclude={"tracking": True, "train": unread})))
        tracker.params(
            {"base_model": run.resolved()["model"]["source"], "revision": run.resolved()["model"]["revision"]}
        )
        checks = run.manifest("prepare")
        tracker.tags({f"data.{split}.sha256": facts["sha256"] for split, facts in checks["splits"].items()})
        fit(run, tracker)


def _flat(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Nested keys as dotted ones, without those that are not set."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = value
    return flat
