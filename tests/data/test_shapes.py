"""A row becomes an example with the right prompt, answer and class, or is named with what is wrong with it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright import recipe as recipes
from tunewright.chat import Example, Message, ToolCall
from tunewright.data import shapes
from tunewright.data.shapes import Unusable
from tunewright.data.sources import Row
from tunewright.errors import DataError

USER, SAYS = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def call(name: str, arguments: Any, call_id: str | None = "c1") -> dict[str, Any]:
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made if call_id is None else {"id": call_id, **made}


def recipe(task: str, **data: Any) -> recipes.Recipe:
    return recipes.Recipe.model_validate(
        {"name": "one", "model": "m", "task": task, "data": {"train": "a.jsonl", **data}}
    )


def example(
    task: str, fields: dict[str, Any], *others: dict[str, Any], classes: tuple[str, ...] | None = None, **data: Any
) -> Example:
    """The example of a row; the table's shape is that of this and the other rows."""
    rows = [Row(f"a.jsonl:{number}", each) for number, each in enumerate((fields, *others), start=1)]
    shape = shapes.recognise(recipe(task, **data), rows, classes)
    assert shape is not None
    return shape.read(rows[0])


def unusable(task: str, fields: dict[str, Any], *others: dict[str, Any], **data: Any) -> tuple[str, str, str]:
    with pytest.raises(Unusable) as refused:
        example(task, fields, *others, **data)
    return refused.value.code, refused.value.severity, str(refused.value)


def conversation(*turns: str) -> tuple[Message, ...]:
    return tuple(Message(("user", "assistant")[number % 2], turn) for number, turn in enumerate(turns))


# Classes


def test_a_text_and_its_class_are_a_conversation() -> None:
    one = example("classification", {"text": " lovely ", "label": "good", "id": 7})
    assert one == Example("a.jsonl:1", "a.jsonl:1", conversation(" lovely ", "good"), "good")
    assert example("classification", {"review": "a", "stars": "b"}, text="review", label="stars").label == "b"


def test_a_system_message_is_put_before_every_row_that_has_none() -> None:
    system = Message("system", "Be kind.")
    one = example("classification", {"text": "a", "label": "b"}, system="Be kind.")
    assert one.messages == (system, *conversation("a", "b"))
    assert one.prompt == (system, Message("user", "a"))
    assert example("chat", {"prompt": "a", "completion": "b"}, system="Be kind.").messages[0] == system
    for role in ("system", "developer"):
        own = [
            {"role": role, "content": "own"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ]
        assert example("chat", {"messages": own}, system="Be kind.").messages[0] == Message(role, "own")


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ("good", "good"),
        (" good\n", "good"),
        (1, "1"),
        (0, "0"),
        (1.0, "1"),
        (-2.0, "-2"),
        (1.5, "1.5"),
        (True, "true"),
        (False, "false"),
        ("1", "1"),
        ("nan", "nan"),
        ("None", "None"),
    ],
)
def test_a_label_may_be_of_any_plain_type(value: Any, label: str) -> None:
    assert example("classification", {"text": "a", "label": value}).label == label


@pytest.mark.parametrize(
    ("labels", "value", "label"),
    [
        (["neg", "pos"], 0, "neg"),
        (["neg", "pos"], 1.0, "pos"),
        (["neg", "pos"], "1", "pos"),
        (["neg", "pos"], "pos", "pos"),
        (["neg", "pos"], True, "pos"),
        (["neg", "pos"], False, "neg"),
        (["false", "true"], True, "true"),
        ({1: "one", 2: "two"}, 2, "two"),
        ({1: "one", 2: "two"}, "one", "one"),
        ({-1: "neg", 1: "pos"}, -1.0, "neg"),
        (["0", "1"], 1, "1"),
        ({1: "1", 2: "2"}, 2, "2"),
    ],
)
def test_a_declared_class_may_be_given_by_number_or_by_word(labels: Any, value: Any, label: str) -> None:
    assert example("classification", {"text": "a", "label": value}, labels=labels).label == label


