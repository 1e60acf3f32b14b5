"""What was rendered once is read back from disk as it was, row by row, and never under another tokenizer."""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright import chat, models
from tunewright import recipe as recipes
from tunewright.chat import Example, Rendering
from tunewright.data import prepare, tokens
from tunewright.data.tokens import TokenStore
from tunewright.errors import RunError
from tunewright.models import ModelRef
from tunewright.run import Run, create, write_json, write_json_lines


@st.composite
def rendering(draw: st.DrawFn) -> Rendering:
    ids = draw(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=9))
    return Rendering(ids, draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))


def stored(folder: Path, rows: list[list[Rendering]]) -> TokenStore:
    """A store of some rows' sequences, beside a jsonl that says where the rows come from."""
    run = Run(folder)
    write_json_lines(
        run.data_file("train"), [Example(str(n), f"some.jsonl:{n + 1}").to_dict() for n in range(len(rows))]
    )
    starts = [0]
    for line in run.data_file("train").read_bytes().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    with tokens.writing(run, "train") as writer:
        for row, sequences in enumerate(rows):
            writer.add(sequences, row=row, byte=starts[row])
    count = sum(map(len, rows))
    write_json(run.manifest_file("prepare"), {"splits": {"train": {"sequences": count}}})
    return TokenStore.open(run, "train")


@given(rows=st.lists(st.lists(rendering(), min_size=1, max_size=3), min_size=1, max_size=6))
def test_sequences_come_back_as_they_were_with_their_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[Rendering]]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    store = stored(folder, rows)
    flat = [one for row in rows for one in row]
    assert len(store) == len(flat)
    assert list(store) == flat == store[:]
    assert store[-1] == flat[-1]
    assert store.lengths.tolist() == [len(one.ids) for one in flat]
    assert store.targets.tolist() == [sum(one.mask[1:]) for one in flat]
    places = [f"some.jsonl:{number + 1}" for number, row in enumerate(rows) for _ in row]
    assert [store.source(number) for number in range(len(store))] == places
    with pytest.raises(IndexError):
        store[len(store)]
    assert list(pickle.loads(pickle.dumps(store))) == flat


def test_the_files_are_numpy_s_own(tmp_path: Path) -> None:
    stored(tmp_path, [[Rendering([5, 6], [False, True])], [Rendering([7], [True])]])
    assert np.load(tmp_path / "data/train.tokens.npy").tolist() == [5, 6, 7]
    assert np.load(tmp_path / "data/train.mask.npy").tolist() == [0, 1, 1]
    table = np.load(tmp_path / "data/train.sequences.npy")
    assert (table["end"].tolist(), table["targets"].tolist(), table["row"].tolist()) == ([2, 3], [1, 0], [0, 1])


def test_a_store_is_mapped_and_not_read(tmp_path: Path) -> None:
    many = [[Rendering([1] * 1000, [True] * 1000)] for _ in range(400)]
    tracemalloc.start()
    try:
        store = stored(tmp_path, many)
        before = tracemalloc.get_traced_memory()[0]
        for number in range(len(store)):
            assert len(store[number].ids) == 1000
        assert tracemalloc.get_traced_memory()[0] - before < 100_000, "400,000 ids would be 1.6 MB"
    finally:
        tracemalloc.stop()
    assert pickle.dumps(store).find(b"\1\0\0\0\1\0\0\0") == -1
    assert len(pickle.dumps(store)) < 2000


def test_a_write_that_fails_leaves_the_old_store(tmp_path: Path) -> None:
    old = list(stored(tmp_path, [[Rendering([1, 2], [False, True])]]))

    def write(given: list[Rendering]) -> None:
        with tokens.writing(Run(tmp_path), "train") as writer:
            writer.add(given, row=0, byte=0)

    with pytest.raises(OverflowError):
        write([Rendering([3], [True]), Rendering([2**32], [True])])
    assert list(TokenStore.open(Run(tmp_path), "train")) == old
    assert not list((tmp_path / "data").glob(".*"))


