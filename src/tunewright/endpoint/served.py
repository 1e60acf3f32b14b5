"""A packaged model, ready to answer: read from a run folder, and refused where it would not render as it was trained.

No torch here: every number comes from `generate`, which evaluation uses too.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tunewright import chat, models
from tunewright.chat import Equipment, Message
from tunewright.endpoint.answers import Ask, End, Piece, cut
from tunewright.endpoint.spelling import Speller
from tunewright.errors import EndpointError
from tunewright.generate import LabelTree, LocalCompleter, Token
from tunewright.run import Run, read_json

USUAL_ANSWER = 128
"""Tokens that a quota reckons with where a request to a model without labels sets no max_tokens."""

ENDLESS = 4096
"""Longest answer of a model whose config names no context."""

COLDEST = 1e-4
"""Below this temperature the best token is taken: dividing by less overflows, and nothing else could be drawn."""

NARROWEST = 1e-9
"""A top_p of 0 means the best token alone; this keeps that one in the set that is drawn from."""


class Served:
    """A model that answers conversations. Its methods may be called from one thread at a time, `prompt` from any."""

    def __init__(self, completer: LocalCompleter, *, labels: Sequence[str] | None = None, created: int = 0) -> None:
        self.completer = completer
        self.created = created
        """Unix time at which the model was packaged."""
        self.speller = Speller(completer.tokenizer)
        self.classifier = Classifier(completer, labels) if labels else None

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation.

        Raises:
            DataError: the chat template refuses it.
        """
        return chat.render_prompt(self.completer.tokenizer, messages)

    def needed(self, ask: Ask) -> int:
        """Tokens of answer that must have room behind the prompt.

        A classifier writes no more than its longest label, whatever max_tokens says, and scores all of each.
        """
        return self.classifier.longest if self.classifier else ask.max_tokens or 1

    def estimate(self, ask: Ask) -> int:
        """Tokens that a quota counts for a request when it arrives."""
        longest = ask.max_tokens
        if longest is None:
            longest = self.classifier.longest if self.classifier else min(USUAL_ANSWER, self._room(ask))
        return len(ask.prompt) + ask.n * longest

    def answer(self, ask: Ask) -> Iterator[tuple[int, Piece | End]]:
        """The pieces of each of the `n` answers with the answer's number, one answer after the other."""
        scores = self.classifier.scores(ask.prompt) if self.classifier else []
        for index in range(ask.n):
            seed = None if ask.seed is None else ask.seed + index
            tokens = self.classifier.tokens(ask, scores, seed) if self.classifier else self._tokens(ask, seed)
            for event in cut(tokens, ask.stop, self.completer.equipment.stop_ids):
                yield index, event

    def _tokens(self, ask: Ask, seed: int | None) -> Iterator[Token]:
        temperature = 1.0 if ask.temperature is None else ask.temperature
        return self.completer.stream(
            ask.prompt,
            max_new_tokens=min(ask.max_tokens or ENDLESS, self._room(ask)),
            temperature=temperature if temperature >= COLDEST else 0.0,
            top_p=max(ask.top_p, NARROWEST),
            seed=seed,
            num_top=ask.num_top,
        )

    def _room(self, ask: Ask) -> int:
        context = self.completer.context
        return ENDLESS if context is None else context - len(ask.prompt)


def load(run: Run) -> Served:
    """The model that a run packaged.

    Raises:
        EndpointError: nothing is packaged, or the packaged tokenizer renders otherwise than training did.
    """
    again = f"package again with `tunewright package {run.path}`"
    if not run.rendering_file.is_file():
        raise EndpointError(f"{run.path}: nothing is packaged; {again}")
    rendering = read_json(run.rendering_file)
    device = models.best_device(use_cpu=run.recipe().train.use_cpu)
    try:
        equipment = Equipment(**{field.name: rendering[field.name] for field in fields(Equipment)})
        trained_on = {key: rendering[key] for key in ("golden", "template_sha256")}
        labels: list[str] | None = rendering["labels"]
        if not trained_on["golden"] and rendering["task"] != "pretraining":
            raise EndpointError(f"{run.rendering_file}: no golden conversation to compare with; {again}")
    except KeyError as error:
        raise EndpointError(f"{run.rendering_file}: {error} is missing; {again}") from None
    try:
        tokenizer = models.load_folder_tokenizer(run.packaged_model)
        _check_rendering(tokenizer, trained_on, f"{run.packaged_model}", again)
        model = models.load_folder(run.packaged_model, device=device)
    except EndpointError:
        raise
    except (OSError, ValueError) as error:
        said = str(error).strip().split("\n")[0]
        raise EndpointError(f"{run.packaged_model}: cannot be loaded ({said}); {again}") from error
    created = int(run.rendering_file.stat().st_mtime)
    return Served(LocalCompleter(model, tokenizer, equipment), labels=labels, created=created)


