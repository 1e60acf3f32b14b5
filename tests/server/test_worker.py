"""Whole jobs: a file goes up, a worker trains, a model with a name comes out; and what is said where it cannot."""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from server_running import Running
from tunewright.errors import RecipeError
from tunewright.run import Run
from tunewright.server import job_recipes, jobs, models, process, store, tables
from tunewright.server import worker as workers
from tunewright.server.job_recipes import recipe_of
from tunewright.server.state import Server, Settings
from tunewright.server.worker import CHECKING, TRAINING, Worker, claim, results_csv

FINAL = ("succeeded", "failed", "cancelled")


def talk(number: int) -> dict[str, Any]:
    said = ("lovely", "awful")[number % 2]
    return {
        "messages": [
            {"role": "user", "content": f"say {said} {number}"},
            {"role": "assistant", "content": said},
        ]
    }


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@contextlib.contextmanager
def working(server: Server) -> Iterator[threading.Event]:
    """A worker in this process; its stages are processes of their own, as ever."""
    stop = threading.Event()
    threads = [threading.Thread(target=Worker(server, one, stop).run) for one in (CHECKING, TRAINING)]
    for thread in threads:
        thread.start()
    try:
        yield stop
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def wait(client: openai.OpenAI, job: str, *statuses: str, seconds: float = 240) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = client.fine_tuning.jobs.retrieve(job)
        if found.status in (statuses or FINAL):
            return found
        assert found.status not in FINAL, found
        time.sleep(0.1)
    raise AssertionError(f"{job} is still {found.status}: {messages(client, job)}")


def messages(client: openai.OpenAI, job: str) -> list[str]:
    return [event.message for event in client.fine_tuning.jobs.list_events(job, limit=100)][::-1]


@pytest.fixture
def base(served: Running, model_folder: Path) -> str:
    sets = ["train.use_cpu=true", "train.max_length=64", "tracking.enabled=false", "evaluate.max_new_tokens=8"]
    models.add_base(served.server.store, "tiny-1", str(model_folder), overrides=[*sets, "evaluate.bootstrap=200"])
    return "tiny-1"


def upload(served: Running, rows: list[Any]) -> str:
    return served.client().files.create(file=("rows.jsonl", lines(rows)), purpose="fine-tune").id


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_supervised_job_from_file_to_model(served: Running, base: str) -> None:
    client = served.client()
    training, validation = (upload(served, [talk(n) for n in range(start, start + 12)]) for start in (0, 100))
    job = client.fine_tuning.jobs.create(
        model=base,
        training_file=training,
        validation_file=validation,
        suffix="My sayings",
        seed=105,
        hyperparameters={"n_epochs": 4, "batch_size": 4, "learning_rate_multiplier": 2},
    )
    with working(served.server):
        done = wait(client, job.id)
    said = messages(client, job.id)
    assert done.status == "succeeded", done.error
    assert done.fine_tuned_model == f"ft:tiny-1:tunewright:my-sayings:{job.id.removeprefix('ftjob-')[:8]}"
    assert done.finished_at >= done.created_at
    assert done.trained_tokens > 0
    assert done.hyperparameters.to_dict() == {"n_epochs": 4, "batch_size": 4, "learning_rate_multiplier": 2.0}
    assert done.method.supervised.hyperparameters.n_epochs == 4
    assert said[:2] == [f"Created fine-tuning job: {job.id}", f"Validating training file: {training}"]
    for message in (
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        f"New fine-tuned model created: {done.fine_tuned_model}",
        "The job has successfully completed",
    ):
        assert said.count(message) == 1, said
    assert sum(message.startswith("Step 12/12: training loss=") for message in said) == 1
    metrics = [e for e in client.fine_tuning.jobs.list_events(job.id, limit=100) if e.type == "metrics"]
    assert {event.data["total_steps"] for event in metrics} == {12}

    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert [one.step_number for one in checkpoints] == [12, 9, 6]  # the last three of four
    assert all(one.metrics.full_valid_loss is not None for one in checkpoints)
    assert checkpoints[0].fine_tuned_model_checkpoint == f"{done.fine_tuned_model}:ckpt-step-12"
    for one in checkpoints:
        folder = models.find(served.server, one.fine_tuned_model_checkpoint).folder
        assert folder is not None
        assert (folder / "adapter_model.safetensors").is_file()
        assert not list(folder.glob("*optimizer*"))

    (result,) = done.result_files
    plain = served.azure().files.content(result).text
    assert base64.b64decode(client.files.content(result).text).decode() == plain
    table = list(csv.DictReader(io.StringIO(plain)))
    assert [row["step"] for row in table] == [str(step) for step in range(1, 13)]
    assert float(table[-1]["train_loss"]) < float(table[0]["train_loss"])
    assert table[2]["valid_loss"]
    assert 0 <= float(table[11]["valid_mean_token_accuracy"]) <= 1
    valid = [event.data["full_valid_mean_token_accuracy"] for event in metrics if "full_valid_loss" in event.data]
    assert len(valid) == 4  # one for each epoch

    target = models.find(served.server, done.fine_tuned_model)
    assert target.kind == "adapter"
    assert target.folder is not None
    assert (target.folder / "rendering.json").is_file()
    with safe_open(target.folder / "adapter_model.safetensors", "pt") as weights:
        assert len(weights.keys()) > 0
    report = json.loads(
        (served.server.settings.runs / run_of(served.server, job.id) / "evaluate/report.json").read_text()
    )
    assert report["rows"] == 12
    assert done.fine_tuned_model in [model.id for model in client.models.list()]
    assert client.models.delete(done.fine_tuned_model).deleted
    assert not target.folder.exists()


