"""A recipe of this machine at an API: the same life, the same report, a bill before and nothing left after."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import psutil
import pytest
import yaml
from between import MAKES, Between
from openai.types import Model

from live_server import MODEL, Live
from tunewright import destroy, life, plan, prices, standing
from tunewright import recipe as recipes
from tunewright.backends import base, hosted
from tunewright.errors import StageError, TunewrightError, UserError
from tunewright.hosted import azure
from tunewright.hosted.azure import AzurePlace
from tunewright.hosted.settings import AzureSettings
from tunewright.recipe import backend_settings
from tunewright.run import Run

TABLES: dict[str, dict[str, Any]] = {
    "openai": {"kind": "openai"},
    "azure": {
        "kind": "azure",
        "subscription": "00000000-0000-0000-0000-000000000000",
        "resource_group": "ours",
        "account": "tw-made",
        "create_account": True,
        "regions": ["northcentralus"],
        "auth": "key",
        "management_token_variable": "MANAGEMENT_TOKEN",
        "base_sku": "Standard",
    },
}


def recipe(home: Path, url: str, kind: str, table: dict[str, Any] | None = None, **sections: Any) -> Any:
    where = {"base_url": f"{url}/v1"} if kind == "openai" else {"management": url}
    given = {
        "name": "hosted",
        "model": MODEL,
        "task": "classification",
        "data": {split: str(home / "data" / f"{split}.jsonl") for split in ("train", "test")},
        "train": {"epochs": 2, "max_length": 512},
        "evaluate": {"bootstrap": 200, "baselines": ["tfidf"]},
        "deploy": {"test_rows": 4, "content_filter": "off"},
        "tracking": {"enabled": False},
        "backend": {**TABLES[kind], **where, "tokenizer": str(home / "tokenizer"), "poll_s": 0.3, **(table or {})},
    }
    return recipes.loads(yaml.safe_dump(given | sections))


def begun(home: Path, tmp_path: Path, url: str, kind: str, table: dict[str, Any] | None = None, **more: Any) -> Run:
    return life.start(recipe(home, url, kind, table, **more), tmp_path / "runs", resume=False)


def left(live: Live, run: Run) -> list[str]:
    """What a run's owner would find at the endpoint, or be billed for."""
    with openai.OpenAI(**live.client()) as client:
        jobs = [job for job in client.fine_tuning.jobs.list() if (job.metadata or {}).get("tunewright-run") == run.id]
        results = {one for job in jobs for one in job.result_files}
        tuned = {job.fine_tuned_model for job in jobs}
        found = [
            *(one.filename for one in client.files.list() if run.id in one.filename or one.id in results),
            *(job.status for job in jobs if job.status not in ("succeeded", "failed", "cancelled")),
            *(one.id for one in client.models.list() if one.id in tuned),
        ]
    table = {key: value for key, value in TABLES["azure"].items() if key != "kind"}
    arm = AzurePlace(AzureSettings(**table, management=live.url))
    accounts = [*arm.arm.accounts.list(**arm.plain), *arm.arm.deleted_accounts.list(**arm.plain)]
    return [*found, *(f"account {one.name}" for one in accounts if one.name != "local")]


