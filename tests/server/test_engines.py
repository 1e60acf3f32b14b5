"""Engines are real child processes with real weights: who is asked for what, what happens when one dies or is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import httpx2
import openai
import psutil
import pytest
from openai import OpenAI
from serving import LABELS, Models, Serving, make_models, serving

from tunewright import chat, models
from tunewright.generate import LocalCompleter
from tunewright.server import engines as kept
from tunewright.server import models as named
from tunewright.server.engines import Engine, Engines
from tunewright.server.models import Target

ASK = [{"role": "user", "content": "is it good?"}]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def served(known: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(tmp_path_factory.mktemp("data"), known) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Serving) -> Iterator[OpenAI]:
    with served.client() as made:
        yield made


def wait_for(condition: Callable[[], Any], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def said(client: OpenAI, model: str, **options: Any) -> str | None:
    asked = {"model": model, "messages": ASK, "temperature": 0, "max_tokens": 20, **options}
    return client.chat.completions.create(**asked).choices[0].message.content


def engine_of(served: Serving, name: str) -> Any:
    return served.server.engines._engines.get(served.target(name).engine)


def offline(known: Models, name: str) -> str:
    """What a model says when it is loaded by itself, its adapter merged."""
    folder = known.folders.get(name)
    model = models.load_folder(known.base if folder is None or name != "ft:full" else folder)
    if folder is not None and name != "ft:full":
        model = models.merge(model, folder)
    tokenizer = models.load_folder_tokenizer(known.base)
    completer = LocalCompleter(model, tokenizer, chat.equip(tokenizer))
    return completer.answer([chat.Message("user", "is it good?")], max_new_tokens=20)


def test_one_process_serves_a_base_and_its_adapters_each_as_if_it_were_alone(
    client: OpenAI, served: Serving, known: Models
) -> None:
    names = ["base", "ft:one", "ft:two", "base", "ft:two", "ft:one"]
    answers = [said(client, name) for name in names]
    assert answers == [offline(known, name).rstrip("\N{REPLACEMENT CHARACTER}") for name in names]
    assert len(set(answers)) == 3
    assert list(served.server.engines.running()) == [served.target("base").engine]


def test_a_whole_model_has_a_process_of_its_own(client: OpenAI, served: Serving, known: Models) -> None:
    assert said(client, "ft:full") == offline(known, "ft:full").rstrip("\N{REPLACEMENT CHARACTER}")
    assert engine_of(served, "ft:full").pid != engine_of(served, "base").pid


def test_a_classifier_answers_with_a_label_and_its_base_with_text(client: OpenAI) -> None:
    assert said(client, "ft:sorter") in LABELS
    assert said(client, "base") not in LABELS


def test_requests_at_once_are_answered_as_one_by_one(client: OpenAI) -> None:
    names = ["base", "ft:one", "ft:two", "ft:sorter"] * 2
    alone = [said(client, name) for name in names]
    together: dict[int, str | None] = {}
    threads = [
        threading.Thread(target=lambda place=place, name=name: together.update({place: said(client, name)}))
        for place, name in enumerate(names)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[place] for place in range(len(names))] == alone


def test_an_adapter_that_renders_otherwise_is_not_served(served: Serving, client: OpenAI, known: Models) -> None:
    rendering = known.folders["ft:two"] / "rendering.json"
    text = rendering.read_text()
    broken = known.folders["ft:two"].with_name("broken")
    shutil.copytree(known.folders["ft:two"], broken)
    (broken / "rendering.json").write_text(text.replace('"template_sha256": "', '"template_sha256": "0'))
    start = served.target("base")
    with served.server.store.begin() as connection:
        named.record(connection, "ft:broken", job_id="x", start=start, folder=str(broken), kind="adapter")
    with pytest.raises(openai.InternalServerError, match="template is not the one of training") as caught:
        said(client, "ft:broken")
    assert caught.value.code == "model_not_available"
    assert said(client, "base"), "the engine goes on"


def test_a_model_that_cannot_be_loaded_says_why(served: Serving, client: OpenAI, tmp_path: Path) -> None:
    named.add_base(served.server.store, "gone", str(tmp_path / "nothing"))
    with pytest.raises(openai.InternalServerError, match="no such folder") as caught:
        said(client, "gone")
    assert caught.value.code == "model_not_available"
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_an_engine_that_dies_tells_its_clients_and_another_takes_its_place(client: OpenAI, served: Serving) -> None:
    said(client, "base")
    before = engine_of(served, "base").pid
    stream = client.chat.completions.create(model="base", messages=ASK, max_tokens=900, stream=True, n=20)
    next(stream)
    failed: list[openai.APIStatusError] = []

    def ask() -> None:
        try:
            said(client, "base", n=128, max_tokens=900)
        except openai.APIStatusError as error:
            failed.append(error)

    waiting = threading.Thread(target=ask)
    waiting.start()
    wait_for(lambda: engine_of(served, "base").asked == 2)
    os.kill(before, signal.SIGKILL)
    waiting.join()
    with pytest.raises(openai.APIError, match="Send it again"):
        list(stream)
    assert (failed[0].status_code, failed[0].code) == (503, "engine_ended")
    assert failed[0].response.headers["retry-after"] == "1"
    assert said(client, "ft:one")
    assert engine_of(served, "base").pid != before


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_engine(served: Serving, client: OpenAI, stream: bool) -> None:
    said(client, "base")
    engine = engine_of(served, "base")
    asked = {"model": "base", "messages": ASK, "max_tokens": 900, "n": 128}
    if stream:
        answer = client.chat.completions.create(**asked, stream=True)
        next(answer)
        assert engine.asked == 1
        answer.close()
    else:
        headers = {"authorization": f"Bearer {served.key}"}
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{served.url}/v1/chat/completions", json=asked, headers=headers, timeout=0.5)
    wait_for(lambda: engine.asked == 0, timeout_s=10)
    began = time.monotonic()
    said(client, "base", max_tokens=1)
    assert time.monotonic() - began < 5, "128 answers of 900 tokens take longer"


def test_an_engine_holds_so_many_adapters_and_no_more(
    known: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunewright.server.engines.ADAPTERS", 1)
    with serving(tmp_path, known) as served, served.client() as client:
        answers = [said(client, name) for name in ("ft:one", "ft:two", "ft:one", "base")]
        assert answers[0] == answers[2]
        with httpx2.Client(transport=httpx2.HTTPTransport(uds=str(engine_of(served, "base")._socket))) as direct:
            assert len(direct.get("http://engine/healthz").json()["adapters"]) == 1


@pytest.mark.slow
def test_the_engine_that_was_asked_longest_ago_makes_room_and_an_idle_one_ends(known: Models, tmp_path: Path) -> None:
    with serving(tmp_path, known, engines=1, engine_idle_s=2.0) as served, served.client() as client:
        said(client, "base")
        first = engine_of(served, "base").pid
        said(client, "ft:full")
        assert list(served.server.engines.running()) == [served.target("ft:full").engine]
        assert not psutil.pid_exists(first)
        last = engine_of(served, "ft:full").pid
        wait_for(lambda: not served.server.engines.running())  # nobody asks
        wait_for(lambda: not psutil.pid_exists(last))
    assert "engine" in (tmp_path / "engines" / f"{served.target('ft:full').engine}.log").read_text()


# --- without processes: who ends when ---


class Bare(Engine):
    """An engine without a process, which ends when it is let."""

    there: ClassVar[list[str]] = []
    """Those that are there, by name."""
    may_end: ClassVar[dict[str, asyncio.Event]] = {}
    failing: ClassVar[set[str]] = set()

    def __init__(self, target: Target, log: Path) -> None:
        super().__init__(target, log)
        self.there.append(target.name)

    async def _start(self) -> None:
        pass

    async def stop(self) -> None:
        name = self._target.name
        if name in self.may_end:
            await self.may_end[name].wait()
        await super().stop()
        self.there.remove(name)
        if name in self.failing:
            raise OSError("it does not want to")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> type[Bare]:
    Bare.there, Bare.may_end, Bare.failing = [], {}, set()
    monkeypatch.setattr(kept, "Engine", Bare)
    return Bare


def whole(name: str) -> Target:
    return Target(name, name, name, None, None, "base", 0)


async def once(engines: Engines, name: str) -> None:
    async with engines._asked(whole(name)):
        pass


async def soon(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def test_an_engine_that_makes_room_ends_and_counts_though_who_wanted_the_room_has_left(
    bare: type[Bare], tmp_path: Path
) -> None:
    async def run() -> None:
        async with contextlib.aclosing(Engines(tmp_path, most=1)) as engines:
            async with engines._asked(whole("one")):
                leaver = asyncio.create_task(once(engines, "two"))
                await soon(lambda: not engines._engines)  # "one" takes no more requests
                leaver.cancel()
                await asyncio.wait([leaver])
                assert list(engines.running().values()) == [1]
                third = asyncio.create_task(once(engines, "three"))
                await asyncio.sleep(0.05)
                assert bare.there == ["one"], "there is no room for another"
            await asyncio.wait_for(third, 10)
            assert bare.there == ["three"]
        assert bare.there == []

    asyncio.run(run())


def test_engines_that_are_ending_are_ended_with_the_rest(bare: type[Bare], tmp_path: Path) -> None:
    async def run() -> None:
        engines = Engines(tmp_path, most=1)
        async with contextlib.AsyncExitStack() as asking:
            await asking.enter_async_context(engines._asked(whole("one")))
            leaver = asyncio.create_task(once(engines, "two"))
            await soon(lambda: not engines._engines)
            leaver.cancel()
            await asyncio.wait([leaver])
            await engines.aclose()
            assert bare.there == []

    asyncio.run(run())


def test_an_engine_that_is_asked_while_another_idle_one_ends_goes_on(bare: type[Bare], tmp_path: Path) -> None:
    async def run() -> None:
        async with contextlib.aclosing(Engines(tmp_path, most=3, idle_s=0.2)) as engines:
            bare.may_end["one"] = asyncio.Event()
            await once(engines, "one")
            await once(engines, "two")
            for engine in engines._engines.values():
                engine.last = time.monotonic()  # idle for long enough at the same time
            await soon(lambda: whole("one").engine not in engines._engines)  # it is ending
            async with engines._asked(whole("two")):
                bare.may_end["one"].set()
                await soon(lambda: bare.there == ["two"])
                await asyncio.sleep(0.2)
                assert bare.there == ["two"], "it is being asked"
            await soon(lambda: not bare.there)

    asyncio.run(run())


def test_an_engine_that_fails_to_end_does_not_keep_the_idle_ones_from_it(
    bare: type[Bare], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with contextlib.aclosing(Engines(tmp_path, most=3, idle_s=0.1)) as engines:
            bare.failing.add("one")
            for name in ("one", "two"):
                await once(engines, name)
            await soon(lambda: not bare.there)
            await once(engines, "three")
            await soon(lambda: not bare.there)
            assert engines.running() == {}

    asyncio.run(run())
    assert "could not be stopped" in caplog.text
    assert "does not want to" in caplog.text


def test_a_process_that_is_being_started_when_its_engine_ends_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let = threading.Event()
    spawn = Engine._spawn

    def slow(self: Engine) -> int:
        let.wait(10)
        return spawn(self)

    monkeypatch.setattr(Engine, "_spawn", slow)

    async def run() -> None:
        engine = Engine(whole("one"), tmp_path / "log")
        await asyncio.sleep(0.05)
        asyncio.get_running_loop().call_later(0.1, let.set)
        await engine.stop()
        assert engine.pid is not None
        assert engine.exit_code is not None

    asyncio.run(run())