def run_of(server: Server, job: str) -> str:
    with server.store.begin() as connection:
        return str(connection.execute(select(tables.jobs.c.run_id).where(tables.jobs.c.id == job)).scalar())


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_what_is_wrong_with_a_file_comes_on_the_job(served: Running, base: str) -> None:
    client = served.client()
    good = [talk(number) for number in range(12)]
    broken = lines(good[:11]) + b'{"messages": [{"role": "user", "content": "x"}\n'
    cases: dict[str, tuple[bytes, str, str]] = {
        "few": (lines(good[:7]), "invalid_n_examples", "Training file has 7 example(s), but must have at least 10"),
        "broken": (broken, "invalid_training_file", "line 12"),
        "role": (
            lines([*good[:11], {"messages": [{"role": "wizard", "content": "x"}]}]),
            "invalid_training_file",
            "line 12",
        ),
        "pairs": (
            lines([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 12),
            "invalid_training_file",
            "messages",
        ),
        "noise": (bytes(range(256)) * 40, "invalid_training_file", ""),
    }
    made = {}
    for name, (content, _, _) in cases.items():
        file = client.files.create(file=(f"{name}.jsonl", content), purpose="fine-tune").id
        made[name] = client.fine_tuning.jobs.create(model=base, training_file=file)
    with working(served.server):
        for name, job in made.items():
            done = wait(client, job.id)
            _, code, words = cases[name]
            assert done.status == "failed", name
            assert done.error.code == code, (name, done.error)
            assert done.error.param == "training_file"
            assert words in done.error.message, (name, done.error)
            assert str(served.server.settings.data) not in done.error.message
            assert done.error.message in messages(client, job.id)[-1]


@pytest.mark.slow
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_cancelled_job_stops_and_a_paused_one_goes_on(served: Running, base: str) -> None:
    client = served.client()
    file = upload(served, [talk(number) for number in range(40)])
    with working(served.server):
        first = client.fine_tuning.jobs.create(
            model=base, training_file=file, hyperparameters={"n_epochs": 50, "batch_size": 1}
        )
        wait_for_step(client, first.id)
        client.fine_tuning.jobs.cancel(first.id)
        assert wait(client, first.id).status == "cancelled"
        second = client.fine_tuning.jobs.create(
            model=base, training_file=file, hyperparameters={"n_epochs": 6, "batch_size": 1}
        )
        wait_for_step(client, second.id)
        client.fine_tuning.jobs.pause(second.id)
        paused = wait(client, second.id, "paused")
        assert paused.fine_tuned_model is None
        assert client.fine_tuning.jobs.checkpoints.list(second.id).data  # what it has learnt so far can be asked
        client.fine_tuning.jobs.resume(second.id)
        done = wait(client, second.id)
    assert done.status == "succeeded"
    said = messages(client, second.id)
    assert said.count("Fine-tuning job started") == 1
    assert sum(message.startswith("Step 1/240") for message in said) == 1


def wait_for_step(client: openai.OpenAI, job: str, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not any(message.startswith("Step ") for message in messages(client, job)):
        assert time.monotonic() < until, messages(client, job)
        time.sleep(0.1)


@pytest.mark.parametrize("database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)], indirect=True)
def test_a_killed_worker_loses_nothing(served: Running, base: str, database: str | None) -> None:
    """SIGKILL of the worker's process in the middle of training; the next one goes on with the same training."""
    client = served.client()
    file = upload(served, [talk(number) for number in range(40)])
    job = client.fine_tuning.jobs.create(
        model=base, training_file=file, hyperparameters={"n_epochs": 6, "batch_size": 1}
    )
    command = [sys.executable, "-m", "tunewright.cli", "worker", "--data", str(served.server.settings.data)]
    command += ["--handover", "2", *(["--database", database] if database else [])]
    first = subprocess.Popen(command)
    try:
        wait_for_step(client, job.id)
    finally:
        first.kill()
        first.wait()
    assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
    second = subprocess.Popen(command)
    try:
        done = wait(client, job.id)
    finally:
        second.send_signal(signal.SIGTERM)
        assert second.wait(60) == 0
    assert done.status == "succeeded", done.error
    said = messages(client, job.id)
    assert [sum(message.startswith(f"Step {step}/240:") for message in said) for step in (1, 120, 240)] == [1, 1, 1]
    left = [
        one.cmdline() for one in psutil.process_iter(["cmdline"]) if str(served.server.settings.data) in str(one.info)
    ]
    assert left == []


@pytest.mark.slow
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_worker_that_is_asked_to_stop_gives_its_job_back(served: Running, base: str) -> None:
    client = served.client()
    file = upload(served, [talk(number) for number in range(40)])
    job = client.fine_tuning.jobs.create(
        model=base, training_file=file, hyperparameters={"n_epochs": 6, "batch_size": 1}
    )
    with working(served.server):
        wait_for_step(client, job.id)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "queued"
    with working(served.server):
        assert wait(client, job.id).status == "succeeded"


ASK = [{"role": "user", "content": "say it"}]
PAIR = {
    "input": {"messages": ASK},
    "preferred_output": [{"role": "assistant", "content": "lovely"}],
    "non_preferred_output": [{"role": "assistant", "content": "awful"}],
}
GRADER = {"type": "string_check", "name": "g", "operation": "like", "reference": "{{ item.answer }}"}
GRADER["input"] = "{{ sample.output_text }}"
ONE_EPOCH = {"batch_size": 2, "n_epochs": 1}
METHODS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "preference": ([PAIR] * 12, {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, **ONE_EPOCH}}}),
    "reward": (
        [{"messages": ASK, "answer": "e"}] * 12,
        {"type": "reinforcement", "reinforcement": {"grader": GRADER, "hyperparameters": ONE_EPOCH}},
    ),
}


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_pairs_and_prompts_with_a_grader_become_runs_of_their_kind(served: Running, model_folder: Path) -> None:
    """Their files are read and their numbers settled; what training then does is the training's own tests'."""
    client = served.client()
    sets = ["train.use_cpu=true", "tracking.enabled=false"]
    models.add_base(served.server.store, "tiny-2", str(model_folder), overrides=sets)
    for task, (rows, method) in METHODS.items():
        file = upload(served, rows)
        job = client.fine_tuning.jobs.create(model="tiny-2", training_file=file, validation_file=file, method=method)  # type: ignore[arg-type]
        stop = threading.Event()
        worker = Worker(served.server, CHECKING, stop)
        found = claim(served.server, worker.name, CHECKING)
        assert found is not None
        worker.work(found)
        done = client.fine_tuning.jobs.retrieve(job.id)
        assert done.status == "queued", done.error
        assert done.hyperparameters.batch_size == 2
        recipe = Run.open(served.server.settings.runs / run_of(served.server, job.id)).recipe()
        assert recipe.task == task
        assert recipe.train.batch_size == {"preference": 2, "reward": 16}[task]
        client.fine_tuning.jobs.cancel(job.id)


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_settings_that_are_not_for_a_job_are_left_out_of_it_by_name(served: Running, model_folder: Path) -> None:
    server = served.server
    sets = ["train.lora.r=4", "train.max_length=64", "evaluate.max_new_tokens=8"]
    models.add_base(server.store, "tiny-2", str(model_folder), overrides=sets)
    with server.store.begin() as connection:
        start = models.known(connection, server.settings.data, "tiny-2")
        assert start is not None
        models.record(connection, "ft:tiny-2:x", job_id="ftjob-x", start=start, folder="models/x", kind="adapter")
    rows, method = METHODS["reward"]
    plain, grading = upload(served, [talk(number) for number in range(12)]), upload(served, rows)
    for model, more, left in (
        ("tiny-2", {}, []),
        ("ft:tiny-2:x", {}, ["train.lora.r=4"]),
        ("ft:tiny-2:x", {"method": method}, ["train.lora.r=4", "evaluate.max_new_tokens=8"]),
    ):
        file = grading if more else plain
        job = served.client().fine_tuning.jobs.create(model=model, training_file=file, **more)  # type: ignore[arg-type]
        with server.store.begin() as connection:
            row = store.row(connection, tables.jobs, id=job.id)
        assert row is not None
        recipe, unused = recipe_of(server, row)
        assert [one.split()[2] for one in unused] == left
        assert recipe.train.max_length == 64
        assert (recipe.train.lora.r == 4) == (left == [])
    models.add_base(server.store, "tiny-2", str(model_folder), overrides=["train.max_length=nine"])
    with pytest.raises(RecipeError, match="max_length"):
        recipe_of(server, row | {"model": "tiny-2", "method": {"type": "supervised", "supervised": {}}})


