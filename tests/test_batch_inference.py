"""Batch inference: every row comes out, with its answer or with the reason why not; a killed batch goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyarrow import parquet

import tunewright
from tunewright import life
from tunewright import recipe as recipes
from tunewright.errors import RunError
from tunewright.run import Run
from tunewright.testing import tiny_data, tiny_model


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A packaged classifier."""
    home = tmp_path_factory.mktemp("packaged")
    given = {
        "name": "batch",
        "model": str(tiny_model(home / "model")),
        "task": "classification",
        "data": tiny_data(home / "data"),
        "train": {"method": "full", "max_steps": 4},
        "evaluate": {"bootstrap": 200, "baselines": []},
        "tracking": {"enabled": False},
        "backend": {"kind": "local", "threads": 1},
    }
    run = life.start(recipes.loads(yaml.safe_dump(given)), home / "runs")
    life.advance(run, until="package")
    return run


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def many(folder: Path, count: int) -> Path:
    path = folder / "many.jsonl"
    path.write_text("".join(json.dumps({"id": n, "text": f"lovely {n}", "kept": [n]}) + "\n" for n in range(count)))
    return path


def test_answers_are_those_of_evaluation(packaged: Run, tmp_path: Path) -> None:
    source = packaged.recipe().data.test[0]  # type: ignore[index]
    summary = tunewright.batch(packaged.path, [source], tmp_path / "out.jsonl")
    said = rows_of(tmp_path / "out.jsonl")
    lines = Path(source).read_text().splitlines()
    known = [row for row in parquet.read_table(packaged.predictions_file).to_pylist() if row["model"] == "tuned"]
    assert summary["rows"] == len(said) == len(known)
    for ours, evaluated in zip(said, known, strict=True):
        assert ours["prediction"] == evaluated["prediction"]
        assert list(ours["probabilities"].values()) == pytest.approx(evaluated["probabilities"], abs=1e-6)
        assert ours["probability"] == max(ours["probabilities"].values())
        line = int(ours["row"].rpartition(":")[2])
        assert {"text": ours["text"], "label": ours["label"]} == json.loads(lines[line - 1])


def test_no_row_is_lost_without_a_word(packaged: Run, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    lines = ['{"text": "lovely"}', "{broken", '{"text": ""}', '{"other": 1}', json.dumps({"text": "word " * 999})]
    path.write_text("\n".join(lines))
    summary = tunewright.batch(packaged.path, [str(path)], tmp_path / "out.parquet")
    assert (summary["rows"], summary["errors"]) == (5, 4)
    table = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert table[0]["prediction"] in ("good", "bad")
    reasons = [row["error"] for row in table]
    assert reasons[0] is None
    assert [f"in.jsonl:{number}: " in reason for number, reason in enumerate(reasons[1:], start=2)] == [True] * 4
    for word, reason in zip(("broken JSON", "holds nothing", "no column", "tokens"), reasons[1:], strict=True):
        assert word in reason


def test_the_command_says_what_could_not_be_used(packaged: Run, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"q": "lovely"}\n{"q": 3}\n')
    words = ["batch", str(packaged.path), str(path), "-o", str(tmp_path / "out.jsonl"), "--text", "q"]
    done = subprocess.run([sys.executable, "-m", "tunewright.cli", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout.strip() == str(tmp_path / "out.jsonl")
    assert "2 rows, 1 of them could not be used" in done.stderr
    again = subprocess.run(
        [sys.executable, "-m", "tunewright.cli", *words], capture_output=True, text=True, check=False
    )
    assert again.returncode == 2
    assert "is there already" in again.stderr


def test_a_killed_batch_goes_on_where_it_stood(packaged: Run, tmp_path: Path) -> None:
    source = many(tmp_path, 5000)
    output = tmp_path / "out"
    words = ["batch", str(packaged.path), str(source), "-o", str(output)]
    process = subprocess.Popen([sys.executable, "-m", "tunewright.cli", *words], stderr=subprocess.DEVNULL)
    parts = output.with_name(".out.parts")
    while len(list(parts.glob("part-*.json"))) < 2:
        assert process.poll() is None
        time.sleep(0.005)
    children = [int(one) for one in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    for pid in (process.pid, *children):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert not output.exists()
    before = {
        path.name: path.stat().st_mtime_ns
        for path in parts.glob("part-*.parquet")
        if path.with_suffix(".json").is_file()
    }
    summary = tunewright.batch(packaged.path, [str(source)], output)
    assert summary["rows"] == 5000
    assert {name: (output / name).stat().st_mtime_ns for name in before} == before
    found = [row for path in sorted(output.glob("part-*.parquet")) for row in parquet.read_table(path).to_pylist()]
    assert [(row["id"], row["kept"]) for row in found] == [(number, [number]) for number in range(5000)]
    assert (output / "_SUCCESS").is_file()
    assert not parts.exists()


def test_a_folder_without_a_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no packaged model there"):
        tunewright.batch(tmp_path, ["x.jsonl"], tmp_path / "out")
