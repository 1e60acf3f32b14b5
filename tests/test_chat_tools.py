"""Tools, calls and what tools answered are in the ids, a call is learnt as words are, and nothing is left out in
silence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tunewright import chat
from tunewright.chat import Example, Message, ToolCall, clip, differences, equip, golden, render, render_prompt
from tunewright.errors import DataError

CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n' + (messages[0].content + '\\n' if messages[0].role == 'system' else '') + '<tools>' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + message.content }}
        {%- for call in message.tool_calls %}
            {{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>' + message.content + '</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
"""Tools in the system message; answers of tools that stand together are one turn."""
LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' and tools and loop.index0 == (1 if messages[0].role == 'system' else 0) %}
        {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' + (tools | tojson) + '\\n' + message.content + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' + message.content + '{"name": "' + call.name }}
        {{- '", "parameters": ' + (call.arguments | tojson) + '}<|eot|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (message.content | tojson) + '<|eot|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
"""Tools in the first user's message, one call in a message, answers of tools as JSON."""
MISTRAL = """{{- bos_token }}
{%- set last = namespace(user=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools and loop.index0 == last.user %}{{- '[TOOLS]' + (tools | tojson) + '[/TOOLS]' }}{%- endif %}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- message.content }}
        {%- for call in message.tool_calls %}
            {%- if call.id | length != 9 %}{{- raise_exception('IDs should be nine characters') }}{%- endif %}
            {%- set written = {'name': call.function.name, 'arguments': call.function.arguments, 'id': call.id} %}
            {{- '[CALL]' + (written | tojson) }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif message.role == 'tool' %}
        {{- '[RESULT]' + ({'content': message.content, 'id': message.tool_call_id} | tojson) + '[/RESULT]' }}
    {%- else %}
        {{- message.content }}
    {%- endif %}
{%- endfor %}"""
"""Tools before the last user's message, ids of nine characters, no header before an answer."""
PLAIN = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Knows no tools."""
TEMPLATES = {"default": None, "chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL}
SPECIALS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot|>", "<|bos|>", "[CALL]")

Make = Callable[[str | None], Any]


@pytest.fixture(scope="session")
def make(model_folder: Path) -> Make:
    def made(template: str | None) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(str(model_folder))
        if template is not None:
            tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIALS), "bos_token": "<|bos|>"})
            tokenizer.chat_template = template
        equip(tokenizer)
        return tokenizer

    return made


@pytest.fixture(scope="session", params=list(TEMPLATES))
def tokenizer(request: pytest.FixtureRequest, make: Make) -> Any:
    tokenizer = make(TEMPLATES[request.param])
    tokenizer.kind = request.param
    return tokenizer


def tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "description": f"what {name} is", "parameters": parameters}}


TOOLS = (tool("weather"), tool("time"))
CALL = ToolCall("weather", '{"city": "Ghent"}', "call00001")
TALK = (
    Message("user", "is it warm in Ghent?"),
    Message("assistant", "", tool_calls=(CALL,)),
    Message("tool", '{"celsius": 21}', tool_call_id="call00001"),
    Message("assistant", "It is 21 degrees."),
)


def said(tokenizer: Any, message: Message) -> str:
    """What an assistant's message is in the text, its end of turn included."""
    calls = [(call.name, json.loads(call.arguments), call.id) for call in message.tool_calls]

    def js(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    match tokenizer.kind:
        case "default":
            lines = [message.content] if message.content or not calls else []
            lines += [f"Call: {js({'name': name, 'arguments': given})}" for name, given, _ in calls]
            return "\n".join(lines) + "<|eos|>"
        case "chatml":
            inside = [
                f'<tool_call>{{"name": "{name}", "arguments": {js(given)}}}</tool_call>' for name, given, _ in calls
            ]
            return message.content + "".join(inside) + "<|im_end|>"
        case "llama3":
            inside = [f'{{"name": "{name}", "parameters": {js(given)}}}' for name, given, _ in calls]
            return message.content + "".join(inside) + "<|eot|>"
    inside = [f"[CALL]{js({'name': name, 'arguments': given, 'id': one})}" for name, given, one in calls]
    return message.content + "".join(inside) + "<|eos|>"


def learnt(tokenizer: Any, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> str:
    rendering = render(tokenizer, messages, tools)
    ids = [token for token, flag in zip(rendering.ids, rendering.mask, strict=True) if flag]
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(["", "\n", "a\n\n", "Call: {}"])
ARGUMENTS = st.dictionaries(st.text("ab\u00e9", min_size=1, max_size=2), st.none() | st.integers() | TEXT, max_size=2)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """Turns of a user, of an assistant who answers, calls, or both, and of the tools that were called."""
    messages = [Message("system", draw(TEXT))] if draw(st.booleans()) else []
    number = 0
    for turn in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(TEXT)))
        for _ in range(draw(st.integers(0, 2))):
            number += 1
            name = draw(st.sampled_from(["weather", "time"]))
            call = ToolCall(name, json.dumps(draw(ARGUMENTS)), f"call{number:05}")
            messages.append(Message("assistant", draw(TEXT), draw(st.integers(0, 1)), (call,)))
            if turn and draw(st.integers(0, 5)) == 0:
                return messages  # ends with a call
            messages.append(Message("tool", draw(TEXT), tool_call_id=call.id, name=draw(st.sampled_from([name, None]))))
        messages.append(Message("assistant", draw(TEXT), draw(st.integers(0, 1))))
    return messages


