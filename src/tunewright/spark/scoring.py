"""Evaluation on Spark: the test rows are shared out, and each executor's Python loads a model once and keeps it.

`DataFrame.mapInPandas` rather than `predict_batch_udf`: what a model says of a row has as many columns as the task, of
lists and tables among them, and a part is to go through the completer in batches of the completer's own making.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from tunewright import tracking
from tunewright.chat import Example
from tunewright.evaluate import measure
from tunewright.evaluate.measure import Progress
from tunewright.run import Run
from tunewright.spark import session, tasks
from tunewright.spark.settings import Settings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

ROWS_OF_A_PART = 64
"""A part has as many rows at least, so that a model's batches are full."""


def evaluate(run: Run, spark: SparkSession, asked: Settings) -> None:
    """The stage `evaluate`; evaluate/report.json is written last.

    Raises:
        TunewrightError: what an executor could not do, in its own words.
        StageError: Spark itself failed.
    """

    def ask(name: str, rows: Sequence[Example], progress: Progress) -> dict[str, Any]:
        return _ask(run, spark, asked, name, rows, progress)

    with tracking.attach(run) as tracker:
        measure.evaluate(run, tracker, ask)


def _ask(
    run: Run, spark: SparkSession, asked: Settings, name: str, rows: Sequence[Example], progress: Progress
) -> dict[str, Any]:
    """A model's answers to rows, in their order."""
    parts = asked.partitions or max(1, min(3 * session.num_slots(spark), len(rows) // ROWS_OF_A_PART))
    shares = np.array_split(np.arange(len(rows)), min(parts, len(rows)))
    sent = [(number, pickle.dumps([rows[row] for row in share])) for number, share in enumerate(shares)]
    frame = spark.createDataFrame(spark.sparkContext.parallelize(sent, len(sent)), "part long, rows binary")
    said = frame.mapInPandas(_answering(str(run.path), name), "part long, said binary")
    try:
        with session.followed(
            spark, f"{name} of {run.id}", len(sent), lambda done: progress(done * len(rows) // len(sent), len(rows))
        ):
            found = {row["part"]: pickle.loads(row["said"]) for row in said.collect()}
    except Exception as error:
        raise session.failed(error, f"asking the {name} model") from error
    answers: list[dict[str, Any]] = list(tasks.values(found[number] for number in range(len(sent))))
    progress(len(rows), len(rows))
    return {key: _joined([one[key] for one in answers]) for key in answers[0]}


def _joined(columns: list[Any]) -> Any:
    if isinstance(columns[0], np.ndarray):
        return np.concatenate(columns)
    return [value for column in columns for value in column]


# --- in a task ---

_models: dict[str, measure.Asked] = {}
"""The run whose models this Python worker holds."""


def _answering(path: str, name: str) -> Callable[[Iterator[Any]], Iterator[Any]]:
    """A function over the rows of a part."""

    def answer(frames: Iterator[Any]) -> Iterator[Any]:
        import pandas as pd

        for frame in frames:
            for part, rows in zip(frame["part"], frame["rows"], strict=True):
                (said,) = tasks.guarded(partial(_said, path, name, pickle.loads(rows)))
                yield pd.DataFrame({"part": [part], "said": [pickle.dumps(said)]})

    return answer


def _said(path: str, name: str, rows: list[Example]) -> dict[str, Any]:
    if path not in _models:
        _models.clear()
        _models[path] = measure.Asked(Run.open(path))
    return _models[path](name, rows, lambda done, total: None)
