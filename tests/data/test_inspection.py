"""What `check` finds: each kind is planted in real rows and found at its line, and clean rows are left in peace."""

from __future__ import annotations

import csv
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tunewright import chat, life, models, starter
from tunewright import recipe as recipes
from tunewright.chat import Example, Message, Rendering
from tunewright.data import inspection, mend, patterns, similar
from tunewright.data.codes import CODES
from tunewright.data.findings import Finding
from tunewright.errors import DataError
from tunewright.life import Checked
from tunewright.recipe import Recipe

Rows = list[Any]
SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of shared data sets is absent")


def rows_of(name: str) -> Rows:
    return [json.loads(line) for line in starter.data_path(name).read_text(encoding="utf-8").splitlines()]


def line(row: Any) -> bytes:
    return row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode()


def recipe(folder: Path, task: str, train: Rows, test: Rows | None = None, **data: Any) -> Recipe:
    given: dict[str, Any] = {"bad_rows": "skip", **data}
    for split, rows in {"train": train, "test": test}.items():
        if rows is not None:
            (folder / f"{split}.jsonl").write_bytes(b"".join(line(row) + b"\n" for row in rows))
            given[split] = str(folder / f"{split}.jsonl")
    if test is None:
        given["split"] = {"test": 0.2}
    train_section = {"max_length": data.pop("max_length")} if "max_length" in data else {}
    given.pop("max_length", None)
    return recipes.loads(
        yaml.safe_dump({"name": "x", "model": "starter", "task": task, "data": given, "train": train_section}), "recipe"
    )


def found(checked: Checked) -> list[Finding]:
    assert checked.data is not None
    assert checked.inspection is not None
    return [*checked.data.findings, *checked.inspection]


def at(findings: list[Finding], code: str) -> list[str]:
    return [one.where.rpartition("/")[2] for one in findings if one.code == code]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


TRAIN, TEST, CHAT = rows_of("train.jsonl"), rows_of("test.jsonl"), rows_of("chat.jsonl")


def text(row: dict[str, Any], **changed: Any) -> dict[str, Any]:
    return row | changed


def behind(conversation: dict[str, Any], *messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [*conversation["messages"], *messages]}


def with_answer(conversation: dict[str, Any], answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [*conversation["messages"][:-1], {"role": "assistant", "content": answer, **more}]}


def renamed(conversation: dict[str, Any], role: str) -> dict[str, Any]:
    first, *others = conversation["messages"]
    return {"messages": [first, others[0] | {"role": role}, *others[1:]]}


LONG = " ".join(["and then we went on to the next shop"] * 400)
CLASSIFIED: list[tuple[str, Any]] = [
    ("broken_json", b'{"text": "no end'),
    ("not_utf8", b'{"text": "caf\xe9", "label": "returns"}'),
    ("not_an_object", b'["a", "list"]'),
    ("half_character", b'{"text": "half \\ud83d", "label": "returns"}'),
    ("missing_column", {"text": "no label here"}),
    ("wrong_type", {"text": ["a", "list"], "label": "returns"}),
    ("empty_text", {"text": "  ", "label": "returns"}),
    ("empty_label", {"text": "my parcel is late", "label": ""}),
    ("over_length", text(TRAIN[3], text=LONG)),
    ("secret", text(TRAIN[3], text="My key is AKIAIOSFODNN7EXAMPLE, please help")),
    ("personal_data", text(TRAIN[3], text="Write to bob.miller@example.com about the axe")),
    ("lost_characters", text(TRAIN[3], text="The cafÃ© on the corner owes me money")),
    ("control_characters", text(TRAIN[3], text="There is a hidden\u200b space in this line")),
    ("markup", text(TRAIN[3], text="The first line<br />and a second one below it")),
    ("special_token", text(TRAIN[3], text="What does <|end|> mean on the box that you sent")),
    ("label_in_text", text(TRAIN[3], text=f"I want my money again. category: {TRAIN[3]['label']}")),
    ("duplicate", TRAIN[3]),
    ("contradiction", text(TRAIN[3], label="billing" if TRAIN[3]["label"] != "billing" else "cancel")),
    ("near_duplicate", text(TRAIN[0], text=TRAIN[0]["text"].replace("too small", "too tiny"))),
]
TALKED: list[tuple[str, Any]] = [
    ("messages", behind(CHAT[0], {"role": "user", "content": "And then?"})),
    ("messages", renamed(CHAT[0], "bot")),
    ("messages", {"messages": CHAT[0]["messages"][:2]}),
    ("empty_answer", with_answer(CHAT[0], " ")),
    ("empty_answer", with_answer({"messages": [{"role": "user", "content": "No?"}, {}]}, "No.", weight=0)),
    ("tools", CHAT[0] | {"tools": [{"type": "function"}]}),
    ("several_answers", with_answer(CHAT[0], "We have no table at all.")),
    ("answer_repeats_prompt", with_answer(CHAT[1], CHAT[1]["messages"][-2]["content"])),
    ("answer_too_long", with_answer(CHAT[1], LONG)),
]