@pytest.fixture(scope="session")
def here(hosted_home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of the same recipe on this machine."""
    given = recipe(hosted_home, "", "openai").model_dump(mode="json", exclude_unset=True)
    given |= {"model": str(hosted_home / "tokenizer"), "backend": {"kind": "local", "threads": 1}}
    run = life.start(recipes.loads(yaml.safe_dump(given)), tmp_path_factory.mktemp("here") / "runs", resume=False)
    life.advance(run, until="evaluate")
    return run.manifest("evaluate")


def shape(report: Any) -> Any:
    """The keys of a report, down to its numbers."""
    if isinstance(report, dict):
        return {key: shape(value) for key, value in report.items() if key not in ("models", "intervals", "counts")}
    return "rows" if isinstance(report, list) else "value"


@pytest.mark.parametrize("kind", [pytest.param("openai", marks=pytest.mark.slow), "azure"])
def test_the_whole_life_and_nothing_is_left(
    live: Live,
    proxy: Between,
    hosted_home: Path,
    tmp_path: Path,
    kind: str,
    here: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kind == "azure":
        monkeypatch.delenv("AZURE_OPENAI_API_KEY")  # the control plane is asked for the account's
    run = begun(hosted_home, tmp_path, proxy.url, kind)
    life.advance(run)
    trained = run.manifest("train")
    planned = run.manifest("plan")["tokens"]["train"]
    assert trained["tokens"] == pytest.approx(planned, rel=0.15)
    assert [entry for entry in run.metrics() if "loss" in entry]
    report = run.manifest("evaluate")
    assert (report["rows"], report["training"]["method"]) == (20, "hosted")
    assert set(report["models"]) == set(here["models"]) == {"tuned", "base", "tfidf"}
    assert set(report["models"]["tuned"]) <= set(here["models"]["tuned"])
    assert shape(report) == shape(here)
    tested = run.manifest("test")
    assert (tested["rows"], tested["compared"]) == (4, 4)
    backend = base.backend(run.recipe())
    kinds = {one.kind for one in destroy.standing(run, backend)}
    assert kinds >= {"hosted-file", "hosted-model"}
    found = {one.name: one for one in standing.find([run], prices.read()).standing}
    if kind == "azure":
        assert kinds >= {"azure-account", "azure-deployment"}
        assert found[f"tw-tuned-{run.id}"].dollars_an_hour == (1.5, 2)
        assert found[f"tw-base-{run.id}"].dollars_an_hour == (0, 0)
        assert run.manifest("deploy")["model"] == f"tw-tuned-{run.id}"
    destroy.destroy(run, backend)
    assert left(live, run) == []
    destroy.destroy(run, backend)
    assert all(one["is"] == "gone" for one in run.resources())


@pytest.mark.parametrize("kind", ["openai", "azure"])
@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"train": {"epochs": 2, "lora": {"r": 8}}}, "train.lora: the API takes no such setting"),
        ({"train": {"epochs": 2, "learning_rate": 1e-4}}, "set backend.learning_rate_multiplier"),
        ({"train": {"epochs": 1.5}}, "whole numbers up to 50"),
        ({"train": {"epochs": 51}}, "whole numbers up to 50"),
        ({"task": "chat", "evaluate": {"metric": "loss"}}, "evaluate.metric: loss is not told by chat completions"),
        ({"revision": "main"}, "knows its bases by name alone"),
        ({"model": "gpt-4.1-micro"}, "has none of that name"),
    ],
)
def test_what_the_api_cannot_do_is_named_and_nothing_is_made(
    live: Live, proxy: Between, hosted_home: Path, tmp_path: Path, kind: str, sections: dict[str, Any], said: str
) -> None:
    asked = recipe(hosted_home, proxy.url, kind, **sections)
    problems = base.backend(asked).check(asked, ("train",))
    assert [said in one.message for one in problems if one.severity == "error"] == [True], problems
    assert proxy.made() == []


def test_rows_that_the_api_would_refuse_are_named_before(
    live: Live, proxy: Between, hosted_home: Path, tmp_path: Path
) -> None:
    data = {"train": str(tmp_path / "few.jsonl"), "test": str(hosted_home / "data" / "test.jsonl")}
    lines = (hosted_home / "data" / "train.jsonl").read_text().splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join(lines[:9]))
    checked = life.check(recipe(hosted_home, proxy.url, "openai", data=data))
    assert [one.message for one in checked.errors] == ["data.train: 9 rows are left, and the API takes 10 or more"]
    long = {"text": "word " * 400, "label": "good"}
    (tmp_path / "few.jsonl").write_text("\n".join([*lines, json.dumps(long)]))
    (error,) = life.check(recipe(hosted_home, proxy.url, "openai", data={**data, "over_length": "error"})).errors
    assert "few.jsonl:61" in error.message
    assert "data.over_length" in error.message
    unknown = recipe(hosted_home, proxy.url, "openai", {"tokenizer": None}, model="something-else")
    assert "nobody here knows what something-else counts tokens by" in life.check(unknown).errors[-1].message


def test_a_retired_base_and_a_missing_entitlement_are_named(
    live: Live, proxy: Between, hosted_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As OpenAI's and Azure's models calls say it."""
    asked = recipe(hosted_home, proxy.url, "openai")
    for more, said in (
        ({"shutdown_date": "2025-04-30"}, "it answers no more since 2025-04-30; choose a newer base"),
        ({"deprecation": {"fine_tune": 1735689600, "inference": 4102444800}}, "takes no more jobs since 2025-01-01"),
        ({"capabilities": {"fine_tune": False}}, "it is not open to fine-tuning here"),
    ):
        (problem,) = hosted._said_of(MODEL, Model(id=MODEL, created=0, object="model", owned_by="o", **more))
        assert said in problem.message
        assert problem.severity == "error"
    proxy.fault("GET /v1/models", "403")
    (problem,) = base.backend(asked).check(asked, ("train",))
    assert "not allowed" in problem.message
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-0123456789")
    (problem,) = base.backend(asked).check(asked, ("train",))
    assert "not signed in" in problem.message
    assert "0123456789" not in problem.message
    monkeypatch.delenv("OPENAI_API_KEY")
    (problem,) = base.backend(asked).check(asked, ("train",))
    assert "OPENAI_API_KEY is not set" in problem.message


def test_too_small_a_quota_and_an_unknown_filter_are_named(live: Live, proxy: Between, hosted_home: Path) -> None:
    asked = recipe(hosted_home, proxy.url, "azure", {"account": "elsewhere", "create_account": False})
    (problem,) = base.backend(asked).check(asked, ("train",))
    assert "has no account elsewhere; make it, or set backend.create_account: true" in problem.message
    asked = recipe(
        hosted_home, proxy.url, "azure", {"content_filter": "strict", "resource_group": "local", "account": "local"}
    )
    (problem,) = base.backend(asked).check(asked, ("train",))
    assert "has no content filter 'strict'" in problem.message
    with azure.explained("looking"):
        place = AzurePlace(backend_settings(AzureSettings, "azure", asked.backend.model_extra or {}))
        usage = SimpleNamespace(name=SimpleNamespace(value="OpenAI.Standard.gpt-4.1-mini"), limit=12, current_value=9)
        place.__dict__["arm"] = SimpleNamespace(usages=SimpleNamespace(list=lambda *_, **__: [usage]))
        assert place.quota_left("anywhere", MODEL) == 3
        with pytest.raises(UserError, match="no region has 10 thousand tokens a minute left"):
            place.region(MODEL)


def test_a_region_says_what_a_base_is_good_for(proxy: Between, hosted_home: Path) -> None:
    """As Azure's models call says it, before there is an account."""
    table = recipe(hosted_home, proxy.url, "azure").backend.model_extra or {}
    place = AzurePlace(backend_settings(AzureSettings, "azure", table))

    def said(**more: Any) -> list[str]:
        model = SimpleNamespace(
            **{"name": "gpt-4.1-mini", "version": "2025-04-14", "capabilities": {}, "deprecation": None, **more}
        )
        listed = SimpleNamespace(list=lambda *_, **__: [SimpleNamespace(model=model)])
        place.__dict__["arm"] = SimpleNamespace(models=listed)
        return place._ends("swedencentral", MODEL)

    assert said() == []
    (retired,) = said(deprecation=SimpleNamespace(inference="2025-04-30T00:00:00Z", fine_tune=None))
    assert "answers no more since 2025-04-30" in retired
    (closed,) = said(deprecation=SimpleNamespace(inference=None, fine_tune="2025-01-01T00:00:00Z"))
    assert "takes no more jobs since 2025-01-01" in closed
    (refused,) = said(capabilities={"fineTune": "false"})
    assert "not open to fine-tuning in swedencentral" in refused
    (absent,) = said(version="2024-01-01")
    assert "swedencentral has none of that name; there are gpt-4.1-mini-2024-01-01" in absent


def test_the_bill_is_the_price_table_times_the_tokens(live: Live, proxy: Between, hosted_home: Path) -> None:
    asked = recipe(hosted_home, proxy.url, "openai")
    planned = plan.estimate(asked, life.resolve(asked, life.check(asked), Path("runs")), base.backend(asked))
    tokens, cost = planned["tokens"], planned["cost"]
    low = tokens["train"] * 5 + tokens["input"] * 1 + tokens["output"] * 3
    assert cost["low"] == round(low / 1e6, 2)
    assert cost["high"] >= cost["low"]
    assert cost["asks"]
    assert "prices of 2026-01-01" in cost["note"]
    assert planned["makes"][:4] == ["run folder", "uploaded files", f"fine-tuning job on {MODEL}", "tuned model"]
    assert tokens["train"] == 2 * tokens["train_per_epoch"]
    other = recipe(hosted_home, proxy.url, "azure", {"sku": "DeveloperTier"})
    note = base.backend(other).bill(other, planned).note  # type: ignore[attr-defined]
    assert "ends after 24 hours" in note


def cli(run: Run, *more: str, **options: Any) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "tunewright.cli", "run", str(run.path), *more]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, **pipes, **options)


