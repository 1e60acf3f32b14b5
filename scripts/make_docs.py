"""Write docs/cli.md and docs/recipe.md from the program itself, so that they cannot go stale; a test compares them.

.venv/bin/python scripts/make_docs.py
"""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined
from typer.testing import CliRunner

from tunewright import cli
from tunewright.data.codes import CODES
from tunewright.preflight import FAILURES
from tunewright.recipe import GRADERS, REFUSED, RENAMED, BackendChoice, GraderMessage, Recipe, Sampling, Section

DOCS = Path(__file__).parents[1] / "docs"
WIDTH = 100
TABLES = {"findings": ("finding", CODES), "failures": ("failure", FAILURES)}
"""Tables of docs/checks.md, by the comments that they stand between: what a row is called, and the rows."""


def main() -> None:
    for name, text in {"cli.md": cli_page(), "recipe.md": recipe_page(), "checks.md": checks_page()}.items():
        (DOCS / name).write_text(text)


def checks_page() -> str:
    """docs/checks.md with its tables of findings and failures made anew; the words around them are a person's."""
    page = (DOCS / "checks.md").read_text()
    for name, (row, kinds) in TABLES.items():
        begins, ends = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, _, rest = page.partition(begins)
        _, _, after = rest.partition(ends)
        rows = [f"| `{code}` | {kind.means} | {kind.fix} |" for code, kind in kinds.items()]
        table = "\n".join(["", f"| {row} | what it means | what to do |", "| --- | --- | --- |", *rows, ""])
        page = f"{before}{begins}{table}{ends}{after}"
    return page


def cli_page() -> str:
    """Every command's --help."""
    commands = [_named(command) for command in cli.app.registered_commands]
    for group in cli.app.registered_groups:
        name = group.typer_instance.info.name
        commands += [name, *(f"{name} {_named(command)}" for command in group.typer_instance.registered_commands)]
    parts = [
        "# The command line",
        "",
        "Written by `scripts/make_docs.py` from the program. What a program reads (the run folder's path, JSON) goes "
        "to standard output, everything else to standard error.",
        "",
        "| exit code | meaning |",
        "| --- | --- |",
        "| 0 | done |",
        "| 1 | a fault of ours or of the machine (a full disk, a killed process); a log with the traceback is named |",
        "| 2 | the input is wrong: recipe, data, model, run folder, busy port |",
        "| 3 | evaluated, and not better than `evaluate.must_beat` |",
        "| 130 | stopped by Ctrl-C; the same command again goes on from there |",
        "",
    ]
    runner = CliRunner(env={"COLUMNS": str(WIDTH), "TERMINAL_WIDTH": str(WIDTH)})
    for name in ["", *commands]:
        said = runner.invoke(cli.app, [*name.split(), "--help"], prog_name="tunewright", catch_exceptions=False)
        parts += [f"## tunewright {name}".rstrip(), "", "```text", said.output.rstrip(), "```", ""]
    return "\n".join(parts)


def _named(command: Any) -> str:
    name: str = command.name or command.callback.__name__.replace("_", "-")
    return name


def recipe_page() -> str:
    """Every key of a recipe: type, default, meaning."""
    parts = [
        "# The recipe",
        "",
        "Written by `scripts/make_docs.py` from the program. A recipe is YAML; `tunewright init DATA` writes one for "
        "your file, `tunewright schema` prints its JSON Schema for editors, `--set train.learning_rate=1e-4` changes a "
        "key for one run. An unknown key is an error that names the nearest known one.",
        "",
        "File paths are taken from where the command runs, else from the recipe's own folder. `starter:FILE` names a "
        "file that ships with Tunewright.",
        "",
    ]
    parts += _table("(top level)", Recipe)
    for name, field in Recipe.model_fields.items():
        section = _section(field.annotation)
        if section is not None:
            parts += _table(name, section)
            for below, inner in section.model_fields.items():
                nested = _section(inner.annotation)
                if nested is not None:
                    parts += _table(f"{name}.{below}", nested)
        if name == "grader":
            for kind, each in GRADERS.items():
                parts += _table(f"grader, type: {kind}", each)
            parts += _table("a grader's input", GraderMessage) + _table("a grader's sampling_params", Sampling)
    parts += ["## Keys of `train` that come from elsewhere", "", "| there | here |", "| --- | --- |"]
    parts += [f"| `{there}` | `{here}` |" for there, here in RENAMED.items()]
    parts += ["", "## Keys of TrainingArguments that `train` does not take", "", "| key | why |", "| --- | --- |"]
    parts += [f"| `{key}` | {why} |" for key, why in sorted(REFUSED.items())]
    return "\n".join(parts) + "\n"


def _table(name: str, section: type[Section] | type[BackendChoice]) -> list[str]:
    lines = [f"## {name}", "", "| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key, field in section.model_fields.items():
        default = "required"
        if field.default is not PydanticUndefined:
            default = "" if _section(field.annotation) else f"`{_shown(field.default)}`"
        meaning = " ".join((field.description or "as in Transformers' TrainingArguments").split())
        kind = "table" if _section(field.annotation) or key == "grader" else _type(field.annotation)
        if key == "graders":
            kind = "table of graders by name"
        if key == "input" and "GraderMessage" in str(field.annotation):
            kind = "list of tables"
        lines.append(f"| `{field.alias or key}` | {kind} | {default} | {meaning} |".replace(" |  | ", " | | "))
    return [*lines, ""]


def _section(annotation: Any) -> type[Any] | None:
    kinds = (annotation, *typing.get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section | BackendChoice)), None)


def _type(annotation: Any) -> str:
    kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    null = " or null" if type(None) in typing.get_args(annotation) else ""
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in kinds)
    if "one_or_many" in str(annotation) or "MinLen(min_length=1)" in str(annotation):
        return f"`str` or list{null}"
    if null or typing.get_origin(annotation) is types.UnionType:
        return " or ".join(_type(kind) for kind in kinds) + null
    if isinstance(annotation, type) and not kinds:
        return f"`{annotation.__name__}`"
    text = str(annotation).replace("typing.", "").replace("tunewright.recipe.", "")
    if text.startswith("Annotated["):
        return _type(kinds[0])
    return "list of " + _type(kinds[0]) if text.startswith("tuple") else f"`{text}`"


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    main()
