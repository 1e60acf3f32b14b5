"""A whole life in a workspace, what it makes there, what faults do to it, and that nothing is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from workspace import MAKES, ME, TOKEN, Workspace, running

from clusters import cluster, stop
from tunewright import api, destroy, life, work
from tunewright import recipe as recipes
from tunewright.backends import base
from tunewright.backends.base import Job
from tunewright.backends.databricks import DatabricksBackend
from tunewright.errors import EndpointError, RecipeError, StageError, UserError
from tunewright.run import Run, list_runs, write_json
from tunewright.testing import tiny_data, tiny_model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("databricks")
    tiny_model(folder / "model")
    tiny_data(folder / "data")
    return folder


@pytest.fixture
def workspace(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    with running(tmp_path / "workspace", registry=f"sqlite:///{tmp_path / 'mlflow.db'}") as made:
        monkeypatch.setenv("DATABRICKS_HOST", made.host)
        monkeypatch.setenv("DATABRICKS_TOKEN", TOKEN)
        yield made


def recipe(home: Path, tmp_path: Path, table: dict[str, Any] | None = None, **sections: Any) -> Any:
    given = {
        "name": "lab",
        "model": str(home / "model"),
        "task": "classification",
        "data": {split: str(home / "data" / f"{split}.jsonl") for split in ("train", "test")},
        "train": {"method": "lora", "max_steps": 6, "save_steps": 2, "save_strategy": "steps"},
        "evaluate": {"bootstrap": 200},
        "deploy": {"test_rows": 6, "content_filter": "off"},
        "tracking": {"uri": f"sqlite:///{tmp_path / 'mlflow.db'}"},
        "backend": {"kind": "databricks", "volume": "main.default.files", "poll_s": 0.2, **(table or {})},
    }
    return recipes.loads(yaml.safe_dump(given | sections))


def begun(home: Path, tmp_path: Path, table: dict[str, Any] | None = None, **sections: Any) -> Run:
    return life.start(recipe(home, tmp_path, table, **sections), tmp_path / "runs", resume=False)


def test_the_whole_life_and_nothing_is_left(workspace: Workspace, home: Path, tmp_path: Path) -> None:
    run = begun(home, tmp_path)
    life.advance(run)
    assert run.status("test") == "done"
    tested = run.manifest("test")
    assert (tested["rows"], tested["compared"], tested["differ"]) == (6, 6, [])
    assert run.manifest("evaluate")["rows"] == 20
    assert (run.trained("lora") / "adapter_model.safetensors").is_file()
    assert not run.checkpoints.exists()  # they stay on the volume
    (cluster,) = workspace.clusters.values()
    assert cluster["spark_version"] == "18.0.x-cpu-ml-scala2.13"
    assert (cluster["num_workers"], cluster["autotermination_minutes"]) == (0, 20)
    assert (cluster["data_security_mode"], cluster["single_user_name"]) == ("SINGLE_USER", ME)
    assert cluster["custom_tags"] == {"ResourceClass": "SingleNode", "tunewright": "1", "tunewright-run": run.id}
    assert [call for call in workspace.calls if call.endswith("clusters/create")] == ["POST /api/2.1/clusters/create"]
    assert len(workspace.runs) == 4
    backend = base.backend(run.recipe())
    assert {one.kind for one in destroy.standing(run, backend)} >= {
        "databricks-cluster",
        "databricks-endpoint",
        "databricks-folder",
    }
    destroy.destroy(run, backend)
    assert workspace.standing() == []
    destroy.destroy(run, backend)
    assert all(one["is"] == "gone" for one in run.resources())
    for path in run.path.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path


CALLS = ("POST .*submit", "GET .*runs/get", "PUT .*recipe.yaml", "POST .*clusters/create")
QUICK = (("POST .*submit", "cut"), ("POST .*clusters/create", "429"))


@pytest.mark.parametrize(
    ("call", "how"),
    [
        pytest.param(call, how, marks=() if (call, how) in QUICK else pytest.mark.slow)
        for call in CALLS
        for how in ("429", "500", "cut")
    ],
)
def test_a_call_that_fails_now_and_then_is_asked_again(
    workspace: Workspace, home: Path, tmp_path: Path, call: str, how: str, prepared: Path
) -> None:
    workspace.replay = prepared
    run = begun(home, tmp_path)
    life.advance(run, until="plan")
    workspace.fault(call, how, times=1)
    try:
        life.advance(run, until="prepare")
    except (StageError, UserError):  # what the SDK does not repeat by itself: the same command again
        life.advance(run, until="prepare")
    assert run.status("prepare") == "done"
    destroy.destroy(run, base.backend(run.recipe()))
    assert workspace.standing() == []


@pytest.fixture(scope="module")
def prepared(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stage `prepare` leaves: made once, on this machine."""
    folder = tmp_path_factory.mktemp("prepared")
    run = begun(home, folder, backend={"kind": "local", "threads": 1})
    life.advance(run, until="plan")
    work.prepare(run)
    shutil.copytree(run.path / "data", folder / "by-stage" / "prepare" / "data")
    return folder / "by-stage"


