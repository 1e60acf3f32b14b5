"""Prepared rows as the API takes them: JSON lines of OpenAI's forms (chat, preference, reinforcement)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tunewright.recipe import Recipe
from tunewright.run import Run, read_json_lines

MIN_ROWS = 10
"""OpenAI's and Azure's; fewer fail the job."""


def content(run: Run, recipe: Recipe, split: str) -> bytes:
    """A split's file, in UTF-8 without a byte-order mark."""
    lines = (json.dumps(row, ensure_ascii=False) for row in _rows(run, recipe, split))
    return "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace")


def _rows(run: Run, recipe: Recipe, split: str) -> Iterator[dict[str, Any]]:
    for row in read_json_lines(run.data_file(split)):
        tools = {"tools": row["tools"]} if row.get("tools") else {}
        if recipe.task == "preference":
            yield {
                "input": {"messages": row["messages"][:-1], **tools},
                "preferred_output": [row["messages"][-1]],
                "non_preferred_output": [{"role": "assistant", "content": row["rejected"]}],
            }
        elif recipe.task == "reward":
            yield {**(row.get("item") or {}), "messages": row["messages"]}
        else:
            yield {"messages": row["messages"], **tools}
