"""Calls of functions: how a model's template writes them, the grammar that makes it write one, and calls read out of
what it wrote.

Read are a template's own form, lines `Call: {json}` (our default template's), `<tool_call>{json}</tool_call>`, and an
answer that begins as a JSON object, or a list of them, with a name and arguments (or parameters). Only functions that
the request declares are called; anything else is text.

What is not covered: forms that are no JSON (XML-like parameters, Python-like calls).
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunewright import chat
from tunewright.chat import Message, ToolCall
from tunewright.endpoint.answers import Call, End, Piece, overlap
from tunewright.endpoint.guide import LAYOUT
from tunewright.errors import DataError
from tunewright.generate import Token

ARGUMENTS = ("arguments", "parameters")
MARKS = ("<tool_call>", "Call:")
ENDS = ("</tool_call>", "]", ";", ",")
"""What may stand behind a call and says nothing."""
PROBES = ("tool_probe_one", "tool_probe_two")


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is Python's, not JSON's")


DECODER = json.JSONDecoder(parse_constant=_no_json)


@dataclass(frozen=True)
class Form:
    """How a chat template writes calls: text around JSON objects."""

    before: str
    after: str
    between: str | None
    """None where the template takes one call in a message."""
    arguments: str
    """What the key of the arguments is."""
    end: str
    """The token that ends the turn."""


@dataclass(frozen=True)
class Toolbox:
    """The functions of one request."""

    tools: tuple[dict[str, Any], ...]
    """OpenAI's `tools`."""
    must: bool = False
    """Whether one has to be called."""
    several: bool = True
    """Whether there may be several calls in an answer."""

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool["function"]["name"] for tool in self.tools)


def form_of(tokenizer: Any) -> Form | None:
    """How the tokenizer's template writes calls; None where that is no JSON object with a name and arguments."""
    for count in (2, 1):
        names = PROBES[:count]
        tools = tuple({"type": "function", "function": {"name": name, "parameters": {}}} for name in names)
        calls = tuple(ToolCall(name, '{"x": 1}', f"call0000{place}") for place, name in enumerate(names))
        probe = (Message("user", "a"), Message("assistant", "", tool_calls=calls))
        try:
            *_, (target, _is_target) = chat.segments(tokenizer, probe, tools)
        except DataError:  # it takes no two calls, or none
            continue
        spans = [span for name in names if (span := _written(target, name)) is not None]
        if len(spans) == count:
            end = target[spans[-1][1] :]
            turn_end = str(tokenizer.convert_ids_to_tokens(chat.encode(tokenizer, target)[-1]))
            between = target[spans[0][1] : spans[1][0]] if count == 2 else None
            return Form(target[: spans[0][0]], end.removesuffix(turn_end), between, spans[0][2], turn_end)
    return None


def grammar(tokenizer: Any, form: Form, toolbox: Toolbox, answer: Mapping[str, Any] | None = None) -> str:
    """The grammar of an answer that calls, or of one that calls or is JSON of the schema `answer`."""
    from llguidance import LLMatcher

    alternatives, definitions = [], {}
    for place, tool in enumerate(toolbox.tools):
        function = tool["function"]
        parameters = function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
        definitions[f"tool{place}"] = _moved(parameters, f"#/$defs/tool{place}")
        alternatives.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": function["name"]},
                    form.arguments: {"$ref": f"#/$defs/tool{place}"},
                },
                "required": ["name", form.arguments],
                "additionalProperties": False,
            }
        )
    call = {"anyOf": alternatives, "$defs": definitions, "x-guidance": LAYOUT}
    rules = [f"call: %json {json.dumps(call)}"]
    calls = [*_literals(tokenizer, form.before), "call"]
    if toolbox.several and form.between is not None:
        calls += ["(", *_literals(tokenizer, form.between), "call", ")*"]
    rules.append(" ".join(["calls:", *calls, *_literals(tokenizer, form.after)]))
    if answer is not None:
        rules.append(f"answer: %json {json.dumps({**answer, 'x-guidance': LAYOUT})}")
    start = "start: calls" if answer is None else "start: answer | calls"
    return str(LLMatcher.grammar_from_lark("\n".join([start, *rules])))


def read(events: Iterable[Piece | End], toolbox: Toolbox, form: Form | None) -> Iterator[Piece | Call | End]:
    """An answer's events with the calls read out of its text. Tokens come with the pieces that they came with."""
    reader = Reader(toolbox, form)
    for num_tokens, event in enumerate(events, start=1):
        if isinstance(event, End):
            yield from _told(reader.flush(), [])
            called = reader.called > 0 and event.finish_reason == "stop"
            yield End("tool_calls" if called else event.finish_reason, event.num_tokens)
            return
        yield from _told(reader.push(event.text), event.tokens)
        if reader.full:
            yield End("tool_calls", num_tokens)
            return


