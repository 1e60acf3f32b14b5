"""Token ids on disk: every sequence that a run trains on, rendered once, and mapped into memory by whoever needs it.

For each split there are three NumPy files, which `numpy.load(..., mmap_mode="r")` opens too:

    train.tokens.npy     uint32: the ids of all sequences, end to end
    train.mask.npy       uint8: for each id, 1 where there is a loss on it
    train.sequences.npy  for each sequence: `end` (the place behind its last id), `targets` (ids that there is a loss on
                         and something before), `row` (of the split's jsonl, from 0) and `byte` (where that row begins)

They are worth something only beside the manifest of the preparation, which is written last and says by which tokenizer
and template the ids were made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import operator
import shutil
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from tunewright.chat import Example, Rendering
from tunewright.errors import RunError
from tunewright.run import Run, replacing

IDS = np.dtype(np.uint32)
MASK = np.dtype(np.uint8)
SEQUENCE = np.dtype([("end", np.int64), ("targets", np.int64), ("row", np.int64), ("byte", np.int64)])
Array = np.ndarray[Any, Any]


class TokenStore(Sequence[Rendering]):
    """The sequences of a split, in their order. Holds a few bytes for each; the ids stay on disk until asked for."""

    def __init__(self, tokens: Path, mask: Path, sequences: Path, rows: Path) -> None:
        self.files = (tokens, mask, sequences, rows)
        self.ids, self.mask = _mapped(tokens, IDS), _mapped(mask, MASK)
        self.sequences = _mapped(sequences, SEQUENCE)
        self.ends = np.array(self.sequences["end"])
        self.lengths = np.diff(self.ends, prepend=0)
        """Tokens of each sequence."""
        stored = int(self.ends[-1]) if len(self.ends) else 0
        if not len(self.ids) == len(self.mask) == stored:
            raise _damaged(tokens, f"it holds {len(self.ids)} tokens, and {sequences.name} speaks of {stored}")

    @classmethod
    def open(cls, run: Run, split: str) -> TokenStore:
        """What the finished preparation of a run stored.

        Raises:
            RunError: the preparation is not done, or its files are absent or damaged.
        """
        account = run.manifest("prepare")["splits"].get(split)
        if account is None:
            raise RunError(f"{run.path}: the recipe names no data.{split}")
        table = run.tokens_file(split, "sequences")
        store = cls(run.tokens_file(split, "tokens"), run.tokens_file(split, "mask"), table, run.data_file(split))
        if len(store) != account["sequences"]:
            raise _damaged(table, f"it holds {len(store)} sequences, and checks.json {account['sequences']}")
        return store

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> Rendering: ...

    @overload
    def __getitem__(self, index: slice) -> list[Rendering]: ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        place = range(len(self))[operator.index(index)]
        start, end = int(self.ends[place - 1]) if place else 0, int(self.ends[place])
        return Rendering(self.ids[start:end].tolist(), self.mask[start:end].view(bool).tolist())

    @property
    def targets(self) -> Array:
        """Targets of each sequence: tokens that there is a loss on, but for the first, which nothing predicts."""
        return np.array(self.sequences["targets"])

    def source(self, index: int) -> str:
        """Where a person finds the row that a sequence comes from (file:line)."""
        return self.example(index).source

    def example(self, index: int) -> Example:
        """The row that a sequence comes from."""
        with self.files[3].open("rb") as file:
            file.seek(int(self.sequences["byte"][index]))
            return Example.from_dict(json.loads(file.readline()))

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path, ...]]:
        """Another process maps the same files; it is not sent what they hold."""
        return TokenStore, self.files


class TokenWriter:
    """Writes a split's sequences as they come. `writing` makes one."""

    def __init__(self, tokens: BinaryIO, mask: BinaryIO, sequences: BinaryIO, *, headers: bool = True) -> None:
        """Without headers it writes a part, which `join` puts behind others."""
        self.files: list[tuple[BinaryIO, np.dtype[Any]]] = [(tokens, IDS), (mask, MASK), (sequences, SEQUENCE)]
        self.end = self.count = 0
        for file, dtype in self.files if headers else ():
            _write_header(file, dtype, 0)

    def add(self, sequences: Sequence[Rendering], *, row: int, byte: int) -> None:
        """The sequences of one row: of the row's number and the byte that it begins at in the split's jsonl."""
        (tokens, _), (mask, _), (table, _) = self.files
        for one in sequences:
            tokens.write(array("I", one.ids).tobytes())
            mask.write(bytes(one.mask))
            self.end += len(one.ids)
            table.write(array("q", (self.end, sum(one.mask[1:]), row, byte)).tobytes())
        self.count += len(sequences)

    def finish(self) -> None:
        for (file, dtype), count in zip(self.files, (self.end, self.end, self.count), strict=True):
            file.seek(0)
            _write_header(file, dtype, count)


