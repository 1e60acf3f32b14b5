"""The server's own OpenAPI document: whole, and true."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import jsonschema_rs
import pytest
import schemathesis
from echoing import echoing
from hypothesis import HealthCheck, Phase, given, settings
from management_client import add_base, add_tuned, deployed, deployment
from routes import GOOD, NAMES, OPEN, ROWS, Route, kind_of, routes
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from endpoint_fixtures import running
from server_running import Running
from tunewright.server import keys
from tunewright.server.state import Server

REFUSED = {
    "/embeddings",
    "/batches/{batch_id}/cancel",
    "/uploads/{upload_id}/cancel",
    "/jobs/{job_id}/pause",
    "/jobs/{job_id}/resume",
    "/accounts/{account}",
    "/deletedAccounts/{account}",
    "/raiBlocklistItems/{item}",
}
"""What is refused where everything is asked once: because of what was asked before it, or because nobody has it."""
WANTED = {"start_time": 1_700_000_000}
"""Queries that have to be there."""
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture
def echo(open_server: Callable[[], Server]) -> Iterator[Running]:
    """A server with something behind every kind of name."""
    server = open_server()
    add_base(server, "base")
    add_tuned(server, "ft:base", "base")
    made = [keys.create(server.store, scope, scope=scope) for scope in ("training", "inference", "admin")]
    with running(echoing(server)) as url, contextlib.closing(Running(server, url, *made)) as served:
        yield served


def test_every_route_is_shown_with_its_body_its_answer_and_its_key(echo: Running) -> None:
    document = httpx2.get(f"{echo.url}/openapi.json", trust_env=False).json()
    shown = document["paths"]
    for one in routes(echoing(echo.server)):
        if one.template in OPEN - {"/healthz", "/readyz", "/metrics"} or one.template.startswith("/openai"):
            continue
        operation = shown[re.sub(r":path}", "}", one.template)][one.method.lower()]
        takes_form = one.bare == "/files" or one.bare.endswith("/parts")
        assert ("requestBody" in operation) == (one.reads_json or (takes_form and one.method == "POST")), one
        for status, reply in operation["responses"].items():
            content = reply.get("content", {})
            assert content or status == "204" or (status == "200" and one.method == "DELETE"), (one, status)
            for kind, said in content.items():
                assert said["schema"], (one, status, kind)
                if kind == "application/json":
                    assert set(said["schema"]) == {"$ref"}, (one, status)
        assert "422" not in operation["responses"], one
        assert (operation.get("security") == []) == (one.scope is None), one
    for name in set(re.findall(r'"#/components/schemas/(\w+)"', str(document).replace("'", '"'))):
        body = document["components"]["schemas"][name]
        assert body.get("properties") or body.get("anyOf"), name
    assert set(document["components"]["securitySchemes"]) == {"bearer", "api-key"}


def test_the_document_is_read_by_whoever_opens_docs(echo: Running) -> None:
    page = httpx2.get(f"{echo.url}/docs", trust_env=False)
    assert page.status_code == 200
    assert "/openapi.json" in page.text
    document = httpx2.get(f"{echo.url}/openapi.json", trust_env=False).json()
    chat = document["components"]["schemas"]["ChatRequest"]
    assert chat["required"] == ["messages"]
    messages = document["components"]["schemas"]["MessageIn"]["properties"]["content"]
    assert {one.get("type") for one in messages["anyOf"]} == {"string", "array", "null"}


def test_a_body_that_the_document_allows_is_taken(echo: Running) -> None:
    document = httpx2.get(f"{echo.url}/openapi.json", trust_env=False).json()
    schema = {"$ref": "#/components/schemas/ChatRequest", "components": document["components"]}
    judge = jsonschema_rs.validator_for(schema)
    said: list[tuple[Any, bool]] = [
        ({"content": "a"}, True),
        ({"content": [{"type": "text", "text": "a"}]}, True),
        ({"content": [{"type": "image_url", "text": "a"}]}, False),
        ({"content": 5}, False),
        ({"content": "a", "role": "wizard"}, False),
    ]
    with httpx2.Client(headers={"authorization": f"Bearer {echo.key}"}, trust_env=False) as http:
        for message, good in said:
            body = {"model": "base", "messages": [{"role": "user", **message}]}
            reply = http.post(f"{echo.url}/v1/chat/completions", json=body)
            assert (judge.is_valid(body), reply.status_code) == (good, 200 if good else 400), reply.text
        parameters: list[tuple[dict[str, Any], bool]] = [
            ({"stop": "z"}, True),
            ({"stop": []}, True),
            ({"stop": None}, True),
            ({"stop": 5}, False),
            ({"tool_choice": "none"}, True),
            ({"tool_choice": "some"}, False),
            ({"response_format": {"type": "text"}}, True),
            ({"response_format": {}}, False),
        ]
        for more, good in parameters:
            body = {"model": "base", "messages": [{"role": "user", "content": "a"}], **more}
            reply = http.post(f"{echo.url}/v1/chat/completions", json=body)
            assert (judge.is_valid(body), reply.status_code) == (good, 200 if good else 400), (more, reply.text)


def test_answers_are_as_the_document_says(echo: Running) -> None:
    """Every operation is asked once as it should be: each is done, and its answer has the shape that was promised."""
    known, bodies = filled(echo)
    schema = loaded(echo)
    order = [kind for kind, _ in GOOD.items()]

    def place(operation: Any) -> tuple[int, int]:
        one = Route(operation.method.upper(), operation.path, False)
        return operation.method == "delete", order.index(kind_of(one)) if kind_of(one) in order else len(order)

    done: dict[str, int] = {}
    for operation in sorted((one.ok() for one in schema.get_all_operations()), key=place):
        names = {one.name: known.get(one.name, "none") for one in operation.path_parameters}
        if operation.path.endswith(("/uploads/{upload_id}/parts", "/v1/files")) and operation.method == "post":
            continue  # forms, which the other tests of files send
        body = bodies.get(kind_of(Route(operation.method.upper(), operation.path, True)))
        query = {one.name: WANTED[one.name] for one in operation.query if one.is_required}
        sent = {} if body is None else {"body": body, "media_type": "application/json"}
        case = operation.Case(path_parameters=names, query=query, **sent)
        reply = case.call_and_validate(headers={"authorization": f"Bearer {echo.admin_key}"}, checks=CHECKS)
        done[operation.label] = reply.status_code
    refused = {label for label, status in done.items() if status >= 300}
    assert {next((end for end in REFUSED if label.endswith(end)), label) for label in refused} == REFUSED
    assert len(refused) == len(REFUSED) + 1  # embeddings of a deployment too
    assert len(done) > 70


@pytest.mark.parametrize("examples", [pytest.param(1, id="few"), pytest.param(12, id="many", marks=pytest.mark.slow)])
@pytest.mark.parametrize("prefix", ["/v1", pytest.param("/openai", marks=pytest.mark.slow)])
def test_no_request_is_an_error_of_the_server_and_no_answer_is_other_than_said(
    echo: Running, prefix: str, examples: int
) -> None:
    """Schemathesis asks every operation what the document allows and what it does not."""
    filled(echo)
    asked: dict[str, set[int]] = {}
    operations = [one.ok() for one in loaded(echo, prefix).get_all_operations()]
    for operation in operations:
        check_operation(operation, echo.admin_key, examples, asked)
    assert set(asked) == {one.label for one in operations}
    assert len(asked) > 70


def check_operation(operation: Any, key: str, examples: int, asked: dict[str, set[int]]) -> None:
    generated = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    takes_anything = operation.body or operation.path_parameters or operation.query
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE) if takes_anything else (GenerationMode.POSITIVE,):

        @generated
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: schemathesis.Case) -> None:
            reply = case.call_and_validate(headers={"authorization": f"Bearer {key}"}, checks=CHECKS)
            asked.setdefault(operation.label, set()).add(reply.status_code)

        ask()


def loaded(echo: Running, prefix: str = "/v1") -> Any:
    document = httpx2.get(f"{echo.url}/openapi.json", trust_env=False).json()
    document["paths"] = {path.replace("/v1", prefix, 1): said for path, said in document["paths"].items()}
    schema = schemathesis.openapi.from_dict(document)
    schema.config.base_url = echo.url
    return schema


def filled(echo: Running) -> tuple[dict[str, str], dict[tuple[str, str], Any]]:
    """Something of every kind is made; gives the names of it all, and the bodies that name it."""
    client = echo.client(echo.admin_key)
    file = client.files.create(file=("a.jsonl", ROWS), purpose="fine-tune").id
    batch_file = client.files.create(file=("b.jsonl", b"{}\n"), purpose="batch").id
    job = client.fine_tuning.jobs.create(model="base", training_file=file).id
    upload = client.uploads.create(bytes=1, filename="a", mime_type="text/jsonl", purpose="fine-tune").id
    part = client.uploads.parts.create(upload, data=b"1").id
    batch = client.batches.create(input_file_id=batch_file, endpoint="/v1/chat/completions", completion_window="24h").id
    answer = client.responses.create(model="base", input="a").id
    deployed(echo, "none", deployment("base", capacity=1000))
    known = {"file_id": file, "job_id": job, "upload_id": upload, "batch_id": batch, "response_id": answer}
    written = json.dumps(list(GOOD.items())).replace("FILE", file).replace("BATCH", batch_file)
    bodies = {(method, path): body for (method, path), body in json.loads(written)}
    bodies["POST", "/uploads/{upload_id}/complete"] = {"part_ids": [part]}
    return {**known, **NAMES, "model": "ft:base"}, bodies
