"""A good recipe for a user's file: what `tunewright init` writes."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tunewright import recipe as recipes
from tunewright.data import shapes, sources
from tunewright.data.sources import Row
from tunewright.errors import DataError

TEXT_NAMES = ("text", "sentence", "review", "content", "message", "body", "utterance", "comment", "document", "title")
LABEL_NAMES = ("label", "labels", "class", "category", "intent", "sentiment", "target", "topic")
PAIRS = (
    ("prompt", "completion"),
    ("instruction", "response"),
    ("instruction", "output"),
    ("question", "answer"),
    ("input", "output"),
    ("prompt", "response"),
    ("query", "answer"),
    ("user", "assistant"),
)
LOOKED_AT = 2000
"""Rows that the guess is made from."""
MANY_CLASSES = 200


def recipe_for(source: str, *, model: str, name: str | None = None, test: str | None = None) -> str:
    """YAML of a recipe for a data file or hub data set, with comments.

    Raises:
        DataError: the data cannot be read, or nothing in it looks like something to learn.
        RecipeError: no recipe can have that name.
    """
    table = sources.read([source], "DATA")
    rows = [row for row in itertools.islice(table.rows, LOOKED_AT) if isinstance(row, Row)]
    if not rows:
        raise DataError(f"{source}: holds no readable row; `tunewright check` says what is wrong with each")
    task, columns, why = _guess(source, rows)
    test = test or _sibling(source)
    lines = [
        f"# Written by `tunewright init {' '.join(source.split())}`: {why}.",
        "# `tunewright check` this file, then `tunewright run` it. `tunewright schema` describes every key.",
        f"name: {_scalar(name or _name(source))}",
        f"model: {_scalar(model)}    # a hub name, a folder, or starter",
        f"task: {task}",
        "data:",
        f"  train: {_scalar(source)}",
        f"  test: {_scalar(test)}"
        if test
        else "  split: {test: 0.1, seed: 42}    # no test set here: a tenth is held out",
        *(f"  {part}: {_scalar(column)}" for part, column in columns.items()),
        "train:",
        "  method: lora    # or full: all weights",
        "  epochs: 3",
        "  learning_rate: 1.0e-5" + ("" if model != "starter" else "    # a small base such as starter likes 1.0e-4")
        if task == "preference"
        else "  learning_rate: 2.0e-4"
        + ("" if model != "starter" else "    # a small base such as starter likes 1.0e-3"),
        "  batch_size: 8",
        "evaluate:",
        "  must_beat: base    # exit code 3 unless the tuned model is better than this",
    ]
    text = "\n".join(lines) + "\n"
    recipes.loads(text, f"the recipe for {source}")
    return text


def _scalar(word: str) -> str:
    """A word as YAML reads it back, quoted where it must be."""
    try:
        same = yaml.safe_load(f"key: {word}    # note") == {"key": word}
    except (yaml.YAMLError, ValueError):
        same = False
    return word if same else json.dumps(word, ensure_ascii=False)


def _guess(source: str, rows: Sequence[Row]) -> tuple[str, dict[str, str], str]:
    """Task, columns by part, and the reason in words."""
    first = rows[0].fields
    names = {column.lower(): column for column in first}
    if "messages" in names:
        return "chat", {"messages": names["messages"]}, f"the column {names['messages']!r} holds chat messages"
    for shape in shapes.PAIR_SHAPES:
        if all(part in names for part in shape[1:]) and (shape[0] in names or isinstance(first[names[shape[1]]], list)):
            columns = {part: names[part] for part in shape if part in names}
            why = f"{names[shape[1]]!r} and {names[shape[2]]!r} look like a better and a worse answer"
            return "preference", columns, why
    if set(first) == {"text"}:
        return "pretraining", {"text": "text"}, "there is text and nothing else"
    text = next((names[one] for one in TEXT_NAMES if one in names and isinstance(first[names[one]], str)), None)
    label = next((names[one] for one in LABEL_NAMES if one in names), None)
    if text and label:
        return "classification", {"text": text, "label": label}, f"{label!r} looks like the class of {text!r}"
    for asks, says in PAIRS:
        if asks in names and says in names:
            parts = ("instruction", "response") if asks == "instruction" else ("prompt", "completion")
            columns = dict(zip(parts, (names[asks], names[says]), strict=True))
            if asks == "instruction" and "input" in names:
                columns["input"] = names["input"]
            return "chat", columns, f"{names[says]!r} looks like the answer to {names[asks]!r}"
    strings = [column for column in first if isinstance(first[column], str)]
    few = [column for column in first if _is_class(rows, column)]
    longest = max(strings, key=lambda column: sum(len(str(row.fields.get(column))) for row in rows), default=None)
    if longest is not None and few and longest not in few:
        column = min(few, key=lambda one: len(_values(rows, one)))
        return (
            "classification",
            {"text": longest, "label": column},
            f"{column!r} has {len(_values(rows, column))} values, so it looks like the class of {longest!r}",
        )
    if longest is not None and len(strings) == 1:
        return "pretraining", {"text": longest}, f"{longest!r} is the only text"
    columns_here = ", ".join(map(repr, first))
    known = " / ".join(" + ".join(shape) for shape in shapes.CHAT_SHAPES)
    raise DataError(
        f"{rows[0].where}: cannot tell what to learn from the columns {columns_here}; rename them to text and "
        f"label, or to those of a chat: {known}"
    )


def _values(rows: Sequence[Row], column: str) -> set[Any]:
    return {str(row.fields.get(column)) for row in rows}


def _is_class(rows: Sequence[Row], column: str) -> bool:
    values = _values(rows, column)
    return 2 <= len(values) <= min(MANY_CLASSES, max(2, len(rows) // 4)) and all(len(value) < 80 for value in values)


def _sibling(source: str) -> str | None:
    """test.jsonl beside train.jsonl; imdb:test beside imdb:train."""
    head, train, tail = source.rpartition("train")
    other = f"{head}test{tail}"
    try:
        if train and sources.is_file(source):
            sources.files(other, "DATA")
        elif train and head.endswith(":"):
            sources.read([other], "DATA")
        else:
            return None
    except DataError:  # there is none
        return None
    return other


def _name(source: str) -> str:
    stem = source.split(":")[0].rpartition("/")[2] if not sources.is_file(source) else Path(source).stem
    if stem in ("train", "data") and Path(source).absolute().parent.name:
        stem = Path(source).absolute().parent.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:60] or "my-model"
