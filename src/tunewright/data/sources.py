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
        or any(sign in source for sign in "*?[")
        or source.startswith(("/", "./", "../", "~"))
        or Path(source).exists()
    )


def absolute(source: str, folder: Path) -> str:
    """A file source as an absolute path: as it stands from here, else from the recipe's folder."""
    if source.startswith(STARTER) or (not is_file(source) and not is_file(str(folder / source))):
        return source
    path = Path(source).expanduser()
    if path.is_absolute():
        return str(path)
    below = folder.absolute() / path
    if not glob.glob(str(path), recursive=True) and glob.glob(str(below), recursive=True):
        return str(below)
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


def files(source: str, key: str) -> list[Path]:
    """The files that a path or glob names, sorted.

    Raises:
        DataError: none, or one of a kind that cannot be read.
    """
    path = _starter(source, key) if source.startswith(STARTER) else Path(source).expanduser()
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = sorted(one for one in path.iterdir() if one.suffix.lower() in SUFFIXES)
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
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{shown(path)}:{number}"
            line = (raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw).rstrip(b"\r\n")
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode())
            except UnicodeDecodeError as error:
                yield Broken(where, "not_utf8", f"not UTF-8 (byte {error.start + 1}); save the file as UTF-8")
            except ValueError as error:
                said = getattr(error, "msg", str(error))
                column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                yield Broken(where, "broken_json", f"broken JSON{column}: {said}; each line must be one JSON object")
            else:
                if isinstance(value, dict):
                    yield Row(where, value)
                else:
                    yield Broken(where, "not_an_object", f"a {type(value).__name__}, not a JSON object with columns")


def _read_json_array(path: Path) -> Iterator[Row | Broken]:
    text = _decode(path)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{"):
            yield from _read_json_lines(path)  # JSON lines under a .json name
        else:
            yield Broken(f"{shown(path)}:{error.lineno}", "broken_json", f"broken JSON: {error.msg}")
        return
    if isinstance(values, dict):
        values = [values]
    if not isinstance(values, list):
        raise DataError(f"{shown(path)}: holds a {type(values).__name__}; a .json file holds a list of objects")
    for number, value in enumerate(values, start=1):
        where = f"{shown(path)}:item {number}"
        if isinstance(value, dict):
            yield Row(where, value)
        else:
            yield Broken(where, "not_an_object", f"a {type(value).__name__}, not a JSON object with columns")


def _read_delimited(path: Path, delimiter: str) -> Iterator[Row | Broken]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(_decode(path), newline=""), delimiter=delimiter)
    header: list[str] | None = None
    start = 1
    try:
        for values in reader:
            where, start = f"{shown(path)}:{start}", reader.line_num + 1
            if header is None:
                header = [name.strip() for name in values]
                if len(set(header)) < len(header):
                    raise DataError(f"{where}: two columns have the same name; rename one")
            elif not values:
                continue
            elif len(values) != len(header):
                yield Broken(
                    where,
                    "wrong_columns",
                    f"{len(values)} values for {len(header)} columns; put values with {delimiter!r} in quotes",
                )
            else:
                yield Row(where, dict(zip(header, values, strict=True)))
    except csv.Error as error:
        yield Broken(f"{shown(path)}:{reader.line_num}", "broken_csv", f"broken CSV: {error}")


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
        number = 0
        for batch in table.iter_batches():
            for fields in batch.to_pylist():
                number += 1
                yield Row(f"{shown(path)}:row {number}", fields)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{shown(path)}: not a readable Parquet file: {error}") from None


def _read_text(path: Path) -> Iterator[Row]:
    """Blocks of whole paragraphs."""
    block: list[str] = []
    start, size = 1, 0
    lines = _decode(path).splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        block.append(line)
        size += len(line)
        if size >= TEXT_BLOCK and (not line.strip() or size >= 4 * TEXT_BLOCK) and number < len(lines):
            yield Row(f"{shown(path)}:{start}", {"text": "".join(block)}, ends=False)
            block, start, size = [], number + 1, 0
    if block:
        yield Row(f"{shown(path)}:{start}", {"text": "".join(block)})


def _decode(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
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


def _load_hub(source: str, key: str) -> Any:
    """`name:split` or `name:config:split`; name may have an owner (`owner/name:split`)."""
    parts = source.split(":")
    if not 1 < len(parts) < 4 or not all(re.fullmatch(r"[\w./+\[%\]-]+", part) for part in parts):
        raise DataError(
            f"{key}: {source!r} is neither a file here nor a hub data set with its split; "
            "say a path such as data/train.jsonl, or name:split such as imdb:train"
        )
    name, *config, split = parts
    import datasets
    from datasets import exceptions
    from huggingface_hub import constants, errors

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        return datasets.load_dataset(_canonical(name), *config, split=split)
    except (exceptions.DatasetNotFoundError, errors.RepositoryNotFoundError):
        raise DataError(
            f"{key}: no data set {name!r} at the hub ({constants.ENDPOINT}) and no file of that name here"
        ) from None
    except ValueError as error:
        said = str(error).strip().splitlines()[0]
        raise DataError(f"{key}: {source}: {said}") from None
    except (OSError, errors.HfHubHTTPError) as error:
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
