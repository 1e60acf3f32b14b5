"""What a run uses of its data: every row is used or accounted for, and the same rows come out every time."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunewright import chat, models
from tunewright import recipe as recipes
from tunewright.chat import Equipment, Example, Message
from tunewright.data import account, prepare
from tunewright.data.findings import FIRST, Finding
from tunewright.data.prepare import pieces, shuffled, source_fingerprint
from tunewright.errors import DataError, ModelError, RunError
from tunewright.generate import LabelTree
from tunewright.models import ModelRef
from tunewright.run import Run, create, read_json, read_json_lines
from tunewright.testing import tiny_model

GOOD, BAD = {"text": "lovely", "label": "good"}, {"text": "awful", "label": "bad"}


@pytest.fixture(scope="session")
def base(model_folder: Path) -> tuple[ModelRef, Any, Equipment]:
    ref = models.find(str(model_folder))
    tokenizer = models.load_tokenizer(ref)
    return ref, tokenizer, chat.equip(tokenizer)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, rows: Sequence[dict[str, Any] | str]) -> str:
    """A line for each row, as JSON unless it is a string."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def many(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows of two classes in turn, no two alike."""
    return [{"text": f"row {number}", "label": ("good", "bad")[number % 2]} for number in range(start, start + count)]


@dataclass
class Prepared:
    """What a run has of its data, read back from its folder."""

    run: Run
    examples: dict[str, list[Example]]
    findings: list[Finding]
    labels: list[str] | None
    splits: dict[str, dict[str, Any]]
    checks: dict[str, Any]


def prepared(asked: recipes.Recipe, ref: ModelRef, tokenizer: Any, equipment: Equipment) -> Prepared:
    """Prepare the data of a new run; what is written is what was found without one."""
    with tempfile.TemporaryDirectory() as folder:
        run = create(Path(folder), asked)
        assembled = prepare.write(run, asked, ref, tokenizer, equipment)
        checks = run.manifest("prepare")
        assert checks == json.loads(json.dumps(assembled.checks())) | {"rendering": checks["rendering"]}
        findings = [Finding(**row) for row in read_json_lines(run.findings_file)]
        assert list(assembled.findings) == findings
        examples = {split: prepare.examples(run, split) for split in checks["splits"]}
        for split, rows in examples.items():
            store = prepare.stored(run, split, tokenizer)
            assert list(store) == plainly_rendered(tokenizer, rows, checks["max_length"])
            assert {store.source(place) for place in range(len(store))} == {row.source for row in rows}
    alone = prepare.assemble(asked, ref, tokenizer, equipment)
    assert (alone.checks(), list(alone.findings)) == (assembled.checks(), findings)
    return Prepared(run, examples, findings, checks["labels"], checks["splits"], checks)


def plainly_rendered(tokenizer: Any, rows: Sequence[Example], max_length: int) -> list[chat.Rendering]:
    """Row by row, as `chat.render` and `pieces` define it."""
    rendered = [(row, prepare.render(tokenizer, row)) for row in rows]
    return [piece for row, whole in rendered for piece in ([whole] if row.text is None else pieces(whole, max_length))]


Build = Callable[..., Prepared]


def recipe(task: str = "classification", max_length: int | None = None, **data: Any) -> recipes.Recipe:
    return recipes.Recipe.model_validate(
        {"name": "one", "model": "m", "task": task, "data": data, "train": {"max_length": max_length}}
    )


@pytest.fixture
def build(here: Path, base: tuple[ModelRef, Any, Equipment]) -> Build:
    """What `assemble` makes of train.jsonl and, where there are rows for it, test.jsonl."""

    def built(
        train: Sequence[Any], test: Sequence[Any] | None = None, *, task: str = "classification", **options: Any
    ) -> Prepared:
        write(here / "train.jsonl", train)
        named = {"train": "train.jsonl"}
        if test is not None:
            write(here / "test.jsonl", test)
            named["test"] = "test.jsonl"
        return prepared(recipe(task, **named, **options), *base)

    return built


def refusal(build: Build, *args: Any, **options: Any) -> str:
    with pytest.raises(DataError) as refused:
        build(*args, **options)
    return str(refused.value)


def texts(examples: Sequence[Example]) -> list[str]:
    return [example.text if example.text is not None else example.messages[-2].content for example in examples]


