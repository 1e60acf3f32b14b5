"""One rendering: a prompt is the beginning of the same prompt with its answer, and the loss is on what is said."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tunewright import chat
from tunewright.chat import (
    END_OF_TURN,
    Example,
    Message,
    clip,
    differences,
    equip,
    golden,
    render,
    render_answer,
    render_prompt,
    render_text,
)
from tunewright.errors import DataError, ModelError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMS = CHATML.replace("message['content'] }}", "message['content'] | trim }}")
REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TRIMS
)
LLAMA3 = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
THINKS = """{%- for message in messages %}
    {%- if message.role == 'assistant' and not loop.last and '</think>' in message.content %}
        {{- '<|im_start|>assistant\n' + message.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' and loop.last and '</think>' not in message.content %}
        {{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + message.content + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
ENDLESS = (
    "{% for message in messages %}{{ message['role'] + ':\\n' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
"""Writes no end of turn."""
DATED = "{{ strftime_now('%d %b %Y %H:%M:%S') }}\n" + CHATML

SPECIALS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot|>", "<|bos|>")
OWN = {
    "chatml": CHATML,
    "trims": TRIMS,
    "refuses system": REFUSES_SYSTEM,
    "llama3": LLAMA3,
    "thinks": THINKS,
    "endless": ENDLESS,
}
KINDS = ["default", "no eos", *OWN, "gpt2", "stories260k"]

Make = Callable[..., Any]


@pytest.fixture(scope="session")
def make(model_folder: Path) -> Make:
    """A small byte-level tokenizer, with a template of its own or with none."""

    def made(template: str | dict[str, str] | None = None, *, eos: bool = True, equipped: bool = True) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(str(model_folder))
        if not eos:
            tokenizer.eos_token = None
        if template is not None:
            tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIALS), "bos_token": "<|bos|>"})
            tokenizer.chat_template = template
        if equipped:
            equip(tokenizer)
        return tokenizer

    return made


@pytest.fixture(scope="session", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, make: Make) -> Any:
    """Every kind of tokenizer and template, ready to render."""
    kind = request.param
    if kind in ("gpt2", "stories260k"):
        folder = {"gpt2": "gpt2-tokenizer"}.get(kind, kind)
        tokenizer = AutoTokenizer.from_pretrained(str(request.getfixturevalue("shared") / "models" / folder))
        equip(tokenizer)
    elif kind in ("default", "no eos"):
        tokenizer = make(eos=kind == "default")
    else:
        tokenizer = make(OWN[kind])
    tokenizer.kind = kind
    return tokenizer


USER = Message("user", "is it good?")


def says(content: str, weight: int = 1) -> Message:
    return Message("assistant", content, weight)


def learnt(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The text that there is a loss on."""
    rendering = render(tokenizer, messages)
    ids = [token for token, flag in zip(rendering.ids, rendering.mask, strict=True) if flag]
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    ["", " ", "\n", "\n\n", " spaced ", "a\n\n", "\n b", "\u00e9", "\N{PARTY POPPER}\u200d", "a\tb", "Assistant:\n"]
)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """User and assistant in turn; a system message or a greeting may come first."""
    messages = [Message("system", draw(TEXT))] if draw(st.booleans()) else []
    messages += [says(draw(TEXT))] if draw(st.integers(0, 4)) == 0 else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [Message("user", draw(TEXT)), says(draw(TEXT), draw(st.integers(0, 1)))]
    return messages


def suit(tokenizer: Any, messages: Sequence[Message]) -> None:
    assume(tokenizer.kind != "refuses system" or messages[0].role != "system")


# Prompt and answer


@given(messages=conversations())
@example(messages=[USER, says("\n\n")])
@example(messages=[USER, says(""), USER, says("")])
@example(messages=[USER, says("a</think>b"), USER, says("c</think>d"), USER, says("e")])
@settings(max_examples=50)
def test_a_prompt_is_the_beginning_of_the_same_prompt_with_its_answer(tokenizer: Any, messages: list[Message]) -> None:
    suit(tokenizer, messages)
    whole = render(tokenizer, messages)
    prompt = render_prompt(tokenizer, messages[:-1])
    assert whole.ids[: len(prompt)] == prompt
    assert len(whole.ids) > len(prompt)
    assert set(whole.mask[len(prompt) :]) == {bool(messages[-1].weight)}


@given(messages=conversations())
@settings(max_examples=50)
def test_so_is_the_prompt_of_every_earlier_turn(tokenizer: Any, messages: list[Message]) -> None:
    suit(tokenizer, messages)
    if tokenizer.kind == "thinks":
        pytest.skip("rewrites earlier turns; see below")
    whole = render(tokenizer, messages)
    for number, message in enumerate(messages):
        if number and message.role == "assistant":
            prompt = render_prompt(tokenizer, messages[:number])
            assert whole.ids[: len(prompt)] == prompt
            assert whole.mask[len(prompt)] == bool(message.weight)


@given(messages=conversations())
@settings(max_examples=50)
def test_the_loss_is_on_what_the_assistant_says_and_its_end_and_on_nothing_else(
    tokenizer: Any, messages: list[Message]
) -> None:
    suit(tokenizer, messages)
    if tokenizer.kind in ("thinks", "stories260k"):
        pytest.skip("does not give the text back as it was")
    said = [message.content for message in messages if message.role == "assistant" and message.weight]
    if tokenizer.kind in ("trims", "refuses system", "llama3"):
        said = [one.strip() for one in said]
    end = equip(tokenizer).end_of_turn
    assert learnt(tokenizer, messages) == "".join(one + end for one in said)


def test_the_text_of_a_conversation_under_the_default_template(make: Make) -> None:
    tokenizer = make()
    messages = [Message("system", "Be kind."), USER, says("yes"), Message("user", "sure?"), says("no", 0)]
    rendering = render(tokenizer, messages)
    assert tokenizer.decode(rendering.ids) == (
        "System:\nBe kind.\nUser:\nis it good?\nAssistant:\nyes<|eos|>\nUser:\nsure?\nAssistant:\nno<|eos|>"
    )
    assert learnt(tokenizer, messages) == "yes<|eos|>"
    assert rendering.num_targets == len(tokenizer("yes").input_ids) + 1


@pytest.mark.parametrize("kind", ["default", "chatml", "llama3"])
def test_a_turn_of_weight_0_is_shown_and_not_learnt(make: Make, kind: str) -> None:
    tokenizer = make(OWN.get(kind))
    turns = [USER, says("first"), USER, says("second")]
    silent = [USER, says("first", 0), USER, says("second")]
    assert render(tokenizer, turns).ids == render(tokenizer, silent).ids
    assert "first" not in learnt(tokenizer, silent)
    assert render(tokenizer, [USER, says("only", 0)]).num_targets == 0


def test_a_greeting_is_learnt_without_its_header(make: Make) -> None:
    for template in (None, CHATML, LLAMA3):
        tokenizer = make(template)
        end = equip(tokenizer).end_of_turn
        assert learnt(tokenizer, [says("assistant"), USER, says("b")]) == f"assistant{end}b{end}"


def test_a_template_that_rewrites_earlier_turns_is_learnt_from_on_the_last_one_alone(make: Make) -> None:
    tokenizer = make(THINKS)
    messages = [USER, says("<think>a</think>b"), USER, says("<think>c</think>d")]
    assert learnt(tokenizer, messages) == "<think>c</think>d<|im_end|>"
    assert learnt(tokenizer, messages[:2]) == "<think>a</think>b<|im_end|>"
    assert "<think>a" not in tokenizer.decode(render(tokenizer, messages).ids)
    assert learnt(tokenizer, [USER, says("a")]) == "<think>\n\n</think>\n\na<|im_end|>"


def test_a_template_that_writes_no_end_of_turn_gets_one(make: Make) -> None:
    tokenizer = make(ENDLESS)
    equipment = equip(tokenizer)
    assert (equipment.end_of_turn, equipment.stop_ids) == ("<|eos|>", [tokenizer.eos_token_id])
    messages = [USER, says("code\n\n"), USER, says("b")]
    assert learnt(tokenizer, messages) == "code\n\n<|eos|>b<|eos|>"


def test_an_end_of_turn_that_is_no_token_gets_one_behind_it(make: Make) -> None:
    """ChatML on a tokenizer that was never given ChatML's tokens."""
    tokenizer = make(equipped=False)
    tokenizer.chat_template = CHATML
    assert equip(tokenizer).end_of_turn == "<|eos|>"
    assert learnt(tokenizer, [USER, says("a")]) == "a<|im_end|><|eos|>"


@given(content=TEXT, system=st.none() | TEXT)
@settings(max_examples=50)
def test_a_prompt_of_one_turn_is_what_transformers_makes_of_it(
    tokenizer: Any, content: str, system: str | None
) -> None:
    messages = [Message("user", content)]
    if system is not None and tokenizer.kind != "refuses system":
        messages = [Message("system", system), *messages]
    plain = [message.to_dict() for message in messages]
    theirs = tokenizer.apply_chat_template(plain, tokenize=True, add_generation_prompt=True, return_dict=True)
    assert render_prompt(tokenizer, messages) == theirs["input_ids"]


@given(answer=TEXT)
@settings(max_examples=50)
def test_an_answer_s_ids_stand_behind_any_prompt(tokenizer: Any, answer: str) -> None:
    equipment = equip(tokenizer)
    ids = render_answer(tokenizer, equipment, answer)
    assert ids[-1] == equipment.end_of_turn_id
    for messages in ([USER], [Message("user", ""), says("x"), USER]):
        prompt = render_prompt(tokenizer, messages)
        assert render(tokenizer, [*messages, says(answer)]).ids == prompt + ids


def test_a_date_in_the_template_is_the_same_tomorrow(make: Make) -> None:
    tokenizer = make(DATED)
    assert tokenizer.decode(render_prompt(tokenizer, [USER])).startswith("26 Jul 2024 00:00:00\n")
    plain = [USER.to_dict()]
    assert tokenizer.apply_chat_template(plain, tokenize=False).startswith("26 Jul 2024 00:00:00\n")  # nor elsewhere


def test_plain_text_is_learnt_whole_and_ends_where_the_document_ends(make: Make) -> None:
    tokenizer = make()
    middle, end = render_text(tokenizer, "a b", ends=False), render_text(tokenizer, "a b", ends=True)
    assert end.ids == [*middle.ids, tokenizer.eos_token_id]
    assert all(end.mask)
    assert len(end.mask) == len(end.ids)


# Refusals


def test_a_conversation_that_the_template_refuses_is_refused_in_its_words(make: Make) -> None:
    tokenizer = make(REFUSES_SYSTEM)
    messages = [Message("system", "s"), USER, says("a")]
    for attempt in (lambda: render(tokenizer, messages), lambda: render_prompt(tokenizer, messages[:-1])):
        with pytest.raises(DataError, match=r"refuses this conversation \(system, user.*System role not supported"):
            attempt()


def test_a_template_that_changes_what_is_said_is_refused(make: Make) -> None:
    tokenizer = make(CHATML.replace("message['content'] }}", "message['content'] | replace('x', 'y') }}"))
    assert learnt(tokenizer, [USER, says("a")]) == "a<|im_end|>"
    with pytest.raises(DataError, match="drops or changes what the assistant says in message 2"):
        render(tokenizer, [USER, says("x")])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for message in messages if message['role'] == 'user' %}{{ message['content'] }}{% endfor %}", "drops"),
        ("{{ messages | length }}{% for one in messages %}{{ one['content'] }}{% endfor %}", "as a continuation"),
        ("{{ raise_exception('never') }}", "refuses this conversation"),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_refused(make: Make, template: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        make(template)


def test_an_end_of_turn_that_is_read_as_text_is_refused(make: Make) -> None:
    tokenizer = make(equipped=False)
    tokenizer.split_special_tokens = True
    with pytest.raises(ModelError, match=r"reads the end of an assistant's turn.*as text"):
        equip(tokenizer)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "`messages` is empty"),
        ([USER], "a.jsonl:3: the last message is from 'user'; training needs one from 'assistant'"),
        ([USER, says("a"), Message("system", "s")], "the last message is from 'system'"),
        ([says("a")], "nothing before the assistant's message"),
        ([Message("human", "a"), says("a")], "message 1: unknown role 'human'; known: system, user, assistant"),
    ],
)
def test_a_conversation_that_teaches_nothing_is_refused(messages: list[Message], said: str) -> None:
    with pytest.raises(DataError, match=said):
        chat.check_messages(messages, "a.jsonl:3")


