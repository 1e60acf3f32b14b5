"""Batches, driven by the unchanged `openai` SDK; the engines echo, so that every answer is known."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from serving import Models, Serving, make_models, serving
from sqlalchemy import select, update
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from tunewright.endpoint.shapes import ApiError
from tunewright.server import batches, files, keys, tables
from tunewright.testing import EchoEngines


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "POLL_S", 0.02)


class Slow(EchoEngines):
    """Answers so many requests, and then only when it is let go on."""

    def __init__(self, quick: int = 0) -> None:
        super().__init__()
        self.quick = quick
        self.begun = 0
        self.go_on = threading.Event()

    async def ask(self, target: Any, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        self.begun += 1
        while len(self.asked) >= self.quick and not self.go_on.is_set():
            await asyncio.sleep(0.01)
        return await super().ask(target, path, body)


class Flaky(EchoEngines):
    """Its first answer is that it has ended."""

    async def ask(self, target: Any, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        reply = await super().ask(target, path, body)
        if len(self.asked) == 1:
            raise ApiError(503, "The engine ended.", kind="server_error", code="engine_ended")
        return reply


class Broken(EchoEngines):
    """Its third answer is an error, once."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.errors = [error]

    async def ask(self, target: Any, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        if len(self.asked) == 2 and self.errors:
            raise self.errors.pop()
        return await super().ask(target, path, body)


AWAY = OperationalError("select", {}, Exception("the database is away"))


@pytest.fixture
def echo(known: Models, tmp_path: Path) -> Iterator[Serving]:
    with serving(tmp_path, known, echo=EchoEngines()) as running:
        yield running


def line(custom_id: str, said: str, **change: Any) -> dict[str, Any]:
    body = {"model": "base", "messages": [{"role": "user", "content": said}]}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body, **change}


def upload(client: OpenAI, lines: list[Any], purpose: Any = "batch") -> str:
    text = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines)
    return client.files.create(file=("batch.jsonl", text.encode()), purpose=purpose).id


def start(client: OpenAI, lines: list[Any], **options: Any) -> Any:
    given: Any = {"endpoint": "/v1/chat/completions", "completion_window": "24h", **options}
    return client.batches.create(input_file_id=upload(client, lines), **given)


def wait(client: OpenAI, batch_id: str, *statuses: str) -> Any:
    end = time.monotonic() + 30
    while (batch := client.batches.retrieve(batch_id)).status not in statuses:
        assert time.monotonic() < end, batch
        time.sleep(0.02)
    return batch


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def lines_of(client: OpenAI, file_id: str) -> list[dict[str, Any]]:
    return [json.loads(one) for one in client.files.content(file_id).text.splitlines()]


def test_requests_are_answered_one_by_one_into_a_file(echo: Serving) -> None:
    with echo.client() as client:
        lines = [line("a", "one"), line("b", "two"), line("c", "x", body={"model": "gone", "messages": []})]
        batch = start(client, lines, metadata={"who": "me"})
        assert (batch.status, batch.object, batch.metadata) == ("validating", "batch", {"who": "me"})
        done = wait(client, batch.id, "completed")
        assert done.request_counts.to_dict() == {"total": 3, "completed": 2, "failed": 1}
        assert done.expires_at == done.created_at + 86400
        assert done.in_progress_at
        assert done.finalizing_at
        assert done.completed_at
        answers = lines_of(client, done.output_file_id)
        assert [one["custom_id"] for one in answers] == ["a", "b"]
        assert answers[0]["response"]["status_code"] == 200
        assert answers[0]["response"]["body"]["choices"][0]["message"]["content"] == "one"
        [failed] = lines_of(client, done.error_file_id)
        assert (failed["custom_id"], failed["response"]["status_code"]) == ("c", 400)
        assert failed["response"]["body"]["error"]["param"] == "messages"
        assert client.files.retrieve(done.output_file_id).purpose == "batch_output"
        assert [one.id for one in client.batches.list()] == [batch.id]
        assert not list((echo.server.settings.data / "batches").iterdir())


def test_the_older_route_can_be_batched_too(echo: Serving) -> None:
    with echo.client() as client:
        asked = line("a", "", url="/v1/completions", body={"model": "ft:one", "prompt": "on"})
        done = wait(client, start(client, [asked], endpoint="/v1/completions").id, "completed")
        [answer] = lines_of(client, done.output_file_id)
        assert answer["response"]["body"]["choices"][0]["text"] == "on"