@dataclass(frozen=True)
class Label:
    """A label as its tokens: the last one ends the turn and has no text."""

    ids: list[int]
    texts: list[str]


class Classifier:
    """Answers with one of its labels: the most probable one, or one drawn by their probabilities.

    The tree is planted with every beginning of every label. It has the same nodes as one planted with the labels
    alone, so one pass gives both the labels' scores, equal to evaluation's, and the log-probability of each token.
    """

    def __init__(self, completer: LocalCompleter, labels: Sequence[str]) -> None:
        self._completer = completer
        rendered = [chat.render_answer(completer.tokenizer, completer.equipment, label) for label in labels]
        self.labels = [
            Label(ids, [*_label_texts(completer, label, ids[:-1]), ""])
            for label, ids in zip(labels, rendered, strict=True)
        ]
        self.longest = max(map(len, rendered))
        beginnings = [(label, ids[:size]) for label, ids in zip(labels, rendered, strict=True) for size in _sizes(ids)]
        self._tree = LabelTree.plant([label for label, _ in beginnings], [ids for _, ids in beginnings])

    def scores(self, prompt: list[int]) -> list[list[float]]:
        """For each label, the log-probability of each of its beginnings; the last one is the label's score."""
        sums = iter(self._completer.score([prompt], self._tree)[0])
        return [list(itertools.islice(sums, len(label.ids))) for label in self.labels]

    def tokens(self, ask: Ask, scores: list[list[float]], seed: int | None) -> Iterator[Token]:
        """The chosen label's tokens; those behind max_tokens are left out, and with them the end of turn."""
        chosen = choose([parts[-1] for parts in scores], ask.temperature or 0.0, ask.top_p, seed)
        label, parts = self.labels[chosen], scores[chosen]
        room = len(label.ids)
        if ask.max_tokens is not None and ask.max_tokens < room - 1:
            room = ask.max_tokens
        for place, (token, text) in enumerate(zip(label.ids[:room], label.texts, strict=False)):
            logprob = parts[place] - (parts[place - 1] if place else 0.0)
            top = self._alternatives([*ask.prompt, *label.ids[:place]], token, logprob, ask.num_top)
            yield Token(token, text, logprob, top)

    def _alternatives(self, ids: list[int], token: int, logprob: float, num_top: int) -> list[tuple[int, float]]:
        """The most probable tokens of the whole vocabulary; the label's own has the very number that was scored."""
        if not num_top:
            return []
        best = next(self._completer.stream(ids, max_new_tokens=1, num_top=num_top)).top
        return [(one, logprob if one == token else other) for one, other in best]


def choose(scores: Sequence[float], temperature: float, top_p: float, seed: int | None) -> int:
    """The best at temperature 0; else one drawn from softmax(scores / temperature), the least probable left out
    beyond `top_p`."""
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    if temperature <= 0:
        return order[0]
    weights = [math.exp((scores[place] - scores[order[0]]) / temperature) for place in order]
    total, before = sum(weights), 0.0
    kept: list[int] = []
    for place, weight in zip(order, weights, strict=True):
        if kept and before >= top_p * total:
            break
        kept.append(place)
        before += weight
    return random.Random(seed).choices(kept, weights[: len(kept)])[0]


def _check_rendering(tokenizer: Any, trained_on: dict[str, Any], where: str, again: str) -> None:
    """Refuse a tokenizer that would give the model other ids than it was trained on."""
    if not tokenizer.chat_template:
        raise EndpointError(f"{where}: the tokenizer has no chat template, and training had one; {again}")
    if found := chat.differences(tokenizer, trained_on):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise EndpointError(f"{where}: renders otherwise than in training: {found[0]}{more}; {again}")


def _label_texts(completer: LocalCompleter, label: str, ids: list[int]) -> list[str]:
    """The label in pieces, one for each token; joined they are the label itself.

    What a template writes around it (a space, an empty reasoning block) is not shown. A tokenizer that does not give
    the label back (one that lowers its case) shows all of it with the first token.
    """
    wholes = [completer.text(ids[:size]) for size in _sizes(ids)]
    clear = ["" if whole.endswith("\N{REPLACEMENT CHARACTER}") else whole for whole in wholes]
    ends = list(itertools.accumulate((len(whole) for whole in clear), max))
    begin = wholes[-1].rfind(label) if wholes else -1
    if begin < 0:
        return [label, *[""] * (len(ids) - 1)]
    places = [min(max(end - begin, 0), len(label)) for end in ends]
    places[-1] = len(label)
    return [label[start:end] for start, end in itertools.pairwise([0, *places])]


def _sizes(ids: Sequence[int]) -> range:
    return range(1, len(ids) + 1)