# Equipment


def test_equipping_again_changes_nothing(tokenizer: Any, tmp_path: Path) -> None:
    first = equip(tokenizer)
    tokenizer.save_pretrained(str(tmp_path / "one"))
    assert equip(tokenizer) == first
    tokenizer.save_pretrained(str(tmp_path / "two"))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert equip(AutoTokenizer.from_pretrained(str(tmp_path / "one"))) == first


def test_a_tokenizer_that_lacks_everything_gets_it(make: Make) -> None:
    tokenizer = make(eos=False, equipped=False)
    size = len(tokenizer)
    equipment = equip(tokenizer)
    assert equipment == chat.Equipment("default", END_OF_TURN, size, [size], size, [END_OF_TURN])
    assert tokenizer.eos_token == tokenizer.pad_token == END_OF_TURN
    assert len(tokenizer) == size + 1
    assert json.loads(json.dumps(equipment.to_dict())) == equipment.to_dict()


def test_a_tokenizer_s_own_template_end_and_padding_are_kept(make: Make) -> None:
    tokenizer = make(CHATML, equipped=False)
    tokenizer.pad_token = "<|im_start|>"
    equipment = equip(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert equipment.template == "own"
    assert (equipment.end_of_turn, equipment.end_of_turn_id) == ("<|im_end|>", end)
    assert equipment.stop_ids == sorted({end, tokenizer.eos_token_id})
    assert equipment.pad_id == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert equipment.added_tokens == []
    assert tokenizer.chat_template == CHATML


def test_of_several_templates_the_one_called_default_is_used(make: Make) -> None:
    tokenizer = make({"default": CHATML, "tool_use": "{{ raise_exception('tools') }}"})
    assert tokenizer.chat_template == CHATML
    with pytest.raises(ModelError, match="multiple chat templates"):
        make({"rag": CHATML, "tool_use": CHATML})


def test_a_default_template_begins_as_the_tokenizer_does(shared: Path, make: Make) -> None:
    story = AutoTokenizer.from_pretrained(str(shared / "models" / "stories260k"))
    equip(story)
    assert render_prompt(story, [USER])[0] == story.bos_token_id
    assert render_prompt(story, [USER]).count(story.bos_token_id) == 1
    assert render_prompt(make(), [USER])[0] != make().eos_token_id


# Clipping


def clipped(tokenizer: Any, messages: Sequence[Message], max_length: int) -> chat.Clipped:
    return clip(tokenizer, Example("1", "a:1", tuple(messages)), max_length)


def test_what_fits_is_left_as_it_is(make: Make) -> None:
    tokenizer = make()
    row = Example("1", "a:1", (USER, says("yes")), "yes")
    whole = render(tokenizer, row.messages)
    assert clip(tokenizer, row, len(whole.ids)) == chat.Clipped(row, len(whole.ids), whole)


@given(messages=conversations(), cut=st.integers(1, 60))
@settings(max_examples=60)
def test_clipping_fits_and_touches_prompts_alone(tokenizer: Any, messages: list[Message], cut: int) -> None:
    suit(tokenizer, messages)
    whole = render(tokenizer, messages)
    limit = max(1, len(whole.ids) - cut)
    done = clipped(tokenizer, messages, limit)
    assert done.length == len(whole.ids)
    emptied = [message if message.role == "assistant" else Message(message.role, "") for message in messages]
    if done.example is None:
        assert len(render(tokenizer, emptied).ids) > limit
        assert done.rendering == whole
        return
    assert len(done.rendering.ids) <= limit
    assert done.rendering == render(tokenizer, done.example.messages)
    for before, after in zip(messages, done.example.messages, strict=True):
        assert before.content.startswith(after.content)
        assert before == after or before.role != "assistant"


def test_the_longest_message_loses_its_end_first(make: Make) -> None:
    tokenizer = make()
    messages = [
        Message("system", "s" * 20),
        Message("user", "u" * 60),
        says("yes"),
        Message("user", "v" * 30),
        says("no"),
    ]
    length = len(render(tokenizer, messages).ids)
    done = clipped(tokenizer, messages, length - 35)
    assert done.example is not None
    assert [len(message.content) for message in done.example.messages] == [20, 27, 3, 28, 2]
    assert len(done.rendering.ids) == length - 35


def test_no_character_is_cut_in_two(make: Make) -> None:
    tokenizer = make()
    text = "\N{PARTY POPPER}" * 10
    length = len(render(tokenizer, [Message("user", text), says("a")]).ids)
    for cut in range(1, 40):
        done = clipped(tokenizer, [Message("user", text), says("a")], length - cut)
        assert done.example is not None
        left = done.example.messages[0].content
        assert text.startswith(left)
        assert len(left) == 10 - -(-cut // 4)


def test_what_cannot_be_made_to_fit_is_left_out(make: Make) -> None:
    tokenizer = make()
    for messages in ([USER, says("y" * 50)], [Message("user", ""), says("a")]):
        done = clipped(tokenizer, messages, 10)
        assert done.example is None
        assert done.length == len(done.rendering.ids) > 10


def test_a_tokenizer_that_knows_no_places_is_clipped_by_characters(make: Make) -> None:
    class Slow:
        """A tokenizer in Python, which gives no offsets."""

        is_fast = False

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __call__(self, *args: Any, **options: Any) -> Any:
            assert "return_offsets_mapping" not in options
            return self.inner(*args, **options)

        def __len__(self) -> int:
            return len(self.inner)

    done = clipped(Slow(make()), [Message("user", "lovely great " * 20), says("a")], 60)
    assert done.example is not None
    assert 40 < len(done.rendering.ids) <= 60


# Golden ids


@pytest.fixture
def rendering(make: Make) -> dict[str, Any]:
    tokenizer = make(CHATML)
    return golden(tokenizer, equip(tokenizer), [[USER, says("yes")], [USER, says("yes"), USER, says("no")]])


def test_golden_ids_survive_json_and_differ_from_themselves_in_nothing(make: Make, rendering: dict[str, Any]) -> None:
    assert rendering["end_of_turn"] == "<|im_end|>"
    assert [len(row["messages"]) for row in rendering["golden"]] == [2, 4]
    assert sum(rendering["golden"][1]["mask"]) > 2
    assert differences(make(CHATML), json.loads(json.dumps(rendering))) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "\n{{",
            "\n {{",
            r"conversation 1, message 1 \(user: 'is it good\?'\): token 6 is \d+ ' ' here and was \d+ 'i' in training",
        ),
        (
            "<|im_end|>\n",
            "<|im_end|>",
            r"golden conversation 1, .*: token \d+ is \d+ '<\|im_start\|>' here and was \d+ '\\n'",
        ),
        ("assistant\n{% endif", "assistant{% endif", r"golden conversation 1.*: token \d+ is "),
        ("{% endfor %}", "{% endfor %} ", "golden conversation 1"),
        ("{{ message['content'] }}", "{{ message['content'] if messages | length > 2 }}", "golden conversation 1: the"),
        ("{% for", "{# a note #}{% for", "chat template is not the one of training .* come out the same"),
    ],
)
def test_a_change_of_the_template_is_named(
    make: Make, rendering: dict[str, Any], old: str, new: str, said: str
) -> None:
    assert old in CHATML
    tokenizer = make(equipped=False)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIALS), "bos_token": "<|bos|>"})
    tokenizer.chat_template = CHATML.replace(old, new)
    found = differences(tokenizer, rendering)
    assert re.search(said, found[0])


