"""From a recipe's data section to the rows that a run uses, with an account of every row that it does not.

The order of things: read, hold out a test set where none is named, shuffle and select, shape, check, clip.
`assemble` does it all and writes nothing; `write` puts the result into the run folder, data/checks.json last.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tunewright import chat
from tunewright.chat import Equipment, Example
from tunewright.data import shapes, sources
from tunewright.data.sources import Broken, Row, Table
from tunewright.errors import DataError
from tunewright.models import ModelRef
from tunewright.recipe import Recipe
from tunewright.run import Run, read_json_lines, write_json, write_json_lines

SPLITS = ("train", "test", "validation")
MIN_PRETRAINING_TOKENS = 2
MIN_PROMPT_TOKENS = 8
"""What a drawn answer must leave of `train.max_length`."""


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


@dataclass
class Assembled:
    """What a run uses, and the account of it."""

    examples: dict[str, list[Example]]
    labels: list[str] | None
    findings: list[Finding]
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    max_length: int = 0

    def checks(self) -> dict[str, Any]:
        return {
            "format": 1,
            "splits": self.splits,
            "labels": self.labels,
            "max_length": self.max_length,
            "findings": [asdict(finding) for finding in self.findings],
        }


def assemble(
    recipe: Recipe,
    ref: ModelRef,
    tokenizer: Any,
    equipment: Equipment,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Assembled:
    """Read, split, select, check and clip the data.

    Raises:
        DataError: nothing can be read, a row is broken (unless `data.bad_rows: skip`), a split ends up empty, the test
            set holds an unknown label, or all training rows have one class.
    """
    max_length = ref.max_length(recipe.train.max_length)
    if max_length - recipe.answer_room < MIN_PROMPT_TOKENS:
        raise DataError(
            f"train.grpo.max_completion_length is {recipe.answer_room} of the {max_length} tokens of train.max_length, "
            f"which leaves fewer than {MIN_PROMPT_TOKENS} for a prompt; set it lower"
        )
    tables, notes = _tables(recipe)
    result = Assembled({}, None, [], max_length=max_length)
    total = sum(len(table.rows) for table in tables.values())
    done = 0
    limits: dict[str, int] = {}
    for split, table in tables.items():
        good, account = _shape(recipe, split, table, result.findings)
        if split == "train" and recipe.task == "classification":
            result.labels = _labels(recipe, table, good)
            limits = _limits(result.labels, ref, tokenizer, equipment, max_length)
        good = _known_labels(split, good, account, result)
        kept = []
        totals, answers = [], []
        for number, example in enumerate(good, start=1):
            limit = limits.get(str(example.label), max_length - recipe.answer_room)
            fitted = _fit(recipe, split, example, tokenizer, limit, result.findings, account)
            if fitted is not None:
                example, rendering = fitted
                kept.append(example)
                totals.append(len(rendering.ids))
                answers.append(rendering.num_targets)
            if progress and number % 200 == 0:
                progress(done + number, total)
        done += len(table.rows)
        result.examples[split] = kept
        result.splits[split] = account | {
            "used": len(kept),
            "sequences": sum(_num_pieces(length, max_length) for length in totals)
            if recipe.task == "pretraining"
            else len(kept),
            "tokens": {"total": _distribution(totals), "answer": _distribution(answers), "sum": sum(totals)},
            "sha256": _fingerprint(kept),
        }
        _stop_where_broken(recipe, split, result.findings)
        _stop_where_empty(split, result)
        if result.labels is not None:
            counts = Counter(example.label for example in kept)
            if split == "train":
                result.labels = _learnable(recipe, table, result.labels, counts)
            result.splits[split]["labels"] = {label: counts[label] for label in result.labels}
    result.findings.extend(notes)
    result.findings.extend(_seen_in_training(result.examples))
    return result


def render(tokenizer: Any, example: Example) -> chat.Rendering:
    """An example's ids and loss mask, whatever its task."""
    if example.text is not None:
        return chat.render_text(tokenizer, example.text, ends=example.ends)
    return chat.render(tokenizer, example.messages)


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


def _num_pieces(length: int, max_length: int) -> int:
    return max(1, math.ceil((length - 1) / (max_length - 1)))


def write(run: Run, assembled: Assembled, *, equipment: Equipment) -> None:
    """data/train.jsonl and the rest, data/checks.json last."""
    for split, examples in assembled.examples.items():
        write_json_lines(run.data_file(split), (example.to_dict() for example in examples))
    write_json(run.manifest_file("prepare"), assembled.checks() | {"rendering": equipment.to_dict()})


