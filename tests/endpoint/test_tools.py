"""Calls are read out of whatever a model writes, however it is cut into pieces, and required ones are always made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI

from endpoint_fixtures import make_model, make_tokenizer, package, running
from tunewright import chat
from tunewright.endpoint import Served, create_app, load
from tunewright.endpoint.answers import Call, End, Piece
from tunewright.endpoint.tools import Form, Reader, Toolbox, form_of, read
from tunewright.generate import LocalCompleter

CHATML = (
    "{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content }}"
    "{%- for call in message.tool_calls or [] %}"
    '{{- \'\\n<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
BARE = (
    "{%- for message in messages %}{%- if message.role == 'user' and tools %}{{- tools | tojson }}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content }}"
    "{%- if message.tool_calls %}"
    "{%- if message.tool_calls | length > 1 %}{{- raise_exception('one call') }}{%- endif %}"
    "{%- set call = message.tool_calls[0].function %}"
    "{{- '{\"name\": \"' + call.name + '\", \"parameters\": ' + (call.arguments | tojson) + '}' }}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
BRACKETS = (
    "{%- for message in messages %}{%- if message.role == 'user' and tools %}{{- tools | tojson }}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content }}"
    "{%- if message.tool_calls %}"
    "{{- '<|im_start|>[' }}{%- for call in message.tool_calls %}{%- if not loop.first %}{{- ', ' }}{%- endif %}"
    "{{- '{\"name\": \"' + call.function.name + '\", \"arguments\": ' + (call.function.arguments | tojson) + '}' }}"
    "{%- endfor %}{{- ']' }}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
UNKNOWING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"default": None, "chatml": CHATML, "bare": BARE, "brackets": BRACKETS}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": "a tool", "parameters": parameters}}


TOOLS = [
    tool("weather", city={"enum": ["Ghent", "Oslo"]}, unit={"$ref": "#/$defs/unit"}),
    tool("time", zone={"type": "integer", "minimum": 0, "maximum": 9}),
]
TOOLS[0]["function"]["parameters"]["$defs"] = {"unit": {"enum": ["C", "F"]}}
BOX = Toolbox(tuple(TOOLS))
ASK = [{"role": "user", "content": "is it warm in Ghent?"}]


def equipped(template: str | None) -> tuple[Any, chat.Equipment]:
    tokenizer = make_tokenizer()
    if template is not None:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = template
    return tokenizer, chat.equip(tokenizer)


def taken(events: list[str | Call]) -> tuple[str, list[tuple[str, Any]]]:
    text = "".join(one for one in events if isinstance(one, str))
    return text, [(one.name, json.loads(one.arguments)) for one in events if isinstance(one, Call)]


def read_whole(text: str, box: Toolbox = BOX, form: Form | None = None) -> tuple[str, list[tuple[str, Any]]]:
    reader = Reader(box, form)
    return taken([*reader.push(text), *reader.flush()])


GHENT = ("weather", {"city": "Ghent"})
JSON = '{"name": "weather", "arguments": {"city": "Ghent"}}'


@pytest.mark.parametrize(
    ("said", "text", "calls"),
    [
        (f"Call: {JSON}", "", [GHENT]),
        (f"Let me look.\nCall: {JSON}", "Let me look.", [GHENT]),
        (f"Call: {JSON}\nCall: {JSON}", "", [GHENT, GHENT]),
        (f"Call: {JSON}\n", "", [GHENT]),
        (f"<tool_call>\n{JSON}\n</tool_call>", "", [GHENT]),
        (f"Well.\n<tool_call>{JSON}</tool_call>\n<tool_call>{JSON}</tool_call>", "Well.", [GHENT, GHENT]),
        (f"<tool_call>{JSON}</tool_call> Done.", "Done.", [GHENT]),
        (JSON, "", [GHENT]),
        (f"{JSON}; {JSON}", "", [GHENT, GHENT]),
        (f"[{JSON}, {JSON}]", "", [GHENT, GHENT]),
        ('{"name": "weather", "parameters": {"city": "Ghent"}}', "", [GHENT]),
        ('{"name": "weather", "arguments": "{\\"city\\": \\"Ghent\\"}"}', "", [GHENT]),
        ("It is warm.", "It is warm.", []),
        ('{"answer": 3}', '{"answer": 3}', []),
        (f"I would say {JSON}", f"I would say {JSON}", []),
        ('Call: {"name": "other", "arguments": {}}', 'Call: {"name": "other", "arguments": {}}', []),
        ("Call: me later", "Call: me later", []),
        ("Roll Call: a", "Roll Call: a", []),
        ('Call: {"name": "weather", "argu', 'Call: {"name": "weather", "argu', []),
        ("<tool_call>{nonsense}</tool_call>", "<tool_call>{nonsense}</tool_call>", []),
        ("[1, 2]\n", "[1, 2]\n", []),
        ('{"name": [], "arguments": {}}', '{"name": [], "arguments": {}}', []),
        ('{"name": "time", "arguments": {"zone": NaN}}', '{"name": "time", "arguments": {"zone": NaN}}', []),
        ('{"name": "time", "arguments": "nonsense"}', '{"name": "time", "arguments": "nonsense"}', []),
        ('{"type": "function", "function": {"name": "time", "arguments": {}}}', "", [("time", {})]),
        ("", "", []),
    ],
)
def test_calls_are_told_from_text(said: str, text: str, calls: list[Any]) -> None:
    assert read_whole(said) == (text, calls)
    reader = Reader(BOX, None)
    one_by_one = [event for letter in said for event in reader.push(letter)]
    assert taken([*one_by_one, *reader.flush()]) == (text, calls)


PIECES = st.lists(
    st.sampled_from(
        ["Call:", " ", "\n", "<tool_call>", "</tool_call>", JSON, "{", "}", "[", "it", '"name"', "Ca", "<to"]
    ),
    max_size=10,
)


@given(PIECES, st.data())
def test_what_is_read_does_not_depend_on_how_the_answer_is_cut(pieces: list[str], data: st.DataObject) -> None:
    said = "".join(pieces)
    reader, events, at = Reader(BOX, None), [], 0
    while at < len(said):
        size = data.draw(st.integers(1, 6))
        events += reader.push(said[at : at + size])
        at += size
    events += reader.flush()
    assert taken(events) == read_whole(said)


@given(st.text(alphabet="abc \n.<>{}[]:", max_size=40))
def test_text_without_calls_is_given_back_as_it_is(said: str) -> None:
    assert read_whole(said) == (said, [])


def test_text_is_not_held_longer_than_it_may_be_a_call() -> None:
    reader = Reader(BOX, None)
    assert taken(reader.push("It is ")) == ("It is", [])
    assert taken(reader.push("warm.")) == (" warm.", [])
    assert taken(reader.push(" <")) == ("", [])
    assert taken(reader.push("b>")) == (" <b>", [])


def test_where_one_call_may_be_made_the_answer_ends_with_it() -> None:
    one = Toolbox(BOX.tools, several=False)
    events = list(read(iter([Piece(f"Call: {JSON}"), Piece("\nCall: "), Piece(JSON), End("stop", 9)]), one, None))
    assert [type(event) for event in events] == [Call, End]
    assert events[-1] == End("tool_calls", 1)


def test_how_a_template_writes_calls_is_found_out() -> None:
    forms = {name: form_of(equipped(template)[0]) for name, template in TEMPLATES.items()}
    assert forms["default"] == Form("Call: ", "", "\nCall: ", "arguments", "<|end|>")
    assert forms["chatml"] is not None
    assert (forms["chatml"].before, forms["chatml"].between) == ("\n<tool_call>\n", "\n</tool_call>\n<tool_call>\n")
    assert forms["bare"] == Form("", "", None, "parameters", "<|im_end|>")
    assert forms["brackets"] is not None
    assert (forms["brackets"].before, forms["brackets"].between, forms["brackets"].after) == (
        "<|im_start|>[",
        ", ",
        "]",
    )
    assert form_of(equipped(UNKNOWING)[0]) is None


# --- over HTTP ---


@pytest.fixture(scope="module", params=list(TEMPLATES))
def client(request: pytest.FixtureRequest) -> Iterator[OpenAI]:
    yield from serve(TEMPLATES[request.param])


def serve(template: str | None) -> Iterator[OpenAI]:
    tokenizer, equipment = equipped(template)
    model = make_model(len(tokenizer))
    model.config.max_position_embeddings = 2048
    served = Served(LocalCompleter(model, tokenizer, equipment))
    with (
        running(create_app(served, name="tiny", keys={"k": False})) as url,
        OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0, timeout=60) as client,
    ):
        yield client


def check_call(call: Any, names: tuple[str, ...] = ("weather", "time")) -> None:
    assert call.function.name in names
    given = json.loads(call.function.arguments)
    if call.function.name == "weather":
        assert given.keys() == {"city", "unit"}
        assert given["city"] in ("Ghent", "Oslo")
        assert given["unit"] in ("C", "F")
    else:
        assert given.keys() == {"zone"}
        assert 0 <= given["zone"] <= 9


@pytest.mark.parametrize("seed", range(4))
def test_a_required_call_is_made_whatever_the_model_would_say(client: OpenAI, seed: int) -> None:
    asked = {"model": "tiny", "messages": ASK, "tools": TOOLS, "tool_choice": "required", "seed": seed, "n": 2}
    reply = client.chat.completions.create(**asked, parallel_tool_calls=False, max_tokens=400)
    for choice in reply.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        [call] = choice.message.tool_calls or []
        assert call.id.startswith("call_")
        check_call(call)
    found = {choice.index: ["", "", "", ""] for choice in reply.choices}
    for chunk in client.chat.completions.create(**asked, parallel_tool_calls=False, max_tokens=400, stream=True):
        for choice in chunk.choices:
            for delta in choice.delta.tool_calls or []:
                assert delta.index == 0
                parts = found[choice.index]
                parts[0] += delta.id or ""
                parts[1] += delta.function.name or ""
                parts[2] += delta.function.arguments or ""
            found[choice.index][3] = choice.finish_reason or found[choice.index][3]
            assert not choice.delta.content
    for choice in reply.choices:
        [call] = choice.message.tool_calls or []
        assert found[choice.index][1:] == [call.function.name, call.function.arguments, "tool_calls"]


def test_a_named_function_is_the_one_that_is_called(client: OpenAI) -> None:
    named = {"type": "function", "function": {"name": "time"}}
    for seed in range(3):
        reply = client.chat.completions.create(
            model="tiny", messages=ASK, tools=TOOLS, tool_choice=named, seed=seed, max_tokens=300
        )
        [call] = reply.choices[0].message.tool_calls or []
        check_call(call, ("time",))


def test_a_conversation_with_calls_and_what_they_gave_is_rendered(client: OpenAI) -> None:
    function = {"name": "time", "arguments": '{"zone": 1}'}
    messages = [
        *ASK,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call00001", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call00001", "content": "noon"},
    ]
    asked = {"model": "tiny", "max_tokens": 5, "temperature": 0, "tools": TOOLS}
    reply = client.chat.completions.create(messages=messages, **asked)
    other = [*messages[:-1], messages[-1] | {"content": "midnight, or a little later"}]
    assert client.chat.completions.create(messages=other, **asked).usage.prompt_tokens > reply.usage.prompt_tokens
    without = client.chat.completions.create(messages=messages, **{**asked, "tool_choice": "none"})
    assert without.usage.prompt_tokens < reply.usage.prompt_tokens


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name"),
        ({"tools": [tool("f", x={"type": "frob"})], "tool_choice": "required"}, "tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": []}, *ASK], "functions": [{}]}, "functions"),
    ],
)
def test_tools_that_cannot_be_called_are_refused(client: OpenAI, change: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": ASK, "tools": TOOLS, **change})
    assert caught.value.param == param


def test_a_template_that_knows_no_tools_says_so() -> None:
    serving = serve(UNKNOWING)
    client = next(serving)
    with pytest.raises(openai.BadRequestError, match="does not write `tools`") as caught:
        client.chat.completions.create(model="tiny", messages=ASK, tools=TOOLS)
    assert caught.value.param == "tools"
    serving.close()


def test_a_classifier_calls_nothing(tmp_path: Path) -> None:
    served = load(package(tmp_path, labels=("yes", "no"), task="classification"))
    with (
        running(create_app(served, name="tiny", keys={"k": False})) as url,
        OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client,
    ):
        for change in ({"tools": TOOLS}, {"response_format": {"type": "json_object"}}, {"logit_bias": {"5": 1}}):
            with pytest.raises(openai.BadRequestError, match="one of its labels"):
                client.chat.completions.create(model="tiny", messages=ASK, **change)
