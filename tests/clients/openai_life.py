"""The life of fine-tuning jobs with the `openai` package, from 1.109.1 to 3.x, as its users write it.

    python openai_life.py openai      OpenAI()                        OPENAI_BASE_URL, OPENAI_API_KEY
    python openai_life.py azure       AzureOpenAI()                   AZURE_OPENAI_ENDPOINT, AZURE_OPENAI_API_KEY,
                                                                      OPENAI_API_VERSION
    python openai_life.py azure-v1    OpenAI(base_url=".../openai/v1/")  AZURE_OPENAI_ENDPOINT, AZURE_OPENAI_API_KEY

On Azure a model answers once it is deployed: AZURE_MANAGEMENT_ENDPOINT, AZURE_MANAGEMENT_TOKEN. Every object that comes
back is held to the SDK's own types, which the SDK itself does not do. The last line printed is JSON: what was seen.
"""

from __future__ import annotations

import asyncio
import base64
import csv
import io
import json
import os
import sys
import time
import urllib.request
import uuid
import warnings
from pathlib import Path
from typing import Any, Literal

import openai
from openai import AsyncAzureOpenAI, AsyncOpenAI, AzureOpenAI, OpenAI
from pydantic import BaseModel

MODEL = "gpt-4.1-mini-2025-04-14"
FINAL = ("succeeded", "failed", "cancelled")
ASK: Any = [{"role": "system", "content": "You are a lighthouse keeper."}, {"role": "user", "content": "Any ships?"}]
DRAWN: Any = {"temperature": 1, "seed": 7, "max_tokens": 16}
"""The same answer each time, though not the likeliest."""
SCHEMA = {
    "type": "object",
    "properties": {"weather": {"enum": ["calm", "storm"]}, "ships": {"type": "boolean"}},
    "required": ["weather", "ships"],
    "additionalProperties": False,
}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "light",
        "description": "Turn the lamp on or off.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}},
            "required": ["on"],
            "additionalProperties": False,
        },
    },
}


class Watch(BaseModel):
    """An entry of the log book."""

    weather: Literal["calm", "storm"]
    ships: bool


def main(form: str) -> None:
    warnings.filterwarnings("error", category=UserWarning)  # Pydantic's, of values that are not what they should be
    run = uuid.uuid4().hex[:8]
    client = make_client(form)
    training, validation, spare = upload(client)
    job, rest = create_jobs(client, run, training, validation)
    list_jobs(client, run, job, rest)
    cancel(client, rest[0])
    done = poll(client, job.id)
    assert done.status == "succeeded", done.error
    seen = {
        "version": openai.__version__,
        "run": run,
        "job": job.id,
        "model": done.fine_tuned_model,
        "trained_tokens": done.trained_tokens,
        "seed": done.seed,
        "events": events(client, job.id),
        "checkpoints": [one.fine_tuned_model_checkpoint for one in checkpoints(client, job.id)],
        "results": results(client, done, encoded=form == "openai"),
        "paused": pause(client, rest[1]),
    }
    tuned, earlier = done.fine_tuned_model, seen["checkpoints"][1]
    names = {tuned: tuned, earlier: earlier}
    if form != "openai":
        names = {tuned: f"keeper-{run}", earlier: f"earlier-{run}"}
        for model, deployment in names.items():
            deploy(deployment, model)
    name = names[tuned]
    seen["answer"] = chat(client, name)
    assert held(client.chat.completions.create(model=names[earlier], messages=ASK, max_tokens=8)).usage
    stream(client, name)
    choices(client, name)
    call_tools(client, name)
    structured(client, name)
    complete(client, name)
    respond(client, name)
    seen["batch"] = batch(client, name, azure=form == "azure")
    models(client, tuned)
    seen["errors"] = errors(client, form, name)
    asyncio.run(asynchronous(form, name, job.id))
    if form == "azure":
        with_a_token(name, job.id)
    if form == "openai":
        assert held(client.moderations.create(input="a calm night")).results[0].flagged is False
    for deployment in names.values() if form != "openai" else ():
        undeploy(deployment)
    clean_up(client, [*names], [training, validation, spare])
    client.close()
    print(json.dumps(seen))