def codes(assembled: Prepared, split: str = "train") -> Counter[str]:
    return Counter(finding.code for finding in assembled.findings if finding.split == split)


def accounted(assembled: Prepared) -> bool:
    """Every row that was read is used or rejected, and each rejected one is named."""
    return all(
        account["read"] == account["used"] + account["rejected"]
        and account["used"] == len(assembled.examples[split])
        and account["rejected"] == sum(one.rejected for one in assembled.findings if one.split == split)
        for split, account in assembled.splits.items()
    )


# Shuffle and select


@given(count=st.integers(1, 300), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_rows_are_shuffled_as_datasets_shuffles_them(count: int, seed: int) -> None:
    theirs = datasets.Dataset.from_dict({"row": range(count)}).shuffle(seed=seed)
    assert shuffled(count, seed).tolist() == theirs["row"]


def test_a_limit_takes_the_rows_that_the_lab_takes(build: Build) -> None:
    rows = many(100)
    one = build(rows, many(40, 100), limit={"train": 20, "test": 10, "seed": 7})
    whole = datasets.Dataset.from_list(rows).shuffle(seed=7).select(range(20))
    assert texts(one.examples["train"]) == whole["text"]
    assert one.examples["train"][0].source == f"train.jsonl:{rows.index(whole[0]) + 1}"
    assert len(one.examples["test"]) == 10
    assert accounted(one)


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_a_limit_takes_the_same_rows_of_any_kind_of_file(
    here: Path, base: tuple[ModelRef, Any, Equipment], suffix: str
) -> None:
    table = datasets.Dataset.from_list(many(100))
    {"csv": table.to_csv, "json": lambda path: table.to_json(path, lines=False), "parquet": table.to_parquet}[suffix](
        f"train.{suffix}"
    )
    asked = recipe(
        train=f"train.{suffix}", test=write(here / "test.jsonl", many(4, 100)), limit={"train": 20, "seed": 7}
    )
    assert texts(prepared(asked, *base).examples["train"]) == table.shuffle(seed=7).select(range(20))["text"]


def test_without_a_limit_rows_keep_their_order(build: Build) -> None:
    assert texts(build(many(20), many(4, 20)).examples["train"]) == [row["text"] for row in many(20)]


def test_a_limit_beyond_the_data_is_mentioned(build: Build) -> None:
    one = build(many(10), many(4, 10), limit={"train": 10, "test": 5})
    assert [(finding.code, finding.split, finding.message) for finding in one.findings] == [
        ("limit_not_reached", "test", "data.limit.test is 5, the data holds 4 rows; all are used")
    ]


def test_a_broken_row_that_a_limit_would_leave_out_is_still_named(build: Build) -> None:
    rows: list[Any] = [*many(100), "{"]
    assert refusal(build, rows, many(4, 100), limit={"train": 5}).startswith("train.jsonl:101: broken JSON")
    one = build(rows, many(4, 100), limit={"train": 5}, bad_rows="skip")
    assert one.splits["train"]["read"] in (5, 6)
    assert codes(one)["broken_json"] == 1
    assert accounted(one)


# Held-out rows


def test_a_tenth_is_held_out_where_no_test_set_is_named(build: Build) -> None:
    one = build(many(1000))
    assert 70 <= len(one.examples["test"]) <= 130
    train, test = texts(one.examples["train"]), texts(one.examples["test"])
    assert sorted(train + test) == sorted(row["text"] for row in many(1000))
    assert texts(build(many(1000)).examples["test"]) == test
    assert texts(build(many(1000), split={"seed": 1}).examples["test"]) != test
    assert len(build(many(1000), split={"test": 0.5}).examples["test"]) > 400


def side(row: dict[str, Any], seed: int = 42) -> bool:
    return prepare.held_out(prepare.Row("anywhere", row), 0.3, seed)


ROWS = st.dictionaries(st.text(max_size=4), st.text(max_size=4) | st.integers() | st.none() | st.floats(), max_size=3)


@given(ROWS)
def test_a_row_s_side_depends_on_what_it_says_alone(row: dict[str, Any]) -> None:
    assert side(row) == side(dict(reversed(row.items()))) == side(json.loads(json.dumps(row)))


def test_adding_rows_moves_no_old_row_and_equal_rows_share_a_side(build: Build) -> None:
    before = build(many(300))
    after = build([*many(50, 900), *many(300)[::-1], *many(300)])
    old = {row["text"] for row in many(300)}
    for split in ("train", "test"):
        kept = [text for text in texts(after.examples[split]) if text in old]
        assert set(kept) == set(texts(before.examples[split]))
        assert set(Counter(kept).values()) == {2}
    assert codes(after, "test")["seen_in_training"] == 0


def test_too_few_rows_to_hold_out_are_refused(build: Build) -> None:
    said = refusal(build, many(3), split={"test": 0.01})
    assert said.startswith("data.train: 3 rows are too few to hold out 1% for a test set; name data.test")


# Classes


def test_classes_are_counted_in_the_order_of_their_names_or_numbers(build: Build) -> None:
    words = build([GOOD, BAD, BAD], [GOOD])
    assert words.labels == ["bad", "good"]
    assert words.splits["train"]["labels"] == {"bad": 2, "good": 1}
    assert words.splits["test"]["labels"] == {"bad": 0, "good": 1}
    numbers = build([{"text": "a", "label": number} for number in (10, 2, -1)], [{"text": "b", "label": 2}])
    assert numbers.labels == ["-1", "2", "10"]


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        (["good", "bad"], ["good", "bad"]),
        ({1: "good", 0: "bad"}, ["bad", "good"]),
        (["x", "bad", "good"], ["x", "bad", "good"]),
    ],
)
def test_declared_classes_keep_their_order(build: Build, labels: Any, order: list[str]) -> None:
    assert build([GOOD, BAD], [GOOD], labels=labels).labels == order


