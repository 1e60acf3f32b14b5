"""Where rows come from: hub data sets and files. Each row carries the place where a person finds it.

Rows are read as they are asked for and are never all in memory: `Rows` can be gone through many times, and gives some
of them in any order. A row that cannot be read is not skipped here and does not stop the reading: it comes back as a
`Broken`.

What is not covered: tables that only Spark reads (`pieces` has Spark write them down); compressed files.
"""

from __future__ import annotations

import abc
import csv
import difflib
import functools
import glob
import hashlib
import itertools
import json
import os
import pickle
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunewright import starter
from tunewright.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")
STARTER = "starter:"
"""Before the name of a data file that ships with Tunewright: `starter:train.jsonl`."""
TABLES = ("spark:", "delta:")
"""Before the name of a table in Spark's catalog, and before the path of a Delta table."""
TEXT_BLOCK = 2000
"""Characters after which a plain text file's block ends at the next blank line."""
BOM = b"\xef\xbb\xbf"
KINDS = (
    ((type(None),), "null"),
    ((bool,), "a boolean"),
    ((int, float), "a number"),
    ((str,), "a string"),
    ((list,), "a list"),
    ((dict,), "an object"),
)
_seen_from: Path | None = None
BATCH = 1000
"""Rows of a hub data set or Parquet file that are read at once."""
CHUNK = 2**18
"""Characters of a JSON list that are read at once."""
SPACE = re.compile(r"[ \t\n\r]*")
SPOOL_BYTES = 2**25
"""Chosen rows of a file without a way to jump to one wait in memory up to this size, then on disk."""
HUB = re.compile(
    r"(?P<name>[\w.-]+(?:/[\w.-]+)?)"
    r"(?::(?P<config>[\w.+-]+))?"
    r":(?P<split>\w+(?:\[[\w:%-]*\])?(?:\+\w+(?:\[[\w:%-]*\])?)*)"
)
"""A hub data set: `name:split` or `name:config:split`; a name may have an owner, a split a slice (`train[:10%]`)."""


@dataclass(frozen=True)
class Row:
    """One row as it was found."""

    where: str
    """file:line, or data set, split and row."""
    fields: dict[str, Any]
    ends: bool = True
    """Plain text: the block is the last of its file."""


@dataclass(frozen=True)
class Broken:
    """A row that could not be read."""

    where: str
    code: str
    message: str


class Rows(Sequence[Row | Broken]):
    """Rows that are read when they are asked for. Going through them again reads them again."""

    may_break: bool = True
    """Whether there may be a `Broken` among them."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __iter__(self) -> Iterator[Row | Broken]: ...

    @abc.abstractmethod
    def pick(self, numbers: Sequence[int] | np.ndarray[Any, Any]) -> Iterator[Row | Broken]:
        """Some of the rows, in the order of the numbers (from 0, none twice)."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return list(self.pick(range(*index.indices(len(self)))))
        return next(self.pick([range(len(self))[index]]))


@dataclass(frozen=True)
class Table:
    """The rows of one split, in their order."""

    names: tuple[str, ...]
    """The sources as the recipe names them."""
    rows: Rows
    classes: tuple[str, ...] | None = None
    """Names of the classes, where the data set declares them."""


def is_table(source: str) -> bool:
    """Whether a recipe's source names a table that only Spark reads."""
    return source.startswith(TABLES)


def is_file(source: str) -> bool:
    """Whether a recipe's source names files rather than a hub data set or a table."""
    return not is_table(source) and (
        source.startswith(STARTER)
        or source.lower().endswith(SUFFIXES)
        or source.startswith(("/", "./", "../", "~"))
        or os.path.exists(source)
        or (any(sign in source for sign in "*?[") and not HUB.fullmatch(source))
    )


def absolute(source: str, folder: Path) -> str:
    """A file source as an absolute path: as it stands from here, else from the recipe's folder."""
    if source.startswith((STARTER, *TABLES)):
        return source
    path = Path(source).expanduser()
    if path.is_absolute():
        return str(path)
    folder = folder.absolute()
    for here in (Path.cwd(), folder):
        if os.path.exists(here / path):
            return str(here / path)
        if glob.glob(source, root_dir=here, recursive=True):
            return str(Path(glob.escape(str(here))) / path)
    return str(path.absolute()) if is_file(source) else source


