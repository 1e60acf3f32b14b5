"""Preference and reward go through the whole life: to a tested endpoint, and away without a trace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunewright.run import STAGES, Run
from tunewright.testing import tiny_model

PAIR = {"chosen": "lovely great", "rejected": "awful poor"}
SECTIONS: dict[str, dict[str, Any]] = {
    "preference": {"train": {"method": "lora", "learning_rate": 5e-3, "epochs": 2}},
    "reward": {
        "train": {
            "method": "full",
            "learning_rate": 1e-2,
            "epochs": 2,
            "grpo": {"num_generations": 4, "max_completion_length": 6},
        },
        "grader": {"type": "string_check", "reference": "{{ item.want }}", "operation": "like"},
    },
}


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tunewright.cli", *map(str, words)], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("task", ["preference", "reward"])
def test_the_whole_life(tmp_path: Path, task: str) -> None:
    model = tiny_model(tmp_path / "model")
    for name, start in (("train", 0), ("test", 100)):
        rows = [{"prompt": f"say {number}"} for number in range(start, start + 16)]
        rows = [row | (PAIR if task == "preference" else {"want": "e"}) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl")}
    given = {"name": task, "model": str(model), "task": task, "data": data, "deploy": {"test_rows": 5}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(given | SECTIONS[task]))
    done = command("run", tmp_path / "recipe.yaml", "--runs", tmp_path / "runs", "--yes")
    assert done.returncode in (0, 3), done.stderr
    run = Run.open(done.stdout.strip())
    assert [run.status(stage) for stage in STAGES] == ["done"] * len(STAGES)
    tested = run.manifest("test")
    assert tested["rows"] == 5
    assert tested["equal"] == tested["compared"] == (5 if task == "reward" else 0)  # evaluation wrote no answers
    ended = command("destroy", run.path)
    assert ended.returncode == 0, ended.stderr
    assert Run.open(run.path).destroyed
