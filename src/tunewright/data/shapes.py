"""A row's columns into an Example: text and label, prompt and completion, instruction and response, messages, text."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tunewright import chat, expressions
from tunewright.chat import Example, Message, ToolCall
from tunewright.data import sources
from tunewright.data.sources import Broken, Row
from tunewright.errors import DataError
from tunewright.recipe import SHAPES, Recipe, item_places

CHAT_SHAPES = (("messages",), ("prompt", "completion"), ("instruction", "response"), ("instruction", "output"))
"""Columns that are recognised for task: chat when the recipe names none."""
PAIR_SHAPES = (("input", "preferred_output", "non_preferred_output"), ("prompt", "chosen", "rejected"))
"""As CHAT_SHAPES, for task: preference. Two whole conversations in `chosen` and `rejected` hold the prompt."""
NO_VALUE = "(none)"
"""What a row without a value has in a column that the verdict is sliced by."""
LOOKED_AT = 1000
"""Rows among which the columns must turn up."""


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
    first: Row | None = None
    """The row that it was recognised by: from it, the same shape is recognised anywhere."""


def recognise(recipe: Recipe, rows: Iterable[Row], classes: Sequence[str] | None) -> Shape | None:
    """The shape of a table, from the recipe and the first row that has the columns. None where there is no row.

    Raises:
        DataError: the first row lacks a column, and so do those behind it.
    """
    problem: DataError | None = None
    for row in itertools.islice(rows, LOOKED_AT):
        try:
            return _shape(recipe, row, classes)
        except DataError as error:
            problem = problem or error
    if problem is not None:
        raise problem
    return None


def check_slices(recipe: Recipe, rows: Iterable[Row | Broken]) -> None:
    """Refuse a column to slice the verdict by that the first test rows do not have, none of them.

    Raises:
        DataError: naming it, and those that there are.
    """
    missing = set(recipe.evaluate.slices)
    known: dict[str, None] = {}
    where = None
    for row in itertools.islice((row for row in rows if isinstance(row, Row)), LOOKED_AT) if missing else ():
        where = where or row.where
        known |= dict.fromkeys(row.fields)
        missing -= known.keys()
        if not missing:
            return
    if where is not None and missing:
        column = next(one for one in recipe.evaluate.slices if one in missing)
        hint = nearest(column, list(known))
        raise DataError(f"{where}: evaluate.slices: no column {column!r} in the test rows; {hint}")


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint for a word that is not among those known."""
    near = difflib.get_close_matches(word, known, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(known[:10])}{', ...' if len(known) > 10 else ''}"


def _shape(recipe: Recipe, first: Row, classes: Sequence[str] | None) -> Shape:
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
        case "preference":
            columns = _pair_columns(recipe, first)
            reader = lambda row: _pair(row, columns, data.system)  # noqa: E731
        case "reward":
            columns = _prompt_columns(recipe, first)
            places = item_places(recipe.grader) if recipe.grader else []
            reader = lambda row: _asked(row, columns, data.system, places)  # noqa: E731
    for part, column in columns.items():
        if column not in first.fields and (part != "input" or data.input is not None):
            _missing(first, part, column)
    return Shape(columns, _sliced(reader, recipe.evaluate.slices) if recipe.evaluate.slices else reader, first)


def _sliced(reader: Callable[[Row], Example], columns: Sequence[str]) -> Callable[[Row], Example]:
    """The same examples with what their rows say in some columns."""

    def read(row: Row) -> Example:
        return replace(reader(row), slices={column: _said(row.fields.get(column)) for column in columns})

    return read