@pytest.mark.parametrize("labels", [["1", "2", "3"], {0: "1", 1: "0"}])
def test_a_word_that_is_another_class_s_number_is_refused(labels: Any) -> None:
    with pytest.raises(DataError, match=r"data.labels: '[01]' is the word of one class and the number of another"):
        example("classification", {"text": "a", "label": 1}, labels=labels)


def test_a_data_set_s_own_classes_are_numbers_in_its_column() -> None:
    """Also where the classes are called 1 to 5, as stars are."""
    for classes, value, label in (
        (("1", "2", "3", "4", "5"), 0, "1"),
        (("1", "2", "3", "4", "5"), 1, "2"),
        (("1", "2", "3", "4", "5"), 4, "5"),
        (("neg", "pos"), 1, "pos"),
        (("neg", "pos"), "pos", "pos"),
    ):
        assert example("classification", {"text": "a", "label": value}, classes=classes).label == label
    renamed = example("classification", {"text": "a", "label": 1}, classes=("neg", "pos"), labels=["bad", "good"])
    assert renamed.label == "good"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("postive", "unknown label 'postive'; did you mean 'positive'?"),
        ("x", "unknown label 'x'; known: negative, positive"),
        (2, "unknown label '2'; known: negative, positive"),
        (-1, "unknown label '-1'; known: negative, positive"),
    ],
)
def test_an_unknown_label_is_named_with_the_nearest(value: Any, said: str) -> None:
    row = {"text": "a", "label": value}
    assert unusable("classification", row, labels=["negative", "positive"]) == ("unknown_label", "error", said)


def test_many_known_labels_are_not_all_named() -> None:
    labels = [f"class {number:03}" for number in range(50)]
    _, _, said = unusable("classification", {"text": "a", "label": "zzz"}, labels=labels)
    assert said.endswith("class 009, ...")


@pytest.mark.parametrize("value", ["", "  ", "\n", None, math.nan])
def test_an_empty_text_or_label_is_left_out_with_a_warning(value: Any) -> None:
    assert unusable("classification", {"text": "a", "label": value}) == (
        "empty_label", "warning", "column 'label' is empty"
    )  # fmt: skip
    if not isinstance(value, float):
        assert unusable("classification", {"text": value, "label": "b"})[:2] == ("empty_text", "warning")
        assert unusable("pretraining", {"text": value})[:2] == ("empty_text", "warning")
        assert unusable("chat", {"prompt": value, "completion": "b"})[:2] == ("empty_prompt", "warning")
        assert unusable("chat", {"prompt": "a", "completion": value})[:2] == ("empty_answer", "warning")


