"""Batch inference: every row comes out, with its answer or with the reason why not; a killed batch goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

import tunewright
from tunewright.errors import RunError
from tunewright.run import Run


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def many(folder: Path, count: int) -> Path:
    path = folder / "many.jsonl"
    path.write_text("".join(json.dumps({"id": n, "text": f"lovely {n}", "kept": [n]}) + "\n" for n in range(count)))
    return path


def test_answers_are_those_of_evaluation(packaged_classifier: Run, tmp_path: Path) -> None:
    source = packaged_classifier.recipe().data.test[0]  # type: ignore[index]
    summary = tunewright.batch(packaged_classifier.path, [source], tmp_path / "out.jsonl")
    said = rows_of(tmp_path / "out.jsonl")
    lines = Path(source).read_text().splitlines()
    known = [
        row for row in parquet.read_table(packaged_classifier.predictions_file).to_pylist() if row["model"] == "tuned"
    ]
    assert summary["rows"] == len(said) == len(known)
    for ours, evaluated in zip(said, known, strict=True):
        assert ours["prediction"] == evaluated["prediction"]
        assert list(ours["probabilities"].values()) == pytest.approx(evaluated["probabilities"], abs=1e-6)
        assert ours["probability"] == max(ours["probabilities"].values())
        line = int(ours["row"].rpartition(":")[2])
        assert {"text": ours["text"], "label": ours["label"]} == json.loads(lines[line - 1])


def test_no_row_is_lost_without_a_word(packaged_classifier: Run, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    lines = ['{"text": "lovely"}', "{broken", '{"text": ""}', '{"other": 1}', json.dumps({"text": "word " * 999})]
    path.write_text("\n".join(lines))
    summary = tunewright.batch(packaged_classifier.path, [str(path)], tmp_path / "out.parquet")
    assert (summary["rows"], summary["errors"]) == (5, 4)
    table = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert table[0]["prediction"] in ("good", "bad")
    reasons = [row["error"] for row in table]
    assert reasons[0] is None
    assert [f"in.jsonl:{number}: " in reason for number, reason in enumerate(reasons[1:], start=2)] == [True] * 4
    for word, reason in zip(("broken JSON", "holds nothing", "no column", "tokens"), reasons[1:], strict=True):
        assert word in reason


def test_the_command_says_what_could_not_be_used(packaged_classifier: Run, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"q": "lovely"}\n{"q": 3}\n')
    words = ["batch", str(packaged_classifier.path), str(path), "-o", str(tmp_path / "out.jsonl"), "--text", "q"]
    done = subprocess.run([sys.executable, "-m", "tunewright.cli", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout.strip() == str(tmp_path / "out.jsonl")
    assert "2 rows, 1 of them could not be used" in done.stderr
    again = subprocess.run(
        [sys.executable, "-m", "tunewright.cli", *words], capture_output=True, text=True, check=False
    )
    assert again.returncode == 2
    assert "is there already" in again.stderr


def test_a_killed_batch_goes_on_where_it_stood(packaged_classifier: Run, tmp_path: Path) -> None:
    source = many(tmp_path, 5000)
    output = tmp_path / "out"
    words = ["batch", str(packaged_classifier.path), str(source), "-o", str(output)]
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
    summary = tunewright.batch(packaged_classifier.path, [str(source)], output)
    assert summary["rows"] == 5000
    assert {name: (output / name).stat().st_mtime_ns for name in before} == before
    found = [row for path in sorted(output.glob("part-*.parquet")) for row in parquet.read_table(path).to_pylist()]
    assert [(row["id"], row["kept"]) for row in found] == [(number, [number]) for number in range(5000)]
    assert (output / "_SUCCESS").is_file()
    assert not parts.exists()


def test_a_batch_whose_command_was_killed_is_not_joined_by_another(packaged_classifier: Run, tmp_path: Path) -> None:
    """The child lives on and writes its parts; a second batch waits for nobody and says who is at it."""
    source = many(tmp_path, 20000)
    output = tmp_path / "out.jsonl"
    words = ["batch", str(packaged_classifier.path), str(source), "-o", str(output)]
    process = subprocess.Popen([sys.executable, "-m", "tunewright.cli", *words], stderr=subprocess.DEVNULL)
    lock = tmp_path / ".out.jsonl.lock"
    while not (tmp_path / ".out.jsonl.parts").exists():
        assert process.poll() is None
        time.sleep(0.005)
    (child,) = (int(one) for one in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    try:
        with pytest.raises(RunError, match=f"process {child} is writing it"):
            tunewright.batch(packaged_classifier.path, [str(source)], output)
        assert not output.exists()
    finally:
        os.kill(child, signal.SIGKILL)
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        time.sleep(0.01)
    assert lock.exists()  # left by the dead, held by nobody
    assert tunewright.batch(packaged_classifier.path, [str(source)], output, limit=10)["rows"] == 10
    assert not lock.exists()


def test_a_column_of_one_kind_here_and_another_there_is_kept_as_text(packaged_classifier: Run, tmp_path: Path) -> None:
    """The parts agree each for itself; put together, numbers and texts have no type in common."""
    source = tmp_path / "in.jsonl"
    values = [*range(1000), *(f"n{number}" for number in range(1000, 1500))]
    source.write_text("".join(json.dumps({"id": value, "text": "lovely"}) + "\n" for value in values))
    tunewright.batch(packaged_classifier.path, [str(source)], tmp_path / "out.parquet")
    found = parquet.read_table(tmp_path / "out.parquet").column("id").to_pylist()
    assert found == [str(value) for value in values]


def test_answers_are_as_long_as_in_evaluation_unless_it_is_said(packaged_classifier: Run, tmp_path: Path) -> None:
    package = tmp_path / "package"
    shutil.copytree(packaged_classifier.package, package)
    known = json.loads((package / "rendering.json").read_text())
    assert known["max_new_tokens"] == packaged_classifier.recipe().max_new_tokens
    (package / "rendering.json").write_text(json.dumps(known | {"task": "chat", "labels": None, "max_new_tokens": 3}))
    source = many(tmp_path, 1)
    lengths = {}
    for most in (None, 9):
        output = tmp_path / f"out-{most}.jsonl"
        tunewright.batch(package, [str(source)], output, max_new_tokens=most)
        lengths[most] = len(rows_of(output)[0]["prediction"])
    assert lengths[None] < lengths[9]


def test_a_folder_without_a_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no packaged model there"):
        tunewright.batch(tmp_path, ["x.jsonl"], tmp_path / "out")