def read(sources: Sequence[str], key: str, *, label: str | None = None) -> Table:
    """All rows of the sources, one after another; files are gone through once, to count their rows.

    Args:
        sources: as the recipe names them.
        key: the recipe's key, for errors (`data.train`).
        label: the column whose declared class names to return.

    Raises:
        DataError: a source is absent or is not of a kind that can be read.
    """
    parts: list[Rows] = []
    classes: tuple[str, ...] | None = None
    for source in sources:
        if is_table(source):
            raise DataError(f"{key}: {source}: only Spark reads such a table; set backend.kind: spark or databricks")
        if is_file(source):
            parts += [READERS.get(path.suffix.lower(), File)(path) for path in files(source, key)]
        else:
            dataset = load_hub(source, key)
            parts.append(_HubRows(source, dataset))
            feature: Any = dataset.features.get(label) if label else None
            classes = tuple(feature.names) if hasattr(feature, "names") else classes
    rows = parts[0] if len(parts) == 1 else _Joined(parts)
    len(rows)
    return Table(tuple(sources), rows, classes)


class Some(Rows):
    """Some rows of others, in an order of their own."""

    def __init__(self, rows: Rows, numbers: np.ndarray[Any, Any]) -> None:
        self.rows = rows
        self.numbers = numbers
        self.may_break = rows.may_break

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Row | Broken]:
        return self.rows.pick(self.numbers)

    def pick(self, numbers: Sequence[int] | np.ndarray[Any, Any]) -> Iterator[Row | Broken]:
        return self.rows.pick(self.numbers[np.asarray(numbers, dtype=np.int64)])


def files(source: str, key: str) -> list[Path]:
    """The files that a path or glob names, sorted.

    Raises:
        DataError: none, or one of a kind that cannot be read.
    """
    path = _starter(source, key) if source.startswith(STARTER) else Path(source).expanduser()
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = sorted(one for one in path.iterdir() if _is_data(one))
        if not found:
            raise DataError(f"{key}: the folder {source} holds no data file ({', '.join(SUFFIXES)})")
    else:
        found = sorted(Path(one) for one in glob.glob(str(path), recursive=True) if Path(one).is_file())
    if not found:
        near = _nearby(path)
        raise DataError(f"{key}: {source}: no such file" + (f"; did you mean {near}?" if near else ""))
    for one in found:
        if one.suffix.lower() not in SUFFIXES:
            raise DataError(
                f"{key}: {one}: files of kind {one.suffix or '(none)'} are not read; use {', '.join(SUFFIXES)}"
            )
    return found


def fingerprint(sources: Sequence[str], key: str) -> str:
    """sha256 over the files' contents (hub data sets by name), to tell whether the data changed."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.encode() + b"\0")
        for path in files(source, key) if is_file(source) else ():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def shown(path: Path) -> str:
    """A path as a person here would type it."""
    try:
        return str(path.absolute().relative_to(_seen_from or Path.cwd()))
    except ValueError:
        return str(path)


def see_from(folder: Path) -> None:
    """Name files as they are seen from a folder: where rows are read for somebody who is elsewhere."""
    global _seen_from
    _seen_from = folder


def _is_data(path: Path) -> bool:
    """Whether a file of a folder is read when the folder is: no hidden ones, and not the folder's own README."""
    hidden = path.name.startswith(".") or path.stem.lower() == "readme"
    return path.suffix.lower() in SUFFIXES and path.is_file() and not hidden


def kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    return next((word for types, word in KINDS if isinstance(value, types)), f"a {type(value).__name__}")


def displayed(source: str) -> str:
    """A recipe's source as a person here would type it."""
    return source if source.startswith((STARTER, *TABLES)) or not is_file(source) else shown(Path(source))


def _starter(source: str, key: str) -> Path:
    try:
        return starter.data_path(source.removeprefix(STARTER))
    except FileNotFoundError as error:
        raise DataError(f"{key}: {source}: {error}") from None


class _Joined(Rows):
    """Several sources, one after another."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.parts = parts
        self.may_break = any(part.may_break for part in parts)

    @functools.cached_property
    def ends(self) -> np.ndarray[Any, Any]:
        return np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.parts else 0

    def __iter__(self) -> Iterator[Row | Broken]:
        return itertools.chain.from_iterable(self.parts)

    def pick(self, numbers: Sequence[int] | np.ndarray[Any, Any]) -> Iterator[Row | Broken]:
        chosen = np.asarray(numbers, dtype=np.int64)
        owners = np.searchsorted(self.ends, chosen, side="right")
        picked = [
            part.pick(chosen[owners == place] - (self.ends[place] - len(part))) for place, part in enumerate(self.parts)
        ]
        return (next(picked[owner]) for owner in owners)


class File(Rows):
    """The rows of a file that is read from its beginning."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @functools.cached_property
    def size(self) -> int:
        if self.path.suffix.lower() == ".parquet":
            return sum(batch.num_rows for batch in parquet_batches(self.path))
        return sum(1 for _ in self)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Row | Broken]:
        return _read_file(self.path)

    def pick(self, numbers: Sequence[int] | np.ndarray[Any, Any]) -> Iterator[Row | Broken]:
        chosen = np.asarray(numbers, dtype=np.int64)
        wanted = np.zeros(len(self), dtype=bool)
        wanted[chosen] = True
        found = itertools.compress(self, wanted)
        return found if (np.diff(chosen) > 0).all() else _ordered(found, chosen)


