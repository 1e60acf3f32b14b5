"""From tokens to an answer: what is shown, when, and why it ended.

A stop string may straddle tokens, so text that may be the beginning of one is held back until it is clear. A token is
shown together with the text that it begins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from tunewright.generate import Token

if TYPE_CHECKING:
    from tunewright.endpoint.guide import Guide
    from tunewright.endpoint.tools import Toolbox

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Ask:
    """One request to the model, checked."""

    prompt: list[int]
    max_tokens: int | None = None
    temperature: float | None = None
    """None where the request does not say: greedy for a classifier, 1 for text."""
    top_p: float = 1.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    num_top: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """What is added to the logits of some token ids."""
    guide: Guide | None = None
    """What the answer is held to."""
    toolbox: Toolbox | None = None
    """Functions that the answer may call; calls are read out of its text."""

    @property
    def is_plain(self) -> bool:
        """Whether nothing but temperature and top_p has a say in which token comes."""
        shaped = self.frequency_penalty or self.presence_penalty or self.logit_bias
        return not shaped and self.guide is None and self.toolbox is None


@dataclass(frozen=True)
class Piece:
    """What one generated token lets through: often its own text, sometimes nothing yet."""

    text: str
    tokens: list[Token] = field(default_factory=list)


@dataclass(frozen=True)
class Call:
    """A whole call of a function."""

    id: str
    name: str
    arguments: str
    """A JSON object, as text."""


@dataclass(frozen=True)
class End:
    """An answer is complete."""

    finish_reason: FinishReason
    num_tokens: int
    """Generated tokens without the end of turn, those behind a stop string's beginning included."""


def cut(tokens: Iterable[Token], stop: Sequence[str], stop_ids: Sequence[int]) -> Iterator[Piece | End]:
    """The pieces of an answer, then its end. There is one piece for each token, so that a caller can stop between."""
    gate = Holdback(stop)
    waiting: deque[tuple[int, list[Token]]] = deque()  # tokens not shown yet, with where their text begins
    group: list[Token] = []  # tokens of a character that is not complete yet
    said = shown = num_tokens = 0
    finish_reason: FinishReason = "length"
    for token in tokens:
        if token.id in stop_ids:
            finish_reason = "stop"
            break
        num_tokens += 1
        group.append(token)
        text = ""
        if token.text:
            waiting.append((said, group))
            group = []
            said += len(token.text)
            text = gate.push(token.text)
        shown += len(text)
        yield Piece(text, _begun(waiting, shown))
        if gate.stopped:
            finish_reason = "stop"
            break
    text = gate.flush()
    rest = _begun(waiting, shown + len(text))
    if not gate.stopped:
        rest += group
    if text or rest:
        yield Piece(text, rest)
    yield End(finish_reason, num_tokens)


class Holdback:
    """Lets text through up to the first stop string, however the text is cut into pieces.

    The first stop string is the one that is complete first; of two that are complete at once, the longer.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stopped = False
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str) -> str:
        """The text that can be shown now. Nothing may be pushed once `stopped` is set."""
        held = self._held + text
        found = [(at + len(stop), at) for stop in self._stop if (at := held.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return held[: min(found)[1]]
        keep = max((overlap(held, stop) for stop in self._stop), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back for a stop string that did not come."""
        held, self._held = self._held, ""
        return held


def _begun(waiting: deque[tuple[int, list[Token]]], shown: int) -> list[Token]:
    """Take the tokens whose text has begun to be shown."""
    tokens: list[Token] = []
    while waiting and waiting[0][0] < shown:
        tokens += waiting.popleft()[1]
    return tokens


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, shorter than `stop` itself."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