# Rendering


@given(messages=conversations(), tools=st.sampled_from([(), TOOLS[:1], TOOLS]))
@settings(max_examples=40, deadline=None)
def test_ids_are_the_template_s_text_and_the_loss_is_on_what_the_assistant_says_and_calls(
    tokenizer: Any, messages: list[Message], tools: Sequence[dict[str, Any]]
) -> None:
    chat.check_messages(messages, "")
    whole = render(tokenizer, messages, tools)
    text = tokenizer.apply_chat_template(
        [message.for_template() for message in messages], tools=list(tools) or None, tokenize=False
    )
    decoded = tokenizer.decode(whole.ids, clean_up_tokenization_spaces=False)
    assert text.startswith(decoded)
    assert not text[len(decoded) :].strip()
    last_user = max(number for number, message in enumerate(messages) if message.role == "user")
    expected = ""
    for number, message in enumerate(messages):
        if message.role != "assistant" or (tokenizer.kind == "mistral" and tools and number < last_user):
            continue  # Mistral's earlier prompts had the tools elsewhere, so there is no loss on their answers
        prompt = render_prompt(tokenizer, messages[:number], tools)
        assert whole.ids[: len(prompt)] == prompt
        assert whole.mask[len(prompt)] == bool(message.weight)
        expected += said(tokenizer, message) if message.weight else ""
    assert learnt(tokenizer, messages, tools) == expected


def test_the_text_of_a_conversation_with_tools_under_the_default_template(make: Make) -> None:
    tokenizer = make(None)
    schema = json.dumps(TOOLS[0])
    assert tokenizer.decode(render(tokenizer, TALK, TOOLS[:1]).ids) == (
        f"Tools:\n{schema}\nUser:\nis it warm in Ghent?\nAssistant:\n"
        'Call: {"name": "weather", "arguments": {"city": "Ghent"}}<|eos|>\n'
        'Tool:\n{"celsius": 21}\nAssistant:\nIt is 21 degrees.<|eos|>'
    )


def test_several_calls_are_learnt_as_one_turn(make: Make) -> None:
    for kind in ("default", "chatml", "mistral"):
        tokenizer = make(TEMPLATES[kind])
        tokenizer.kind = kind
        calls = (CALL, ToolCall("time", "{}", "call00002"))
        messages = [
            TALK[0],
            Message("assistant", "Let me look.", tool_calls=calls),
            Message("tool", "12:00", tool_call_id="call00002"),
            Message("tool", "21", tool_call_id="call00001"),
            TALK[3],
        ]
        chat.check_messages(messages, "")
        assert learnt(tokenizer, messages, TOOLS) == said(tokenizer, messages[1]) + said(tokenizer, messages[4])


