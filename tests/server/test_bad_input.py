"""What no client should send, on every route that there is: the server says what is wrong, in the surface's own form,
and goes on answering."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx2
import pytest
from echoing import echoing
from management_client import LOCAL, add_base, deployed, deployment
from routes import GOOD, OPEN, ROWS, Route, check_error, kind_of, routes

from endpoint_fixtures import running
from server_running import Running
from tunewright.server import keys
from tunewright.server.state import Server

JSON = {"content-type": "application/json"}


@pytest.fixture
def echo(open_server: Callable[[], Server]) -> Iterator[Running]:
    server = open_server()
    add_base(server, "base")
    made = [keys.create(server.store, scope, scope=scope) for scope in ("training", "inference", "admin")]
    with running(echoing(server)) as url, contextlib.closing(Running(server, url, *made)) as served:
        yield served


@pytest.fixture
def every(echo: Running) -> list[Route]:
    found = list(routes(echoing(echo.server)))
    assert len(found) > 130
    return found


@pytest.fixture
def one_surface(every: list[Route]) -> list[Route]:
    """Without those that are the same under another prefix."""
    return [one for one in every if not one.template.startswith("/openai")]


def client(echo: Running, key: str | None) -> httpx2.Client:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return httpx2.Client(base_url=echo.url, headers=headers, timeout=60, trust_env=False)


def test_every_route_wants_a_key(echo: Running, every: list[Route]) -> None:
    for key in (None, "tw-wrong-key-wrong-key"):
        with client(echo, key) as http:
            for one in every:
                if one.template not in OPEN:
                    # what the body is worth is nobody's business without a key
                    check_error(http.request(one.method, one.path, content=b"{not json", headers=JSON), 401)
    with client(echo, None) as http:
        for path in OPEN:
            assert http.get(path).status_code == 200, path


def test_every_route_wants_a_key_of_its_scope(echo: Running, every: list[Route]) -> None:
    opens = {"training": {"training", "inference"}, "inference": {"inference"}}
    for scope, key in (("training", echo.key), ("inference", echo.inference_key)):
        with client(echo, key) as http:
            for one in every:
                if one.scope is not None and one.scope not in opens[scope]:
                    check_error(http.request(one.method, one.path, content=b"{}", headers=JSON), 403)


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"null",
        b"7",
        b'"text"',
        b"\xff\xfe{}",
        b'\xef\xbb\xbf{"model": "base"}',
        b'{"a": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"{'a': 1}",
        b'{"a": "\x00"}',
    ],
    ids=lambda body: repr(body[:12]),
)
def test_every_route_that_reads_json_refuses_what_is_none(echo: Running, every: list[Route], body: bytes) -> None:
    with client(echo, echo.admin_key) as http:
        read = [one for one in every if one.reads_json]
        assert len(read) > 40
        for one in read:
            check_error(http.request(one.method, one.path, content=body, headers=JSON), 400)


def test_what_is_wrong_with_json_is_said(echo: Running) -> None:
    with client(echo, echo.admin_key) as http:
        for path in ("/v1/uploads", "/openai/fine_tuning/jobs", "/v1/chat/completions", "/v1/responses"):
            for body, said in (
                (b'{"a": 1,}', "line 1 column 9"),
                (b"[" * 1000, "recursion limit exceeded"),
                (b'{"a": "\\ud800"}', "hex escape"),
                (b'{"a": 1', "EOF while parsing an object"),
            ):
                reply = http.post(path, content=body, headers=JSON)
                check_error(reply, 400)
                assert said in reply.json()["error"]["message"], reply.text


def test_arguments_of_a_call_that_nest_for_ever(echo: Running) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":' * 100_000}}
    asked = {"model": "base", "messages": [{"role": "assistant", "tool_calls": [call]}]}
    with client(echo, echo.admin_key) as http:
        check_error(http.post("/v1/chat/completions", json=asked), 400)


@pytest.mark.parametrize("body", [b'{"model": NaN}', b'{"model": -Infinity}'])
def test_what_only_python_writes_is_no_json(echo: Running, one_surface: list[Route], body: bytes) -> None:
    """Where FastAPI reads; the routes of completions pass over what they do not know, whatever it is."""
    with client(echo, echo.admin_key) as http:
        for one in one_surface:
            if one.reads_json:
                reply = http.request(one.method, one.path, content=body, headers=JSON)
                check_error(reply, 400, *((404,) if "{deployment}" in one.bare else ()))


def test_what_is_not_offered(echo: Running, every: list[Route]) -> None:
    methods: dict[str, set[str]] = {}
    for one in every:
        methods.setdefault(one.path, set()).add(one.method)
    with client(echo, echo.admin_key) as http:
        for path, offered in methods.items():
            if path not in OPEN:
                for method in {"PUT", "PATCH", "TRACE"} - offered:
                    check_error(http.request(method, path), 405)
        for path in (
            "/v1",
            "/v1/",
            "/v1/dreams",
            "/v2/models",
            "/openai/dreams",
            "/openai/v1/files/",
            "/%00",
            "/v1//files",
        ):
            check_error(http.get(path), 404)
        for path in ("/subscriptions", "/Subscriptions/x", f"{LOCAL}/dreams", "/subscriptions/%00/locations/x"):
            check_error(http.get(path), 404)


def test_a_compressed_body_is_not_read(echo: Running) -> None:
    import gzip

    body = gzip.compress(b'{"model": "base", "messages": [{"role": "user", "content": "a"}]}')
    with client(echo, echo.admin_key) as http:
        for path in ("/v1/chat/completions", "/openai/files", f"{LOCAL}/deployments/x"):
            method = "PUT" if path.startswith("/sub") else "POST"
            reply = http.request(method, path, content=body, headers={**JSON, "content-encoding": "gzip"})
            check_error(reply, 415)


@pytest.mark.parametrize("host", ["[", "a b", "x:y:z", "\u00e9".encode(), "", "a/../b?c#d"])
def test_a_host_that_is_none(echo: Running, host: str | bytes) -> None:
    with client(echo, echo.admin_key) as http:
        for path, statuses in (("/v1/dreams", (404,)), ("/v1/files/none", (404,)), (f"{LOCAL}/dreams", (404,))):
            check_error(http.get(path, headers=[("host", host)]), *statuses)
        for path in (LOCAL, "/v1/models"):
            reply = http.get(path, headers=[("host", host)])
            assert reply.status_code in (200, 400), reply.text
        check_error(httpx2.get(f"{echo.url}/v1/models", headers=[("host", host)], trust_env=False), 401)


QUERIES = [
    "limit=-1",
    "limit=0",
    "limit=1e1",
    "limit=abc",
    "limit=" + "9" * 31,
    "limit=" + "9" * 5000,
    "limit=%00",
    "after=none",
    "after=%00",
    "after=%ED%A0%80",
    "after=" + "x" * 5000,
    "order=sideways",
    "purpose=%00",
    "purpose=" + "x" * 100,
    "start_time=-1",
    "start_time=" + "9" * 31,
    "end_time=yesterday",
    "bucket_width=1m",
    "page=page_2026-02-30",
]
WANT_QUERIES = {"/organization/usage/completions"}
"""What is refused without a query."""
HARMLESS = [
    "metadata[%00]=a",
    "metadata[a]=%00",
    "metadata[]=a",
    "metadata[a]",
    "metadata[a][b]=c",
    "metadata[%0a]=%ED%A0%80",
    "metadata[" + "x" * 5000 + "]=" + "y" * 5000,
    "metadata=null&metadata[a]=b",
    "%00=%00",
    "&".join(f"metadata[k{number}]=v" for number in range(500)),
    "&" * 5000,
]


def test_every_route_with_queries_that_nobody_means(echo: Running, one_surface: list[Route]) -> None:
    known = {query.partition("=")[0] for query in QUERIES}
    with client(echo, echo.admin_key) as http:
        document = http.get("/openapi.json").json()["paths"]
        for one in one_surface:
            if one.method != "GET":
                continue
            operation = document.get(f"/v1{one.bare}", document.get(one.template, {})).get("get", {})
            takes = {said["name"] for said in operation.get("parameters", ()) if said["in"] == "query"}
            assert takes <= known, f"{one.template} has a parameter that is not tried here: {takes - known}"
            there = http.get(one.path).status_code
            for query in QUERIES:
                reply = http.get(f"{one.path}?{query}")
                if query.partition("=")[0] in takes:
                    check_error(reply, 400, *((there,) if there == 404 else ()))
                else:
                    assert reply.status_code == there, (one, query, reply.text)
            for query in HARMLESS:
                assert http.get(f"{one.path}?{query}").status_code in (there, 400), (one, query)


NAMES = [
    "%00",
    "a%00b",
    "%ED%A0%80",
    "%FF",
    "..%2F..%2F..%2Fetc%2Fpasswd",
    "%0d%0ax-injected:%20yes",
    "%22%27%5C",
    "%F0%9F%98%80",
    "%E2%80%AE",
    "x" * 5000,
]


def test_every_route_with_names_that_nobody_has(echo: Running, one_surface: list[Route]) -> None:
    import re

    with client(echo, echo.admin_key) as http:
        for one in one_surface:
            for parameter in re.findall(r"\{(\w+)", one.template):
                for name in NAMES:
                    path = Route(
                        one.method,
                        one.template.replace(f"{{{parameter}}}", name).replace(f"{{{parameter}:path}}", name),
                        False,
                    ).path
                    reply = http.request(one.method, path, content=b"{}", headers=JSON)
                    assert "x-injected" not in reply.headers
                    if reply.status_code >= 300:
                        check_error(reply, 400, 404, 405)


HALF, NUL = "\ud800", "\x00"
BOMBS: list[Any] = [
    HALF,
    f"a{NUL}b",
    "",
    "x" * 100_000,
    "\u202e\U0001f600\u2028",
    "\x1b[2J\r\nx-injected: yes",
    "%s{0}{{x}}",
    None,
    True,
    -1,
    2**63,
    10**400,
    0.5,
    [],
    {},
    [[[[]]]],
    {HALF: 1},
    {NUL: NUL},
    {f"k{number}": "v" for number in range(1000)},
    {"k" * 100_000: "v"},
    {"k": {"k": {"k": 7}}},
]
RAW = {"HUGE": b"1e400", "DEEP": b"[" * 150 + b"]" * 150, "DIGITS": b"9" * 4000, "TWICE": b'{"a": 1, "a": "\\u0000"}'}
"""What Python's own writer does not write."""
ALL = (*BOMBS, *RAW)
FEW = (HALF, f"a{NUL}b", {HALF: 1}, "HUGE")
"""Those that were errors of the server somewhere."""


