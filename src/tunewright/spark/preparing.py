"""Data preparation as Spark jobs. It leaves the very bytes that one machine leaves (`data.prepare`).

For each split: count the lines of each piece, so that every row knows its `file:line`; where a limit draws rows, put
them into the order that one machine draws; then shape, check, clip and render part by part, each task writing files of
its own, which the driver puts behind one another. What the driver holds is a few numbers for each part; with a limit
also eight bytes for each row that there is, for the order of the draw.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from tunewright import chat, models
from tunewright.data import account, pieces, shapes, sources, tokens
from tunewright.data import prepare as preparing
from tunewright.data.account import Kept
from tunewright.data.findings import Finding, Findings
from tunewright.data.pieces import Piece
from tunewright.data.prepare import SPLITS, STEPS, Assembled, Rules
from tunewright.data.sources import Broken, Row, Table
from tunewright.errors import DataError, TunewrightError
from tunewright.models import ModelRef
from tunewright.recipe import Recipe
from tunewright.run import Run, write_json
from tunewright.spark import session, tasks
from tunewright.spark.settings import Settings

if TYPE_CHECKING:
    from pyspark import RDD
    from pyspark.sql import SparkSession

One = TypeVar("One")
ROWS_OF_A_PART = 2000
PART_OF = 2**40
"""A row's number in the whole is its part's times this, and its own in it."""
MAX_PIECES = 512


def prepare(run: Run, spark: SparkSession, asked: Settings) -> None:
    """Prepare a run's data; data/checks.json is written last.

    Raises:
        DataError: as `data.prepare.write`, in the same words.
        StageError: Spark itself failed.
    """
    run.manifest_file("prepare").unlink(missing_ok=True)  # an old one would vouch for files that are being replaced
    for left in run.manifest_file("prepare").parent.glob(".spark*"):
        shutil.rmtree(left)
    scratch = run.manifest_file("prepare").parent / ".spark"
    scratch.mkdir(parents=True)
    try:
        _Preparation(run, spark, asked, scratch).do()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class _Preparation:
    """One preparation under way."""

    def __init__(self, run: Run, spark: SparkSession, asked: Settings, scratch: Path) -> None:
        self.run, self.spark, self.asked, self.scratch = run, spark, asked, scratch
        self.recipe = run.recipe()
        self.ref = ModelRef.from_dict(run.resolved()["model"])
        self.tokenizer = models.load_tokenizer(self.ref)
        self.equipment = chat.equip(self.tokenizer)
        self.slots = session.num_slots(spark)
        self.here = Path.cwd()
        self.done = self.total = 0

    def do(self) -> None:
        recipe = self.recipe
        max_length = preparing.room(recipe, self.ref)
        given, notes = self._splits()
        result = Assembled(preparing.sections(given), max_length=max_length)
        self.total = sum(split.rows for split in given.values())
        limits: dict[str, int] = {}
        parts: dict[str, int] = {}
        for name, split in given.items():
            rows = self._rows(split)
            shape = shapes.recognise(
                recipe, (row for row in self._head(split, rows) if isinstance(row, Row)), split.classes
            )
            table = Table(split.names, _Counted(split.rows), split.classes)
            if name == "train" and recipe.task == "classification":
                result.labels = preparing.declared_labels(recipe, table)
                if result.labels is None:
                    result.labels = self._labels(rows, shape, split)
                limits = preparing.label_limits(result.labels, self.ref, self.tokenizer, self.equipment, max_length)
            if name == "test":
                shapes.check_slices(recipe, self._head(split, rows))
            unwanted = preparing.unwanted(recipe.data.without if name == "train" else None)
            rules = Rules(recipe, name, result.labels, limits, max_length, unwanted)
            kept = Kept(max_length if recipe.task == "pretraining" else None)
            done = self._sift(rules, rows, shape, split, kept, result.findings)
            parts[name] = len(done)
            preparing.close_split(result, rules, table, kept, self.tokenizer, self.equipment)
            tokens.join(self.run, name, done)
        for note in notes:
            result.findings.add("notes", note)
        if {"train", "test"} <= given.keys():
            for finding in self._seen(parts):
                result.findings.add("seen", finding)
        result.findings.write(self.run.findings_file)
        rendering = self.equipment.to_dict() | tokens.made_by(self.tokenizer)
        write_json(self.run.manifest_file("prepare"), result.checks() | {"rendering": rendering})

    # --- what there is ---

    def _splits(self) -> tuple[dict[str, _Split], list[Finding]]:
        """The rows of each split after hold-out and selection, with notes about splits."""
        data = self.recipe.data
        label = (data.label or "label") if self.recipe.task == "classification" else None
        found = {
            split: self._split(split, given, label) for split in SPLITS if (given := getattr(data, split)) is not None
        }
        for name, split in found.items():
            if not split.rows:
                raise preparing.without_rows(name, split.names)
        if "test" not in found and data.split.test:
            whole = found["train"]
            counts = self._collect(whole.pieces, _count_held, data.split.test, data.split.seed)
            for name, held in (("train", False), ("test", True)):
                of_pieces = [both[held] for both in counts]
                side = (data.split.test, data.split.seed, held)
                found[name] = replace(whole, side=side, rows=sum(of_pieces), of_pieces=of_pieces)
                if not found[name].rows:
                    raise DataError(preparing.too_few_to_hold_out(whole.rows, data.split.test))
        found = {split: found[split] for split in SPLITS if split in found}
        notes = []
        for name, split in found.items():
            limit = getattr(data.limit, name)
            if limit is None:
                continue
            if limit > split.rows:
                notes.append(preparing.limit_not_reached(name, split.names, limit, split.rows))
            found[name] = self._selected(split, limit)
        return found, notes

    def _split(self, name: str, given: Sequence[str], label: str | None) -> _Split:
        key = f"data.{name}"
        wanted = min(MAX_PIECES, 3 * self.slots if self.asked.partitions is None else self.asked.partitions)
        found: list[Piece] = []
        classes: tuple[str, ...] | None = None
        for number, source in enumerate(given):
            folder = self.scratch / f"source-{name}-{number}"
            if sources.is_table(source):
                found += pieces.of_table(self.spark, source, key, folder, wanted)
            elif sources.is_file(source):
                found += [piece for path in sources.files(source, key) for piece in pieces.of_file(path, wanted)]
            else:
                of_hub, features = pieces.of_hub(source, key, folder, wanted)
                found += of_hub
                feature: Any = features.get(label) if label else None
                classes = tuple(feature.names) if hasattr(feature, "names") else classes
        counts = self._collect(found, _count)
        of_pieces = [rows for _, rows in counts]
        return _Split(tuple(given), pieces.numbered(found, counts), sum(of_pieces), of_pieces, classes)

    def _selected(self, split: _Split, limit: int) -> _Split:
        """The split with a place for each row that is drawn, and behind them for those that cannot be read."""
        order = preparing.shuffled(split.rows, self.recipe.data.limit.seed)[:limit]
        starts = np.cumsum([0, *split.of_pieces])
        broken: list[int] = []
        if any(piece.may_break for piece in split.pieces):
            for start, found in zip(starts, self._collect(split.pieces, _broken, split.side), strict=False):
                broken += [int(start) + number for number in found]
        order = np.append(order, np.setdiff1d(np.array(broken, dtype=np.int64), order)).astype(np.int64)
        places = np.argsort(order, kind="stable")
        numbers = order[places]
        cuts = np.searchsorted(numbers, starts)
        chosen = [
            (numbers[low:high] - start, places[low:high])
            for low, high, start in zip(cuts[:-1], cuts[1:], starts, strict=False)
        ]
        return replace(split, chosen=chosen, rows=len(order))

    # --- jobs ---

    def _rows(self, split: _Split) -> RDD[Any]:
        """(place, row) of a split in its order, in parts of like size."""
        context = self.spark.sparkContext
        parts = self.asked.partitions or max(1, min(3 * self.slots, split.rows // ROWS_OF_A_PART))
        chosen = split.chosen or [None] * len(split.pieces)
        starts = np.cumsum([0, *split.of_pieces])
        work = [
            (piece, split.side, picked, int(start))
            for piece, picked, start in zip(split.pieces, chosen, starts, strict=False)
            if picked is None or len(picked[0])
        ]
        here = str(self.here)
        rows = context.parallelize(work, max(1, len(work))).flatMap(lambda one: _read_there(one, here))
        whole = split.rows
        in_order = split.chosen is None
        if in_order and (len(work) >= parts or self.asked.partitions == len(work)):
            return rows  # each piece is a part, and they stand in their order
        return rows.repartitionAndSortWithinPartitions(parts, lambda place: min(parts - 1, place * parts // whole))

    def _head(self, split: _Split, rows: RDD[Any]) -> Iterator[Row | Broken]:
        """The first rows of a split."""
        if split.chosen is None:
            for piece, start in zip(split.pieces, np.cumsum([0, *split.of_pieces]), strict=False):
                yield from (row for _, row in _read((piece, split.side, None, int(start))))
            return
        first = self._run(lambda: rows.filter(lambda one: one[0] < shapes.LOOKED_AT).collect(), "reading rows")
        yield from (row for _, row in sorted(first, key=lambda one: one[0]))

    def _labels(self, rows: RDD[Any], shape: shapes.Shape | None, split: _Split) -> list[str]:
        maker = _Maker(self.recipe, shape.first if shape else None, split.classes, self.ref, str(self.here))
        found = self._run(
            lambda: rows.mapPartitions(lambda part: tasks.guarded(lambda: _labels_of(maker, part))).collect(),
            "reading labels",
        )
        return preparing.sorted_labels({label for labels in tasks.values(found) for label in labels})

    def _sift(
        self,
        rules: Rules,
        rows: RDD[Any],
        shape: shapes.Shape | None,
        split: _Split,
        kept: Kept,
        findings: Findings,
    ) -> list[tokens.Part]:
        """Every row of a split through its checks; gives the parts in their order."""
        maker = _Maker(self.recipe, shape.first if shape else None, split.classes, self.ref, str(self.here))
        folder = self.scratch / f"parts-{rules.split}"
        folder.mkdir()
        threads = self.asked.threads or 1
        done = rows.mapPartitionsWithIndex(
            lambda number, part: tasks.guarded(lambda: _sift_part(maker, rules, number, part, folder, threads))
        )
        parts, before = rows.getNumPartitions(), self.done

        def told(there: int) -> None:
            self.run.set_progress("prepare", before + split.rows * there // parts, self.total)

        with session.followed(self.spark, f"prepare {rules.split} of {self.run.id}", parts, told):
            found: list[_Sifted] = list(tasks.values(self._run(done.collect, "preparing rows")))
        for sifted in found:
            kept.merge(sifted.counts)
            kept.digest.update(sifted.digests.read_bytes())
            for step, (path, counts, first) in sifted.findings.items():
                findings.absorb((rules.split, step), path, counts, first)
        self.done += split.rows
        self.run.set_progress("prepare", self.done, self.total)
        return [sifted.part for sifted in found]

    def _seen(self, parts: dict[str, int]) -> Iterator[Finding]:
        """Test rows whose text stands among the training rows too, by a join over the hashes."""
        from pyspark.sql import functions

        def said(split: str) -> Any:
            return self.spark.read.parquet((self.scratch / f"parts-{split}").as_uri() + "/*.seen.parquet")

        train = said("train").groupBy("hash").agg(functions.min_by("where", "place").alias("trained"))
        both = said("test").join(train, "hash").orderBy("place").select("where", "trained")
        rows = self._run(
            lambda: both.toLocalIterator(prefetchPartitions=True), "looking for test rows among the others"
        )
        for row in rows:
            yield account.seen_in_training(row["where"], row["trained"])

    def _collect(self, found: Sequence[Piece], work: Callable[..., One], *more: Any) -> list[One]:
        """What a function says of each piece, in their order."""
        here = str(self.here)
        context = self.spark.sparkContext

        def one(piece: Piece) -> Iterator[Any]:
            sources.see_from(Path(here))
            return tasks.guarded(lambda: work(piece, *more))

        job = context.parallelize(found, max(1, len(found))).flatMap(one)
        return list(tasks.values(self._run(job.collect, "reading files")))

    def _run(self, job: Callable[[], Any], doing: str) -> Any:
        try:
            return job()
        except TunewrightError:
            raise
        except Exception as error:
            raise session.failed(error, doing) from error


@dataclass(frozen=True)
class _Split:
    """The rows of a split, as they are cut."""

    names: tuple[str, ...]
    pieces: list[Piece]
    rows: int
    of_pieces: list[int]
    """Rows of each piece (of its side, where rows are held out)."""
    classes: tuple[str, ...] | None
    side: tuple[float, int, bool] | None = None
    """Share, seed, and whether it is the side that is held out."""
    chosen: list[Any] | None = None
    """Of each piece, which rows are drawn, and their places."""


class _Counted(sources.Rows):
    """Rows that are elsewhere: how many there are is all that is known here."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[Row | Broken]:
        raise TypeError("these rows are read by tasks")

    def pick(self, numbers: Any) -> Iterator[Row | Broken]:
        raise TypeError("these rows are read by tasks")


