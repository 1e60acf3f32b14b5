"""Unchanged client libraries drive the whole server, from the upload of a file to the deletion of the tuned model."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from environments import PINS, Run, encodings
from openai import OpenAI

from live_server import MODEL, Live

OPENAI = ("openai-1", "openai-2", "openai-3")
LOCAL = (
    "/subscriptions/00000000-0000-0000-0000-000000000000/resourceGroups/local"
    "/providers/Microsoft.CognitiveServices/accounts/local"
)
OPENAI_COLUMNS = ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
AZURE_COLUMNS = [
    *("step", "train_loss", "train_mean_token_accuracy", "valid_loss", "validation_mean_token_accuracy"),
    *("full_valid_loss", "full_valid_mean_token_accuracy"),
]
ERRORS = {
    "openai": {"key": ["AuthenticationError", "invalid_api_key"], "model": ["NotFoundError", "model_not_found"]},
    "azure": {"key": ["AuthenticationError", "401"], "model": ["NotFoundError", "DeploymentNotFound"]},
}
SAME_ERRORS = {
    "length": ["BadRequestError", "context_length_exceeded"],
    "job": ["NotFoundError", "fine_tune_not_found"],
}


def pinned(environment: str, package: int = 0) -> str:
    """The version that an environment was made with."""
    return PINS[environment][package].replace("@", "==").partition("==")[2]


def check_job(live: Live, seen: dict[str, Any], *, azure: bool, steps: int) -> None:
    """What every client's script says of its job."""
    started = seen["events"].index("Fine-tuning job started")
    assert seen["events"][0] == f"Created fine-tuning job: {seen['job']}"
    assert "Files validated, moving job to queued state" in seen["events"][:started]
    for step in range(1, steps + 1):
        assert sum(said.startswith(f"Step {step}/{steps}: training loss=") for said in seen["events"][started:]) == 1
    assert seen["events"][-2:] == [
        f"New fine-tuned model created: {seen['model']}",
        "The job has successfully completed",
    ]
    assert seen["model"].startswith(f"{MODEL}.ft-" if azure else f"ft:{MODEL}:tunewright:")
    assert all(name.startswith(seen["model"]) for name in seen["checkpoints"])
    assert seen["results"] == (AZURE_COLUMNS if azure else OPENAI_COLUMNS)
    assert seen["answer"]
    with OpenAI(**live.client(), max_retries=0) as client:
        assert client.fine_tuning.jobs.retrieve(seen["job"]).fine_tuned_model == seen["model"]
        assert seen["model"] not in [model.id for model in client.models.list()], "the script has deleted it"


@pytest.mark.parametrize("form", ["openai", "azure", "azure-v1"])
@pytest.mark.parametrize("environment", OPENAI)
def test_the_openai_package(live: Live, run: Run, environment: str, form: str) -> None:
    azure = form != "openai"
    seen = run(environment, "openai_life.py", form, **(live.azure() if azure else live.openai()))
    assert seen["version"] == pinned(environment)
    check_job(live, seen, azure=azure, steps=9)
    assert seen["seed"] == 105
    assert seen["trained_tokens"] > 0
    assert len(seen["checkpoints"]) == 3
    assert seen["paused"] == ["paused", "succeeded"]
    assert seen["batch"] == ["first", "second"]
    assert seen["errors"] == {
        **ERRORS["azure" if azure else "openai"],
        **SAME_ERRORS,
        "number": ["BadRequestError", "invalid_value"],
        "embeddings": ["BadRequestError", "unsupported_model"],
        "file": ["NotFoundError", None],
        "base": ["PermissionDeniedError", "model_not_deletable"],
    }


@pytest.mark.parametrize("form", ["openai", "azure"])
def test_the_openai_package_of_npm(live: Live, run: Run, form: str) -> None:
    seen = run("npm", "openai_life.mjs", form, **(live.azure() if form == "azure" else live.openai()))
    assert seen["version"] == pinned("npm")
    check_job(live, seen, azure=form == "azure", steps=6)
    assert seen["errors"] == {**ERRORS[form], **SAME_ERRORS}


@pytest.mark.parametrize("form", ["openai", "azure"])
def test_litellm(live: Live, run: Run, form: str) -> None:
    variables = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", **live.openai()}
    if form == "azure":
        given = live.azure()
        variables |= {
            "AZURE_API_BASE": given["AZURE_OPENAI_ENDPOINT"],
            "AZURE_API_KEY": given["AZURE_OPENAI_API_KEY"],
            "AZURE_API_VERSION": given["OPENAI_API_VERSION"],
            "AZURE_MANAGEMENT_ENDPOINT": given["AZURE_MANAGEMENT_ENDPOINT"],
            "AZURE_MANAGEMENT_TOKEN": given["AZURE_MANAGEMENT_TOKEN"],
        }
    seen = run("litellm", "litellm_life.py", form, **variables)
    assert seen["version"] == pinned("litellm")
    assert seen["seed"] == 105
    assert seen["answer"]
    assert seen["errors"] == {
        "key": "AuthenticationError",
        "model": "NotFoundError",
        "length": "ContextWindowExceededError",
    }
    with OpenAI(**live.client(), max_retries=0) as client:
        events = client.fine_tuning.jobs.list_events(seen["job"], limit=100).data
    assert events[0].message == "The job has successfully completed"


