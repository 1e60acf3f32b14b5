"""What the screen says of many findings: how many there are, and where the rest is."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from tunewright import screen
from tunewright.data.codes import CODES

DO = f"    do: {CODES['over_length'].fix}\n"


@pytest.mark.parametrize(
    ("count", "named", "said"),
    [
        (1, 1, f"train: 1 over_length: a.jsonl:1: too long\n{DO}"),
        (3, 3, f"train: 3 over_length, such as a.jsonl:1: too long\n{DO}    all: a.jsonl:1, :2, :3\n"),
        (900_000, 50, ", :40 and 899960 more, in data/findings.jsonl\n"),
    ],
)
def test_findings_are_counted_and_the_rest_is_pointed_to(count: int, named: int, said: str) -> None:
    kind = {"split": "train", "code": "over_length", "severity": "warning"}
    rows = [{**kind, "where": f"a.jsonl:{number}", "message": "too long"} for number in range(1, named + 1)]
    found: dict[str, Any] = {"findings": rows, "counts": [{**kind, "count": count}]}
    shown = io.StringIO()
    screen.findings(found, "data/findings.jsonl", console=Console(file=shown, width=10_000))
    assert shown.getvalue().endswith(said)
