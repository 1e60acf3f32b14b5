"""What a grader's text may hold: templates such as `{{ item.answer }}`, and formulas such as `0.7 * right + 0.3`.

Both are checked when a recipe is read, and neither runs code: a template looks values up, a formula computes with the
few operations below. The forms are those of OpenAI's graders.

What is not covered: conditions, loops and filters in a template; names in a formula other than those of its graders.
"""

from __future__ import annotations

import ast
import functools
import json
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

SAMPLE = (("output_text",),)
"""What a template can say of the answer that is graded: `{{ sample.output_text }}`."""
LONGEST_FORMULA = 2000
"""Characters; Python's own parser gives up on text that is nested too deeply."""

Place = tuple[str | int, ...]
"""item or sample, then keys and list indexes."""

_SLOT = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_PATH = re.compile(r"(item|sample)((?:\.[^\W\d][\w-]*|\[\d+\])+)")

OPERATORS: dict[type[ast.operator | ast.unaryop], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
FUNCTIONS: dict[str, tuple[Callable[..., float], int | None]] = {
    "min": (min, None),
    "max": (max, None),
    "abs": (abs, 1),
    "floor": (math.floor, 1),
    "ceil": (math.ceil, 1),
    "exp": (math.exp, 1),
    "sqrt": (math.sqrt, 1),
    "log": (math.log, 1),
}
"""Name -> function and how many numbers it takes (None: one or more)."""


@functools.lru_cache(maxsize=1024)
def template(text: str) -> tuple[str | Place, ...]:
    """A template in pieces: text, and places to look values up at.

    Raises:
        ValueError: a slot is not closed, or names something that is not there.
    """
    pieces: list[str | Place] = []
    end = 0
    for slot in _SLOT.finditer(text):
        pieces += [text[end : slot.start()], _place(slot.group(1).strip())]
        end = slot.end()
    pieces.append(text[end:])
    if any(isinstance(piece, str) and "{{" in piece for piece in pieces):
        raise ValueError("a {{ is not closed by }}")
    return tuple(piece for piece in pieces if piece != "")


def item_places(text: str) -> list[Place]:
    """Where a template looks into the row: keys and indexes under `item`."""
    return [piece[1:] for piece in template(text) if isinstance(piece, tuple) and piece[0] == "item"]


def fill(text: str, item: Mapping[str, Any], sample: Mapping[str, Any]) -> str:
    """The template with its values: a string as it is, anything else as JSON.

    Raises:
        LookupError: the row has no such field.
    """
    known = {"item": item, "sample": sample}
    return "".join(piece if isinstance(piece, str) else _written(look_up(known, piece)) for piece in template(text))


def look_up(known: Any, place: Place) -> Any:
    """The value at a place.

    Raises:
        LookupError: there is none.
    """
    found = known
    for part in place:
        if isinstance(part, int):
            there = isinstance(found, list) and part < len(found)
        else:
            there = isinstance(found, Mapping) and part in found
        if not there:
            raise LookupError(f"there is no {spelled(place)}")
        found = found[part]
    return found


def spelled(place: Place) -> str:
    """A place as a template writes it."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def _place(path: str) -> Place:
    found = _PATH.fullmatch(path)
    if found is None:
        raise ValueError(f"{{{{ {path} }}}} is neither item.COLUMN of the row nor sample.output_text")
    parts = re.findall(r"\.([^\W\d][\w-]*)|\[(\d+)\]", found.group(2))
    below: Place = tuple(key or int(index) for key, index in parts)
    if found.group(1) == "sample" and below not in SAMPLE:
        raise ValueError(f"{{{{ {path} }}}}: of the sample there is output_text, the answer's text, and nothing else")
    return (found.group(1), *below)


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@functools.lru_cache(maxsize=256)
def formula(text: str) -> ast.expr:
    """A formula, read: numbers, names, + - * / ^ (or **), parentheses, and `FUNCTIONS`.

    Raises:
        ValueError: it says something else.
    """
    if len(text) > LONGEST_FORMULA:
        raise ValueError(f"the formula has {len(text):,} characters; at most {LONGEST_FORMULA:,} are read")
    if bad := re.search(r"[^\w\s.+\-*/^(),]", text):
        raise ValueError(f"{bad.group()!r} is not part of a formula; there are numbers, names, + - * / ^ and ( )")
    try:
        tree = ast.parse(text.strip().replace("^", "**"), mode="eval").body
        _check(tree)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{text!r} is not a formula such as 0.7 * right + 0.3 * near") from None
    return tree


def names(text: str) -> set[str]:
    """The names in a formula that are no functions."""
    called = {id(node.func) for node in ast.walk(formula(text)) if isinstance(node, ast.Call)}
    return {node.id for node in ast.walk(formula(text)) if isinstance(node, ast.Name) and id(node) not in called}


def check_formula(text: str, known: Collection[str]) -> None:
    """Refuse a formula that names what is not known.

    Raises:
        ValueError: naming it.
    """
    unknown = sorted(names(text) - set(known))
    if unknown:
        raise ValueError(f"{unknown[0]!r} is none of the graders; there is {', '.join(known)}")


def compute(text: str, values: Mapping[str, float]) -> float:
    """The formula's value.

    Raises:
        ArithmeticError: it has none (a division by zero, a root of a negative number, an overflow).
    """
    try:
        value = _value(formula(text), values)
    except ValueError as error:  # math's own: log of 0, sqrt of -1
        raise ArithmeticError(str(error)) from None
    if not math.isfinite(value):
        raise ArithmeticError(f"the result is {value}")
    return value


def _check(node: ast.AST) -> None:
    match node:
        case ast.Constant(value=value) if type(value) in (int, float):
            pass
        case ast.Name():
            pass
        case ast.BinOp() if type(node.op) in OPERATORS:
            _check(node.left)
            _check(node.right)
        case ast.UnaryOp() if type(node.op) in OPERATORS:
            _check(node.operand)
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in FUNCTIONS:
            takes = FUNCTIONS[name][1]
            if not node.args or (takes is not None and len(node.args) != takes):
                raise ValueError(f"{name}() takes {takes or 'one or more'} number{'s' if takes is None else ''}")
            for argument in node.args:
                _check(argument)
        case ast.Call(func=ast.Name(id=name)):
            raise ValueError(f"there is no function {name}(); there is {', '.join(FUNCTIONS)}")
        case _:
            raise ValueError(f"{ast.unparse(node)!r} is not part of a formula")


def _value(node: ast.AST, values: Mapping[str, float]) -> float:
    match node:
        case ast.Constant(value=value):
            return float(value)  # type: ignore[arg-type]  # `_check` let numbers through and nothing else
        case ast.Name(id=name):
            return float(values[name])
        case ast.BinOp():
            result = OPERATORS[type(node.op)](_value(node.left, values), _value(node.right, values))
            if isinstance(result, complex):
                raise ArithmeticError("a root of a negative number")
            return result
        case ast.UnaryOp():
            return OPERATORS[type(node.op)](_value(node.operand, values))
        case ast.Call(func=ast.Name(id=name)):
            return float(FUNCTIONS[name][0](*(_value(argument, values) for argument in node.args)))
    raise AssertionError(node)