@pytest.mark.parametrize(("endpoint", "url"), [("/chat/completions", "/chat/completions"),
                                               ("/v1/chat/completions", "/chat/completions")])  # fmt: skip
def test_azure_leaves_the_version_out_of_a_batch(echo: Serving, endpoint: str, url: str) -> None:
    with echo.azure() as client:
        done = wait(client, start(client, [line("a", "one", url=url)], endpoint=endpoint).id, "completed")
        assert done.endpoint == endpoint
        [answer] = lines_of(client, done.output_file_id)
        assert answer["response"]["body"]["choices"][0]["message"]["content"] == "one"


def test_a_file_that_is_wrong_fails_the_batch_with_its_lines(echo: Serving) -> None:
    with echo.client() as client:
        lines: list[Any] = ["{", "[1]", line("a", "x"), line("a", "y"), line("b", "x", url="/v1/completions")]
        lines += [line("c", "x", method="GET"), {"custom_id": "d"}]
        batch = wait(client, start(client, lines).id, "failed")
        assert [(one.line, one.code) for one in batch.errors.data] == [
            (1, "invalid_json_line"),
            (2, "invalid_json_line"),
            (4, "duplicate_custom_id"),
            (5, "mismatched_endpoint"),
            (6, "invalid_value"),
            (7, "missing_required_parameter"),
        ]
        assert batch.failed_at


def test_what_cannot_be_a_batch_is_refused(echo: Serving) -> None:
    with echo.client() as client:
        given: Any = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
        with pytest.raises(openai.NotFoundError):
            client.batches.create(input_file_id="file-none", **given)
        other = upload(client, [line("a", "x")], purpose="fine-tune")
        with pytest.raises(openai.BadRequestError, match="needs 'batch'"):
            client.batches.create(input_file_id=other, **given)
        with pytest.raises(openai.BadRequestError):
            start(client, [line("a", "x")], endpoint="/v1/embeddings")
        with pytest.raises(openai.NotFoundError):
            client.batches.retrieve("batch_none")
        done = wait(client, start(client, [line("a", "x")]).id, "completed")
        with pytest.raises(openai.BadRequestError, match="completed already"):
            client.batches.cancel(done.id)


def renewed_at(served: Serving, batch_id: str) -> float:
    with served.server.store.begin() as connection:
        query = select(tables.batches.c.heartbeat_at).where(tables.batches.c.id == batch_id)
        return float(connection.execute(query).scalar_one())


def test_a_cancelled_batch_keeps_what_was_answered(known: Models, tmp_path: Path) -> None:
    slow = Slow(quick=2)
    with serving(tmp_path, known, echo=slow) as served, served.client() as client:
        batch = start(client, [line(str(number), "x") for number in range(5)])
        wait_for(lambda: client.batches.retrieve(batch.id).request_counts.completed == 2)
        assert client.batches.cancel(batch.id).status == "cancelling"
        for _ in range(2):  # it hears of it when it renews its claim, and has heard when it does so again
            before = renewed_at(served, batch.id)
            wait_for(lambda before=before: renewed_at(served, batch.id) > before)
        slow.go_on.set()
        done = wait(client, batch.id, "cancelled")
        assert done.cancelling_at
        assert done.cancelled_at
        assert 2 <= len(lines_of(client, done.output_file_id)) < 5


def test_a_batch_goes_on_behind_its_last_answer_after_a_restart(known: Models, tmp_path: Path) -> None:
    with serving(tmp_path, known, echo=Slow(quick=2)) as served, served.client() as client:
        batch = start(client, [line(str(number), f"said {number}") for number in range(4)])
        wait_for(lambda: client.batches.retrieve(batch.id).request_counts.completed == 2)
    spool = tmp_path / "batches" / f"{batch.id}.jsonl"
    spool.write_text(spool.read_text() + '{"custom_id": "2", "resp')  # as a server that was killed leaves it
    again = EchoEngines()
    with serving(tmp_path, known, echo=again, fill_again=False) as served, served.client() as client:
        done = wait(client, batch.id, "completed")
        assert done.request_counts.to_dict() == {"total": 4, "completed": 4, "failed": 0}
        assert [one["custom_id"] for one in lines_of(client, done.output_file_id)] == ["0", "1", "2", "3"]
        assert len(again.asked) == 2