@pytest.fixture(scope="module")
def results(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each stage leaves, by stage: made once, on this machine."""
    folder = tmp_path_factory.mktemp("results")
    run = begun(home, folder, {}, backend={"kind": "local", "threads": 1})
    life.advance(run, until="package")
    for stage, names in (("prepare", "data"), ("train", "train"), ("evaluate", "evaluate"), ("package", "package")):
        shutil.copytree(run.path / names, folder / "by-stage" / stage / names)
    return folder / "by-stage"


@pytest.mark.slow
def test_a_cluster_that_dies_is_named_with_its_reason_and_the_run_goes_on(
    workspace: Workspace, home: Path, tmp_path: Path
) -> None:
    run = begun(home, tmp_path, tracking={"enabled": False})
    life.advance(run, until="prepare")
    first = {*workspace.clusters}
    workspace.before_job = lambda job: workspace.lose_cluster()
    with pytest.raises(StageError, match=r"SPOT_INSTANCE_TERMINATION.*goes on from the last checkpoint"):
        life.advance(run, until="train")
    workspace.before_job = lambda job: None
    workspace.clusters.clear()  # a terminated one is forgotten after 30 days
    life.advance(run, until="train")
    assert run.manifest("train")["steps"] == 6
    assert first.isdisjoint(workspace.clusters)
    destroy.destroy(run, base.backend(run.recipe()))
    assert workspace.standing() == []


def test_a_stage_that_fails_over_there_says_here_why(workspace: Workspace, home: Path, tmp_path: Path) -> None:
    run = begun(home, tmp_path, tracking={"enabled": False})
    life.advance(run, until="plan")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a", "label": "good"}\n{broken\n')
    given = yaml.safe_load(run.recipe_file.read_text())
    given["data"]["train"] = [str(broken)]
    run.recipe_file.write_text(yaml.safe_dump(given))
    with pytest.raises(UserError, match=r"broken\.jsonl:2: broken JSON"):
        life.advance(run, until="prepare")
    destroy.destroy(run, base.backend(run.recipe()))


def test_a_job_that_is_forgotten_is_handed_over_again(
    workspace: Workspace, home: Path, tmp_path: Path, prepared: Path
) -> None:
    run = begun(home, tmp_path)
    life.advance(run, until="plan")
    backend = DatabricksBackend(run.recipe().backend.model_extra or {})
    workspace.before_job = lambda job: job.ended.wait(5)
    job = backend.submit("prepare", run)
    assert backend.submit("prepare", run) == job
    for known in workspace.runs.values():
        known.ended.set()
    workspace.runs.clear()
    workspace.tokens.clear()
    assert backend.poll(job, run).state == "lost"
    assert backend.poll(Job("prepare", "999"), run).state == "lost"
    workspace.before_job = lambda job: None
    workspace.replay = prepared
    life.advance(run, until="prepare")
    assert run.status("prepare") == "done"
    destroy.destroy(run, base.backend(run.recipe()))
    assert workspace.standing() == []


def test_a_quota_that_is_used_up_is_said_with_what_to_do(workspace: Workspace, home: Path, tmp_path: Path) -> None:
    """Azure says so when the cluster is to start, which the job waits for."""
    run = begun(home, tmp_path)
    life.advance(run, until="plan")
    workspace.before_job = lambda job: workspace.lose_cluster("AZURE_QUOTA_EXCEEDED_EXCEPTION")
    with pytest.raises(StageError, match="AZURE_QUOTA_EXCEEDED_EXCEPTION: ask for more cores"):
        life.advance(run, until="prepare")
    destroy.destroy(run, base.backend(run.recipe()))
    assert workspace.standing() == []


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"volume": "main.default.nowhere"}, "there is no main.default.nowhere"),
        ({"node_type": "Standard_X1"}, "no Standard_X1"),
        ({"spark_version": "9.9.x"}, "no 9.9.x"),
        ({"policy": "Nobody's"}, 'no policy "Nobody\'s"'),
        ({"cluster": "mine"}, "no cluster 'mine'"),
        ({"processes": 99}, "99 share out a step's rows"),
    ],
)
def test_check_finds_what_would_fail_and_makes_nothing(
    workspace: Workspace, home: Path, tmp_path: Path, table: dict[str, Any], said: str
) -> None:
    asked = recipe(home, tmp_path, table)
    problems = base.backend(asked).check(asked, ("prepare", "train", "deploy"))
    assert [said in problem.message for problem in problems] == [True]
    assert not [call for call in workspace.calls if MAKES.match(call)]


def test_a_workspace_without_ml_runtimes_or_sign_in_is_explained(
    workspace: Workspace, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(home, tmp_path)
    workspace.runtimes = ("16.4.x-scala2.13",)
    (problem,) = base.backend(asked).check(asked, ("train",))
    assert "no ML runtime for CPUs" in problem.message
    monkeypatch.setenv("DATABRICKS_TOKEN", "dapi-another")
    (problem,) = base.backend(asked).check(asked, ("train",))
    assert "not signed in" in problem.message
    assert "dapi-another" not in problem.message


def test_a_volume_is_made_on_request_and_removed_again(
    workspace: Workspace, home: Path, tmp_path: Path, prepared: Path
) -> None:
    workspace.replay = prepared
    run = begun(home, tmp_path, {"volume": "main.default.fresh", "create_volume": True})
    life.advance(run, until="prepare")
    assert "main.default.fresh" in workspace.volumes
    destroy.destroy(run, base.backend(run.recipe()))
    assert workspace.standing() == []


def test_a_volume_that_others_use_meanwhile_is_left(
    workspace: Workspace, home: Path, tmp_path: Path, prepared: Path
) -> None:
    workspace.replay = prepared
    run = begun(home, tmp_path, {"volume": "main.default.fresh", "create_volume": True})
    life.advance(run, until="prepare")
    (workspace.root / "main/default/fresh/theirs.csv").write_text("a,b\n")
    other = begun(home, tmp_path, {"volume": "main.default.fresh", "create_volume": True}, name="other")
    life.advance(other, until="prepare")
    destroy.destroy(other, base.backend(other.recipe()))
    assert (workspace.root / "main/default/fresh/tunewright" / run.id).is_dir()
    removed = destroy.destroy(run, base.backend(run.recipe()))
    assert [one.what for one in removed if one.kind == "databricks-volume"] == [
        "left, because it holds what is not of this run"
    ]
    assert workspace.standing() == ["file main/default/fresh/theirs.csv", "volume main.default.fresh"]


def test_files_of_one_name_stay_two_and_all_that_a_run_reads_is_sent(
    workspace: Workspace, home: Path, tmp_path: Path, prepared: Path
) -> None:
    """Two days' files of one name and one size, a base in a folder and an adapter."""
    workspace.replay = prepared
    rows = {day: json.dumps({"text": f"on {day}", "label": "good"}) + "\n" for day in ("monday", "sunday")}
    for day, row in rows.items():
        (tmp_path / day).mkdir()
        (tmp_path / day / "rows.jsonl").write_text(row.ljust(60) + "\n")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_text("{}")
    asked = recipe(home, tmp_path, data={"train": str(tmp_path / "*" / "rows.jsonl")})
    asked = asked.model_copy(update={"train": asked.train.model_copy(update={"adapter": str(adapter)})})
    (tmp_path / "list.jsonl").write_text('{"sha256": "a"}\n')
    earlier = prepared / "earlier-1"
    for name in ("state.json", "recipe.yaml", "data/test.jsonl", "data/checks.json", "evaluate/predictions.parquet"):
        (earlier / name).parent.mkdir(parents=True, exist_ok=True)
        (earlier / name).write_text('{"format": 1}')
    asked = asked.model_copy(
        update={
            "data": asked.data.model_copy(update={"without": str(tmp_path / "list.jsonl")}),
            "evaluate": asked.evaluate.model_copy(update={"against": str(earlier)}),
        }
    )
    run = begun(home, tmp_path)
    life.advance(run, until="plan")
    run.recipe_file.write_text(recipes.dump(asked))
    DatabricksBackend(asked.backend.model_extra or {}).submit("prepare", run)
    there = workspace.root / "main/default/files/tunewright" / run.id
    sent = recipes.loads((there / "recipe.yaml").read_text())

    def local(place: str) -> Path:
        return workspace.root / place.removeprefix("/Volumes/")

    assert sorted(local(place).read_text().rstrip() for place in sent.data.train) == sorted(
        row.rstrip() for row in rows.values()
    )
    assert (local(str(sent.train.adapter)) / "adapter_model.safetensors").is_file()
    assert str(sent.data.without).startswith("/Volumes/")
    assert str(sent.evaluate.against).startswith("/Volumes/")
    assert local(str(sent.data.without)).read_text() == '{"sha256": "a"}\n'
    assert Path(str(sent.evaluate.against)).name == "earlier-1"
    assert (local(str(sent.evaluate.against)) / "evaluate/predictions.parquet").is_file()
    base_there = local(json.loads((there / "resolved.json").read_text())["model"]["source"])
    assert (base_there / "model.safetensors").read_bytes() == (home / "model" / "model.safetensors").read_bytes()
    before = [call for call in workspace.calls if call.startswith("PUT /api/2.0/fs/files") and "/inputs/" in call]
    workspace.runs.clear()
    workspace.tokens.clear()
    DatabricksBackend(asked.backend.model_extra or {}).submit("prepare", run)
    after = [call for call in workspace.calls if call.startswith("PUT /api/2.0/fs/files") and "/inputs/" in call]
    assert len(before) == len(set(before)) >= 6
    assert after == before  # nothing goes twice
    destroy.destroy(run, base.backend(run.recipe()))


def test_a_stage_that_is_done_again_begins_afresh_over_there(
    workspace: Workspace, home: Path, tmp_path: Path, prepared: Path
) -> None:
    workspace.replay = prepared
    run = begun(home, tmp_path)
    life.advance(run, until="prepare")
    there = workspace.root / "main/default/files/tunewright" / run.id
    for name in ("train/checkpoints/checkpoint-6/state.json", "train/manifest.json", "jobs/ranks/rank-0.json"):
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_text("{}")
    api.open(run.path).forget("train")
    assert sorted(one.name for one in there.iterdir() if one.is_dir() and any(one.iterdir())) == ["data", "inputs"]
    assert run.status("prepare") == "done"
    destroy.destroy(run, base.backend(run.recipe()))
    assert workspace.standing() == []


def test_what_another_made_under_our_name_is_neither_used_nor_removed(
    workspace: Workspace, home: Path, tmp_path: Path
) -> None:
    run = begun(home, tmp_path)
    life.advance(run, until="plan")
    backend = DatabricksBackend(run.recipe().backend.model_extra or {})
    name = f"tunewright-{run.id}"
    workspace.endpoints[name] = {"name": name, "tags": [], "creation_timestamp": 0}
    write_json(run.manifest_file("package"), {"mlflow": "models:/main.default.lab/1"})
    with pytest.raises(EndpointError, match="not of this run"):
        backend.deploy(run)
    assert not backend.serving(run)
    backend.undeploy(run)
    destroy.destroy(run, backend)
    assert list(workspace.endpoints) == [name]


def test_an_endpoints_name_is_short_enough_and_its_own() -> None:
    backend = DatabricksBackend({"volume": "a.b.c"})
    one, other = (backend._endpoint_name(SimpleNamespace(id="a" * 60 + end)) for end in ("-1", "-2"))  # type: ignore[arg-type]
    assert len(one) <= 63
    assert one != other


@pytest.mark.parametrize("cluster", [None, "theirs"])
def test_threads_are_set_on_a_cluster_of_our_own_alone(
    workspace: Workspace, home: Path, tmp_path: Path, prepared: Path, cluster: str | None
) -> None:
    workspace.replay = prepared
    workspace.clusters["1"] = {"cluster_id": "1", "cluster_name": "theirs", "state": "RUNNING"}
    table = {"threads": 3} | ({"cluster": cluster} if cluster else {})
    asked = recipe(home, tmp_path, table)
    problems = base.backend(asked).check(asked, ("prepare",))
    assert ["backend.threads" in one.message for one in problems] == [True] * bool(cluster)
    if not cluster:
        run = begun(home, tmp_path, table)
        life.advance(run, until="prepare")
        made = next(one for one in workspace.clusters.values() if one["cluster_name"] != "theirs")
        assert made["spark_env_vars"] == {"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "3"}
        destroy.destroy(run, base.backend(run.recipe()))
    assert [one["cluster_name"] for one in workspace.clusters.values()] == ["theirs"]


def test_an_unknown_setting_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match=r"backend\.gpu: unknown key"):
        DatabricksBackend({"volume": "a.b.c", "gpu": True})


def makes(calls: list[str]) -> list[str]:
    """The kinds of calls that make something, once each, in their order; a submitted stage is a kind of its own."""
    kinds: dict[str, None] = {}
    submitted = 0
    for call in calls:
        if MAKES.match(call):
            kind = "PUT file" if call.startswith("PUT /api/2.0/fs/files") else call.partition("/Volumes")[0]
            submitted += kind.endswith("submit")
            kinds[f"{kind} {submitted}" if kind.endswith("submit") else kind] = None
    return list(kinds)


@pytest.mark.slow
def test_on_a_cluster_of_several_nodes_the_stages_are_spark_jobs(
    workspace: Workspace, home: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two nodes, two processes that train together: the jobs run on a real cluster, with the wheel that was sent."""
    folder = tmp_path_factory.mktemp("cluster")
    conf = tmp_path / "conf"
    conf.mkdir()
    master = cluster(folder)
    try:

        def installed(job: Any) -> None:
            """The wheel, on every node, as the workspace installs a job's libraries."""
            site = workspace.scratch / job.body["tasks"][0]["existing_cluster_id"] / "site-packages"
            lines = [f"spark.master {master}", f"spark.executorEnv.PYTHONPATH {site}", "spark.driver.host 127.0.0.1"]
            (conf / "spark-defaults.conf").write_text("\n".join(lines))

        workspace.before_job = installed
        workspace.environment = {"SPARK_CONF_DIR": str(conf), "PYSPARK_PYTHON": sys.executable}
        table = {"workers": 2, "processes": 2}
        run = begun(home, tmp_path, table, tracking={"enabled": False})
        life.advance(run, until="evaluate")
        parameters = [job.body["tasks"][0]["python_wheel_task"]["parameters"] for job in workspace.runs.values()]
        assert [one[2:] for one in parameters] == [["--on", "spark"]] * 3
        (made,) = workspace.clusters.values()
        assert (made["num_workers"], made.get("spark_conf", {})) == (2, {})
        assert run.manifest("evaluate")["rows"] == 20
        home_there = workspace.root / "main/default/files/tunewright" / run.id
        ranks = [json.loads(path.read_text()) for path in (home_there / "jobs" / "ranks").glob("rank-?.json")]
        assert sorted((one["rank"], one["world"], one["phase"]) for one in ranks) == [(0, 2, "done"), (1, 2, "done")]
        destroy.destroy(run, base.backend(run.recipe()))
        assert workspace.standing() == []
    finally:
        stop(folder)


@pytest.mark.slow
def test_killed_at_any_call_that_makes_something_nothing_is_left_after_destroy(
    workspace: Workspace, home: Path, tmp_path: Path, results: Path
) -> None:
    """The calls are those of a clean run, so one that is added cannot be forgotten."""
    workspace.replay = results
    table = {"volume": "main.default.fresh", "create_volume": True}
    clean = begun(home, tmp_path, table)
    life.advance(clean, until="plan")
    life.advance(clean, until="deploy")
    kinds = makes(workspace.calls)
    destroy.destroy(clean, base.backend(clean.recipe()))
    assert workspace.standing() == []
    assert len(kinds) >= 8, kinds
    killed = []
    for kind in kinds:
        run = begun(home, tmp_path, table)
        life.advance(run, until="plan")
        words = [sys.executable, "-m", "tunewright.cli", "run", str(run.path), "--until", "deploy", "--yes"]
        done = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = len(workspace.calls)
        name, _, place = kind.partition(" ")
        route, _, number = place.rpartition(" ") if kind.rpartition(" ")[2].isdigit() else (place, "", "1")
        call = "PUT /api/2.0/fs/files" if kind == "PUT file" else f"{name} {route}"
        seen = [one for one in workspace.calls[before:] if one.startswith(call)]
        workspace.faults = [_AtNumber(call, int(number) - len(seen), done.pid)]
        assert done.wait(180) == -signal.SIGKILL, kind
        killed.append(kind)
        workspace.faults = []
        time.sleep(0.2)
        destroy.destroy(run, base.backend(run.recipe()))
        assert workspace.standing() == [], kind
    assert killed == kinds


class _AtNumber:
    """A fault that kills at the n-th call of a kind."""

    def __init__(self, call: str, number: int, pid: int) -> None:
        self.call, self.left, self.pid, self.how = "^" + call.replace(".", r"\."), number, pid, "none"
        self.fired = False

    @property
    def times(self) -> int:
        return 0 if self.fired else 1

    @times.setter
    def times(self, _: int) -> None:
        self.left -= 1
        self.fired = self.left == 0
        self.how = "kill" if self.fired else "none"


def test_what_costs_money_is_asked_once_and_scripts_say_yes(
    workspace: Workspace, home: Path, tmp_path: Path, prepared: Path
) -> None:
    workspace.replay = prepared
    (tmp_path / "recipe.yaml").write_text(recipes.dump(recipe(home, tmp_path)))
    words = [sys.executable, "-m", "tunewright.cli", "prepare", "recipe.yaml"]
    wide = os.environ | {"COLUMNS": "200"}

    def said(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*words, *more],
            cwd=tmp_path,
            env=wide,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    refused = said()
    assert refused.returncode == 2
    assert "add --yes" in refused.stderr
    assert "cluster of 1 Standard_D4ds_v5, ends after 20 idle minutes" in refused.stderr
    assert "USD an hour" in refused.stderr
    assert not [call for call in workspace.calls if MAKES.match(call)]
    assert said("--yes").returncode == 0
    assert said().returncode == 0  # it was agreed to
    (run,) = list_runs(tmp_path / "runs")
    destroy.destroy(run, base.backend(run.recipe()))
    assert workspace.standing() == []


def test_the_command_line_destroys_what_it_made(
    workspace: Workspace, home: Path, tmp_path: Path, prepared: Path
) -> None:
    workspace.replay = prepared
    run = begun(home, tmp_path)
    life.advance(run, until="prepare")
    words = [sys.executable, "-m", "tunewright.cli", "destroy", str(run.path), "--json"]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert {one["kind"] for one in json.loads(said)} >= {"databricks-cluster", "databricks-folder"}
    assert workspace.standing() == []