def examples(run: Run, split: str) -> list[Example]:
    """The prepared rows of a split."""
    return [Example.from_dict(row) for row in read_json_lines(run.data_file(split))]


def shuffled(count: int, seed: int) -> list[int]:
    """The order that `datasets.Dataset.shuffle(seed=seed)` gives `count` rows."""
    return [int(row) for row in np.random.default_rng(seed).permutation(count)]


def source_fingerprint(recipe: Recipe) -> str:
    """sha256 over the files that the recipe's data section names; tells whether the data changed since."""
    digest = hashlib.sha256()
    for split in SPLITS:
        given = getattr(recipe.data, split)
        if given is not None:
            digest.update(sources.fingerprint(given, f"data.{split}").encode())
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
            raise DataError(f"data.{split}: {', '.join(table.names)} holds no rows")
    if "test" not in tables:
        whole = tables["train"]
        held = [_held_out(row, data.split.test, data.split.seed) for row in whole.rows]
        for split, side in (("train", False), ("test", True)):
            rows = [row for row, out in zip(whole.rows, held, strict=True) if out == side]
            tables[split] = Table(whole.names, rows, whole.classes)
            if not rows:
                raise DataError(
                    f"data.train: {len(whole.rows)} rows are too few to hold out {data.split.test:.0%} for a test set; "
                    "name data.test, or change data.split.test or data.split.seed"
                )
    tables = {split: tables[split] for split in SPLITS if split in tables}
    notes = []
    for split, table in tables.items():
        limit = getattr(data.limit, split)
        if limit is None:
            continue
        if limit > len(table.rows):
            notes.append(
                Finding(
                    "limit_not_reached",
                    "info",
                    ", ".join(table.names),
                    f"data.limit.{split} is {limit}, the data holds {len(table.rows)} rows; all are used",
                    split,
                )
            )
        order = shuffled(len(table.rows), data.limit.seed)[:limit]
        chosen = sources.pick(table.rows, order)
        taken = set(order)
        missed = [row for number, row in enumerate(table.rows) if isinstance(row, Broken) and number not in taken]
        tables[split] = Table(table.names, [*chosen, *missed], table.classes)
    return tables, notes


