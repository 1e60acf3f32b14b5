"""Where rows come from, cut so that tasks can read them: ranges of bytes of JSON-lines files, row groups of Parquet
files, and other files whole.

A piece is read by the same functions that read the whole file on one machine, so a row is the same and stands at the
same `file:line`. A table that only Spark reads, or a hub data set, is written to Parquet beside the run first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunewright.data import sources
from tunewright.data.sources import Broken, Row
from tunewright.errors import DataError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

LEAST_BYTES = 2**18
"""A range of bytes is not cut smaller than this."""
GROUP_ROWS = 5000
"""Rows of a row group in what is written to be read in pieces."""


@dataclass(frozen=True)
class Piece:
    """Rows that one task reads."""

    kind: Literal["lines", "groups", "file"]
    path: str
    start: int = 0
    """lines: the first byte; groups: the first row group."""
    stop: int = 0
    number: int = 1
    """The number of the first line, or of the first row."""
    source: str | None = None
    """What rows are called after, where it is not the file."""
    may_break: bool = True


def of_file(path: Path, pieces: int) -> list[Piece]:
    """The pieces of one file: about as many as asked for, where its kind can be cut."""
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return cut(path, path.stat().st_size, pieces)
    if suffix == ".parquet":
        return _row_groups(path, pieces)
    return [Piece("file", str(path))]


def cut(path: Path, size: int, pieces: int, least: int = LEAST_BYTES) -> list[Piece]:
    """Ranges of bytes that together are the file. A line belongs to the range that it begins in."""
    step = max(least, -(-size // max(1, pieces)))
    return [Piece("lines", str(path), start, min(start + step, size)) for start in range(0, max(size, 1), step)]


def read(piece: Piece) -> Iterator[Row | Broken]:
    """The rows of a piece, in their order."""
    path = Path(piece.path)
    if piece.kind == "lines":
        return sources.rows_between(path, piece.start, piece.stop, piece.number)
    if piece.kind == "file":
        return iter(sources.READERS.get(path.suffix.lower(), sources.File)(path))
    return _groups(piece, path)


def count(piece: Piece) -> tuple[int, int]:
    """Lines (or rows) that a piece spans, and how many of them are rows."""
    path = Path(piece.path)
    if piece.kind == "lines":
        return sources.count_between(path, piece.start, piece.stop)
    if piece.kind == "file":
        rows = sum(1 for _ in read(piece))
        return rows, rows
    rows = sum(batch.num_rows for batch in _batches(piece, path))
    return rows, rows


def numbered(pieces: Sequence[Piece], counts: Sequence[tuple[int, int]]) -> list[Piece]:
    """Pieces whose first line has its number in its file, from what each of them spans."""
    found: list[Piece] = []
    number = 1
    for piece, (spans, _) in zip(pieces, counts, strict=True):
        begins = piece.start == 0 if piece.source is None else not found or found[-1].source != piece.source
        number = 1 if begins else number
        found.append(replace(piece, number=number))
        number += spans
    return found


def of_hub(source: str, key: str, folder: Path, pieces: int) -> tuple[list[Piece], Any]:
    """The pieces of a hub data set, which the driver fetches and writes where all see it; with it its columns."""
    from pyarrow import parquet

    dataset = sources.load_hub(source, key)
    path = folder / "rows.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    table = dataset.with_format("arrow")
    writer = None
    try:
        for start in range(0, len(dataset), GROUP_ROWS):
            batch = table[start : start + GROUP_ROWS]
            writer = writer or parquet.ParquetWriter(path, batch.schema)
            writer.write_table(batch)
    finally:
        if writer is not None:
            writer.close()
    if writer is None:
        return [], dataset.features
    found = [replace(piece, source=source, may_break=False) for piece in _row_groups(path, pieces)]
    return found, dataset.features


def of_table(spark: SparkSession, source: str, key: str, folder: Path, pieces: int) -> list[Piece]:
    """The pieces of a table. It has no order, so its rows are put into one that follows from what they say, and written
    down once: the same rows in any number of partitions give the same order.

    Raises:
        DataError: Spark cannot read it.
    """
    from pyspark.errors import PySparkException
    from pyspark.sql import functions

    kind, _, name = source.partition(":")
    target = folder / "rows"
    try:
        frame = spark.read.format("delta").load(name) if kind == "delta" else spark.table(name)
        said = functions.to_json(functions.struct(*[functions.col(f"`{column}`") for column in sorted(frame.columns)]))
        ordered = frame.withColumn("__said", said).orderBy(functions.xxhash64("__said"), "__said").drop("__said")
        ordered.write.mode("overwrite").option("maxRecordsPerFile", GROUP_ROWS).parquet(target.as_uri())
    except PySparkException as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{key}: {source}: Spark cannot read it: {first}") from error
    files = sorted(target.glob("part-*.parquet"))
    found = [piece for path in files for piece in _row_groups(path, 1)]
    return [replace(piece, source=source, may_break=False) for piece in found]


def _row_groups(path: Path, pieces: int) -> list[Piece]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            groups = file.num_row_groups
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{sources.shown(path)}: not a readable Parquet file: {error}") from None
    step = max(1, groups // max(1, pieces))
    return [Piece("groups", str(path), first, min(first + step, groups)) for first in range(0, groups, step)]


def _groups(piece: Piece, path: Path) -> Iterator[Row]:
    name = f"{piece.source or sources.shown(path)}:row "
    rows = itertools.chain.from_iterable(batch.to_pylist() for batch in _batches(piece, path))
    for number, fields in enumerate(rows, start=piece.number):
        yield Row(f"{name}{number}", fields)


def _batches(piece: Piece, path: Path) -> Iterator[Any]:
    return sources.parquet_batches(path, row_groups=range(piece.start, piece.stop))