def test_a_changed_token_is_named(make: Make, rendering: dict[str, Any]) -> None:
    tokenizer = make(CHATML)
    tokenizer.add_tokens(["good"])
    (one, _) = differences(tokenizer, rendering)
    said = "golden conversation 1, message 1 (user: 'is it good?'): token 12 is 306 'good' here and was 71 'g'"
    assert one == f"{said} in training"


def test_an_end_that_is_missing_is_named(make: Make, rendering: dict[str, Any]) -> None:
    rendering["golden"][0]["ids"].append(7)
    assert "is (nothing) here and was" in differences(make(CHATML), rendering)[0]


# Examples


@given(
    st.builds(
        Example,
        id=st.text(),
        source=st.text(),
        messages=st.lists(
            st.builds(Message, st.sampled_from(chat.ROLES), st.text(), st.integers(0, 1)), min_size=1
        ).map(tuple),
        label=st.none() | st.text(),
    )
    | st.builds(Example, id=st.text(), source=st.text(), text=st.text(), ends=st.booleans())
)
def test_an_example_that_was_written_is_read_as_the_same(one: Example) -> None:
    assert Example.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_an_example_s_prompt_and_answer_are_its_messages() -> None:
    one = Example("1", "a:1", (USER, says("yes")))
    assert (one.prompt, one.answer) == ((USER,), "yes")
    assert Example("1", "a:1", text="t").answer == ""


