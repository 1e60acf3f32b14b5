"""What the server counts and what it logs."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import urllib.request
from collections.abc import Callable, Iterator

import openai
import pytest
from echoing import echoing
from management_client import add_base, call, deployed, deployment
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import insert

from endpoint_fixtures import running
from server_running import Running
from tunewright.server import keys, logs, tables
from tunewright.server.state import Server


@pytest.fixture
def echo(open_server: Callable[[], Server]) -> Iterator[Running]:
    server = open_server()
    made = [keys.create(server.store, scope, scope=scope) for scope in ("training", "inference", "admin")]
    add_base(server, "small")
    with running(echoing(server)) as url, contextlib.closing(Running(server, url, *made)) as echo:
        yield echo


def shown(served: Running) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    with urllib.request.urlopen(f"{served.url}/metrics", timeout=10) as reply:
        assert reply.headers["content-type"].startswith("text/plain")
        text = reply.read().decode()
    return {
        (one.name, frozenset(one.labels.items())): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


def value(served: Running, name: str, **labels: str) -> float:
    return shown(served).get((name, frozenset(labels.items())), 0.0)


def ask(served: Running, model: str, text: str = "hello", **others: int) -> None:
    served.client().chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **others)


def test_requests_tokens_refusals_and_filters_are_counted(echo: Running) -> None:
    deployed(echo, "d", deployment("small", capacity=1))
    for _ in range(2):
        ask(echo, "small")
    ask(echo, "d")
    with pytest.raises(openai.RateLimitError):
        ask(echo, "d")
    with pytest.raises(openai.BadRequestError):
        ask(echo, "small", "how to make a bomb")
    with pytest.raises(openai.NotFoundError):
        echo.client().files.retrieve("file-1")
    call(echo, "GET", "/no/such/path/1")
    call(echo, "GET", "/no/such/path/2")
    route = {"route": "/v1/chat/completions", "method": "POST"}
    assert value(echo, "tunewright_requests_total", **route, status="200") == 3
    assert value(echo, "tunewright_requests_total", **route, status="429") == 1
    assert value(echo, "tunewright_requests_total", **route, status="400") == 1
    assert value(echo, "tunewright_requests_total", route="/v1/files/{file_id}", method="GET", status="404") == 1
    assert value(echo, "tunewright_requests_total", route="unmatched", method="GET", status="404") == 2
    assert value(echo, "tunewright_request_seconds_count", route="/v1/chat/completions") == 5
    assert value(echo, "tunewright_tokens_total", model="small", kind="in") == 3
    assert value(echo, "tunewright_tokens_total", model="small", kind="out") == 3
    assert value(echo, "tunewright_rate_limited_total", deployment="d", kind="requests") == 1
    assert value(echo, "tunewright_filtered_total", source="prompt", reason="violence") == 1


def test_jobs_are_counted_by_status(served: Running) -> None:
    row = {
        "created_at": 1,
        "key_id": "key_1",
        "surface": "openai",
        "model": "small",
        "training_file": "file-1",
        "seed": 1,
        "method": {},
        "hyperparameters": {},
        "wanted": "run",
        "result_files": [],
    }
    statuses = ("failed", "failed", "succeeded")
    with served.server.store.begin() as connection:
        for number, status in enumerate(statuses):
            connection.execute(insert(tables.jobs).values(**row, id=f"ftjob-{number}", status=status))
    assert value(served, "tunewright_jobs", status="failed") == 2
    assert value(served, "tunewright_jobs", status="succeeded") == 1


def test_nothing_that_is_shown_names_a_key_or_a_prompt(echo: Running) -> None:
    ask(echo, "small", "a very particular prompt")
    said = str(shown(echo))
    for secret in ("particular", echo.key, echo.inference_key, "training"):
        assert secret not in said


def test_made_up_paths_and_methods_become_no_labels(echo: Running) -> None:
    for number in range(20):
        call(echo, "GET", f"/v1/nothing/{number}")
    for method in ("PROPFIND", "REPORT", "TRACE"):
        call(echo, method, "/v1/models")
    routes = {dict(labels).get("route") for name, labels in shown(echo) if name == "tunewright_requests_total"}
    assert routes <= {"unmatched", "/metrics", "/v1/models"}


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What the server logs as JSON."""
    kept = io.StringIO()
    handler = logging.StreamHandler(kept)
    handler.setFormatter(logs.JsonLines())
    root = logging.getLogger("tunewright")
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield kept
    root.removeHandler(handler)
    root.setLevel(before)


def test_the_log_has_one_object_a_line_without_prompts_and_keys(echo: Running, lines: io.StringIO) -> None:
    ask(echo, "small", "a very particular prompt")
    call(echo, "GET", "/v1/files/file-1?api-key=in-the-query")
    try:
        raise ValueError("with a traceback")
    except ValueError:
        logging.getLogger("tunewright.server").exception("something %s", "failed")
    said = [json.loads(line) for line in lines.getvalue().splitlines()]
    asked = next(one for one in said if one.get("path") == "/v1/chat/completions")
    assert (asked["method"], asked["status"], asked["level"]) == ("POST", 200, "info")
    assert asked["id"].startswith("req_")
    assert "ValueError: with a traceback" in said[-1]["error"]
    for secret in ("particular", echo.key, "in-the-query"):
        assert secret not in lines.getvalue()
