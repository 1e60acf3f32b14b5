"""What is cut into pieces for tasks to read is the whole, row by row, each under its own name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from hub import Hub
from tunewright.data import pieces, sources
from tunewright.errors import DataError

READ = """
import json, sys
from pathlib import Path
from tunewright.data import pieces, sources
found, features = pieces.of_hub("someone/reviews:train", "data.train", Path(sys.argv[1]), 3)
counts = [pieces.count(piece) for piece in found]
rows = [row for piece in pieces.numbered(found, counts) for row in pieces.read(piece)]
whole = list(sources.read(["someone/reviews:train"], "data.train").rows)
print(json.dumps([len(found), len(rows), rows == whole, rows[-1].where, sorted(features)]))
"""


def test_a_hub_data_set_goes_out_in_pieces_and_is_the_same_rows(tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    rows = {"text": [f"text {number}" for number in range(12_000)], "label": [number % 3 for number in range(12_000)]}
    parquet.write_table(pyarrow.table(rows), folder / "train.parquet")
    with Hub() as hub:
        hub.add_dataset("someone/reviews", folder)
        done = subprocess.run(
            [sys.executable, "-c", READ, str(tmp_path / "scratch")],
            capture_output=True,
            text=True,
            env=hub.environment(tmp_path / "home"),
            check=False,
        )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert said == [3, 12_000, True, "someone/reviews:train:row 12000", ["label", "text"]]


@pytest.mark.parametrize("wanted", [1, 2, 50])
def test_row_groups_of_a_parquet_file_are_its_rows(tmp_path: Path, wanted: int) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"n": list(range(95))}), path, row_group_size=10)
    found = pieces.of_file(path, wanted)
    counts = [pieces.count(piece) for piece in found]
    rows = [row for piece in pieces.numbered(found, counts) for row in pieces.read(piece)]
    assert rows == list(sources.read([str(path)], "data.train").rows)
    assert len(found) == min(wanted, 10) or wanted == 2


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_text("text")
    with pytest.raises(DataError, match=r"rows\.parquet: not a readable Parquet file"):
        pieces.of_file(tmp_path / "rows.parquet", 4)


def test_a_table_is_refused_where_there_is_no_spark() -> None:
    with pytest.raises(DataError, match=r"set backend\.kind: spark or databricks"):
        sources.read(["spark:main.default.reviews"], "data.train")