def test_money_is_asked_for_and_held_to(live: Live, proxy: Between, hosted_home: Path, tmp_path: Path) -> None:
    run = begun(hosted_home, tmp_path, proxy.url, "openai")
    for words, said in (
        ((), "add --yes"),
        (("--max-cost", "0.000001"), "it may cost"),
    ):
        process = cli(run, "--until", "prepare", *words)
        _, told = process.communicate(timeout=300)
        assert process.returncode == 2
        assert said in told
    assert proxy.made() == []
    process = cli(run, "--until", "prepare", "--max-cost", "5")
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told


FAULTS = [
    ("GET /v1/fine_tuning/jobs/[^/]+$", "401", 2),
    ("GET /v1/fine_tuning/jobs/[^/]+$", "500", 3),
    ("GET /v1/fine_tuning/jobs/[^/]+$", "slow", 1),
    ("GET /v1/fine_tuning/jobs/[^/]+/events", "429", 3),
    ("POST /v1/files$", "503", 2),
    ("POST /v1/files$", "cut", 1),
    ("POST /v1/fine_tuning/jobs$", "500", 2),
    ("POST /v1/fine_tuning/jobs$", "cut", 1),
    ("POST /v1/chat/completions", "429", 5),
    ("POST /v1/chat/completions", "cut", 1),
]


