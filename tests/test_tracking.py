"""One MLflow run for each run here, with everything in it once, whatever was killed in between."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow import MlflowClient

from tunewright import life, tracking, work
from tunewright import recipe as recipes
from tunewright.errors import StageError, UserError
from tunewright.run import Run, read_json
from tunewright.testing import tiny_data, tiny_model
from tunewright.train import exact, supervised

Begin = Callable[..., Run]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_model(tmp_path_factory.mktemp("tracking") / "model")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Making one takes seconds, so most tests share it. Its folder has a name that a URI would have to escape."""
    folder = tmp_path_factory.mktemp("mlflow") / "a b%20c"
    folder.mkdir()
    return f"sqlite:///{folder / 'mlflow.db'}"


@pytest.fixture
def begin(base: Path, tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> Begin:
    """A run up to `prepare`; keywords are sections of the recipe."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)

    def start(**sections: Any) -> Run:
        given = {
            "name": "t",
            "model": str(base),
            "task": "classification",
            "data": tiny_data(tmp_path / "data", train=24, test=8),
            "train": {"method": "full", "batch_size": 4, "epochs": 2, "save_steps": 4, "learning_rate": 1e-3},
            "evaluate": {"bootstrap": 200, "baselines": ["zero-shot"]},
            "package": {"formats": ["safetensors"]},
        }
        run = life.start(recipes.loads(yaml.safe_dump(given | sections)), tmp_path / "runs", resume=False)
        life.advance(run, until="check")
        work.prepare(run)
        return run

    return start


def client(run: Run) -> Any:
    uri = run.resolved()["tracking"]["uri"]
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def there(run: Run) -> Any:
    return client(run).get_run(read_json(run.tracking_file)["mlflow_run_id"])


def history(run: Run, metric: str) -> list[tuple[int, float]]:
    points = client(run).get_metric_history(read_json(run.tracking_file)["mlflow_run_id"], metric)
    return [(point.step, point.value) for point in points]


def artifacts(run: Run, folder: str = "") -> set[str]:
    listed = client(run).list_artifacts(read_json(run.tracking_file)["mlflow_run_id"], folder)
    return {one.path.rpartition("/")[2] for one in listed}


def logged(run: Run, metric: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[metric]) for entry in run.metrics() if metric in entry]


class Stop(exact.Watch):
    """A SIGTERM in the middle of step 7."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(exact, "Watch", Stop)
    return monkeypatch


# --- what is there ---


def test_all_stages_of_a_run_are_one_run_there(begin: Begin) -> None:
    run = begin()
    for stage in (work.train, work.evaluate, work.package):
        stage(run)
        assert there(run).info.status == "FINISHED"
    experiment = client(run).get_experiment_by_name("tunewright")
    found = client(run).search_runs([experiment.experiment_id], f"tags.`tunewright.run` = '{run.id}'")
    assert len(found) == 1
    assert found[0].info.run_name == run.id
    entries = [entry for entry in run.resources() if entry["kind"] == "mlflow-run"]
    assert [entry["is"] for entry in entries] == ["made"]
    assert entries[0]["mlflow_run_id"] == found[0].info.run_id

    params, tags, metrics = found[0].data.params, found[0].data.tags, found[0].data.metrics
    assert params["train.method"] == "full"
    assert params["train.learning_rate"] == "0.001"
    assert params["train.lora.r"] == "16"
    assert params["base_model"] == run.resolved()["model"]["source"]
    assert params["task"] == "classification"

    for metric in ("loss", "grad_norm", "learning_rate"):
        assert history(run, metric) == logged(run, metric)
        assert len(history(run, metric)) == 12

    for split in ("train", "test"):
        assert tags[f"data.{split}.sha256"] == run.manifest("prepare")["splits"][split]["sha256"]
    report = run.manifest("evaluate")
    assert tags["verdict"] == report["comparison"]["verdict"]
    assert metrics["test_tuned_accuracy"] == report["models"]["tuned"]["accuracy"]
    assert metrics["test_base_f1_macro"] == report["models"]["base"]["f1_macro"]
    assert metrics["test_p_value"] == report["comparison"]["p_value"]
    assert metrics["train_seconds"] == run.manifest("train")["seconds"]

    assert artifacts(run, "checkpoints") == {"checkpoint-4", "checkpoint-8", "checkpoint-12"}
    assert artifacts(run, "checkpoints/checkpoint-4") == {"config.json", "model.safetensors"}
    assert artifacts(run, "report") == {"report.html", "report.json"}
    assert artifacts(run, "package") == {"manifest.json"}


def test_checkpoints_stay_here_where_the_recipe_says_so(begin: Begin) -> None:
    run = begin(tracking={"checkpoints": False})
    work.train(run)
    assert artifacts(run) == set()
    assert len(history(run, "loss")) == 12


def test_tracking_off_does_nothing(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody is there, and nobody is asked
    run = begin(tracking={"enabled": False}, package={"formats": ["safetensors", "mlflow"]})
    for stage in (work.train, work.evaluate, work.package):
        stage(run)
    assert not run.tracking_file.exists()
    assert run.resources() == []
    assert run.manifest("package")["mlflow"] is None
    assert tracking.end(run) is False
    assert tracking.versions_of(run, "t") == []


# --- after something went wrong ---


def test_a_resumed_run_has_every_step_once(begin: Begin, stopping: pytest.MonkeyPatch) -> None:
    run = begin()
    with pytest.raises(InterruptedError):
        work.train(run)
    assert there(run).info.status == "KILLED"
    first = read_json(run.tracking_file)
    stopping.undo()
    stopping.setenv("MLFLOW_TRACKING_URI", run.resolved()["tracking"]["uri"])
    work.train(run)
    assert read_json(run.tracking_file) == first
    for metric in ("loss", "grad_norm"):
        assert history(run, metric) == logged(run, metric)
    assert artifacts(run, "checkpoints") == {"checkpoint-4", "checkpoint-7", "checkpoint-8", "checkpoint-12"}
    assert there(run).info.status == "FINISHED"


def test_steps_behind_the_last_checkpoint_are_not_sent_twice(begin: Begin, tmp_path: Path) -> None:
    """A killed process had sent steps that the next one goes through again."""
    train = {"method": "full", "batch_size": 4, "epochs": 2, "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}
    run = begin(train=train, data=tiny_data(tmp_path / "data") | {"validation": str(tmp_path / "data" / "test.jsonl")})
    work.train(run)
    once = {metric: history(run, metric) for metric in ("loss", "eval_loss")}
    run.manifest_file("train").unlink()
    for checkpoint in sorted(run.checkpoints.iterdir())[1:]:
        (checkpoint / "complete.json").unlink()
    with tracking.attach(run) as tracker:
        supervised.fit(run, tracker)
    assert {metric: history(run, metric) for metric in once} == once
    assert [step for step, _ in once["eval_loss"]] == sorted(
        {*range(5, once["loss"][-1][0] + 1, 5), once["loss"][-1][0]}
    )


def test_a_failed_stage_is_failed_there(begin: Begin) -> None:
    run = begin(train={"method": "full", "learning_rate": 1e30, "batch_size": 4})
    with pytest.raises(StageError, match="at step"):
        work.train(run)
    assert there(run).info.status == "FAILED"
    assert history(run, "loss") == logged(run, "loss")


def test_a_killed_run_is_ended_once(begin: Begin) -> None:
    run = begin()
    with tracking.attach(run):
        pass
    client(run).update_run(read_json(run.tracking_file)["mlflow_run_id"], status="RUNNING")
    assert tracking.end(run) is True
    assert there(run).info.status == "KILLED"
    assert tracking.end(run) is False


def test_a_run_that_somebody_deleted_there_is_made_again(begin: Begin) -> None:
    run = begin()
    with tracking.attach(run):
        pass
    first = read_json(run.tracking_file)["mlflow_run_id"]
    client(run).delete_run(first)
    assert tracking.end(run) is False
    with tracking.attach(run) as tracker:
        tracker.metrics({"loss": 1.0}, step=1)
    assert read_json(run.tracking_file)["mlflow_run_id"] != first
    assert history(run, "loss") == [(1, 1.0)]


def test_a_kill_between_making_and_writing_down_makes_no_second_one(begin: Begin) -> None:
    run = begin()
    with tracking.attach(run):
        pass
    first = read_json(run.tracking_file)
    run.tracking_file.unlink()
    with tracking.attach(run):
        pass
    assert read_json(run.tracking_file) == first


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "foo://bar", "postgresql://nobody@127.0.0.1:9/x"])
def test_a_server_that_cannot_be_used_is_said_in_seconds(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    run = begin()
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"^MLflow at {uri} cannot be used: .*tracking.enabled: false$"):
        work.train(run)
    assert time.monotonic() - began < 10
    assert not run.tracking_file.exists()
    assert not (run.path / "train" / "manifest.json").exists()


def test_a_server_that_does_not_answer_is_given_up(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tracking.HASTE, "MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        run = begin()
        with pytest.raises(UserError, match="cannot be used"), tracking.attach(run):
            pass
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ, "later calls have MLflow's own patience"


def test_a_stages_own_error_is_not_hidden_by_a_server_that_went_away(begin: Begin) -> None:
    run = begin()

    def fail() -> None:
        with tracking.attach(run) as tracker:
            tracker.metrics({"loss": 1.0})
            tracker.client = MlflowClient(tracking_uri="http://127.0.0.1:9")
            raise StageError("the stage's own")

    with pytest.raises(StageError, match="the stage's own"):
        fail()


# --- the registry ---


def test_a_version_is_removed_and_removed_again(begin: Begin) -> None:
    run = begin()
    with tracking.attach(run):
        pass
    registry, run_id = client(run), read_json(run.tracking_file)["mlflow_run_id"]
    registry.create_registered_model("t")
    for _ in range(2):
        registry.create_model_version("t", "file:///nowhere", run_id=run_id)
    registry.create_model_version("t", "file:///nowhere", run_id=None)
    assert sorted(tracking.versions_of(run, "t")) == ["1", "2"]
    tracking.unregister(run, "t", "1")
    tracking.unregister(run, "t", "1")
    assert tracking.versions_of(run, "t") == ["2"]
    tracking.unregister(run, "t", "2")
    assert [str(one.version) for one in registry.search_model_versions("name='t'")] == ["3"], "another run's stays"
    tracking.unregister(run, "t", "3")
    assert registry.search_registered_models("name='t'") == []
    tracking.unregister(run, "t", "3")


# --- where it is ---


def test_the_address_is_the_recipes_else_the_environments_else_a_file_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracking.settle("http://a", tmp_path, {"MLFLOW_TRACKING_URI": "http://b"}) == "http://a"
    assert tracking.settle(None, tmp_path, {"MLFLOW_TRACKING_URI": "http://b"}) == "http://b"
    assert tracking.settle(None, tmp_path, {}) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    assert tracking.settle(None, Path("runs"), {}) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert tracking.settle("sqlite:///here.db", Path("runs"), {}) == f"sqlite:///{tmp_path}/here.db"


def test_artifacts_of_a_database_file_lie_beside_it(begin: Begin, database: str) -> None:
    run = begin()
    with tracking.attach(run) as tracker:
        tracker.artifact(run.recipe_file, "given")
    place = Path(database.removeprefix("sqlite:///")).parent / "mlartifacts"
    assert [path.read_text() for path in place.rglob("recipe.yaml")] == [run.recipe_file.read_text()]