def test_a_test_label_that_training_never_showed_is_named(build: Build) -> None:
    said = refusal(build, [GOOD, BAD], [GOOD, {"text": "a", "label": "goood"}])
    assert said.startswith("test.jsonl:2: label 'goood' is not among the training rows' labels; did you mean 'good'?")
    one = build([GOOD, BAD], [GOOD, {"text": "a", "label": "x"}], bad_rows="skip")
    assert codes(one, "test") == {"unknown_label": 1, "seen_in_training": 1}
    assert accounted(one)


def test_a_label_that_is_not_declared_is_named(build: Build) -> None:
    said = refusal(build, [GOOD, BAD, {"text": "a", "label": "bda"}], [GOOD], labels=["good", "bad"])
    assert said == (
        "train.jsonl:3: unknown label 'bda'; did you mean 'bad'?; mend it, or set data.bad_rows: skip to leave such "
        "rows out"
    )


def test_rows_of_one_class_alone_are_refused(build: Build) -> None:
    for test in ([GOOD], [BAD]):
        said = refusal(build, [GOOD, GOOD | {"text": "fine"}], test)
        assert said == "data.train: all 2 rows have one class, 'good'; there is nothing to tell apart"
    assert "all 1 rows have one class" in refusal(build, [GOOD, BAD | {"text": ""}], [GOOD])
    assert "all 1 rows have one class" in refusal(build, [GOOD], [GOOD], labels=["good", "bad"])


def test_a_class_that_no_row_is_left_of_is_none_unless_declared(build: Build) -> None:
    long = {"text": "a", "label": "long " * 30}
    assert build([GOOD, BAD, long], [GOOD], max_length=60).labels == ["bad", "good"]


# Rows that are left out


def test_a_broken_row_stops_and_is_named_with_its_line(build: Build) -> None:
    rows: list[Any] = many(50)
    rows[36] = '{"text": "a'
    assert refusal(build, rows, many(2, 50)) == (
        "train.jsonl:37: broken JSON at column 10: Unterminated string starting at; each line must be one JSON object; "
        "mend it, or set data.bad_rows: skip to leave such rows out"
    )
    rows[40] = "[]"
    assert "(and 1 more such rows)" in refusal(build, rows, many(2, 50))
    one = build(rows, many(2, 50), bad_rows="skip")
    assert [finding.where for finding in one.findings] == ["train.jsonl:37", "train.jsonl:41"]
    assert one.splits["train"] | dict.fromkeys(("tokens", "sha256", "labels", "label_nodes", "source"), 0) == {
        "source": 0,
        "read": 50,
        "rejected": 2,
        "truncated": 0,
        "tokens_cut": 0,
        "used": 48,
        "sequences": 48,
        "tokens": 0,
        "sha256": 0,
        "labels": 0,
        "label_nodes": 0,
    }


