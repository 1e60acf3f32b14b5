"""Findings: what a person should know about rows, kept on disk, since there may be as many as there are rows.

In memory are only how often each kind occurs and the first of each kind.
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tunewright.run import replacing

FIRST = 50
"""Findings of one kind that are named in data/checks.json; data/findings.jsonl has all of them."""
IN_MEMORY_BYTES = 2**18


@dataclass(frozen=True)
class Finding:
    """Something about a row (or a whole split) that a person should know."""

    code: str
    severity: str
    """error: stops the run unless data.bad_rows is skip; warning: the row was left out or changed; info."""
    where: str
    message: str
    split: str
    rejected: bool = False
    text: str = ""
    """The beginning of what it is about, where that helps a person; never of a secret or of personal data."""

    @property
    def kind(self) -> tuple[str, str, str]:
        return self.split, self.code, self.severity


@dataclass
class _Section:
    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    first: list[Finding] = field(default_factory=list)
    lines: Any = None


class Findings:
    """Findings in sections, which come one after another in the order that they are named in, however they are added.

    Args:
        sections: their names.
    """

    def __init__(self, sections: Sequence[Hashable]) -> None:
        self.sections = {name: _Section() for name in sections}

    def add(self, section: Hashable, finding: Finding) -> None:
        here = self.sections[section]
        if here.lines is None:
            here.lines = tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES)  # noqa: SIM115 - closed with this object
            weakref.finalize(self, here.lines.close)
        here.lines.write((json.dumps(asdict(finding)) + "\n").encode())
        here.counts[finding.kind] += 1
        if here.counts[finding.kind] <= FIRST:
            here.first.append(finding)

    def part(self, section: Hashable) -> tuple[bytes, Counter[tuple[str, str, str]], list[Finding]]:
        """A section as a part of a split has it, for `absorb`: its lines, how many of each kind, the first of each."""
        here = self.sections[section]
        lines = b""
        if here.lines is not None:
            here.lines.seek(0)
            lines = here.lines.read()
        return lines, here.counts, here.first

    def absorb(
        self, section: Hashable, lines: Path | bytes, counts: Counter[tuple[str, str, str]], first: Sequence[Finding]
    ) -> None:
        """Add the findings of a part, behind those that are there; `lines` may be the file that holds them."""
        here = self.sections[section]
        if not counts:
            return
        if here.lines is None:
            here.lines = tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES)  # noqa: SIM115 - closed with this object
            weakref.finalize(self, here.lines.close)
        with io.BytesIO(lines) if isinstance(lines, bytes) else lines.open("rb") as given:
            shutil.copyfileobj(given, here.lines)
        for finding in first:
            there = sum(one.kind == finding.kind for one in here.first)
            if there < FIRST:
                here.first.append(finding)
        here.counts.update(counts)

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __iter__(self) -> Iterator[Finding]:
        """All of them, read from disk."""
        for section in self.sections.values():
            if section.lines is not None:
                section.lines.seek(0)
                for line in section.lines:
                    yield Finding(**json.loads(line))

    @property
    def counts(self) -> Counter[tuple[str, str, str]]:
        """How many there are of each kind (split, code, severity)."""
        return sum((section.counts for section in self.sections.values()), Counter())

    @property
    def first(self) -> list[Finding]:
        """The first of each kind, in their order."""
        seen: Counter[tuple[str, str, str]] = Counter()
        found = []
        for section in self.sections.values():
            for finding in section.first:
                seen[finding.kind] += 1
                if seen[finding.kind] <= FIRST:
                    found.append(finding)
        return found

    def to_dict(self) -> dict[str, Any]:
        """As checks.json has them: `findings`, the first of each kind, and `counts`, how many there are of each."""
        return {
            "findings": [asdict(finding) for finding in self.first],
            "counts": [
                {"split": split, "code": code, "severity": severity, "count": count}
                for (split, code, severity), count in self.counts.items()
            ],
        }

    def write(self, path: Path) -> None:
        """All of them as JSON lines."""
        with replacing(path) as file:
            for section in self.sections.values():
                if section.lines is not None:
                    section.lines.seek(0)
                    shutil.copyfileobj(section.lines, file)