# Blocks: many at once, the same as one by one


ROLES = st.sampled_from(["system", "user", "assistant", "developer"])
ANY_MESSAGES = st.lists(st.builds(Message, ROLES, TEXT, st.integers(0, 1)), min_size=1, max_size=5)
SPECIAL_TEXT = st.lists(TEXT | st.sampled_from(["<|eos|>", "<|endoftext|>", "</s>", *SPECIALS]), max_size=4).map(
    "".join
)


def or_error(work: Callable[..., Any], *args: Any) -> Any:
    """What the call gives, or what it says when it refuses."""
    try:
        return work(*args)
    except DataError as error:
        return str(error)


def told(results: Sequence[Any]) -> list[Any]:
    return [str(one) if isinstance(one, DataError) else one for one in results]


@given(block=st.lists(ANY_MESSAGES | conversations(), max_size=5))
@settings(max_examples=30)
def test_a_block_of_conversations_is_rendered_as_each_alone(tokenizer: Any, block: list[list[Message]]) -> None:
    expected = [or_error(render, tokenizer, messages) for messages in block]
    assert told(chat.render_all(tokenizer, block)) == expected


@given(rows=st.lists(st.tuples(ANY_MESSAGES | conversations(), st.integers(4, 60)), max_size=4))
@settings(max_examples=20)
def test_a_block_of_examples_is_clipped_as_each_alone(tokenizer: Any, rows: list[tuple[list[Message], int]]) -> None:
    examples = [Example("a", "a", tuple(messages)) for messages, _ in rows]
    limits = [limit for _, limit in rows]
    expected = [or_error(clip, tokenizer, one, limit) for one, limit in zip(examples, limits, strict=True)]
    assert told(chat.clip_all(tokenizer, examples, limits)) == expected


