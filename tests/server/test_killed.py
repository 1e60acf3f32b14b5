"""Servers and workers as their operators start them, killed while they work: no job is lost, no event said twice."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import psutil
import pytest
from sqlalchemy import select
from test_worker import lines, messages, talk, wait, wait_for_step

from tunewright.run import Run
from tunewright.server import keys, models, tables
from tunewright.server.state import Server, Settings

pytestmark = pytest.mark.slow

SETS = ["train.use_cpu=true", "train.max_length=64", "tracking.enabled=false", "evaluate.max_new_tokens=8"]


@dataclass
class Operator:
    """Starts commands on one data folder and one database."""

    data: Path
    database: str | None
    key: str

    @contextlib.contextmanager
    def command(self, *words: str, stdout: int = subprocess.DEVNULL) -> Iterator[subprocess.Popen[str]]:
        options = ["--data", str(self.data), *(["--database", self.database] if self.database else [])]
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "tunewright.cli", *words, *options],
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(120)
            finally:
                process.kill()
                process.wait()

    @contextlib.contextmanager
    def serve(self, *words: str) -> Iterator[tuple[subprocess.Popen[str], openai.OpenAI]]:
        with self.command("serve", "--port", "0", *words, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            found = (re.search(r"serving at (http://\S+)", line) for line in process.stdout)
            url = next(one[1] for one in found if one)
            reading = threading.Thread(target=process.stdout.read)
            reading.start()
            with openai.OpenAI(base_url=url, api_key=self.key, max_retries=0) as client:
                yield process, client
            process.send_signal(signal.SIGTERM)
            reading.join()
            process.stdout.close()

    def processes(self) -> list[list[str]]:
        """The commands of what still runs on the data folder."""
        every = psutil.process_iter(["cmdline"])
        return [one.info["cmdline"] for one in every if str(self.data) in " ".join(one.info["cmdline"] or ())]


@pytest.fixture
def operator(tmp_path: Path, database: str | None, model_folder: Path) -> Iterator[Operator]:
    data = tmp_path / "data"
    with contextlib.closing(Server.open(Settings(data, database))) as server:
        models.add_base(server.store, "tiny", str(model_folder), overrides=[*SETS, "evaluate.bootstrap=200"])
        key = keys.create(server.store, "test")
    yield Operator(data, database, key)
    until = time.monotonic() + 20
    while Operator(data, database, key).processes():
        assert time.monotonic() < until, "something still runs"
        time.sleep(0.1)


def begin(client: openai.OpenAI, *, epochs: int, rows: int = 40) -> str:
    file = client.files.create(
        file=("rows.jsonl", lines([talk(number) for number in range(rows)])), purpose="fine-tune"
    )
    numbers = {"n_epochs": epochs, "batch_size": 1}
    return client.fine_tuning.jobs.create(model="tiny", training_file=file.id, hyperparameters=numbers).id  # type: ignore[arg-type]


def test_a_killed_server_loses_no_job_and_no_event(operator: Operator) -> None:
    """Its worker ends with it and gives the job back, which the next server's goes on with."""
    with operator.serve() as (process, client):
        job = begin(client, epochs=4)
        wait_for_step(client, job)
        said = messages(client, job)
        process.kill()
        process.wait()
    until = time.monotonic() + 90
    while operator.processes():
        assert time.monotonic() < until, "the worker of a killed server goes on"
        time.sleep(0.1)
    with operator.serve() as (_, client):
        assert messages(client, job)[: len(said)] == said
        done = wait(client, job)
        assert done.status == "succeeded", done.error
        events = list(client.fine_tuning.jobs.list_events(job, limit=100))
        assert max(Counter(event.message for event in events).values()) == 1
        steps = [event.data["step"] for event in events if event.type == "metrics"]  # type: ignore[index]
        assert steps == sorted(steps, reverse=True)
        assert steps[0] == 160
        answer = client.chat.completions.create(
            model=done.fine_tuned_model, messages=[{"role": "user", "content": "say lovely"}], max_tokens=2
        )
        assert answer.model == done.fine_tuned_model


def test_two_servers_and_three_workers_on_one_database(operator: Operator) -> None:
    """A worker is killed in the midst; every job is trained once, and each server shows all of them."""
    with contextlib.ExitStack() as running:
        served = [running.enter_context(operator.serve("--workers", "0"))[1] for _ in range(2)]
        workers = [running.enter_context(operator.command("worker", "--handover", "3")) for _ in range(3)]
        made = [begin(served[number % 2], epochs=2, rows=12) for number in range(6)]
        wait_for_step(served[0], made[0])
        (victim,) = (one for one in workers if one.pid == _worker_of(operator, made[0]))
        victim.kill()
        for number, job in enumerate(made):
            other = served[(number + 1) % 2]
            done = wait(other, job)
            assert done.status == "succeeded", done.error
            said = Counter(messages(other, job))
            assert max(said.values()) == 1, said
            assert sum(message.startswith("New fine-tuned model created") for message in said) == 1
            (run,) = (operator.data / "runs").glob(f"{job}-*")
            trained = [one["event"] for one in Run.open(run).events() if one["stage"] == "train"]
            assert trained.count("done") == 1
            assert trained.count("started") == 1 or job == made[0], trained
        assert len(list(served[0].files.list(purpose="fine-tune-results"))) == len(made)
        assert {one.id for one in served[0].fine_tuning.jobs.list()} == set(made)
        tuned = {one.id for one in served[1].models.list() if one.id.startswith("ft:")}
        assert len(tuned) == len(made)


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_worker_that_is_silent_and_alive_is_waited_for(operator: Operator) -> None:
    """Its process is stopped, not dead: it holds the run, and lets go when it wakes and hears that it lost the job."""
    with contextlib.ExitStack() as running:
        client = running.enter_context(operator.serve("--workers", "0"))[1]
        first = running.enter_context(operator.command("worker", "--handover", "2"))
        job = begin(client, epochs=6)
        wait_for_step(client, job)
        first.send_signal(signal.SIGSTOP)
        try:
            second = running.enter_context(operator.command("worker", "--handover", "2"))
            until = time.monotonic() + 60
            while _worker_of(operator, job) == first.pid:
                assert time.monotonic() < until
                time.sleep(0.1)
            time.sleep(3)
            assert client.fine_tuning.jobs.retrieve(job).status in ("queued", "running")
            assert second.poll() is None
        finally:
            first.send_signal(signal.SIGCONT)
        done = wait(client, job)
        assert done.status == "succeeded", done.error
        (run,) = (operator.data / "runs").glob(f"{job}-*")
        assert [one["event"] for one in Run.open(run).events() if one["stage"] == "train"].count("done") == 1


def _worker_of(operator: Operator, job: str) -> int | None:
    """The process that has a job, as the database says."""
    query = select(tables.jobs.c.claimed_by).where(tables.jobs.c.id == job)
    settings = Settings(operator.data, operator.database)
    with contextlib.closing(Server.open(settings)) as server, server.store.begin() as connection:
        found = connection.execute(query).scalar_one()
    return None if found is None else int(found.split(":")[1])
