"""A model ready to answer: read from a run's package, or from a folder and a base; refused where it would not render
as it was trained.

Every number comes from `generate`, which evaluation uses too.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from tunewright import chat, models
from tunewright.chat import Equipment, Message
from tunewright.endpoint import tools
from tunewright.endpoint.answers import Ask, Call, End, Piece, cut
from tunewright.endpoint.guide import Guides
from tunewright.endpoint.spelling import Speller
from tunewright.errors import EndpointError
from tunewright.generate import LabelTree, LocalCompleter, Shape, Token
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
    """A model that answers conversations. Its methods may be called from one thread at a time; `prompt`, `ids`,
    `guides` and `form` from any.

    Args:
        activate: called in the model's thread before it computes: puts this one's adapter in its place.
    """

    def __init__(
        self,
        completer: LocalCompleter,
        *,
        labels: Sequence[str] | None = None,
        created: int = 0,
        activate: Callable[[], None] = lambda: None,
    ) -> None:
        self.completer = completer
        self.created = created
        """Unix time at which the model was packaged."""
        self.speller = Speller(completer.tokenizer)
        self.guides = Guides(completer.tokenizer, completer.equipment)
        self.classifier = Classifier(completer, labels) if labels else None
        self._activate = activate

    @functools.cached_property
    def form(self) -> tools.Form | None:
        """How the model writes calls of functions."""
        return tools.form_of(self.completer.tokenizer)

    def prompt(self, messages: Sequence[Message], declared: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Ids of a conversation, with the functions that are declared.

        Raises:
            DataError: the chat template refuses it.
        """
        return chat.render_prompt(self.completer.tokenizer, messages, declared)

    def ids(self, text: str) -> list[int]:
        """Ids of a plain text to go on from, begun as the tokenizer begins texts."""
        ids: list[int] = self.completer.tokenizer(text, verbose=False).input_ids
        return ids

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

    def answer(self, ask: Ask) -> Iterator[tuple[int, Piece | Call | End]]:
        """The pieces of each of the `n` answers with the answer's number, one answer after the other."""
        self._activate()
        scores = self.classifier.scores(ask.prompt) if self.classifier else []
        for index in range(ask.n):
            seed = None if ask.seed is None else ask.seed + index
            tokens = self.classifier.tokens(ask, scores, seed) if self.classifier else self._tokens(ask, seed)
            events = cut(tokens, ask.stop, self.completer.equipment.stop_ids)
            for event in events if ask.toolbox is None else tools.read(events, ask.toolbox, self.form):
                yield index, event

    def go_on(self, ask: Ask, *, best_of: int | None = None, echo: bool = False) -> Iterator[tuple[int, Piece | End]]:
        """As `answer`, from the prompt's own last token: whatever the model's task, what follows is text.

        Args:
            best_of: write so many, and give the `n` whose tokens are the most probable on average.
            echo: give the prompt first, each token with its log-probability (NaN for the first).
        """
        self._activate()
        said = self._echo(ask) if echo else None
        written = self._best(ask, best_of) if best_of is not None and best_of > ask.n else self._each(ask)
        begun = -1
        for index, event in written:
            if said is not None and index != begun:
                begun = index
                yield index, said
            yield index, event

    def _each(self, ask: Ask) -> Iterator[tuple[int, Piece | End]]:
        for index in range(ask.n):
            seed = None if ask.seed is None else ask.seed + index
            for event in cut(self._tokens(ask, seed), ask.stop, self.completer.equipment.stop_ids):
                yield index, event

    def _best(self, ask: Ask, best_of: int) -> Iterator[tuple[int, Piece | End]]:
        """The `n` best; meanwhile pieces that say nothing, so that a caller can stop between."""
        answers: list[list[Piece | End]] = [[] for _ in range(best_of)]
        for index, event in self._each(replace(ask, n=best_of)):
            answers[index].append(event)
            yield 0, Piece("")
        for index, answer in enumerate(sorted(answers, key=_mean_logprob, reverse=True)[: ask.n]):
            for event in answer:
                yield index, event

    def _echo(self, ask: Ask) -> Piece:
        tokenizer = self.completer.tokenizer
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        text: str = tokenizer.decode(ask.prompt, **options)
        first = Token(ask.prompt[0], "", math.nan)
        return Piece(text, [first, *self.completer.read(ask.prompt, num_top=ask.num_top)])

    def _tokens(self, ask: Ask, seed: int | None) -> Iterator[Token]:
        temperature = 1.0 if ask.temperature is None else ask.temperature
        most = ENDLESS if ask.max_tokens is None else ask.max_tokens
        return self.completer.stream(
            ask.prompt,
            max_new_tokens=min(most, self._room(ask)),
            temperature=temperature if temperature >= COLDEST else 0.0,
            top_p=max(ask.top_p, NARROWEST),
            seed=seed,
            num_top=ask.num_top,
            shapes=_shapes(ask),
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
    device = models.best_device(use_cpu=run.recipe().train.use_cpu)
    trained = Trained.read(run.rendering_file, again)
    try:
        tokenizer = models.load_folder_tokenizer(run.packaged_model)
        trained.check(tokenizer, f"{run.packaged_model}", run.packaged_model)
        model = models.load_folder(run.packaged_model, device=device)
    except EndpointError:
        raise
    except (OSError, ValueError) as error:
        said = str(error).strip().split("\n")[0]
        raise EndpointError(f"{run.packaged_model}: cannot be loaded ({said}); {again}") from error
    return Served(LocalCompleter(model, tokenizer, trained.equipment), labels=trained.labels, created=trained.created)


@dataclass(frozen=True)
class Trained:
    """What training wrote down of its rendering (rendering.json)."""

    equipment: Equipment
    golden: dict[str, Any]
    labels: list[str] | None
    created: int
    again: str
    """What to do where it does not hold."""

    @classmethod
    def read(cls, file: Path, again: str) -> Trained:
        """Raises:
        EndpointError: it lacks what it should say.
        """
        rendering = read_json(file)
        try:
            equipment = Equipment(**{field.name: rendering[field.name] for field in fields(Equipment)})
            golden = {key: rendering[key] for key in ("golden", "template_sha256")}
            golden["tokenizer_files"] = rendering.get("tokenizer_files", {})
            labels: list[str] | None = rendering["labels"]
            if not golden["golden"] and rendering["task"] != "pretraining":
                raise EndpointError(f"{file}: no golden conversation to compare with; {again}")
        except KeyError as error:
            raise EndpointError(f"{file}: {error} is missing; {again}") from None
        return cls(equipment, golden, labels, int(file.stat().st_mtime), again)

    def check(self, tokenizer: Any, where: str, folder: Path | None = None) -> None:
        """Refuse a tokenizer that would give the model other ids than it was trained on.

        Args:
            folder: where it was read from, if that is the packaged model or a copy of it.
        """
        if not tokenizer.chat_template:
            raise EndpointError(f"{where}: the tokenizer has no chat template, and training had one; {self.again}")
        if found := chat.differences(tokenizer, self.golden, folder):
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise EndpointError(f"{where}: renders otherwise than in training: {found[0]}{more}; {self.again}")


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


def _shapes(ask: Ask) -> list[Shape]:
    """What has a say in which token comes next, the grammar last."""
    shapes: list[Shape] = []
    if ask.logit_bias or ask.frequency_penalty or ask.presence_penalty:
        shapes.append(functools.partial(_biased, ask))
    if ask.guide is not None:
        shapes.append(ask.guide.fresh())
    return shapes


def _biased(ask: Ask, logits_V: Any, said: Sequence[int]) -> Any:
    """OpenAI's formula: each token's bias, less a penalty for having been said, and one for each time."""
    import torch

    biased_V = logits_V.clone()
    for token, bias in ask.logit_bias.items():
        biased_V[token] += bias
    if said:
        counts_V = torch.bincount(torch.tensor(said), minlength=len(logits_V))
        biased_V -= counts_V * ask.frequency_penalty + (counts_V > 0) * ask.presence_penalty
    return biased_V


def _mean_logprob(answer: Sequence[Piece | End]) -> float:
    logprobs = [token.logprob for event in answer if isinstance(event, Piece) for token in event.tokens]
    return math.fsum(logprobs) / len(logprobs) if logprobs else -math.inf


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
