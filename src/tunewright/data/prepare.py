"""From a recipe's data section to the rows that a run uses, with an account of every row that it does not.

The order of things: read, hold out a test set where none is named, shuffle and select, shape, check, clip.
`write` does it all and leaves the result in the run folder, data/checks.json last; `assemble` without a run does the
same and leaves nothing behind but the account. Both go through the rows one by one: what is kept in memory for each is
a few bytes (its place, and a hash of what it says).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from tunewright import chat
from tunewright.chat import Clipped, Equipment, Example
from tunewright.data import shapes, sources, tokens
from tunewright.data.account import Kept, Seen
from tunewright.data.findings import Finding, Findings
from tunewright.data.sources import Broken, Row, Rows, Table
from tunewright.data.tokens import TokenStore, TokenWriter
from tunewright.errors import DataError, RunError
from tunewright.models import ModelRef
from tunewright.recipe import Recipe
from tunewright.run import Run, read_json_lines, replacing, write_json

SPLITS = ("train", "test", "validation")
STEPS = ("shape", "labels", "fit")
"""What is looked at in a split's rows. The findings of one step stand together, before those of the next."""
MIN_PRETRAINING_TOKENS = 2
BLOCK_ROWS, BLOCK_CHARACTERS = 256, 2**20
"""Rows that are tokenised together: at most so many, and about so many characters."""
MAX_THREADS = 16
OWN_THREADS = "TOKENIZERS_PARALLELISM"
PROGRESS_ROWS = 200
One = TypeVar("One")
Other = TypeVar("Other")
MIN_PROMPT_TOKENS = 8
"""What a drawn answer must leave of `train.max_length`."""


@dataclass
class Assembled:
    """The account of what a run uses."""

    findings: Findings
    labels: list[str] | None = None
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    max_length: int = 0

    def checks(self) -> dict[str, Any]:
        return {
            "format": 1,
            "splits": self.splits,
            "labels": self.labels,
            "max_length": self.max_length,
            **self.findings.to_dict(),
        }


