"""The older completions route: prompts in text or ids, echoed, scored, the best of several."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI

from endpoint_fixtures import CONTEXT, package, running
from tunewright.endpoint import Served, create_app, load

PROMPT = "a warm and quiet"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return load(package(tmp_path_factory.mktemp("writer"), labels=("yes", "no"), task="classification"))


@pytest.fixture(scope="module")
def url(served: Served) -> Iterator[str]:
    with running(create_app(served, name="tiny", keys={"k": True}, tokens_per_minute=1_000_000)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0, timeout=60) as client:
        yield client


def ids(served: Served, text: str) -> list[int]:
    found: list[int] = served.completer.tokenizer(text).input_ids
    return found


def said(client: OpenAI, **options: Any) -> str:
    return client.completions.create(**{"model": "tiny", "prompt": PROMPT, "temperature": 0, **options}).choices[0].text


def test_a_prompt_is_gone_on_with_as_it_is(client: OpenAI, served: Served) -> None:
    expected = served.completer.generate([ids(served, PROMPT)], max_new_tokens=16)[0]
    assert said(client) == expected
    assert said(client, prompt=ids(served, PROMPT)) == expected
    reply = client.completions.create(model="tiny", prompt=PROMPT)
    assert reply.object == "text_completion"
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens <= 16) == (len(ids(served, PROMPT)), True)


def test_several_prompts_have_several_answers_in_their_order(client: OpenAI, served: Served) -> None:
    prompts = [PROMPT, "the plot is", "old, very old"]
    reply = client.completions.create(model="tiny", prompt=prompts, temperature=0, n=2)
    assert [choice.index for choice in reply.choices] == list(range(6))
    assert [choice.text for choice in reply.choices] == [said(client, prompt=one) for one in prompts for _ in range(2)]
    by_ids = client.completions.create(model="tiny", prompt=[ids(served, one) for one in prompts], temperature=0)
    assert [choice.text for choice in by_ids.choices] == [choice.text for choice in reply.choices[::2]]


def test_a_stream_says_what_the_whole_reply_says(client: OpenAI) -> None:
    asked = {"model": "tiny", "prompt": [PROMPT, "the jokes"], "seed": 3, "n": 2, "logprobs": 2, "echo": True}
    whole = client.completions.create(**asked)
    texts = [""] * 4
    tokens: list[list[str]] = [[], [], [], []]
    offsets: list[list[int]] = [[], [], [], []]
    reasons: list[Any] = [None] * 4
    usage = None
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            if choice.logprobs:
                tokens[choice.index] += choice.logprobs.tokens or []
                offsets[choice.index] += choice.logprobs.text_offset or []
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices]
    assert usage == whole.usage


def test_an_echoed_prompt_is_scored_as_the_model_scores_it(client: OpenAI, served: Served) -> None:
    text = "the plot is thin and the jokes are old"
    reply = client.completions.create(model="tiny", prompt=text, max_tokens=0, echo=True, logprobs=3)
    [choice] = reply.choices
    assert (choice.text, choice.finish_reason) == (text, "length")
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 0
    scored = choice.logprobs
    assert "".join(scored.tokens) == text
    assert scored.text_offset == [len("".join(scored.tokens[:place])) for place in range(len(scored.tokens))]
    assert scored.token_logprobs[0] is None
    assert scored.top_logprobs[0] is None
    prompt = ids(served, text)
    for place in range(1, len(prompt)):
        [step] = served.completer.stream(prompt[:place], max_new_tokens=1, num_top=len(served.completer.tokenizer))
        assert scored.token_logprobs[place] == pytest.approx(dict(step.top)[prompt[place]], abs=1e-4)
        best = scored.top_logprobs[place]
        assert max(best.values()) == pytest.approx(step.top[0][1], abs=1e-4)
        assert scored.tokens[place] in best
        assert 3 <= len(best) <= 4


def test_a_long_prompt_is_scored_in_pieces_as_in_one(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = ids(served, "the plot is thin and the jokes are old, very old " * 3)
    whole = served.completer.read(prompt, num_top=2)
    monkeypatch.setattr("tunewright.generate.LOGITS", 7 * served.completer.num_tokens)
    pieces = served.completer.read(prompt, num_top=2)
    assert [token.id for token in pieces] == [token.id for token in whole] == prompt[1:]
    for one, other in zip(pieces, whole, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]


def test_logprobs_without_echo_count_from_the_prompt(client: OpenAI) -> None:
    [choice] = client.completions.create(model="tiny", prompt=PROMPT, temperature=0, logprobs=0, max_tokens=4).choices
    assert choice.logprobs.top_logprobs is None
    assert choice.logprobs.text_offset[0] == len(PROMPT)
    assert len(choice.logprobs.token_logprobs) == 4


def test_the_best_of_several_is_the_most_probable(client: OpenAI) -> None:
    asked = {"model": "tiny", "prompt": PROMPT, "seed": 7, "max_tokens": 6, "logprobs": 0}
    every = client.completions.create(**asked, n=6).choices

    def mean(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    best = client.completions.create(**asked, best_of=6, n=2)
    assert [one.text for one in best.choices] == [one.text for one in sorted(every, key=mean, reverse=True)[:2]]
    assert [one.index for one in best.choices] == [0, 1]


def test_stop_and_an_empty_prompt(client: OpenAI) -> None:
    text = said(client, max_tokens=30)
    assert said(client, max_tokens=30, stop=text[3:5]) == text[: text.index(text[3:5])]
    assert said(client, prompt="") == said(client, prompt=[0])


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"suffix": "the end"}, "unsupported_parameter", "suffix"),
        ({"logprobs": 6}, "invalid_value", "logprobs"),
        ({"best_of": 1, "n": 2}, "invalid_value", "best_of"),
        ({"best_of": 2, "stream": True}, "invalid_value", "best_of"),
        ({"prompt": {"a": 1}}, "invalid_type", "prompt"),
        ({"prompt": [1, "a"]}, "invalid_value", "prompt[0]"),
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": [99999]}, "invalid_value", "prompt"),
        ({"prompt": "a", "max_tokens": CONTEXT}, "context_length_exceeded", "prompt"),
        ({"model": None}, "invalid_type", "model"),
        ({"n": 129}, "invalid_value", "n"),
    ],
)
def test_what_cannot_be_done_is_named(url: str, change: dict[str, Any], code: str, param: str) -> None:
    body = {"model": "tiny", "prompt": PROMPT, **change}
    reply = httpx2.post(f"{url}/v1/completions", content=json.dumps(body), headers={"authorization": "Bearer k"})
    assert reply.status_code == 400
    assert (reply.json()["error"]["code"], reply.json()["error"]["param"]) == (code, param)


def test_the_quota_counts_every_answer_that_is_written(tmp_path: Path) -> None:
    served = load(package(tmp_path))
    with (
        running(create_app(served, name="tiny", keys={"k": True}, tokens_per_minute=200)) as url,
        OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client,
    ):
        raw = client.completions.with_raw_response.create(model="tiny", prompt=PROMPT, max_tokens=10, best_of=5)
        used = 200 - int(raw.headers["x-ratelimit-remaining-tokens"])
        assert used == len(ids(served, PROMPT)) + 50
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="tiny", prompt=PROMPT, max_tokens=100, n=2)
