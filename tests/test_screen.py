"""What the screen says of many findings: how many there are, and where the rest is."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from tunewright import screen
from tunewright.data.codes import CODES
from tunewright.preflight import FAILURES, Preflight

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


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            Preflight(
                "passed", rows=("a:1", "a:2"), steps=42, seconds=6.1, loss_before=2.31, loss_after=0.04, answers=2
            ),
            "2 rows learnt by heart in 42 steps, 6.1 s: loss 2.310 -> 0.040, all 2 answers said and ended\n",
        ),
        (
            Preflight("passed", rows=("a:1",), steps=9, seconds=1, loss_before=3, loss_after=0.09, note="done here"),
            "1 row learnt by heart in 9 steps, 1.0 s: loss 3.000 -> 0.090\ndone here\n",
        ),
        (
            Preflight("failed", "explodes", "the loss went up"),
            f"preflight: explodes: the loss went up; {FAILURES['explodes'].fix.replace('`', '')}\n",
        ),
        (Preflight("skipped", seen="there is no answer"), "no preflight: there is no answer\n"),
        (None, "no preflight: mend the errors above first\n"),
    ],
)
def test_what_came_of_a_preflight_is_a_line(
    found: Preflight | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(screen, "out", Console(file=shown, width=10_000))
    screen.tried(found)
    assert shown.getvalue() == said
