"""The account of a split's rows: how many there are of what length and class, what they say in one fingerprint, and
which test rows are training rows too. All of it in a few bytes a row, and adding up over parts of a split.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from tunewright import chat
from tunewright.chat import Example
from tunewright.data.findings import Finding

COMPARED = ("train", "test")
"""Splits that are looked through for the same texts."""


class Kept:
    """Counts the rows that are used (lengths, classes, the fingerprint of what they say) and those that are not. What
    parts of a split count adds up to what the whole does."""

    def __init__(self, max_length: int | None) -> None:
        """`max_length` is where texts are cut in pieces; None where each row is one sequence."""
        self.max_length = max_length
        self.rejected = self.truncated = self.tokens_cut = self.used = 0
        self.totals: Counter[int] = Counter()
        self.answers: Counter[int] = Counter()
        """Length in tokens (all, and those that are learnt) -> rows of it."""
        self.labels: Counter[str | None] = Counter()
        self.left_out: Counter[str] = Counter()
        """Rows that the recipe leaves out, by the sha256 of what they say."""
        self.digest = hashlib.sha256()
        self.digests: bytearray | None = None
        """Each row's own, where a part keeps them for the whole."""

    def add(self, example: Example, rendering: chat.Rendering) -> None:
        self.used += 1
        self.totals[len(rendering.ids)] += 1
        self.answers[rendering.num_targets] += 1
        self.labels[example.label] += 1
        said = {key: value for key, value in example.to_dict().items() if key not in ("id", "source")}
        own = hashlib.sha256(json.dumps(said, sort_keys=True, ensure_ascii=False).encode()).digest()
        self.digest.update(own)
        if self.digests is not None:
            self.digests += own

    def counts(self) -> dict[str, Any]:
        """What a part counted, for `merge`."""
        names = ("rejected", "truncated", "tokens_cut", "used", "totals", "answers", "labels", "left_out")
        return {name: getattr(self, name) for name in names}

    def merge(self, counts: dict[str, Any]) -> None:
        """Add what a part counted (not its digests, which the whole is fed in order)."""
        for name, value in counts.items():
            if isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
            else:
                getattr(self, name).update(value)

    def account(self) -> dict[str, Any]:
        lengths = np.array(sorted(self.totals), dtype=np.int64)
        rows = np.array([self.totals[length] for length in lengths.tolist()], dtype=np.int64)
        pieces_of_all = (
            self.used if self.max_length is None else int((num_pieces(lengths, self.max_length) * rows).sum())
        )
        return {
            "rejected": self.rejected,
            "truncated": self.truncated,
            "tokens_cut": self.tokens_cut,
            "used": self.used,
            "sequences": pieces_of_all,
            "tokens": {
                "total": _distribution(self.totals),
                "answer": _distribution(self.answers),
                "sum": int((lengths * rows).sum()),
            },
            "sha256": self.digest.hexdigest(),
        }


class Seen:
    """Finds test rows whose prompt stands in the training rows too: they make the test look better than it is.

    Of each row a hash of 8 bytes is kept, and its place: two different rows among a million have the same hash with a
    probability of 3e-8.
    """

    def __init__(self) -> None:
        self.hashes = {split: array("Q") for split in COMPARED}
        self.places = {split: Places() for split in COMPARED}

    def add(self, split: str, example: Example) -> None:
        if split not in self.hashes:
            return
        said = example.text if example.text is not None else "\0".join(one.content for one in example.prompt)
        self.hashes[split].append(hashed(said))
        self.places[split].append(example.source)

    def findings(self) -> Iterable[Finding]:
        trained, first = np.unique(np.array(self.hashes["train"], dtype=np.uint64), return_index=True)
        tested = np.array(self.hashes["test"], dtype=np.uint64)
        at = np.minimum(np.searchsorted(trained, tested), max(0, len(trained) - 1))
        for row in np.flatnonzero(trained[at] == tested) if len(trained) else ():
            yield seen_in_training(self.places["test"][int(row)], self.places["train"][int(first[at[row]])])


def hashed(text: str) -> int:
    """A hash of 8 bytes of a text, its case and white space aside."""
    plain = " ".join(text.casefold().split()).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(plain, digest_size=8).digest(), "little")


def seen_in_training(tested: str, trained: str) -> Finding:
    return Finding("seen_in_training", "warning", tested, f"the same text is a training row: {trained}", "test")


class Places:
    """Where rows were found: what stands before the number (the file) once, and 12 bytes for each row."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.known: dict[str, int] = {}
        self.name, self.number = array("i"), array("q")

    def append(self, where: str) -> None:
        name = where.rstrip("0123456789")
        number = where[len(name) :]
        if not number or str(int(number)) != number or len(number) > 18:
            name, number = where, "-1"
        if name not in self.known:
            self.known[name] = len(self.names)
            self.names.append(name)
        self.name.append(self.known[name])
        self.number.append(int(number))

    def __getitem__(self, row: int) -> str:
        name, number = self.names[self.name[row]], self.number[row]
        return f"{name}{number}" if number >= 0 else name


def _distribution(counts: Counter[int]) -> dict[str, float]:
    """Of so many values of each size, as NumPy has them of the values one by one."""
    if not counts:
        return {}
    values = np.array(sorted(counts), dtype=np.int64)
    ends = np.cumsum([counts[value] for value in values.tolist()])
    whole = int(ends[-1])

    def at(share: float) -> float:
        """The value at a share of the way, in between two by their distances (NumPy's `linear`)."""
        place = share * (whole - 1)
        low = int(place)
        one, other = (float(values[np.searchsorted(ends, one, side="right")]) for one in (low, min(low + 1, whole - 1)))
        part = place - low
        return one + (other - one) * part if part < 0.5 else other - (other - one) * (1 - part)

    return {
        "min": int(values[0]),
        "median": at(0.5),
        "mean": round(sum(value * count for value, count in counts.items()) / whole, 2),
        "p95": at(0.95),
        "max": int(values[-1]),
    }


def num_pieces(lengths: Any, max_length: int) -> Any:
    """How many pieces there are of a text, or of each of an array of them."""
    return np.maximum(1, -((1 - lengths) // (max_length - 1)))