def test_an_engine_that_ended_is_asked_again(known: Models, tmp_path: Path) -> None:
    with serving(tmp_path, known, echo=Flaky()) as served, served.client() as client:
        done = wait(client, start(client, [line("a", "x")]).id, "completed")
        assert done.request_counts.completed == 1


def test_a_batch_that_another_server_took_is_left_alone(known: Models, tmp_path: Path) -> None:
    slow = Slow()
    with serving(tmp_path, known, echo=slow) as served, served.client() as client:
        batch = start(client, [line("a", "x"), line("b", "x")])
        wait_for(lambda: slow.begun)
        with served.server.store.begin() as connection:
            connection.execute(update(tables.batches).values(claimed_by="another", heartbeat_at=time.time()))
        time.sleep(0.2)  # it hears of it with its next renewal
        slow.go_on.set()
        wait_for(lambda: slow.asked)
        time.sleep(0.1)
        assert client.batches.retrieve(batch.id).status == "in_progress"
        assert len(slow.asked) == 1


def test_a_batch_out_of_its_time_expires(echo: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "DAY_S", -1)
    with echo.client() as client:
        done = wait(client, start(client, [line("a", "x")]).id, "expired")
        assert (done.output_file_id, done.request_counts.total) == (None, 1)
        assert done.expired_at


