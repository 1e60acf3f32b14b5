"""A template finds what it names and a formula computes as written; both refuse the rest when they are read."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright import expressions

KEY = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,8}", fullmatch=True)
PLAIN = st.text().filter(lambda text: "{" not in text and "}" not in text)
VALUE = st.one_of(st.text(), st.integers(), st.booleans(), st.none(), st.lists(st.integers(), max_size=3))


@given(before=PLAIN, key=KEY, after=PLAIN, value=VALUE, space=st.sampled_from(["", " ", "  ", "\n"]))
def test_a_slot_is_replaced_and_the_rest_is_kept(before: str, key: str, after: str, value: Any, space: str) -> None:
    text = before + "{{" + space + f"item.{key}" + space + "}}" + after
    written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    assert expressions.fill(text, {key: value}, {}) == before + written + after
    assert expressions.item_places(text) == [(key,)]


@given(st.text())
def test_any_text_is_a_template_or_refused_with_a_reason(text: str) -> None:
    try:
        pieces = expressions.template(text)
    except ValueError:
        assert "{{" in text
    else:
        assert "{{" in text or "".join(map(str, pieces)) == text


@given(text=PLAIN, value=st.text())
def test_a_value_is_never_read_as_a_template(text: str, value: str) -> None:
    twice = "{{ item.b }}"
    assert expressions.fill(text + "{{ item.a }}", {"a": twice, "b": value}, {}) == text + twice


def test_a_place_may_lie_deep() -> None:
    item = {"a": {"b": [1, {"c": "deep"}]}, "x-y": 2, "\u00e9t\u00e9": 3}
    assert expressions.fill("{{item.a.b[1].c}}/{{ item.x-y }}/{{item.\u00e9t\u00e9}}", item, {}) == "deep/2/3"
    assert expressions.fill('{"a": {"b": "{{ sample.output_text }}"}}', {}, {"output_text": "x"}) == '{"a": {"b": "x"}}'


@pytest.mark.parametrize("text", ["{{ item.a.z }}", "{{ item.a.b[9] }}", "{{ item.a[0] }}", "{{ item.none.x }}"])
def test_a_field_that_is_not_there_is_named(text: str) -> None:
    with pytest.raises(LookupError, match=r"there is no item\."):
        expressions.fill(text, {"a": {"b": [1]}, "none": None}, {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ item }}", "neither item.COLUMN"),
        ("{{ itm.a }}", "neither item.COLUMN"),
        ("{{ item.a | upper }}", "neither item.COLUMN"),
        ("{{ item.a() }}", "neither item.COLUMN"),
        ("{{}}", "neither item.COLUMN"),
        ("{{ item['a'] }}", "neither item.COLUMN"),
        ("{{ sample.output_json.a }}", "output_text, the answer's text, and nothing else"),
        ("a {{ item.a", "is not closed"),
    ],
)
def test_what_no_template_says_is_refused_when_it_is_read(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        expressions.template(text)


# --- formulas ---

NUMBER = st.floats(min_value=-100, max_value=100).map(lambda value: round(value, 3))


def trees(depth: int = 3) -> st.SearchStrategy[tuple[str, float | None]]:
    """A formula and its value; None where it has none."""
    leaf = st.one_of(NUMBER.map(lambda value: (f"({value!r})", value)), st.sampled_from([("a", 2.5), ("b_2", -1.0)]))
    if not depth:
        return leaf

    def joined(parts: tuple[tuple[str, float | None], str, tuple[str, float | None]]) -> tuple[str, float | None]:
        (one, x), operator, (other, y) = parts
        if operator in ("min", "max"):
            text = f"{operator}({one}, {other})"
        else:
            text = f"({one} {operator} {other})"
        if x is None or y is None or (operator == "/" and y == 0):
            return text, None
        computed = {
            "+": lambda: x + y,
            "-": lambda: x - y,
            "*": lambda: x * y,
            "/": lambda: x / y,
            "min": lambda: min(x, y),
            "max": lambda: max(x, y),
        }
        return text, computed[operator]()

    below = trees(depth - 1)
    return st.one_of(leaf, st.tuples(below, st.sampled_from(["+", "-", "*", "/", "min", "max"]), below).map(joined))


@given(trees())
def test_a_formula_computes_as_it_is_written(tree: tuple[str, float | None]) -> None:
    text, value = tree
    values = {"a": 2.5, "b_2": -1.0}
    assert expressions.names(text) <= set(values)
    if value is None or not math.isfinite(value):
        with pytest.raises(ArithmeticError):
            expressions.compute(text, values)
    else:
        assert expressions.compute(text, values) == value


@given(st.text(alphabet="ab01.+-*/^(), mxin_[]'\"=:lambda", max_size=40))
def test_any_text_is_a_formula_or_refused_with_a_reason(text: str) -> None:
    try:
        expressions.formula(text)
    except ValueError:  # and nothing else
        return
    else:
        try:
            value = expressions.compute(text, dict.fromkeys(expressions.names(text), 0.5))
        except ArithmeticError:
            return
        assert math.isfinite(value)


@pytest.mark.parametrize(
    ("text", "value"), [("2 ^ 3 * 2", 16), ("2 ** 3", 8), ("-a ^ 2", -4), ("sqrt(abs(-16)) + floor(1.9)", 5)]
)
def test_powers_and_functions(text: str, value: float) -> None:
    assert expressions.compute(text, {"a": 2}) == value


@pytest.mark.parametrize(
    "text",
    [
        "1 / 0",
        "sqrt(-1)",
        "log(0)",
        "(-8) ^ 0.5",
        "max(0, (-8) ^ 0.5)",
        "sqrt((-8) ^ 0.5)",
        "(-8) ^ 0.5 - (-8) ^ 0.5",
        "9 ^ 9 ^ 9",
        "exp(1000)",
        "1e999",
    ],
)
def test_a_formula_without_a_value_says_so(text: str) -> None:
    with pytest.raises(ArithmeticError):
        expressions.compute(text, {})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a +",
        "a b",
        "__import__('os')",
        "a.b",
        "a[0]",
        "a if b else 1",
        "(lambda: 1)()",
        "a < b",
        "min(*a)",
        "min(a, key=b)",
        "f(a)",
        "sqrt(1, 2)",
        "min()",
        "a := 1",
        "'a'",
        "1j",
        "True",
        "a % b",
        "a // b",
        "(" * 5000,
        "-" * 1900 + "1",
    ],
)
def test_what_no_formula_says_is_refused_when_it_is_read(text: str) -> None:
    with pytest.raises(ValueError):
        expressions.formula(text)


def test_a_name_that_is_no_grader_is_named() -> None:
    with pytest.raises(ValueError, match="'c' is none of the graders; there is a, b"):
        expressions.check_formula("a + b * c", ("a", "b"))