def make_client(form: str, **options: Any) -> OpenAI:
    """No retries, so that nothing is papered over."""
    options = {"max_retries": 0, **options}
    if form == "azure":
        return AzureOpenAI(**options)
    if form == "azure-v1":
        base_url = f"{os.environ['AZURE_OPENAI_ENDPOINT']}/openai/v1/"
        return OpenAI(base_url=base_url, **{"api_key": os.environ["AZURE_OPENAI_API_KEY"], **options})
    return OpenAI(**options)


def make_async_client(form: str) -> AsyncOpenAI:
    if form == "azure":
        return AsyncAzureOpenAI(max_retries=0)
    if form == "azure-v1":
        base_url = f"{os.environ['AZURE_OPENAI_ENDPOINT']}/openai/v1/"
        return AsyncOpenAI(base_url=base_url, api_key=os.environ["AZURE_OPENAI_API_KEY"], max_retries=0)
    return AsyncOpenAI(max_retries=0)


def held(value: Any) -> Any:
    """The value, held to its own type: the SDK takes whatever comes. Where a job has no error, OpenAI sends one of
    nulls, which the type does not have."""
    said = value.to_dict()
    if said.get("error") == {"code": None, "message": None, "param": None}:
        said["error"] = None
    type(value).model_validate(said)
    value.model_dump_json()
    return value


def row(number: int) -> dict[str, Any]:
    ships = number % 3
    return {
        "messages": [
            {"role": "system", "content": "You are a lighthouse keeper."},
            {"role": "user", "content": f"Night {number}: any ships?"},
            {"role": "assistant", "content": f"{ships} lamps went by, and mine answered." if ships else "None."},
        ]
    }


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(one) + "\n" for one in rows).encode()


def upload(client: OpenAI) -> list[str]:
    """A file as it lies on disk, one in parts by hand, and one in parts by the SDK's helper."""
    path = Path("training.jsonl")
    path.write_bytes(lines([row(number) for number in range(12)]))
    with path.open("rb") as opened:
        training = held(client.files.create(file=opened, purpose="fine-tune"))
    assert (training.filename, training.bytes, training.purpose) == (path.name, path.stat().st_size, "fine-tune")
    assert client.files.wait_for_processing(training.id, max_wait_seconds=60).status == "processed"
    assert client.files.content(training.id).read() == path.read_bytes()

    content = lines([row(number) for number in range(100, 112)])
    pending = held(
        client.uploads.create(
            filename="validation.jsonl", purpose="fine-tune", bytes=len(content), mime_type="application/jsonl"
        )
    )
    parts = [
        held(client.uploads.parts.create(pending.id, data=("part", piece))) for piece in (content[:500], content[500:])
    ]
    whole = held(client.uploads.complete(pending.id, part_ids=[part.id for part in parts]))
    assert whole.status == "completed"
    assert client.files.content(whole.file.id).read() == content

    spare = client.uploads.upload_file_chunked(
        file=path, mime_type="application/jsonl", purpose="fine-tune", part_size=1000
    )
    assert spare.file is not None
    mine = {training.id, whole.file.id, spare.file.id}
    assert mine <= {held(one).id for one in client.files.list(purpose="fine-tune", limit=2)}, "pages follow each other"
    assert held(client.files.retrieve(spare.file.id)).filename == path.name
    return [training.id, whole.file.id, spare.file.id]


def create_jobs(client: OpenAI, run: str, training: str, validation: str) -> tuple[Any, list[Any]]:
    """The job that is followed to its model, one that is cancelled, and one that is paused."""
    job = held(
        client.fine_tuning.jobs.create(
            model=MODEL,
            training_file=training,
            validation_file=validation,
            suffix="keeper",
            seed=105,
            metadata={"run": run},
            method={
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 2}},
            },
        )
    )
    assert (job.status, job.seed, job.metadata) == ("validating_files", 105, {"run": run})
    older: Any = [{"n_epochs": 50, "batch_size": 1}, {"n_epochs": 20, "batch_size": 1}]
    rest = [
        held(client.fine_tuning.jobs.create(model=MODEL, training_file=training, hyperparameters=asked))
        for asked in older
    ]
    return job, rest


