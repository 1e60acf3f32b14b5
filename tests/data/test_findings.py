"""Findings may be as many as rows: all are on disk, in order, and few are in memory."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright.data import findings as finding_store
from tunewright.data.findings import FIRST, Finding, Findings
from tunewright.run import read_json_lines

SECTIONS = ("shape", "labels", "fit")
FINDINGS = st.builds(
    Finding,
    st.sampled_from(["empty_text", "broken_json"]),
    st.sampled_from(["error", "warning"]),
    st.text(max_size=5),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=9) | st.just("two\nlines"),
    st.just("train"),
    st.booleans(),
)


@given(added=st.lists(st.tuples(st.sampled_from(SECTIONS), FINDINGS)))
def test_findings_come_back_section_by_section_in_the_order_they_were_added(
    tmp_path_factory: pytest.TempPathFactory, added: list[tuple[str, Finding]]
) -> None:
    found = Findings(SECTIONS)
    for section, finding in added:
        found.add(section, finding)
    expected = [finding for section in SECTIONS for where, finding in added if where == section]
    assert list(found) == expected == found.first
    assert len(found) == len(expected)
    assert found.counts == Counter((one.split, one.code, one.severity) for one in expected)
    path = tmp_path_factory.getbasetemp() / "findings.jsonl"
    found.write(path)
    assert [Finding(**row) for row in read_json_lines(path)] == expected
    assert list(found) == expected, "writing takes nothing away"


def test_of_many_the_first_of_each_kind_are_kept_and_all_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finding_store, "IN_MEMORY_BYTES", 1000)
    found = Findings(SECTIONS)
    for number in range(FIRST + 30):
        for section in ("fit", "shape"):
            found.add(section, Finding("empty_text", "warning", f"{section}:{number}", "empty", "train", True))
    found.add("labels", Finding("unknown_label", "error", "a:1", "unknown", "train", True))
    assert [one.where for one in found.first] == [*(f"shape:{number}" for number in range(FIRST)), "a:1"]
    said = found.to_dict()
    assert said["findings"] == [asdict(one) for one in found.first]
    assert said["counts"] == [
        {"split": "train", "code": "empty_text", "severity": "warning", "count": 2 * (FIRST + 30)},
        {"split": "train", "code": "unknown_label", "severity": "error", "count": 1},
    ]
    found.write(tmp_path / "findings.jsonl")
    rows = read_json_lines(tmp_path / "findings.jsonl")
    assert len(rows) == 2 * (FIRST + 30) + 1
    assert rows[FIRST + 29]["where"] == f"shape:{FIRST + 29}"


def test_no_finding_is_an_empty_file(tmp_path: Path) -> None:
    found = Findings(SECTIONS)
    found.write(tmp_path / "findings.jsonl")
    assert (tmp_path / "findings.jsonl").read_bytes() == b""
    assert found.to_dict() == {"findings": [], "counts": []}


def test_the_disk_is_given_back_with_the_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding_store, "IN_MEMORY_BYTES", 1)
    found = Findings(SECTIONS)
    found.add("fit", Finding("empty_text", "warning", "a:1", "empty", "train"))
    lines = found.sections["fit"].lines
    assert not lines.closed
    del found
    gc.collect()
    assert lines.closed
