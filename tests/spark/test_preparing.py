"""Data prepared by Spark jobs is, byte for byte, what one machine prepares, in however many parts."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from tunewright import life, work
from tunewright import recipe as recipes
from tunewright.backends.spark import SparkBackend
from tunewright.data import pieces, sources
from tunewright.errors import DataError
from tunewright.run import Run, write_json
from tunewright.spark import preparing, session
from tunewright.spark.settings import settings
from tunewright.testing import tiny_model

WORDS = ("lovely", "great", "superb", "awful", "poor", "broken", "naïve", "東京")


@pytest.fixture(scope="module")
def spark(master: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    shared = tmp_path_factory.mktemp("site")
    with session.session(settings({"master": master}), "test", shared) as made:
        yield made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "model", context=64)


def chat_rows(folder: Path) -> dict[str, Any]:
    """JSON lines with a byte order mark, blank lines, and rows that are broken in every way."""
    rows = []
    for number in range(60):
        said = [
            {"role": "user", "content": f"{WORDS[number % 8]} {number}"},
            {"role": "assistant", "content": "yes " * (number % 40)},
        ]
        rows.append(json.dumps({"messages": said}, ensure_ascii=number % 2 == 0))
    rows[7] = '{"messages": [' + "x" * 10
    rows[21] = '["not", "an object"]'
    rows[33] = '{"messages": "not a list"}'
    rows[40] = ""
    rows[41] = "  "
    (folder / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode())
    (folder / "test.jsonl").write_text("\n".join([rows[0], rows[3], rows[59]]))
    return {"task": "chat", "data": {"bad_rows": "skip", "over_length": "drop"}}


def labelled_rows(folder: Path) -> dict[str, Any]:
    draw = random.Random(3)
    for split, count in (("train", 90), ("test", 40)):
        lines = [
            json.dumps({"text": f"{draw.choice(WORDS)} {draw.randint(0, 30)}", "label": f"l{number % 3}"})
            for number in range(count)
        ]
        lines[5] = json.dumps({"text": "who", "label": "l9" if split == "test" else "l1"})
        lines[11] = "{broken"
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    data = {"limit": {"train": 50, "test": 400, "seed": 5}, "bad_rows": "skip"}
    return {"task": "classification", "data": data}


def held_out(folder: Path) -> dict[str, Any]:
    lines = [json.dumps({"text": f"{WORDS[number % 6]} {number // 3}", "label": number % 2}) for number in range(120)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    return {"task": "classification", "data": {"split": {"test": 0.3, "seed": 4}, "limit": {"train": 40, "seed": 1}}}


def quoted(folder: Path) -> dict[str, Any]:
    """CSV whose fields hold line ends, and a row with too many columns."""
    for split in ("train", "test"):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["prompt", "completion"])
            for number in range(40):
                writer.writerow([f'say "{number}"\nin {WORDS[number % 8]}', f"word, {number}"])
            file.write("one,two,three\n")
    return {"task": "chat", "data": {"bad_rows": "skip"}, "suffix": "csv"}


def columns(folder: Path) -> dict[str, Any]:
    for split in ("train", "test"):
        rows = {"question": [f"{WORDS[n % 8]} {n}" for n in range(50)], "chosen": ["yes"] * 50, "rejected": ["no"] * 50}
        parquet.write_table(pyarrow.table(rows), folder / f"{split}.parquet", row_group_size=9)
    return {"task": "preference", "data": {"prompt": "question"}, "suffix": "parquet"}


def texts(folder: Path) -> dict[str, Any]:
    draw = random.Random(1)
    for split in ("train", "test"):
        paragraphs = [" ".join(draw.choices(WORDS, k=draw.randint(5, 300))) for _ in range(12)]
        (folder / f"{split}.txt").write_text("\n\n".join(paragraphs))
    return {"task": "pretraining", "data": {}, "suffix": "txt"}


CASES = [
    labelled_rows,
    *(pytest.param(case, marks=pytest.mark.slow) for case in (chat_rows, held_out, quoted, columns, texts)),
]


def begun(folder: Path, model: Path, case: dict[str, Any], **data: Any) -> Run:
    """A checked run of a case's recipe."""
    suffix = case.get("suffix", "jsonl")
    named = {
        split: str(folder / f"{split}.{suffix}")
        for split in ("train", "test")
        if (folder / f"{split}.{suffix}").is_file()
    }
    recipe = {
        "name": "p",
        "model": str(model),
        "task": case["task"],
        "data": named | case["data"] | data,
        "tracking": {"enabled": False},
        "backend": {"kind": "spark"},
    }
    asked = recipes.loads(yaml.safe_dump(recipe))
    run = life.start(asked, folder / "runs", resume=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparkBackend, "check", lambda *_: [])  # a session of its own takes longer than all of this
        write_json(run.manifest_file("check"), life.resolve(asked, life.check(asked), run.path.parent))
    return run