def list_jobs(client: OpenAI, run: str, job: Any, rest: list[Any]) -> None:
    jobs = client.fine_tuning.jobs
    assert [held(one).id for one in jobs.list(metadata={"run": run})] == [job.id]
    page = jobs.list(limit=2)
    assert [one.id for one in page.data] == [rest[1].id, rest[0].id]
    assert page.has_more
    assert jobs.list(limit=1, after=rest[0].id).data[0].id == job.id
    assert job.id in [one.id for one in jobs.list(limit=2)], "pages follow each other"


def cancel(client: OpenAI, job: Any) -> None:
    held(client.fine_tuning.jobs.cancel(job.id))
    ended = poll(client, job.id)
    assert (ended.status, ended.fine_tuned_model) == ("cancelled", None)


def poll(client: OpenAI, job: str, *more: str, seconds: float = 600) -> Any:
    until = time.monotonic() + seconds
    while True:
        found = client.fine_tuning.jobs.retrieve(job)
        if found.status in FINAL or found.status in more:
            return found if found.status in more else held(found)
        assert time.monotonic() < until, [one.message for one in client.fine_tuning.jobs.list_events(job)]
        time.sleep(0.3)


def events(client: OpenAI, job: str) -> list[str]:
    """Their messages in the order of time, read page by page."""
    paged = [held(event) for event in client.fine_tuning.jobs.list_events(job, limit=3)]
    whole = client.fine_tuning.jobs.list_events(job, limit=100)
    assert [one.id for one in paged] == [one.id for one in whole.data]
    assert not whole.has_more
    assert {one.type for one in paged} == {"message", "metrics"}
    measured: list[Any] = [one.data for one in paged if one.type == "metrics"]
    assert sum(one.get("train_loss", 0) > 0 for one in measured) == 9
    assert sum(one.get("full_valid_loss", 0) > 0 for one in measured) == 3
    return [one.message for one in paged][::-1]


def checkpoints(client: OpenAI, job: str) -> list[Any]:
    found = [held(one) for one in client.fine_tuning.jobs.checkpoints.list(job, limit=1)]
    assert [one.step_number for one in found] == [9, 6, 3]
    assert all(one.metrics.full_valid_loss > 0 for one in found)
    return found


def results(client: OpenAI, job: Any, *, encoded: bool) -> list[str]:
    """The columns of the result file, which OpenAI sends as base64 and Azure as it is."""
    [file] = job.result_files
    assert held(client.files.retrieve(file)).purpose == "fine-tune-results"
    text = client.files.content(file).text
    if encoded:
        text = base64.b64decode(text.encode()).decode()
    table = list(csv.DictReader(io.StringIO(text)))
    assert [one["step"] for one in table] == [str(step) for step in range(1, 10)]
    assert all(float(one["train_loss"]) > 0 for one in table)
    return list(table[0])


def pause(client: OpenAI, job: Any) -> list[str]:
    """Statuses as they came."""
    until = time.monotonic() + 600
    while not any(one.message.startswith("Step ") for one in client.fine_tuning.jobs.list_events(job.id, limit=100)):
        assert time.monotonic() < until
        time.sleep(0.2)
    client.fine_tuning.jobs.pause(job.id)
    paused = poll(client, job.id, "paused")
    client.fine_tuning.jobs.resume(job.id)
    done = poll(client, job.id)
    clean_up(client, [done.fine_tuned_model], [])
    return [paused.status, done.status]


def chat(client: OpenAI, name: str) -> str:
    asked: Any = {"model": name, "messages": ASK, **DRAWN}
    reply = held(client.chat.completions.create(**asked, logprobs=True, top_logprobs=2))
    [choice] = reply.choices
    assert choice.message.role == "assistant"
    assert choice.message.refusal is None
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) in (reply.usage.completion_tokens, reply.usage.completion_tokens - 1)
    assert all(len(one.top_logprobs) == 2 for one in choice.logprobs.content)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply._request_id
    return choice.message.content