def test_what_is_planted_among_labelled_rows_is_found_at_its_line(here: Path) -> None:
    rows, places = TRAIN[:40], {}
    for number, (code, row) in enumerate(CLASSIFIED):
        places[code] = f"train.jsonl:{len(rows) + 1}"
        rows = [*rows, row, *TRAIN[40 + 3 * number : 43 + 3 * number]]
    before = found(life.check(recipe(here, "classification", TRAIN[:120], TEST)))
    after = found(life.check(recipe(here, "classification", rows, TEST)))
    for code, where in places.items():
        assert where in at(after, code), code
        extra = [one for one in at(after, code) if one != where]
        assert len(extra) <= len(at(before, code)) + (code == "near_duplicate"), (code, extra)


def test_what_is_planted_among_conversations_is_found_at_its_line(here: Path) -> None:
    rows, places = CHAT[:20], []
    for code, row in TALKED:
        places.append((code, f"train.jsonl:{len(rows) + 1}"))
        rows = [*rows, row]
    before = found(life.check(recipe(here, "chat", CHAT, CHAT[:10])))
    after = found(life.check(recipe(here, "chat", [*rows, *CHAT[20:]], CHAT[:10])))
    for code, where in places:
        assert not at(before, code), code
        assert where in at(after, code), code


def planted(name: str) -> tuple[Rows, Rows, str]:
    """Rows in which the whole has something about it, and the split that says so."""
    train, test = list(TRAIN), list(TEST)
    labels = sorted({row["label"] for row in TRAIN})
    match name:
        case "seen_in_training":
            return [*train, {"text": test[7]["text"].upper(), "label": test[7]["label"]}], test, "test.jsonl:8"
        case "near_training":
            return [*train, text(test[0], text=test[0]["text"].replace("bench", "benches"))], test, "test.jsonl:1"
        case "unknown_label":
            return train, [*test, {"text": "Where is the exit of the shop", "label": "exit"}], "test.jsonl:281"
        case "few_rows":
            return train[:30], test, "train.jsonl"
        case "few_test_rows":
            return train, test[:60], "test.jsonl"
        case "rare_label":
            return [*train, {"text": "I would like to sing", "label": "song"}], test, "train.jsonl"
        case "untested_label":
            return train, [row for row in test if row["label"] != labels[0]], "test.jsonl"
        case "imbalance":
            kept = [row for row in train if row["label"] == labels[0]]
            others = [row for row in train if row["label"] != labels[0]][:6]
            return [*kept, *others], [row for row in test if row["label"] == labels[0]][:100], "train.jsonl"
        case "labels_share_first_token":
            return [text(row, label=f"topic {row['label']}") for row in train], [], "train.jsonl"
        case "telling_word":
            mark = lambda row: text(row, text=f"{row['text']} zq7") if row["label"] == labels[0] else row  # noqa: E731
            return [mark(row) for row in train], test, "train.jsonl"
        case "lengths_differ":
            return train, [text(row, text=" ".join([row["text"]] * 4)) for row in test], "test.jsonl"
    raise AssertionError(name)


IN_THE_WHOLE = (
    *("seen_in_training", "near_training", "unknown_label", "few_rows", "few_test_rows", "rare_label"),
    *("untested_label", "imbalance", "labels_share_first_token", "telling_word", "lengths_differ"),
)


def test_what_is_planted_in_the_whole_is_found(here: Path) -> None:
    clean = found(life.check(recipe(here, "classification", TRAIN, TEST)))
    for name in IN_THE_WHOLE:
        train, test, where = planted(name)
        assert where not in at(clean, name), name
        findings = found(life.check(recipe(here, "classification", train, test or None)))
        assert where in at(findings, name), name


