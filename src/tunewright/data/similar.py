"""Texts that say nearly the same, found among very many: MinHash signatures, bands of them, then the texts themselves.

What is compared is the set of a text's runs of five characters, white space, case and punctuation aside. Two texts are
near where the Jaccard similarity of their sets is at least `THRESHOLD`. Sources: Broder, On the resemblance and
containment of documents, 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3.

In memory are 13 bytes for each text; signatures and texts are on disk.
"""

from __future__ import annotations

import re
import tempfile
import weakref
from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

THRESHOLD = 0.65
"""Jaccard similarity from which two texts are near."""
ESTIMATE_MARGIN = 0.2
"""A pair whose estimate is this far below is not looked at: over three standard deviations of 64 values' mean."""
SHINGLE = 5
"""Characters in a run."""
MOST_CHARACTERS = 4096
"""Of a longer text the beginning is compared."""
VALUES, BANDS = 64, 16
"""Values in a signature, and the bands that it is cut into: of two texts with a similarity of 0.65 (0.3) a band is
equal with a probability of 96% (12%)."""
NEIGHBOURS = 4
"""Of texts with an equal band, each is compared with so many."""
AT_ONCE = 2**16
"""Pairs whose signatures are held in memory together."""
PLAIN = re.compile(r"[\W_]+")
Array = np.ndarray[Any, Any]


class Pair(NamedTuple):
    """A text and the one that it is near to, by the numbers that `add` gave."""

    text: int
    near: int
    similarity: float


class Similar:
    """Takes texts of two kinds, those that are learnt and those that are held out, and finds what is near."""

    def __init__(self) -> None:
        from datasketch import MinHash

        self.minhash = MinHash(num_perm=VALUES, seed=1, hashfunc=int)
        self.signatures: Any = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object
        self.texts: Any = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object
        self.ends = array("q")
        self.held_out = array("b")
        for file in (self.signatures, self.texts):
            weakref.finalize(self, file.close)

    def add(self, text: str, *, held_out: bool) -> int:
        """A text's number, from 0."""
        told = text[:MOST_CHARACTERS]
        self.minhash.clear()
        self.minhash.update_batch(shingles(plain(told)).tolist())
        self.signatures.write(self.minhash.hashvalues.astype(np.uint32).tobytes())
        self.texts.write(told.encode(errors="surrogatepass"))
        self.ends.append(self.texts.tell())
        self.held_out.append(held_out)
        return len(self.ends) - 1

    def __len__(self) -> int:
        return len(self.ends)

    def pairs(self) -> Iterator[Pair]:
        """For each text the nearest learnt one (of those before it, where it is learnt itself), in the order of the
        texts; texts that nothing is near to are left out."""
        if len(self) < 2:
            return
        self.signatures.flush()
        signatures = np.memmap(self.signatures, np.uint32, "r", shape=(len(self), VALUES))
        nearest = self._nearest(signatures)
        for text in np.flatnonzero(nearest >= 0).tolist():
            near = int(nearest[text])
            similarity = jaccard(*(shingles(plain(self.text(one))) for one in (text, near)))
            if similarity >= THRESHOLD:
                yield Pair(text, near, similarity)

    def _nearest(self, signatures: Array) -> Array:
        """For each text the one that, by their signatures, is nearest of those that share a band with it; else -1."""
        nearest = np.full(len(self), -1, dtype=np.int64)
        best = np.full(len(self), THRESHOLD - ESTIMATE_MARGIN, dtype=np.float32)
        for band in range(BANDS):
            of_band = self._of_band(signatures, band)
            for start in range(0, len(of_band[0]), AT_ONCE):
                text, near = (side[start : start + AT_ONCE] for side in of_band)
                estimate = (signatures[text] == signatures[near]).mean(axis=1, dtype=np.float32)
                better = estimate > best[text]
                text, near, estimate = text[better], near[better], estimate[better]
                order = np.argsort(estimate, kind="stable")  # of several for one text the greatest is set last
                best[text[order]], nearest[text[order]] = estimate[order], near[order]
        return nearest

    def _of_band(self, signatures: Array, band: int) -> tuple[Array, Array]:
        """Texts, and for each a learnt one that has a band in common with it."""
        width = VALUES // BANDS
        count = len(self)
        key = np.zeros(count, dtype=np.uint64)
        for value in range(band * width, (band + 1) * width):
            key = key * np.uint64(0x9E3779B97F4A7C15) + signatures[:, value].astype(np.uint64)
        held_out = np.frombuffer(self.held_out, dtype=np.int8)
        order = np.lexsort((np.arange(count), held_out, key))
        key, held_out = key[order], held_out[order]
        first = np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1])))
        begin = np.repeat(first, np.diff(np.append(first, count)))
        place = np.arange(count)
        found = []
        for step in range(1, NEIGHBOURS + 1):
            before = place - step  # a learnt text and those before it
            good = (before >= begin) & (held_out == 0)
            found.append((order[place[good]], order[before[good]]))
            ahead = begin + step - 1  # a held-out text and the first learnt ones
            good = (held_out == 1) & (ahead < place)
            good[good] = held_out[ahead[good]] == 0
            found.append((order[place[good]], order[ahead[good]]))
        text, near = (np.concatenate(side) for side in zip(*found, strict=True))
        return text, near

    def text(self, number: int) -> str:
        """The beginning of a text, by its number."""
        start = self.ends[number - 1] if number else 0
        self.texts.seek(start)
        text: str = self.texts.read(self.ends[number] - start).decode(errors="surrogatepass")
        return text


def plain(text: str) -> str:
    """A text without case, punctuation and runs of white space; where there is nothing else, as it stands."""
    return PLAIN.sub(" ", text.casefold()).strip() or text.strip()


def shingles(text: str) -> Array:
    """A 32-bit number for each run of `SHINGLE` characters; a shorter text is one run."""
    codes = np.frombuffer(text.ljust(SHINGLE).encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)
    count = len(codes) - SHINGLE + 1
    hashed = np.zeros(count, dtype=np.uint32)
    for place in range(SHINGLE):
        hashed = (hashed ^ codes[place : place + count]) * np.uint32(0x01000193)
    return hashed


def jaccard(one: Array, other: Array) -> float:
    """The share of what two sets have in common."""
    one, other = np.unique(one), np.unique(other)
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)