def stream(client: OpenAI, name: str) -> None:
    """By hand, and with the SDK's helper; both say what the answer that is not streamed says."""
    asked: Any = {"model": name, "messages": ASK, **DRAWN}
    whole = client.chat.completions.create(**asked)
    asked["stop"] = letter(whole.choices[0].message.content)  # the helper takes an answer that was cut for an error
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].finish_reason == "stop"
    said, usage, role = "", None, None
    with client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as chunks:
        for chunk in chunks:
            if chunk.choices:
                held(chunk)
                assert usage is None, "usage comes behind all choices"
                role = chunk.choices[0].delta.role or role
                said += chunk.choices[0].delta.content or ""
            usage = chunk.usage or usage
    assert (said, role, usage) == (whole.choices[0].message.content, "assistant", whole.usage)
    with client.chat.completions.stream(**asked) as helper:
        deltas = [event.delta for event in helper if event.type == "content.delta"]
        final = helper.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == said


def choices(client: OpenAI, name: str) -> None:
    asked: Any = {"model": name, "messages": ASK, **DRAWN}
    several = held(client.chat.completions.create(**asked, n=3))
    assert [one.index for one in several.choices] == [0, 1, 2]
    again = client.chat.completions.create(**asked, n=3)
    assert [one.message.content for one in again.choices] == [one.message.content for one in several.choices]
    text = client.chat.completions.create(**asked).choices[0].message.content
    stop = letter(text)
    stopped = client.chat.completions.create(**asked, stop=["no such thing", stop]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (text.partition(stop)[0], "stop")


def letter(text: str) -> str:
    """One in the second half of a text, to stop at."""
    return next(one for one in text[len(text) // 2 :] if one.isascii() and one.isalnum())


def call_tools(client: OpenAI, name: str) -> None:
    """A call, whole and streamed, and the tool's answer to it."""
    asked: Any = {"model": name, "messages": ASK, "tools": [TOOL], "tool_choice": "required", "max_tokens": 200}
    asked["parallel_tool_calls"] = False
    reply = held(client.chat.completions.create(**asked))
    message = reply.choices[0].message
    [call] = message.tool_calls
    assert reply.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "light"
    assert isinstance(json.loads(call.function.arguments)["on"], bool)
    answer = {"role": "tool", "tool_call_id": call.id, "content": "The lamp burns."}
    assert held(
        client.chat.completions.create(model=name, messages=[*ASK, message, answer], tools=[TOOL], max_tokens=8)
    )
    with client.chat.completions.stream(**asked) as helper:
        done = [event for event in helper if event.type == "tool_calls.function.arguments.done"]
    assert [one.name for one in done] == ["light"]


def structured(client: OpenAI, name: str) -> None:
    """JSON of a schema: as a dict, and as a Pydantic model, whole and streamed."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "watch", "strict": True, "schema": SCHEMA}}
    asked: Any = {"model": name, "messages": ASK, "max_tokens": 200}
    reply = client.chat.completions.create(**asked, response_format=form)
    assert set(json.loads(reply.choices[0].message.content)) == {"weather", "ships"}
    parsed = client.chat.completions.parse(**asked, response_format=Watch)
    assert isinstance(parsed.choices[0].message.parsed, Watch)
    with client.chat.completions.stream(**asked, response_format=Watch) as helper:
        final = helper.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Watch)


def complete(client: OpenAI, name: str) -> None:
    """The older route."""
    asked: Any = {"model": name, "prompt": "The lamp", "max_tokens": 4, "logprobs": 2}
    assert held(client.completions.create(**asked)).choices[0].logprobs.top_logprobs
    echoed = client.completions.create(**asked, echo=True).choices[0]
    assert echoed.text.startswith("The lamp")
    assert echoed.logprobs.token_logprobs[0] is None  # as OpenAI has it; the SDK's type does not
    chunks = client.completions.create(model=name, prompt=["a", "b"], max_tokens=3, temperature=0, stream=True)
    ends = [(one.index, one.finish_reason) for chunk in chunks for one in chunk.choices if one.finish_reason]
    assert sorted(ends) == [(0, "length"), (1, "length")]


def respond(client: OpenAI, name: str) -> None:
    """Responses: whole, gone on with, streamed, called a tool from, and parsed."""
    asked: Any = {"model": name, "max_output_tokens": 200, "temperature": 0}
    first = held(client.responses.create(**asked, input="Any ships?", instructions="You are a lighthouse keeper."))
    assert isinstance(first.output_text, str)
    next_one = held(client.responses.create(**asked, input="And now?", previous_response_id=first.id))
    assert next_one.usage.input_tokens > 0
    assert held(client.responses.retrieve(first.id)).output_text == first.output_text
    with client.responses.create(**asked, input="Any ships?", stream=True) as opened:
        told = [held(event) for event in opened]
    assert (told[0].type, told[-1].type) in [
        ("response.created", "response.completed"),
        ("response.created", "response.incomplete"),
    ]
    said = "".join(event.delta for event in told if event.type == "response.output_text.delta")
    assert told[-1].response.output_text == said
    with client.responses.stream(**asked, input="Any ships?", text_format=Watch) as helper:
        parsed = helper.get_final_response()
    assert isinstance(parsed.output_parsed, Watch)
    parsed = client.responses.parse(**asked, input="Any ships?", text_format=Watch)
    assert isinstance(parsed.output_parsed, Watch)
    tool: Any = {"type": "function", **TOOL["function"]}
    called = held(client.responses.create(**asked, input="Light it.", tools=[tool], tool_choice="required",
                                          parallel_tool_calls=False))  # fmt: skip
    assert [item.type for item in called.output] == ["function_call"]
    client.responses.delete(first.id)


def batch(client: OpenAI, name: str, *, azure: bool) -> list[str]:
    """A batch of two; Azure's addresses in it are without /v1."""
    url: Any = "/chat/completions" if azure else "/v1/chat/completions"
    asked = [
        {"custom_id": one, "method": "POST", "url": url, "body": {"model": name, "messages": ASK, "max_tokens": 4}}
        for one in ("first", "second")
    ]
    file = client.files.create(file=("batch.jsonl", lines(asked)), purpose="batch")
    made = held(client.batches.create(input_file_id=file.id, endpoint=url, completion_window="24h"))
    until = time.monotonic() + 120
    while (made := held(client.batches.retrieve(made.id))).status not in ("completed", "failed"):
        assert time.monotonic() < until, made
        time.sleep(0.3)
    assert made.status == "completed", made.errors
    assert (made.request_counts.total, made.request_counts.completed) == (2, 2)
    assert made.id in [one.id for one in client.batches.list(limit=1)]
    answers = [json.loads(line) for line in client.files.content(made.output_file_id).text.splitlines()]
    assert {one["response"]["status_code"] for one in answers} == {200}
    clean_up(client, [], [file.id, made.output_file_id])
    return [one["custom_id"] for one in answers]


def models(client: OpenAI, tuned: str) -> None:
    listed = [held(one).id for one in client.models.list()]
    assert MODEL in listed
    assert tuned in listed
    assert held(client.models.retrieve(tuned)).id == tuned


def errors(client: OpenAI, form: str, name: str) -> dict[str, list[Any]]:
    """For what is wrong: the class of its error, and its code."""
    stranger = make_client(form, api_key="tw-not-a-key")
    asked: Any = {"messages": ASK, "max_tokens": 4}
    long: Any = [{"role": "user", "content": "ship " * 4000}]
    wrong = {
        "key": lambda: stranger.chat.completions.create(model=name, **asked),
        "model": lambda: client.chat.completions.create(model="no-such-model", **asked),
        "length": lambda: client.chat.completions.create(model=name, messages=long),
        "number": lambda: client.chat.completions.create(model=name, **asked, n=0),
        "embeddings": lambda: client.embeddings.create(model=name, input="ships"),
        "job": lambda: client.fine_tuning.jobs.retrieve("ftjob-none"),
        "file": lambda: client.fine_tuning.jobs.create(model=MODEL, training_file="file-none"),
        "base": lambda: client.models.delete(MODEL),
    }
    found, known = {}, True
    for what, call in wrong.items():
        try:
            call()
        except openai.APIStatusError as error:
            found[what] = [type(error).__name__, error.code]
            known &= isinstance(error.body, dict) and bool(error.request_id)
        else:
            raise AssertionError(f"{what} was let through")
    stranger.close()
    assert known, "each error says what it is, and which request it answers"
    return found


async def asynchronous(form: str, name: str, job: str) -> None:
    async with make_async_client(form) as client:
        asked: Any = {"model": name, "messages": ASK, **DRAWN}
        several = await asyncio.gather(*(client.chat.completions.create(**asked) for _ in range(3)))
        assert len({held(one).choices[0].message.content for one in several}) == 1
        said = ""
        async for chunk in await client.chat.completions.create(**asked, stream=True):
            if chunk.choices:
                said += chunk.choices[0].delta.content or ""
        assert said == several[0].choices[0].message.content
        assert (await client.fine_tuning.jobs.retrieve(job)).status == "succeeded"
        assert [one async for one in client.fine_tuning.jobs.list_events(job, limit=4)]


def with_a_token(name: str, job: str) -> None:
    """Azure's other credential: a token of Entra, sent as a bearer's."""
    token = os.environ["AZURE_OPENAI_API_KEY"]
    key = os.environ.pop("AZURE_OPENAI_API_KEY")
    try:
        with AzureOpenAI(azure_ad_token=token, max_retries=0) as client:
            assert client.fine_tuning.jobs.retrieve(job).status == "succeeded"
            assert client.chat.completions.create(model=name, messages=ASK, max_tokens=4).choices
        provided = AzureOpenAI(azure_ad_token_provider=lambda: token, azure_deployment=name, max_retries=0)
        with provided as client:
            assert client.chat.completions.create(model="anything", messages=ASK, max_tokens=4).choices
            assert client.files.list(limit=1).data
    finally:
        os.environ["AZURE_OPENAI_API_KEY"] = key


def manage(method: str, deployment: str, body: Any = None) -> Any:
    """Azure's control plane."""
    account = "subscriptions/00000000-0000-0000-0000-000000000000/resourceGroups/local"
    account += "/providers/Microsoft.CognitiveServices/accounts/local"
    request = urllib.request.Request(
        f"{os.environ['AZURE_MANAGEMENT_ENDPOINT']}/{account}/deployments/{deployment}?api-version=2024-10-01",
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={
            "Authorization": f"Bearer {os.environ['AZURE_MANAGEMENT_TOKEN']}",
            "Content-Type": "application/json",
        },
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        text = reply.read()
    return json.loads(text) if text else None


def deploy(deployment: str, model: str) -> None:
    properties = {"model": {"format": "OpenAI", "name": model, "version": "1"}}
    made = manage("PUT", deployment, {"sku": {"name": "Standard", "capacity": 100}, "properties": properties})
    while made["properties"]["provisioningState"] not in ("Succeeded", "Failed"):
        time.sleep(0.2)
        made = manage("GET", deployment)
    assert made["properties"]["provisioningState"] == "Succeeded", made


def undeploy(deployment: str) -> None:
    manage("DELETE", deployment)


def clean_up(client: OpenAI, names: list[str], files: list[str]) -> None:
    for name in names:
        assert held(client.models.delete(name)).deleted
        try:
            client.models.retrieve(name)
        except openai.NotFoundError:
            pass
        else:
            raise AssertionError(f"{name} is still there")
    for file in files:
        assert held(client.files.delete(file)).deleted
        try:
            client.files.retrieve(file)
        except openai.NotFoundError:
            pass
        else:
            raise AssertionError(f"{file} is still there")


if __name__ == "__main__":
    main(sys.argv[1])
