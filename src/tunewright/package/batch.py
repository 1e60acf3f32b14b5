"""Batch inference, part by part: what is asked (`Asked`), a part's answers on disk, and the whole put together.

The parts of an output stand in a folder beside it (`.NAME.parts`) until all are there; then the output takes its name
by one rename. A part that is done is not done again, so a killed batch goes on where it stood.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunewright.data import pieces, sources
from tunewright.data.pieces import Piece
from tunewright.data.sources import Broken, Row
from tunewright.errors import RunError
from tunewright.package.predictor import Columns, Predictor
from tunewright.run import lock, read_json, replacing, write_json, write_text

ROWS_OF_A_PART = 1000
BYTES_OF_A_PIECE = 2**22
PLAN = "plan.json"
DONE = "_SUCCESS"
SUMMARY = "_summary.json"


@dataclass(frozen=True)
class Asked:
    """One batch."""

    package: str
    inputs: list[str]
    output: str
    text: str | None = None
    messages: str | None = None
    max_new_tokens: int | None = None
    limit: int | None = None
    batch_rows: int | None = None

    @property
    def parts(self) -> Path:
        """Where the parts stand until all are there."""
        output = Path(self.output)
        return output.with_name(f".{output.name}.parts")

    @property
    def columns(self) -> Columns:
        return Columns(self.text, self.messages)

    @property
    def one_file(self) -> bool:
        return Path(self.output).suffix in (".jsonl", ".parquet")


@dataclass(frozen=True)
class Share:
    """A piece of the input: its number, and how many of its rows are asked."""

    number: int
    piece: Piece
    rows: int


def answer_all(asked: Asked, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """A whole batch, in this process; gives its summary.

    Raises:
        DataError: the input is absent, or of a kind that is not read.
        RunError: there is no packaged model.
    """

    def plan(_: Path) -> list[Share]:
        found = [piece for source in asked.inputs for piece in of_input(source)]
        return shared_out(found, [pieces.count(piece) for piece in found], asked.limit)

    @functools.cache
    def load() -> Predictor:
        return Predictor(Path(asked.package), max_new_tokens=asked.max_new_tokens, batch_rows=asked.batch_rows)

    shares = begin(asked, plan)
    rows = sum(share.rows for share in shares)
    counts = {"rows": 0, "errors": 0}
    for share in shares:

        def told(more: int, before: int = counts["rows"]) -> None:
            progress(before + more, rows)

        for key, count in answer(asked, share, load, told).items():
            counts[key] += count
        progress(counts["rows"], rows)
    return finish(asked, shares, counts)


@contextlib.contextmanager
def alone(asked: Asked) -> Iterator[None]:
    """Hold the output while it is written: a batch whose command was killed may live on, and two would mix their parts.

    Raises:
        RunError: another process writes it.
    """
    path = asked.parts.with_suffix(".lock")
    handle = _take(path, asked.output)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _take(path: Path, output: str) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            number = os.pread(handle, 32, 0).decode()
            os.close(handle)
            said = f"{output}: process {number} is writing it; wait for it or stop it, or name another --output"
            raise RunError(said) from None
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
            return handle
        os.close(handle)  # whoever held it has just removed it


def begin(asked: Asked, plan: Callable[[Path], list[Share]]) -> list[Share]:
    """The shares of a batch: those of its beginning, where it was begun before, since parts are named by them."""
    said = {
        "asked": asdict(asked),
        "model": _fingerprint(Path(asked.package)),
        "data": sources.fingerprint(asked.inputs, "input"),
    }
    folder = asked.parts
    if (folder / PLAN).is_file():
        before = read_json(folder / PLAN)
        if {key: before[key] for key in said} == said:
            return [Share(one["number"], Piece(**one["piece"]), one["rows"]) for one in before["shares"]]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shares = plan(folder)
    write_json(folder / PLAN, {**said, "shares": [asdict(share) for share in shares]})
    return shares


def shared_out(found: Sequence[Piece], counts: Sequence[tuple[int, int]], limit: int | None) -> list[Share]:
    """Pieces with their places, up to the limit."""
    shares = []
    left = sum(rows for _, rows in counts) if limit is None else limit
    for number, (piece, (_, rows)) in enumerate(zip(pieces.numbered(found, counts), counts, strict=True)):
        if rows and left > 0:
            shares.append(Share(number, piece, min(rows, left)))
        left -= rows
    return shares


def of_input(source: str, wanted: int = 1) -> list[Piece]:
    """The pieces of a file source, of like size: as many as are wanted at least, where they are not too small."""
    found = []
    for path in sources.files(source, "input"):
        found += pieces.of_file(path, max(wanted, path.stat().st_size // BYTES_OF_A_PIECE))
    return found


def answer(
    asked: Asked, share: Share, load: Callable[[], Predictor], told: Callable[[int], None] = lambda rows: None
) -> dict[str, int]:
    """Answer a share, part by part; gives how many rows there were and how many could not be used. Parts that are there
    are counted and not asked again; the model is loaded when the first is to be asked."""
    total = {"rows": 0, "errors": 0}
    for number, rows in enumerate(_in_parts(share)):
        name = f"part-{share.number:05d}-{number:05d}"
        counted = asked.parts / f"{name}.json"
        if counted.is_file():
            counts = read_json(counted)
        else:
            answers = load().answer(rows, asked.columns)
            _write_part(asked, name, answers)
            counts = {"rows": len(rows), "errors": sum("error" in one for one in answers)}
            write_json(counted, counts)
        for key in total:
            total[key] += counts[key]
        told(total["rows"])
    return total


def finish(asked: Asked, shares: Sequence[Share], counts: dict[str, int]) -> dict[str, Any]:
    """Put the parts together under the output's name; gives the summary.

    Raises:
        RunError: a part is not there, or rows are missing.
    """
    folder, output = asked.parts, Path(asked.output)
    suffix = ".jsonl" if output.suffix == ".jsonl" else ".parquet"
    parts = sorted(folder.glob(f"part-*{suffix}"))
    wanted = sum(share.rows for share in shares)
    if counts["rows"] != wanted or len(parts) != sum(-(-share.rows // ROWS_OF_A_PART) for share in shares):
        raise RunError(f"{folder}: {counts['rows']} of {wanted} rows were answered; run the same command again")
    summary = {**counts, "output": asked.output, "model": asked.package, "inputs": asked.inputs}
    if output.suffix == ".jsonl":
        with replacing(output) as file:
            for part in parts:
                with part.open("rb") as given:
                    shutil.copyfileobj(given, file, 2**20)
    elif output.suffix == ".parquet":
        _join_parquet(parts, output)
    else:
        for left in folder.iterdir():
            if left.suffix != suffix:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        write_json(folder / SUMMARY, summary)
        write_text(folder / DONE, "")
        if output.is_dir():
            shutil.rmtree(output)
        os.replace(folder, output)
    shutil.rmtree(folder, ignore_errors=True)
    return summary


def _in_parts(share: Share) -> Iterator[list[Row | Broken]]:
    rows: list[Row | Broken] = []
    for number, row in enumerate(pieces.read(share.piece)):
        if number == share.rows:
            break
        rows.append(row)
        if len(rows) == ROWS_OF_A_PART:
            yield rows
            rows = []
    if rows:
        yield rows


def _write_part(asked: Asked, name: str, answers: list[dict[str, Any]]) -> None:
    if Path(asked.output).suffix == ".jsonl":
        lines = "".join(json.dumps(one, ensure_ascii=False, default=str) + "\n" for one in answers)
        write_text(asked.parts / f"{name}.jsonl", lines)
        return
    from pyarrow import parquet

    with replacing(asked.parts / f"{name}.parquet") as file:
        parquet.write_table(_table(answers), file)


def _table(answers: list[dict[str, Any]]) -> Any:
    """Answers as a table whose own columns have the same types in every part."""
    import pyarrow

    ours = {
        "prediction": pyarrow.string(),
        "probability": pyarrow.float64(),
        "probabilities": pyarrow.map_(pyarrow.string(), pyarrow.float64()),
        "loss": pyarrow.float64(),
        "error": pyarrow.string(),
    }
    names = dict.fromkeys(name for one in answers for name in one if name not in ours)
    columns = {}
    for name in names:
        values = [one.get(name) for one in answers]
        try:
            column = pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):  # one column of many kinds
            column = pyarrow.array([None if value is None else json.dumps(value, default=str) for value in values])
        columns[name] = column.cast(pyarrow.string()) if pyarrow.types.is_null(column.type) else column
    for name, of_type in ours.items():
        values = [one.get(name) for one in answers]
        if name == "probabilities":
            values = [None if value is None else list(value.items()) for value in values]
        columns[name] = pyarrow.array(values, of_type)
    return pyarrow.table(columns)


def _join_parquet(parts: Sequence[Path], output: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    schemas = [parquet.read_schema(part) for part in parts]
    mixed = [name for name in dict.fromkeys(name for one in schemas for name in one.names) if not _agree(schemas, name)]
    schemas = [_as_text(schema.empty_table(), mixed).schema for schema in schemas]
    schema = pyarrow.unify_schemas(schemas, promote_options="permissive")
    with replacing(output) as file, parquet.ParquetWriter(file, schema) as writer:
        for part in parts:
            table = _as_text(parquet.read_table(part), mixed)
            writer.write_table(pyarrow.concat_tables([schema.empty_table(), table], promote_options="permissive"))


def _agree(schemas: Sequence[Any], name: str) -> bool:
    """Whether a column has one type in all parts, or types that one can hold."""
    import pyarrow

    fields = [pyarrow.schema([schema.field(name)]) for schema in schemas if name in schema.names]
    try:
        pyarrow.unify_schemas(fields, promote_options="permissive")
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):
        return False
    return True


def _as_text(table: Any, names: Sequence[str]) -> Any:
    """The table with some of its columns as JSON, texts as they are."""
    import pyarrow

    for name in names:
        if name in table.column_names and not pyarrow.types.is_string(table.schema.field(name).type):
            values = [None if one is None else json.dumps(one, default=str) for one in table.column(name).to_pylist()]
            place = table.column_names.index(name)
            table = table.set_column(place, name, pyarrow.array(values, pyarrow.string()))
    return table


def _fingerprint(package: Path) -> str:
    """What tells one packaged model from another."""
    manifest = package / "manifest.json"
    return manifest.read_text() if manifest.is_file() else str((package / "rendering.json").stat().st_mtime_ns)