@dataclass(frozen=True)
class _Sifted:
    """What a task says of its part."""

    part: tokens.Part
    digests: Path
    counts: dict[str, Any]
    findings: dict[str, tuple[Path, Counter[tuple[str, str, str]], list[Finding]]]


@dataclass(frozen=True)
class _Maker:
    """What a task makes its shape and its tokenizer from; both are not sent, since neither can be."""

    recipe: Recipe
    first: Row | None
    classes: tuple[str, ...] | None
    ref: ModelRef
    here: str

    def shape(self) -> shapes.Shape | None:
        sources.see_from(Path(self.here))
        return shapes.recognise(self.recipe, [self.first] if self.first else [], self.classes)


# --- in a task ---

_tokenizers: dict[ModelRef, Any] = {}
"""Loaded, and given their chat template, once for each Python worker."""


def _count(piece: Piece) -> tuple[int, int]:
    return pieces.count(piece)


def _count_held(piece: Piece, share: float, seed: int) -> tuple[int, int]:
    """Rows of a piece that stay, and that are held out."""
    held = [preparing.held_out(row, share, seed) for row in pieces.read(piece)]
    return held.count(False), held.count(True)


def _broken(piece: Piece, side: tuple[float, int, bool] | None) -> list[int]:
    """The numbers of a piece's rows that cannot be read."""
    if not piece.may_break:
        return []
    return [number for number, row in enumerate(_of_side(piece, side)) if isinstance(row, Broken)]


