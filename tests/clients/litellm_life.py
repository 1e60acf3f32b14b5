"""The life of a fine-tuning job with LiteLLM, as its users write it.

    python litellm_life.py openai    OPENAI_BASE_URL, OPENAI_API_KEY
    python litellm_life.py azure     AZURE_API_BASE, AZURE_API_KEY, AZURE_API_VERSION, and for the deployment
                                     AZURE_MANAGEMENT_ENDPOINT, AZURE_MANAGEMENT_TOKEN

LITELLM_LOCAL_MODEL_COST_MAP=True keeps it from asking the network for prices. The last line printed is JSON: what was
seen.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import litellm
import openai
from pydantic import BaseModel

MODEL = "gpt-4.1-mini-2025-04-14"
FINAL = ("succeeded", "failed", "cancelled")
ASK = [{"role": "user", "content": "What does the mill grind?"}]


class Mill(BaseModel):
    grinds: bool


def main(form: str) -> None:
    provider: Any = {"custom_llm_provider": form}
    training, validation = upload(provider), asyncio.run(upload_async(provider))
    job = litellm.create_fine_tuning_job(
        model=MODEL, training_file=training, validation_file=validation, suffix="mill", seed=105,
        hyperparameters={"n_epochs": 2, "batch_size": 4}, **provider,
    )  # fmt: skip
    second = asyncio.run(litellm.acreate_fine_tuning_job(model=MODEL, training_file=training, **provider))
    assert (job.status, job.seed) == ("validating_files", 105)
    litellm.cancel_fine_tuning_job(fine_tuning_job_id=second.id, **provider)
    listed = litellm.list_fine_tuning_jobs(limit=2, **provider)
    assert [one.id for one in listed.data] == [second.id, job.id]
    assert asyncio.run(litellm.alist_fine_tuning_jobs(limit=1, **provider)).data[0].id == second.id
    assert poll(second.id, provider).status == "cancelled"
    job = poll(job.id, provider)
    assert job.status == "succeeded", job.error

    name = job.fine_tuned_model
    if form == "azure":
        name = "mill"
        manage("PUT", name, job.fine_tuned_model)
    model = f"{form}/{name}"
    answer = chat(model)
    asyncio.run(chat_async(model, answer))
    structured(model)
    [result] = job.result_files
    assert litellm.file_content(file_id=result, **provider).content
    found = errors(model, form)
    if form == "azure":
        manage("DELETE", name)
    clean_up(provider, [training, validation])
    said = {"version": importlib.metadata.version("litellm"), "openai": importlib.metadata.version("openai")}
    said |= {"job": job.id, "model": job.fine_tuned_model, "seed": job.seed, "answer": answer, "errors": found}
    print(json.dumps(said))


def rows(first: int) -> bytes:
    talks = [
        [
            {"role": "user", "content": f"What did the mill grind on day {first + number}?"},
            {"role": "assistant", "content": "Rye." if number % 2 else "Wheat."},
        ]
        for number in range(12)
    ]
    return "".join(json.dumps({"messages": one}) + "\n" for one in talks).encode()


def upload(provider: Any) -> str:
    path = Path("training.jsonl")
    path.write_bytes(rows(0))
    with path.open("rb") as file:
        made = litellm.create_file(file=file, purpose="fine-tune", **provider)
    found = litellm.file_retrieve(file_id=made.id, **provider)
    assert (found.purpose, found.bytes) == ("fine-tune", path.stat().st_size)
    assert made.id in [one.id for one in litellm.file_list(purpose="fine-tune", **provider)]
    assert litellm.file_content(file_id=made.id, **provider).content == rows(0)
    return made.id


async def upload_async(provider: Any) -> str:
    made = await litellm.acreate_file(file=("validation.jsonl", rows(100)), purpose="fine-tune", **provider)
    return made.id


def poll(job: str, provider: Any) -> Any:
    until = time.monotonic() + 600
    while (found := litellm.retrieve_fine_tuning_job(fine_tuning_job_id=job, **provider)).status not in FINAL:
        assert time.monotonic() < until, found
        time.sleep(0.3)
    return found


def chat(model: str) -> str:
    asked: Any = {"model": model, "messages": ASK, "temperature": 1, "seed": 7, "max_tokens": 12}
    whole = litellm.completion(**asked)
    said, usage = "", None
    for chunk in litellm.completion(**asked, stream=True, stream_options={"include_usage": True}):
        said += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        usage = getattr(chunk, "usage", None) or usage
    assert said == whole.choices[0].message.content
    assert usage.total_tokens == whole.usage.total_tokens
    text = litellm.text_completion(
        model=model.replace("openai/", "text-completion-openai/"), prompt="The mill", max_tokens=4
    )
    assert text.choices[0].finish_reason in ("stop", "length")
    return said


async def chat_async(model: str, answer: str) -> None:
    asked: Any = {"model": model, "messages": ASK, "temperature": 1, "seed": 7, "max_tokens": 12}
    assert (await litellm.acompletion(**asked)).choices[0].message.content == answer
    pieces = [chunk.choices[0].delta.content or "" async for chunk in await litellm.acompletion(**asked, stream=True)]
    assert "".join(pieces) == answer


def structured(model: str) -> None:
    reply = litellm.completion(model=model, messages=ASK, max_tokens=100, response_format=Mill)
    assert isinstance(json.loads(reply.choices[0].message.content)["grinds"], bool)
    parameters = {**Mill.model_json_schema(), "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "grind", "parameters": parameters}}
    reply = litellm.completion(model=model, messages=ASK, max_tokens=200, tools=[tool], tool_choice="required")
    [call] = reply.choices[0].message.tool_calls
    assert call.function.name == "grind"


def errors(model: str, form: str) -> dict[str, str]:
    wrong = {
        "key": {"model": model, "messages": ASK, "api_key": "tw-not-a-key"},
        "model": {"model": f"{form}/no-such-model", "messages": ASK},
        "length": {"model": model, "messages": [{"role": "user", "content": "mill " * 4000}]},
    }
    found = {}
    for what, asked in wrong.items():
        try:
            litellm.completion(**asked, num_retries=0, max_retries=0)
        except openai.APIStatusError as error:  # LiteLLM's own errors are kinds of OpenAI's
            found[what] = type(error).__name__
    return found


def manage(method: str, deployment: str, model: str | None = None) -> None:
    """Azure's control plane. A deployment that is made serves when this returns."""
    account = "subscriptions/00000000-0000-0000-0000-000000000000/resourceGroups/local"
    account += "/providers/Microsoft.CognitiveServices/accounts/local"
    url = f"{os.environ['AZURE_MANAGEMENT_ENDPOINT']}/{account}/deployments/{deployment}?api-version=2024-10-01"
    headers = {"Authorization": f"Bearer {os.environ['AZURE_MANAGEMENT_TOKEN']}"}
    body = {
        "sku": {"name": "Standard", "capacity": 100},
        "properties": {"model": {"format": "OpenAI", "name": model, "version": "1"}},
    }
    with httpx.Client(headers=headers) as client:
        reply = client.request(method, url, json=body if model else None).raise_for_status()
        while model and reply.json()["properties"]["provisioningState"] != "Succeeded":
            time.sleep(0.2)
            reply = client.get(url).raise_for_status()


def clean_up(provider: Any, files: list[str]) -> None:
    for file in files:
        assert litellm.file_delete(file_id=file, **provider).deleted


if __name__ == "__main__":
    main(sys.argv[1])