def test_empty_rows_are_left_out_and_counted_without_a_stop(build: Build) -> None:
    one = build([GOOD, BAD, {"text": " ", "label": "bad"}, {"text": "a", "label": None}], [GOOD])
    assert codes(one) == {"empty_text": 1, "empty_label": 1}
    assert {finding.severity for finding in one.findings} == {"warning"}
    assert accounted(one)


def test_a_first_row_that_lacks_a_column_is_left_out_like_any_other(build: Build) -> None:
    rows = [{"text": "a"}, GOOD, BAD]
    assert refusal(build, rows, [GOOD]).startswith("train.jsonl:1: no column 'label'; columns here: 'text'")
    assert build(rows, [GOOD], bad_rows="skip").splits["train"]["used"] == 2
    said = refusal(build, [{"text": "a"}, {"text": "b"}], [GOOD], bad_rows="skip")
    assert said.startswith("train.jsonl:1: no column 'label' for data.label")


def test_a_split_without_a_usable_row_is_refused(build: Build) -> None:
    empty = [{"text": "", "label": "good"}] * 3
    assert refusal(build, [GOOD, BAD], empty) == "data.test: no usable row in test.jsonl (3 empty_text)"
    assert (
        refusal(build, ["{"] * 2, [GOOD], bad_rows="skip") == "data.train: no usable row in train.jsonl (2 broken_json)"
    )
    assert refusal(build, [GOOD, BAD], []) == "data.test: test.jsonl holds no rows"
    assert refusal(build, []) == "data.train: train.jsonl holds no rows"


ANY_ROW = st.one_of(
    st.sampled_from([GOOD, BAD]),
    st.fixed_dictionaries({"text": st.text(max_size=50), "label": st.sampled_from(["good", "bad"])}),
    st.sampled_from(
        [
            "{", "[]", "\x00", '{"text": "\\ud800", "label": "good"}', {"text": "a"}, {"text": 5, "label": "good"},
            {"text": "", "label": "bad"}, {"text": "a", "label": ""}, {"text": "a", "label": ["good"]},
            {"text": "a" * 300, "label": "good"}, {"text": "a", "label": "good" * 50}, {"text": "a", "label": "odd"},
        ]
    ),
)  # fmt: skip


@given(
    train=st.lists(ANY_ROW, max_size=12),
    test=st.none() | st.lists(ANY_ROW, max_size=6),
    over_length=st.sampled_from(["truncate", "drop"]),
    limit=st.fixed_dictionaries({}, optional={"train": st.integers(1, 12), "test": st.integers(1, 6)}),
)
@settings(max_examples=80)
def test_every_row_is_used_or_accounted_for(
    tmp_path_factory: pytest.TempPathFactory,
    base: tuple[ModelRef, Any, Equipment],
    train: list[Any],
    test: list[Any] | None,
    over_length: str,
    limit: dict[str, int],
) -> None:
    folder = tmp_path_factory.getbasetemp()
    named = {"train": write(folder / "train.jsonl", [GOOD, BAD, *train])}
    if test is not None:
        named["test"] = write(folder / "test.jsonl", [GOOD, *test])
    asked = recipe(**named, bad_rows="skip", over_length=over_length, limit=limit, max_length=100)
    try:
        one = prepared(asked, *base)
    except DataError as error:  # too few rows are left; whatever is raised says where
        assert str(error).startswith(("data.train: ", "data.test: ", str(folder)))  # noqa: PT017
        return
    assert accounted(one)
    assert set(one.labels or ()) == {example.label for example in one.examples["train"]}
    for split, examples in one.examples.items():
        lengths = [len(prepare.render(base[1], example).ids) for example in examples]
        assert max(lengths) <= 100
        assert one.splits[split]["tokens"]["sum"] == sum(lengths)
        assert one.splits[split]["tokens"]["total"]["max"] == max(lengths)
    if not limit:
        given = 2 + len(train) + (0 if test is None else 1 + len(test))
        assert sum(account["read"] for account in one.splits.values()) == given


# Rows that are too long


LONG = {"text": "x" * 300, "label": "good"}


