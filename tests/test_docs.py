"""Documentation is tested: generated pages are current, commands and keys are described, recipes in it load."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from tunewright import cli
from tunewright import recipe as recipes

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def loaded(path: str) -> Any:
    """A file that is no part of a package, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["cli.md", "recipe.md", "checks.md"])
def test_generated_pages_are_current(page: str) -> None:
    make_docs = loaded("scripts/make_docs.py")
    fresh = getattr(make_docs, page.replace(".md", "_page"))()
    assert (ROOT / "docs" / page).read_text() == fresh, "run .venv/bin/python scripts/make_docs.py"


def test_every_command_in_the_documentation_exists() -> None:
    known = {command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback}
    known |= {group.typer_instance.info.name for group in cli.app.registered_groups if group.typer_instance}
    for page in PAGES:
        for name in re.findall(r"^(?:\$ )?tunewright ([a-z]+)", page.read_text(), flags=re.MULTILINE):
            assert name in known, f"{page.name} mentions tunewright {name}"


def test_yaml_blocks_that_are_whole_recipes_load() -> None:
    found = 0
    for page in PAGES:
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), flags=re.DOTALL):
            if block.startswith("name:"):
                recipes.loads(block, page.name)
                found += 1
    assert found > 0


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_page_of_clients_names_the_versions_that_are_tested() -> None:
    rows = [row for row in (ROOT / "docs/clients.md").read_text().splitlines() if row.startswith("| `")]
    for pins in loaded("tests/clients/environments.py").PINS.values():
        package, version = re.split("==|@", pins[0])
        assert any(row.startswith(f"| `{package}`") and version in row for row in rows), pins[0]