class _JsonLines(File):
    """A file of JSON lines, in which the place of each line is found once and then jumped to."""

    @functools.cached_property
    def size(self) -> int:
        return sum(1 for _ in _lines(self.path))

    @functools.cached_property
    def lines(self) -> np.ndarray[Any, Any]:
        """For each row, where its line begins (bytes) and the line's number."""
        return np.fromiter(
            (place for start, number, _ in _lines(self.path) for place in (start, number)), dtype=np.int64
        ).reshape(-1, 2)

    def pick(self, numbers: Sequence[int] | np.ndarray[Any, Any]) -> Iterator[Row | Broken]:
        chosen = np.asarray(numbers, dtype=np.int64)
        return super().pick(chosen) if (np.diff(chosen) > 0).all() and len(chosen) > 1 else self._jump(chosen)

    def _jump(self, chosen: np.ndarray[Any, Any]) -> Iterator[Row | Broken]:
        name = shown(self.path)
        with self.path.open("rb") as file:
            for start, number in self.lines[chosen].tolist():
                file.seek(start)
                yield _json_line(f"{name}:{number}", _without_ends(file.readline(), number))


class _JsonFile(File):
    """A .json file; a list is read item by item, once it is known to be one."""

    @functools.cached_property
    def is_list(self) -> bool:
        try:
            for _ in _items(self.path):
                pass
        except (ValueError, RecursionError):
            return False
        return True

    def __iter__(self) -> Iterator[Row | Broken]:
        if not self.is_list:
            yield from _read_json(self.path)
            return
        name = shown(self.path)
        for number, (value, text) in enumerate(_items(self.path), start=1):
            yield _json_row(f"{name}:item {number}", value, text.encode())


READERS: dict[str, type[File]] = {".jsonl": _JsonLines, ".ndjson": _JsonLines, ".json": _JsonFile}


def _ordered(found: Iterator[Row | Broken], chosen: np.ndarray[Any, Any]) -> Iterator[Row | Broken]:
    """Rows that come in the order of their numbers, in the order of `chosen`. They wait in a file without a name."""
    arrival = np.argsort(chosen)
    starts = np.zeros(len(chosen), dtype=np.int64)
    with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spool:
        for place, row in zip(arrival, found, strict=True):
            starts[place] = spool.tell()
            pickle.dump(row, spool, protocol=pickle.HIGHEST_PROTOCOL)
        for start in starts.tolist():
            spool.seek(start)
            yield pickle.load(spool)