def _of_side(piece: Piece, side: tuple[float, int, bool] | None) -> Iterator[Row | Broken]:
    rows = pieces.read(piece)
    if side is None:
        return rows
    share, seed, held = side
    return (row for row in rows if preparing.held_out(row, share, seed) == held)


def _read_there(one: tuple[Piece, Any, Any, int], here: str) -> Iterator[tuple[int, Row | Broken]]:
    sources.see_from(Path(here))
    return _read(one)


def _read(one: tuple[Piece, Any, Any, int]) -> Iterator[tuple[int, Row | Broken]]:
    """The rows of a piece that are wanted, each with its place."""
    piece, side, picked, start = one
    rows = enumerate(_of_side(piece, side))
    if picked is None:
        yield from ((start + number, row) for number, row in rows)
        return
    places = dict(zip(picked[0].tolist(), picked[1].tolist(), strict=True))
    yield from ((places[number], row) for number, row in rows if number in places)


def _labels_of(maker: _Maker, rows: Iterator[tuple[int, Row | Broken]]) -> set[str]:
    shape = maker.shape()
    return preparing.labels_of((row for _, row in rows), shape)


def _sift_part(
    maker: _Maker,
    rules: Rules,
    number: int,
    rows: Iterator[tuple[int, Row | Broken]],
    folder: Path,
    threads: int,
) -> _Sifted:
    """One part through its checks, into files of its own. They are written under names of this attempt and renamed at
    the end, since a task may run twice."""
    shape = maker.shape()
    if maker.ref not in _tokenizers:
        _tokenizers[maker.ref] = models.load_tokenizer(maker.ref)
        chat.equip(_tokenizers[maker.ref])
    tokenizer = _tokenizers[maker.ref]
    findings = Findings([(rules.split, step) for step in STEPS])
    kept = Kept(rules.max_length if rules.recipe.task == "pretraining" else None)
    kept.digests = bytearray()
    seen = account.Seen()
    size = 0
    with _Files(folder, number, ("rows", "tokens", "mask", "sequences")) as files:
        store = tokens.TokenWriter(files["tokens"], files["mask"], files["sequences"], headers=False)
        put = preparing.putting(files["rows"], store, rules.max_length)
        only_rows = (row for _, row in rows)
        with contextlib.closing(
            preparing.sift(rules, shape, only_rows, tokenizer, findings, kept, threads=threads)
        ) as fit:
            for fitted in fit:
                if fitted is not None:
                    seen.add(rules.split, fitted[0])
                    size = put(*fitted)
        files.write("digests", bytes(kept.digests))
        found = {}
        for step in STEPS:
            lines, counts, first = findings.part((rules.split, step))
            found[step] = (files.write(step, lines), counts, first)
        if rules.split in account.COMPARED:
            _write_seen(files.new("seen.parquet"), seen, rules.split, number)
    paths = {name: files.path(name) for name in ("rows", "tokens", "mask", "sequences")}
    part = tokens.Part(**paths, num_rows=kept.used, num_tokens=store.end, num_sequences=store.count, num_bytes=size)
    return _Sifted(part, files.path("digests"), kept.counts(), found)


