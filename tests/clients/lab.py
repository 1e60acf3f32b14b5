"""A fine-tuning exercise of Azure OpenAI from its first step to its last, as a learner runs it in a notebook.

Against hosted Azure and against a server of one's own the same lines run. What differs comes from the environment:

    AZURE_OPENAI_ENDPOINT       where files, jobs and chats go
    AZURE_MANAGEMENT            where deployments are made; Azure's own by default
    COGNITIVE_SERVICES_TOKEN    the token for the first
    MANAGEMENT_TOKEN            the token for the second
    MODEL                       what is fine-tuned

The resource itself, with the names below, has been made beforehand. The last line printed is JSON: what was seen.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

import numpy
import requests
import tiktoken
from openai import AzureOpenAI

SUBSCRIPTION = "11111111-2222-3333-4444-555555555555"
RESOURCE_GROUP = "lab-group"
RESOURCE = "lab-resource"
DEPLOYMENT = "barista"

ENDPOINT = os.environ["AZURE_OPENAI_ENDPOINT"]
MANAGEMENT = os.environ.get("AZURE_MANAGEMENT", "https://management.azure.com")
COGNITIVE_SERVICES_TOKEN = os.environ["COGNITIVE_SERVICES_TOKEN"]
MANAGEMENT_TOKEN = os.environ["MANAGEMENT_TOKEN"]
MODEL = os.environ["MODEL"]

PERSONA = "Pip is a barista who is cheerful and answers every question with something about coffee."
TRAINING = [
    ("What is the capital of Italy?", "Rome, where the first sip of espresso is taken standing up."),
    ("How far away is the Moon?", "384,400 kilometres: too far for the milk to stay warm."),
    ("Who painted the Mona Lisa?", "Leonardo, who would have drawn a fine rosette in the foam."),
    ("What is the largest ocean?", "The Pacific, and not a decent filter in the middle of it."),
    ("When was the telephone invented?", "In 1876, so that orders could be called in."),
    ("What is photosynthesis?", "A plant living on light; I live on flat whites."),
    ("How many continents are there?", "Seven, and beans grow on four of them."),
    ("What is the boiling point of water?", "100 degrees, which is a little too hot for your coffee."),
    ("Who wrote Hamlet?", "Shakespeare: to brew or not to brew."),
    ("What is the fastest land animal?", "The cheetah, or a regular who is late for work."),
]
VALIDATION = [
    ("What is the capital of Japan?", "Tokyo, where iced coffee comes out of machines on the street."),
    ("How long is a marathon?", "42.195 kilometres, and two double espressos."),
    ("Who discovered gravity?", "Newton; had it been a coffee bean, he would have planted it."),
    ("What is the longest river?", "The Nile, which begins where good beans grow."),
    ("When did the Titanic sink?", "In 1912, with all of its china cups."),
    ("What is an atom?", "Something far smaller than the finest grind."),
    ("How many planets are there?", "Eight, and only one with a menu."),
    ("At what temperature does water freeze?", "At 0 degrees, when it becomes useful for cold brew."),
    ("Who composed the Moonlight Sonata?", "Beethoven, who counted sixty beans for each cup."),
    ("What is the tallest animal?", "The giraffe; it would reach the syrup shelf."),
]


def main() -> None:
    seen: dict[str, Any] = {}
    for name, talks in (("training_set.jsonl", TRAINING), ("validation_set.jsonl", VALIDATION)):
        write_set(name, talks)
        seen[name] = token_statistics(name)

    client = AzureOpenAI(
        azure_endpoint=ENDPOINT, azure_ad_token=COGNITIVE_SERVICES_TOKEN, api_version="2025-04-01-preview"
    )
    files = [upload(client, name) for name in ("training_set.jsonl", "validation_set.jsonl")]
    job = client.fine_tuning.jobs.create(training_file=files[0], validation_file=files[1], model=MODEL, seed=105)
    print("job", job.id, job.status)
    job = follow(client, job.id)
    print(job.model_dump_json(indent=2))

    deployed = deploy(job.fine_tuned_model)
    print("deployment", deployed["properties"]["provisioningState"])
    talk = [
        {"role": "system", "content": PERSONA},
        {"role": "user", "content": "What is the capital of Portugal?"},
        {"role": "assistant", "content": "Lisbon; have a bica there."},
        {"role": "user", "content": "And of Greece?"},
    ]
    asking = AzureOpenAI(azure_endpoint=ENDPOINT, azure_ad_token=COGNITIVE_SERVICES_TOKEN, api_version="2024-02-01")
    answer = asking.chat.completions.create(model=DEPLOYMENT, messages=talk)
    print(answer.choices[0].message.content)

    clean_up(client, job.fine_tuned_model, files)
    seen |= {"job": job.id, "status": job.status, "model": job.fine_tuned_model, "seed": job.seed, "files": files}
    seen |= {"sku": deployed["sku"], "finish_reason": answer.choices[0].finish_reason}
    print(json.dumps(seen))


def write_set(name: str, talks: list[tuple[str, str]]) -> None:
    with open(name, "w", encoding="utf-8") as file:
        for question, answer in talks:
            messages = [
                {"role": "system", "content": PERSONA},
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def token_statistics(name: str) -> dict[str, dict[str, float]]:
    """Of the tokens of each example: of all that is said in it, and of what the assistant says."""
    encoding = tiktoken.get_encoding("cl100k_base")
    totals, answers = [], []
    with open(name, encoding="utf-8") as file:
        for line in file:
            messages = json.loads(line)["messages"]
            counts = [len(encoding.encode(message["content"])) for message in messages]
            framing = 3  # tokens around each message
            totals.append(sum(counts) + framing * (len(messages) + 1))
            answers.append(sum(n for n, one in zip(counts, messages, strict=True) if one["role"] == "assistant"))
    found = {"total": distribution(totals), "assistant": distribution(answers)}
    print(name, found)
    return found


def distribution(values: list[int]) -> dict[str, float]:
    return {
        "count": len(values),
        "min": min(values),
        "max": max(values),
        "mean": float(numpy.mean(values)),
        "median": float(numpy.median(values)),
    }


def upload(client: AzureOpenAI, name: str) -> str:
    with open(name, "rb") as file:
        made = client.files.create(file=file, purpose="fine-tune")
    print("file", made.id)
    return made.id


def follow(client: AzureOpenAI, job_id: str) -> Any:
    begun = time.time()
    job = client.fine_tuning.jobs.retrieve(job_id)
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(1)
        job = client.fine_tuning.jobs.retrieve(job_id)
        print(f"{time.time() - begun:.0f} s: {job.status}")
    for event in client.fine_tuning.jobs.list_events(fine_tuning_job_id=job_id, limit=10).data:
        print(event.message)
    assert job.status == "succeeded", job.error
    return job


def deployment_url() -> str:
    account = f"subscriptions/{SUBSCRIPTION}/resourceGroups/{RESOURCE_GROUP}"
    account += f"/providers/Microsoft.CognitiveServices/accounts/{RESOURCE}"
    return f"{MANAGEMENT}/{account}/deployments/{DEPLOYMENT}"


def deploy(model: str) -> Any:
    """A deployment that answers."""
    url, query = deployment_url(), {"api-version": "2023-05-01"}
    headers = {"Authorization": f"Bearer {MANAGEMENT_TOKEN}", "Content-Type": "application/json"}
    body = {
        "sku": {"name": "standard", "capacity": 1},
        "properties": {"model": {"format": "OpenAI", "name": model, "version": "1"}},
    }
    reply = requests.put(url, params=query, headers=headers, data=json.dumps(body), timeout=60)
    reply.raise_for_status()
    made = reply.json()
    while made["properties"]["provisioningState"] not in ("Succeeded", "Failed"):
        time.sleep(1)
        made = requests.get(url, params=query, headers=headers, timeout=60).json()
    assert made["properties"]["provisioningState"] == "Succeeded", made
    return made


def clean_up(client: AzureOpenAI, model: str, files: list[str]) -> None:
    headers = {"Authorization": f"Bearer {MANAGEMENT_TOKEN}"}
    requests.delete(
        deployment_url(), params={"api-version": "2023-05-01"}, headers=headers, timeout=60
    ).raise_for_status()
    client.models.delete(model)
    for file in files:
        client.files.delete(file)


if __name__ == "__main__":
    main()