@given(texts=st.lists(st.tuples(SPECIAL_TEXT, st.booleans()), max_size=5))
@settings(max_examples=30)
def test_a_block_of_texts_is_rendered_as_each_alone(tokenizer: Any, texts: list[tuple[str, bool]]) -> None:
    expected = [render_text(tokenizer, text, ends=ends) for text, ends in texts]
    assert chat.render_texts(tokenizer, [text for text, _ in texts], [ends for _, ends in texts]) == expected


@pytest.mark.parametrize("told_to", ["cut", "pad", "split"])
def test_a_tokenizer_that_was_told_to_cut_pad_or_split_is_asked_the_plain_way(make: Make, told_to: str) -> None:
    tokenizer = make(CHATML)
    texts = ["lovely <|im_end|>", "<|im_start|> great fine superb kind"]
    plain = [chat.encode(tokenizer, text) for text in texts]
    match told_to:
        case "cut":
            tokenizer.backend_tokenizer.enable_truncation(2)
        case "pad":
            tokenizer.backend_tokenizer.enable_padding(length=50)
        case "split":
            tokenizer.split_special_tokens = True
            plain = [chat.encode(tokenizer, text) for text in texts]
            tokenizer.backend_tokenizer.encode_special_tokens = False
    assert chat.encode_all(tokenizer, texts) == plain


def test_a_tokenizer_with_a_way_of_its_own_is_asked_in_that_way(make: Make) -> None:
    tokenizer = make()

    class Own(type(tokenizer)):  # type: ignore[misc]
        def _encode_plus(self, text: Any, *args: Any, **options: Any) -> Any:
            return super()._encode_plus([one.upper() for one in text], *args, **options)

    tokenizer.__class__ = Own
    assert chat.encode_all(tokenizer, ["abc"]) == chat.encode_all(make(), ["ABC"]) != chat.encode_all(make(), ["abc"])


def test_the_default_template_with_more_than_words_is_left_to_jinja(make: Make) -> None:
    """A message that says more than role and content may be written otherwise some day."""

    class Louder(Message):
        def to_dict(self) -> dict[str, str]:
            return super().to_dict() | {"content": self.content.upper(), "name": "x"}

    tokenizer = make()
    messages = [Louder("user", "a"), Louder("assistant", "B")]
    assert chat.render_all(tokenizer, [messages]) == [render(tokenizer, messages)]
