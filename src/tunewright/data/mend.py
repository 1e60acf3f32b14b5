"""A copy of data with what can be mended mended, and an account of every change. Nothing is changed in place.

Bytes that are not UTF-8 are read as Windows-1252, byte-order marks and invisible characters are taken out, what stands
behind a conversation's last assistant message is cut off; rows that cannot become examples, rows that are there twice
and training rows whose text is a test row's are left out. What needs somebody's judgement stays: contradictions, near
duplicates, secrets, over-long rows.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from tunewright.chat import Equipment
from tunewright.data import inspection, prepare, shapes, sources
from tunewright.data.inspection import Inspector
from tunewright.data.sources import Broken, Row
from tunewright.errors import DataError
from tunewright.models import ModelRef
from tunewright.recipe import Limit, Recipe
from tunewright.run import replacing

LEGACY = "cp1252"
FORMS = (".jsonl", ".csv", ".tsv")
SAME_ROW = "the same row as "
"""How the message of a duplicate begins."""
LEFT_OUT = (
    *("broken_json", "broken_csv", "wrong_columns", "not_an_object", "half_character", "missing_column", "wrong_type"),
    *("empty_text", "empty_label", "empty_prompt", "empty_answer", "messages", "tools", "prompts_differ"),
    *("same_answers", "too_short"),
)
"""Kinds of rows that nothing can be learnt from as they are."""


@dataclass(frozen=True)
class Change:
    """What was done about a row."""

    where: str
    did: str
    """left out, or changed."""
    why: str


@dataclass
class Mended:
    """What was written, and what was changed on the way."""

    files: list[str] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    """Split -> rows written."""
    changes: list[Change] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"files": self.files, "rows": self.rows, "changes": [asdict(change) for change in self.changes]}


def mend(recipe: Recipe, ref: ModelRef, tokenizer: Any, equipment: Equipment, out: Path) -> Mended:
    """Write a mended copy of the recipe's files, and beside it every change, one a line (`OUT.changes.jsonl`).

    Args:
        out: a file for the training rows (.jsonl, .csv or .tsv), or a folder that gets a file for each split.

    Raises:
        DataError: a source is no file, `out` is there already, or nothing is left.
    """
    splits = _splits(recipe, out)
    done = Mended()
    with tempfile.TemporaryDirectory() as folder:
        copies, original = _copied(recipe, Path(folder), done)
        update = {**copies, "bad_rows": "skip", "limit": Limit(), "without": None}  # the copy has all rows
        data = recipe.data.model_copy(update=update)
        copied = recipe.model_copy(update={"data": data})
        inspector = Inspector(copied, tokenizer, equipment)
        found = prepare.assemble(copied, ref, tokenizer, equipment, look=inspector.add)
        reasons = _reasons(found, inspector, original)
        for split, path in splits.items():
            rows = sources.read(data.train if split == "train" else getattr(data, split), f"data.{split}").rows
            shape = shapes.recognise(copied, (row for row in rows if isinstance(row, Row)), None)
            kept = _kept(rows, shape, reasons, original, done)
            done.rows[split] = _write(path, kept)
            if not done.rows[split]:
                path.unlink(missing_ok=True)
                raise DataError(f"data.{split}: no row is left once the broken ones are left out")
            done.files.append(str(path))
    with replacing(_beside(out)) as log:
        log.writelines((json.dumps(asdict(change), ensure_ascii=False) + "\n").encode() for change in done.changes)
    return done


def _beside(out: Path) -> Path:
    return out.with_name(f"{out.name}.changes.jsonl")


def _splits(recipe: Recipe, out: Path) -> dict[str, Path]:
    """The file for each split that is written."""
    for taken in (out, _beside(out)):
        if taken.exists():
            raise DataError(f"{taken}: is there already; name another place for the mended copy")
    given = [split for split in prepare.SPLITS if getattr(recipe.data, split) is not None]
    for split in given:
        for name in getattr(recipe.data, split):
            if not sources.is_file(name):
                raise DataError(f"data.{split}: {name}: only files can be copied and mended")
    if out.suffix.lower() in FORMS:
        out.parent.mkdir(parents=True, exist_ok=True)
        return {"train": out}
    if out.suffix:
        raise DataError(f"{out}: a mended copy is {', '.join(FORMS)}, or a folder")
    out.mkdir(parents=True)
    return {split: out / f"{split}.jsonl" for split in given}


def _copied(recipe: Recipe, folder: Path, done: Mended) -> tuple[dict[str, tuple[str, ...]], Callable[[str], str]]:
    """UTF-8 copies of each split's files, and what turns a place in a copy into the place it is a copy of."""
    names: dict[str, str] = {}
    copies: dict[str, tuple[str, ...]] = {}
    for split in prepare.SPLITS:
        if (given := getattr(recipe.data, split)) is None:
            continue
        found = []
        for path in [one for name in given for one in sources.files(name, f"data.{split}")]:
            copy = folder / f"{len(names)}" / path.name
            copy.parent.mkdir()
            names[sources.shown(copy)] = sources.shown(path)
            if path.suffix.lower() == ".parquet":
                shutil.copyfile(path, copy)
            else:
                with path.open("rb") as old, copy.open("wb") as new:
                    done.changes += _as_utf8(sources.shown(path), old, new)
            found.append(str(copy))
        copies[split] = tuple(found)

    def original(place: str) -> str:
        name, colon, row = place.rpartition(":")
        return names.get(name, name) + colon + row

    return copies, original