@pytest.mark.parametrize(
    ("task", "row", "said"),
    [
        ("classification", {"text": 5, "label": "a"}, "column 'text' is a number, not text"),
        ("classification", {"text": "a", "label": ["b"]}, "column 'label' is a list; one class for each row"),
        ("classification", {"text": "a", "label": {}}, "column 'label' is an object; one class for each row"),
        ("pretraining", {"text": ["a"]}, "column 'text' is a list, not text"),
        ("chat", {"prompt": "a", "completion": 1}, "column 'completion' is a number, not text"),
        ("chat", {"messages": "a"}, "column 'messages' is a string, not a list of messages"),
        ("chat", {"messages": None}, "column 'messages' is null, not a list of messages"),
        ("chat", {"instruction": "a", "input": 3, "response": "b"}, "column 'input' is a number, not text"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(task: str, row: dict[str, Any], said: str) -> None:
    assert unusable(task, row) == ("wrong_type", "error", said)


# Columns


def test_a_missing_column_is_refused_with_the_nearest() -> None:
    with pytest.raises(DataError) as refused:
        example("classification", {"text": "a", "lable": "b"}, {"text": "c", "lable": "d"})
    assert str(refused.value) == (
        "a.jsonl:1: no column 'label' for data.label; did you mean 'lable'? (set data.label in the recipe)"
    )
    with pytest.raises(DataError, match=r"no column 'body' for data.text; columns here: 'x', 'label'"):
        example("classification", {"x": "a", "label": "b"}, text="body")


def test_a_row_that_lacks_a_column_that_others_have_is_the_row_s_fault() -> None:
    assert unusable("classification", {"text": "a"}, {"text": "a", "label": "b"}) == (
        "missing_column", "error", "no column 'label'; columns here: 'text'"
    )  # fmt: skip
    assert unusable("chat", {"prompt": "a"}, {"prompt": "a", "completion": "b"})[0] == "missing_column"


def test_a_table_without_rows_has_no_shape() -> None:
    assert shapes.recognise(recipe("classification"), [], None) is None


def test_plain_text_keeps_whether_it_ends_a_document() -> None:
    for ends in (True, False):
        shape = shapes.recognise(recipe("pretraining"), [Row("a.txt:1", {"text": "a"}, ends)], None)
        assert shape is not None
        assert shape.read(Row("a.txt:1", {"text": " a\n"}, ends)) == Example(
            "a.txt:1", "a.txt:1", text=" a\n", ends=ends
        )


# Conversations


@pytest.mark.parametrize(
    ("row", "data", "turns"),
    [
        ({"prompt": "a", "completion": " b"}, {}, ("a", " b")),
        ({"instruction": "a", "response": "b"}, {}, ("a", "b")),
        ({"instruction": "a", "output": "b"}, {}, ("a", "b")),
        ({"instruction": "a", "input": "x", "output": "b"}, {}, ("a\n\nx", "b")),
        ({"instruction": "a", "input": "  ", "output": "b"}, {}, ("a", "b")),
        ({"instruction": "a", "input": None, "output": "b"}, {}, ("a", "b")),
        ({"question": "a", "answer": "b"}, {"prompt": "question", "completion": "answer"}, ("a", "b")),
        ({"q": "a", "completion": "b"}, {"prompt": "q"}, ("a", "b")),
        ({"i": "a", "c": "x", "r": "b"}, {"instruction": "i", "input": "c", "response": "r"}, ("a\n\nx", "b")),
        ({"instruction": "a", "input": "x", "r": "b"}, {"response": "r"}, ("a\n\nx", "b")),
        ({"prompt": "a", "completion": "b", "": "3", "input": "no"}, {}, ("a", "b")),
    ],
)
def test_pairs_are_conversations_of_two_turns(row: dict[str, Any], data: dict[str, str], turns: Any) -> None:
    assert example("chat", row, **data).messages == conversation(*turns)


def test_an_input_that_the_first_row_lacks_is_not_lost() -> None:
    without, having = {"instruction": "a", "response": "b"}, {"instruction": "a", "input": "x", "response": "b"}
    assert example("chat", having, without).messages == conversation("a\n\nx", "b")
    rows = [Row("1", without), Row("2", having)]
    shape = shapes.recognise(recipe("chat"), rows, None)
    assert shape is not None
    assert [len(shape.read(row).messages[0].content) for row in rows] == [1, 4]


def test_an_input_that_is_named_and_nowhere_is_refused() -> None:
    with pytest.raises(DataError, match=r"no column 'inptu' for data.input; did you mean 'input'\?"):
        example("chat", {"instruction": "a", "input": "x", "response": "b"}, instruction="instruction", input="inptu")


def test_rows_of_no_known_shape_are_refused() -> None:
    with pytest.raises(DataError, match=r"a.jsonl:1: columns 'a', 'b': task: chat needs `messages`, or `prompt` and"):
        example("chat", {"a": "1", "b": "2"})


def test_messages_are_taken_with_their_weights() -> None:
    given = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a", "name": "Ann"},
        {"role": "assistant", "content": "b", "weight": 0, "tool_calls": None},
        {"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]},
        {"role": "assistant", "content": "e", "weight": 1},
    ]
    assert example("chat", {"messages": given}).messages == (
        Message("system", "s"),
        Message("user", "a"),
        Message("assistant", "b", 0),
        Message("user", "cd"),
        Message("assistant", "e"),
    )
    assert example("chat", {"talk": given}, messages="talk").answer == "e"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "`messages` is empty; training needs at least a user and an assistant message"),
        ([USER], "the last message is from 'user'; training needs one from 'assistant' to learn from"),
        ([SAYS], "there is nothing before the assistant's message; training needs a user's to answer"),
        ([{"role": "human", "content": "a"}, SAYS], "message 1: unknown role 'human'; known: system, user"),
        ([{"content": "a"}, SAYS], "message 1 has no role"),
        (["a", SAYS], "message 1 has no role"),
        ([USER, {"role": "assistant", "content": None}], "message 2 (assistant): content is null, not text"),
        ([USER, {"role": "assistant"}], "message 2 (assistant): content is null, not text"),
        ([USER, {"role": "assistant", "content": 3}], "message 2 (assistant): content is a number, not text"),
        ([USER, {**SAYS, "content": [{"type": "image_url"}]}], "message 2 (assistant): content is a list, not text"),
        ([USER, {**SAYS, "content": [{"type": "text"}]}], "message 2 (assistant): content is a list, not text"),
        ([USER, {**SAYS, "function_call": {"name": "f"}}], "message 2: `function_call` is OpenAI's old form; use"),
        ([USER, {**SAYS, "tool_calls": {"a": 1}}], "message 2: tool_calls is an object, not a list"),
        ([USER, {**SAYS, "tool_calls": [{}]}], "message 2, call 1 is not {"),
        ([USER, {**SAYS, "tool_calls": [call("f", "{")]}], "message 2, call 1 (f): arguments: not JSON (Expecting"),
        ([USER, {**SAYS, "tool_calls": [call("f", '{"a": NaN}')]}], "message 2, call 1 (f): arguments: not JSON (NaN"),
        ([USER, {**SAYS, "tool_calls": [call("f", "[1]")]}], "message 2, call 1 (f): arguments is a list, not a JSON"),
        ([USER, {**SAYS, "tool_calls": [call("f", None)]}], "message 2, call 1 (f): arguments is null, not a JSON"),
        ([USER, {**SAYS, "tool_calls": [call("f", "{}") | {"id": 3}]}], "message 2, call 1 (f): id is a number"),
        ([USER, {"role": "tool", "content": "x", "tool_call_id": "c"}, SAYS], "message 2: tool_call_id 'c' answers no"),
        ([USER, {"role": "tool", "content": "x", "name": 3}, SAYS], "message 2 (tool): name is a number, not text"),
        ([USER, {**SAYS, "weight": 2}], "message 2: weight is 2; it can be 0 or 1"),
        ([USER, {**SAYS, "weight": "1"}], "message 2: weight is '1'; it can be 0 or 1"),
    ],
)
def test_messages_that_cannot_be_learnt_from_are_named(messages: list[Any], said: str) -> None:
    code, severity, message = unusable("chat", {"messages": messages})
    assert (code, severity) == ("messages", "error")
    assert message.startswith(said)


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def test_tools_and_their_calls_are_taken() -> None:
    row = {
        "tools": [WEATHER],
        "parallel_tool_calls": False,
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call("weather", '{"city":  "Ghent"}')], "weight": 0},
            {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": [{"type": "text", "text": "21"}]},
            {"role": "assistant", "tool_calls": [call("weather", {"city": "L\u00fcbeck"}, None)]},
        ],
    }
    one = example("chat", row)
    assert one.tools == (WEATHER,)
    assert one.messages == (
        Message("user", "a"),
        Message("assistant", "", 0, (ToolCall("weather", '{"city":  "Ghent"}', "c1"),)),
        Message("tool", "21", tool_call_id="c1", name="weather"),
        Message("assistant", "", tool_calls=(ToolCall("weather", '{"city": "L\u00fcbeck"}'),)),
    )
    for tools in (json.dumps([WEATHER]), None, [], "", "[]"):
        assert len(example("chat", row | {"tools": tools}).tools) == (1 if tools and len(tools) > 2 else 0)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"tools": {"a": 1}}, "`tools` is an object, not a list"),
        ({"tools": "[{"}, "`tools`: not JSON (Expecting property name"),
        ({"tools": [{"type": "function", "name": "f"}]}, "tool 1 is not a function"),
        ({"tools": [WEATHER, {"type": "file_search"}]}, "tool 2 is not a function"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": "x"}}]}, "tool 1 (f): parameters is"),
        ({"functions": [{"name": "f"}]}, "`functions` is OpenAI's old form"),
        (
            {"tools": [WEATHER], "messages": [USER, {**SAYS, "tool_calls": [call("wether", "{}")]}]},
            "message 2, call 1: 'wether' is not among the row's `tools`; did you mean 'weather'?",
        ),
    ],
)
def test_tools_that_cannot_be_read_are_named(row: dict[str, Any], said: str) -> None:
    _, severity, message = unusable("chat", {"messages": [USER, SAYS]} | row)
    assert severity == "error"
    assert message.startswith(said)


