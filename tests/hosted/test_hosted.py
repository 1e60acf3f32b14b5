"""A recipe of this machine at an API: the same life, the same report, a bill before and nothing left after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from between import Between

from live_server import MODEL, Live
from tunewright import destroy, life
from tunewright import recipe as recipes
from tunewright.backends import base
from tunewright.run import Run

TABLES: dict[str, dict[str, Any]] = {
    "openai": {"kind": "openai"},
    "azure": {
        "kind": "azure",
        "subscription": "00000000-0000-0000-0000-000000000000",
        "resource_group": "local",
        "account": "local",
        "auth": "key",
        "management_token_variable": "MANAGEMENT_TOKEN",
        "base_sku": "Standard",
    },
}


def recipe(home: Path, url: str, kind: str, table: dict[str, Any] | None = None, **sections: Any) -> Any:
    where = {"base_url": f"{url}/v1"} if kind == "openai" else {"management": url, "endpoint": url}
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
        return [
            *(one.filename for one in client.files.list() if run.id in one.filename or one.id in results),
            *(job.status for job in jobs if job.status not in ("succeeded", "failed", "cancelled")),
            *(one.id for one in client.models.list() if one.id in tuned),
        ]


@pytest.mark.parametrize("kind", ["openai", "azure"])
def test_the_whole_life_and_nothing_is_left(
    live: Live, proxy: Between, hosted_home: Path, tmp_path: Path, kind: str
) -> None:
    run = begun(hosted_home, tmp_path, proxy.url, kind)
    life.advance(run)
    trained = run.manifest("train")
    planned = run.manifest("plan")["tokens"]["train"]
    assert trained["tokens"] == pytest.approx(planned, rel=0.15)
    assert [entry for entry in run.metrics() if "loss" in entry]
    report = run.manifest("evaluate")
    assert (report["rows"], report["training"]["method"]) == (20, "hosted")
    assert set(report["models"]) == {"tuned", "base", "tfidf"}
    tested = run.manifest("test")
    assert (tested["rows"], tested["compared"]) == (4, 4)
    backend = base.backend(run.recipe())
    kinds = {one.kind for one in destroy.standing(run, backend)}
    assert kinds >= {"hosted-file", "hosted-model"}
    destroy.destroy(run, backend)
    assert left(live, run) == []
    destroy.destroy(run, backend)
    assert all(one["is"] == "gone" for one in run.resources())
