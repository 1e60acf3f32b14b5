"""A packaged model that answers rows: what `tunewright batch` runs, here and on executors.

Rows go in as they were read, columns and all; they come out with `prediction` and what else the task gives. A row that
cannot be used comes out too, with `error` saying why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright import chat, models
from tunewright.chat import Equipment, Message
from tunewright.data import shapes
from tunewright.data.sources import Broken, Row, kind
from tunewright.errors import DataError, RunError
from tunewright.generate import LocalCompleter
from tunewright.run import read_json

OURS = ("prediction", "probability", "probabilities", "loss", "error", "row")
"""Columns that answers have."""


@dataclass(frozen=True)
class Columns:
    """Where a row's question stands."""

    text: str | None = None
    messages: str | None = None

    def named(self, fields: dict[str, Any]) -> Columns:
        """As given, else `messages`, `text` or `prompt`, whichever the row has."""
        if self.text or self.messages:
            return self
        for name in ("messages", "text", "prompt"):
            if name in fields:
                return Columns(messages=name) if name == "messages" else Columns(text=name)
        raise DataError(f"no column `text`, `messages` or `prompt` among {', '.join(fields)}; name yours with --text")


class Predictor:
    """A packaged model, loaded."""

    def __init__(self, package: Path, *, max_new_tokens: int | None = None, batch_rows: int | None = None) -> None:
        """
        Args:
            package: a run's `package` folder.
            max_new_tokens: longest answer of a model that writes text. Default: as long as in evaluation.
            batch_rows: rows in a forward at most.

        Raises:
            RunError: there is no package there, or its tokenizer renders otherwise than in training.
        """
        if not (package / "rendering.json").is_file():
            raise RunError(
                f"{package}: no packaged model there (no rendering.json); `tunewright package RUN` makes one"
            )
        rendering = read_json(package / "rendering.json")
        tokenizer = models.load_folder_tokenizer(package / "model")
        if found := chat.differences(tokenizer, rendering, package / "model"):
            raise RunError(f"{package / 'model'}: renders otherwise than in training: {found[0]}; package again")
        equipment = Equipment(**{key: rendering[key] for key in Equipment.__dataclass_fields__})
        model = models.load_folder(package / "model", device=models.best_device())
        self.completer = LocalCompleter(model, tokenizer, equipment, batch_rows=batch_rows)
        self.task: str = rendering["task"]
        self.labels: list[str] | None = rendering["labels"]
        self.system: str | None = rendering["system"]
        self.room = max_new_tokens or rendering["max_new_tokens"]
        self.tree = self.completer.tree(self.labels) if self.labels is not None else None

    def answer(self, rows: Sequence[Row | Broken], columns: Columns) -> list[dict[str, Any]]:
        """Each row with its answer, in their order."""
        answers: list[dict[str, Any]] = []
        asked: list[tuple[int, list[int]]] = []
        for row in rows:
            answer: dict[str, Any] = {"row": row.where}
            answers.append(answer)
            if isinstance(row, Broken):
                answer["error"] = f"{row.where}: {row.message}"
                continue
            for name in OURS:
                if name in row.fields:
                    raise DataError(f"{row.where}: the input has a column {name!r}, which answers have too; rename it")
            answer |= row.fields
            answers[-1] = answer
            try:
                prompt = self._prompt(row, columns.named(row.fields))
                self.completer.refuse_beyond_context([prompt], self._least())
                asked.append((len(answers) - 1, prompt))
            except DataError as error:
                answer["error"] = f"{row.where}: {error}"
        for (place, _), said in zip(asked, self._say([prompt for _, prompt in asked]), strict=True):
            answers[place] |= said
        return answers

    def _say(self, prompts: list[list[int]]) -> list[dict[str, Any]]:
        if not prompts:
            return []
        if self.tree is None:
            said = self.completer.generate(prompts, max_new_tokens=self.room)
            answers: list[dict[str, Any]] = [{"prediction": text} for text in said]
            if self.task == "pretraining":
                whole = [chat.Rendering(prompt, [place > 0 for place in range(len(prompt))]) for prompt in prompts]
                for answer, (loss, count) in zip(answers, self.completer.losses(whole), strict=True):
                    answer["loss"] = loss / count if count else math.nan
            return answers
        import torch

        assert self.labels is not None
        scores = torch.tensor(self.completer.score(prompts, self.tree), dtype=torch.float64)
        shares = scores.softmax(dim=1)
        best = shares.max(dim=1)
        return [
            {
                "prediction": self.labels[place],
                "probability": probability,
                "probabilities": dict(zip(self.labels, row, strict=True)),
            }
            for place, probability, row in zip(
                best.indices.tolist(), best.values.tolist(), shares.tolist(), strict=True
            )
        ]

    def _least(self) -> int:
        """Tokens that must fit behind a prompt."""
        return 1 if self.tree is None else 1 + max(self.tree.depths)

    def _prompt(self, row: Row, columns: Columns) -> list[int]:
        """What the model goes on from, as evaluation asked it."""
        tokenizer = self.completer.tokenizer
        name = columns.messages or columns.text
        assert name is not None
        if name not in row.fields:
            raise DataError(f"no column {name!r}")
        value = row.fields[name]
        if columns.messages:
            messages, tools = shapes.conversation(row, name)
            return chat.render_prompt(tokenizer, self._asked(messages, name), tools)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"column {name!r} holds {'nothing' if value in (None, '') else kind(value)}, not a text")
        if self.task == "pretraining":
            return chat.encode(tokenizer, value)
        return chat.render_prompt(tokenizer, [*self._instructed(), Message("user", value)])

    def _asked(self, messages: Sequence[Message], name: str) -> list[Message]:
        asked = list(messages)
        if asked and asked[-1].role == "assistant":  # the answer that is known; the model gives its own
            asked.pop()
        if not asked:
            raise DataError(f"column {name!r} holds no question")
        return asked if asked[0].role == "system" else [*self._instructed(), *asked]

    def _instructed(self) -> list[Message]:
        return [Message("system", self.system)] if self.system else []
