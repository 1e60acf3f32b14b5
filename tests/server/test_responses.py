"""Responses, driven by the unchanged `openai` SDK."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from serving import Models, Serving, make_models, serving

from tunewright.server import keys
from tunewright.testing import EchoEngines


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def echo(known: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(tmp_path_factory.mktemp("echo"), known, echo=EchoEngines()) as running:
        yield running


@pytest.fixture(scope="module")
def client(echo: Serving) -> Iterator[OpenAI]:
    with echo.client() as made:
        yield made


@pytest.fixture(scope="module")
def real(known: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    with serving(tmp_path_factory.mktemp("real"), known) as running, running.client() as made:
        yield made


def conversation(echo: Serving, response_id: str) -> Any:
    from tunewright.server import store, tables

    with echo.server.store.begin() as connection:
        found = store.row(connection, tables.responses, id=response_id)
    assert found is not None
    return found["conversation"]


def test_a_text_is_answered_with_a_text(client: OpenAI) -> None:
    response = client.responses.create(model="base", input="hello there", metadata={"a": "b"}, temperature=0)
    assert response.output_text == "hello there"
    assert (response.status, response.object, response.model, response.temperature) == (
        "completed",
        "response",
        "base",
        0,
    )
    assert response.metadata == {"a": "b"}
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (2, 2, 4)
    [message] = response.output
    assert (message.type, message.status) == ("message", "completed")
    assert response.id.startswith("resp_")


def test_a_stream_is_the_response_in_named_events(client: OpenAI) -> None:
    events = list(client.responses.create(model="base", input="one two three", stream=True))
    kinds = [event.type for event in events]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 3,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    final = events[-1].response  # type: ignore[union-attr]
    assert "".join(deltas) == final.output_text == "one two three"
    assert len({event.item_id for event in events if hasattr(event, "item_id")}) == 1
    assert final.usage is not None
    assert final.usage.total_tokens == 6
    assert client.responses.retrieve(final.id).output_text == "one two three"


def test_the_sdks_own_reader_of_streams_follows(client: OpenAI) -> None:
    with client.responses.stream(model="base", input="a b") as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == "a b"


def test_a_response_is_gone_on_with(client: OpenAI, echo: Serving) -> None:
    first = client.responses.create(model="base", input="one", instructions="be brief")
    second = client.responses.create(model="base", input="two", previous_response_id=first.id)
    assert conversation(echo, second.id) == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "two"},
    ]
    assert second.previous_response_id == first.id
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="base", input="x", previous_response_id="resp_none")
    assert caught.value.code == "previous_response_not_found"


def test_what_is_kept_can_be_had_and_deleted_by_its_key_alone(client: OpenAI, echo: Serving) -> None:
    kept = client.responses.create(model="base", input="keep")
    assert client.responses.retrieve(kept.id) == kept
    other = keys.create(echo.server.store, "other", scope="inference")
    with echo.client(api_key=other) as stranger, pytest.raises(openai.NotFoundError):
        stranger.responses.retrieve(kept.id)
    client.responses.delete(kept.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(kept.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(kept.id)
    unkept = client.responses.create(model="base", input="keep", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


def test_items_become_a_conversation(client: OpenAI, echo: Serving) -> None:
    parts = [{"type": "input_text", "text": "is it "}, {"type": "input_text", "text": "warm?"}]
    items = [
        {"role": "developer", "content": "you know the weather"},
        {"type": "message", "role": "user", "content": parts},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Let me look.", "annotations": []}]},
        {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": "{}"},
        {"type": "function_call", "call_id": "call_2", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": "21"},
        {"type": "function_call_output", "call_id": "call_2", "output": "22"},
    ]
    response = client.responses.create(model="base", input=items)  # type: ignore[arg-type]
    said = conversation(echo, response.id)
    assert [message["role"] for message in said] == ["developer", "user", "assistant", "tool", "tool", "assistant"]
    assert [call["id"] for call in said[2]["tool_calls"]] == ["call_1", "call_2"]
    assert (said[3]["tool_call_id"], said[3]["content"]) == ("call_1", "21")
    assert response.output_text == "22"


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"input": []}, "input", "missing_required_parameter"),
        ({"input": [{"role": "robot", "content": "a"}]}, "input", "invalid_value"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "invalid_value"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0]", "invalid_value"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "unsupported_parameter"),
        ({"truncation": "auto"}, "truncation", "unsupported_parameter"),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        ({"text": {"format": {"type": "xml"}}}, "text.format", "invalid_value"),
        ({"model": "none such"}, "model", "model_not_found"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_done_is_named(
    client: OpenAI, change: dict[str, Any], param: str, code: str, stream: bool
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.responses.create(**{"model": "base", "input": "a", "stream": stream, **change})
    assert (caught.value.param, caught.value.code) == (param, code)


# --- real engines ---

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Ghent", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}


def test_functions_are_called_and_answered(real: OpenAI) -> None:
    asked: Any = {"model": "ft:one", "input": "is it warm?", "tools": [TOOL], "tool_choice": "required", "top_p": 0.9}
    asked |= {"parallel_tool_calls": False, "max_output_tokens": 300}
    response = real.responses.create(**asked)
    [call] = response.output
    assert call.type == "function_call"
    assert json.loads(call.arguments)["city"] in ("Ghent", "Oslo")
    outcome: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "21"}]
    after = real.responses.create(
        model="ft:one", input=outcome, previous_response_id=response.id, tools=[TOOL], max_output_tokens=5
    )
    assert after.status in ("completed", "incomplete")
    events = list(real.responses.create(**asked, stream=True))
    kinds = [event.type for event in events]
    assert kinds[2:] == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]


def test_a_schema_is_kept_to(real: OpenAI) -> None:
    format: Any = {"type": "json_schema", "name": "x", "schema": PARAMETERS, "strict": True}
    response = real.responses.create(model="base", input="where?", text={"format": format}, max_output_tokens=200)
    assert json.loads(response.output_text)["city"] in ("Ghent", "Oslo")


def test_an_answer_that_is_cut_is_incomplete(real: OpenAI) -> None:
    asked: Any = {"model": "base", "input": "go on", "max_output_tokens": 3, "temperature": 0}
    response = real.responses.create(**asked, include=["message.output_text.logprobs"], top_logprobs=2)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert len(response.output[0].content[0].logprobs) == 3  # type: ignore[union-attr,arg-type]
    events = list(real.responses.create(**asked, stream=True))
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == response.output_text


def test_too_long_a_conversation_is_named(real: OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            real.responses.create(model="base", input="a" * 9000, stream=stream)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