def test_a_call_of_weight_0_is_shown_and_not_learnt(tokenizer: Any) -> None:
    silent = [TALK[0], Message("assistant", "", 0, (CALL,)), *TALK[2:]]
    assert render(tokenizer, silent, TOOLS).ids == render(tokenizer, TALK, TOOLS).ids
    assert learnt(tokenizer, silent, TOOLS) == said(tokenizer, TALK[3])
    assert learnt(tokenizer, TALK, TOOLS) == said(tokenizer, TALK[1]) + said(tokenizer, TALK[3])


def test_arguments_reach_the_template_as_an_object(tokenizer: Any) -> None:
    spaced = Message("assistant", "", tool_calls=(ToolCall("weather", '{"city":\n"Ghent"}', "call00001"),))
    assert learnt(tokenizer, [TALK[0], spaced], TOOLS) == learnt(tokenizer, TALK[:2], TOOLS)


def test_clipping_cuts_what_a_tool_said_and_keeps_the_call_and_the_tools(tokenizer: Any) -> None:
    long = Message("tool", "x" * 200, tool_call_id="call00001")
    row = Example("1", "a:1", (*TALK[:2], long, TALK[3]), tools=TOOLS)
    whole = render(tokenizer, row.messages, row.tools)
    done = clip(tokenizer, row, len(whole.ids) - 50)
    assert done.example is not None
    assert done.example.tools == TOOLS
    assert done.example.messages[1] == TALK[1]
    assert done.example.messages[2].tool_call_id == "call00001"
    assert 100 < len(done.example.messages[2].content) <= 150
    assert done.rendering.num_targets == whole.num_targets


# Refusals


@pytest.mark.parametrize(
    ("template", "messages", "tools", "said"),
    [
        (PLAIN, TALK[:1] + TALK[3:], TOOLS, "does not write the row's `tools`"),
        (PLAIN, TALK, (), "does not write the call of 'weather' in message 2"),
        (PLAIN.replace("}}<|im_end", "}}{{ message.tool_calls }}<|im_end").replace("message.content }}", "message.content if message.role != 'tool' }}"), TALK, (), "does not write what the tool says in message 3"),  # noqa: E501
        (CHATML.replace("for call in message.tool_calls", "for call in (message.tool_calls or [])[:1]"), (TALK[0], Message("assistant", "", tool_calls=(CALL, ToolCall("time", "{}", "call00002")))), (), "does not write the call of 'time'"),  # noqa: E501
        (MISTRAL, (TALK[0], Message("assistant", "", tool_calls=(ToolCall("weather", "{}", "1"),))), (), "nine characters"),  # noqa: E501
    ],
)  # fmt: skip
def test_a_template_that_leaves_out_tools_is_refused(
    make: Make, template: str, messages: Sequence[Message], tools: Sequence[dict[str, Any]], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        render(make(template), messages, tools)


def answer(call_id: str | None) -> Message:
    return Message("tool", "21", tool_call_id=call_id)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([TALK[0], answer("call00001"), TALK[3]], "message 2: tool_call_id 'call00001' answers no call before it"),
        ([*TALK[:2], answer("other"), TALK[3]], "message 3: tool_call_id 'other' answers no call before it; calls without an answer: 'call00001'"),  # noqa: E501
        ([*TALK[:2], answer(None), TALK[3]], "message 3: tool_call_id None answers no call"),
        ([*TALK[:3], answer("call00001"), TALK[3]], "message 4: tool_call_id 'call00001' answers no call before it"),
        ([*TALK[:2], TALK[3]], "message 3 (assistant) stands where the call 'call00001' needs its answer"),
        ([*TALK[:2], TALK[0], TALK[3]], "message 3 (user) stands where the call 'call00001' needs its answer"),
        ([Message("user", "a", tool_calls=(CALL,)), TALK[3]], "message 1 (user) has tool_calls; only an assistant"),
        ([TALK[0], Message("assistant", "", tool_calls=(CALL, CALL))], "message 2: two of its tool_calls have one id"),
        (TALK[:3], "the last message is from 'tool'"),
    ],
)  # fmt: skip
def test_an_order_that_no_endpoint_would_send_is_refused(messages: list[Message], said: str) -> None:
    with pytest.raises(DataError) as refused:
        chat.check_messages(messages, "a.jsonl:3")
    assert str(refused.value).startswith(f"a.jsonl:3: {said}")


