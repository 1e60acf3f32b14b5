"""What stands because of runs, and what it costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunewright import recipe as recipes
from tunewright import run as run_folders
from tunewright import standing
from tunewright.backends.base import Resource
from tunewright.errors import RecipeError
from tunewright.prices import read
from tunewright.run import Run


def run_of(folder: Path, **sections: Any) -> Run:
    given = {"name": "s", "model": "starter", "task": "chat", "data": {"train": "x.jsonl"}, **sections}
    return run_folders.create(folder / "runs", recipes.loads(yaml.safe_dump(given)))


def test_a_cluster_costs_its_nodes_and_their_units(tmp_path: Path) -> None:
    prices = read()
    facts = {"node_type": "Standard_D4ds_v5", "workers": 2, "state": "running", "autotermination_minutes": 20}
    facts |= {"since_ms": 1_790_000_000_000}
    one = standing._standing(run_of(tmp_path), "databricks", Resource("databricks-cluster", "c", facts), prices)
    node = prices["clusters"]["Standard_D4ds_v5"]
    assert one.dollars_an_hour == (
        pytest.approx(3 * (node["machine"][0] + node["units"] * prices["unit"][0]), abs=0.01),
        pytest.approx(3 * (node["machine"][1] + node["units"] * prices["unit"][1]), abs=0.01),
    )
    assert (one.ends_by_itself, one.since, one.recorded) == ("after 20 min idle", "2026-09-21T14:13:20Z", False)


def test_what_nobody_knows_is_unknown_and_what_is_asleep_costs_nothing(tmp_path: Path) -> None:
    prices = read()
    for facts, cost in (
        ({"node_type": "X", "state": "running"}, None),
        ({"node_type": "X", "state": "terminated"}, (0, 0)),
    ):
        found = standing._standing(run_of(tmp_path), "databricks", Resource("databricks-cluster", "c", facts), prices)
        assert found.dollars_an_hour == cost


def test_the_command_shows_what_it_can_and_says_what_it_cannot(tmp_path: Path) -> None:
    here = run_of(tmp_path)
    here.made(here.intend("process", "endpoint s", stage="deploy"), pid=2**22 + 1)
    away = run_of(tmp_path, backend={"kind": "databricks", "volume": "a.b.c", "host": "http://127.0.0.1:9", "nope": 1})
    words = [sys.executable, "-m", "tunewright.cli", "resources", "--runs", str(tmp_path / "runs")]
    wide = os.environ | {"COLUMNS": "200"}
    plain = subprocess.run(words, capture_output=True, text=True, check=True, env=wide)
    assert "endpoint s" in plain.stdout
    assert f"{away.id}: not asked: backend.nope: unknown key" in plain.stderr
    said = json.loads(subprocess.run([*words, "--json"], capture_output=True, text=True, check=True).stdout)
    assert [(one["run"], one["kind"], one["dollars_an_hour"]) for one in said["standing"]] == [
        (here.id, "process", [0.0, 0.0])
    ]
    nothing = [*words[:-1], str(tmp_path / "none")]
    assert subprocess.run(nothing, capture_output=True, text=True, check=True).stdout == "nothing stands\n"


def test_a_price_table_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prices.yaml").write_text("just words")
    with pytest.raises(RecipeError, match="not a price table"):
        read(tmp_path / "prices.yaml")