def _read_file(path: Path) -> Iterator[Row | Broken]:
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            yield from _read_json_lines(path)
        case ".json":
            yield from _read_json(path)
        case ".csv":
            yield from _read_delimited(path, ",")
        case ".tsv":
            yield from _read_delimited(path, "\t")
        case ".parquet":
            yield from _read_parquet(path)
        case _:
            yield from _read_text(path)


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Each line that says something: where it begins (bytes), its number, and itself."""
    start = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = _without_ends(raw, number)
            if line and not line.isspace():
                yield start, number, line
            start += len(raw)


def rows_between(path: Path, start: int, stop: int, number: int) -> Iterator[Row | Broken]:
    """The rows of a JSON-lines file whose lines begin in a range of bytes; the first of these lines is `number`."""
    name = shown(path)
    for line_number, line in enumerate(_lines_between(path, start, stop), start=number):
        said = _without_ends(line, line_number)
        if said and not said.isspace():
            yield _json_line(f"{name}:{line_number}", said)


def count_between(path: Path, start: int, stop: int) -> tuple[int, int]:
    """How many lines begin in a range of bytes, and how many of them say something."""
    lines = rows = 0
    for line in _lines_between(path, start, stop):
        lines += 1
        said = _without_ends(line, 1 if start == 0 and lines == 1 else 2)
        rows += bool(said) and not said.isspace()
    return lines, rows


def _lines_between(path: Path, start: int, stop: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        if start:  # what begins before the range belongs to the range before
            file.seek(start - 1)
            file.readline()
        at = file.tell()
        while at < stop and (line := file.readline()):
            yield line
            at += len(line)


def _without_ends(raw: bytes, number: int) -> bytes:
    """A line without its line end, and the first one without a byte order mark."""
    return (raw.removeprefix(BOM) if number == 1 else raw).rstrip(b"\r\n")


def _read_json_lines(path: Path) -> Iterator[Row | Broken]:
    name = shown(path)
    for _, number, line in _lines(path):
        yield _json_line(f"{name}:{number}", line)


def _json_line(where: str, line: bytes) -> Row | Broken:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Broken(where, "not_utf8", f"not UTF-8 (byte {error.start + 1}); save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        said = getattr(error, "msg", str(error))
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        return Broken(where, "broken_json", f"broken JSON{column}: {said}; each line must be one JSON object")
    return _json_row(where, value, line)


def _read_json(path: Path) -> Iterator[Row | Broken]:
    """A list of objects, one object, JSON lines under another name, or what is wrong with the file; read whole."""
    text = _decode(path)
    if not text.strip():
        return
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{"):
            yield from _read_json_lines(path)  # JSON lines under a .json name
        else:
            line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
            yield Broken(f"{shown(path)}:{line}", "broken_json", f"broken JSON: {getattr(error, 'msg', error)}")
        return
    if isinstance(values, dict):
        values = [values]
    if not isinstance(values, list):
        raise DataError(f"{shown(path)}: holds {kind(values)}; a .json file holds a list of objects")
    name, raw = shown(path), text.encode()
    for number, value in enumerate(values, start=1):
        yield _json_row(f"{name}:item {number}", value, raw)


def _items(path: Path) -> Iterator[tuple[Any, str]]:
    """The items of a JSON list, each with its text, without reading the whole of it.

    Raises:
        ValueError: the file is not one JSON list.
    """
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8-sig", newline="") as file:
        text, at, size, ended = "", 0, CHUNK, False

        def see_more() -> None:
            nonlocal text, at, size, ended
            read = file.read(size)
            text, at, ended = text[at:] + read, 0, not read
            size *= 2  # else an item of many chunks would be begun many times

        def next_sign(place: int) -> int:
            found = SPACE.match(text, place)
            assert found is not None
            return found.end()

        while next_sign(0) == len(text) and not ended:
            see_more()
        at, number = next_sign(0) + 1, 0
        if text[at - 1 : at] != "[":
            raise ValueError("not a list")
        while True:
            at = next_sign(at)
            if number == 0 and text[at : at + 1] == "]":
                at += 1
                break
            end: int | None = None
            try:
                value, stop = decoder.raw_decode(text, at)
                behind = next_sign(stop)
                if text[behind : behind + 1] in (",", "]"):
                    end = behind
                elif ended:  # else what was read may be the beginning of a longer number
                    raise ValueError("an item without an end")
            except ValueError:
                if ended:
                    raise
            if end is None:
                see_more()
                continue
            yield value, text[at:stop]
            number, at, size = number + 1, end + 1, CHUNK
            if text[end] == "]":
                break
        while not ended:
            see_more()
        if text[next_sign(at) :]:
            raise ValueError("something follows the list")


def _json_row(where: str, value: Any, raw: bytes) -> Row | Broken:
    if not isinstance(value, dict):
        return Broken(where, "not_an_object", f"{kind(value)}, not a JSON object with columns")
    if b"\\ud" in raw or b"\\uD" in raw:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return Broken(where, "half_character", "half of a character (a \\ud8.. escape without its other half)")
    return Row(where, value)


def _read_delimited(path: Path, delimiter: str) -> Iterator[Row | Broken]:
    csv.field_size_limit(2**31 - 1)
    name = shown(path)
    reader = csv.reader(_text_lines(path, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        where = f"{name}:{reader.line_num + 1}"
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):
                raise DataError(
                    f"{where}: a quote is opened here and never closed; close it or write it twice"
                ) from None
            yield Broken(where, "broken_csv", f"broken CSV: {error}; write a quote inside of quotes twice")
            continue
        if not values:
            continue
        if header is None:
            header = [column.strip() for column in values]
            if len(set(header)) < len(header):
                raise DataError(f"{where}: two columns have the same name; rename one")
        elif len(values) != len(header):
            yield Broken(
                where,
                "wrong_columns",
                f"{len(values)} values for {len(header)} columns; put values with {delimiter!r} in quotes",
            )
        else:
            yield Row(where, dict(zip(header, values, strict=True)))


def _read_parquet(path: Path) -> Iterator[Row]:
    name, number = shown(path), 0
    for batch in parquet_batches(path):
        for fields in batch.to_pylist():
            number += 1
            yield Row(f"{name}:row {number}", fields)


def parquet_batches(path: Path, row_groups: Sequence[int] | None = None) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(BATCH, row_groups=row_groups):
                yield batch
                number += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        behind = f" behind row {number}" if number else ""
        raise DataError(f"{shown(path)}: not a readable Parquet file{behind}: {error}") from None


def _read_text(path: Path) -> Iterator[Row]:
    """Blocks of whole paragraphs. Lines end in a line feed, however the file ends them."""
    name = shown(path)
    block: list[str] = []
    start, size = 1, 0
    last = max((number for number, line in enumerate(_text_lines(path), start=1) if line.strip()), default=0)
    for number, line in enumerate(_text_lines(path), start=1):
        block.append(line)
        size += len(line)
        if size >= TEXT_BLOCK and (not line.strip() or size >= 4 * TEXT_BLOCK) and number < last:
            yield Row(f"{name}:{start}", {"text": "".join(block)}, ends=False)
            block, start, size = [], number + 1, 0
    if block:
        yield Row(f"{name}:{start}", {"text": "".join(block)})


def _text_lines(path: Path, newline: str | None = None) -> Iterator[str]:
    """A text file's lines, without a byte order mark.

    Raises:
        DataError: the file is not UTF-8.
    """
    with path.open(encoding="utf-8-sig", newline=newline) as file:
        try:
            yield from file
        except UnicodeDecodeError:
            raise _not_utf8(path) from None


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().removeprefix(BOM).decode()
    except UnicodeDecodeError:
        raise _not_utf8(path) from None


def _not_utf8(path: Path) -> DataError:
    """The error that names the first line that is not UTF-8. No character of more than one byte holds a line feed."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return DataError(f"{shown(path)}:{number}: not UTF-8; save the file as UTF-8")
    return DataError(f"{shown(path)}: not UTF-8; save the file as UTF-8")


