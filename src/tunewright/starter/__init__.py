"""The starter: a small base model and small data sets that ship with the package, so that a demo needs no network.

`scripts/make_starter.py` made them from text that a grammar of ours generates; the README.md files beside them say what
they are good for. What is not covered: any real use. The model knows almost nothing.
"""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent


def model_path() -> Path:
    """The folder of the base model, as `from_pretrained` takes it."""
    return _FOLDER / "model"


def data_path(name: str) -> Path:
    """A data file: `train.jsonl`, `test.jsonl`, `chat.jsonl`, `completions.jsonl` or `notes.txt`.

    Raises:
        FileNotFoundError: there is no such file; the message names those that there are.
    """
    path = _FOLDER / "data" / name
    if not path.is_file():
        known = ", ".join(sorted(file.name for file in path.parent.iterdir() if file.name != "README.md"))
        raise FileNotFoundError(f"the starter has no data file {name!r}; it has {known}")
    return path


def recipe_path() -> Path:
    """The recipe that `tunewright demo` runs."""
    return _FOLDER / "demo.yaml"