def test_a_byte_order_mark_and_one_answer_for_all_are_found(here: Path) -> None:
    train = [b"\xef\xbb\xbf" + line(CHAT[0]), *(with_answer(row, "Yes.") for row in CHAT[1:30])]
    findings = found(life.check(recipe(here, "chat", train, CHAT[30:])))
    assert at(findings, "byte_order_mark") == ["train.jsonl:1"]
    assert at(findings, "one_answer") == ["train.jsonl"]


def test_a_preference_with_nothing_to_prefer_is_found(here: Path) -> None:
    good = {"prompt": "Where is it?", "chosen": "Here.", "rejected": "Go away."}
    train = [good | {"prompt": f"Where is the {thing}?"} for thing in ("axe", "bench", "castle")]
    train += [good | {"rejected": "Here."}]
    findings = found(life.check(recipe(here, "preference", train, train[:2])))
    assert at(findings, "same_answers") == ["train.jsonl:4"]


def test_the_shipped_data_has_no_error_and_no_leak(here: Path) -> None:
    findings = found(life.check(recipe(here, "classification", TRAIN, TEST)))
    assert not [one for one in findings if one.severity == "error"]
    assert Counter(one.code for one in findings if one.severity == "warning").keys() <= {"near_training"}


@needs_shared
@pytest.mark.parametrize("name", ["sentiment-sentences", "banking77"])
def test_real_data_has_no_error(name: str, here: Path) -> None:
    data = {split: str(SHARED / name / f"{split}.jsonl") for split in ("train", "test")}
    given = {"name": "x", "model": "starter", "task": "classification", "data": data}
    findings = found(life.check(recipes.loads(yaml.safe_dump(given), "recipe")))
    assert not [one for one in findings if one.severity == "error"]


def test_every_kind_of_finding_has_its_meaning_and_its_advice() -> None:
    assert len({code for code, _ in (*CLASSIFIED, *TALKED)} | set(IN_THE_WHOLE)) >= 25
    source = "".join(path.read_text() for path in Path(life.__file__).parent.joinpath("data").glob("*.py"))
    for code, kind in CODES.items():
        assert kind.means, code
        assert kind.fix, code
        assert source.count(f'"{code}"') >= 2, f"{code} is explained and never found"


def test_rules_of_the_hosted_api(here: Path) -> None:
    asked = recipe(here, "chat", CHAT[:5], CHAT[10:20])
    assert not [one for one in found(life.check(asked)) if one.code.startswith("api_")]
    checked = life.check(asked, api=True)
    assert at(found(checked), "api_rows") == ["train.jsonl"]
    assert len(checked.errors) == 1
    texts = recipe(here, "pretraining", [{"text": row["text"]} for row in TRAIN[:60]])
    assert at(found(life.check(texts, api=True)), "api_task") == ["train.jsonl"]


def test_a_row_against_the_hosted_apis_rules() -> None:
    tool = {"type": "function", "function": {"name": "look up!"}}
    asked = Message("user", "Where?")
    told = Message("tool", "Here.", name="my tool")
    row = Example("x", "x:1", (asked, told, Message("assistant", "There.")), tools=(tool,))
    fine = Example("x", "x:1", (asked, Message("assistant", "There.")))
    short, long = Rendering([1, 2], [False, True]), Rendering([1] * 70_000, [True] * 70_000)
    assert [code for code, _, _ in inspection.api_row(row, short)] == ["api_tools", "api_name"]
    assert [code for code, _, _ in inspection.api_row(fine, long)] == ["api_tokens"]
    assert list(inspection.api_row(fine, short)) == []


def test_an_answer_whose_end_has_no_loss_is_found(here: Path) -> None:
    ref = models.find("starter")
    tokenizer = models.load_tokenizer(ref)
    equipment = chat.equip(tokenizer)
    inspector = inspection.Inspector(recipe(here, "chat", CHAT, CHAT[:9]), tokenizer, equipment)
    for number, row in enumerate(CHAT[:2]):
        messages = tuple(Message(one["role"], one["content"]) for one in row["messages"])
        whole = chat.render(tokenizer, messages)
        stops = set(equipment.stop_ids)
        cut = [learnt and token not in stops for token, learnt in zip(whole.ids, whole.mask, strict=True)]
        mask = cut if number else whole.mask
        inspector.add("train", Example("x", f"train.jsonl:{number + 1}", messages), Rendering(whole.ids, mask))
    findings = list(inspector.finish({"train": {"source": ["train.jsonl"], "used": 2}}))
    assert at(findings, "end_not_learnt") == ["train.jsonl:2"]


# --- secrets ---


