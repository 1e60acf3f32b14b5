"""Evaluation by chat completions: what a model of the run answers, row by row. Answers are kept as they come, so that a
stage that goes on pays for none twice.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import openai

from tunewright import chat, graders, models
from tunewright.chat import Example
from tunewright.errors import UserError
from tunewright.evaluate import metrics
from tunewright.evaluate.measure import Progress
from tunewright.evaluate.metrics import OTHER
from tunewright.graders import Answer
from tunewright.hosted import calls
from tunewright.hosted.places import Place
from tunewright.models import ModelRef
from tunewright.recipe import Recipe
from tunewright.run import Run, append_json, read_json_lines

MORE = 8
"""Tokens beyond a class that an answer may have: what else it says shows that it names none."""
FILTERED = "(filtered)"
"""What stands where a content filter let no answer through."""


class Asker:
    """Puts rows to the models of a run; what `measure.evaluate` takes as `ask`."""

    def __init__(self, run: Run, place: Place) -> None:
        self.run, self.place, self.recipe = run, place, run.recipe()
        self.labels: list[str] | None = run.manifest("prepare")["labels"]
        self.room = room(run)
        self.asked: dict[str, int] = {}

    def __call__(self, name: str, rows: Sequence[Example], progress: Progress) -> dict[str, Any]:
        which: Literal["tuned", "base"] = "tuned" if name == "tuned" else "base"
        said = self._answers(which, rows, progress)
        if filtered := said.count(FILTERED):
            self.run.event("evaluate", "filtered", model=which, rows=filtered)
        if self.labels is not None:
            return {"prediction": [_class(text, self.labels) for text in said], "said": said}
        if self.recipe.task == "reward":
            return {"prediction": said, **_graded(self.recipe, rows, said)}
        truth = [example.answer for example in rows]
        return {
            "prediction": said,
            "exact_match": metrics.exact_match(said, truth),
            "rouge_l": metrics.rouge_l(said, truth),
        }

    def _answers(self, which: Literal["tuned", "base"], rows: Sequence[Example], progress: Progress) -> list[str]:
        with calls.explained(f"making the {which} model ready"):
            model = self.place.model(self.run, which)
        number = self.asked[which] = self.asked.get(which, 0) + 1  # a few-shot base is asked as `base` too
        kept = _kept(self.run, which, number)
        known: dict[str, str] = {one["id"]: one["said"] for one in read_json_lines(kept) if one["model"] == model}
        kept.parent.mkdir(exist_ok=True)
        lock = threading.Lock()

        def one(example: Example) -> str:
            if example.id not in known:
                text = self._one(model, example)
                with lock:
                    known[example.id] = text
                    append_json(kept, {"model": model, "id": example.id, "said": text})
            with lock:
                progress(sum(row.id in known for row in rows) if len(rows) < 500 else len(known), len(rows))
            return known[example.id]

        with ThreadPoolExecutor(self.place.settings.concurrency) as pool:
            try:
                return list(pool.map(one, rows))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _one(self, model: str, example: Example) -> str:
        messages = [message.to_dict() for message in example.prompt]
        seed = self.recipe.evaluate.seed
        text, _ = complete(self.place, model, messages, self.room, tools=example.tools, seed=seed)
        return text


def complete(
    place: Place,
    model: str,
    messages: Sequence[dict[str, Any]],
    most: int | None,
    *,
    tools: Sequence[dict[str, Any]] = (),
    seed: int | None = None,
) -> tuple[str, int]:
    """The greedy answer to a conversation, of `most` tokens at most, and how many it has; calls of tools as lines of
    JSON.

    Raises:
        UserError: the endpoint refuses the question.
        StageError: it does not answer.
    """
    more: dict[str, Any] = {"tools": list(tools)} if tools else {}
    if most is not None:
        more["max_completion_tokens"] = most
    with calls.explained(f"asking {model}"):
        try:
            said = place.client.chat.completions.create(
                model=model,
                messages=list(messages),  # type: ignore[arg-type]
                temperature=0,
                seed=seed,
                **more,
            )
        except openai.BadRequestError as error:
            if error.code == "content_filter":
                return FILTERED, 0
            raise
    choice = said.choices[0]
    count = said.usage.completion_tokens if said.usage else 0
    if choice.finish_reason == "content_filter":
        return FILTERED, count
    if calls_made := choice.message.tool_calls:
        lines = [choice.message.content] if choice.message.content else []
        return "\n".join([*lines, *(_line(one) for one in calls_made)]), count
    return choice.message.content or "", count


def room(run: Run) -> int:
    """Tokens that an answer may have: what the recipe says, of a class those of the longest and a few more."""
    labels = run.manifest("prepare")["labels"]
    if labels is None:
        return run.recipe().max_new_tokens
    tokenizer = models.load_tokenizer(ModelRef.from_dict(run.resolved()["model"]))
    return MORE + max(len(chat.encode(tokenizer, label)) for label in labels)


def _line(call: Any) -> str:
    from tunewright.chat import ToolCall, tool_line

    return tool_line(ToolCall(call.function.name, call.function.arguments))


def _class(text: str, labels: Sequence[str]) -> str:
    """The class that an answer names, as written or but for case and space around it; OTHER where it names none."""
    said = text.strip()
    if said in labels:
        return said
    near = [label for label in labels if label.casefold() == said.casefold().rstrip(".")]
    return near[0] if len(near) == 1 else OTHER


def _graded(recipe: Recipe, rows: Sequence[Example], said: Sequence[str]) -> dict[str, Any]:
    """What the recipe's grader says that answers are worth."""
    if recipe.grader is None:
        raise UserError("task: reward needs a grader")
    with graders.opened(recipe.grader) as grading:
        grades = grading.score(
            [Answer(text, example.item or {}, example.source) for text, example in zip(said, rows, strict=True)]
        )
    return {
        "reward": [grade.score for grade in grades],
        **{f"reward.{name}": [grade.parts[name] for grade in grades] for name in grades[0].parts},
    }


def _kept(run: Run, which: str, number: int) -> Path:
    return run.path / "evaluate" / f"asked-{which}-{number}.jsonl"