@pytest.mark.slow
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
@pytest.mark.parametrize("task", METHODS)
def test_pairs_and_prompts_with_a_grader_end_in_a_model(served: Running, model_folder: Path, task: str) -> None:
    client = served.client()
    sets = ["train.use_cpu=true", "train.max_length=64", "tracking.enabled=false", "evaluate.max_new_tokens=8"]
    sets += ["evaluate.bootstrap=200"] + (["train.grpo.max_completion_length=6"] if task == "reward" else [])
    models.add_base(served.server.store, "tiny-2", str(model_folder), overrides=sets)
    rows, method = METHODS[task]
    file = upload(served, rows)
    job = client.fine_tuning.jobs.create(model="tiny-2", training_file=file, validation_file=file, method=method)  # type: ignore[arg-type]
    with working(served.server):
        done = wait(client, job.id)
    assert done.status == "succeeded", done.error
    steps = 6
    assert sum(message.startswith(f"Step {steps}/{steps}:") for message in messages(client, job.id)) >= 1
    table = list(csv.DictReader(io.StringIO(served.azure().files.content(done.result_files[0]).text)))
    assert [row["step"] for row in table if row["train_loss"]] == [str(step + 1) for step in range(steps)]
    assert bool(table[-1]["valid_loss"]) == (task == "preference")
    unused = [message for message in messages(client, job.id) if "is not used for this job" in message]
    assert [message.split()[2] for message in unused] == ["evaluate.max_new_tokens=8"] * (task == "reward")
    assert client.fine_tuning.jobs.checkpoints.list(job.id).data
    said = client.chat.completions.create(model=done.fine_tuned_model, messages=ASK, max_tokens=4)  # type: ignore[arg-type]
    assert said.model == done.fine_tuned_model


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_job_whose_run_another_process_holds_is_left_to_it(
    served: Running, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "BUSY_S", 0.0)
    client = served.client()
    job = client.fine_tuning.jobs.create(model=base, training_file=upload(served, [talk(n) for n in range(12)]))
    for statuses in (CHECKING, TRAINING):
        worker = Worker(served.server, statuses, threading.Event())
        found = claim(served.server, worker.name, statuses)
        assert found is not None
        if statuses == CHECKING:
            worker.work(found)
            continue
        with Run.open(served.server.settings.runs / run_of(served.server, job.id)).lock():
            worker.work(found)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "queued"
    assert claim(served.server, "next", TRAINING) is not None


