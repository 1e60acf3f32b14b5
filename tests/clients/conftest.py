"""A server as its operator starts it, and client scripts as users run them, each in an environment of its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import environments
import pytest

from live_server import Live, serving

HERE = Path(__file__).parent
SCRIPT_S = 1500


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests here install packages and train models."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("live")) as live:
        yield live


@pytest.fixture
def run(tmp_path: Path) -> environments.Run:
    """Runs a script of this folder in an environment, with variables; gives what it said in its last line."""

    def run(environment: str, script: str, *arguments: str, **variables: str) -> Any:
        command = environments.command(environment, HERE / script)
        done = subprocess.run(
            [*command, *arguments],
            capture_output=True,
            text=True,
            timeout=SCRIPT_S,
            cwd=tmp_path,
            env=environments.clean_environment() | variables,
        )
        assert done.returncode == 0, f"{script} {arguments}:\n{done.stdout}\n{done.stderr}"
        return json.loads(done.stdout.splitlines()[-1])

    return run