def test_a_long_prompt_loses_its_end_and_is_named(build: Build, base: tuple[ModelRef, Any, Equipment]) -> None:
    one = build([GOOD, LONG, BAD], [GOOD], max_length=100)
    (finding,) = [finding for finding in one.findings if finding.code == "over_length"]
    assert (finding.where, finding.severity, finding.rejected) == ("train.jsonl:2", "warning", False)
    length = len(chat.render(base[1], [Message("user", LONG["text"]), Message("assistant", "good")]).ids)
    cut = length - 100
    assert finding.message == (
        f"{length} tokens, {cut} over the limit of 100: the end of the prompt was cut ({cut} tokens), the answer is "
        "whole"
    )
    assert one.splits["train"]["truncated"] == 1
    assert one.splits["train"]["tokens_cut"] == cut
    assert one.examples["train"][1].answer == "good"
    assert LONG["text"].startswith(texts(one.examples["train"])[1])
    assert accounted(one)


def test_a_long_row_is_dropped_where_the_recipe_says_so(build: Build) -> None:
    one = build([GOOD, LONG, BAD], [GOOD], max_length=100, over_length="drop")
    assert codes(one) == {"over_length": 1}
    assert one.splits["train"]["used"] == 2
    assert accounted(one)


def test_nothing_starts_where_a_long_row_is_an_error(build: Build) -> None:
    for row in (LONG, {"text": "a", "label": "y" * 300}):
        for bad_rows in ("stop", "skip"):
            said = refusal(build, [GOOD, row, BAD], [GOOD], max_length=100, over_length="error", bad_rows=bad_rows)
            assert said.startswith("train.jsonl:2: ")
            assert said.endswith("over the limit of 100: left out; set data.over_length to truncate or drop")


def test_an_answer_that_does_not_fit_is_left_out_whole(build: Build) -> None:
    rows = [{"prompt": "a", "completion": "y" * 300}, {"prompt": "b", "completion": "c"}]
    one = build(rows, rows[1:], task="chat", max_length=100)
    assert codes(one) == {"answer_too_long": 1}
    assert one.findings[0].where == "train.jsonl:1"
    assert accounted(one)


def test_the_longest_label_fits_into_the_context_behind_every_prompt(
    build: Build, base: tuple[ModelRef, Any, Equipment]
) -> None:
    """Every label is scored behind every prompt, also where the row's own is short."""
    ref, tokenizer, equipment = base
    assert ref.context is not None
    rows = [{"text": "x" * 600, "label": "a"}, {"text": "y" * 600, "label": "a much longer label"}]
    one = build(rows, rows)
    longest = len(chat.render_answer(tokenizer, equipment, "a much longer label"))
    for example in one.examples["test"]:
        assert len(chat.render_prompt(tokenizer, example.prompt)) + longest == ref.context


def test_more_than_the_model_holds_is_refused(build: Build) -> None:
    with pytest.raises(ModelError, match=r"train.max_length is 257, but .* holds 256 tokens"):
        build([GOOD, BAD], [GOOD], max_length=257)