def _said(value: Any) -> str:
    if value is None or value == "":
        return NO_VALUE
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _chat_columns(recipe: Recipe, first: Row) -> dict[str, str]:
    data = recipe.data
    named = {
        part: column
        for part in ("messages", "prompt", "completion", "instruction", "input", "response")
        if (column := getattr(data, part)) is not None
    }
    for shape in SHAPES["chat"]:
        if any(part in named for part in shape):
            return {part: named.get(part, part) for part in shape}
    for columns in CHAT_SHAPES:
        if all(column in first.fields for column in columns):
            if columns[0] == "instruction":
                return {"instruction": "instruction", "input": "input", "response": columns[-1]}
            return {column: column for column in columns}
    raise DataError(
        f"{first.where}: columns {', '.join(map(repr, first.fields))}: task: chat needs `messages`, or `prompt` and "
        "`completion`, or `instruction` and `response`; name yours in the recipe, such as data.prompt: question"
    )


def _pair_columns(recipe: Recipe, first: Row) -> dict[str, str]:
    """Part -> column; no `prompt` where the answers are whole conversations."""
    data = recipe.data
    for shape in SHAPES["preference"]:
        named = {part: column for part in shape if (column := getattr(data, part)) is not None}
        if named:
            columns = {part: named.get(part, part) for part in shape}
            if shape[0] == "prompt" and "prompt" not in named and "prompt" not in first.fields:
                del columns["prompt"]
            return columns
    for shape in PAIR_SHAPES:
        if all(column in first.fields for column in shape):
            return {column: column for column in shape}
    if all(isinstance(first.fields.get(column), list) for column in ("chosen", "rejected")):
        return {"chosen": "chosen", "rejected": "rejected"}
    raise DataError(
        f"{first.where}: columns {', '.join(map(repr, first.fields))}: task: preference needs `prompt`, `chosen` and "
        "`rejected`, or OpenAI's `input`, `preferred_output` and `non_preferred_output`; name yours in the recipe, "
        "such as data.chosen: better"
    )


def _prompt_columns(recipe: Recipe, first: Row) -> dict[str, str]:
    data = recipe.data
    for (part,) in SHAPES["reward"]:
        if (column := getattr(data, part)) is not None:
            return {part: column}
    for (part,) in SHAPES["reward"]:
        if part in first.fields:
            return {part: part}
    raise DataError(
        f"{first.where}: columns {', '.join(map(repr, first.fields))}: task: reward needs `messages` that end with the "
        "user's, or `prompt`; name yours in the recipe, such as data.prompt: question"
    )


def _labelled(row: Row, columns: dict[str, str], names: dict[str, str] | None, system: str | None) -> Example:
    text = _string(row, columns["text"], "empty_text")
    label = _label(_field(row, columns["label"]), columns["label"], names)
    messages = (Message("user", text), Message("assistant", label))
    return Example(row.where, row.where, _with_system(messages, system), label)


def _plain(row: Row, columns: dict[str, str]) -> Example:
    return Example(row.where, row.where, text=_string(row, columns["text"], "empty_text"), ends=row.ends)


def _conversation(row: Row, columns: dict[str, str], system: str | None) -> Example:
    tools: tuple[dict[str, Any], ...] = ()
    if "messages" in columns:
        tools = _tools(row)
        messages = _messages(row, columns["messages"], tools)
    else:
        asks, says = ("prompt", "completion") if "prompt" in columns else ("instruction", "response")
        prompt = _string(row, columns[asks], "empty_prompt")
        column = columns.get("input")
        if column is not None and row.fields.get(column) is not None and (extra := _text(row, column)).strip():
            prompt = f"{prompt}\n\n{extra}"
        messages = (Message("user", prompt), Message("assistant", _string(row, columns[says], "empty_answer")))
    messages = _with_system(messages, system)
    try:
        chat.check_messages(messages, "")
    except DataError as error:
        raise Unusable("messages", str(error).removeprefix(": ")) from None
    if not messages[-1].content.strip() and not messages[-1].tool_calls:
        raise Unusable("empty_answer", "the last assistant message is empty", severity="warning")
    if not any(message.role == "assistant" and message.weight for message in messages):
        raise Unusable("empty_answer", "every assistant message has weight 0", severity="warning")
    return Example(row.where, row.where, messages, tools=tools)