def _held_out(row: Row | Broken, share: float, seed: int) -> bool:
    """Whether a row belongs to the test set: a hash of what it says, so that equal rows share a side for ever."""
    if isinstance(row, Broken):
        return False
    content = json.dumps(row.fields, sort_keys=True, ensure_ascii=False, default=str)
    digest = hashlib.sha256(f"{seed}\0{content}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def _shape(recipe: Recipe, split: str, table: Table, findings: list[Finding]) -> tuple[list[Example], dict[str, Any]]:
    """Rows into examples; each that cannot be one is a finding."""
    good: list[Example] = []
    rejected = 0
    readable = (row for row in table.rows if isinstance(row, Row))
    shape = shapes.recognise(recipe, readable, table.classes)
    for row in table.rows:
        try:
            if isinstance(row, Broken):
                raise shapes.Unusable(row.code, row.message)
            assert shape is not None
            good.append(shape.read(row))
        except shapes.Unusable as problem:
            rejected += 1
            findings.append(Finding(problem.code, problem.severity, row.where, str(problem), split, rejected=True))
    account = {
        "source": [sources.displayed(name) for name in table.names],
        "read": len(table.rows),
        "rejected": rejected,
        "truncated": 0,
        "tokens_cut": 0,
    }
    return good, account


def _labels(recipe: Recipe, table: Table, train: Sequence[Example]) -> list[str]:
    """The classes in their order: as declared, else as the training rows have them, sorted."""
    declared = recipe.data.labels
    if isinstance(declared, dict):
        return [declared[number] for number in sorted(declared)]
    words = declared or table.classes
    seen = {str(example.label) for example in train}
    if words is None:
        return sorted(seen, key=_natural)
    return list(words)


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


def _limits(
    labels: Sequence[str], ref: ModelRef, tokenizer: Any, equipment: Equipment, max_length: int
) -> dict[str, int]:
    """For each label, how long its rows may be: every label is scored behind every prompt, so the longest must fit
    into the context there."""
    lengths = {label: len(chat.render_answer(tokenizer, equipment, label)) for label in labels}
    longest = max((length for length in lengths.values() if length <= max_length), default=0)
    context = ref.context or max_length + longest
    return {label: min(max_length, context - longest + length) for label, length in lengths.items()}


def _known_labels(split: str, good: list[Example], account: dict[str, Any], result: Assembled) -> list[Example]:
    """Refuse labels that training never showed."""
    if result.labels is None:
        return good
    known = set(result.labels)
    kept = []
    for example in good:
        if example.label in known:
            kept.append(example)
            continue
        account["rejected"] += 1
        result.findings.append(
            Finding(
                "unknown_label",
                "error",
                example.source,
                f"label {example.label!r} is not among the training rows' labels; "
                f"{shapes.nearest(str(example.label), result.labels)} (use more training rows or name every class in "
                "data.labels)",
                split,
                rejected=True,
            )
        )
    return kept


def _fit(
    recipe: Recipe,
    split: str,
    example: Example,
    tokenizer: Any,
    limit: int,
    findings: list[Finding],
    account: dict[str, Any],
) -> tuple[Example, chat.Rendering] | None:
    """The example within `limit` tokens and its rendering, or None where it is left out."""

    def leave_out(code: str, severity: str, message: str) -> tuple[Example, chat.Rendering] | None:
        account["rejected"] += 1
        findings.append(Finding(code, severity, example.source, message, split, rejected=True))
        return None

    if example.text is not None:
        rendering = render(tokenizer, example)
        if len(rendering.ids) >= MIN_PRETRAINING_TOKENS:
            return example, rendering
        return leave_out("too_short", "warning", f"fewer than {MIN_PRETRAINING_TOKENS} tokens: left out")
    try:
        clipped = chat.clip(tokenizer, example, limit)
    except DataError as error:
        return leave_out("template", "error", str(error))
    if example.item is None and not any(clipped.rendering.mask[1:]):
        return leave_out("nothing_to_learn", "warning", "the chat template leaves no turn to learn: left out")
    if clipped.length <= limit:
        return example, clipped.rendering
    over = f"{clipped.length} tokens, {clipped.length - limit} over the limit of {limit}"
    if recipe.data.over_length != "truncate":
        severity = "error" if recipe.data.over_length == "error" else "warning"
        return leave_out("over_length", severity, f"{over}: left out")
    if clipped.example is None:
        return leave_out("answer_too_long", "warning", f"{over}, and the answer alone does not fit: left out")
    cut = clipped.cut
    account["truncated"] += 1
    account["tokens_cut"] += cut
    answer = "" if example.item is not None else ", the answer is whole"
    message = f"{over}: the end of the prompt was cut ({cut} tokens){answer}"
    findings.append(Finding("over_length", "warning", example.source, message, split))
    return clipped.example, clipped.rendering


def _stop_where_broken(recipe: Recipe, split: str, findings: Sequence[Finding]) -> None:
    errors = [finding for finding in findings if finding.severity == "error" and finding.split == split]
    over = [finding for finding in errors if finding.code == "over_length"]
    if not errors or (recipe.data.bad_rows == "skip" and not over):
        return
    first = (over or errors)[0]
    more = f" (and {len(errors) - 1} more such rows)" if len(errors) > 1 else ""
    advice = (
        "set data.over_length to truncate or drop"
        if first.code == "over_length"
        else "mend it, or set data.bad_rows: skip to leave such rows out"
    )
    raise DataError(f"{first.where}: {first.message}{more}; {advice}")


def _stop_where_empty(split: str, result: Assembled) -> None:
    if not result.examples[split]:
        reasons = Counter(finding.code for finding in result.findings if finding.split == split)
        why = ", ".join(f"{count} {code}" for code, count in reasons.most_common(3))
        names = ", ".join(result.splits[split]["source"])
        raise DataError(f"data.{split}: no usable row in {names} ({why or 'it is empty'})")


def _seen_in_training(examples: dict[str, list[Example]]) -> Iterable[Finding]:
    """Test rows whose prompt stands in the training rows too: they make the test look better than it is."""

    def key(example: Example) -> str:
        said = example.text if example.text is not None else "\0".join(one.content for one in example.prompt)
        return " ".join(said.casefold().split())

    trained = {key(example): example.source for example in reversed(examples["train"])}
    for example in examples["test"]:
        if (twin := trained.get(key(example))) is not None:
            yield Finding(
                "seen_in_training", "warning", example.source, f"the same text is a training row: {twin}", "test"
            )


def _distribution(values: Sequence[int]) -> dict[str, float]:
    if not values:
        return {}
    array = np.asarray(values)
    return {
        "min": int(array.min()),
        "median": float(np.median(array)),
        "mean": round(float(array.mean()), 2),
        "p95": float(np.percentile(array, 95)),
        "max": int(array.max()),
    }


def _fingerprint(kept: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in kept:
        row = {key: value for key, value in example.to_dict().items() if key not in ("id", "source")}
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
