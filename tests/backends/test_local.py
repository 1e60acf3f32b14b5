"""The local backend's endpoint and processes, when things go wrong around them."""

from __future__ import annotations

import http.server
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import tunewright
from tunewright import life
from tunewright import recipe as recipes
from tunewright.api import Life
from tunewright.backends.local import LocalBackend
from tunewright.errors import EndpointError, RunError
from tunewright.run import Run, read_json
from tunewright.testing import tiny_data


@pytest.fixture(scope="module")
def work(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    """A run that is packaged, in a folder spelt in a roundabout way."""
    folder = tmp_path_factory.mktemp("local")
    data = tiny_data(folder / "data")
    (folder / "recipe.yaml").write_text(
        f"name: local\nmodel: {model_folder}\ntask: classification\n"
        f"data: {{train: {data['train']}, test: {data['test']}}}\n"
        "train: {epochs: 1, batch_size: 8}\nevaluate: {bootstrap: 200}\ndeploy: {test_rows: 5}\n"
        "tracking: {enabled: false}\nbackend: {kind: local, threads: 1}\n"
    )
    (folder / "elsewhere").mkdir()
    made = tunewright.open(folder / "recipe.yaml", runs=folder / "elsewhere" / ".." / "runs")
    made.package()
    yield made
    made.destroy()


@pytest.mark.parametrize(
    ("task", "said"), [("chat", []), ("preference", ["backend.processes: task: preference trains"])]
)
def test_several_processes_are_refused_where_training_has_one(task: str, said: list[str]) -> None:
    recipe = recipes.Recipe.model_validate({"name": "t", "model": "m", "task": task, "data": {"train": "a.jsonl"}})
    found = LocalBackend({"processes": 2}).check(recipe, ("train",))
    assert [problem.message[: len(one)] for problem, one in zip(found, said, strict=True)] == said


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (
            {"fsdp": "full_shard"},
            "train.fsdp shards the weights over several processes, and backend.processes is 1; set",
        ),
        ({"ddp_timeout": 60}, "train.ddp_timeout is for several processes, and backend.processes is 1; leave it out"),
    ],
)
def test_what_needs_several_processes_is_refused_with_one(train: dict[str, Any], said: str) -> None:
    given = {"name": "t", "model": "m", "task": "chat", "data": {"train": "a.jsonl"}, "train": train}
    recipe = recipes.Recipe.model_validate(given)
    (problem,) = LocalBackend({}).check(recipe, ("train",))
    assert problem.message.startswith(said)
    assert LocalBackend({"processes": 2}).check(recipe, ("train",)) == []


def test_a_preflight_of_several_processes_is_refused() -> None:
    given = {"name": "t", "model": "m", "task": "chat", "data": {"train": "a.jsonl"}, "train": {"preflight": "always"}}
    recipe = recipes.Recipe.model_validate(given)
    assert LocalBackend({}).check(recipe, ("train",)) == []
    (problem,) = LocalBackend({"processes": 2}).check(recipe, ("train",))
    assert problem.message.startswith("train.preflight: always: backend.processes is 2, and a preflight is for one")


def endpoint_pid(run: Run) -> int:
    pid: int = read_json(run.job_file("deploy"))["pid"]
    return pid


def test_an_endpoint_that_was_killed_is_seen_and_started_again(work: Life) -> None:
    work.test()
    first = endpoint_pid(work.folder)
    assert work.show()["endpoint"]["up"]
    os.kill(first, signal.SIGKILL)
    psutil.wait_procs([process for process in psutil.process_iter() if process.pid == first], timeout=10)
    assert not work.show()["endpoint"]["up"]
    assert work.test().did == ["deploy", "test"]
    assert endpoint_pid(work.folder) != first
    assert [entry["is"] for entry in work.folder.resources()] == ["gone", "made"]


def test_doing_a_stage_again_stops_what_served_the_old_result(work: Life) -> None:
    work.test()
    first = endpoint_pid(work.folder)
    work.forget("package")
    assert not psutil.pid_exists(first)
    assert work.folder.status("evaluate") == "done"
    assert [work.folder.status(stage) for stage in ("package", "deploy", "test")] == ["todo"] * 3
    assert work.folder.last_test_file.is_file()
    assert work.test().did == ["package", "deploy", "test"]


def test_training_again_does_not_go_on_from_old_checkpoints(work: Life) -> None:
    work.train()
    assert list(work.folder.checkpoints.iterdir())
    work.forget("train")
    work.train()
    assert work.folder.manifest("train")["resumed_from"] is None
    assert work.folder.events()[-1]["event"] == "done"


def test_destroy_finds_the_endpoint_however_the_folder_is_spelt(work: Life) -> None:
    work.test()
    pid = endpoint_pid(work.folder)
    roundabout = work.folder.path.parent / "." / ".." / "runs" / work.folder.id
    work.folder.job_file("deploy").unlink()  # as if a kill had come before it was written
    removed = tunewright.open(roundabout).destroy()
    assert ("process", "stopped") in [(one.kind, one.what) for one in removed]
    assert not psutil.pid_exists(pid)


def test_destroy_waits_for_nobody_who_works_on_the_run(work: Life) -> None:
    with work.folder.lock(), pytest.raises(RunError, match=str(os.getpid())):
        work.destroy()


def test_another_server_on_the_port_is_not_taken_for_ours(work: Life) -> None:
    class Stranger(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"status": "ok", "model": "local"}).encode())

        def log_message(self, *_: object) -> None:
            """Not shown."""

    work.package()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        text = work.folder.recipe_file.read_text()
        busy = text.replace("deploy:\n", f"deploy:\n  port: {server.server_port}\n")
        assert busy != text
        work.folder.recipe_file.write_text(busy)
        try:
            with pytest.raises(EndpointError, match="is in use"):
                life.advance(work.folder, until="deploy")
        finally:
            work.folder.recipe_file.write_text(text)
            server.shutdown()
            thread.join()
    assert work.folder.status("deploy") == "failed"


def test_a_child_that_nobody_wrote_down_is_found(work: Life, tmp_path: Path) -> None:
    run = life.start(recipes.load(work.folder.recipe_file), tmp_path / "runs")
    life.advance(run, until="plan")
    backend = LocalBackend({"threads": 1})
    job = backend.submit("prepare", run)
    run.job_file("prepare").unlink()
    assert backend.submit("prepare", run) == job
    while backend.poll(job, run).state == "running":
        pass
    assert run.status("prepare") == "done"