@pytest.mark.slow
def test_faults_in_between_are_lived_through_and_nothing_is_made_twice(
    live: Live, proxy: Between, hosted_home: Path, tmp_path: Path
) -> None:
    run = begun(hosted_home, tmp_path, proxy.url, "openai", {"timeout_s": 10})
    for call, how, times in FAULTS:
        proxy.fault(call, how, times, **({"retry_after": "0"} if how == "429" else {}))
    life.advance(run, until="evaluate")
    assert [fault.times for fault in proxy.faults] == [0] * len(FAULTS)
    assert run.manifest("evaluate")["rows"] == 20
    with openai.OpenAI(**live.client()) as client:
        ours = [one.filename for one in client.files.list() if run.id in one.filename]
        jobs = [one for one in client.fine_tuning.jobs.list() if (one.metadata or {}).get("tunewright-run") == run.id]
    assert len(ours) == len(set(ours)) == 1
    assert len(jobs) == 1
    destroy.destroy(run, base.backend(run.recipe()))
    assert left(live, run) == []


@pytest.mark.slow
def test_a_job_that_is_cancelled_over_there_is_said_and_made_anew(
    live: Live, proxy: Between, hosted_home: Path, tmp_path: Path
) -> None:
    run = begun(hosted_home, tmp_path, proxy.url, "openai")
    life.advance(run, until="prepare")
    backend = base.backend(run.recipe())
    job = backend.submit("train", run)
    known = run.path / "jobs" / "hosted-job.json"
    with openai.OpenAI(**live.client()) as client:
        while not known.is_file():
            assert backend.poll(job, run).state == "running"
            time.sleep(0.1)
        first = json.loads(known.read_text())["id"]
        client.fine_tuning.jobs.cancel(first)
        while (status := backend.poll(job, run)).state == "running":
            time.sleep(0.1)
        assert (status.state, status.kind) == ("failed", "StageError")
        assert f"job {first} was cancelled over there; the same command makes another" in status.message
        life.advance(run, until="train")
        assert run.manifest("train")["job"] != first
        assert len([one for one in client.files.list() if run.id in one.filename]) == 1
    destroy.destroy(run, base.backend(run.recipe()))
    assert left(live, run) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["openai", "azure"])
