"""Training on a cluster with something going wrong: never reported as success, and the same command again ends with the
losses and weights of an unbroken run."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from on_spark import executor_of_rank, kill, losses, pid_of_rank, seen_step, start, when, worker

from clusters import cluster, stop
from tunewright import life, ranks, work
from tunewright.backends.base import Status
from tunewright.backends.spark import SparkBackend
from tunewright.run import Run, read_json, write_json
from tunewright.testing import tiny_data, tiny_model
from tunewright.train import checkpoints

SRC = Path(work.__file__).parent.parent
TRAIN = {
    "method": "full",
    "max_steps": 60,
    "learning_rate": 1e-3,
    "batch_size": 6,
    "save_steps": 5,
    "bf16": False,
}


@dataclass
class Place:
    """A cluster of three workers, of which two are enough, and what runs on it."""

    folder: Path
    master: str
    model: Path
    data: dict[str, Any]

    def begun(self, folder: Path, **backend: Any) -> Run:
        """A prepared run, made without a session of its own."""
        table = {"kind": "spark", "master": self.master, "processes": 2, **backend}
        run = start(folder, self.model, self.data, table, train=TRAIN)
        asked = run.recipe()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SparkBackend, "check", lambda *_: [])
            write_json(run.manifest_file("check"), life.resolve(asked, life.check(asked), run.path.parent))
        work.prepare(run)
        return run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    home = tmp_path_factory.mktemp("faults")
    master = cluster(home / "cluster", "--workers", "3")
    yield Place(home / "cluster", master, tiny_model(home / "model"), tiny_data(home / "data", train=57, test=8))
    stop(home / "cluster")


@pytest.fixture(scope="module")
def unbroken(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = place.begun(tmp_path_factory.mktemp("unbroken"))
    assert trained(run).state == "done"
    return run


def trained(run: Run, meanwhile: Callable[[], Any] = lambda: None, *, limit_s: float = 240) -> Status:
    """Train to the end of the job; `meanwhile` is done while it runs."""
    backend = SparkBackend(run.recipe().backend.model_extra or {})
    job = backend.submit("train", run)
    meanwhile()
    deadline = time.monotonic() + limit_s
    while (status := backend.poll(job, run)).state == "running":
        assert time.monotonic() < deadline, run.log_file("train").read_text()[-3000:]
        time.sleep(0.1)
    return status


def same(run: Run, other: Run) -> None:
    assert losses(run) == losses(other)
    assert run.manifest("train")["sha256"] == other.manifest("train")["sha256"]


@pytest.mark.slow
def test_a_killed_process_fails_the_stage_and_the_same_command_ends_as_if_nothing_had_been(
    place: Place, unbroken: Run, tmp_path: Path
) -> None:
    run = place.begun(tmp_path)

    def strike() -> None:
        when(lambda: seen_step(run, 8))
        kill(pid_of_rank(run, 1))

    status = trained(run, strike)
    assert status.state == "failed"
    assert "goes on from the last checkpoint" in status.message or "training process" in status.message
    assert not run.manifest_file("train").is_file()
    last = checkpoints.latest(run.checkpoints)
    assert trained(run).state == "done"
    assert run.manifest("train")["resumed_from"] == (last.name if last else None)
    same(run, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["rank 0", "an executor", "a worker", "the driver"])
def test_whatever_is_killed_the_same_command_ends_as_if_nothing_had_been(
    place: Place, unbroken: Run, tmp_path: Path, what: str
) -> None:
    run = place.begun(tmp_path)
    backend = SparkBackend(run.recipe().backend.model_extra or {})

    def strike() -> None:
        when(lambda: seen_step(run, 12))
        if what == "rank 0":
            kill(pid_of_rank(run, 0))
        elif what == "an executor":
            kill(executor_of_rank(run, 1).pid)
        elif what == "a worker":
            one = worker(place.folder, 1)
            for process in (one, *one.children(recursive=True)):
                kill(process.pid)
        else:
            kill(int(backend.submit("train", run).id))

    status = trained(run, strike)
    assert status.state in ("failed", "lost")
    assert not run.manifest_file("train").is_file()
    again = trained(run)
    assert again.state == "done", again
    same(run, unbroken)


@pytest.mark.slow
def test_a_torn_checkpoint_is_left_out(place: Place, unbroken: Run, tmp_path: Path) -> None:
    run = place.begun(tmp_path)

    def strike() -> None:
        when(lambda: checkpoints.latest(run.checkpoints) and seen_step(run, 12))
        kill(pid_of_rank(run, 0))

    assert trained(run, strike).state == "failed"
    last = checkpoints.latest(run.checkpoints)
    assert last is not None
    weights = last / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert trained(run).state == "done"
    assert run.manifest("train")["resumed_from"] != last.name
    same(run, unbroken)


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_the_same_samples(place: Place, unbroken: Run, tmp_path: Path) -> None:
    run = place.begun(tmp_path)

    def strike() -> None:
        when(lambda: checkpoints.latest(run.checkpoints) and seen_step(run, 12))
        kill(pid_of_rank(run, 1))

    assert trained(run, strike).state == "failed"
    given = yaml.safe_load(run.recipe_file.read_text())
    given["backend"]["processes"] = 1
    run.recipe_file.write_text(yaml.safe_dump(given))
    assert trained(run).state == "done"
    assert losses(run) == pytest.approx(losses(unbroken), rel=1e-4)


@pytest.mark.slow
def test_a_process_that_raises_ends_the_job_within_30_s_and_is_named(place: Place, tmp_path: Path) -> None:
    run = place.begun(tmp_path, conf=sabotage(tmp_path, "raise ValueError('enough')"))
    failed_at = 0.0

    def strike() -> None:
        nonlocal failed_at
        when(lambda: (ranks.folder(run) / "rank-1-failure.json").is_file())
        failed_at = time.monotonic()

    status = trained(run, strike)
    assert time.monotonic() - failed_at < 30
    assert status.state == "failed"
    assert status.message == "training process 1 of 2: train failed: ValueError: enough"
    assert "enough" in read_json(ranks.folder(run) / "rank-1-failure.json")["traceback"]


@pytest.mark.slow
def test_a_process_that_hangs_is_named_and_nothing_waits_for_ever(place: Place, tmp_path: Path) -> None:
    run = place.begun(tmp_path, conf=sabotage(tmp_path, "import time; time.sleep(900)"), patience_s=60)
    status = trained(run)
    assert status.state == "failed"
    assert status.message.startswith("training: training process 1 of 2 (")
    assert "in step 3, assembling" in status.message
    assert "the others wait for it" in status.message


@pytest.mark.slow
def test_too_few_slots_are_counted(place: Place, tmp_path: Path) -> None:
    run = place.begun(tmp_path, processes=5, wait_s=3)
    status = trained(run)
    assert (status.state, status.kind) == ("failed", "UserError")
    assert "5 processes need as many slots at once, and the cluster has given" in status.message


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_of_the_last_step(place: Place, unbroken: Run, tmp_path: Path) -> None:
    run = place.begun(tmp_path)
    words = [sys.executable, "-m", "tunewright.cli", "train", str(run.path)]
    write_json(run.manifest_file("plan"), {})
    command = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    when(lambda: seen_step(run, 8))
    command.send_signal(signal.SIGINT)
    _, said = command.communicate(timeout=120)
    assert command.returncode == 130, said
    assert checkpoints.latest(run.checkpoints) is not None
    assert trained(run).state == "done"
    same(run, unbroken)


def sabotage(folder: Path, does: str) -> dict[str, str]:
    """Spark settings with which process 1 does something before the forward of its third step."""
    (folder / "sitecustomize.py").write_text(
        f"""
import os
if os.environ.get("RANK") == "1":
    import importlib.abc, importlib.util, sys
    class Late(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name != "tunewright.train.supervised":
                return None
            sys.meta_path.remove(self)
            from tunewright.train import steps
            plain = steps.Steps.training_step
            def training_step(self, *given, **options):
                if self.state.global_step == 2:
                    from tunewright import ranks
                    ranks.enter("assembling")
                    {does}
                return plain(self, *given, **options)
            steps.Steps.training_step = training_step
            return importlib.util.find_spec(name)
    sys.meta_path.insert(0, Late())
"""
    )
    return {"spark.executorEnv.PYTHONPATH": f"{folder}:{SRC}"}