def contents(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run.path / "data").iterdir()}


@pytest.mark.parametrize("case", CASES)
def test_every_file_is_that_of_one_machine(
    case: Any, spark: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = case(tmp_path)
    here = begun(tmp_path, model, given)
    work.prepare(here)
    assert len(contents(here)) == 10
    for partitions in (1, 7):
        there = begun(tmp_path, model, given)
        preparing.prepare(there, spark, settings({"partitions": partitions}))
        assert contents(there).keys() == contents(here).keys()
        for name, content in contents(here).items():
            assert contents(there)[name] == content, (name, partitions)
    monkeypatch.chdir(tmp_path)
    assert sources.shown(tmp_path / "a.csv") == "a.csv"  # the driver still names files as seen from where it stands


def test_what_stops_one_machine_stops_the_cluster_in_the_same_words(spark: Any, model: Path, tmp_path: Path) -> None:
    given = chat_rows(tmp_path)
    run = begun(tmp_path, model, given)
    for change in ({"bad_rows": "stop"}, {"over_length": "error"}, {"prompt": "nothing", "completion": "of that"}):
        recipe = yaml.safe_load(run.recipe_file.read_text())
        recipe["data"] = {key: recipe["data"][key] for key in ("train", "test")} | {"bad_rows": "skip"} | change
        run.recipe_file.write_text(yaml.safe_dump(recipe))
        said = []
        for prepare in (work.prepare, lambda one: preparing.prepare(one, spark, settings({"partitions": 3}))):
            with pytest.raises(DataError) as stopped:
                prepare(run)
            said.append(str(stopped.value))
        assert said[0] == said[1]
        assert not run.manifest_file("prepare").is_file()
    assert not list((run.path / "data").glob(".spark*"))


def test_a_table_gives_the_same_rows_in_however_many_partitions(spark: Any, model: Path, tmp_path: Path) -> None:
    rows = [(f"{WORDS[number % 8]} {number}", ("good", "bad")[number % 2]) for number in range(80)]
    frame = spark.createDataFrame(rows, "text string, label string")
    written = []
    for partitions in (1, 5):
        frame.repartition(partitions).write.mode("overwrite").parquet((tmp_path / "table").as_uri())
        spark.read.parquet((tmp_path / "table").as_uri()).createOrReplaceTempView("reviews")
        run = begun(tmp_path, model, {"task": "classification", "data": {}}, train="spark:reviews", split={"test": 0.2})
        preparing.prepare(run, spark, settings({"partitions": 3}))
        written.append(contents(run))
    assert written[0] == written[1]
    first = json.loads(written[0]["train.jsonl"].splitlines()[0])
    assert first["source"].startswith("spark:reviews:row ")
    checks = json.loads(written[0]["checks.json"])["splits"]
    assert checks["train"]["used"] + checks["test"]["used"] == 80


def test_a_table_that_is_not_there_is_named(spark: Any, model: Path, tmp_path: Path) -> None:
    run = begun(tmp_path, model, {"task": "chat", "data": {}}, train="spark:no.such.table", split={"test": 0.2})
    with pytest.raises(DataError, match=r"data\.train: spark:no\.such\.table: Spark cannot read it"):
        preparing.prepare(run, spark, settings({}))


@given(
    lines=st.lists(st.sampled_from(["", " ", '{"a": 1}', '{"b": "é"}', "{broken", "\ufeff"]), max_size=30),
    ends=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
    bom=st.booleans(),
    wanted=st.integers(1, 40),
)
def test_pieces_of_a_file_hold_its_rows_once_each(
    lines: list[str], ends: str, last: bool, bom: bool, wanted: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" * bom + (ends.join(lines) + ends * last).encode())
    found = pieces.cut(path, path.stat().st_size, wanted, least=1)
    counts = [pieces.count(piece) for piece in found]
    rows = [row for piece in pieces.numbered(found, counts) for row in pieces.read(piece)]
    assert rows == list(sources.READERS[".jsonl"](path))
    assert sum(held for _, held in counts) == len(rows)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=200))
def test_a_distribution_from_counts_is_numpys(values: list[int]) -> None:
    from collections import Counter

    from tunewright.data.account import _distribution

    said = _distribution(Counter(values))
    assert said["median"] == np.median(values)
    assert said["p95"] == np.percentile(values, 95)
    assert said["mean"] == round(float(np.mean(values)), 2)
