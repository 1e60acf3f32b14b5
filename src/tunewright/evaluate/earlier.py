"""An earlier run's answers to the rows that a run is tested on: one more baseline (`evaluate.against`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tunewright.chat import Example
from tunewright.data import prepare
from tunewright.errors import DataError
from tunewright.evaluate.metrics import MEANS, OTHER
from tunewright.recipe import Recipe
from tunewright.run import Run


def answers(earlier: Run, recipe: Recipe, test: Sequence[Example], labels: list[str] | None) -> dict[str, Any]:
    """What the tuned model of an earlier run answered to these rows.

    Raises:
        DataError: it was tested on other rows, or has another task.
    """
    import pandas as pd

    if (task := earlier.recipe().task) != recipe.task:
        raise DataError(f"evaluate.against: {earlier.path} has task: {task}, and this run has {recipe.task}")
    frame = pd.read_parquet(earlier.predictions_file)
    frame = frame[frame.model == "tuned"]
    always = frame.columns.isin(["loss_sum", *MEANS])  # of a model that diverged no number is left
    frame = frame.loc[:, frame.notna().any() | always].set_index("id")
    known = {_question(example): example.id for example in prepare.examples(earlier, "test")}
    ids = [known.get(_question(example)) for example in test]
    if not frame.index.is_unique or not all(one in frame.index for one in ids):
        raise DataError(
            f"evaluate.against: {earlier.path} was tested on other rows than these; name a run with the same test set, "
            "or leave it out"
        )
    frame = frame.loc[ids]
    said: dict[str, Any] = {key: frame[key].tolist() for key in frame if key not in ("model", "label", "rejected")}
    if labels is not None:
        theirs: list[str] = earlier.manifest("prepare")["labels"]
        rows = said.pop("probabilities", None)
        if rows is not None and len(rows[0]) == len(theirs) and set(theirs) == set(labels):
            said["probabilities"] = np.array([list(row) for row in rows])[:, [theirs.index(one) for one in labels]]
        said["prediction"] = [one if one in labels else OTHER for one in said["prediction"]]
    if "loss_sum" in said:
        said["losses"] = list(zip(said.pop("loss_sum"), map(int, said.pop("tokens")), strict=True))
    return said


def comparable(before: dict[str, Any], tuned: dict[str, Any], recipe: Recipe, earlier: Run) -> dict[str, Any]:
    """An earlier run's answers, without losses that are of other tokens.

    Raises:
        DataError: the verdict is about the loss, and theirs is of other tokens.
    """
    counts = [[count for _, count in said.get("losses", ())] for said in (before, tuned)]
    if counts[0] == counts[1]:
        return before
    if recipe.metric == "loss":
        raise DataError(
            f"evaluate.against: {earlier.path} has another tokenizer or template, so its loss a token cannot be "
            "compared; leave it out, or choose another evaluate.metric"
        )
    return {key: values for key, values in before.items() if key != "losses"}


def _question(example: Example) -> str:
    """What a test row asks and expects, wherever it stands and whatever the system message."""
    asked = tuple(one for one in example.messages if one.role not in ("system", "developer"))
    return replace(example, messages=asked).sha256()