def test_a_conversation_that_the_template_refuses_is_named_with_its_row(here: Path, tmp_path: Path) -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for message in messages %}{{ message['role'] + message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    ref = models.find(str(tiny_model(tmp_path / "model", template=template)))
    tokenizer = models.load_tokenizer(ref)
    equipment = chat.equip(tokenizer)
    rows = [{"prompt": "a", "completion": "b"}]
    asked = recipe("chat", train=write(here / "train.jsonl", rows), test=write(here / "test.jsonl", rows), system="s")
    with pytest.raises(DataError, match=r"train.jsonl:1: the chat template refuses this conversation \(system, user"):
        prepare.assemble(asked, ref, tokenizer, equipment)


# Leakage


def test_test_rows_that_stand_in_the_training_rows_are_named(build: Build) -> None:
    train = [GOOD, BAD, {"text": "  LOVELY\n", "label": "bad"}]
    one = build(train, [{"text": "lovely ", "label": "bad"}, {"text": "other", "label": "bad"}])
    (finding,) = one.findings
    assert (finding.code, finding.where, finding.split) == ("seen_in_training", "test.jsonl:1", "test")
    assert finding.message == "the same text is a training row: train.jsonl:1"
    assert len(one.examples["test"]) == 2


def test_a_conversation_was_seen_if_its_prompt_was(build: Build) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    other = {"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "c"}]}
    more = {"messages": [*row["messages"], {"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]}
    one = build([row], [other, more], task="chat")
    assert [finding.where for finding in one.findings] == ["test.jsonl:1"]


# What is written


def test_what_is_written_is_what_was_assembled(build: Build, here: Path, base: tuple[ModelRef, Any, Equipment]) -> None:
    one = build([GOOD, BAD, LONG, {"text": "", "label": "bad"}], [GOOD, BAD], max_length=100)
    asked = recipe(train="train.jsonl", test="test.jsonl", max_length=100)
    run = create(here / "runs", asked)
    for _ in range(2):
        prepare.write(run, asked, *base)
        assert prepare.examples(run, "train") == one.examples["train"]
        assert prepare.examples(run, "test") == one.examples["test"]
        assert prepare.examples(run, "validation") == []
    checks = run.manifest("prepare")
    assert checks["format"] == 1
    assert checks["labels"] == ["bad", "good"]
    assert checks["max_length"] == 100
    assert checks["rendering"]["end_of_turn"] == "<|eos|>"
    train = checks["splits"]["train"]
    assert train["source"] == ["train.jsonl"]
    assert (train["read"], train["used"], train["rejected"], train["truncated"]) == (4, 3, 1, 1)
    assert train["labels"] == {"bad": 1, "good": 2}
    assert set(train["tokens"]) == {"total", "answer", "sum"}
    assert set(train["tokens"]["total"]) == {"min", "median", "mean", "p95", "max"}
    assert [(one["code"], one["where"]) for one in checks["findings"]] == [
        ("empty_text", "train.jsonl:4"),
        ("over_length", "train.jsonl:3"),
        ("seen_in_training", "test.jsonl:1"),
        ("seen_in_training", "test.jsonl:2"),
    ]
    assert read_json_lines(run.findings_file) == checks["findings"]
    assert read_json(run.manifest_file("prepare")) == checks


def test_of_many_findings_all_are_named_on_disk_and_the_first_in_the_manifest(build: Build, here: Path) -> None:
    empty = [{"text": "", "label": "bad"}] * (FIRST + 25)
    one = build([GOOD, BAD, *empty], [GOOD, "{"], bad_rows="skip")
    assert accounted(one)
    assert [finding.where for finding in one.findings if finding.code == "empty_text"] == [
        f"train.jsonl:{number + 3}" for number in range(FIRST + 25)
    ]
    assert len([finding for finding in one.checks["findings"] if finding["code"] == "empty_text"]) == FIRST
    assert [(kind["split"], kind["code"], kind["count"]) for kind in one.checks["counts"]] == [
        ("train", "empty_text", FIRST + 25),
        ("test", "broken_json", 1),
        ("test", "seen_in_training", 1),
    ]


def test_a_preparation_that_fails_leaves_no_manifest_to_vouch_for_old_files(
    build: Build, here: Path, base: tuple[ModelRef, Any, Equipment]
) -> None:
    build([GOOD, BAD], [GOOD])
    asked = recipe(train="train.jsonl", test="test.jsonl")
    run = create(here / "runs", asked)
    prepare.write(run, asked, *base)
    assert len(prepare.stored(run, "train", base[1])) == 2
    write(here / "train.jsonl", [GOOD, BAD, BAD | {"text": "worse"}])
    write(here / "test.jsonl", ["{"])
    with pytest.raises(DataError):
        prepare.write(run, asked, *base)
    assert run.status("prepare") == "todo"
    with pytest.raises(RunError, match="stage prepare is not done"):
        prepare.stored(run, "train", base[1])
    assert not list((run.path / "data").glob(".*")), "nothing half-written is left"


def test_an_interrupted_preparation_leaves_nothing_half_written(
    here: Path, base: tuple[ModelRef, Any, Equipment], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(train=write(here / "train.jsonl", many(900)), test=write(here / "test.jsonl", many(4, 900)))
    run = create(here / "runs", asked)
    monkeypatch.setattr(prepare, "BLOCK_ROWS", 50)
    monkeypatch.setenv(prepare.OWN_THREADS, "true")

    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare.write(run, asked, *base, progress=stop)
    assert not list((run.path / "data").iterdir())
    assert os.environ[prepare.OWN_THREADS] == "true"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tokenising")]


@pytest.mark.parametrize("told", [None, "true"])
def test_threads_and_blocks_change_nothing(build: Build, monkeypatch: pytest.MonkeyPatch, told: str | None) -> None:
    rows: list[Any] = [*many(60), "{", {"text": "x" * 300, "label": "good"}, *many(60, 60)]
    whole = build(rows, many(20, 200), max_length=100, bad_rows="skip")
    monkeypatch.setattr(prepare, "BLOCK_ROWS", 7)
    monkeypatch.delenv(prepare.OWN_THREADS)
    if told:
        monkeypatch.setenv(prepare.OWN_THREADS, told)
    for threads in (1, 16):
        monkeypatch.setattr(prepare, "MAX_THREADS", threads)
        again = build(rows, many(20, 200), max_length=100, bad_rows="skip")
        assert (again.examples, again.checks, again.findings) == (whole.examples, whole.checks, whole.findings)
        assert os.environ.get(prepare.OWN_THREADS) == told


def test_a_long_text_is_a_block_of_its_own(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "x" * 300}, {"text": "y"}, {"text": "z" * 90}]
    whole = build(rows, [{"text": "z"}], task="pretraining", max_length=64)
    monkeypatch.setattr(prepare, "BLOCK_CHARACTERS", 50)
    assert build(rows, [{"text": "z"}], task="pretraining", max_length=64).checks == whole.checks


MEMORY = """
import json, sys
from pathlib import Path
from tunewright import chat, models, recipe as recipes, run as runs
from tunewright.data import prepare

def memory(what):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[what].split()[0]) * 1024

model, train, test = sys.argv[1:]
asked = recipes.Recipe.model_validate({
    "name": "one", "model": "m", "task": "classification", "train": {"max_length": 100},
    "data": {"train": train, "test": test, "bad_rows": "skip", "limit": {"train": 10**9}},
})
ref = models.find(model)
tokenizer = models.load_tokenizer(ref)
run = runs.create(Path("runs"), asked)
before = memory("VmRSS")
prepare.write(run, asked, ref, tokenizer, chat.equip(tokenizer))
store = prepare.stored(run, "train", tokenizer)
print(json.dumps([memory("VmHWM") - before, len(store), run.manifest("prepare")["splits"]["train"]["read"]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_rows(here: Path, model_folder: Path) -> None:
    """200,000 rows, shuffled, every tenth empty and every tenth cut: their text alone is 50 MB, as Python's rows and
    token ids it would be more than a gigabyte."""
    rows = 200_000
    with (here / "train.jsonl").open("w") as file:
        for number in range(rows):
            text = (
                "" if number % 10 == 0 else f"row {number} " + "lovely awful great " * (20 if number % 10 == 1 else 8)
            )
            file.write(json.dumps({"text": text, "label": ("good", "bad")[number % 2]}) + "\n")
    write(here / "test.jsonl", many(10))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(model_folder), "train.jsonl", "test.jsonl"],
        capture_output=True,
        text=True,
        check=True,
    )
    grown, stored, read = json.loads(done.stdout.splitlines()[-1])
    assert (stored, read) == (rows - rows // 10, rows)
    assert grown < 150e6


def test_the_fingerprint_of_a_split_is_that_of_what_is_said_not_of_where(build: Build, here: Path) -> None:
    one = build([GOOD, BAD], [GOOD])
    moved = build(["", GOOD, BAD], [GOOD])
    assert one.splits["train"]["sha256"] == moved.splits["train"]["sha256"]
    other = build([GOOD, BAD | {"text": "x"}], [GOOD])
    assert one.splits["train"]["sha256"] != other.splits["train"]["sha256"]


def test_the_fingerprint_of_the_sources_changes_with_any_file(here: Path) -> None:
    files = {split: write(here / f"{split}.jsonl", [GOOD]) for split in prepare.SPLITS}
    asked = recipe(**files)
    seen = {source_fingerprint(asked)}
    assert source_fingerprint(asked) in seen
    for split in prepare.SPLITS:
        write(here / f"{split}.jsonl", [BAD])
        seen.add(source_fingerprint(asked))
    assert len(seen) == 4


def test_progress_is_reported(here: Path, base: tuple[ModelRef, Any, Equipment]) -> None:
    asked = recipe(train=write(here / "train.jsonl", many(500)), test=write(here / "test.jsonl", many(300, 500)))
    seen: list[tuple[int, int]] = []
    prepare.assemble(asked, *base, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(200, 800), (400, 800), (700, 800)]


# Plain text


def test_plain_text_is_used_whole_and_counted_in_pieces(build: Build, base: tuple[ModelRef, Any, Equipment]) -> None:
    rows = [{"text": "x" * 300}, {"text": "y"}, {"text": "\n"}]
    one = build(rows, [{"text": "z"}], task="pretraining", max_length=64)
    assert codes(one) == {"empty_text": 1}
    assert texts(one.examples["train"]) == ["x" * 300, "y"]
    renderings = [prepare.render(base[1], example) for example in one.examples["train"]]
    assert one.splits["train"]["sequences"] == sum(len(pieces(each, 64)) for each in renderings) == 6
    assert one.splits["train"]["tokens"]["sum"] == sum(len(each.ids) for each in renderings)
    assert accounted(one)


def test_a_file_of_text_ends_once(here: Path, base: tuple[ModelRef, Any, Equipment]) -> None:
    (here / "notes.txt").write_text("one line\n\n" * 1000)
    asked = recipe("pretraining", train="notes.txt", test="notes.txt")
    one = prepared(asked, *base)
    assert [example.ends for example in one.examples["train"]] == [False] * (len(one.examples["train"]) - 1) + [True]
    assert "".join(texts(one.examples["train"])) == "one line\n\n" * 1000


@given(length=st.integers(1, 400), size=st.integers(2, 60))
def test_pieces_cover_every_token_exactly_once(length: int, size: int) -> None:
    whole = chat.Rendering(list(range(length)), [True] * length)
    cut = pieces(whole, size)
    learnt = [token for piece in cut for token, flag in zip(piece.ids, piece.mask, strict=True) if flag]
    assert learnt == list(range(1, length))
    assert all(len(piece.ids) <= size for piece in cut)
    assert not any(piece.mask[0] for piece in cut)
    for before, after in itertools.pairwise(cut):
        assert after.ids[0] == before.ids[-1]
    assert len(cut) == account.num_pieces(length, size)


def test_a_row_whose_only_turn_to_learn_the_template_rewrites_is_left_out_by_name(here: Path, tmp_path: Path) -> None:
    template = (
        "{%- for message in messages -%}{{- message['role'] + ':' -}}"
        "{%- if message['role'] == 'assistant' and not loop.last -%}(earlier)"
        "{%- else -%}{{- message['content'] -}}{%- endif -%}{{- '<|eos|>' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- 'assistant:' -}}{%- endif -%}"
    )
    ref = models.find(str(tiny_model(tmp_path / "forgetful", template=template)))
    tokenizer = models.load_tokenizer(ref)

    def row(last_weight: int) -> dict[str, Any]:
        turns = [("user", "a", 1), ("assistant", "b", 1), ("user", "c", 1), ("assistant", "d", last_weight)]
        return {"messages": [{"role": role, "content": said, "weight": weight} for role, said, weight in turns]}

    write(here / "train.jsonl", [row(1), row(0), row(1)])
    write(here / "test.jsonl", [row(1)])
    asked = recipe("chat", train="train.jsonl", test="test.jsonl")
    found = prepared(asked, ref, tokenizer, chat.equip(tokenizer))
    assert [(one.code, one.where, one.rejected) for one in found.findings if one.code != "seen_in_training"] == [
        ("nothing_to_learn", "train.jsonl:2", True)
    ]
    assert found.splits["train"]["read"] == found.splits["train"]["used"] + found.splits["train"]["rejected"] == 3


def test_scoring_all_labels_computes_each_beginning_of_one_once(
    build: Build, base: tuple[ModelRef, Any, Equipment]
) -> None:
    rows = [GOOD, {"text": "a", "label": "goose"}, BAD]
    _, tokenizer, equipment = base
    ids = [chat.render_answer(tokenizer, equipment, label) for label in ("bad", "good", "goose")]
    nodes = build(rows, rows).splits["test"]["label_nodes"]
    assert nodes == len(LabelTree.plant(["bad", "good", "goose"], ids).inner)
    assert nodes < sum(map(len, ids)) - 3