@pytest.mark.slow
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_database_that_is_away_fails_no_job(served: Running, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where a step is told, nor where the job's end is written."""
    client = served.client()
    job = client.fine_tuning.jobs.create(
        model=base,
        training_file=upload(served, [talk(n) for n in range(12)]),
        hyperparameters={"n_epochs": 2, "batch_size": 4},
    )
    say, away = jobs.say, {"step 1": 2, "checkpoint 3": 1, "done": 2}

    def stumbling(connection: Any, job_id: str, what: str, message: str, **more: Any) -> None:
        if away.get(what):
            away[what] -= 1
            raise OperationalError("INSERT", {}, Exception("the server closed the connection"))
        say(connection, job_id, what, message, **more)

    monkeypatch.setattr(jobs, "say", stumbling)
    with working(served.server):
        done = wait(client, job.id)
    assert done.status == "succeeded", done.error
    assert set(away.values()) == {0}
    said = messages(client, job.id)
    assert [sum(message.startswith(f"Step {step}/6:") for message in said) for step in range(1, 7)] == [1] * 6
    assert said[-2:] == [
        f"New fine-tuned model created: {done.fine_tuned_model}",
        "The job has successfully completed",
    ]
    assert len(list(client.files.list(purpose="fine-tune-results"))) == 1


@given(st.lists(st.sampled_from([b"a", b"bc", b" ", b"\n", b"\r\n"]), max_size=30), st.integers(1, 7))
def test_lines_are_counted_in_pieces(parts: list[bytes], piece: int) -> None:
    with tempfile.NamedTemporaryFile() as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_recipes, "PIECE", piece)
        file.write(b"".join(parts))
        file.flush()
        assert job_recipes.count_lines(Path(file.name)) == sum(
            bool(line.strip()) for line in b"".join(parts).split(b"\n")
        )


