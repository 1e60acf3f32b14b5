"""A row's columns into an Example: text and label, prompt and completion, instruction and response, messages, text."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tunewright import chat
from tunewright.chat import Example, Message
from tunewright.data.sources import Row
from tunewright.errors import DataError
from tunewright.recipe import Recipe

CHAT_SHAPES = (("messages",), ("prompt", "completion"), ("instruction", "response"), ("instruction", "output"))
"""Columns that are recognised for task: chat when the recipe names none."""


class Unusable(Exception):
    """A row that cannot become an example: a code, and a sentence for a person."""

    def __init__(self, code: str, message: str, *, severity: str = "error") -> None:
        super().__init__(message)
        self.code = code
        self.severity = severity


@dataclass(frozen=True)
class Shape:
    """How rows of one table are read."""

    columns: dict[str, str]
    """Part of an example -> column."""
    read: Callable[[Row], Example]


def recognise(recipe: Recipe, first: Row, classes: Sequence[str] | None) -> Shape:
    """The shape of a table, from the recipe and its first row.

    Raises:
        DataError: the columns that are needed are not there.
    """
    data = recipe.data
    match recipe.task:
        case "classification":
            columns = {"text": data.text or "text", "label": data.label or "label"}
            names = _class_names(recipe, classes)
            reader: Callable[[Row], Example] = lambda row: _labelled(row, columns, names, data.system)  # noqa: E731
        case "pretraining":
            columns = {"text": data.text or "text"}
            reader = lambda row: _plain(row, columns)  # noqa: E731
        case "chat":
            columns = _chat_columns(recipe, first)
            reader = lambda row: _conversation(row, columns, data.system)  # noqa: E731
    for part, column in columns.items():
        if part != "input" and column not in first.fields:
            _missing(first, part, column)
    return Shape(columns, reader)


def _chat_columns(recipe: Recipe, first: Row) -> dict[str, str]:
    data = recipe.data
    named = {
        part: column
        for part in ("messages", "prompt", "completion", "instruction", "input", "response")
        if (column := getattr(data, part)) is not None
    }
    pairs = (("messages",), ("prompt", "completion"), ("instruction", "response"))
    if named:
        for pair in pairs:
            if any(part in named for part in pair):
                columns = {part: named.get(part, part) for part in pair}
                if pair[0] == "instruction" and (named.get("input") or "input" in first.fields):
                    columns["input"] = named.get("input", "input")
                return columns
        raise DataError("data.input alone says nothing; name data.instruction and data.response")
    for shape in CHAT_SHAPES:
        if all(column in first.fields for column in shape):
            columns = dict(zip(("messages",) if len(shape) == 1 else shape, shape, strict=True))
            if "output" in columns:
                columns["response"] = columns.pop("output")
            if "instruction" in columns and "input" in first.fields:
                columns["input"] = "input"
            return columns
    raise DataError(
        f"{first.where}: columns {', '.join(map(repr, first.fields))}: task: chat needs `messages`, or `prompt` and "
        "`completion`, or `instruction` and `response`; name yours in the recipe, such as data.prompt: question"
    )


def _labelled(row: Row, columns: dict[str, str], names: dict[str, str] | None, system: str | None) -> Example:
    text = _string(row, columns["text"], "empty_text")
    label = _label(_field(row, columns["label"]), columns["label"], names)
    messages = (Message("user", text), Message("assistant", label))
    return Example(row.where, row.where, _with_system(messages, system), label)


def _plain(row: Row, columns: dict[str, str]) -> Example:
    text = _field(row, columns["text"])
    if not isinstance(text, str):
        raise Unusable("wrong_type", f"column {columns['text']!r} is {_kind(text)}, not text")
    if not text.strip():
        raise Unusable("empty_text", f"column {columns['text']!r} is empty", severity="warning")
    return Example(row.where, row.where, text=text, ends=row.ends)


def _conversation(row: Row, columns: dict[str, str], system: str | None) -> Example:
    if "messages" in columns:
        messages = _messages(row, columns["messages"])
    else:
        asks, says = ("prompt", "completion") if "prompt" in columns else ("instruction", "response")
        prompt = _string(row, columns[asks], "empty_prompt")
        if "input" in columns and (extra := row.fields.get(columns["input"])):
            prompt = f"{prompt}\n\n{extra}"
        messages = (Message("user", prompt), Message("assistant", _string(row, columns[says], "empty_answer")))
    messages = _with_system(messages, system)
    try:
        chat.check_messages(messages, "")
    except DataError as error:
        raise Unusable("messages", str(error).removeprefix(": ")) from None
    if not any(message.role == "assistant" and message.weight and message.content.strip() for message in messages):
        raise Unusable("empty_answer", "no assistant message has anything to learn from", severity="warning")
    return Example(row.where, row.where, messages)


def _messages(row: Row, column: str) -> tuple[Message, ...]:
    given = _field(row, column)
    if not isinstance(given, list):
        raise Unusable("wrong_type", f"column {column!r} is {_kind(given)}, not a list of messages")
    messages = []
    for number, one in enumerate(given, start=1):
        if not isinstance(one, dict) or "role" not in one:
            raise Unusable("messages", f"message {number} has no role")
        if one.get("tool_calls") or one.get("function_call"):
            raise Unusable("messages", f"message {number} calls a tool; tool calls are not supported yet")
        content = one.get("content")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part["text"]) for part in content)
        if not isinstance(content, str):
            raise Unusable("messages", f"message {number} ({one['role']}): content is {_kind(content)}, not text")
        weight = one.get("weight")
        if weight not in (None, 0, 1):
            raise Unusable("messages", f"message {number}: weight is {weight!r}; it can be 0 or 1")
        messages.append(Message(str(one["role"]), content, 0 if weight == 0 else 1))
    return tuple(messages)


def _with_system(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    if system is None or (messages and messages[0].role == "system"):
        return messages
    return (Message("system", system), *messages)


def _field(row: Row, column: str) -> Any:
    if column not in row.fields:
        raise Unusable("missing_column", f"no column {column!r}; columns here: {', '.join(map(repr, row.fields))}")
    return row.fields[column]


def _string(row: Row, column: str, empty: str) -> str:
    value = _field(row, column)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Unusable(empty, f"column {column!r} is empty", severity="warning")
    if not isinstance(value, str):
        raise Unusable("wrong_type", f"column {column!r} is {_kind(value)}, not text")
    return value


def _label(value: Any, column: str, names: dict[str, str] | None) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    word = str(value).lower() if isinstance(value, bool) else str(value).strip()
    if value is None or word in ("", "nan"):
        raise Unusable("empty_label", f"column {column!r} is empty", severity="warning")
    if isinstance(value, list | dict):
        raise Unusable("wrong_type", f"column {column!r} is {_kind(value)}; one class for each row")
    if names is None:
        return word
    if word in names:
        return names[word]
    known = list(dict.fromkeys(names.values()))
    near = difflib.get_close_matches(word, known, n=1)
    hint = (
        f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known[:10])}{', ...' if len(known) > 10 else ''}"
    )
    raise Unusable("unknown_label", f"unknown label {word!r}; {hint}")


def _class_names(recipe: Recipe, classes: Sequence[str] | None) -> dict[str, str] | None:
    """What may stand in the label column -> the class's word. None: whatever stands there is the word."""
    given = recipe.data.labels
    if isinstance(given, dict):
        return {str(number): word for number, word in given.items()} | {word: word for word in given.values()}
    words = given or classes
    if words is None:
        return None
    return {str(number): word for number, word in enumerate(words)} | {word: word for word in words}


def _missing(row: Row, part: str, column: str) -> None:
    near = difflib.get_close_matches(column, row.fields, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"columns here: {', '.join(map(repr, row.fields))}"
    raise DataError(f"{row.where}: no column {column!r} for data.{part}; {hint} (set data.{part} in the recipe)")


def _kind(value: Any) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"
