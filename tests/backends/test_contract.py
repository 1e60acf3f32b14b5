"""One contract, every backend: the local one with real child processes, and the fake."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tunewright import life
from tunewright import recipe as recipes
from tunewright.backends import base
from tunewright.backends.base import Backend, Job, Status
from tunewright.backends.local import LocalBackend
from tunewright.errors import RecipeError
from tunewright.run import Run, read_json
from tunewright.testing import FakeBackend, tiny_data, tiny_model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contract")
    tiny_model(folder / "model")
    return folder


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Run:
    """A checked run, ready to be handed over."""
    data = tiny_data(tmp_path / "data")
    text = f"""
name: contract
model: {home / "model"}
task: classification
data: {{train: {data["train"]}, test: {data["test"]}}}
tracking: {{enabled: false}}
"""
    run = life.start(recipes.loads(text), tmp_path / "runs")
    life.advance(run, until="plan")
    return run


@pytest.fixture(params=["local", "fake"])
def backend(request: pytest.FixtureRequest, run: Run) -> Iterator[Backend]:
    made: Backend = LocalBackend({"threads": 1}) if request.param == "local" else FakeBackend({})
    yield made
    for stage in base.STAGES:
        made.cancel(Job(stage, "0"), run)


def wait(backend: Backend, job: Job, run: Run, *, limit_s: float = 120) -> Status:
    deadline = time.monotonic() + limit_s
    while (status := backend.poll(job, run)).state == "running":
        assert time.monotonic() < deadline, "the job did not end"
        time.sleep(0.05)
    return status


def test_a_stage_ends_done_and_its_manifest_is_there_after_collect(backend: Backend, run: Run) -> None:
    job = backend.submit("prepare", run)
    assert wait(backend, job, run).state == "done"
    backend.collect(job, run)
    backend.collect(job, run)
    assert run.status("prepare") == "done"


def test_submit_returns_at_once_and_asking_twice_gives_the_same_job(backend: Backend, run: Run) -> None:
    first = backend.submit("prepare", run)
    assert backend.submit("prepare", run) == first
    wait(backend, first, run)


def test_poll_of_a_job_nobody_knows_is_lost(backend: Backend, run: Run) -> None:
    assert backend.poll(Job("prepare", "999999999"), run).state == "lost"


def test_cancel_stops_a_job_and_may_be_repeated(backend: Backend, run: Run) -> None:
    job = backend.submit("prepare", run)
    backend.cancel(job, run)
    backend.cancel(job, run)
    assert backend.poll(job, run).state in ("lost", "cancelled", "done")
    again = backend.submit("prepare", run)
    assert wait(backend, again, run).state == "done"


def test_everything_found_can_be_removed_and_removing_twice_is_fine(backend: Backend, run: Run) -> None:
    job = backend.submit("prepare", run)
    wait(backend, job, run)
    for resource in backend.find(run):
        assert backend.remove(resource, run) == "gone"
        assert backend.remove(resource, run) == "gone"
    assert backend.find(run) == []


@pytest.mark.parametrize("kind", [LocalBackend, FakeBackend])
def test_a_setting_it_does_not_know_is_refused_by_name(kind: Any) -> None:
    with pytest.raises(RecipeError, match="gpus"):
        kind({"gpus": 8})


def test_an_unknown_backend_names_the_nearest() -> None:
    recipe = recipes.loads("{name: x, model: m, task: chat, data: {train: d.jsonl}, backend: {kind: locl}}")
    with pytest.raises(RecipeError, match="did you mean 'local'"):
        base.backend(recipe)


def test_a_failed_stage_says_why_in_one_line(run: Run) -> None:
    backend = LocalBackend({"threads": 1})
    Path(run.recipe().data.train[0]).write_text("{broken\n")
    status = wait(backend, backend.submit("prepare", run), run)
    assert status.state == "failed"
    assert status.kind == "DataError"
    assert "train.jsonl:1" in status.message


def test_a_child_of_one_backend_is_found_by_the_next(run: Run) -> None:
    """The command that started a stage may be killed; the same command again looks on."""
    first = LocalBackend({"threads": 1}).submit("prepare", run)
    second = LocalBackend({"threads": 1})
    assert second.submit("prepare", run) == first
    assert wait(second, first, run).state == "done"


def test_a_second_process_does_not_do_the_same_stage(run: Run) -> None:
    import subprocess
    import sys

    backend = LocalBackend({"threads": 1})
    job = backend.submit("prepare", run)
    pid = read_json(run.job_file("prepare"))["pid"]
    deadline = time.monotonic() + 30
    while not run.lock_file("prepare").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    other = subprocess.run(
        [sys.executable, "-m", "tunewright.work", "prepare", str(run.path)], capture_output=True, text=True, check=False
    )
    assert backend.poll(job, run).state in ("running", "done")
    if other.returncode:  # the first still held the stage
        assert "another process works on prepare" in other.stderr
    assert pid == int(job.id)
    wait(backend, job, run)
