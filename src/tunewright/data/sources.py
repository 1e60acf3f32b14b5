"""Where rows come from: hub data sets and files. Each row carries the place where a person finds it.

A row that cannot be read is not skipped here and does not stop the reading: it comes back as a `Broken`.

What is not covered: Spark tables; compressed files.
"""

from __future__ import annotations

import csv
import difflib
import glob
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright import starter
from tunewright.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")
STARTER = "starter:"
"""Before the name of a data file that ships with Tunewright: `starter:train.jsonl`."""
TEXT_BLOCK = 2000
"""Characters after which a plain text file's block ends at the next blank line."""
KINDS = (
    ((type(None),), "null"),
    ((bool,), "a boolean"),
    ((int, float), "a number"),
    ((str,), "a string"),
    ((list,), "a list"),
    ((dict,), "an object"),
)
BATCH = 1000
"""Rows of a hub data set that are read at once."""
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


@dataclass(frozen=True)
class Table:
    """The rows of one split, in their order."""

    names: tuple[str, ...]
    """The sources as the recipe names them."""
    rows: Sequence[Row | Broken]
    classes: tuple[str, ...] | None = None
    """Names of the classes, where the data set declares them."""


def is_file(source: str) -> bool:
    """Whether a recipe's source names files rather than a hub data set."""
    return (
        source.startswith(STARTER)
        or source.lower().endswith(SUFFIXES)
        or source.startswith(("/", "./", "../", "~"))
        or os.path.exists(source)
        or (any(sign in source for sign in "*?[") and not HUB.fullmatch(source))
    )


def absolute(source: str, folder: Path) -> str:
    """A file source as an absolute path: as it stands from here, else from the recipe's folder."""
    path = Path(source).expanduser()
    if source.startswith(STARTER) or path.is_absolute():
        return source if source.startswith(STARTER) else str(path)
    folder = folder.absolute()
    for here in (Path.cwd(), folder):
        if os.path.exists(here / path):
            return str(here / path)
        if glob.glob(source, root_dir=here, recursive=True):
            return str(Path(glob.escape(str(here))) / path)
    return str(path.absolute()) if is_file(source) else source


def read(sources: Sequence[str], key: str, *, label: str | None = None) -> Table:
    """All rows of the sources, one after another.

    Args:
        sources: as the recipe names them.
        key: the recipe's key, for errors (`data.train`).
        label: the column whose declared class names to return.

    Raises:
        DataError: a source is absent or is not of a kind that can be read.
    """
    rows: list[Sequence[Row | Broken]] = []
    classes: tuple[str, ...] | None = None
    for source in sources:
        if is_file(source):
            for path in files(source, key):
                rows.append(list(_read_file(path)))
        else:
            dataset = _load_hub(source, key)
            rows.append(_HubRows(source, dataset))
            feature: Any = dataset.features.get(label) if label else None
            classes = tuple(feature.names) if hasattr(feature, "names") else classes
    return Table(tuple(sources), rows[0] if len(rows) == 1 else [row for part in rows for row in part], classes)


def pick(rows: Sequence[Row | Broken], numbers: Sequence[int]) -> list[Row | Broken]:
    """Some of the rows, in the order of the numbers."""
    return list(rows.pick(numbers)) if isinstance(rows, _HubRows) else [rows[number] for number in numbers]


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
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _is_data(path: Path) -> bool:
    """Whether a file of a folder is read when the folder is: no hidden ones, and not the folder's own README."""
    hidden = path.name.startswith(".") or path.stem.lower() == "readme"
    return path.suffix.lower() in SUFFIXES and path.is_file() and not hidden


def kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    return next((word for types, word in KINDS if isinstance(value, types)), f"a {type(value).__name__}")


def displayed(source: str) -> str:
    """A recipe's source as a person here would type it."""
    return source if source.startswith(STARTER) or not is_file(source) else shown(Path(source))


def _starter(source: str, key: str) -> Path:
    try:
        return starter.data_path(source.removeprefix(STARTER))
    except FileNotFoundError as error:
        raise DataError(f"{key}: {source}: {error}") from None


def _read_file(path: Path) -> Iterator[Row | Broken]:
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            yield from _read_json_lines(path)
        case ".json":
            yield from _read_json_array(path)
        case ".csv":
            yield from _read_delimited(path, ",")
        case ".tsv":
            yield from _read_delimited(path, "\t")
        case ".parquet":
            yield from _read_parquet(path)
        case _:
            yield from _read_text(path)


def _read_json_lines(path: Path) -> Iterator[Row | Broken]:
    name = shown(path)
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{name}:{number}"
            line = (raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw).rstrip(b"\r\n")
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode())
            except UnicodeDecodeError as error:
                yield Broken(where, "not_utf8", f"not UTF-8 (byte {error.start + 1}); save the file as UTF-8")
            except (ValueError, RecursionError) as error:
                said = getattr(error, "msg", str(error))
                column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                yield Broken(where, "broken_json", f"broken JSON{column}: {said}; each line must be one JSON object")
            else:
                yield _json_row(where, value, line)


def _read_json_array(path: Path) -> Iterator[Row | Broken]:
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
    reader = csv.reader(io.StringIO(_decode(path), newline=""), delimiter=delimiter, strict=True)
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
    import pyarrow
    from pyarrow import parquet

    name, number = shown(path), 0
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(f"{name}:row {number}", fields)
    except (pyarrow.ArrowException, OSError) as error:
        behind = f" behind row {number}" if number else ""
        raise DataError(f"{name}: not a readable Parquet file{behind}: {error}") from None


def _read_text(path: Path) -> Iterator[Row]:
    """Blocks of whole paragraphs. Lines end in a line feed, however the file ends them."""
    name = shown(path)
    block: list[str] = []
    start, size = 1, 0
    lines = io.StringIO(_decode(path), newline=None).readlines()
    last = max((number for number, line in enumerate(lines, start=1) if line.strip()), default=0)
    for number, line in enumerate(lines, start=1):
        block.append(line)
        size += len(line)
        if size >= TEXT_BLOCK and (not line.strip() or size >= 4 * TEXT_BLOCK) and number < last:
            yield Row(f"{name}:{start}", {"text": "".join(block)}, ends=False)
            block, start, size = [], number + 1, 0
    if block:
        yield Row(f"{name}:{start}", {"text": "".join(block)})


def _decode(path: Path) -> str:
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{shown(path)}:{line}: not UTF-8; save the file as UTF-8") from None


class _HubRows(Sequence[Row | Broken]):
    """A hub data set, row by row, without holding it in memory."""

    def __init__(self, source: str, dataset: Any) -> None:
        self.source = source
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return Row(f"{self.source}:row {index + 1}", self.dataset[int(index)])

    def __iter__(self) -> Iterator[Row]:
        return self.pick(range(len(self)))

    def pick(self, numbers: Sequence[int]) -> Iterator[Row]:
        """In batches, which is many times as fast as one by one."""
        for start in range(0, len(numbers), BATCH):
            chosen = numbers[start : start + BATCH]
            columns = self.dataset[chosen]
            for number, values in zip(chosen, zip(*columns.values(), strict=True), strict=True):
                yield Row(f"{self.source}:row {number + 1}", dict(zip(columns, values, strict=True)))


def _load_hub(source: str, key: str) -> Any:
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