def test_no_password_is_in_the_list_of_processes() -> None:
    settings = Settings(Path("data"), "postgresql://user:SECRET@host/name", "s3://key:SECRET@bucket")
    assert "SECRET" not in " ".join(process._worker_command(settings))
    assert process._worker_environment(settings) == {
        "TUNEWRIGHT_DATABASE": settings.database,
        "TUNEWRIGHT_FILES": settings.files,
    }


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_base_that_was_taken_away_meanwhile_is_said_on_the_job(served: Running, base: str) -> None:
    client = served.client()
    job = client.fine_tuning.jobs.create(model=base, training_file=upload(served, [talk(n) for n in range(12)]))
    models.remove_base(served.server.store, base)
    worker = Worker(served.server, CHECKING, threading.Event())
    found = claim(served.server, worker.name, CHECKING)
    assert found is not None
    worker.work(found)
    done = client.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.error.code, done.error.param) == ("failed", "model_not_found", "model")


def test_results_are_empty_where_nothing_was_measured() -> None:
    class Log:
        def metrics(self) -> list[dict[str, Any]]:
            return [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}]

    openai_table, azure_table = (results_csv(Log(), azure=azure).splitlines() for azure in (False, True))  # type: ignore[arg-type]
    assert openai_table[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert openai_table[1:] == ["1,2.00000,,,", "2,1.00000,,1.50000,"]
    assert azure_table[0] == (
        "step,train_loss,train_mean_token_accuracy,valid_loss,validation_mean_token_accuracy,full_valid_loss,"
        "full_valid_mean_token_accuracy"
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("last", [b"", b'{"messages": [{"role": "user", "content": "x"}\n'], ids=["good", "bad"])
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_million_rows_are_checked_in_bounded_memory(served: Running, base: str, tmp_path: Path, last: bytes) -> None:
    """Where all is well, and where the last line is not, which is named."""
    path = tmp_path / "many.jsonl"
    with path.open("wb") as file:
        file.writelines(
            b'{"messages": [{"role": "user", "content": "say %d"}, {"role": "assistant", "content": "%d"}]}\n'
            % (number, number % 7)
            for number in range(999_999 if last else 1_000_000)
        )
        file.write(last)
    client = served.client()
    client.models.list()  # what the first request allocates once
    began = time.monotonic()
    with Peak() as sending, path.open("rb") as file:
        made = client.files.create(file=file, purpose="fine-tune").id
    uploaded_s = time.monotonic() - began
    job = client.fine_tuning.jobs.create(model=base, training_file=made)
    worker = Worker(served.server, CHECKING, threading.Event())
    found = claim(served.server, worker.name, CHECKING)
    assert found is not None
    began = time.monotonic()
    with Peak() as checking:
        worker.work(found)
    checked_s = time.monotonic() - began
    done = client.fine_tuning.jobs.retrieve(job.id)
    print(
        f"{path.stat().st_size >> 20} MB, upload {uploaded_s:.1f} s (+{sending.grown >> 20} MB), "
        f"check {checked_s:.1f} s (+{checking.grown >> 20} MB)"
    )
    assert sending.grown < 64 << 20
    assert checking.grown < 160 << 20
    if last:
        assert (done.status, done.error.code) == ("failed", "invalid_training_file")
        assert f"{made} line 1000000" in done.error.message, done.error
    else:
        assert done.status == "queued", done.error


class Peak:
    """The most memory of this process, and of whatever it starts, while the block runs."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.before = self.bytes = self._now()

    @property
    def grown(self) -> int:
        return self.bytes - self.before

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_raised: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.02):
            self.bytes = max(self.bytes, self._now())

    def _now(self) -> int:
        me = psutil.Process()
        total = 0
        for one in [me, *me.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                total += one.memory_info().rss
        return total
