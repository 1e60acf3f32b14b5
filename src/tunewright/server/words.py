"""Words and phrases in texts: what blocklists and the filter that ships are made of.

What is covered: text is compared without regard to case, to width and form of letters (NFKC), to invisible
characters, to punctuation between words, and to Cyrillic and Greek letters that look like Latin ones.
What is not covered: meaning. A phrase that is spelled otherwise (k1ll, k i l l), written in another language or
described in other words is not found, and a harmless sentence around a phrase does not make it harmless.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

T = TypeVar("T")

ANY, GAP = "*", 3
"""`*` in a phrase, and how many words may stand there."""

WORD = re.compile(r"\w+")
APOSTROPHES = ("'", "\u2018", "\u2019", "\u02bc")
UNSPACED = "\u0e00"
"""From here on (Thai, Chinese, Japanese, Korean) words are not reliably parted by spaces."""
LOOKALIKES = str.maketrans(
    "\u0430\u0435\u043e\u0440\u0441\u0445\u0443\u0456\u0458\u0455\u0501\u04bb\u03bf\u03b1\u03b5\u03b9\u03bd\u03c1\u03c4\u03c5\u03ba",
    "aeopcxyijsdhoaeivptuk",
)  # fmt: skip


def plain(text: str) -> str:
    """Text without what nobody sees: one form for each letter, no invisible characters. Case stays."""
    if text.isascii():
        return text
    text = unicodedata.normalize("NFKC", text)
    return "".join(letter for letter in text if unicodedata.category(letter) != "Cf")


def folded(text: str) -> str:
    """`plain`, and without case."""
    return plain(text).casefold()


def words(text: str) -> list[str]:
    """The words of a text that was folded; don't is one word."""
    for mark in APOSTROPHES[: 1 if text.isascii() else None]:
        text = text.replace(mark, "")
    return WORD.findall(text)


class Phrases(Generic[T]):
    """Phrases and what they mean, found in a text in one pass over its words.

    Args:
        phrases: each as its words (see `read`), and what it means.
    """

    def __init__(self, phrases: Iterable[tuple[Sequence[frozenset[str] | None], T]]) -> None:
        self._by_first: dict[str, list[tuple[Sequence[frozenset[str] | None], T]]] = {}
        for steps, meaning in phrases:
            for first in steps[0] or ():
                self._by_first.setdefault(first, []).append((steps, meaning))

    def find(self, said: Sequence[str]) -> Iterator[T]:
        """What the phrases in a text mean, as often as they stand there.

        Args:
            said: the text's words.
        """
        if self._by_first.keys().isdisjoint(said):  # nearly every text
            return
        for at, word in enumerate(said):
            for steps, meaning in self._by_first.get(word, ()):
                if _follows(said, at, steps, 0):
                    yield meaning


def read(phrase: str, groups: frozenset[str] = frozenset()) -> list[frozenset[str] | None]:
    """A phrase's words: for each place what may stand there, None for up to three words of any kind."""
    steps: list[frozenset[str] | None] = []
    for part in phrase.split():
        steps.append(None if part == ANY else groups if part == "<groups>" else frozenset(part.split("|")))
    return steps


def literal(phrase: str) -> list[frozenset[str] | None] | None:
    """The same for words of a user's own, in which nothing has a meaning.

    Gives None where they are no words in a row: then the text is searched for them as they are.
    """
    text = folded(phrase).strip()
    if not re.fullmatch(r"[\w\s'\u2019-]+", text) or any(letter >= UNSPACED for letter in text):
        return None
    return [frozenset({word}) for word in words(text)] or None


@cache
def shipped() -> dict[str, Any]:
    """The phrases that ship, ready to be found: `categories` with (category, severity), `jailbreak` with True."""
    said = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text("utf-8"))
    groups = frozenset(itertools.chain.from_iterable(one.split("|") for one in said["groups"]))
    categories = [
        (read(phrase, groups), (category, severity))
        for category, severities in said["categories"].items()
        for severity, phrases in severities.items()
        for phrase in phrases
    ]
    return {
        "categories": Phrases(categories),
        "jailbreak": Phrases([(read(phrase), True) for phrase in said["jailbreak"]]),
    }


def shipped_words(text: str) -> list[str]:
    """The words of a text as the shipped phrases are compared with them: look-alike letters are Latin."""
    text = folded(text)
    return words(text if text.isascii() else text.translate(LOOKALIKES))


def _follows(said: Sequence[str], at: int, steps: Sequence[frozenset[str] | None], step: int) -> bool:
    if step == len(steps):
        return True
    wanted = steps[step]
    if wanted is None:
        return any(_follows(said, at + skipped, steps, step + 1) for skipped in range(GAP + 1))
    return at < len(said) and said[at] in wanted and _follows(said, at + 1, steps, step + 1)