def conversation(row: Row, column: str) -> tuple[tuple[Message, ...], tuple[dict[str, Any], ...]]:
    """The messages of a row that is to be answered and the tools that it declares, read as rows to learn from are.

    Raises:
        DataError: saying what is wrong with them.
    """
    try:
        tools = _tools(row)
        return _messages(row, column, tools), tools
    except Unusable as error:
        raise DataError(str(error)) from None


def _tools(row: Row) -> tuple[dict[str, Any], ...]:
    """The functions that a row declares in the column `tools`: a list as OpenAI has it, or the same as JSON text, since
    a table's column cannot hold schemas of different shapes. `parallel_tool_calls` is not read: no template has it."""
    if row.fields.get("functions"):
        raise Unusable("tools", "`functions` is OpenAI's old form; declare them in `tools`")
    given = row.fields.get("tools")
    if isinstance(given, str) and given.strip():
        given = _json(given, "`tools`")
    if not given:
        return ()
    if not isinstance(given, list):
        raise Unusable("tools", f"`tools` is {sources.kind(given)}, not a list")
    for number, tool in enumerate(given, start=1):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise Unusable(
                "tools", f'tool {number} is not a function: {{"type": "function", "function": {{"name": ...}}}}'
            )
        if not isinstance(function.get("parameters") or {}, dict):
            raise Unusable("tools", f"tool {number} ({function['name']}): parameters is not a JSON schema")
    return tuple(given)


def _tool_calls(given: Any, number: int, tools: Sequence[dict[str, Any]]) -> tuple[ToolCall, ...]:
    here = f"message {number}"
    if not isinstance(given, list):
        raise Unusable("messages", f"{here}: tool_calls is {sources.kind(given)}, not a list")
    declared = [tool["function"]["name"] for tool in tools]
    calls = []
    for place, one in enumerate(given, start=1):
        which = f"{here}, call {place}"
        function = one.get("function") if isinstance(one, dict) else None
        function = function if isinstance(function, dict) else {}
        name = function.get("name")
        if not isinstance(name, str) or not name or one.get("type", "function") != "function":
            raise Unusable("messages", f'{which} is not {{"type": "function", "function": {{"name", "arguments"}}}}')
        if declared and name not in declared:
            raise Unusable("messages", f"{which}: {name!r} is not among the row's `tools`; {nearest(name, declared)}")
        call_id = one.get("id")
        if call_id is not None and not isinstance(call_id, str):
            raise Unusable("messages", f"{which} ({name}): id is {sources.kind(call_id)}, not text")
        calls.append(ToolCall(name, _arguments(function.get("arguments"), f"{which} ({name})"), call_id))
    return tuple(calls)


def _arguments(given: Any, which: str) -> str:
    """A call's arguments as JSON text: OpenAI gives text, other data sets an object."""
    try:
        text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    except TypeError as error:  # a date, say, in a Parquet file
        raise Unusable("messages", f"{which}: arguments: {error}; give them as JSON text") from None
    read = _json(text, f"{which}: arguments")
    if not isinstance(read, dict):
        raise Unusable("messages", f"{which}: arguments is {sources.kind(read)}, not a JSON object")
    return text