def test_messages_without_anything_to_learn_are_left_out_with_a_warning() -> None:
    empty, silent = {**SAYS, "content": " "}, {**SAYS, "weight": 0}
    for messages in ([USER, empty], [USER, SAYS, USER, empty], [USER, silent], [USER, silent, USER, silent]):
        assert unusable("chat", {"messages": messages})[:2] == ("empty_answer", "warning")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda below: (
        st.lists(below, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "weight", "type", "text", "tool_calls", "function", "name", "arguments"]
            ),
            below,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(
    task=st.sampled_from(["classification", "chat", "pretraining"]),
    fields=st.dictionaries(
        st.sampled_from(["text", "label", "messages", "tools", "prompt", "completion", "input"]), JSON
    ),
)
def test_any_row_is_an_example_or_named(task: str, fields: dict[str, Any]) -> None:
    try:
        one = example(task, fields)
    except (DataError, Unusable):
        return
    assert Example.from_dict(one.to_dict()) == one
    assert one.text if task == "pretraining" else one.answer.strip()


# Pairs

BETTER, WORSE = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
PAIR = Example("a.jsonl:1", "a.jsonl:1", (Message("user", "a"), Message("assistant", "good")), rejected="bad")


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a", "chosen": "good", "rejected": "bad"},
        {"prompt": [USER], "chosen": "good", "rejected": "bad"},
        {"prompt": [USER], "chosen": [BETTER], "rejected": [WORSE]},
        {"prompt": "a", "chosen": [USER, BETTER], "rejected": [USER, WORSE]},
        {"chosen": [USER, BETTER], "rejected": [USER, WORSE]},
        {"input": {"messages": [USER]}, "preferred_output": [BETTER], "non_preferred_output": [WORSE]},
        {
            "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [BETTER],
            "non_preferred_output": [WORSE],
        },
    ],
)
def test_every_form_of_a_pair_is_the_same_example(fields: dict[str, Any]) -> None:
    assert example("preference", fields) == PAIR


