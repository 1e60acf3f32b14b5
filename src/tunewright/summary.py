"""A run in words, from its folder: the README.md in it, and what `tunewright show` prints."""

from __future__ import annotations

import shlex
from typing import Any

from tunewright.run import STAGES, Run, write_text

WORSE = 5
"""Slices that got worse, as many as are named."""


def facts(run: Run) -> dict[str, Any]:
    """What a program wants to know about a run."""
    state = run.state()
    recipe = run.recipe()
    found: dict[str, Any] = {
        "run": run.id,
        "path": str(run.path),
        "name": recipe.name,
        "created": state["created"],
        "task": recipe.task,
        "model": recipe.model,
        "stages": {stage: run.status(stage) for stage in STAGES},
        "errors": {
            stage: entry["error"]
            for stage, entry in state["stages"].items()
            if "error" in entry and run.status(stage) == "failed"
        },
        "destroyed": run.destroyed,
    }
    if run.status("prepare") == "done":
        found["data"] = {
            split: {key: account[key] for key in ("read", "used", "rejected", "truncated")}
            for split, account in run.manifest("prepare")["splits"].items()
        }
    if run.status("train") == "done":
        found["training"] = run.manifest("train")
    if run.status("evaluate") == "done" and (report := run.manifest("evaluate"))["rows"]:
        found["comparison"] = report["comparison"]
        found["models"] = {
            name: {key: value for key, value in values.items() if isinstance(value, int | float)}
            for name, values in report["models"].items()
        }
        found["report"] = str(run.report_page)
    if run.status("deploy") == "done":
        found["endpoint"] = run.manifest("deploy")
    if run.status("test") == "done":
        found["test"] = {key: value for key, value in run.manifest("test").items() if key != "differ"}
    return found


def sentence(comparison: dict[str, Any], rows: int | None = None) -> str:
    """The verdict in one line."""
    low, high = (number(end, "+.3f") for end in comparison["interval"])
    on = f" on {rows} test rows" if rows else ""
    return (
        f"{comparison['verdict']}: {comparison['metric']} {number(comparison['tuned'])} against "
        f"{comparison['baseline']}'s {number(comparison['baseline_value'])}{on} "
        f"({number(comparison['difference'], '+.3f')}, 95% interval {low} to {high}, "
        f"{_p(comparison['p_value'])})"
    )


def noted(report: dict[str, Any]) -> list[str]:
    """What a person should know beside the verdict, a line each: leaked rows, and slices that got worse."""
    found = []
    if leaks := report.get("without_leaked"):
        found.append(f"without {leaks['leaked']} test rows that training has seen: {sentence(leaks, leaks['rows'])}")
    worse = [one for one in report.get("slices") or [] if one["verdict"] == "not better"]
    if worse:
        named = ", ".join(f"{one['by']} {one['value']} ({number(one['difference'], '+.3f')})" for one in worse[:WORSE])
        more = f" and {len(worse) - WORSE} more" if len(worse) > WORSE else ""
        found.append(f"worse where: {named}{more}")
    return found


def _p(value: float | None) -> str:
    return "p < 1e-16" if value is not None and value < 1e-16 else f"p = {number(value, '.2g')}"


def number(value: float | None, spec: str = ".3f") -> str:
    """A number for a person; what was not a number stands in JSON as null."""
    return "nan" if value is None else format(value, spec)


def write_readme(run: Run) -> None:
    """README.md of the run folder: what, from what, where, result, how to repeat, how to remove."""
    known = facts(run)
    recipe = run.recipe()
    lines = [
        f"# {run.id}",
        "",
        f"`{recipe.model}` fine-tuned ({recipe.train.method}) for {recipe.task} on {', '.join(recipe.data.train)}.",
        "",
        "| stage | status |",
        "| --- | --- |",
        *(f"| {stage} | {status} |" for stage, status in known["stages"].items()),
        "",
    ]
    if "data" in known:
        lines += ["## Data", ""]
        lines += [
            f"- {split}: {account['used']} of {account['read']} rows used, {account['rejected']} left out, "
            f"{account['truncated']} cut (data/findings.jsonl names them)"
            for split, account in known["data"].items()
        ]
        lines.append("")
    if "comparison" in known:
        lines += ["## Result", "", f"**{sentence(known['comparison'])}**", ""]
        lines += [f"- {line}" for line in noted(run.manifest("evaluate"))]
        lines += ["", "See evaluate/report.html.", ""]
    if "endpoint" in known:
        endpoint = known["endpoint"]
        lines += [
            "## Endpoint",
            "",
            f"`{endpoint['base_url']}`, model `{endpoint['model']}`"
            + (", the key is in `deploy/key`." if run.key_file.is_file() else "."),
            "",
        ]
    lines += [
        "## Repeat and remove",
        "",
        "```sh",
        f"tunewright run {shlex.quote(str(run.recipe_file))}    # again, on the same data",
        f"tunewright show {shlex.quote(str(run.path))}",
        f"tunewright destroy {shlex.quote(str(run.path))}    # stop the endpoint, unregister the model",
        "```",
    ]
    write_text(run.readme_file, "\n".join(lines) + "\n")