@dataclass(frozen=True)
class Tuned:
    """A model that a job has made, and its deployment."""

    model: str
    deployment: str


@pytest.fixture(scope="module")
def tuned(live: Live) -> Iterator[Tuned]:
    rows = [
        {"messages": [{"role": "user", "content": f"Night {n}?"}, {"role": "assistant", "content": "Calm."}]}
        for n in range(12)
    ]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with OpenAI(**live.client(), max_retries=0) as client:
        file = client.files.create(file=("rows.jsonl", content), purpose="fine-tune")
        asked: Any = {"n_epochs": 1, "batch_size": 4}
        job = client.fine_tuning.jobs.create(model=MODEL, training_file=file.id, hyperparameters=asked)
        until = time.monotonic() + 300
        while (job := client.fine_tuning.jobs.retrieve(job.id)).status != "succeeded":
            assert job.status in ("validating_files", "queued", "running"), job.error
            assert time.monotonic() < until, job
            time.sleep(0.3)
    assert job.fine_tuned_model is not None
    body = {
        "sku": {"name": "Standard", "capacity": 100},
        "properties": {"model": {"format": "OpenAI", "name": job.fine_tuned_model, "version": "1"}},
    }
    path = f"{LOCAL}/deployments/tuned"
    status = manage(live, "PUT", path, body)
    while status["properties"]["provisioningState"] != "Succeeded":
        assert time.monotonic() < until, status
        time.sleep(0.2)
        status = manage(live, "GET", path)
    yield Tuned(job.fine_tuned_model, "tuned")
    manage(live, "DELETE", path)


def manage(live: Live, method: str, path: str, body: Any = None) -> Any:
    """A request to the control plane."""
    request = urllib.request.Request(
        f"{live.url}{path}?api-version=2024-10-01",
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"authorization": f"Bearer {live.admin_key}", "content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        text = reply.read()
    return json.loads(text) if text else None


@pytest.mark.parametrize("form", ["openai", "azure"])
def test_langchain(live: Live, run: Run, tuned: Tuned, form: str) -> None:
    name = tuned.deployment if form == "azure" else tuned.model
    variables = live.azure() if form == "azure" else live.openai()
    seen = run("langchain", "langchain_chat.py", form, name, **variables)
    assert seen["version"] == pinned("langchain")
    assert seen["model"] == tuned.model
    assert seen["answer"]


def test_the_lab_with_nothing_changed_but_its_addresses_tokens_and_model(live: Live, run: Run) -> None:
    """The resource is made beforehand, as in Azure's portal, and its own key is the token for files and chats."""
    account = (
        "/subscriptions/11111111-2222-3333-4444-555555555555/resourceGroups/lab-group"
        "/providers/Microsoft.CognitiveServices/accounts/lab-resource"
    )
    made = {"kind": "OpenAI", "sku": {"name": "S0"}, "location": "northcentralus", "properties": {}}
    manage(live, "PUT", account, made)
    seen = run(
        "litellm",
        "lab.py",
        AZURE_OPENAI_ENDPOINT=live.url,
        AZURE_MANAGEMENT=live.url,
        COGNITIVE_SERVICES_TOKEN=manage(live, "POST", f"{account}/listKeys")["key1"],
        MANAGEMENT_TOKEN=live.admin_key,
        MODEL=MODEL,
        TIKTOKEN_CACHE_DIR=str(encodings("litellm")),
    )
    for name in ("training_set.jsonl", "validation_set.jsonl"):
        total, assistant = seen[name]["total"], seen[name]["assistant"]
        assert total["count"] == assistant["count"] == 10
        assert 0 < assistant["min"] <= assistant["median"] <= assistant["max"] < total["min"]
        assert total["min"] <= total["mean"] <= total["max"]
    assert (seen["status"], seen["seed"], seen["sku"]["capacity"]) == ("succeeded", 105, 1)
    assert seen["model"].startswith(f"{MODEL}.ft-")
    assert seen["finish_reason"] in ("stop", "length")
    assert manage(live, "GET", f"{account}/deployments")["value"] == []
    with OpenAI(**live.client(), max_retries=0) as client:
        assert seen["model"] not in [model.id for model in client.models.list()]
        assert not set(seen["files"]) & {file.id for file in client.files.list()}
        assert client.fine_tuning.jobs.retrieve(seen["job"]).seed == 105
    manage(live, "DELETE", account)