def test_a_pairs_columns_may_have_other_names() -> None:
    fields = {"question": "a", "yes": "good", "no": "bad"}
    assert example("preference", fields, prompt="question", chosen="yes", rejected="no") == PAIR
    openai = {"i": {"messages": [USER]}, "p": [BETTER], "n": [WORSE]}
    assert example("preference", openai, input="i", preferred_output="p", non_preferred_output="n") == PAIR
    assert example("preference", fields | {"chosen": "x"}, prompt="question", chosen="yes", rejected="no") == PAIR


def test_a_pair_keeps_what_was_said_before_and_gets_a_system_message() -> None:
    talk = [USER, SAYS, {"role": "user", "content": "c"}]
    one = example("preference", {"prompt": talk, "chosen": "good", "rejected": "bad"}, system="Be kind.")
    assert one.messages == (Message("system", "Be kind."), *conversation("a", "b", "c", "good"))
    assert (one.answer, one.rejected) == ("good", "bad")


@pytest.mark.parametrize(
    ("fields", "code", "severity", "said"),
    [
        ({"prompt": "a", "chosen": "good", "rejected": "good "}, "same_answers", "warning", "are the same"),
        ({"prompt": "a", "chosen": "", "rejected": "bad"}, "empty_answer", "warning", "'chosen' is empty"),
        ({"prompt": "a", "chosen": "good", "rejected": None}, "empty_answer", "warning", "'rejected' is empty"),
        ({"prompt": " ", "chosen": "good", "rejected": "bad"}, "empty_prompt", "warning", "'prompt' is empty"),
        ({"prompt": "a", "chosen": 1, "rejected": "bad"}, "wrong_type", "error", "'chosen' is a number"),
        ({"prompt": "a", "chosen": [USER], "rejected": "bad"}, "messages", "error", "does not end with a message from"),
        ({"prompt": "a", "chosen": [SAYS, BETTER], "rejected": "bad"}, "messages", "error", "it takes one answer"),
        ({"chosen": [USER, BETTER], "rejected": [SAYS, WORSE]}, "prompts_differ", "error", "answer different prompts"),
        ({"chosen": [BETTER], "rejected": [WORSE]}, "messages", "error", "nothing before the assistant's message"),
        (
            {"input": [USER], "preferred_output": [BETTER], "non_preferred_output": [WORSE]},
            "wrong_type",
            "error",
            "'input' is not an object with `messages`",
        ),
        (
            {"input": {"messages": [USER]}, "preferred_output": [], "non_preferred_output": [WORSE]},
            "messages",
            "error",
            "does not end with a message from",
        ),
        (
            {
                "input": {"messages": [USER], "tools": [{}]},
                "preferred_output": [BETTER],
                "non_preferred_output": [WORSE],
            },
            "messages",
            "error",
            "has tools",
        ),
    ],
)
def test_a_pair_that_cannot_be_learnt_is_named(fields: dict[str, Any], code: str, severity: str, said: str) -> None:
    found = unusable("preference", fields)
    assert found[:2] == (code, severity)
    assert said in found[2]