def write(
    run: Run,
    recipe: Recipe,
    ref: ModelRef,
    tokenizer: Any,
    equipment: Equipment,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Assembled:
    """Prepare a run's data: the rows (data/train.jsonl and the rest), their tokens, the findings; data/checks.json is
    written last.

    Raises:
        DataError: as `assemble`.
        DiskFullError: no space left.
    """
    run.manifest_file("prepare").unlink(missing_ok=True)  # an old one would vouch for files that are being replaced
    assembled = assemble(recipe, ref, tokenizer, equipment, run=run, progress=progress)
    assembled.findings.write(run.findings_file)
    rendering = equipment.to_dict() | tokens.made_by(tokenizer)
    write_json(run.manifest_file("prepare"), assembled.checks() | {"rendering": rendering})
    return assembled


def assemble(
    recipe: Recipe,
    ref: ModelRef,
    tokenizer: Any,
    equipment: Equipment,
    *,
    run: Run | None = None,
    look: Callable[[str, Example, chat.Rendering], None] | None = None,
    lenient: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Assembled:
    """Read, split, select, check and clip the data; where there is a run, write its rows and tokens.

    Args:
        look: is shown every row that is used, with its split.
        lenient: go on behind a broken row; `stops` says afterwards what would have stopped here.

    Raises:
        DataError: nothing can be read, a row is broken (unless `data.bad_rows: skip`), a split ends up empty, the test
            set holds an unknown label, or all training rows have one class.
    """
    max_length = room(recipe, ref)
    tables, notes = _tables(recipe)
    result = Assembled(sections(tables), max_length=max_length)
    total = sum(len(table.rows) for table in tables.values())
    done = 0
    limits: dict[str, int] = {}
    seen = Seen()
    for split, table in tables.items():
        shape = shapes.recognise(recipe, (row for row in table.rows if isinstance(row, Row)), table.classes)
        if split == "train" and recipe.task == "classification":
            result.labels = _labels(recipe, table, shape)
            limits = label_limits(result.labels, ref, tokenizer, equipment, max_length)
        if split == "test":
            shapes.check_slices(recipe, table.rows)
        rules = Rules(
            recipe,
            split,
            result.labels,
            limits,
            max_length,
            unwanted(recipe.data.without if split == "train" else None),
        )
        kept = Kept(max_length if recipe.task == "pretraining" else None)
        with _writer(run, split, max_length) as put:
            used = sift(rules, shape, table.rows, tokenizer, result.findings, kept)
            with contextlib.closing(used) as fit:
                for number, fitted in enumerate(fit, start=1):
                    if fitted is not None:
                        seen.add(split, fitted[0])
                        put(*fitted)
                        if look is not None:
                            look(split, *fitted)
                    if progress and number % PROGRESS_ROWS == 0:
                        progress(done + number, total)
        done += len(table.rows)
        close_split(result, rules, table, kept, tokenizer, equipment, lenient=lenient)
    for note in notes:
        result.findings.add("notes", note)
    for finding in seen.findings():
        result.findings.add("seen", finding)
    return result


def room(recipe: Recipe, ref: ModelRef) -> int:
    """Tokens that a row may have, the drawn answer included.

    Raises:
        DataError: the answer leaves too few for a prompt.
    """
    max_length = ref.max_length(recipe.train.max_length)
    if max_length - recipe.answer_room < MIN_PROMPT_TOKENS:
        raise DataError(
            f"train.grpo.max_completion_length is {recipe.answer_room} of the {max_length} tokens of train.max_length, "
            f"which leaves fewer than {MIN_PROMPT_TOKENS} for a prompt; set it lower"
        )
    return max_length


def sections(splits: Iterable[str]) -> Findings:
    """No findings yet, and the order that they will stand in."""
    return Findings([*((split, step) for split in splits for step in STEPS), "notes", "seen"])


@dataclass(frozen=True)
class Rules:
    """What decides over the rows of one split."""

    recipe: Recipe
    split: str
    labels: list[str] | None
    limits: dict[str, int]
    """For each label, how many tokens its rows may have."""
    max_length: int
    unwanted: frozenset[str] = frozenset()
    """Rows that the recipe leaves out, by the sha256 of what they say."""


def unwanted(source: str | None) -> frozenset[str]:
    """The rows that a list such as `data.without` names: the sha256 of what each says.

    Raises:
        DataError: there is no such list, or a line of it names no row.
    """
    if source is None:
        return frozenset()
    path = Path(source)
    if not path.is_file():
        raise DataError(f"data.without: no file {path}; name a list such as evaluate/suspects.jsonl of a run")
    found = set()
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
        try:
            digest = json.loads(line)["sha256"] if line.strip() else None
        except (ValueError, KeyError, TypeError):
            digest = 0
        if isinstance(digest, str):
            found.add(digest)
        elif digest is not None:
            raise DataError(f"{path}:{number}: data.without: no sha256 of a row; take lines that evaluation wrote")
    return frozenset(found)


def sift(
    rules: Rules,
    shape: shapes.Shape | None,
    rows: Iterable[Row | Broken],
    tokenizer: Any,
    findings: Findings,
    kept: Kept,
    *,
    threads: int | None = None,
) -> Generator[tuple[Example, chat.Rendering] | None, None, None]:
    """Rows of a split, or of a part of it, into examples and their renderings, in their order; None for each that turns
    out to be unusable once it is rendered. What is left out is noted in `findings`, what is used is counted in `kept`.
    """
    judge = _Judge(rules, findings, kept)
    known = judge.known(judge.shaped(shape, rows))
    with contextlib.closing(_clipped(tokenizer, known, judge.limit, threads)) as fit:
        for limit, clipped in fit:
            fitted = judge.fitted(limit, clipped)
            if fitted is not None:
                kept.add(*fitted)
            yield fitted


def stops(recipe: Recipe, result: Assembled) -> list[DataError]:
    """For each split with a row that stops a run, the error that it stops with."""
    return [error for split in result.splits if (error := _broken_row(recipe, split, result.findings)) is not None]


def close_split(
    result: Assembled,
    rules: Rules,
    table: Table,
    kept: Kept,
    tokenizer: Any,
    equipment: Equipment,
    *,
    lenient: bool = False,
) -> None:
    """Enter a split's account, once all its rows are through.

    Raises:
        DataError: a row is broken, none is usable, or there is one class alone.
    """
    split = rules.split
    if rules.unwanted:
        there = len(kept.left_out)
        if there < len(rules.unwanted):
            said = f"data.without names {len(rules.unwanted)} rows, and {there} of them are here"
            where = str(rules.recipe.data.without)
            result.findings.add((split, "fit"), Finding("not_found", "warning", where, said, split))
    account = {"source": [sources.displayed(name) for name in table.names], "read": len(table.rows)}
    result.splits[split] = account | kept.account()
    broken = _broken_row(rules.recipe, split, result.findings)
    if broken is not None and not lenient:
        raise broken
    _stop_where_empty(split, result)
    if result.labels is not None:
        if split == "train":
            result.labels = _learnable(rules.recipe, table, result.labels, kept.labels)
        result.splits[split]["labels"] = {label: kept.labels[label] for label in result.labels}
        result.splits[split]["label_nodes"] = _label_nodes(result.labels, tokenizer, equipment)


def unread(recipe: Recipe, ref: ModelRef) -> Assembled:
    """An account of data that cannot be read here: rows of the greatest length, as many as one step takes."""
    max_length = room(recipe, ref)
    step = recipe.train.batch_size * recipe.train.gradient_accumulation_steps
    length = {"min": 0, "median": float(max_length), "mean": float(max_length), "p95": max_length, "max": max_length}
    splits = [split for split in SPLITS if getattr(recipe.data, split) is not None]
    if "test" not in splits and recipe.data.split.test:
        splits.insert(1, "test")
    facts: dict[str, Any] = {
        "read": 0,
        "rejected": 0,
        "truncated": 0,
        "tokens_cut": 0,
        "used": 0,
        "sequences": step,
        "unread": True,
    }
    facts |= {"tokens": {"total": length, "answer": length, "sum": 0}, "sha256": "", "labels": {}}
    result = Assembled(sections(splits), max_length=max_length)
    result.splits = {split: {"source": list(getattr(recipe.data, split) or ())} | facts for split in splits}
    return result


def render(tokenizer: Any, example: Example) -> chat.Rendering:
    """An example's ids and loss mask, whatever its task."""
    if example.text is not None:
        return chat.render_text(tokenizer, example.text, ends=example.ends)
    return chat.render(tokenizer, example.messages, example.tools)


def difference(tokenizer: Any, example: Example, then: Sequence[chat.Rendering], max_length: int) -> str | None:
    """Where an example that was prepared comes out otherwise now than it was stored; None where it is the same."""
    try:
        if example.text is not None:
            made = pieces(render(tokenizer, example), max_length)
        else:
            made = [chat.clip(tokenizer, example, sys.maxsize).rendering]  # what was too long was cut then
    except DataError as error:
        return str(error)
    if made == list(then):
        return None
    if example.text is None and example.rejected is None and example.item is None:
        ends = chat.message_ends(tokenizer, example.messages, example.tools)
        row = {"messages": [message.to_dict() for message in example.messages], "ends": ends}
        return chat.first_difference(tokenizer, row, made[0].ids, then[0].ids) or "there is a loss on other tokens"
    ids, before = ([token for one in each for token in one.ids] for each in (made, then))
    at = next((place for place, pair in enumerate(zip(ids, before, strict=False)) if pair[0] != pair[1]), None)
    return f"token {at + 1} is {ids[at]} here and was {before[at]}" if at is not None else "it is longer or shorter"


def pieces(whole: chat.Rendering, max_length: int) -> list[chat.Rendering]:
    """A long text in pieces of at most `max_length` tokens. Each begins with the last token of the one before, which
    is its context and not its target, so every token but the first is a target exactly once."""
    cut = []
    start = 0
    while start == 0 or start < len(whole.ids) - 1:
        ids = whole.ids[start : start + max_length]
        mask = whole.mask[start : start + max_length]
        cut.append(chat.Rendering(ids, [False, *mask[1:]]))
        start += max_length - 1
    return cut


def examples(run: Run, split: str) -> list[Example]:
    """The prepared rows of a split."""
    return [Example.from_dict(row) for row in read_json_lines(run.data_file(split))]


def some_examples(run: Run, split: str, most: int, seed: int) -> list[Example]:
    """The prepared rows of a split, or of more than `most` so many drawn at random, in their order."""
    used = run.manifest("prepare")["splits"][split]["used"]
    if used <= most:
        return examples(run, split)
    chosen = np.zeros(used, dtype=bool)
    chosen[np.random.default_rng(seed).permutation(used)[:most]] = True
    with run.data_file(split).open(encoding="utf-8") as file:
        return [
            Example.from_dict(json.loads(line)) for line, wanted in zip(file, chosen.tolist(), strict=False) if wanted
        ]


def stored(run: Run, split: str, tokenizer: Any) -> TokenStore:
    """The tokens of a split's rows, as they were prepared; long texts in pieces.

    Raises:
        RunError: the preparation is not done, its files are damaged, or this tokenizer and template make other ids.
    """
    store = TokenStore.open(run, split)
    checks = run.manifest("prepare")
    said = checks["rendering"]
    differ = next((key for key, made in tokens.made_by(tokenizer).items() if said.get(key) != made), None)
    if differ is None:  # and the code that renders is that of then
        with run.data_file(split).open(encoding="utf-8") as file:
            first = render(tokenizer, Example.from_dict(json.loads(file.readline())))
        differ = "rendering" if pieces(first, checks["max_length"])[0].ids != store[0].ids else None
    if differ is not None:
        raise RunError(
            f"{run.tokens_file(split, 'tokens')}: the tokens were made by another {differ.partition('_')[0]} than the "
            "one of now; start a new run with --fresh"
        )
    return store


def shuffled(count: int, seed: int) -> np.ndarray[Any, Any]:
    """The order that `datasets.Dataset.shuffle(seed=seed)` gives `count` rows."""
    return np.random.default_rng(seed).permutation(count)


def source_fingerprint(recipe: Recipe) -> str:
    """sha256 over the files that the recipe's data section names; tells whether the data changed since."""
    digest = hashlib.sha256()
    for split in SPLITS:
        given = getattr(recipe.data, split)
        if given is not None:
            digest.update(sources.fingerprint(given, f"data.{split}").encode())
    if recipe.data.without is not None and Path(recipe.data.without).is_file():
        digest.update(Path(recipe.data.without).read_bytes())
    return digest.hexdigest()


def _tables(recipe: Recipe) -> tuple[dict[str, Table], list[Finding]]:
    """The rows of each split after hold-out and selection, with notes about splits."""
    data = recipe.data
    label = (data.label or "label") if recipe.task == "classification" else None
    tables = {
        split: sources.read(given, f"data.{split}", label=label)
        for split in SPLITS
        if (given := getattr(data, split)) is not None
    }
    for split, table in tables.items():
        if not len(table.rows):
            raise without_rows(split, table.names)
    if "test" not in tables and data.split.test:
        whole = tables["train"]
        sides = (held_out(row, data.split.test, data.split.seed) for row in whole.rows)
        held = np.fromiter(sides, dtype=bool, count=len(whole.rows))
        for split, side in (("train", False), ("test", True)):
            rows = sources.Some(whole.rows, np.flatnonzero(held == side))
            tables[split] = Table(whole.names, rows, whole.classes)
            if not len(rows):
                raise DataError(too_few_to_hold_out(len(whole.rows), data.split.test))
    tables = {split: tables[split] for split in SPLITS if split in tables}
    notes = []
    for split, table in tables.items():
        limit = getattr(data.limit, split)
        if limit is None:
            continue
        if limit > len(table.rows):
            notes.append(limit_not_reached(split, table.names, limit, len(table.rows)))
        order = shuffled(len(table.rows), data.limit.seed)[:limit]
        missed = np.setdiff1d(_broken(table.rows), order)
        tables[split] = Table(table.names, sources.Some(table.rows, np.append(order, missed)), table.classes)
    return tables, notes


def without_rows(split: str, names: Sequence[str]) -> DataError:
    return DataError(f"data.{split}: {', '.join(names)} holds no rows")


def too_few_to_hold_out(rows: int, share: float) -> str:
    return (
        f"data.train: {rows} rows are too few to hold out {share:.0%} for a test set; "
        "name data.test, or change data.split.test or data.split.seed"
    )


def limit_not_reached(split: str, names: Sequence[str], limit: int, rows: int) -> Finding:
    said = f"data.limit.{split} is {limit}, the data holds {rows} rows; all are used"
    return Finding("limit_not_reached", "info", ", ".join(names), said, split)


def _broken(rows: Rows) -> np.ndarray[Any, Any]:
    """The numbers of the rows that cannot be read: they are named even where nobody selects them."""
    found = (number for number, row in enumerate(rows) if isinstance(row, Broken)) if rows.may_break else ()
    return np.fromiter(found, dtype=np.int64)


def held_out(row: Row | Broken, share: float, seed: int) -> bool:
    """Whether a row belongs to the test set: a hash of what it says, so that equal rows share a side for ever."""
    if isinstance(row, Broken):
        return False
    content = json.dumps(row.fields, sort_keys=True, ensure_ascii=False, default=str)
    digest = hashlib.sha256(f"{seed}\0{content}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def _labels(recipe: Recipe, table: Table, shape: shapes.Shape | None) -> list[str]:
    """The classes in their order: as declared, else as the training rows have them, sorted."""
    declared = declared_labels(recipe, table)
    return sorted_labels(labels_of(table.rows, shape)) if declared is None else declared


def declared_labels(recipe: Recipe, table: Table) -> list[str] | None:
    """The classes that the recipe or the data set names, None where neither does."""
    declared = recipe.data.labels
    if isinstance(declared, dict):
        return [declared[number] for number in sorted(declared)]
    words = declared or table.classes
    return None if words is None else list(words)


def labels_of(rows: Iterable[Row | Broken], shape: shapes.Shape | None) -> set[str]:
    """The classes of rows."""
    seen = set()
    for row in rows:
        if isinstance(row, Row):
            assert shape is not None
            with contextlib.suppress(shapes.Unusable):  # named when the rows are shaped
                seen.add(str(shape.read(row).label))
    return seen


def sorted_labels(labels: set[str]) -> list[str]:
    return sorted(labels, key=_natural)


def _natural(word: str) -> tuple[int, float, str]:
    return (0, float(word), word) if word.lstrip("-").isdecimal() else (1, 0.0, word)


def _learnable(recipe: Recipe, table: Table, labels: list[str], counts: Counter[str | None]) -> list[str]:
    """The classes that rows are left of, or all where they are declared.

    Raises:
        DataError: there is only one.
    """
    seen = [label for label in labels if counts[label]]
    if len(seen) == 1:
        raise DataError(
            f"data.train: all {counts[seen[0]]} rows have one class, {seen[0]!r}; there is nothing to tell apart"
        )
    return labels if recipe.data.labels or table.classes else seen


def label_limits(
    labels: Sequence[str], ref: ModelRef, tokenizer: Any, equipment: Equipment, max_length: int
) -> dict[str, int]:
    """For each label, how long its rows may be: every label is scored behind every prompt, so the longest must fit
    into the context there."""
    lengths = {label: len(chat.render_answer(tokenizer, equipment, label)) for label in labels}
    longest = max((length for length in lengths.values() if length <= max_length), default=0)
    context = ref.context or max_length + longest
    return {label: min(max_length, context - longest + length) for label, length in lengths.items()}


def _label_nodes(labels: Sequence[str], tokenizer: Any, equipment: Equipment) -> int:
    """Tokens that scoring all labels behind a prompt computes: each beginning of a label once, no whole label."""
    rendered = [chat.render_answer(tokenizer, equipment, label) for label in labels]
    return len({tuple(ids[:size]) for ids in rendered for size in range(1, len(ids))})


@dataclass
class _Judge:
    """Says which rows of a split are used, and notes down why the others are not."""

    rules: Rules
    findings: Findings
    kept: Kept

    def shaped(self, shape: shapes.Shape | None, rows: Iterable[Row | Broken]) -> Iterator[Example]:
        """Rows into examples; each that cannot be one is a finding."""
        for row in rows:
            try:
                if isinstance(row, Broken):
                    raise shapes.Unusable(row.code, row.message)
                assert shape is not None
                example = shape.read(row)
            except shapes.Unusable as problem:
                self.leave_out("shape", problem.code, problem.severity, row.where, str(problem))
            else:
                yield example

    def known(self, examples: Iterator[Example]) -> Iterator[Example]:
        """Refuse labels that training never showed."""
        labels = self.rules.labels
        if labels is None:
            yield from examples
            return
        known = set(labels)
        for example in examples:
            if example.label in known:
                yield example
                continue
            message = (
                f"label {example.label!r} is not among the training rows' labels; "
                f"{shapes.nearest(str(example.label), labels)} (use more training rows or name every class in "
                "data.labels)"
            )
            self.leave_out("labels", "unknown_label", "error", example.source, message)

    def limit(self, example: Example) -> int:
        room = self.rules.max_length - self.rules.recipe.answer_room
        return self.rules.limits.get(str(example.label), room)

    def fitted(self, limit: int, clipped: tuple[Example, Clipped | DataError]) -> tuple[Example, chat.Rendering] | None:
        """The example within `limit` tokens and its rendering, or None where it is left out."""
        example, made = clipped
        reason = self._against(limit, example, made)
        if reason is not None:
            self.leave_out("fit", *reason[:2], example.source, reason[2])
            return None
        assert isinstance(made, Clipped)
        assert made.example is not None
        if self.rules.unwanted and (digest := made.example.sha256()) in self.rules.unwanted:
            self.kept.left_out[digest] += 1
            self.leave_out("fit", "asked_out", "info", example.source, "left out, as data.without asks")
            return None
        if example.text is None and made.length > limit:
            self.kept.truncated += 1
            self.kept.tokens_cut += made.cut
            answer = "" if example.item is not None else ", the answer is whole"
            message = f"{_over(made, limit)}: the end of the prompt was cut ({made.cut} tokens){answer}"
            split = self.rules.split
            self.findings.add((split, "fit"), Finding("over_length", "warning", example.source, message, split))
        return made.example, made.rendering

    def _against(self, limit: int, example: Example, made: Clipped | DataError) -> tuple[str, str, str] | None:
        """Why an example cannot be used: code, severity, and a sentence."""
        if isinstance(made, DataError):
            return "template", "error", str(made)
        if example.text is not None:
            if len(made.rendering.ids) >= MIN_PRETRAINING_TOKENS:
                return None
            return "too_short", "warning", f"fewer than {MIN_PRETRAINING_TOKENS} tokens: left out"
        if example.item is None and not any(made.rendering.mask[1:]):
            return "nothing_to_learn", "warning", "the chat template leaves no turn to learn: left out"
        if made.length <= limit:
            return None
        if self.rules.recipe.data.over_length != "truncate":
            severity = "error" if self.rules.recipe.data.over_length == "error" else "warning"
            return "over_length", severity, f"{_over(made, limit)}: left out"
        if made.example is None:
            said = f"{_over(made, limit)}, and the answer alone does not fit: left out"
            return "answer_too_long", "warning", said
        return None

    def leave_out(self, step: str, code: str, severity: str, where: str, message: str) -> None:
        split = self.rules.split
        self.kept.rejected += 1
        self.findings.add((split, step), Finding(code, severity, where, message, split, rejected=True))


def _over(made: Clipped, limit: int) -> str:
    return f"{made.length} tokens, {made.length - limit} over the limit of {limit}"


def _clipped(
    tokenizer: Any, examples: Iterator[Example], limit: Callable[[Example], int], threads: int | None
) -> Generator[tuple[int, tuple[Example, Clipped | DataError]], None, None]:
    """Each example with its limit and what `chat.clip` makes of it, in their order; block by block, each block in a
    thread of its own, since the tokenizer lets go of the interpreter's lock."""

    def work(block: list[Example]) -> list[tuple[int, tuple[Example, Clipped | DataError]]]:
        limits = [limit(example) for example in block]
        made: Sequence[Clipped | DataError]
        if block[0].text is not None:
            whole = chat.render_texts(tokenizer, [str(one.text) for one in block], [one.ends for one in block])
            made = [Clipped(one, len(its.ids), its) for one, its in zip(block, whole, strict=True)]
        else:
            made = chat.clip_all(tokenizer, block, limits)
        return list(zip(limits, zip(block, made, strict=True), strict=True))

    blocks = _side_by_side(work, _blocks(examples), threads or (_threads() if tokenizer.is_fast else 1))
    with contextlib.closing(blocks):
        for block in blocks:
            yield from block


def _blocks(examples: Iterator[Example]) -> Iterator[list[Example]]:
    block: list[Example] = []
    size = 0
    for example in examples:
        block.append(example)
        size += len(example.text or "") + sum(len(message.content) for message in example.messages)
        if len(block) == BLOCK_ROWS or size >= BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _side_by_side(work: Callable[[One], Other], items: Iterator[One], threads: int) -> Generator[Other, None, None]:
    """What `work` makes of each item, in their order, with few items under way at any time."""
    if threads == 1:
        yield from map(work, items)
        return
    with _alone(), ThreadPoolExecutor(threads, "tokenising") as pool:
        under_way: deque[Any] = deque()
        for item in items:
            under_way.append(pool.submit(work, item))
            if len(under_way) > threads:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def _threads() -> int:
    """One for each core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_THREADS)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Keep the tokenizer, which asks at each call, from starting threads of its own under ours: with both, a row takes
    a quarter more of the processor's time."""
    before = os.environ.get(OWN_THREADS)
    os.environ[OWN_THREADS] = "false"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(OWN_THREADS, None)
        else:
            os.environ[OWN_THREADS] = before


Put = Callable[[Example, chat.Rendering], int]


@contextlib.contextmanager
def _writer(run: Run | None, split: str, max_length: int) -> Iterator[Put]:
    """Takes the rows that are used to the run's folder; without a run it lets them go."""
    if run is None:
        yield lambda example, rendering: 0
        return
    with replacing(run.data_file(split)) as file, tokens.writing(run, split) as store:
        yield putting(file, store, max_length)


def putting(file: BinaryIO, store: TokenWriter, max_length: int) -> Put:
    """Takes rows, one after another, into a file of JSON lines and their sequences into a store; gives the bytes that
    the file has so far."""
    row, byte = 0, 0

    def put(example: Example, rendering: chat.Rendering) -> int:
        nonlocal row, byte
        sequences = [rendering] if example.text is None else pieces(rendering, max_length)
        store.add(sequences, row=row, byte=byte)
        row, byte = row + 1, byte + file.write(_line(example))
        return byte

    return put


def _line(example: Example) -> bytes:
    given = example.to_dict()
    try:
        return (json.dumps(given, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a character, as in the name of a file that is not UTF-8
        return (json.dumps(given) + "\n").encode()


def _broken_row(recipe: Recipe, split: str, findings: Findings) -> DataError | None:
    errors = [finding for finding in findings.first if finding.severity == "error" and finding.split == split]
    over = [finding for finding in errors if finding.code == "over_length"]
    if not errors or (recipe.data.bad_rows == "skip" and not over):
        return None
    first = (over or errors)[0]
    others = sum(n for (of, _, severity), n in findings.counts.items() if (of, severity) == (split, "error")) - 1
    more = f" (and {others} more such rows)" if others else ""
    advice = (
        "set data.over_length to truncate or drop"
        if first.code == "over_length"
        else "mend it, or set data.bad_rows: skip to leave such rows out"
    )
    return DataError(f"{first.where}: {first.message}{more}; {advice}")


def _stop_where_empty(split: str, result: Assembled) -> None:
    if not result.splits[split]["used"]:
        reasons: Counter[str] = Counter()
        for (of, code, _), count in result.findings.counts.items():
            if of == split:
                reasons[code] += count
        why = ", ".join(f"{count} {code}" for code, count in reasons.most_common(3))
        names = ", ".join(result.splits[split]["source"])
        raise DataError(f"data.{split}: no usable row in {names} ({why or 'it is empty'})")