class Reader:
    """Tells calls from text, however the answer is cut into pieces. What may be the beginning of a call is held."""

    def __init__(self, toolbox: Toolbox, form: Form | None) -> None:
        self.called = 0
        self._names = toolbox.names
        self._one = not toolbox.several
        own = form.before.strip() if form else ""
        # A mark that is no more than a bracket says nothing in the middle of a text.
        self._marks = tuple(dict.fromkeys((*MARKS, *([own] if re.search(r"\w", own) else []))))
        self._ends = (*ENDS, *([form.after.strip()] if form and form.after.strip() else []))
        self._held = ""
        self._begins = True
        """Whether what is held stands at the beginning, or right behind a call."""

    @property
    def full(self) -> bool:
        """Whether the one call that there may be has been made."""
        return self._one and self.called > 0

    def push(self, text: str) -> list[str | Call]:
        """What can be told by now."""
        self._held += text
        return self._take(done=False)

    def flush(self) -> list[str | Call]:
        """What is left when the answer has ended."""
        return self._take(done=True)

    def _take(self, *, done: bool) -> list[str | Call]:
        said: list[str | Call] = []
        while self._held and not self.full:
            if self._begins and self.called and not self._tidied(done=done):
                break
            place = self._next()
            if place is None:
                said += self._say(len(self._held) - (0 if done else self._doubtful()))
                break
            start, body = place
            clear = len(self._held[:start].rstrip())
            said += self._say(clear)
            found = self._calls(body - clear)
            if found is None:
                said += self._say(len(self._held)) if done else []
                break
            calls, end = found
            if not calls:
                said += self._say(end)
                continue
            calls = calls[:1] if self._one else calls
            said += calls
            self.called += len(calls)
            self._held = self._held[end:]
            self._begins = True
        return said

    def _say(self, size: int) -> list[str | Call]:
        """The first characters of what is held, as text."""
        text, self._held = self._held[:size], self._held[size:]
        self._begins = self._begins and not text
        return [text] if text else []

    def _tidied(self, *, done: bool) -> bool:
        """Take away what ends a call; whether it is clear that all of it has come."""
        while True:
            self._held = self._held.lstrip()
            if not done and any(overlap(self._held, end) == len(self._held) for end in self._ends):
                return False
            end = next((one for one in self._ends if self._held.startswith(one)), None)
            if end is None:
                return bool(self._held)
            self._held = self._held[len(end) :]

    def _next(self) -> tuple[int, int] | None:
        """Where a call may begin, and where its JSON does."""
        places = []
        blank = len(self._held) - len(self._held.lstrip())
        if self._begins and self._held[blank : blank + 1] in ("{", "["):
            places.append((blank, blank))
        for mark in self._marks:
            line = (r"(?:(?<=\n)|\A)[ \t]*" if self._begins else r"(?<=\n)[ \t]*") if mark == "Call:" else ""
            if found := re.search(line + re.escape(mark) + r"\s*", self._held):
                places.append(found.span())
        return min(places, default=None)

    def _calls(self, body: int) -> tuple[list[Call], int] | None:
        """The calls whose JSON begins at `body`, none if it is something else, and where it ends; None while that
        cannot be told."""
        if body >= len(self._held):
            return None
        if self._held[body] not in "{[":
            return [], body
        try:
            value, end = DECODER.raw_decode(self._held, body)
        except (ValueError, RecursionError):
            return None
        values = value if isinstance(value, list) else [value]
        calls = [call for one in values if (call := self._call(one)) is not None]
        if not calls or len(calls) < len(values):
            return [], end
        return calls, end

    def _call(self, value: Any) -> Call | None:
        if isinstance(value, dict) and isinstance(value.get("function"), dict):
            value = value["function"]
        if not isinstance(value, dict) or not isinstance(value.get("name"), str) or value["name"] not in self._names:
            return None
        given = next((value[key] for key in ARGUMENTS if key in value), None)
        if isinstance(given, str):  # some write the arguments as text once more
            try:
                given = DECODER.decode(given)
            except (ValueError, RecursionError):
                return None
        if not isinstance(given, dict):
            return None
        return Call(f"call_{secrets.token_hex(12)}", value["name"], json.dumps(given, ensure_ascii=False))

    def _doubtful(self) -> int:
        """How many of the last characters may be the beginning of a call, with the blanks before it."""
        begun = max(overlap(self._held, mark) for mark in self._marks)
        before = self._held[: len(self._held) - begun]
        return len(self._held) - len(before.rstrip())


def _told(said: Sequence[str | Call], tokens: list[Token]) -> Iterator[Piece | Call]:
    """What a reader gave for one piece; the piece's tokens come first."""
    if tokens or not said:
        first, said = (said[0], said[1:]) if said and isinstance(said[0], str) else ("", said)
        yield Piece(str(first), tokens)
    for one in said:
        yield Piece(one) if isinstance(one, str) else one


def _written(text: str, name: str) -> tuple[int, int, str] | None:
    """Where the JSON object of a call stands in a text, and the key of its arguments."""
    for found in re.finditer(r"\{", text):
        try:
            value, end = DECODER.raw_decode(text, found.start())
        except ValueError:
            continue
        if isinstance(value, dict) and value.get("name") == name:
            key = next((key for key in ARGUMENTS if isinstance(value.get(key), dict)), None)
            return (found.start(), end, key) if key else None
    return None


def _literals(tokenizer: Any, text: str) -> list[str]:
    """A text in a grammar; special tokens are named by their ids."""
    specials = set(tokenizer.all_special_ids)
    parts: list[str] = []
    plain: list[int] = []

    def settle() -> None:
        if plain:
            parts.append(json.dumps(tokenizer.decode(plain, clean_up_tokenization_spaces=False)))
            plain.clear()

    for token in chat.encode(tokenizer, text):
        if token in specials:
            settle()
            parts.append(f"<[{token}]>")
        else:
            plain.append(token)
    settle()
    return parts


def _moved(schema: Any, root: str) -> Any:
    """A schema that stands below `root` in another one, its references with it."""
    if isinstance(schema, list):
        return [_moved(one, root) for one in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, root) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = root + reference[1:]
    return moved