@contextlib.contextmanager
def writing(run: Run, split: str) -> Iterator[TokenWriter]:
    """A store to fill; its files take the places of older ones at the end.

    Raises:
        DiskFullError: no space left.
        RunError: the folder cannot be written.
    """
    with (
        replacing(run.tokens_file(split, "tokens")) as tokens,
        replacing(run.tokens_file(split, "mask")) as mask,
        replacing(run.tokens_file(split, "sequences")) as sequences,
    ):
        writer = TokenWriter(tokens, mask, sequences)
        yield writer
        writer.finish()


@dataclass(frozen=True)
class Part:
    """Some of a split's rows, on disk without headers, each file's numbers counted from the part's own beginning."""

    rows: Path
    tokens: Path
    mask: Path
    sequences: Path
    num_rows: int
    num_tokens: int
    num_sequences: int
    num_bytes: int
    """Of `rows`."""


def join(run: Run, split: str, parts: Sequence[Part]) -> None:
    """The files of a split from its parts, one behind another. What is written is written from front to end, since some
    mounts of object stores allow nothing else; in memory is one part's table of sequences.

    Raises:
        DiskFullError: no space left.
        RunError: a part is not what its task said, or the folder cannot be written.
    """
    num_tokens, num_sequences = (sum(getattr(part, name) for part in parts) for name in ("num_tokens", "num_sequences"))
    for part in parts:
        sizes = (part.num_bytes, part.num_tokens * 4, part.num_tokens, part.num_sequences * SEQUENCE.itemsize)
        for path, size in zip((part.rows, part.tokens, part.mask, part.sequences), sizes, strict=True):
            if not path.is_file() or path.stat().st_size != size:
                raise RunError(
                    f"{path}: not the {size} bytes that its task wrote; is it on storage that all see alike?"
                )
    with replacing(run.data_file(split)) as file:
        _append(file, [part.rows for part in parts])
    for name, dtype, paths in (
        ("tokens", IDS, [part.tokens for part in parts]),
        ("mask", MASK, [part.mask for part in parts]),
    ):
        with replacing(run.tokens_file(split, "tokens" if name == "tokens" else "mask")) as file:
            _write_header(file, dtype, num_tokens)
            _append(file, paths)
    end = row = byte = 0
    with replacing(run.tokens_file(split, "sequences")) as file:
        _write_header(file, SEQUENCE, num_sequences)
        for part in parts:
            table = np.fromfile(part.sequences, dtype=SEQUENCE)
            for key, before in (("end", end), ("row", row), ("byte", byte)):
                table[key] += before
            file.write(table.tobytes())
            end, row, byte = end + part.num_tokens, row + part.num_rows, byte + part.num_bytes


def _append(file: BinaryIO, paths: Sequence[Path]) -> None:
    for path in paths:
        with path.open("rb") as part:
            shutil.copyfileobj(part, file, 2**20)


def made_by(tokenizer: Any) -> dict[str, str]:
    """sha256 of the tokenizer and of its chat template: ids of another tokenizer or template are not to be used."""
    rust = getattr(tokenizer, "backend_tokenizer", None)
    if rust is None:
        parts = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    elif rust.truncation is None and rust.padding is None:
        parts = rust.to_str()
    else:  # each call sets these two; none of ours cuts or pads
        parts = _uncut(rust)
    whole = f"{type(tokenizer).__name__} {tokenizer.eos_token_id} {parts}"
    return {
        "tokenizer_sha256": hashlib.sha256(whole.encode()).hexdigest(),
        "template_sha256": hashlib.sha256(tokenizer.chat_template.encode()).hexdigest(),
    }


def _uncut(rust: Any) -> str:
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(rust.to_str())
    copy.no_truncation()
    copy.no_padding()
    return str(copy.to_str())


def _write_header(file: BinaryIO, dtype: np.dtype[Any], count: int) -> None:
    """The beginning of a .npy file. NumPy leaves room in it, so it is as long for one count as for another."""
    shape = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, shape)


def _mapped(path: Path, dtype: np.dtype[Any]) -> Array:
    try:
        found: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise RunError(f"{path}: no such file; prepare the data again") from None
    except (ValueError, EOFError) as error:
        raise _damaged(path, str(error)) from None
    if found.dtype != dtype or found.ndim != 1:
        raise _damaged(path, f"it holds {found.dtype}, not {dtype}")
    return found


def _damaged(path: Path, why: str) -> RunError:
    return RunError(f"{path}: damaged ({why}); prepare the data again: `tunewright run` with --fresh starts a new run")
