"""The life of a run: what is done stays done, what failed goes on, what was killed ends as if it had not been."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import tunewright
from tunewright import life
from tunewright import recipe as recipes
from tunewright import run as run_folders
from tunewright.errors import RunError, StageError, UserError
from tunewright.run import STAGES, Run, read_json, write_json
from tunewright.testing import FakeBackend, tiny_data, tiny_model

RECIPE = """
name: life
model: {model}
task: classification
data: {{train: {train}, test: {test}}}
train: {{method: {method}, epochs: 2, learning_rate: 5.0e-3, batch_size: 4, save_steps: 5, lora: {{lora_dropout: 0.1}}}}
evaluate: {{bootstrap: 200}}
deploy: {{test_rows: 10}}
backend: {{kind: local, threads: 1}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("life") / "model")


@pytest.fixture
def recipe_file(model: Path, tmp_path: Path) -> Path:
    return write_recipe(model, tmp_path)


def write_recipe(model: Path, folder: Path, *, method: str = "lora") -> Path:
    data = tiny_data(folder / "data")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(model=model, method=method, **data))
    return path


def command(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tunewright.cli", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def processes_of(run: Run) -> list[int]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if str(run.path) in (process.info["cmdline"] or []):
            found.append(process.pid)
    return found


def test_the_whole_life_ends_in_a_tested_endpoint_and_destroy_leaves_nothing(recipe_file: Path, tmp_path: Path) -> None:
    done = command("run", recipe_file, "--runs", tmp_path / "runs", "--yes")
    assert done.returncode in (0, 3), done.stderr
    assert done.stdout.count("\n") == 1
    run = Run.open(done.stdout.strip())
    assert [run.status(stage) for stage in STAGES] == ["done"] * len(STAGES)
    report = run.manifest("evaluate")
    assert (done.returncode == 0) == (report["comparison"]["verdict"] == "better")
    tested = run.manifest("test")
    assert tested["compared"] == tested["equal"] == 10
    assert len(processes_of(run)) == 1

    import openai

    client = openai.OpenAI(
        base_url=run.manifest("deploy")["base_url"],
        api_key=run.key_file.read_text().strip(),
        http_client=openai.DefaultHttpxClient(trust_env=False),
    )
    reply = client.chat.completions.create(model="life", messages=[{"role": "user", "content": "lovely great"}])
    assert reply.choices[0].message.content in ("good", "bad")
    client.close()

    shown = command("show", run.path, "--json")
    assert json.loads(shown.stdout)["test"]["equal"] == 10
    gone = command("destroy", run.path)
    assert gone.returncode == 0, gone.stderr
    assert processes_of(run) == []
    assert all(entry["is"] == "gone" for entry in run.resources())

    from mlflow import MlflowClient

    tracking = read_json(run.tracking_file)
    mlflow = MlflowClient(tracking["uri"], tracking["uri"])
    assert mlflow.get_run(tracking["mlflow_run_id"]).info.status == "FINISHED"
    assert mlflow.search_model_versions("name='life'") == []
    again = command("destroy", run.path)
    assert again.returncode == 0
    assert "nothing to remove" in again.stderr


def test_python_has_the_same_verbs(recipe_file: Path, tmp_path: Path) -> None:
    work = tunewright.open(recipe_file, runs=tmp_path / "runs", overrides=["tracking.enabled=false"])
    assert work.check().errors == []
    assert work.plan()["steps"] == 30
    outcome = work.evaluate()
    assert outcome.did == ["check", "plan", "prepare", "train", "evaluate"]
    assert work.report["task"] == "classification"
    assert work.evaluate().did == []
    assert work.show()["stages"]["train"] == "done"
    work.destroy(files=True)
    assert not outcome.run.path.exists()


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_kill_in_training_then_the_same_command_ends_with_the_same_weights(
    model: Path, tmp_path: Path, method: str
) -> None:
    recipe = write_recipe(model, tmp_path, method=method)
    words = ["run", recipe, "--until", "train", "--set", "tracking.enabled=false"]
    unbroken = Run.open(command(*words, "--runs", tmp_path / "whole").stdout.strip())

    broken = tmp_path / "broken"
    first = subprocess.Popen(
        [sys.executable, "-m", "tunewright.cli", *map(str, words), "--runs", str(broken)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    run = killed_at_step(broken, first, 13)
    steps_before = [entry["step"] for entry in run.metrics()]
    assert max(steps_before) < 30
    second = command(*words, "--runs", broken)
    assert second.returncode == 0, second.stderr
    assert Run.open(second.stdout.strip()).path == run.path
    assert run.manifest("train")["resumed_from"] is not None
    assert run.manifest("train")["sha256"] == unbroken.manifest("train")["sha256"]
    assert [(entry["step"], entry.get("loss")) for entry in run.metrics()] == [
        (entry["step"], entry.get("loss")) for entry in unbroken.metrics()
    ]


def killed_at_step(runs: Path, command: subprocess.Popen[bytes], step: int) -> Run:
    """SIGKILL for the command and its training process once the log reaches a step."""
    deadline = time.monotonic() + 180
    while True:
        assert time.monotonic() < deadline
        assert command.poll() is None, "it ended before it could be killed"
        found = run_folders.list_runs(runs)
        if found and any(entry["step"] >= step for entry in found[0].metrics()):
            break
        time.sleep(0.005)
    run = found[0]
    pid = read_json(run.job_file("train"))["pid"]
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    command.kill()
    command.wait()
    psutil.wait_procs([process for process in psutil.process_iter() if process.pid == pid], timeout=10)
    return run


@pytest.mark.slow
def test_killing_the_command_alone_leaves_training_running_and_the_next_looks_on(
    recipe_file: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    words = ["run", recipe_file, "--until", "train", "--set", "tracking.enabled=false", "--runs", runs]
    first = subprocess.Popen([sys.executable, "-m", "tunewright.cli", *map(str, words)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (found := run_folders.list_runs(runs)) or not found[0].job_file("train").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pid = read_json(found[0].job_file("train"))["pid"]
    first.kill()
    first.wait()
    second = command(*words)
    assert second.returncode == 0, second.stderr
    assert read_json(found[0].job_file("train"))["pid"] == pid


@pytest.mark.slow
def test_ctrl_c_in_training_stops_with_a_checkpoint_and_the_same_command_goes_on(
    recipe_file: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    words = ["run", recipe_file, "--until", "train", "--runs", runs, "--set", "train.max_steps=1500"]
    words += ["--set", "train.save_strategy=epoch"]
    first = subprocess.Popen(
        [sys.executable, "-m", "tunewright.cli", *map(str, words)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 180
    while not (found := run_folders.list_runs(runs)) or len(found[0].metrics()) < 20:
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=90)
    assert first.returncode == 130
    assert "stopped; the same command again goes on from here" in said
    run = found[0]
    assert run.state()["stages"]["train"]["status"] == "cancelled"
    assert processes_of(run) == []
    assert list(run.checkpoints.glob("checkpoint-*/complete.json"))
    second = command(*words)
    assert second.returncode == 0, second.stderr
    assert run.manifest("train")["steps"] == 1500
    assert run.manifest("train")["resumed_from"] is not None


def test_the_same_recipe_on_changed_data_is_a_new_run(recipe_file: Path, tmp_path: Path) -> None:
    recipe = recipes.load(recipe_file)
    first = life.start(recipe, tmp_path / "runs")
    life.advance(first, until="check")
    assert life.start(recipe, tmp_path / "runs") == first
    with Path(recipe.data.train[0]).open("a") as file:
        file.write('{"text": "lovely", "label": "good"}\n')
    assert life.start(recipe, tmp_path / "runs") != first


def test_resume_insists_and_fresh_starts_anew(recipe_file: Path, tmp_path: Path) -> None:
    recipe = recipes.load(recipe_file)
    with pytest.raises(RunError, match="no unfinished run"):
        life.start(recipe, tmp_path / "runs", resume=True)
    first = life.start(recipe, tmp_path / "runs")
    assert life.start(recipe, tmp_path / "runs", resume=True) == first
    assert life.start(recipe, tmp_path / "runs", resume=False) != first


def test_a_failed_stage_is_recorded_and_goes_on_after_the_mend(recipe_file: Path, tmp_path: Path) -> None:
    run = life.start(recipes.load(recipe_file), tmp_path / "runs")
    train = Path(run.recipe().data.train[0])
    good = train.read_text()
    train.write_text(good + "{broken\n")
    with pytest.raises(UserError, match=r"train\.jsonl:61"):
        life.advance(run, until="prepare")
    assert run.status("check") == "failed"
    assert "train.jsonl:61" in run.state()["stages"]["check"]["error"]
    train.write_text(good)
    assert life.advance(run, until="prepare").did == ["check", "plan", "prepare"]


def test_two_commands_do_not_work_on_one_run(recipe_file: Path, tmp_path: Path) -> None:
    run = life.start(recipes.load(recipe_file), tmp_path / "runs")
    holder = (
        "import sys, time\nfrom tunewright.run import Run\n"
        "with Run.open(sys.argv[1]).lock(): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", holder, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(RunError, match=str(other.pid)):
        life.advance(run)
    other.kill()
    other.communicate()
    assert life.advance(run, until="plan").did == ["check", "plan"]


def test_a_lost_job_is_said_and_not_taken_for_done(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = life.start(recipes.load(recipe_file), tmp_path / "runs")
    life.advance(run, until="plan")
    fake = FakeBackend({"forget": "train"})
    monkeypatch.setattr("tunewright.backends.base.backend", lambda recipe: fake)
    with pytest.raises(StageError, match="vanished"):
        life.advance(run, until="train")
    assert run.status("prepare") == "done"
    assert run.status("train") == "failed"


def test_must_beat_decides_the_exit_code(recipe_file: Path, tmp_path: Path) -> None:
    run = life.start(recipes.load(recipe_file), tmp_path / "runs")
    for verdict, must_beat, code in (
        ("better", "base", 0),
        ("not better", "base", 3),
        ("no evidence", "base", 3),
        ("no evidence", None, 0),
    ):
        write_json(run.manifest_file("evaluate"), {"comparison": {"verdict": verdict}, "must_beat": must_beat})
        assert life.Outcome(run, life.verdict(run)).exit_code == code
