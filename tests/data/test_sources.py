"""Every row is read with the place where a person finds it, or is named with what is wrong with it."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub import Hub
from tunewright.data import sources
from tunewright.data.sources import Broken, Row, absolute, fingerprint, is_file, read
from tunewright.errors import DataError

BOM = b"\xef\xbb\xbf"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that commands run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def rows(here: Path) -> Callable[[str, bytes | str], list[Row | Broken]]:
    """The rows of a file with this name and content."""

    def read_it(name: str, content: bytes | str) -> list[Row | Broken]:
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return list(read([name], "data.train").rows)

    return read_it


Rows = Callable[[str, bytes | str], list[Row | Broken]]


def refusal(source: str) -> str:
    with pytest.raises(DataError) as refused:
        read([source], "data.train")
    return str(refused.value)


# JSON lines


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.JSONL", "a.json"])
def test_json_lines_are_found_by_file_and_line(rows: Rows, name: str) -> None:
    assert rows(name, '{"text": "a"}\n\n{"text": "b\\n", "n": [1]}\n') == [
        Row(f"{name}:1", {"text": "a"}),
        Row(f"{name}:3", {"text": "b\n", "n": [1]}),
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_rows(rows: Rows, name: str) -> None:
    assert rows(name, BOM + b'{"text": "a"}\r\n{"text": "b"}\r\n') == [
        Row(f"{name}:1", {"text": "a"}),
        Row(f"{name}:2", {"text": "b"}),
    ]


def test_the_last_line_needs_no_line_end_and_text_may_hold_odd_ones(rows: Rows) -> None:
    found = rows("a.jsonl", json.dumps({"text": "a\u2028b\x85\x0c"}, ensure_ascii=False))
    assert found == [Row("a.jsonl:1", {"text": "a\u2028b\x85\x0c"})]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_broken_line_is_named_and_the_others_are_read(rows: Rows, name: str) -> None:
    lines = ['{"text": "fine"}'] * 50
    lines[36] = '{"text": "broken}'
    found = rows(name, "\n".join(lines))
    (broken,) = [row for row in found if isinstance(row, Broken)]
    assert len(found) == 50
    assert broken.where == f"{name}:37"
    assert broken.message == (
        "broken JSON at column 10: Unterminated string starting at; each line must be one JSON object"
    )


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (b'{"text": "caf\xe9"}', "not_utf8", "not UTF-8 (byte 14); save the file as UTF-8"),
        (b"[1]", "not_an_object", "a list, not a JSON object with columns"),
        (b"null", "not_an_object", "null, not a JSON object with columns"),
        (b'"text"', "not_an_object", "a string, not a JSON object with columns"),
        (b'{"text": "a"} {"text": "b"}', "broken_json", "broken JSON at column 15: Extra data; each line"),
        (b"[" * 100_000, "broken_json", "broken JSON: maximum recursion depth"),
        (b'{"n": ' + b"1" * 5000 + b"}", "broken_json", "broken JSON: Exceeds the limit"),
        (rb'{"text": "\ud83d"}', "half_character", "half of a character"),
        (b"\x00", "broken_json", "broken JSON at column 1"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(rows: Rows, line: bytes, code: str, said: str) -> None:
    first, broken = rows("a.jsonl", b'{"text": "\\ud83c\\udf89"}\n' + line + b"\n")
    assert first == Row("a.jsonl:1", {"text": "\N{PARTY POPPER}"})
    assert isinstance(broken, Broken)
    assert (broken.where, broken.code) == ("a.jsonl:2", code)
    assert said in broken.message


LINES = st.dictionaries(st.text(), st.text() | st.integers() | st.none() | st.lists(st.text()), max_size=3)


@given(lines=st.lists(LINES, max_size=5), end=st.sampled_from(["\n", "\r\n"]), plain=st.booleans())
def test_any_lines_are_read_as_they_are(
    tmp_path_factory: pytest.TempPathFactory, lines: list[dict[str, Any]], end: str, plain: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes("".join(json.dumps(line, ensure_ascii=not plain) + end for line in lines).encode())
    assert [row.fields for row in read([str(path)], "data.train").rows] == lines


# JSON


def test_a_list_of_objects_is_found_by_item(rows: Rows) -> None:
    assert rows("a.json", BOM + b'[\n {"text": "a"},\r\n 5,\n {"text": "b"}\n]\n') == [
        Row("a.json:item 1", {"text": "a"}),
        Broken("a.json:item 2", "not_an_object", "a number, not a JSON object with columns"),
        Row("a.json:item 3", {"text": "b"}),
    ]
    assert rows("b.json", '{"text":\n "a"}') == [Row("b.json:item 1", {"text": "a"})]
    assert rows("c.json", "[]") == []


def test_a_broken_list_is_named_with_its_line(rows: Rows) -> None:
    content = "[\n" + ' {"text": "a"},\n' * 35 + ' {"text": "a"\n'
    assert rows("a.json", content) == [Broken("a.json:38", "broken_json", "broken JSON: Expecting ',' delimiter")]


def test_a_json_file_of_something_else_is_refused(here: Path) -> None:
    (here / "a.json").write_text('"text"')
    assert refusal("a.json") == "a.json: holds a string; a .json file holds a list of objects"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda some: st.lists(some, max_size=3)
)


@given(
    items=st.lists(st.dictionaries(st.text(max_size=3), JSON, max_size=3) | JSON, max_size=6),
    chunk=st.integers(1, 30),
    indent=st.none() | st.integers(0, 2),
    ascii_only=st.booleans(),
    harm=st.none() | st.tuples(st.integers(0, 300), st.sampled_from(["", " ", ",", "]", "[", "{", "1", "e", '"', "x"])),
)
def test_a_list_is_read_item_by_item_as_it_is_read_whole(
    tmp_path_factory: pytest.TempPathFactory,
    items: list[Any],
    chunk: int,
    indent: int | None,
    ascii_only: bool,
    harm: tuple[int, str] | None,
) -> None:
    """However its chunks fall, and whatever is wrong with it."""
    text = json.dumps(items, indent=indent, ensure_ascii=ascii_only)
    if harm:
        text = text[: harm[0]] + harm[1] + text[harm[0] + 1 :]
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "CHUNK", chunk)
        try:
            whole: Any = list(sources._read_json(path))
        except DataError as error:
            assert refusal(str(path)) == str(error)  # noqa: PT017
        else:
            assert repr(list(read([str(path)], "data.train").rows)) == repr(whole)  # NaN is not itself
            if harm is None and items:
                assert sources._JsonFile(path).is_list, "else it was read whole"


# Tables of text


def test_a_csv_s_rows_are_found_by_the_line_they_begin_on(rows: Rows) -> None:
    content = 'text,label\r\n"two\r\nlines",good\r\n\r\n"a ""quote"", and a comma",bad\r\nplain,good\r\n'
    assert rows("a.csv", BOM + content.encode()) == [
        Row("a.csv:2", {"text": "two\r\nlines", "label": "good"}),
        Row("a.csv:5", {"text": 'a "quote", and a comma', "label": "bad"}),
        Row("a.csv:6", {"text": "plain", "label": "good"}),
    ]


def test_a_tsv_may_hold_commas(rows: Rows) -> None:
    assert rows("a.tsv", "\n text \tlabel\na, b\tgood") == [Row("a.tsv:3", {"text": "a, b", "label": "good"})]


def test_a_row_with_too_many_values_is_named(rows: Rows) -> None:
    found = rows("a.csv", "text,label\na,b,c\nd,e\nf\n")
    assert [row.where for row in found] == ["a.csv:2", "a.csv:3", "a.csv:4"]
    assert isinstance(found[0], Broken)
    assert found[0].message == "3 values for 2 columns; put values with ',' in quotes"
    assert isinstance(found[2], Broken)


def test_a_quote_in_the_wrong_place_is_named_and_the_rest_is_read(rows: Rows) -> None:
    found = rows("a.csv", 'text,label\n"a" b,good\nc,bad\n')
    assert isinstance(found[0], Broken)
    assert (found[0].where, found[0].code) == ("a.csv:2", "broken_csv")
    assert found[1:] == [Row("a.csv:3", {"text": "c", "label": "bad"})]


def test_a_quote_that_swallows_the_rest_of_the_file_is_refused(here: Path) -> None:
    (here / "a.tsv").write_text('text\tlabel\na\tgood\n"He said\tbad\nb\tgood\n')
    assert refusal("a.tsv") == "a.tsv:3: a quote is opened here and never closed; close it or write it twice"


def test_two_columns_of_one_name_are_refused(here: Path) -> None:
    (here / "a.csv").write_text("text,label,text\na,b,c\n")
    assert refusal("a.csv") == "a.csv:1: two columns have the same name; rename one"


def test_a_large_field_is_read(rows: Rows) -> None:
    (row,) = rows("a.csv", "text\n" + "a" * 500_000 + "\n")
    assert isinstance(row, Row)
    assert len(row.fields["text"]) == 500_000


CELLS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(table=st.lists(st.tuples(CELLS, CELLS.map("{}x".format)), max_size=5), suffix=st.sampled_from(["csv", "tsv"]))
def test_any_table_is_read_as_it_is_and_found_where_it_stands(
    tmp_path_factory: pytest.TempPathFactory, table: list[tuple[str, str]], suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="," if suffix == "csv" else "\t")
    writer.writerow(["one", "two"])
    starts = []
    for values in table:
        starts.append(len(io.StringIO(text.getvalue(), newline=None).readlines()) + 1)
        writer.writerow(values)
    path.write_bytes(text.getvalue().encode())
    found = read([str(path)], "data.train").rows
    assert [tuple(row.fields.values()) for row in found] == table
    assert [int(row.where.rpartition(":")[2]) for row in found] == starts


# Parquet


def test_a_parquet_file_s_rows_are_found_by_number(rows: Rows, here: Path) -> None:
    table = [
        {"text": "a", "messages": [{"role": "user", "content": "b", "weight": None}]},
        {"text": None, "messages": []},
    ]
    pq.write_table(pa.Table.from_pylist(table), here / "a.parquet", row_group_size=1)
    assert list(read(["a.parquet"], "data.train").rows) == [
        Row("a.parquet:row 1", table[0]),
        Row("a.parquet:row 2", table[1]),
    ]


def test_what_is_no_parquet_is_refused(here: Path) -> None:
    pq.write_table(
        pa.table({"text": ["a" * 1000] * 1000}), here / "whole.parquet", compression="none", use_dictionary=False
    )
    whole = (here / "whole.parquet").read_bytes()
    for content in (b"", b"text", whole[:2000], whole[:2000] + b"\xff" * 500_000 + whole[502_000:]):
        (here / "a.parquet").write_bytes(content)
        assert refusal("a.parquet").startswith("a.parquet: not a readable Parquet file")


# Plain text


def test_a_text_is_cut_between_paragraphs_and_nothing_is_lost(rows: Rows) -> None:
    paragraphs = [f"{number} " + "word " * 100 + "\n" for number in range(30)]
    text = "\n".join(paragraphs) + "\n\n\n"
    found = rows("a.txt", BOM + text.replace("\n", "\r\n").encode())
    assert "".join(row.fields["text"] for row in found if isinstance(row, Row)) == text
    assert [row.ends for row in found if isinstance(row, Row)] == [False] * (len(found) - 1) + [True]
    assert len(found) > 3
    for row in found:
        assert isinstance(row, Row)
        assert row.fields["text"].strip()
        start = int(row.where.removeprefix("a.txt:"))
        assert text.split("\n")[start - 1] == row.fields["text"].split("\n")[0]


def test_a_text_without_paragraphs_is_cut_between_lines(rows: Rows) -> None:
    found = rows("a.md", "one line of it\n" * 2000)
    assert "".join(row.fields["text"] for row in found if isinstance(row, Row)) == "one line of it\n" * 2000
    assert len(found) == 4


@given(st.lists(st.text(st.characters(exclude_characters="\r", exclude_categories=["Cs"])) | st.just("\n" * 9000)))
def test_any_text_is_read_whole(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes("".join(parts).encode())
    found = read([str(path)], "data.train").rows
    assert "".join(row.fields["text"] for row in found) == "".join(parts).removeprefix("\ufeff")
    assert sum(row.ends for row in found) == bool(found)


# Some of the rows


MANY = [{"text": f"row {number} \u00e9", "label": str(number % 3)} for number in range(40)]


def table_of(folder: Path, kind: str) -> list[str]:
    """The same rows in a file (or two) of some kind."""
    path = folder / f"many.{kind}"
    match kind:
        case "jsonl":
            path.write_bytes(BOM + b"\r\n \n".join(json.dumps(row).encode() for row in MANY))
        case "json":
            path.write_text(json.dumps(MANY))
        case "csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, ["text", "label"])
                writer.writeheader()
                writer.writerows(MANY)
        case "parquet":
            pq.write_table(pa.Table.from_pylist(MANY), path, row_group_size=7)
        case "two":
            return [*table_of(folder, "csv"), *table_of(folder, "jsonl")]
    return [str(path)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "two"])
@given(data=st.data())
@settings(max_examples=30)
def test_rows_are_picked_in_any_order_and_found_where_they_stand(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    rows = read(table_of(tmp_path_factory.getbasetemp(), kind), "data.train").rows
    whole = list(rows)
    assert len(rows) == len(whole) == (80 if kind == "two" else 40)
    numbers = data.draw(st.lists(st.integers(0, len(rows) - 1), unique=True))
    picked = [whole[number] for number in numbers]
    assert list(rows.pick(numbers)) == picked
    some = sources.Some(rows, np.array(numbers, dtype=np.int64))
    assert list(some) == picked
    assert len(some) == len(numbers)
    again = data.draw(st.lists(st.sampled_from(range(len(numbers))), unique=True)) if numbers else []
    assert list(some.pick(again)) == [picked[place] for place in again]
    assert list(rows) == whole, "they can be gone through again"


def test_rows_that_wait_for_their_turn_do_so_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SPOOL_BYTES", 100)
    rows = read(table_of(tmp_path, "csv"), "data.train").rows
    assert [row.fields for row in rows.pick(range(39, -1, -1)) if isinstance(row, Row)] == MANY[::-1]


def test_a_broken_line_can_be_picked_too(rows: Rows) -> None:
    found = rows("a.jsonl", '{"text": "a"}\n\n{\n{"text": "b"}\n')
    table = read(["a.jsonl"], "data.train").rows
    assert list(table.pick([2, 1, 0])) == found[::-1]
    assert isinstance(table[1], Broken)
    assert table[-1] == found[-1]
    assert table[:2] == found[:2]


# Files


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".txt"])
def test_an_empty_file_has_no_rows(rows: Rows, suffix: str) -> None:
    assert rows(f"a{suffix}", "") == []
    assert rows(f"b{suffix}", BOM) == []


@pytest.mark.parametrize("suffix", [".json", ".csv", ".tsv", ".txt", ".md"])
def test_a_file_that_is_not_utf8_is_named_with_the_line(here: Path, suffix: str) -> None:
    (here / f"a{suffix}").write_bytes(BOM + b"text\n" * 40 + b"caf\xe9\n")
    assert refusal(f"a{suffix}") == f"a{suffix}:41: not UTF-8; save the file as UTF-8"


def test_files_of_a_glob_and_of_a_folder_are_read_in_the_order_of_their_names(here: Path) -> None:
    (here / "data" / "deep").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", ".hidden.jsonl", "README.md", "notes.rst"):
        (here / "data" / name).write_text(json.dumps({"text": name}) + "\n")
    (here / "data" / "folder.csv").mkdir()

    def names(source: str) -> list[str]:
        return [row.where for row in read([source], "data.train").rows]

    assert names("data/*.jsonl") == ["data/a.jsonl:1", "data/b.jsonl:1"]
    assert names("data") == names("data/") == ["data/a.jsonl:1", "data/b.jsonl:1"]
    assert names("data/**/?.jsonl") == ["data/a.jsonl:1", "data/b.jsonl:1", "data/deep/c.jsonl:1"]
    assert names(str(here / "data" / "[b]*")) == ["data/b.jsonl:1"]
    assert names("data/b.jsonl") + names("data/a.jsonl") == [
        row.where for row in read(["data/b.jsonl", "data/a.jsonl"], "data.train").rows
    ]


def test_a_folder_that_is_called_like_a_file_is_a_folder(here: Path) -> None:
    """As Spark writes them."""
    (here / "out.parquet").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), here / "out.parquet" / "part-00000.parquet")
    (here / "out.parquet" / "_SUCCESS").touch()
    assert [row.where for row in read(["out.parquet"], "data.train").rows] == ["out.parquet/part-00000.parquet:row 1"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("data/trian.jsonl", "data.train: data/trian.jsonl: no such file; did you mean data/train.jsonl?"),
        ("data/other.csv", "data.train: data/other.csv: no such file"),
        ("nowhere/a.csv", "data.train: nowhere/a.csv: no such file"),
        ("data/*.parquet", "data.train: data/*.parquet: no such file"),
        ("data/notes.rst", "data.train: data/notes.rst: files of kind .rst are not read; use .jsonl, .ndjson"),
        ("data/plain", "data.train: data/plain: files of kind (none) are not read"),
        ("empty", "data.train: the folder empty holds no data file (.jsonl"),
        ("imdb", "data.train: 'imdb' is neither a file here nor a hub data set with its split; say a path such as"),
        ("a b:train", "is neither a file here nor a hub data set"),
        ("starter:nothing.csv", "data.train: starter:nothing.csv: "),
    ],
)
def test_a_source_that_is_not_there_is_named(here: Path, source: str, said: str) -> None:
    (here / "data").mkdir()
    (here / "empty").mkdir()
    for name in ("train.jsonl", "notes.rst", "plain"):
        (here / "data" / name).touch()
    if source.startswith("starter") and not (Path(sources.starter.__file__).parent / "data").is_dir():
        pytest.skip("the starter's data are not made yet")
    assert said in refusal(source)


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("imdb:train", False),
        ("stanfordnlp/imdb:train", False),
        ("glue:sst2:train", False),
        ("imdb:train[:10%]", False),
        ("imdb:train[:100]+test[5:9]", False),
        ("a.csv", True),
        ("A.CSV", True),
        ("./a", True),
        ("../a", True),
        ("~/a", True),
        ("/a", True),
        ("part-*", True),
        ("data/[ab]", True),
        ("starter:train.jsonl", True),
        ("here", True),
        ("x" * 5000, False),
    ],
)
def test_files_are_told_from_hub_data_sets(here: Path, source: str, file: bool) -> None:
    (here / "here").mkdir()
    assert is_file(source) == file


def test_a_path_is_made_absolute_as_it_stands_from_here_else_from_the_recipe(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = here / "recipes [1]"
    for name in ("work/a.csv", "recipes [1]/a.csv", "recipes [1]/b.csv", "recipes [1]/set/train.csv"):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text("text\nx\n")
    monkeypatch.chdir(here / "work")
    relative = Path("..") / "recipes [1]"
    for place in (folder, relative):
        assert absolute("a.csv", place) == str(here / "work" / "a.csv")
        assert Path(absolute("b.csv", place)).samefile(folder / "b.csv")
        assert Path(absolute("set", place)).samefile(folder / "set")
        assert absolute("imdb:train", place) == "imdb:train"
        assert absolute("imdb:train[:5%]", place) == "imdb:train[:5%]"
        assert absolute("starter:a.csv", place) == "starter:a.csv"
        assert absolute("absent.csv", place) == str(here / "work" / "absent.csv")
        assert absolute("/x/*.csv", place) == "/x/*.csv"
        monkeypatch.chdir(here)
        found = read([absolute("set/*.csv", here / "recipes [1]")], "data.train")
        assert [row.where for row in found.rows] == ["recipes [1]/set/train.csv:2"]
        monkeypatch.chdir(here / "work")
    monkeypatch.setenv("HOME", str(here))
    assert absolute("~/a.csv", folder) == str(here / "a.csv")


def test_the_fingerprint_is_that_of_the_content(here: Path) -> None:
    (here / "a.csv").write_text("text\nx\n")
    before = fingerprint(["a.csv"], "data.train")
    os.utime(here / "a.csv", (0, 0))
    assert fingerprint(["a.csv"], "data.train") == before
    (here / "a.csv").write_text("text\ny\n")
    assert fingerprint(["a.csv"], "data.train") != before
    assert fingerprint(["*.csv"], "data.train") != fingerprint(["a.csv"], "data.train")
    assert fingerprint(["imdb:train"], "data.train") != fingerprint(["imdb:test"], "data.train")


# The hub


SCRIPT = """
import json, sys
import numpy
from tunewright.data import sources
from tunewright.errors import DataError
answers = []
for source in sys.argv[1:]:
    try:
        table = sources.read([source], "data.train", label="label")
        some = sources.Some(table.rows, numpy.array([len(table.rows) - 1, 0]))
        answers.append({
            "rows": [[row.where, row.fields] for row in table.rows],
            "some": [row.where for row in some],
            "one": table.rows[1].where,
            "slice": [row.where for row in table.rows[:2]],
            "classes": table.classes,
        })
    except DataError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("sets")
    features = {
        "text": {"dtype": "string", "_type": "Value"},
        "label": {"names": ["neg", "pos"], "_type": "ClassLabel"},
    }
    schema = pa.schema({"text": pa.string(), "label": pa.int64()}).with_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    (folder / "imdb" / "plain_text").mkdir(parents=True)
    for split, size in (("train", 5), ("test", 2)):
        table = [{"text": f"{split} {number}", "label": number % 2} for number in range(size)]
        pq.write_table(
            pa.Table.from_pylist(table, schema=schema), folder / f"imdb/plain_text/{split}-00000-of-00001.parquet"
        )
    (folder / "script").mkdir()
    (folder / "script" / "script.py").write_text("raise SystemExit('never run')\n")
    (folder / "broken").mkdir()
    (folder / "broken" / "train.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with Hub() as hub:
        hub.add_dataset("stanfordnlp/imdb", folder / "imdb", aliases=["imdb"])
        hub.add_dataset("team/script", folder / "script")
        hub.add_dataset("team/broken", folder / "broken")
        yield hub


def ask(hub: Hub, home: Path, *names: str, **environment: str) -> list[Any]:
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:tunewright", "-c", SCRIPT, *names],
        env=hub.environment(home, **environment),
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers: list[Any] = json.loads(done.stdout)
    return answers


def test_a_hub_data_set_is_read_by_its_short_name(hub: Hub, tmp_path: Path) -> None:
    short, full, part = ask(hub, tmp_path, "imdb:train", "stanfordnlp/imdb:test", "imdb:train[1:3]")
    assert short["rows"] == [
        [f"imdb:train:row {number + 1}", {"text": f"train {number}", "label": number % 2}] for number in range(5)
    ]
    assert short["some"] == ["imdb:train:row 5", "imdb:train:row 1"]
    assert short["one"] == "imdb:train:row 2"
    assert short["slice"] == ["imdb:train:row 1", "imdb:train:row 2"]
    assert short["classes"] == ["neg", "pos"]
    assert [row["text"] for _, row in full["rows"]] == ["test 0", "test 1"]
    assert [row["text"] for _, row in part["rows"]] == ["train 1", "train 2"]


def test_a_hub_data_set_that_cannot_be_read_is_named(hub: Hub, tmp_path: Path) -> None:
    absent, nobody, split, script, broken = ask(
        hub, tmp_path, "team/absent:train", "nothing:train", "imdb:validation", "team/script:train", "team/broken:train"
    )
    assert absent.startswith(f"data.train: no data set 'team/absent' at the hub ({hub.url})")
    assert nobody.startswith(f"data.train: no data set 'nothing' at the hub ({hub.url})")
    assert split.startswith("data.train: imdb:validation: Unknown split")
    assert "Dataset scripts are no longer supported" in script
    assert broken.startswith("data.train: team/broken:train: ")
    assert not any("\n" in message for message in (absent, nobody, split, script, broken))


def test_a_hub_that_does_not_answer_is_named(hub: Hub, tmp_path: Path) -> None:
    (said,) = ask(hub, tmp_path, "imdb:train", HF_ENDPOINT="http://127.0.0.1:9")
    assert said.startswith("data.train: imdb:train: the hub at http://127.0.0.1:9 did not give it: ")
