"""`tunewright init` writes a recipe that can be read, and whose columns are those of the file."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub import Hub
from tunewright import recipe as recipes
from tunewright.data import guess, prepare
from tunewright.errors import DataError, RecipeError
from tunewright.recipe import Recipe


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".csv"):
        with open(name, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def guessed(source: str, **options: Any) -> Recipe:
    return recipes.loads(guess.recipe_for(source, **({"model": "starter"} | options)))


def columns(recipe: Recipe) -> dict[str, str]:
    """The columns that a recipe names."""
    return {key: getattr(recipe.data, key) for key in recipes.COLUMNS if getattr(recipe.data, key) is not None}


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
LONG = "a text of several words"


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@pytest.mark.parametrize(
    ("row", "task", "named"),
    [
        ({"text": LONG, "label": "good"}, "classification", {"text": "text", "label": "label"}),
        ({"id": 7, "Review": LONG, "Sentiment": "pos"}, "classification", {"text": "Review", "label": "Sentiment"}),
        ({"utterance": LONG, "intent": "card", "n": 1}, "classification", {"text": "utterance", "label": "intent"}),
        ({"prompt": "a", "completion": "b"}, "chat", {"prompt": "prompt", "completion": "completion"}),
        ({"question": "a", "answer": "b"}, "chat", {"prompt": "question", "completion": "answer"}),
        ({"Instruction": "a", "Output": "b"}, "chat", {"instruction": "Instruction", "response": "Output"}),
        (
            {"instruction": "a", "input": "c", "output": "b"},
            "chat",
            {"instruction": "instruction", "input": "input", "response": "output"},
        ),
        ({"text": LONG}, "pretraining", {"text": "text"}),
        ({"story": LONG, "n": 5}, "pretraining", {"text": "story"}),
    ],
)
def test_each_shape_of_rows_is_known(
    here: Path, row: dict[str, Any], task: str, named: dict[str, str], suffix: str
) -> None:
    if suffix == "csv" and row.get("n"):
        pytest.skip("a table of text has no numbers")
    recipe = guessed(write(f"rows.{suffix}", [row] * 12))
    assert (recipe.task, columns(recipe)) == (task, named)
    assert recipe.data.train == (f"rows.{suffix}",)
    assert recipe.data.test is None
    assert recipe.data.split.test == 0.1


def test_chat_messages_are_known(here: Path) -> None:
    recipe = guessed(write("rows.jsonl", [{"id": 1, "messages": TURNS}]))
    assert (recipe.task, columns(recipe)) == ("chat", {"messages": "messages"})


def test_plain_text_and_parquet_are_known(here: Path) -> None:
    Path("notes.txt").write_text("one\n\ntwo\n")
    assert guessed("notes.txt").task == "pretraining"
    pq.write_table(pa.table({"text": [LONG, "b"], "label": [0, 1]}), "rows.parquet")
    assert columns(guessed("rows.parquet")) == {"text": "text", "label": "label"}


def test_a_column_of_few_values_is_taken_for_the_class_of_the_longest(here: Path) -> None:
    rows = [{"id": f"r{n}", "sentence one": LONG + str(n), "stars": n % 5, "when": f"day {n}"} for n in range(40)]
    recipe = guessed(write("rows.jsonl", rows))
    assert columns(recipe) == {"text": "sentence one", "label": "stars"}


def test_data_with_nothing_to_learn_is_refused(here: Path) -> None:
    rows = [{"a": f"one {n}", "b": f"two {n}", "c": n} for n in range(20)]
    with pytest.raises(DataError, match=r"rows.jsonl:1: cannot tell what to learn from the columns 'a', 'b', 'c'"):
        guessed(write("rows.jsonl", rows))
    with pytest.raises(DataError, match="cannot tell what to learn"):
        guessed(write("numbers.jsonl", [{"a": 1, "b": 2}]))
    Path("broken.jsonl").write_text("{\n[]\n")
    with pytest.raises(DataError, match=r"broken.jsonl: holds no readable row"):
        guessed("broken.jsonl")
    with pytest.raises(DataError, match=r"absent.jsonl: no such file"):
        guessed("absent.jsonl")


def test_a_test_set_beside_the_training_set_is_found(here: Path) -> None:
    rows = [{"text": LONG, "label": "a"}, {"text": LONG, "label": "b"}]
    for name in (
        "train.jsonl",
        "test.jsonl",
        "x/my-train.csv",
        "x/my-test.csv",
        "alone/train.jsonl",
        "d/train/a.csv",
        "d/test/a.csv",
    ):
        write(name, rows)
    assert guessed("train.jsonl").data.test == ("test.jsonl",)
    assert guessed("x/my-train.csv").data.test == ("x/my-test.csv",)
    assert guessed("d/train").data.test == ("d/test",)
    assert guessed("x/*-train.csv").data.test == ("x/*-test.csv",)
    assert guessed("alone/train.jsonl").data.test is None
    assert guessed("test.jsonl").data.test is None
    assert guessed("alone/train.jsonl", test="test.jsonl").data.test == ("test.jsonl",)


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("My reviews (v2).csv", "My-reviews-v2"),
        ("reviews/train.jsonl", "reviews"),
        ("reviews/data.jsonl", "reviews"),
        ("2024.csv", "2024"),
        ("yes.csv", "yes"),
        ("\u00e9\u00e8.csv", "my-model"),
        ("x" * 90 + ".csv", "x" * 60),
    ],
)
def test_the_recipe_is_called_after_the_data(here: Path, name: str, called: str) -> None:
    recipe = guessed(write(name, [{"text": LONG, "label": "a"}]))
    assert recipe.name == called
    assert recipe.data.train == (name,)


def test_a_name_that_no_recipe_can_have_is_refused(here: Path) -> None:
    write("a.csv", [{"text": LONG, "label": "a"}])
    assert guessed("a.csv", name="2024-05").name == "2024-05"
    with pytest.raises(RecipeError, match="`name`: String should match"):
        guessed("a.csv", name="a b")


WORDS = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff\u2028\u2029\x85"), min_size=1, max_size=12
)


@given(
    label=WORDS
    | st.sampled_from(["yes", "1", "null", "a: b", "#x", "a #b", "*", "&a", "- a", "'", '"', " a ", "~", "{", "1e5"])
)
def test_any_column_is_written_so_that_it_is_read_again(label: str) -> None:
    line = f"key: {guess._scalar(label)}    # a note"
    assert recipes.yaml.safe_load(line) == {"key": label}


def test_the_recipe_says_why(here: Path) -> None:
    text = guess.recipe_for(write("a.csv", [{"text": LONG, "label": "a"}]), model="starter")
    assert text.startswith("# Written by `tunewright init a.csv`: 'label' looks like the class of 'text'.\n")
    assert "model: starter    # a hub name, a folder, or starter\n" in text


@pytest.mark.parametrize(
    ("data", "task"),
    [
        ("banking77", "classification"),
        ("sgd-chat", "chat"),
        ("gsm8k", "chat"),
        ("dolly-subset", "chat"),
        ("imdb-cad/original_train.jsonl", "classification"),
        ("tinyshakespeare/input.txt", "pretraining"),
    ],
)
def test_real_data_are_known(shared: Path, data: str, task: str) -> None:
    source = shared / "data" / data
    recipe = guessed(str(source / "train.jsonl" if source.is_dir() else source))
    assert recipe.task == task
    assert prepare.source_fingerprint(recipe)
    if source.is_dir():
        assert recipe.data.test == (str(source / "test.jsonl"),)


def test_a_hub_data_set_is_known_with_its_test_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(str(tmp_path / "both" / f"{split}.jsonl"), [{"text": LONG, "label": "a"}])
    write(str(tmp_path / "one" / "train.jsonl"), [{"text": LONG, "label": "a"}])
    script = (
        "from tunewright.data import guess\n"
        "for name in ('both:train', 'team/one:train'): print(guess.recipe_for(name, model='gpt2'), end='---\\n')"
    )
    with Hub() as hub:
        hub.add_dataset("team/both", tmp_path / "both", aliases=["both"])
        hub.add_dataset("team/one", tmp_path / "one")
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=hub.environment(tmp_path / "home"),
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path / "both",
        )
    both, one, _ = done.stdout.split("---\n")
    assert recipes.loads(both).data.test == ("both:test",)
    assert recipes.loads(both).name == "both"
    assert recipes.loads(one).data.test is None
    assert recipes.loads(one).name == "one"


def test_pairs_of_answers_are_a_preference(here: Path) -> None:
    said = (
        [{"role": "user", "content": "a"}],
        [{"role": "assistant", "content": "b"}],
        [{"role": "assistant", "content": "c"}],
    )
    for row in (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"chosen": said[0] + said[1], "rejected": said[0] + said[2]},
        {"input": {"messages": said[0]}, "preferred_output": said[1], "non_preferred_output": said[2]},
    ):
        write("pairs.jsonl", [row] * 3)
        recipe = guessed("pairs.jsonl")
        assert recipe.task == "preference"
        assert columns(recipe) == {column: column for column in row}
