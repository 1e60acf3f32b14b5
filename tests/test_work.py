"""Whatever happens inside a backend's process ends as an exit code and one line for a person in the run folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tunewright import life, ranks, work
from tunewright import recipe as recipes
from tunewright.errors import DataError, DiskFullError, StageError
from tunewright.run import Run, read_json, write_json
from tunewright.testing import tiny_data, tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_model(tmp_path_factory.mktemp("work") / "model")


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Run:
    """Checked, and nothing more."""
    recipe = {
        "name": "t",
        "model": str(base),
        "task": "classification",
        "data": tiny_data(tmp_path / "data", train=16, test=6),
        "train": {"batch_size": 4, "max_steps": 400, "save_steps": 200},
        "evaluate": {"bootstrap": 200, "baselines": ["zero-shot"]},
        "tracking": {"enabled": False},
    }
    run = life.start(recipes.loads(yaml.safe_dump(recipe)), tmp_path / "runs")
    life.advance(run, until="check")
    return run


def short(run: Run) -> None:
    text = run.recipe_file.read_text()
    run.recipe_file.write_text(text.replace("max_steps: 400", "max_steps: 2"))


def test_each_stage_leaves_its_manifest_and_says_nothing_went_wrong(run: Run) -> None:
    short(run)
    for stage in ("prepare", "train", "evaluate", "package"):
        assert work.main([stage, str(run.path)]) == 0
        assert run.status(stage) == "done"
        assert not run.failure_file(stage).exists()
    checks = run.manifest("prepare")
    assert checks["splits"]["train"]["used"] == 16
    assert checks["rendering"]["end_of_turn"] == "<|eos|>"


@pytest.mark.parametrize(
    ("error", "kind", "said", "code"),
    [
        (DataError("rows.jsonl:3: bad"), "DataError", "rows.jsonl:3: bad", 2),
        (StageError("no luck"), "StageError", "no luck", 1),
        (KeyError("x"), "StageError", "evaluate failed: KeyError: 'x'; the traceback is in {log}", 1),
        (
            RuntimeError("first\nsecond"),
            "StageError",
            "evaluate failed: RuntimeError: first; the traceback is in {log}",
            1,
        ),
        (MemoryError(), "StageError", "out of memory; set train.gradient_checkpointing: true", 1),
        (RuntimeError("MPS backend out of memory (1 GB)"), "StageError", "out of memory; set train.gradient", 1),
        (OSError(errno.ENOSPC, "full", "/big"), "DiskFullError", "/big: no space left on the disk", 1),
        (RuntimeError("x: No space left on device"), "DiskFullError", "no space left on the disk", 1),
        (InterruptedError("stopped at step 3 of 9"), "Interrupted", "stopped at step 3 of 9", 130),
        (KeyboardInterrupt(), "Interrupted", "stopped", 130),
    ],
)
def test_an_error_becomes_one_line_and_an_exit_code(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    kind: str,
    said: str,
    code: int,
) -> None:
    def fail(_: Run) -> None:
        raise error

    monkeypatch.setitem(work.STAGES, "evaluate", fail)
    assert work.main(["evaluate", str(run.path)]) == code
    failure = read_json(run.failure_file("evaluate"))
    assert failure["kind"] == kind
    assert failure["message"].startswith(said.format(log=run.log_file("evaluate")))
    assert "\n" not in failure["message"]
    traced = "Traceback" in capsys.readouterr().err
    assert traced is (code != 130)


def test_a_full_disk_is_said_on_standard_error_where_nothing_can_be_written(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise DiskFullError("no space left on the disk")

    monkeypatch.setitem(work.STAGES, "evaluate", fail)
    monkeypatch.setattr(work, "write_json", fail)
    assert work.main(["evaluate", str(run.path)]) == 1
    assert "no space left on the disk" in capsys.readouterr().err


def test_two_processes_do_not_do_the_same_stage(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.lock_file("prepare").parent.mkdir(exist_ok=True)
    with run.lock_file("prepare").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert work.main(["prepare", str(run.path)]) == 1
    assert f"another process works on prepare of {run.id}" in capsys.readouterr().err
    assert not run.failure_file("prepare").exists(), "it would be taken for the failure of the one that works"
    assert work.main(["prepare", str(run.path)]) == 0


def test_of_several_processes_the_first_that_fails_says_why(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    first = {"rank": 0, "kind": "StageError", "message": "the reason", "traceback": "", "at": 0}
    write_json(ranks.folder(run) / "rank-0-failure.json", first)
    assert work.main(["train", str(run.path)]) != 0  # it was not prepared
    assert read_json(run.failure_file("train"))["message"] == "the reason"
    assert "is not done" in read_json(ranks.folder(run) / "rank-1-failure.json")["message"]


def test_an_unknown_stage_is_refused_by_the_parser(run: Run) -> None:
    with pytest.raises(SystemExit):
        work.main(["dream", str(run.path)])


def started(run: Run, stage: str) -> subprocess.Popen[bytes]:
    """As the local backend starts a stage."""
    with (run.path / "out.txt").open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "tunewright.work", stage, str(run.path)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_training_process_that_is_asked_to_stop_says_where(run: Run) -> None:
    assert work.main(["prepare", str(run.path)]) == 0
    process = started(run, "train")
    try:
        wait_until(lambda: len(run.metrics()) >= 3, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
    failure = read_json(run.failure_file("train"))
    assert failure["kind"] == "Interrupted"
    step = max(int(path.name.rpartition("-")[2]) for path in run.checkpoints.iterdir())
    assert failure["message"] == f"stopped at step {step} of 400"
    assert json.loads(run.metrics_file.read_text().splitlines()[-1])["step"] == step
