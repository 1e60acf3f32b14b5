"""Batch inference with a packaged model, on this machine or on Spark: a child process does it, this looks on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tunewright import children
from tunewright.data import sources
from tunewright.errors import RunError, StageError, from_name
from tunewright.run import read_json, write_json


def batch(
    model: str | Path,
    inputs: Sequence[str],
    output: str | Path,
    *,
    text: str | None = None,
    messages: str | None = None,
    max_new_tokens: int | None = None,
    limit: int | None = None,
    batch_rows: int | None = None,
    spark: dict[str, Any] | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Answer every row of an input with a packaged model. Asked again after a kill, it goes on where it stood.

    Args:
        model: a run folder, or its `package` folder.
        inputs: files, globs, and with Spark tables (`spark:NAME`, `delta:PATH`).
        output: a .jsonl or .parquet file, else a folder of Parquet files. Each row has the input's columns, `row` (the
            place where it was read), `prediction`, and what else the task gives; or `error`, where it has no answer.
        text: the column to answer. Default: `messages`, `text` or `prompt`, whichever there is.
        messages: the column of conversations to answer.
        max_new_tokens: longest answer of a model that writes text.
        limit: only so many rows.
        batch_rows: rows in a forward at most.
        spark: settings of a Spark cluster, as a recipe's `backend` table has them; None answers here.
        force: replace an output that is there.

    Returns:
        rows, errors (rows that could not be used), output, model, inputs.

    Raises:
        RunError: no packaged model there, or the output is there already.
        DataError: the input is absent or of a kind that is not read.
    """
    package = _package(Path(model))
    target = Path(output).absolute()
    if target.exists() and not force:
        raise RunError(f"{output}: is there already; --force replaces it, another --output leaves it")
    asked = {
        "package": str(package),
        "inputs": [sources.absolute(one, Path.cwd()) for one in inputs],
        "output": str(target),
        "text": text,
        "messages": messages,
        "max_new_tokens": max_new_tokens,
        "limit": limit,
        "batch_rows": batch_rows,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tunewright-batch-") as name:
        folder = Path(name)
        write_json(folder / "asked.json", {"asked": asked, "spark": spark})
        _watch(folder, progress or (lambda done, total: None))
        summary: dict[str, Any] = read_json(folder / "summary.json")
    return summary


def summary_line(summary: dict[str, Any]) -> str:
    """What a person is told at the end."""
    errors = summary["errors"]
    unusable = f", {errors:,} of them could not be used (column `error` says why)" if errors else ""
    return f"{summary['rows']:,} rows{unusable}: {summary['output']}"


def _package(model: Path) -> Path:
    for folder in (model / "package", model):
        if (folder / "rendering.json").is_file():
            return folder.absolute()
    raise RunError(f"{model}: no packaged model there; `tunewright package RUN` makes one")


def _watch(folder: Path, progress: Callable[[int, int], None]) -> None:
    """Start the child and look on until it is done; Ctrl-C ends it too."""

    def look() -> None:
        if (folder / "progress.json").is_file():
            seen = read_json(folder / "progress.json")
            progress(seen["done"], seen["total"])

    log = folder / "log.txt"
    code = children.work(["batch", str(folder)], log, look)
    if (folder / "failure.json").is_file():
        failure = read_json(folder / "failure.json")
        raise from_name(failure["kind"], failure["message"])
    if code or not (folder / "summary.json").is_file():
        said = children.last_words(log)
        raise StageError(f"batch ended (exit code {code}): {said}; the same command again goes on")
