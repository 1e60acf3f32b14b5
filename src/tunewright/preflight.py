"""Training on purpose before training: a few rows are learnt by heart, and must then be said word for word.

Here is what can go wrong, which rows are taken, what came of it, and the child process that does it for somebody who
has no run yet. The training itself is `train/preflight.py`.

What is covered: masks, gradients, numbers, the learning rate, the prompt and the end of turn that an endpoint uses.
What is not: whether the rows are right, and whether what is learnt from all of them holds for others.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tunewright import children
from tunewright import run as run_folders
from tunewright.chat import Example
from tunewright.errors import StageError, from_name
from tunewright.recipe import Recipe
from tunewright.run import Run, read_json, write_json, write_json_lines

Progress = Callable[[float, float, str], None]

ROWS = 8
"""Rows that are learnt by heart, at most."""
LENGTH = 48
"""Tokens of the rows that are looked for: quickly learnt, and more than a word."""
ANSWERS = 64
"""Different answers that rows are kept of while they are looked for."""
LONG_S = 600
"""Training that takes at least so long is begun with a preflight, where the recipe leaves it open."""


class Failure(NamedTuple):
    means: str
    fix: str


FAILURES = {
    "nothing_in_loss": Failure(
        "no answer's token has a loss: there is nothing that training could learn",
        "see that an assistant's message has weight 1, and which turns the chat template writes",
    ),
    "token_out_of_range": Failure(
        "a token's id is beyond the rows of the model's embeddings",
        "use the tokenizer that belongs to the base, or write its vocabulary without gaps",
    ),
    "not_finite": Failure(
        "a weight, the first loss or the first gradient is no finite number",
        "fetch the base again, or set `train.fp16: false`",
    ),
    "no_gradient": Failure(
        "no gradient reaches a weight that is trained: training would change nothing",
        "choose other `train.lora.target_modules`, fewer `train.frozen_layers`, or another base",
    ),
    "explodes": Failure(
        "at the recipe's own learning rate the loss rises far above that of guessing within a few steps",
        "lower `train.learning_rate` to a tenth, or leave it out for the default",
    ),
    "rate_too_low": Failure(
        "at the recipe's own learning rate all steps of the run together would change next to nothing",
        "raise `train.learning_rate`, or leave it out for the default",
    ),
    "cannot_memorise": Failure(
        "a few rows, trained on again and again at several rates, are not learnt by heart",
        "lower dropout, raise `train.lora.r`, freeze fewer layers, or see whether prompts lose what answers depend on",
    ),
    "cannot_end": Failure(
        "answers are learnt by heart, and the token that ends them is not: the adapter cannot make this base say it",
        "set `train.method: full`, or take a base that was trained with its end-of-turn token",
    ),
    "says_something_else": Failure(
        "the rows are learnt, but asked as an endpoint asks, the model answers otherwise",
        "see whether the chat template writes the same prompt for training and for an answer, and whether an answer "
        "holds a special token",
    ),
    "does_not_stop": Failure(
        "the model says the answers and goes on: what ends a turn there is no token that ends an answer",
        "use a chat template that ends every assistant's turn with the same special token",
    ),
}
"""How a preflight fails. docs/checks.md has this table."""


@dataclass(frozen=True)
class Preflight:
    """What came of it."""

    outcome: Literal["passed", "failed", "skipped"]
    code: str | None = None
    """Of `FAILURES`, where it failed."""
    seen: str = ""
    """What was seen, or why it was skipped."""
    rows: tuple[str, ...] = ()
    """The rows that were taken (file:line)."""
    steps: int = 0
    seconds: float = 0.0
    learning_rate: float | None = None
    """The rate at which the rows were learnt by heart; not the recipe's."""
    loss_before: float | None = None
    """Mean loss of the answers' tokens, nats."""
    loss_after: float | None = None
    answers: int = 0
    """Answers that were said word for word and ended."""
    note: str = ""

    @property
    def sentence(self) -> str:
        """In a line: what was seen, and what to do."""
        if self.outcome == "skipped":
            return f"no preflight: {self.seen}"
        if self.code is not None:
            return f"preflight: {self.code}: {self.seen}; {FAILURES[self.code].fix.replace('`', '')}"
        rows = f"{len(self.rows)} row{'s' if len(self.rows) > 1 else ''}"
        said = f", all {self.answers} answers said and ended" if self.answers else ""
        return (
            f"{rows} learnt by heart in {self.steps} steps, {self.seconds:.1f} s: loss {self.loss_before:.3f} -> "
            f"{self.loss_after:.3f}{said}"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Preflight:
        return cls(**given | {"rows": tuple(given["rows"])})


class Few:
    """Takes all rows, one by one, and keeps a few: of about `LENGTH` tokens, with prompts that differ, and of as many
    different answers as there are."""

    def __init__(self) -> None:
        self.kept: dict[str, list[tuple[int, Example]]] = {}
        """Answer -> the best rows with it and how far each is from the length looked for, the nearest first."""

    def add(self, example: Example, num_tokens: int) -> None:
        distance = abs(num_tokens - LENGTH)
        answer = example.text if example.text is not None else example.answer
        rows = self.kept.get(answer, [])
        if len(rows) >= ROWS and distance >= rows[-1][0]:
            return
        if answer not in self.kept and len(self.kept) >= ANSWERS:
            worst = max(self.kept, key=lambda one: self.kept[one][0][0])
            if distance >= self.kept[worst][0][0]:
                return
            del self.kept[worst]
        if any(_same(example, other) for _, other in rows):
            return
        self.kept[answer] = sorted([*rows, (distance, example)], key=lambda row: row[0])[:ROWS]

    def chosen(self) -> list[Example]:
        """The rows: the best of each answer, then the best of all others."""
        ranked = [(rank > 0, *row) for rows in self.kept.values() for rank, row in enumerate(rows)]
        few: list[Example] = []
        for _, _, example in sorted(ranked, key=lambda row: row[:2]):
            if not any(_same(example, other) for other in few):
                few.append(example)
        return few[:ROWS]


def _same(one: Example, other: Example) -> bool:
    """Whether two rows ask the same."""
    return one.text == other.text and one.prompt == other.prompt


def apart(recipe: Recipe, resolved: dict[str, Any], rows: Sequence[Example], progress: Progress) -> Preflight:
    """A preflight in a child process and a folder of its own, neither of which stays; Ctrl-C ends it too.

    Raises:
        TunewrightError: as training itself would, such as a module that LoRA does not find.
    """
    with tempfile.TemporaryDirectory(prefix="tunewright-preflight-") as folder:
        run = run_folders.create(Path(folder), recipe)
        write_json(run.manifest_file("check"), resolved)
        run.data_file("train").parent.mkdir(parents=True, exist_ok=True)
        write_json_lines(run.data_file("train"), [example.to_dict() for example in rows])
        _watch(run, progress)
        return Preflight.from_dict(read_json(run.preflight_file))


def _watch(run: Run, progress: Progress) -> None:
    def look() -> None:
        if (seen := run.progress("preflight")) is not None:
            progress(seen["done"], seen["total"], seen["note"])

    log = run.path / "preflight.log"
    code = children.work(["preflight", str(run.path)], log, look)
    if run.failure_file("preflight").is_file():
        failure = read_json(run.failure_file("preflight"))
        raise from_name(failure["kind"], failure["message"])
    if code or not run.preflight_file.is_file():
        raise StageError(f"the preflight ended (exit code {code}): {children.last_words(log)}")