def test_a_table_without_pairs_says_what_it_needs() -> None:
    with pytest.raises(DataError, match="preference needs `prompt`, `chosen` and `rejected`, or OpenAI's `input`"):
        example("preference", {"chosen": "good", "rejected": "bad"})


# Prompts for a grader


def asked(fields: dict[str, Any], *, reference: str = "x", **data: Any) -> Example:
    grader = {"type": "string_check", "reference": reference, "operation": "eq"}
    made = recipes.Recipe.model_validate(
        {"name": "one", "model": "m", "task": "reward", "data": {"train": "a.jsonl", **data}, "grader": grader}
    )
    row = Row("a.jsonl:1", fields)
    shape = shapes.recognise(made, [row], None)
    assert shape is not None
    return shape.read(row)


@pytest.mark.parametrize("prompt", [{"messages": [USER]}, {"prompt": "a"}, {"prompt": [USER]}])
def test_a_prompt_and_the_row_for_the_grader(prompt: dict[str, Any]) -> None:
    fields = prompt | {"answer": {"value": [1, 2]}}
    one = asked(fields, reference="{{ item.answer.value[1] }}", system="Be kind.")
    assert one.messages == one.prompt == (Message("system", "Be kind."), Message("user", "a"))
    assert one.item == fields
    assert one.answer == ""
    assert Example.from_dict(one.to_dict()) == one


def test_what_is_no_json_reaches_the_grader_as_text() -> None:
    import datetime

    one = asked({"prompt": "a", "day": datetime.date(2024, 1, 2)}, reference="{{ item.day }}")
    assert one.item == {"prompt": "a", "day": "2024-01-02"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": [USER, SAYS]}, "the last message is from 'assistant'; task: reward needs a prompt"),
        ({"messages": []}, "nothing to answer"),
        ({"messages": [{"role": "cat", "content": "a"}]}, "unknown role 'cat'"),
        ({"messages": "a"}, "is a string, not a list of messages"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(Unusable) as refused:
        asked(fields)
    assert said in str(refused.value)


def test_a_column_that_the_grader_reads_is_looked_for_in_every_row() -> None:
    with pytest.raises(
        Unusable, match=r"the grader reads item\.answr, which the row lacks; columns here: 'prompt', 'a"
    ):
        asked({"prompt": "a", "answer": "b"}, reference="{{ item.answr }}")