def test_killed_at_any_call_that_makes_something_nothing_is_left(
    live: Live, proxy: Between, hosted_home: Path, tmp_path: Path, kind: str
) -> None:
    """The calls are those of a clean run, so one that is added cannot be forgotten. The stage's process makes them:
    it is what is killed. The first run that is killed goes on to its end before it is destroyed, the others do not."""
    clean = begun(hosted_home, tmp_path, proxy.url, kind)
    life.advance(clean, until="deploy")
    makes = [re.sub(r"-\d{8}-[0-9a-f]{4}$", "", call) for call in proxy.made()]
    destroy.destroy(clean, base.backend(clean.recipe()))
    assert left(live, clean) == []
    assert len(makes) >= (2 if kind == "openai" else 4), makes
    for number in range(len(makes)):
        run = begun(hosted_home, tmp_path, proxy.url, kind)
        life.advance(run, until="prepare")
        proxy.faults.clear()
        fault = _KillsWhoAsks(number)
        proxy.faults.append(fault)  # type: ignore[arg-type]
        fault.run = run
        with pytest.raises(TunewrightError):
            life.advance(run, until="deploy")
        assert fault.killed, makes[number]
        proxy.faults.clear()
        if number == 0:
            life.advance(run, until="deploy")
            with openai.OpenAI(**live.client()) as client:
                ours = [one.filename for one in client.files.list() if run.id in one.filename]
            assert len(ours) == len(set(ours)), "an upload was made twice"
        cleared(run)
        assert left(live, run) == [], makes[number]
        destroy.destroy(run, base.backend(run.recipe()))


def cleared(run: Run) -> None:
    """Destroy, and again where a job takes its time to end, as the message says."""
    for last in (False, False, True):
        try:
            destroy.destroy(run, base.backend(run.recipe()))
            return
        except StageError as error:
            if last or "still going" not in str(error):
                raise


class _KillsWhoAsks:
    """A fault that kills the stage's process at the n-th call that makes something, after it was acted on."""

    call, how, after, headers = MAKES.pattern, "kill", 0, ()

    def __init__(self, number: int) -> None:
        self.left = number
        self.killed = False
        self.run: Run | None = None

    @property
    def times(self) -> int:
        return 0 if self.killed else 1

    @times.setter
    def times(self, _: int) -> None:
        self.left -= 1
        self.how = "kill" if self.left < 0 else "pass"
        self.killed = self.left < 0

    @property
    def pid(self) -> int:
        assert self.run is not None
        jobs = [json.loads(path.read_text()) for path in (self.run.path / "jobs").glob("*.json")]
        alive = [one["pid"] for one in jobs if "pid" in one and psutil.pid_exists(one["pid"])]
        return int(alive[-1])


@pytest.mark.slow
def test_no_key_is_written_anywhere(live: Live, proxy: Between, hosted_home: Path, tmp_path: Path) -> None:
    """Run folders, logs, tracebacks and MLflow; with a job that fails, too."""
    tracking = {"uri": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    run = begun(hosted_home, tmp_path, proxy.url, "azure", tracking=tracking)
    proxy.fault("POST /openai/v1/chat/completions", "400", 1)
    with pytest.raises(TunewrightError):
        life.advance(run)
    life.advance(run)
    destroy.destroy(run, base.backend(run.recipe()))
    keys = [key.encode() for key in (live.key, live.admin_key)]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if any(key in path.read_bytes() for key in keys)] == []
