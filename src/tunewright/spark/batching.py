"""Batch inference on Spark: each task answers a piece of the input with the packaged model, which its Python worker
loads once, and writes the parts itself, so the driver is sent two numbers for each piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.data import pieces, sources
from tunewright.package import batch
from tunewright.package.batch import Asked, Share
from tunewright.package.predictor import Predictor
from tunewright.spark import session, tasks

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def answer(asked: Asked, spark: SparkSession, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """A whole batch; gives its summary."""
    here = str(Path.cwd())

    def plan(folder: Path) -> list[Share]:
        found = []
        for number, source in enumerate(asked.inputs):
            if sources.is_table(source):
                found += pieces.of_table(spark, source, "input", folder / f"source-{number}", session.num_slots(spark))
            else:
                found += batch.of_input(source, 3 * session.num_slots(spark))
        counts = _collect(spark, found, lambda piece: pieces.count(piece), here, "counting rows")
        return batch.shared_out(found, counts, asked.limit)

    shares = batch.begin(asked, plan)
    rows = sum(share.rows for share in shares)
    with session.followed(
        spark, f"batch {asked.output}", len(shares), lambda done: progress(rows * done // len(shares), rows)
    ):
        counts = _collect(spark, shares, lambda share: _answered(asked, share), here, "answering")
    total = {key: sum(one[key] for one in counts) for key in ("rows", "errors")}
    progress(rows, rows)
    return batch.finish(asked, shares, total)


def _collect(spark: SparkSession, given: list[Any], work: Callable[[Any], Any], here: str, doing: str) -> list[Any]:
    def one(item: Any) -> Iterator[Any]:
        sources.see_from(Path(here))
        return tasks.guarded(lambda: work(item))

    try:
        found = spark.sparkContext.parallelize(given, max(1, len(given))).flatMap(one).collect()
    except Exception as error:
        raise session.failed(error, doing) from error
    return list(tasks.values(found))


# --- in a task ---

_held: dict[str, Predictor] = {}
"""The model that this Python worker holds."""


def _answered(asked: Asked, share: Share) -> dict[str, int]:
    return batch.answer(asked, share, lambda: _predictor(asked))


def _predictor(asked: Asked) -> Predictor:
    key = str(asked)
    if key not in _held:
        _held.clear()
        _held[key] = Predictor(Path(asked.package), max_new_tokens=asked.max_new_tokens, batch_rows=asked.batch_rows)
    return _held[key]