def broken(body: Any, bombs: Sequence[Any]) -> Iterator[Any]:
    """The body with each of its parts in turn exchanged for each bomb, and with a key too many."""
    for bomb in bombs:
        yield bomb
        yield {**body, "unknown": bomb} if isinstance(body, dict) else [*body, bomb]
        for path in places(body):
            exchanged = copy.deepcopy(body)
            holder = exchanged
            for step in path[:-1]:
                holder = holder[step]
            holder[path[-1]] = bomb
            yield exchanged


def places(value: Any) -> Iterator[tuple[Any, ...]]:
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield (key,)
        for rest in places(part):
            yield (key, *rest)


def written(body: Any) -> bytes:
    raw = json.dumps(body).encode()
    for name, value in RAW.items():
        raw = raw.replace(f'"{name}"'.encode(), value)
    return raw


@pytest.mark.parametrize("bombs", [pytest.param(FEW, id="few"), pytest.param(ALL, id="all", marks=pytest.mark.slow)])
def test_every_part_of_every_body(
    echo: Running, every: list[Route], one_surface: list[Route], bombs: Sequence[Any]
) -> None:
    """Nothing that stands in a body is an error of the server, and nothing that was kept makes a later answer one."""
    admin = echo.client(echo.admin_key)
    known = {"FILE": admin.files.create(file=("a.jsonl", ROWS), purpose="fine-tune").id}
    known["BATCH"] = admin.files.create(file=("b.jsonl", b"{}\n"), purpose="batch").id
    deployed(echo, "none", deployment("base", capacity=100_000))
    read = [one for one in one_surface if one.reads_json]
    assert {kind_of(one) for one in read} == set(GOOD)
    with client(echo, echo.admin_key) as http:
        for one in sorted(read, key=lambda one: list(GOOD).index(kind_of(one))):
            good = written(GOOD[kind_of(one)])
            for name, id in known.items():
                good = good.replace(name.encode(), id.encode())
            reply = http.request(one.method, one.path, content=good, headers=JSON)
            if one.bare not in ("/uploads/{upload_id}/complete",) and "embeddings" not in one.bare:
                assert reply.status_code in (200, 201, 204), (one, reply.text)
            for body in broken(json.loads(good), bombs):
                reply = http.request(one.method, one.path, content=written(body), headers=JSON)
                assert "x-injected" not in reply.headers
                if reply.status_code >= 300:
                    check_error(reply, 400, 404, 409, 429)
                assert len(reply.content) < 500_000
        for one in every:
            if one.method == "GET" and one.scope is not None:
                reply = http.get(one.path)
                assert reply.status_code in ((400,) if one.bare in WANT_QUERIES else (200, 404)), (one, reply.text)
                reply.json()