@pytest.mark.parametrize("part", ["tokens", "mask", "sequences"])
@pytest.mark.parametrize("harm", ["gone", "short", "empty", "other"])
def test_a_damaged_store_is_named(tmp_path: Path, part: str, harm: str) -> None:
    stored(tmp_path, [[Rendering([1, 2, 3], [False, True, True])], [Rendering([4, 5], [False, True])]])
    path = tmp_path / "data" / f"train.{part}.npy"
    match harm:
        case "gone":
            path.unlink()
        case "short":
            path.write_bytes(path.read_bytes()[:-1])
        case "empty":
            path.write_bytes(b"")
        case "other":
            np.save(path, np.zeros(5))
    with pytest.raises(RunError, match=rf"train\.{part}\.npy: .*prepare the data again"):
        TokenStore.open(Run(tmp_path), "train")


def test_a_store_of_another_preparation_is_named(tmp_path: Path) -> None:
    stored(tmp_path, [[Rendering([1], [True])]])
    write_json(Run(tmp_path).manifest_file("prepare"), {"splits": {"train": {"sequences": 2}}})
    with pytest.raises(RunError, match=r"it holds 1 sequences, and checks.json 2"):
        TokenStore.open(Run(tmp_path), "train")
    with pytest.raises(RunError, match=r"names no data.validation"):
        TokenStore.open(Run(tmp_path), "validation")
    Run(tmp_path).manifest_file("prepare").unlink()
    with pytest.raises(RunError, match=r"stage prepare is not done"):
        TokenStore.open(Run(tmp_path), "train")


# Whose ids they are


@pytest.fixture
def prepared(tmp_path: Path, model_folder: Path) -> tuple[Run, ModelRef, Any]:
    rows = [{"text": f"lovely {number}", "label": ("good", "bad")[number % 2]} for number in range(6)]
    write_json_lines(tmp_path / "rows.jsonl", rows)
    path = str(tmp_path / "rows.jsonl")
    asked = recipes.Recipe.model_validate(
        {"name": "one", "model": "m", "task": "classification", "data": {"train": path, "test": path}}
    )
    ref = models.find(str(model_folder))
    tokenizer = models.load_tokenizer(ref)
    equipment = chat.equip(tokenizer)
    run = create(tmp_path / "runs", asked)
    prepare.write(run, asked, ref, tokenizer, equipment)
    return run, ref, tokenizer


def test_the_manifest_says_by_which_tokenizer_and_template_the_ids_were_made(
    prepared: tuple[Run, ModelRef, Any],
) -> None:
    run, ref, tokenizer = prepared
    said = run.manifest("prepare")["rendering"]
    assert {key: said[key] for key in ("tokenizer_sha256", "template_sha256")} == tokens.made_by(tokenizer)
    again = models.load_tokenizer(ref)
    chat.equip(again)
    again(["a", "bc"], truncation=True, max_length=5, padding=True)  # leaves its settings behind in the Rust tokenizer
    assert again.backend_tokenizer.truncation is not None
    assert tokens.made_by(again) == tokens.made_by(tokenizer)
    assert len(prepare.stored(run, "train", again)) == 6


def test_ids_of_another_tokenizer_or_template_are_refused(prepared: tuple[Run, ModelRef, Any]) -> None:
    run, ref, tokenizer = prepared
    other = models.load_tokenizer(ref)
    chat.equip(other)
    other.add_tokens(["love"])
    with pytest.raises(
        RunError, match=r"train.tokens.npy: the tokens were made by another tokenizer than the one of now"
    ):
        prepare.stored(run, "train", other)
    tokenizer.chat_template = tokenizer.chat_template.replace("capitalize", "upper")
    with pytest.raises(RunError, match=r"made by another template"):
        prepare.stored(run, "train", tokenizer)


def test_ids_that_another_version_s_code_rendered_are_refused(prepared: tuple[Run, ModelRef, Any]) -> None:
    run, _, tokenizer = prepared
    ids = np.load(run.tokens_file("train", "tokens"))
    ids[3] += 1
    np.save(run.tokens_file("train", "tokens"), ids)
    with pytest.raises(RunError, match=r"made by another rendering"):
        prepare.stored(run, "train", tokenizer)