def _json(text: str, what: str) -> Any:
    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(text, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise Unusable("messages", f"{what}: not JSON ({error}): {text[:60]!r}") from None


def _pair(row: Row, columns: dict[str, str], system: str | None) -> Example:
    """A prompt with its better answer, and the worse one."""
    better, worse = ("preferred_output", "non_preferred_output") if "input" in columns else ("chosen", "rejected")
    prompt: tuple[Message, ...] | None = None
    if "input" in columns:
        given = _field(row, columns["input"])
        if not isinstance(given, dict) or "messages" not in given:
            raise Unusable("wrong_type", f"column {columns['input']!r} is not an object with `messages`")
        if given.get("tools"):
            raise Unusable("messages", f"column {columns['input']!r} has tools; pairs are learnt without")
        prompt = _messages(row, columns["input"], given=given["messages"])
    elif "prompt" in columns:
        prompt = _prompt(row, columns["prompt"])
    before, chosen = _answer(row, columns[better], prompt)
    other, rejected = _answer(row, columns[worse], prompt)
    if before != other:
        raise Unusable("prompts_differ", f"{columns[better]!r} and {columns[worse]!r} answer different prompts")
    messages = _with_system((*before, Message("assistant", chosen)), system)
    try:
        chat.check_messages(messages, "")
    except DataError as error:
        raise Unusable("messages", str(error).removeprefix(": ")) from None
    if chosen.strip() == rejected.strip():
        raise Unusable("same_answers", "the better answer and the worse one are the same", severity="warning")
    return Example(row.where, row.where, messages, rejected=rejected)


def _answer(row: Row, column: str, prompt: tuple[Message, ...] | None) -> tuple[tuple[Message, ...], str]:
    """What an answer answers, and the answer: a text, or messages of which the last is the assistant's.

    Of several messages those before the last are the prompt; where there is one already, they repeat it.
    """
    if prompt is not None and isinstance(_field(row, column), str | None):
        return prompt, _string(row, column, "empty_answer")
    messages = _messages(row, column)
    if not messages or messages[-1].role != "assistant":
        raise Unusable("messages", f"column {column!r} does not end with a message from 'assistant'")
    if not messages[-1].content.strip():
        raise Unusable("empty_answer", f"the answer in column {column!r} is empty", severity="warning")
    before = messages[:-1]
    if prompt is None:
        return before, messages[-1].content
    if before and before != prompt:
        raise Unusable("messages", f"column {column!r} holds {len(messages)} messages; it takes one answer")
    return prompt, messages[-1].content


def _asked(row: Row, columns: dict[str, str], system: str | None, places: Sequence[expressions.Place]) -> Example:
    """A prompt, and the row for the grader."""
    ((part, column),) = columns.items()
    messages = _with_system(_messages(row, column) if part == "messages" else _prompt(row, column), system)
    if not messages:
        raise Unusable("messages", f"column {column!r} is empty; there is nothing to answer")
    if messages[-1].role == "assistant":
        raise Unusable(
            "messages",
            "the last message is from 'assistant'; task: reward needs a prompt, which ends with the user's message "
            "(what is expected goes into a column of its own, for the grader)",
        )
    for message in messages:
        if message.role not in chat.ROLES:
            raise Unusable("messages", f"unknown role {message.role!r}; known: {', '.join(chat.ROLES)}")
    item: dict[str, Any] = json.loads(json.dumps(row.fields, default=str))
    for place in places:
        try:
            expressions.look_up(item, place)
        except LookupError:
            raise Unusable(
                "missing_column",
                f"the grader reads item.{expressions.spelled(place)}, which the row lacks; columns here: "
                f"{', '.join(map(repr, row.fields))}",
            ) from None
    return Example(row.where, row.where, messages, item=item)


def _prompt(row: Row, column: str) -> tuple[Message, ...]:
    """A prompt that is a text, or messages."""
    if isinstance(_field(row, column), list):
        return _messages(row, column)
    return (Message("user", _string(row, column, "empty_prompt")),)


def _messages(row: Row, column: str, tools: Sequence[dict[str, Any]] = (), given: Any = None) -> tuple[Message, ...]:
    """The messages in a column, or in what was `given` from it."""
    given = _field(row, column) if given is None else given
    if not isinstance(given, list):
        raise Unusable("wrong_type", f"column {column!r} is {sources.kind(given)}, not a list of messages")
    messages = []
    for number, one in enumerate(given, start=1):
        if not isinstance(one, dict) or "role" not in one:
            raise Unusable("messages", f"message {number} has no role")
        if one.get("function_call"):
            raise Unusable("messages", f"message {number}: `function_call` is OpenAI's old form; use `tool_calls`")
        calls = _tool_calls(one["tool_calls"], number, tools) if one.get("tool_calls") else ()
        content = one.get("content")
        if content is None and calls:
            content = ""
        if isinstance(content, list) and all(_is_text_part(part) for part in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise Unusable(
                "messages", f"message {number} ({one['role']}): content is {sources.kind(content)}, not text"
            )
        weight = one.get("weight")
        if weight not in (None, 0, 1):
            raise Unusable("messages", f"message {number}: weight is {weight!r}; it can be 0 or 1")
        role, answers = str(one["role"]), {}
        if role == "tool":
            answers = {key: one[key] for key in ("tool_call_id", "name") if one.get(key) is not None}
            for key, value in answers.items():
                if not isinstance(value, str):
                    raise Unusable("messages", f"message {number} (tool): {key} is {sources.kind(value)}, not text")
        messages.append(Message(role, content, 0 if weight == 0 else 1, calls, **answers))
    return tuple(messages)


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _with_system(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    if system is None or (messages and messages[0].role in ("system", "developer")):
        return messages
    return (Message("system", system), *messages)


def _field(row: Row, column: str) -> Any:
    if column not in row.fields:
        raise Unusable("missing_column", f"no column {column!r}; columns here: {', '.join(map(repr, row.fields))}")
    return row.fields[column]


def _string(row: Row, column: str, empty: str) -> str:
    text = "" if _field(row, column) is None else _text(row, column)
    if not text.strip():
        raise Unusable(empty, f"column {column!r} is empty", severity="warning")
    return text


def _text(row: Row, column: str) -> str:
    value = _field(row, column)
    if not isinstance(value, str):
        raise Unusable("wrong_type", f"column {column!r} is {sources.kind(value)}, not text")
    return value


def _label(value: Any, column: str, names: dict[str, str] | None) -> str:
    if isinstance(value, list | dict):
        raise Unusable("wrong_type", f"column {column!r} is {sources.kind(value)}; one class for each row")
    if value is None or value != value or str(value).strip() == "":  # NaN is not itself
        raise Unusable("empty_label", f"column {column!r} is empty", severity="warning")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    word = str(value).lower() if isinstance(value, bool) else str(value).strip()
    if names is None:
        return word
    if isinstance(value, bool) and word not in names:
        word = str(int(value))
    if word in names:
        return names[word]
    raise Unusable("unknown_label", f"unknown label {word!r}; {nearest(word, list(dict.fromkeys(names.values())))}")


def _class_names(recipe: Recipe, classes: Sequence[str] | None) -> dict[str, str] | None:
    """What may stand in the label column -> the class's word. None: whatever stands there is the word.

    Raises:
        DataError: a class is called as another one is numbered.
    """
    given = recipe.data.labels
    if given is None:
        if classes is None:
            return None
        # The data set's own classes: its column holds their numbers, also where a class is called `1`.
        return {word: word for word in classes} | {str(number): word for number, word in enumerate(classes)}
    numbered = {str(number): word for number, word in (given.items() if isinstance(given, dict) else enumerate(given))}
    for word in numbered.values():
        if numbered.get(word, word) != word:
            raise DataError(
                f"data.labels: {word!r} is the word of one class and the number of another ({numbered[word]!r}); say "
                f"which number means which word, such as {{1: one, 2: two}}, or leave data.labels out"
            )
    return numbered | {word: word for word in numbered.values()}


def _missing(row: Row, part: str, column: str) -> None:
    near = difflib.get_close_matches(column, row.fields, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"columns here: {', '.join(map(repr, row.fields))}"
    raise DataError(f"{row.where}: no column {column!r} for data.{part}; {hint} (set data.{part} in the recipe)")
