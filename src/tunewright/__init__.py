"""Tunewright: fine-tune a language model on your own data, prove that it got better, serve it behind the OpenAI API.

Importing this loads nothing heavy; the names below are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tunewright.api import Life, open
    from tunewright.batches import batch
    from tunewright.errors import TunewrightError
    from tunewright.recipe import Recipe
    from tunewright.run import Run

__all__ = ["Life", "Recipe", "Run", "TunewrightError", "batch", "open"]

_HOMES = {
    "Life": "tunewright.api",
    "open": "tunewright.api",
    "batch": "tunewright.batches",
    "Recipe": "tunewright.recipe",
    "Run": "tunewright.run",
    "TunewrightError": "tunewright.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tunewright' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