def test_a_secret_is_named_and_never_repeated(here: Path) -> None:
    key = "sk-proj-" + "a1B2" * 8
    rows = [*TRAIN[:60], text(TRAIN[0], text=f"The key is {key}"), text(TRAIN[1], text=f"The key is {key}")]
    checked = life.check(recipe(here, "classification", rows, TEST[:40]))
    assert len(at(found(checked), "secret")) == 2
    assert checked.inspection is not None
    assert key not in json.dumps(checked.inspection.to_dict())
    assert not [one for one in checked.inspection if key in one.text + one.message]


FORMS = [
    ("mail me at ann.lee@example.org today", "an e-mail address"),
    ("4111 1111 1111 1111 is the card", "a payment card's number"),
    ("4111 1111 1111 1112 is no card", None),
    ("DE89 3704 0044 0532 0130 00", "an IBAN"),
    ("DE88 3704 0044 0532 0130 00", None),
    ("123-45-6789", "a US social security number"),
    ("000-45-6789", None),
    ("call +44 20 7946 0958", "a telephone number"),
    ("order 12345678", None),
    ("it answers at 8.8.8.8", "a public IP address"),
    ("it answers at 192.168.1.1", None),
    ("version 1.2.3.4000", None),
    ("password: hunter22x", "a password or key that is given a value"),
    ("I forgot my password: please reset it", None),
    ("postgres://user:s3cret@db/name", "a URL with a password"),
    ("ghp_" + "a" * 36, "a GitHub token"),
    ("-----BEGIN RSA PRIVATE KEY-----", "a private key"),
]


@pytest.mark.parametrize(("said", "what"), FORMS)
def test_forms(said: str, what: str | None) -> None:
    assert [form.what for form in patterns.found(said)] == ([what] if what else [])


@given(st.text())
def test_any_text_can_be_looked_at(said: str) -> None:
    list(patterns.found(said))
    assert similar.jaccard(similar.shingles(similar.plain(said)), similar.shingles(similar.plain(said))) == 1.0


# --- near and exact ---


def edited(said: str, chance: random.Random) -> str:
    """A sentence with one word changed, added, misspelt or left out."""
    words = said.split()
    place = chance.randrange(len(words))
    match chance.randrange(4):
        case 0:
            words[place] = "thing"
        case 1:
            words.insert(place, "please")
        case 2:
            words[place] = words[place][1:] or "a"
        case _:
            del words[place]
    return " ".join(words)


@pytest.mark.parametrize(
    "source", ["starter", pytest.param("banking77", marks=needs_shared), pytest.param("gsm8k", marks=needs_shared)]
)
def test_planted_leaks_among_ten_thousand_rows(source: str) -> None:
    """20 of each kind: all exact ones, and at least nine of ten near ones."""
    chance = random.Random(3)
    if source == "starter":
        words = sorted({word for row in TRAIN for word in row["text"].split()})
        texts = [" ".join(chance.choices(words, k=chance.randint(8, 24))) for _ in range(10_000)]
    else:
        key = "text" if source == "banking77" else "question"
        lines = (SHARED / source / "train.jsonl").read_text(encoding="utf-8").strip().split("\n")
        texts = [json.loads(one)[key] for one in lines][:10_000]
    found = similar.Similar()
    for said in texts:
        found.add(said, held_out=False)
    long = [said for said in texts if len(said.split()) >= 8]
    exact = [found.add(said.upper(), held_out=True) for said in chance.sample(long, 20)]
    near = [found.add(edited(said, chance), held_out=True) for said in chance.sample(long, 20)]
    pairs = {pair.text: pair for pair in found.pairs()}
    assert sum(number in pairs for number in exact) == 20
    assert sum(number in pairs for number in near) >= 18


def test_of_texts_that_differ_none_is_near() -> None:
    found = similar.Similar()
    for number, said in enumerate(["the weather is fine today", "my parcel never came", "how do I cancel it"]):
        assert found.add(said, held_out=number == 2) == number
    assert list(found.pairs()) == []
    assert list(similar.Similar().pairs()) == []


def test_the_nearest_is_named() -> None:
    found = similar.Similar()
    for said in ("I want to return the green bench", "I want to return the green benches now", "nothing of the kind"):
        found.add(said, held_out=False)
    found.add("I want to return the green bench!", held_out=True)
    *_, last = found.pairs()
    assert (last.text, last.near, last.similarity) == (3, 0, 1.0)


# --- a mended copy ---


def mended(asked: Recipe, out: Path) -> mend.Mended:
    return life.mend(asked, out)