def _write_seen(path: Path, seen: account.Seen, split: str, number: int) -> None:
    import pyarrow
    from pyarrow import parquet

    hashes = np.array(seen.hashes[split], dtype=np.uint64).view(np.int64)
    places = np.arange(len(hashes), dtype=np.int64) + number * PART_OF
    where = [seen.places[split][row] for row in range(len(hashes))]
    columns = {"hash": hashes, "place": places, "where": pyarrow.array(where, pyarrow.string())}
    parquet.write_table(pyarrow.table(columns), path)


class _Files:
    """The files of one attempt at a part."""

    def __init__(self, folder: Path, number: int, names: Sequence[str]) -> None:
        self.folder, self.stem = folder, f"{number:06d}"
        self.attempt = f"{os.getpid()}-{os.urandom(3).hex()}"
        self.names = list(names)
        self.opened: dict[str, Any] = {}

    def __enter__(self) -> _Files:
        self.opened = {name: self.new(name).open("wb") for name in self.names}
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        for file in self.opened.values():
            file.close()
        for path in self.folder.glob(f".{self.attempt}.*"):
            if kind is None:
                path.replace(self.path(path.name.removeprefix(f".{self.attempt}.")))
            else:
                path.unlink()

    def __getitem__(self, name: str) -> Any:
        return self.opened[name]

    def new(self, name: str) -> Path:
        """Where a file is written until all of them are."""
        return self.folder / f".{self.attempt}.{name}"

    def write(self, name: str, content: bytes) -> Path:
        self.new(name).write_bytes(content)
        return self.path(name)

    def path(self, name: str) -> Path:
        return self.folder / f"{self.stem}.{name}"