class _HubRows(Rows):
    """A hub data set, which Arrow maps from its files."""

    may_break = False

    def __init__(self, source: str, dataset: Any) -> None:
        self.source = source
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Row | Broken]:
        return self.pick(range(len(self)))

    def pick(self, numbers: Sequence[int] | np.ndarray[Any, Any]) -> Iterator[Row | Broken]:
        """In batches, which is many times as fast as one by one."""
        for start in range(0, len(numbers), BATCH):
            chosen = numbers[start : start + BATCH]
            columns = self.dataset[chosen]
            for number, values in zip(chosen, zip(*columns.values(), strict=True), strict=True):
                yield Row(f"{self.source}:row {number + 1}", dict(zip(columns, values, strict=True)))


def load_hub(source: str, key: str) -> Any:
    """`name:split` or `name:config:split`; name may have an owner (`owner/name:split`)."""
    parts = HUB.fullmatch(source)
    if not parts:
        raise DataError(
            f"{key}: {source!r} is neither a file here nor a hub data set with its split; "
            "say a path such as data/train.jsonl, or name:split such as imdb:train"
        )
    name, config, split = parts.group("name", "config", "split")
    import datasets
    from datasets import exceptions
    from huggingface_hub import constants, errors

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        return datasets.load_dataset(_canonical(name), config, split=split)
    except (exceptions.DatasetNotFoundError, errors.RepositoryNotFoundError):
        raise DataError(
            f"{key}: no data set {name!r} at the hub ({constants.ENDPOINT}), or none that is open to you, and no file "
            "of that name here"
        ) from None
    except ValueError as error:
        said = str(error).strip().splitlines()[0]
        raise DataError(f"{key}: {source}: {said}") from None
    except (OSError, RuntimeError, exceptions.DatasetsError, errors.HTTPError) as error:
        # RuntimeError: a data set that is a script; HTTPError: the hub client's own, also where there is no network
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{key}: {source}: the hub at {constants.ENDPOINT} did not give it: {said}") from error


def _canonical(name: str) -> str:
    """The full name behind an old short one (`imdb` is `stanfordnlp/imdb`).

    `datasets` 5 opens files under the name it was given and refuses one without an owner; the hub knows the full one.
    """
    from huggingface_hub import HfApi, constants

    if "/" in name or constants.is_offline_mode():
        return name
    return str(HfApi().dataset_info(name).id)


def _nearby(path: Path) -> str | None:
    if not path.parent.is_dir():
        return None
    names = [one.name for one in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=1)
    return str(path.parent / near[0]) if near else None
