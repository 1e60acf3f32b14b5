"""The endpoint, driven over HTTP by the unchanged `openai` SDK. Models are tiny and random; everything else is real."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from openai import OpenAI

from endpoint_fixtures import CONTEXT, CORPUS, KEY, TEST_KEY, make_tokenizer, package, running
from tunewright import chat
from tunewright.chat import Message
from tunewright.endpoint import Served, create_app, load, serve
from tunewright.endpoint.process import listen
from tunewright.endpoint.served import Classifier, choose
from tunewright.errors import EndpointError
from tunewright.generate import LocalCompleter, Token
from tunewright.run import Run, read_json, write_json

LABELS = ("positive", "negative", "a neutral one")
ASK = [{"role": "user", "content": "a warm film?"}]
BODY = {"model": "tiny", "messages": ASK}
KEYS = {KEY: True, TEST_KEY: False}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Two layers of 32 are computed faster by one thread than by several that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sorter_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return package(tmp_path_factory.mktemp("sorter"), labels=LABELS, task="classification")


@pytest.fixture(scope="module")
def writer_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return package(tmp_path_factory.mktemp("writer"))


@pytest.fixture(scope="module")
def sorter(sorter_run: Run) -> Served:
    return load(sorter_run)


@pytest.fixture(scope="module")
def writer(writer_run: Run) -> Served:
    return load(writer_run)


@pytest.fixture(scope="module")
def sorter_url(sorter: Served) -> Iterator[str]:
    with running(create_app(sorter, name="tiny", keys=KEYS)) as url:
        yield url


@pytest.fixture(scope="module")
def writer_url(writer: Served) -> Iterator[str]:
    with running(create_app(writer, name="tiny", keys=KEYS)) as url:
        yield url


@pytest.fixture(scope="module")
def sort(sorter_url: str) -> Iterator[OpenAI]:
    with sdk(sorter_url) as client:
        yield client


@pytest.fixture(scope="module")
def write(writer_url: str) -> Iterator[OpenAI]:
    with sdk(writer_url) as client:
        yield client


def sdk(url: str, key: str = KEY) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30)


def post(url: str, body: Any, key: str = KEY) -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps(body)
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    return httpx2.post(f"{url}/v1/chat/completions", content=content, headers=headers, timeout=30)


def questions(count: int) -> list[str]:
    words, rng = " ".join(CORPUS).split(), random.Random(7)
    return [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(count)]


def streamed(chunks: Any, n: int = 1) -> list[tuple[str, str | None, list[Any]]]:
    """Text, finish reason and logprobs of each choice of a stream."""
    found: list[tuple[str, str | None, list[Any]]] = [("", None, []) for _ in range(n)]
    for chunk in chunks:
        for choice in chunk.choices:
            text, reason, logprobs = found[choice.index]
            more = choice.logprobs.content if choice.logprobs else []
            found[choice.index] = (
                text + (choice.delta.content or ""), choice.finish_reason or reason, [*logprobs, *more]
            )  # fmt: skip
    return found


# --- models and shapes ---


def test_health_needs_no_key(writer_url: str) -> None:
    reply = httpx2.get(f"{writer_url}/healthz")
    assert reply.json() == {"status": "ok", "model": "tiny", "pid": os.getpid()}


def test_the_model_is_listed_under_its_name(write: OpenAI, writer_run: Run) -> None:
    [model] = write.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "tunewright")
    assert model.created == int(writer_run.rendering_file.stat().st_mtime)
    assert write.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError) as caught:
        write.models.retrieve("meta/other")
    assert caught.value.code == "model_not_found"


def test_a_reply_has_the_shape_of_openais(writer_url: str) -> None:
    reply = post(writer_url, {**BODY, "max_tokens": 3})
    said = reply.json()
    assert said.keys() == {"id", "object", "created", "model", "choices", "usage"}
    assert said["id"].startswith("chatcmpl-")
    assert (said["object"], said["model"]) == ("chat.completion", "tiny")
    [choice] = said["choices"]
    assert choice.keys() == {"index", "message", "logprobs", "finish_reason"}
    assert choice["message"].keys() == {"role", "content", "refusal"}
    assert (choice["message"]["role"], choice["message"]["refusal"], choice["logprobs"]) == ("assistant", None, None)
    assert said["usage"]["total_tokens"] == said["usage"]["prompt_tokens"] + said["usage"]["completion_tokens"]
    assert re.fullmatch(r"req_[0-9a-f]{32}", reply.headers["x-request-id"])
    assert reply.headers["openai-processing-ms"].isdigit()
    assert not [name for name in reply.headers if name.startswith("x-ratelimit")]


def test_a_stream_has_the_shape_of_openais(writer_url: str) -> None:
    body = {**BODY, "max_tokens": 4, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    reply = post(writer_url, body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    *events, done, nothing = reply.text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert chunks[-2]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 4
    assert "usage" not in post(writer_url, {**body, "stream_options": None}).text


def test_usage_counts_the_prompt_as_the_model_sees_it(write: OpenAI, writer: Served) -> None:
    reply = write.chat.completions.create(model="tiny", messages=ASK, max_tokens=3, n=2)
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(writer.prompt([Message("user", "a warm film?")]))
    assert reply.usage.completion_tokens <= 6


def test_text_parts_are_one_message_and_extras_that_change_nothing_are_ignored(write: OpenAI) -> None:
    whole = write.chat.completions.create(model="tiny", messages=ASK, temperature=0, max_tokens=12)
    parts = [{"type": "text", "text": "a warm"}, {"type": "text", "text": " film?"}]
    again = write.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": parts, "name": "ann"}], temperature=0, max_tokens=12,
        user="u1", metadata={"a": "b"}, service_tier="auto", tools=[], logit_bias={}, frequency_penalty=0,
        response_format={"type": "text"}, store=False, tool_choice="none", extra_body={"new_in_2031": 1, "n": None},
    )  # fmt: skip
    assert again.choices[0].message.content == whole.choices[0].message.content


# --- models that write text ---


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 3}, {"seed": 3, "temperature": 1.5, "top_p": 0.8}])
def test_a_stream_says_what_the_whole_reply_says(write: OpenAI, options: dict[str, Any]) -> None:
    asked = {"model": "tiny", "messages": ASK, "max_tokens": 40, "n": 2, "logprobs": True, "top_logprobs": 2, **options}
    whole = write.chat.completions.create(**asked)
    parts = streamed(write.chat.completions.create(**asked, stream=True), n=2)
    for choice, (text, reason, logprobs) in zip(whole.choices, parts, strict=True):
        assert (text, reason) == (choice.message.content, choice.finish_reason)
        assert choice.logprobs is not None
        assert logprobs == choice.logprobs.content


def test_an_answer_is_what_the_completer_writes(write: OpenAI, writer: Served) -> None:
    for question in questions(5):
        reply = write.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": question}], temperature=0, max_tokens=30
        )
        offline = writer.completer.answer([Message("user", question)], max_new_tokens=30)
        # a character that max_tokens cut in the middle is left out
        assert reply.choices[0].message.content == offline.rstrip("\N{REPLACEMENT CHARACTER}")


def test_the_default_temperature_is_one(write: OpenAI) -> None:
    def said(**options: Any) -> str | None:
        reply = write.chat.completions.create(model="tiny", messages=ASK, max_tokens=20, **options)
        return reply.choices[0].message.content

    assert said(seed=1) == said(seed=1, temperature=1) == said(seed=1, temperature=1, top_p=1)
    assert said(seed=1) != said(seed=2)
    assert said(temperature=0, seed=1) == said(temperature=0, seed=2) == said(top_p=0, seed=3)
    assert said(temperature=0) == said(temperature=1e-40)


def test_each_of_n_answers_has_its_own_seed(write: OpenAI) -> None:
    together = write.chat.completions.create(model="tiny", messages=ASK, max_tokens=20, seed=5, n=3)
    alone = [
        write.chat.completions.create(model="tiny", messages=ASK, max_tokens=20, seed=5 + number).choices[0]
        for number in range(3)
    ]
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    assert [choice.message.content for choice in together.choices] == [one.message.content for one in alone]


def test_an_answer_ends_at_the_end_of_turn_which_is_not_shown(write: OpenAI, writer: Served) -> None:
    prompt, end = writer.prompt([Message("user", "a warm film?")]), writer.completer.equipment.end_of_turn_id
    for seed in range(200):
        tokens = [*writer.completer.stream(prompt, max_new_tokens=60, temperature=1, seed=seed)]
        if tokens[-1].id == end and 3 < len(tokens) < 50:
            break
    asked = {"model": "tiny", "messages": ASK, "seed": seed, "logprobs": True}
    reply = write.chat.completions.create(**asked, max_tokens=60).choices[0]
    assert reply.finish_reason == "stop"
    assert reply.message.content == "".join(token.text for token in tokens)
    assert reply.logprobs is not None
    assert [one.logprob for one in reply.logprobs.content or []] == pytest.approx(
        [token.logprob for token in tokens[:-1]], abs=1e-5
    )
    shorter = write.chat.completions.create(**asked, max_tokens=len(tokens) - 1).choices[0]
    assert shorter.finish_reason == "length"
    assert write.chat.completions.create(**asked, max_tokens=len(tokens)).choices[0].finish_reason == "stop"


def test_logprobs_spell_the_answer_byte_by_byte(write: OpenAI, writer: Served) -> None:
    spelled = 0
    for seed in range(6):
        reply = write.chat.completions.create(
            model="tiny", messages=ASK, seed=seed, max_tokens=40, logprobs=True, top_logprobs=20
        )
        choice = reply.choices[0]
        assert choice.logprobs is not None
        content = choice.logprobs.content or []
        assert reply.usage is not None
        assert len(content) == reply.usage.completion_tokens
        raw = bytes(byte for one in content for byte in one.bytes or [])
        assert raw.decode(errors="replace").rstrip("\N{REPLACEMENT CHARACTER}") == (choice.message.content or "")
        for one in content:
            best = [other.logprob for other in one.top_logprobs]
            assert len(best) == 20
            assert best == sorted(best, reverse=True)
            assert one.logprob <= best[0]
            spelled += one.token.startswith("bytes:\\x")
    assert spelled, "no answer held a part of a character"


def test_stop_strings_are_honoured_where_they_straddle_tokens(write: OpenAI, writer: Served) -> None:
    asked = {"model": "tiny", "messages": ASK, "max_tokens": 40, "temperature": 0}
    text = write.chat.completions.create(**asked).choices[0].message.content or ""
    prompt = writer.prompt([Message("user", "a warm film?")])
    tokens = [one.text for one in writer.completer.stream(prompt, max_new_tokens=40) if one.text]
    for place in range(2, min(7, len(tokens) - 1)):
        stop = tokens[place][-1] + tokens[place + 1][0]
        wanted = text[: text.index(stop)]
        for stops in (stop, [stop], ["never said", stop, stop + "!!"]):
            choice = write.chat.completions.create(**asked, stop=stops).choices[0]
            assert (choice.message.content, choice.finish_reason) == (wanted, "stop")
            [(streamed_text, reason, _)] = streamed(write.chat.completions.create(**asked, stop=stops, stream=True))
            assert (streamed_text, reason) == (wanted, "stop")
    unfinished = text + "?"  # its beginning is held back until the answer ends without it
    assert write.chat.completions.create(**asked, stop=unfinished).choices[0].message.content == text


def test_max_tokens_may_fill_the_context_to_its_last_token(write: OpenAI, writer: Served) -> None:
    room = CONTEXT - len(writer.prompt([Message("user", "a warm film?")]))
    asked = {"model": "tiny", "messages": ASK, "seed": 1}
    reply = write.chat.completions.create(**asked, max_completion_tokens=room)
    assert reply.choices[0].message.content == write.chat.completions.create(**asked).choices[0].message.content
    with pytest.raises(openai.BadRequestError) as caught:
        write.chat.completions.create(**asked, max_tokens=room + 1)
    assert caught.value.code == "context_length_exceeded"
    assert f"maximum context length is {CONTEXT} tokens" in caught.value.message


def test_a_pretrained_model_answers_on_the_same_route(tmp_path: Path) -> None:
    run = package(tmp_path, task="pretraining", kind="gpt2")
    with running(create_app(load(run), name="tiny", keys=KEYS)) as url, sdk(url) as client:
        reply = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=5, temperature=0)
        assert reply.usage is not None
        assert reply.usage.completion_tokens <= 5


# --- models that answer with a label ---


def test_a_classifier_gives_the_label_that_evaluation_gives(sort: OpenAI, sorter: Served) -> None:
    completer = sorter.completer
    prompts = [sorter.prompt([Message("user", question)]) for question in questions(30)]
    scores = completer.score(prompts, completer.tree(LABELS))
    offline = [LABELS[max(range(len(LABELS)), key=row.__getitem__)] for row in scores]
    assert len(set(offline)) > 1, "the test would pass with a constant"
    served = [
        sort.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": question}], **({"temperature": 0} if row % 2 else {})
        ).choices[0]
        for row, question in enumerate(questions(30))
    ]
    assert [choice.message.content for choice in served] == offline
    assert {choice.finish_reason for choice in served} == {"stop"}


def test_a_classifiers_logprobs_are_the_models_own(sort: OpenAI, sorter: Served) -> None:
    completer = sorter.completer
    for question in questions(6):
        messages = [{"role": "user", "content": question}]
        choice = sort.chat.completions.create(model="tiny", messages=messages, logprobs=True, top_logprobs=20).choices[
            0
        ]
        prompt, label = sorter.prompt([Message("user", question)]), choice.message.content or ""
        *ids, end = chat.render_answer(completer.tokenizer, completer.equipment, label)
        assert choice.logprobs is not None
        content = choice.logprobs.content or []
        assert "".join(one.token for one in content) == label
        total, said = 0.0, [*ids, end]
        for place, token in enumerate(said):
            [step] = completer.stream(prompt + said[:place], max_new_tokens=1, num_top=len(completer.tokenizer))
            total += dict(step.top)[token]
            if token != end:
                assert content[place].logprob == pytest.approx(dict(step.top)[token], abs=1e-4)
                alternatives = [one.logprob for one in content[place].top_logprobs]
                assert alternatives == pytest.approx([logprob for _, logprob in step.top[:20]], abs=1e-4)
        [score] = completer.score([prompt], completer.tree([label]))
        assert total == pytest.approx(score[0], abs=1e-4)
        shown = completer.stream(prompt + ids, max_new_tokens=1, num_top=len(completer.tokenizer))
        ending = dict(next(shown).top)[end]
        assert sum(one.logprob for one in content) + ending == pytest.approx(score[0], abs=1e-4)


def test_a_classifier_streams_the_tokens_of_its_label(sort: OpenAI, sorter: Served) -> None:
    assert sorter.classifier is not None
    asked = {"model": "tiny", "messages": ASK, "logprobs": True, "top_logprobs": 3}
    choice = sort.chat.completions.create(**asked).choices[0]
    chunks = list(sort.chat.completions.create(**asked, stream=True))
    [(text, reason, logprobs)] = streamed(chunks)
    assert choice.logprobs is not None
    assert (text, reason, logprobs) == (choice.message.content, "stop", choice.logprobs.content)
    assert len(chunks) == 1 + len(logprobs) + 1


def test_max_tokens_and_stop_cut_a_label(sort: OpenAI, sorter: Served) -> None:
    assert sorter.classifier is not None
    whole = sort.chat.completions.create(model="tiny", messages=ASK).choices[0].message.content or ""
    texts = sorter.classifier.labels[LABELS.index(whole)].texts
    for size in range(1, len(texts)):
        reply = sort.chat.completions.create(model="tiny", messages=ASK, max_tokens=size)
        choice = reply.choices[0]
        assert choice.message.content == "".join(texts[:size])
        assert choice.finish_reason == ("stop" if size == len(texts) - 1 else "length")
        assert reply.usage is not None
        assert reply.usage.completion_tokens == size
    stopped = sort.chat.completions.create(model="tiny", messages=ASK, stop=whole[2:4]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (whole[:2], "stop")


def test_a_classifier_draws_where_a_temperature_asks_for_it(sort: OpenAI, sorter: Served) -> None:
    asked = {"model": "tiny", "messages": ASK, "temperature": 2, "n": 8}
    drawn = [[one.message.content for one in sort.chat.completions.create(**asked, seed=1).choices] for _ in range(2)]
    assert drawn[0] == drawn[1]
    more = [
        one.message.content for seed in (9, 17, 25) for one in sort.chat.completions.create(**asked, seed=seed).choices
    ]
    assert set(more) <= set(LABELS)
    assert len(set(more)) > 1


def test_labels_are_drawn_by_their_probabilities() -> None:
    scores = [math.log(0.2), math.log(0.7), math.log(0.1)]
    drawn = Counter(choose(scores, 1.0, 1.0, seed) for seed in range(4000))
    assert [drawn[place] / 4000 for place in range(3)] == pytest.approx([0.2, 0.7, 0.1], abs=0.03)
    colder = Counter(choose(scores, 0.5, 1.0, seed) for seed in range(4000))
    assert [colder[place] / 4000 for place in range(3)] == pytest.approx([4 / 54, 49 / 54, 1 / 54], abs=0.03)
    assert {choose(scores, 1.0, 0.5, seed) for seed in range(200)} == {1}
    assert {choose(scores, 1.0, 0.8, seed) for seed in range(200)} == {0, 1}
    assert {choose(scores, temperature, 0.0, 1) for temperature in (0.0, 1.0, 1e-300)} == {1}


def test_a_classifier_needs_room_for_its_longest_label_alone(sort: OpenAI, sorter: Served) -> None:
    assert sorter.classifier is not None
    content = "a" * (CONTEXT - sorter.classifier.longest - len(sorter.prompt([Message("user", "")])))
    for extra in ("a", "aa", "a film"):  # however the tokenizer merges, one of these is the last that fits
        size = len(sorter.prompt([Message("user", content + extra)]))
        asked = {"model": "tiny", "messages": [{"role": "user", "content": content + extra}], "max_tokens": 10_000}
        if size + sorter.classifier.longest <= CONTEXT:
            assert sort.chat.completions.create(**asked).choices[0].message.content in LABELS
        else:
            with pytest.raises(openai.BadRequestError, match="context length"):
                sort.chat.completions.create(**asked)


def test_a_label_is_shown_as_it_is_written_whatever_surrounds_its_tokens(sorter: Served) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
        "{{- 'A: <think>\n\n</think>\n\n' + m.content | lower + eos_token -}}"
        "{%- else -%}{{- m.content + '\n' -}}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}A:{%- endif -%}"
    )
    completer = LocalCompleter(sorter.completer.model, tokenizer, chat.equip(tokenizer))
    classifier = Classifier(completer, ["positive", "not so", "\N{SNOWMAN}"])
    assert ["".join(label.texts) for label in classifier.labels] == ["positive", "not so", "\N{SNOWMAN}"]
    assert all(len(label.texts) == len(label.ids) for label in classifier.labels)


# --- what is refused ---


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": "hello"}, "invalid_type", "messages"),
        ({"messages": [{"content": "a"}]}, "missing_required_parameter", "messages[0].role"),
        ({"messages": [*ASK, {"role": "robot", "content": "a"}]}, "invalid_value", "messages[1].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "invalid_type", "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "invalid_type", "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "invalid_value", "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "invalid_value", "messages[0].content"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "missing_required_parameter",
            "messages[0].tool_calls[0].id",
        ),
        ({"temperature": 2.1}, "invalid_value", "temperature"),
        ({"temperature": "0"}, "invalid_type", "temperature"),
        ({"top_p": -1}, "invalid_value", "top_p"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": 1.5}, "invalid_type", "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "invalid_parameter_combination", "max_tokens"),
        ({"n": 129}, "invalid_value", "n"),
        ({"seed": 2**64}, "invalid_value", "seed"),
        ({"stop": ["a"] * 5}, "invalid_value", "stop"),
        ({"stop": ""}, "invalid_value", "stop[0]"),
        ({"stop": [1]}, "invalid_type", "stop[0]"),
        ({"top_logprobs": 3}, "invalid_value", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        ({"stream": "yes"}, "invalid_type", "stream"),
        ({"model": None}, "invalid_type", "model"),
        ({"tools": [{"type": "function"}]}, "missing_required_parameter", "tools[0].function"),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"functions": [{"name": "f"}]}, "unsupported_parameter", "functions"),
        ({"response_format": {"type": "xml"}}, "invalid_value", "response_format"),
        ({"logit_bias": {"5": 101}}, "invalid_value", "logit_bias.5"),
        ({"logit_bias": {"99999": 1}}, "invalid_value", "logit_bias"),
        ({"frequency_penalty": 2.5}, "invalid_value", "frequency_penalty"),
        ({"modalities": ["text", "audio"], "audio": {}}, "unsupported_parameter", "modalities"),
        ({"top_k": 5}, "unsupported_parameter", "top_k"),
        ({"reasoning_effort": "high"}, "unsupported_parameter", "reasoning_effort"),
        ({"store": True}, "unsupported_parameter", "store"),
        ({"messages": [{"role": "user", "content": "a" * 900}]}, "context_length_exceeded", "messages"),
    ],
)
def test_what_cannot_be_done_is_named(writer_url: str, change: dict[str, Any], code: str, param: str) -> None:
    reply = post(writer_url, {**BODY, **change})
    assert reply.status_code == 400
    assert reply.json().keys() == {"error"}
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error")
    assert param in error["message"] or code == "context_length_exceeded"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"[" * 100_000, b"[1]", b'{"model": "\\ud800"}', b'{"temperature": 1e999}']
)
def test_a_broken_body_is_a_bad_request(writer_url: str, body: bytes) -> None:
    reply = post(writer_url, body)
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_what_the_template_refuses_is_a_bad_request(writer_run: Run) -> None:
    served = load(writer_run)
    template = served.completer.tokenizer.chat_template
    served.completer.tokenizer.chat_template = (
        "{%- if messages[0].role == 'system' -%}{{- raise_exception('no system message') -}}{%- endif -%}" + template
    )
    with running(create_app(served, name="tiny", keys=KEYS)) as url, sdk(url) as client:
        with pytest.raises(openai.BadRequestError, match="no system message") as caught:
            client.chat.completions.create(model="tiny", messages=[{"role": "system", "content": "x"}, *ASK])
        assert caught.value.param == "messages"


@pytest.mark.parametrize("key", ["wrong", KEY + "x", KEY[:-1], "\N{LATIN SMALL LETTER E WITH ACUTE}"])
def test_a_wrong_key_opens_nothing(writer_url: str, key: str) -> None:
    headers = {"authorization": f"Bearer {key}".encode("latin-1")}
    for method, path in [("GET", "/v1/models"), ("GET", "/v1/models/tiny"), ("POST", "/v1/chat/completions")]:
        reply = httpx2.request(method, writer_url + path, headers=headers)
        assert reply.status_code == 401
        assert reply.json()["error"]["code"] == "invalid_api_key"


def test_a_key_is_asked_for_before_anything_is_read(writer_url: str) -> None:
    for headers in ({}, {"authorization": KEY}, {"authorization": f"Basic {KEY}"}, {"authorization": "Bearer"}):
        reply = httpx2.post(f"{writer_url}/v1/chat/completions", content=b"{", headers=headers)
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
    with sdk(writer_url, "wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
        client.chat.completions.create(model="tiny", messages=ASK)
    assert caught.value.code == "invalid_api_key"


def test_unknown_models_routes_and_methods_answer_in_the_envelope(writer_url: str, write: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        write.chat.completions.create(model="gpt-4o", messages=ASK)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError) as caught:
        write.embeddings.create(model="tiny", input="a")
    assert caught.value.code == "unknown_url"
    for path in ("/", "/docs", "/openapi.json", "/v1/models/"):
        reply = httpx2.get(writer_url + path, headers={"authorization": f"Bearer {KEY}"})
        assert (reply.status_code, reply.json()["error"]["type"]) == (404, "invalid_request_error")
    reply = httpx2.get(f"{writer_url}/v1/chat/completions")
    assert (reply.status_code, reply.json()["error"]["code"]) == (405, "method_not_supported")
    assert reply.headers["allow"] == "POST"


class Failing(LocalCompleter):
    """Fails at its third token."""

    def stream(self, prompt: list[int], **options: Any) -> Iterator[Token]:
        for place, token in enumerate(super().stream(prompt, **options)):
            if place == 2:
                raise RuntimeError("secret of the inside")
            yield token


def test_a_fault_of_ours_is_a_server_error_that_tells_nothing(writer: Served, caplog: pytest.LogCaptureFixture) -> None:
    broken = writer.completer
    served = Served(Failing(broken.model, broken.tokenizer, broken.equipment))
    with running(create_app(served, name="tiny", keys=KEYS)) as url, sdk(url) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="tiny", messages=ASK, temperature=0)
        assert caught.value.code == caught.value.type == "server_error"
        assert "secret" not in caught.value.response.text
        assert caught.value.request_id is not None
        assert caught.value.request_id in caught.value.message
        assert "RuntimeError: secret of the inside" in caplog.text
        caplog.clear()
        stream = client.chat.completions.create(model="tiny", messages=ASK, temperature=0, stream=True)
        with pytest.raises(openai.APIError) as failed:
            list(stream)
        assert failed.value.code == "server_error"
        assert "secret" not in failed.value.message
        assert "RuntimeError: secret of the inside" in caplog.text
        assert client.models.list().data


# --- quota ---


def test_the_quota_is_judged_at_arrival_and_for_its_key_alone(writer: Served) -> None:
    now = [0.0]
    size = len(writer.prompt([Message("user", "a warm film?")]))
    limit = 2 * (size + 20) + 5
    app = create_app(writer, name="tiny", keys=KEYS, tokens_per_minute=limit, clock=lambda: now[0])
    with running(app) as url, sdk(url) as client, sdk(url, TEST_KEY) as tester:
        asked = {"model": "tiny", "messages": ASK, "temperature": 0}
        raw = client.chat.completions.with_raw_response.create(**asked, max_tokens=10, n=2)
        assert raw.headers["x-ratelimit-limit-tokens"] == str(limit)
        assert raw.headers["x-ratelimit-remaining-tokens"] == str(limit - size - 20)
        assert raw.headers["x-ratelimit-reset-tokens"] == "1m0s"
        now[0] = 20.0
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**asked, n=129)
        client.chat.completions.create(**asked, max_tokens=20)
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(**asked, max_tokens=6, stream=True)
        assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "tokens")
        assert caught.value.response.headers["retry-after"] == "40"
        assert caught.value.response.headers["retry-after-ms"] == "40000"
        assert caught.value.response.headers["x-ratelimit-remaining-tokens"] == "5"
        assert client.models.list().data
        free = tester.chat.completions.with_raw_response.create(**asked, max_tokens=100)
        assert not [name for name in free.headers if name.startswith("x-ratelimit")]
        now[0] = 60.0
        client.chat.completions.create(**asked, max_tokens=6)
        with pytest.raises(openai.RateLimitError, match="too large") as caught:
            client.chat.completions.create(**asked, max_tokens=limit)
        assert caught.value.response.headers["x-should-retry"] == "false"


def test_without_max_tokens_the_quota_reckons_with_a_usual_answer(writer: Served, sorter: Served) -> None:
    assert sorter.classifier is not None
    for served, answer in ((writer, 128), (sorter, sorter.classifier.longest)):
        size = len(served.prompt([Message("user", "a warm film?")]))
        with running(create_app(served, name="tiny", keys=KEYS, tokens_per_minute=1000)) as url:
            reply = post(url, {**BODY, "temperature": 0})
            assert int(reply.headers["x-ratelimit-remaining-tokens"]) == 1000 - size - answer


# --- one model, one lock ---


def test_the_log_has_a_line_for_each_request_without_prompts_and_keys(
    writer_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    reply = post(writer_url, {**BODY, "max_tokens": 2, "temperature": 0})
    httpx2.get(f"{writer_url}/v1/no%0Asuch?api-key={KEY}")

    def lines() -> list[str]:
        return [one.getMessage() for one in caplog.records if one.name == "tunewright.endpoint"]

    wait_for(lambda: len(lines()) == 2)  # a line is written when its reply has been sent
    ours = lines()
    pattern = r"POST /v1/chat/completions 200 \d+ ms (req_\w+) prompt_tokens=\d+ completion_tokens=2"
    found = re.fullmatch(pattern, ours[0])
    assert found is not None
    assert found[1] == reply.headers["x-request-id"]
    assert re.fullmatch(r"GET /v1/no%0Asuch 404 \d+ ms req_\w+", ours[1])
    assert KEY not in "".join(ours)
    assert "warm" not in "".join(ours)


def wait_for(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class Endless(LocalCompleter):
    """Goes on until `released`, and counts; so that no test depends on how fast a model is."""

    released: threading.Event
    made = 0

    def stream(self, prompt: list[int], **options: Any) -> Iterator[Token]:
        while not self.released.is_set():
            self.made += 1
            yield Token(prompt[-1], "x", -1.0)
            self.released.wait(0.005)


@pytest.fixture
def endless(writer: Served) -> Iterator[Endless]:
    completer = Endless(writer.completer.model, writer.completer.tokenizer, writer.completer.equipment)
    completer.released = threading.Event()
    yield completer
    completer.released.set()


def test_health_answers_while_an_answer_is_written(endless: Endless) -> None:
    with running(create_app(Served(endless), name="tiny", keys=KEYS)) as url:
        replies: list[httpx2.Response] = []
        asking = threading.Thread(target=lambda: replies.append(post(url, BODY)))
        asking.start()
        wait_for(lambda: endless.made > 3)
        assert httpx2.get(f"{url}/healthz").status_code == 200
        assert not replies
        endless.released.set()
        asking.join()
        assert replies[0].json()["usage"]["completion_tokens"] == endless.made


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_answer_and_frees_the_model(
    endless: Endless, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tunewright.endpoint")
    with running(create_app(Served(endless), name="tiny", keys=KEYS)) as url:
        if stream:
            with sdk(url) as client:
                answer = client.chat.completions.create(model="tiny", messages=ASK, stream=True)
                assert next(answer).choices[0].delta.role == "assistant"
                wait_for(lambda: endless.made > 3)
                answer.close()
        else:
            with pytest.raises(httpx2.ReadTimeout):
                httpx2.post(
                    f"{url}/v1/chat/completions", json=BODY, headers={"authorization": f"Bearer {KEY}"}, timeout=0.3
                )
        wait_for(lambda: any("chat/completions" in one.getMessage() for one in caplog.records))
        [line] = [one.getMessage() for one in caplog.records if "chat/completions" in one.getMessage()]
        assert ("cut_off=yes" if stream else " 499 ") in line
        made = endless.made
        time.sleep(0.05)
        assert endless.made <= made + 1
        with sdk(url) as client:
            threading.Timer(0.1, endless.released.set).start()
            assert client.chat.completions.create(model="tiny", messages=ASK).choices[0].finish_reason == "length"


def test_an_answer_that_outlasts_the_servers_grace_is_told_so(
    endless: Endless, caplog: pytest.LogCaptureFixture
) -> None:
    replies: list[httpx2.Response] = []
    with running(create_app(Served(endless), name="tiny", keys=KEYS), grace_s=0.2) as url:
        asking = threading.Thread(target=lambda: replies.append(post(url, BODY)))
        asking.start()
        wait_for(lambda: endless.made > 3)
    asking.join()
    assert replies[0].status_code == 503
    assert replies[0].json()["error"]["code"] == "server_stopping"
    assert "Traceback" not in caplog.text
    made = endless.made
    time.sleep(0.05)
    assert endless.made <= made + 1


def test_answers_are_computed_one_at_a_time(write: OpenAI) -> None:
    """Requests at once give what the same requests give one by one."""
    asked = [{"model": "tiny", "messages": ASK, "max_tokens": 15, "seed": seed} for seed in range(6)]
    alone = [write.chat.completions.create(**one).choices[0].message.content for one in asked]
    together: dict[int, str | None] = {}

    def ask(place: int) -> None:
        together[place] = write.chat.completions.create(**asked[place]).choices[0].message.content

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[place] for place in range(6)] == alone


# --- going live ---


def test_a_template_changed_by_one_byte_is_refused_at_the_place(tmp_path: Path) -> None:
    run = package(tmp_path)
    template = run.packaged_model / "chat_template.jinja"
    written = template.read_text()
    template.write_text(written.replace("{{- '\\n' -}}", "{{- '\\t' -}}"))
    with pytest.raises(EndpointError) as caught:
        load(run)
    message = str(caught.value)
    assert re.search(
        r"golden conversation 1, message 1 \(user: 'a warm .+'\): token \d+ is \d+ '.+' here and was \d+ '.+' in",
        message,
    )
    assert f"package again with `tunewright package {run.path}`" in message
    template.write_text(written.replace("'Assistant:", "'assistant:"))
    with pytest.raises(EndpointError, match="golden conversation 1: the chat template does not render"):
        load(run)


def test_a_template_that_only_looks_different_is_refused_too(tmp_path: Path) -> None:
    run = package(tmp_path)
    template = run.packaged_model / "chat_template.jinja"
    template.write_text(template.read_text() + "{#- harmless -#}")
    with pytest.raises(EndpointError, match="chat template is not the one of training"):
        load(run)
    template.unlink()
    with pytest.raises(EndpointError, match="no chat template"):
        load(run)


def test_a_tokenizer_that_was_changed_is_refused(tmp_path: Path) -> None:
    run = package(tmp_path)
    template = (run.packaged_model / "chat_template.jinja").read_text()
    other = make_tokenizer(["quite other words here, other merges"] * 3)
    other.chat_template = template
    other.save_pretrained(run.packaged_model)
    with pytest.raises(EndpointError, match="renders otherwise than in training: golden conversation 1"):
        load(run)


def test_a_package_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    run = package(tmp_path)
    rendering = read_json(run.rendering_file)
    write_json(run.rendering_file, {**rendering, "golden": []})
    with pytest.raises(EndpointError, match="no golden conversation"):
        load(run)
    write_json(run.rendering_file, {key: value for key, value in rendering.items() if key != "stop_ids"})
    with pytest.raises(EndpointError, match="'stop_ids' is missing"):
        load(run)
    write_json(run.rendering_file, rendering)
    (run.packaged_model / "model.safetensors").unlink()
    with pytest.raises(EndpointError, match="cannot be loaded"):
        load(run)
    run.rendering_file.unlink()
    with pytest.raises(EndpointError, match="nothing is packaged"):
        load(run)


def test_a_busy_port_is_said_before_weights_are_loaded(tmp_path: Path) -> None:
    run = package(tmp_path)
    run.rendering_file.unlink()
    with listen("127.0.0.1", 0) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(EndpointError) as caught:
            serve(run, host="127.0.0.1", port=port)
    assert str(caught.value) == (
        f"port {port} on 127.0.0.1 is in use; set deploy.port to another, or leave it out for any free one"
    )
    with pytest.raises(EndpointError, match=r"cannot be taken|no such address"):
        serve(run, host="203.0.113.1", port=port)
    run.key_file.unlink()
    with pytest.raises(EndpointError, match=r"deploy/key: no key there"):
        serve(run, host="127.0.0.1", port=port)


def test_a_served_run_lets_a_running_answer_finish_on_sigterm(tmp_path: Path) -> None:
    run = package(tmp_path, deploy="{name: film, tokens_per_minute: 5000}")
    code = "import sys; from tunewright.endpoint import serve; from tunewright.run import Run\n"
    code += "serve(Run.open(sys.argv[1]), host='127.0.0.1', port=0)"
    child = subprocess.Popen(
        [sys.executable, "-u", "-c", code, str(run.path)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert child.stdout is not None
    try:
        url = ""
        for line in child.stdout:
            if found := re.search(r"serving film at (http://127\.0\.0\.1:\d+)/v1", line):
                url = found[1]
                break
        assert url, "the endpoint did not start"
        with sdk(url) as client, sdk(url) as late:
            raw = client.chat.completions.with_raw_response.create(model="film", messages=ASK, max_tokens=5)
            assert raw.headers["x-ratelimit-limit-tokens"] == "5000"
            stream = client.chat.completions.create(
                model="film", messages=ASK, stream=True, n=5, max_tokens=200, temperature=0
            )
            chunks = [next(stream)]
            child.send_signal(signal.SIGTERM)
            chunks += list(stream)
            finished = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason]
            assert finished == list(range(5))
            with pytest.raises(openai.APIConnectionError):
                late.models.list()
        rest = child.stdout.read()
        assert child.wait(timeout=20) == 0
        assert "completion_tokens=" in rest
        assert "Traceback" not in rest
        assert KEY not in rest
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def test_an_answers_body_does_not_wait_for_its_head_to_be_acknowledged() -> None:
    with (
        contextlib.closing(listen("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()[:2]),
    ):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