def test_a_mended_copy_has_an_account_of_every_change(here: Path) -> None:
    hidden = text(TRAIN[5], text="There is a hidden\u200b space in this line")
    train = [
        b"\xef\xbb\xbf" + line(TRAIN[0]),
        b'{"text": "no end',
        line(TRAIN[1]),
        line(TRAIN[1]),
        b'{"text": "caf\xe9 is late", "label": "delivery"}',
        line(hidden),
        line(text(TEST[0], text=TEST[0]["text"].upper())),
        *map(line, TRAIN[10:60]),
    ]
    asked = recipe(here, "classification", train, TEST)
    before = (here / "train.jsonl").read_bytes()
    done = mended(asked, here / "out")
    assert (here / "train.jsonl").read_bytes() == before
    assert [(one.where.rpartition("/")[2], one.did, one.why.partition(":")[0]) for one in done.changes] == [
        ("train.jsonl:1", "changed", "the byte-order mark was taken out"),
        ("train.jsonl:5", "changed", "not UTF-8"),
        ("train.jsonl:2", "left out", "broken_json"),
        ("train.jsonl:4", "left out", "duplicate"),
        ("train.jsonl:6", "changed", "invisible characters were taken out"),
        ("train.jsonl:7", "left out", "seen_in_training"),
    ]
    rows = [json.loads(one) for one in (here / "out" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[:4] == [
        TRAIN[0],
        TRAIN[1],
        {"text": "café is late", "label": "delivery"},
        text(hidden, text="There is a hidden space in this line"),
    ]
    assert rows[4:] == TRAIN[10:60]
    assert done.rows == {"train": len(rows), "test": len(TEST)}
    log = (here / "out.changes.jsonl").read_text().splitlines()
    assert [json.loads(one)["where"] for one in log] == [one.where for one in done.changes]
    again = life.check(recipe(here, "classification", rows, TEST))
    assert not {"duplicate", "broken_json", "not_utf8", "control_characters", "seen_in_training"} & {
        one.code for one in found(again)
    }


def test_what_stands_behind_the_last_answer_is_cut_off(here: Path) -> None:
    train = [*CHAT[:12], behind(CHAT[12], {"role": "user", "content": "And then?"}), {"messages": []}]
    done = mended(recipe(here, "chat", train, CHAT[20:30]), here / "out.jsonl")
    rows = [json.loads(one) for one in (here / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == CHAT[:13]
    assert [one.did for one in done.changes] == ["changed", "left out"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_mended_copy_as_a_table(suffix: str, here: Path) -> None:
    mended(recipe(here, "classification", [*TRAIN[:30], TRAIN[2]], TEST[:20]), here / f"out{suffix}")
    lines = (here / f"out{suffix}").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 31
    assert lines[0] == ("text,label" if suffix == ".csv" else "text\tlabel")


@pytest.mark.parametrize(
    ("out", "says"),
    [("train.jsonl", "is there already"), ("out.parquet", r"\.jsonl, \.csv, \.tsv, or a folder")],
)
def test_a_mended_copy_replaces_nothing(out: str, says: str, here: Path) -> None:
    from tunewright.errors import DataError

    asked = recipe(here, "classification", TRAIN[:30], TEST[:20])
    with pytest.raises(DataError, match=says):
        mended(asked, here / out)
    assert len((here / "train.jsonl").read_text().splitlines()) == 30


def test_rows_that_differ_in_calls_weights_or_the_graders_columns_are_no_duplicates(here: Path) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]

    def calling(word: str) -> dict[str, Any]:
        call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": json.dumps({"for": word})}}
        said = [
            {"role": "user", "content": "Where is it?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "found"},
            {"role": "assistant", "content": "On its way."},
        ]
        return {"messages": said, "tools": tools}

    def weighing(weight: int) -> dict[str, Any]:
        first = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello!", "weight": weight}]
        return {"messages": [*first, {"role": "user", "content": "Bye!"}, {"role": "assistant", "content": "Bye!"}]}

    rows = [calling("a parcel"), calling("a letter"), weighing(0), weighing(1), weighing(0)]
    asked = recipe(here, "chat", [*rows, *CHAT[:20]], CHAT[20:])
    assert at(found(life.check(asked)), "duplicate") == ["train.jsonl:5"]
    assert mended(asked, here / "out.jsonl").rows == {"train": 24}
    drawn = [{"prompt": "Say a number.", "want": want} for want in ("1", "2", "1")]
    checker = inspection.Inspector(asked.model_copy(update={"task": "reward"}), *equipped())
    for number, one in enumerate(drawn, start=1):
        row = Example(f"train.jsonl:{number}", f"train.jsonl:{number}", (Message("user", one["prompt"]),), item=one)
        checker.add("train", row, Rendering([1, 2], [False, True]))
    told = list(checker.finish({"train": {"source": ["train.jsonl"], "used": 3}}))
    assert at(told, "duplicate") == ["train.jsonl:3"]
    assert [one.message for one in told if one.code == "several_answers"] == [
        "the same prompt as train.jsonl:1, with other columns for the grader"
    ]


def equipped() -> tuple[Any, chat.Equipment]:
    tokenizer = models.load_tokenizer(models.find("starter"))
    return tokenizer, chat.equip(tokenizer)


def test_every_test_row_that_is_near_training_is_named(here: Path) -> None:
    near = text(TRAIN[0], text=TRAIN[0]["text"].replace("too small", "too tiny"))
    seen = found(life.check(recipe(here, "classification", TRAIN, [*TEST, near, near])))
    assert at(seen, "near_training")[-2:] == [f"test.jsonl:{len(TEST) + number}" for number in (1, 2)]


def test_a_test_row_that_validation_holds_too_is_still_held_against_training(here: Path) -> None:
    near = text(TRAIN[0], text=TRAIN[0]["text"].replace("too small", "too tiny"))
    (here / "validation.jsonl").write_bytes(line(near) + b"\n" + line(TEST[0]) + b"\n")
    asked = recipe(here, "classification", TRAIN, [*TEST[1:], near], validation=str(here / "validation.jsonl"))
    assert f"test.jsonl:{len(TEST)}" in at(found(life.check(asked)), "near_training")


def test_a_telling_word_that_others_have_too_is_said_so(here: Path) -> None:
    labels = sorted({row["label"] for row in TRAIN})
    rows = [text(row, text=f"zzyx {row['text']}") if row["label"] == labels[0] else row for row in TRAIN]
    rows = [{"text": f"{row['text']} {number}", "label": row["label"]} for number in range(5) for row in rows]
    other = next(number for number, row in enumerate(rows) if row["label"] == labels[1])
    rows[other] = text(rows[other], text=f"zzyx {rows[other]['text']}")
    (told,) = (one for one in found(life.check(recipe(here, "classification", rows))) if one.code == "telling_word")
    assert told.message.endswith("and in 1 of all others")


@pytest.mark.parametrize(
    "said",
    ["a." * 50_000 + " x@", "x@ " + "a-" * 50_000, "secret:" * 14_000, "%20" * 33_000 + " @", "://a:" + "a." * 50_000],
)
def test_a_long_text_is_looked_through_at_once(said: str) -> None:
    began = time.monotonic()
    assert not list(patterns.found(said))
    assert time.monotonic() - began < 3  # these took ten seconds and more


def test_a_table_holds_only_what_can_be_read_from_it(here: Path) -> None:
    with pytest.raises(DataError, match=r"out.csv: column 'messages' holds a list, which no cell can; write .jsonl"):
        mended(recipe(here, "chat", CHAT[:30], CHAT[30:40]), here / "out.csv")
    assert not (here / "out.csv").exists()
    rows = [{"text": row["text"], "label": number % 2 == 0} for number, row in enumerate(TRAIN[:60])]
    mended(recipe(here, "classification", rows[:50], rows[50:]), here / "yes.csv")
    assert {row["label"] for row in csv.DictReader((here / "yes.csv").read_text().splitlines())} == {"true", "false"}


def test_a_mended_copy_of_a_part_is_of_the_whole_file(here: Path) -> None:
    rows = [*TRAIN[:60], text(TRAIN[60], text=""), TRAIN[3]]
    done = mended(recipe(here, "classification", rows, TEST, limit={"train": 20}), here / "out.jsonl")
    assert done.rows["train"] == 60


def test_a_duplicates_place_is_named_where_the_files_name_has_spaces(here: Path) -> None:
    asked = recipe(here, "classification", [*TRAIN[:60], TRAIN[3]], TEST)
    (here / "train.jsonl").rename(here / "my rows.jsonl")
    data = asked.data.model_copy(update={"train": (str(here / "my rows.jsonl"),)})
    done = mended(asked.model_copy(update={"data": data}), here / "out.jsonl")
    assert [one.why for one in done.changes] == ["duplicate: the same row as my rows.jsonl:4"]