def test_calls_without_ids_are_answered_in_their_order() -> None:
    calls = (ToolCall("time", "{}"), ToolCall("weather", "{}"))
    messages = [TALK[0], Message("assistant", "", tool_calls=calls), answer(None), answer(None), TALK[3]]
    chat.check_messages(messages, "")
    with pytest.raises(DataError, match="answers no call"):
        chat.check_messages([*messages[:4], answer(None), TALK[3]], "")


# Written down


def test_golden_conversations_carry_tools(tokenizer: Any) -> None:
    row = Example("1", "a:1", TALK, tools=TOOLS)
    written = json.loads(json.dumps(golden(tokenizer, equip(tokenizer), [row, TALK[:1] + TALK[3:]])))
    assert written["golden"][0]["tools"] == list(TOOLS)
    assert written["golden"][0]["prompt_ids"] == render_prompt(tokenizer, TALK[:3], TOOLS)
    assert differences(tokenizer, written) == []
    written["golden"][0]["tools"] = list(TOOLS[:1])
    assert "golden conversation 1" in differences(tokenizer, written)[0]


@pytest.mark.parametrize("place", range(4))
def test_a_difference_names_the_message_that_it_is_in(tokenizer: Any, place: int) -> None:
    """Or some together with it, where the template writes one otherwise once others follow."""
    written = json.loads(json.dumps(golden(tokenizer, equip(tokenizer), [Example("1", "a:1", TALK, tools=TOOLS)])))
    (row,) = written["golden"]
    assert [end for end in row["ends"] if end is not None] == sorted(end for end in row["ends"] if end is not None)
    assert row["ends"][-1] == len(row["ids"])
    changed = row["messages"][place]
    if changed["content"]:
        changed["content"] = "Xy" + changed["content"]
    else:
        changed["tool_calls"][0]["function"]["arguments"] = '{"city": "Xy"}'
    (said,) = differences(tokenizer, written)
    found = re.match(
        r"golden conversation 1, messages? (\d)(?: to (\d))? \((\w+).*\): token \d+ is \d+ '.+' here and was \d+ '.+' "
        "in training",
        said,
    )
    assert found is not None, said
    first, last = int(found[1]), int(found[2] or found[1])
    assert first <= place + 1 <= last
    assert found[3] == TALK[first - 1].role


@given(messages=conversations(), tools=st.sampled_from([(), TOOLS]))
def test_an_example_with_tools_that_was_written_is_read_as_the_same(
    messages: list[Message], tools: tuple[dict[str, Any], ...]
) -> None:
    one = Example("1", "a:1", tuple(messages), tools=tools)
    assert Example.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_an_endpoint_is_sent_null_content_and_arguments_as_text() -> None:
    assert TALK[1].to_dict() == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ghent"}'}}
        ],
    }
    assert TALK[2].to_dict() == {"role": "tool", "content": '{"celsius": 21}', "tool_call_id": "call00001"}


def test_an_example_s_answer_shows_its_calls() -> None:
    shown = '{"name": "weather", "arguments": {"city": "Ghent"}}'
    assert Example("1", "a:1", TALK[:2]).answer == shown
    looking = Message("assistant", "Let me look.", tool_calls=(CALL,))
    assert Example("1", "a:1", (TALK[0], looking)).answer == f"Let me look.\n{shown}"


# Many turns


def test_a_conversation_is_not_rendered_again_for_its_prompt(make: Make) -> None:
    tokenizer = make(CHATML)
    messages = [turn for number in range(6) for turn in (Message("user", f"{number}"), Message("assistant", "a"))]
    count = 0
    apply = tokenizer.apply_chat_template

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return apply(*args, **options)

    tokenizer.apply_chat_template = counted
    render(tokenizer, messages)
    assert count == 12
    render_prompt(tokenizer, messages[:-1])
    assert count == 12
    tokenizer.chat_template = CHATML.replace("\\n</tools>", "</tools>")
    render(tokenizer, messages)
    assert count == 24