def _as_utf8(name: str, old: BinaryIO, new: BinaryIO) -> Iterator[Change]:
    for number, line in enumerate(old, start=1):
        said = line
        if number == 1 and line.startswith(sources.BOM):
            said = line.removeprefix(sources.BOM)
            yield Change(f"{name}:1", "changed", "the byte-order mark was taken out")
        try:
            said.decode()
        except UnicodeDecodeError:
            said = said.decode(LEGACY, errors="replace").encode()
            yield Change(f"{name}:{number}", "changed", "not UTF-8: read as Windows-1252")
        new.write(said)


def _reasons(found: prepare.Assembled, inspector: Inspector, original: Callable[[str], str]) -> dict[str, str]:
    """Where each row stands that is left out, and why."""
    reasons = {one.where: f"{one.code}: {one.message}" for one in found.findings if one.code in LEFT_OUT}
    for one in inspector.finish(found.splits):
        if one.code == "duplicate":
            said, place = one.message[: len(SAME_ROW)], one.message[len(SAME_ROW) :]
            reasons[one.where] = f"duplicate: {said}{original(place)}"
    for where in inspector.trained_and_tested():
        reasons[where] = "seen_in_training: the text is a test row's"
    return reasons


def _kept(
    rows: sources.Rows,
    shape: shapes.Shape | None,
    reasons: dict[str, str],
    original: Callable[[str], str],
    done: Mended,
) -> Iterator[dict[str, Any]]:
    for row in rows:
        where, why = original(row.where), reasons.get(row.where)
        if isinstance(row, Broken):
            done.changes.append(Change(where, "left out", why or f"{row.code}: {row.message}"))
            continue
        fields = _without_invisible(row.fields)
        if fields != row.fields:
            done.changes.append(Change(where, "changed", "invisible characters were taken out"))
        if why is not None and why.startswith("messages:") and (cut := _cut(Row(row.where, fields), shape)) is not None:
            fields, why = cut, None
            done.changes.append(Change(where, "changed", "what stood behind the last assistant message was cut off"))
        if why is not None:
            done.changes.append(Change(where, "left out", why))
            continue
        yield fields


def _without_invisible(value: Any) -> Any:
    if isinstance(value, str):
        return inspection.CONTROL.sub("", value)
    if isinstance(value, dict):
        return {key: _without_invisible(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_invisible(inner) for inner in value]
    return value


def _cut(row: Row, shape: shapes.Shape | None) -> dict[str, Any] | None:
    """The row's conversation up to its last assistant message, None where that does not make it an example."""
    column = shape.columns.get("messages") if shape is not None else None
    given = row.fields.get(column) if column is not None else None
    if shape is None or column is None or not isinstance(given, list):
        return None
    last = max(
        (at for at, one in enumerate(given) if isinstance(one, dict) and one.get("role") == "assistant"), default=-1
    )
    fields = row.fields | {column: given[: last + 1]}
    if last < 0 or last + 1 == len(given):
        return None
    try:
        shape.read(Row(row.where, fields))
    except shapes.Unusable:
        return None
    return fields


def _write(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    """The rows in the form that the path's ending names; how many."""
    count = 0
    if path.suffix.lower() == ".jsonl":
        with replacing(path) as file:
            for fields in rows:
                file.write((json.dumps(fields, ensure_ascii=False, default=str) + "\n").encode())
                count += 1
        return count
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer: Any = None
        for fields in rows:
            if writer is None:
                writer = csv.DictWriter(text, list(fields), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
                writer.writeheader()
            cells = {key: _cell(path, key, value) for key, value in fields.items()}
            try:
                writer.writerow(cells)
            except ValueError as error:
                raise DataError(f"{path}: a row has other columns than the first ({error}); write .jsonl") from None
            count += 1
        text.detach()
    return count


def _cell(path: Path, column: str, value: Any) -> Any:
    """A value as a table's cell from which it is read as what it was."""
    if isinstance(value, list | dict):
        raise DataError(f"{path}: column {column!r} holds {sources.kind(value)}, which no cell can; write .jsonl")
    return json.dumps(value) if isinstance(value, bool) else value