def test_a_file_that_is_too_large_is_no_batch(echo: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    assert batches.INPUT_BYTES == 200 << 20
    monkeypatch.setattr(batches, "INPUT_BYTES", 1 << 20)
    with echo.client() as client:
        with pytest.raises(openai.BadRequestError, match=r"at most 1,048,576 \(1 MB\)") as refused:
            start(client, [line("a", "x" * (1 << 20))])
        assert (refused.value.param, refused.value.code) == ("input_file_id", "file_too_large")
        assert client.batches.list().data == []


@pytest.mark.parametrize("long", ["x" * (3 << 20), " " * (3 << 20)])
def test_a_line_that_is_too_long_is_named(echo: Serving, monkeypatch: pytest.MonkeyPatch, long: str) -> None:
    """No more of it is read than is needed to see that, and lines are counted as an editor counts them."""
    monkeypatch.setattr(batches, "LINE_BYTES", 1 << 20)
    read: list[int] = []
    wrong = batches._wrong
    monkeypatch.setattr(batches, "_wrong", lambda text, *rest: (read.append(len(text)), wrong(text, *rest))[1])
    with echo.client() as client:
        batch = wait(client, start(client, [line("a", "x"), "", "{", long, line("b", "x")]).id, "failed")
        said = [(one.line, one.code) for one in batch.errors.data]
        assert said == [(3, "invalid_json_line"), (4, "line_too_long")]
        assert "1,048,576 bytes (1 MB)" in batch.errors.data[1].message
        assert max(read) < 1 << 20


def test_a_line_of_the_most_bytes_is_answered(echo: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = json.dumps(line("a", "x" * 500))
    monkeypatch.setattr(batches, "LINE_BYTES", len(whole) + 1)  # with its line break
    with echo.client() as client:
        assert wait(client, start(client, [whole, line("b", "x")]).id, "completed").request_counts.completed == 2


def test_a_batch_is_its_keys_and_the_administrators(echo: Serving) -> None:
    store = echo.server.store
    made = {name: keys.create(store, name, scope=name) for name in ("inference", "admin")}
    other, inference, admin = (
        echo.client(api_key=key)
        for key in (keys.create(store, "other", scope="training"), made["inference"], made["admin"])
    )
    with echo.client() as client, other, inference, admin:
        batch = wait(client, start(client, [line("a", "x")]).id, "completed")
        for call in (other.batches.retrieve, other.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                call(batch.id)
        assert other.batches.list().data == []
        others = wait(other, start(other, [line("a", "x")]).id, "completed")
        assert [one.id for one in client.batches.list()] == [batch.id]
        assert [one.id for one in admin.batches.list()] == [others.id, batch.id]
        assert admin.batches.retrieve(batch.id) == batch
        with pytest.raises(openai.BadRequestError, match="completed already"):
            admin.batches.cancel(batch.id)
        given: Any = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
        asked: list[Callable[[], Any]] = [
            lambda: inference.batches.create(input_file_id=batch.input_file_id, **given),
            lambda: inference.batches.retrieve(batch.id),
            lambda: inference.batches.cancel(batch.id),
            inference.batches.list,
        ]
        for ask in asked:
            with pytest.raises(openai.PermissionDeniedError, match="this needs one for training"):
                ask()


@pytest.mark.parametrize("error", [AWAY, InterfaceError("select", {}, Exception("closed")), PoolTimeout("none free")])
def test_a_database_that_is_away_for_a_while_ends_no_batch(known: Models, tmp_path: Path, error: Exception) -> None:
    engines = Broken(error)
    with serving(tmp_path, known, echo=engines) as served, served.client() as client:
        done = wait(client, start(client, [line(str(number), "x") for number in range(4)]).id, "completed", "failed")
        assert (done.status, done.request_counts.completed, engines.errors) == ("completed", 4, [])
        assert [one["custom_id"] for one in lines_of(client, done.output_file_id)] == ["0", "1", "2", "3"]
        assert len(engines.asked) == 4


def test_a_database_that_is_away_at_the_end_leaves_no_second_file(
    echo: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[str] = []
    write = batches.Work._write_row

    def away(self: batches.Work, connection: Any, *where: Any, **values: Any) -> None:
        if "output_file_id" in values:
            ends.append(values["status"])
            if len(ends) == 1:
                raise AWAY
        write(self, connection, *where, **values)

    monkeypatch.setattr(batches.Work, "_write_row", away)
    with echo.client() as client:
        done = wait(client, start(client, [line("a", "x")]).id, "completed", "failed")
        assert (done.status, ends) == ("completed", ["completed", "completed"])
        assert {one.id for one in client.files.list()} == {done.input_file_id, done.output_file_id}
        kept = {path.name for path in (echo.server.settings.data / "files").iterdir()}
        assert kept == {done.input_file_id, done.output_file_id}


def test_a_batch_that_fails_keeps_what_was_answered(known: Models, tmp_path: Path) -> None:
    with serving(tmp_path, known, echo=Broken(ValueError("a bug"))) as served, served.client() as client:
        bad = line("bad", "", body={"model": "gone", "messages": []})
        batch = start(client, [bad, *(line(str(number), "x") for number in range(4))])
        done = wait(client, batch.id, "failed")
        assert [one.code for one in done.errors.data] == ["server_error"]
        assert done.request_counts.to_dict() == {"total": 5, "completed": 2, "failed": 1}
        assert [one["custom_id"] for one in lines_of(client, done.output_file_id)] == ["0", "1"]
        assert [one["custom_id"] for one in lines_of(client, done.error_file_id)] == ["bad"]
        assert list((tmp_path / "batches").iterdir()) == []


def test_answers_for_which_there_is_no_space_stay_in_the_spool(echo: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_given: Any, **_options: Any) -> None:
        raise OSError("No space left on device")

    with echo.client() as client:
        given = upload(client, [line("a", "said")])
        monkeypatch.setattr(files, "written", full)
        options: Any = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
        done = wait(client, client.batches.create(input_file_id=given, **options).id, "failed")
        assert done.output_file_id is None
        spool = echo.server.settings.data / "batches" / f"{done.id}.jsonl"
        assert [json.loads(one)["custom_id"] for one in spool.read_text().splitlines()] == ["a"]


@pytest.mark.parametrize("code", ["key_revoked", "key_expired"])
def test_a_batch_ends_with_its_key(known: Models, tmp_path: Path, code: str) -> None:
    slow = Slow(quick=2)
    with serving(tmp_path, known, echo=slow) as served:
        admin = keys.create(served.server.store, "admin", scope="admin")
        with served.client() as client, served.client(api_key=admin) as over:
            batch = start(client, [line(str(number), "x") for number in range(5)])
            wait_for(lambda: slow.begun == 3)
            if code == "key_revoked":
                keys.revoke(served.server.store, "test")
            else:
                with served.server.store.begin() as connection:
                    connection.execute(update(tables.keys).where(tables.keys.c.name == "test").values(expires_at=1))
            slow.go_on.set()
            done = wait(over, batch.id, "failed", "completed")
            assert done.status == "failed"
            assert [one.code for one in done.errors.data] == [code]
            assert done.request_counts.to_dict() == {"total": 5, "completed": 3, "failed": 0}
            assert [one["custom_id"] for one in lines_of(over, done.output_file_id)] == ["0", "1", "2"]
            assert len(slow.asked) == 3
