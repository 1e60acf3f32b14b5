"""JSON that is asked for is JSON of its schema, whatever the model would rather say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI
from pydantic import BaseModel

from endpoint_fixtures import make_model, make_tokenizer, running
from tunewright import chat
from tunewright.endpoint import Served, create_app
from tunewright.endpoint.guide import Guides, of_schema
from tunewright.errors import DataError
from tunewright.generate import LocalCompleter

ASK = [{"role": "user", "content": "a film?"}]


@pytest.fixture(scope="module")
def completer() -> LocalCompleter:
    tokenizer = make_tokenizer()
    equipment = chat.equip(tokenizer)
    model = make_model(len(tokenizer) + 7)  # rows without a token, as many models have
    model.config.max_position_embeddings = 2048
    return LocalCompleter(model, tokenizer, equipment)


@pytest.fixture(scope="module")
def guides(completer: LocalCompleter) -> Guides:
    return Guides(completer.tokenizer, completer.equipment)


@pytest.fixture(scope="module")
def client(completer: LocalCompleter) -> Iterator[OpenAI]:
    with (
        running(create_app(Served(completer), name="tiny", keys={"k": False})) as url,
        OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0, timeout=60) as client,
    ):
        yield client


SCALARS: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.integers(-20, 20).map(lambda low: {"type": "integer", "minimum": low, "maximum": low + 30}),
    st.lists(st.sampled_from(["a", "\u00e9\u2713", 'q"uote', 3, None, 1.5]), min_size=1, max_size=3, unique=True).map(
        lambda values: {"enum": values}
    ),
    st.integers(0, 4).map(lambda size: {"type": "string", "minLength": size, "maxLength": size + 2}),
)
NAMES = st.sampled_from(["a", "b b", "\u00fc", "key"])


def _object(properties: dict[str, Any], optional: bool) -> dict[str, Any]:
    required = [] if optional else list(properties)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


SCHEMAS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.builds(_object, st.dictionaries(NAMES, inner, max_size=3), st.booleans()),
        st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 2)),
        st.lists(inner, min_size=1, max_size=2).map(lambda some: {"anyOf": some}),
    ),
    max_leaves=5,
)


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """The part of JSON Schema that the tests use, written once more."""
    if "anyOf" in schema:
        return any(fits(value, one) for one in schema["anyOf"])
    if "enum" in schema:
        return any(type(value) is type(one) and value == one for one in schema["enum"])
    match schema["type"]:
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "string":
            return isinstance(value, str) and schema["minLength"] <= len(value) <= schema["maxLength"]
        case "array":
            inside = isinstance(value, list) and all(fits(one, schema["items"]) for one in value)
            return inside and len(value) <= schema["maxItems"]
    return (
        isinstance(value, dict)
        and set(schema["required"]) <= value.keys() <= schema["properties"].keys()
        and all(fits(one, schema["properties"][key]) for key, one in value.items())
    )


@settings(max_examples=60)
@given(schema=SCHEMAS, seed=st.integers(0, 1000))
def test_whatever_is_said_fits_the_schema(
    completer: LocalCompleter, guides: Guides, schema: dict[str, Any], seed: int
) -> None:
    guide = guides.compile(of_schema(schema))
    tokens = list(completer.stream([5, 6, 7], max_new_tokens=1500, temperature=1.5, seed=seed, shapes=[guide.fresh()]))
    assert tokens[-1].id in completer.equipment.stop_ids
    assert fits(json.loads("".join(token.text for token in tokens)), schema)


class Film(BaseModel):
    title: str
    stars: int
    seen: bool | None


@pytest.mark.parametrize("stream", [True, False])
def test_a_schema_is_kept_to_over_http(client: OpenAI, stream: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"stars": {"type": "integer", "minimum": 0, "maximum": 5}, "of": {"$ref": "#/$defs/of"}},
        "required": ["stars", "of"],
        "additionalProperties": False,
        "$defs": {"of": {"enum": ["film", "play"]}},
    }
    asked = {"type": "json_schema", "json_schema": {"name": "film", "strict": True, "schema": schema}}
    for seed in range(4):
        options = {"model": "tiny", "messages": ASK, "response_format": asked, "seed": seed, "max_tokens": 400}
        if stream:
            chunks = list(client.chat.completions.create(**options, stream=True))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        else:
            text = client.chat.completions.create(**options).choices[0].message.content or ""
        said = json.loads(text)
        assert said.keys() == {"stars", "of"}
        assert 0 <= said["stars"] <= 5


def test_the_sdk_parses_what_it_asked_for(client: OpenAI) -> None:
    for seed in range(40):  # a random model seldom ends a text
        try:
            reply = client.chat.completions.parse(
                model="tiny", messages=ASK, response_format=Film, seed=seed, temperature=0.5, max_tokens=1500
            )
        except openai.LengthFinishReasonError:
            continue
        assert isinstance(reply.choices[0].message.parsed, Film)
        return
    pytest.fail("no answer came to its end")


def test_any_object_is_an_object(client: OpenAI) -> None:
    ended = 0
    for seed in range(12):
        reply = client.chat.completions.create(
            model="tiny", messages=ASK, response_format={"type": "json_object"}, seed=seed, max_tokens=600
        )
        text = reply.choices[0].message.content or ""
        assert text.startswith("{")
        if reply.choices[0].finish_reason == "stop":
            ended += 1
            assert isinstance(json.loads(text), dict)
    assert ended


def test_logprobs_stay_the_models_own(client: OpenAI, completer: LocalCompleter) -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
    reply = client.chat.completions.create(
        model="tiny", messages=ASK, response_format=asked, temperature=0, logprobs=True, top_logprobs=2
    )
    assert reply.choices[0].logprobs is not None
    first = (reply.choices[0].logprobs.content or [])[0]
    assert first.token.startswith('"')
    assert first.logprob < first.top_logprobs[0].logprob, "the model would have said something else"


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "frob"}, "Invalid type: frob"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ],
)
def test_a_schema_that_cannot_be_kept_to_is_refused_with_the_reason(
    client: OpenAI, guides: Guides, schema: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        guides.compile(of_schema(schema))
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        client.chat.completions.create(model="tiny", messages=ASK, response_format=asked)
    assert (caught.value.param, caught.value.code) == ("response_format", "invalid_value")


# --- penalties and biases ---


def test_a_bias_forbids_or_forces_a_token(client: OpenAI, completer: LocalCompleter) -> None:
    def said(**options: Any) -> str | None:
        asked = {"model": "tiny", "messages": ASK, "temperature": 0, "max_tokens": 6, **options}
        return client.chat.completions.create(**asked).choices[0].message.content

    token = completer.tokenizer("film", add_special_tokens=False).input_ids[0]
    text = completer.tokenizer.decode([token])
    assert said(logit_bias={str(token): 100}) == text * 6
    assert said(logit_bias={str(token): 100}, frequency_penalty=2, presence_penalty=2) == text * 6
    first = completer.tokenizer(said() or "", add_special_tokens=False).input_ids[0]
    assert said(logit_bias={str(first): -100}) != said()


def test_penalties_are_openais(completer: LocalCompleter) -> None:
    from tunewright.endpoint.answers import Ask
    from tunewright.endpoint.served import _shapes

    [shape] = _shapes(Ask([1], frequency_penalty=0.5, presence_penalty=0.25, logit_bias={3: 2.0}))
    shaped = shape(torch.zeros(5), [1, 1, 3])
    assert shaped.tolist() == [0, -1.25, 0, 2 - 0.75, 0]
    assert _shapes(Ask([1])) == []
