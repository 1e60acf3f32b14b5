"""One rendering: the only code that turns messages into token ids and a loss mask.

Training, evaluation, the packaged model and the endpoint all render here, so what is served is what was trained.

How a conversation becomes ids. The chat template is rendered to text turn by turn. The text is cut into segments:
what the assistant says in a turn, up to and including its end-of-turn token, is one segment (the target); everything
between is another. Each segment is tokenised on its own. So the ids of a prompt are always the beginning of the ids
of the same prompt with its answer, whatever the tokeniser likes to merge, and the loss covers the assistant's words
and the token that ends its turn, nothing else.

What is not covered: images, audio, tools.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tunewright.errors import DataError, ModelError

ROLES = ("system", "user", "assistant", "developer", "tool")

DEFAULT_TEMPLATE = (
    "{{- BOS -}}"
    "{%- for message in messages -%}"
    "{{- message['role'] | capitalize + ':\\n' + message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}"
    "{{- '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:\\n' -}}{%- endif -%}"
)
"""For tokenizers without a template. Every header ends in a line break, where ordinary tokenizers do not merge."""

END_OF_TURN = "<|end_of_turn|>"
"""Added to tokenizers that have no end-of-sequence token at all."""


@dataclass(frozen=True)
class Message:
    role: str
    content: str
    weight: int = 1
    """0: an assistant's turn that is shown but not learnt from (OpenAI's `weight`)."""

    def to_dict(self) -> dict[str, str]:
        """As templates and endpoints take it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Example:
    """One row of a data set: a conversation to learn from, or a piece of text.

    `label` is the class where there is one; it is also what the last message says.
    """

    id: str
    source: str
    """file:line, or data set and row: where a person finds it."""
    messages: tuple[Message, ...] = ()
    label: str | None = None
    text: str | None = None
    """For pretraining; then there are no messages."""
    ends: bool = True
    """Pretraining: the text is the end of a document, so an end-of-sequence token follows."""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """What comes before the answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1].content if self.messages else ""

    def to_dict(self) -> dict[str, Any]:
        row: dict[str, Any] = {"id": self.id, "source": self.source}
        if self.text is not None:
            return {**row, "text": self.text, "ends": self.ends}
        row["messages"] = [message.to_dict() | ({} if message.weight else {"weight": 0}) for message in self.messages]
        return {**row, "label": self.label} if self.label is not None else row

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Example:
        messages = tuple(Message(one["role"], one["content"], one.get("weight", 1)) for one in row.get("messages", ()))
        return cls(row["id"], row["source"], messages, row.get("label"), row.get("text"), row.get("ends", True))


@dataclass(frozen=True)
class Rendering:
    """Token ids and, for each, whether there is a loss on it."""

    ids: list[int]
    mask: list[bool]

    @property
    def num_targets(self) -> int:
        return sum(self.mask)


@dataclass(frozen=True)
class Equipment:
    """What `equip` settled for a tokenizer."""

    template: Literal["own", "default"]
    end_of_turn: str
    end_of_turn_id: int
    stop_ids: list[int]
    pad_id: int
    added_tokens: list[str] = field(default_factory=list)
    """Tokens that the base has no embedding for; the model grows by them and trains them."""

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def equip(tokenizer: Any) -> Equipment:
    """Give a tokenizer what fine-tuning needs and it lacks: a chat template, an end of turn, a pad token.

    Changes the tokenizer in place; calling it again changes nothing.

    Raises:
        ModelError: the tokenizer's own template does not put an assistant's answer into the text.
    """
    added = []
    if tokenizer.eos_token is None:
        if END_OF_TURN not in tokenizer.get_vocab():
            added.append(END_OF_TURN)
        tokenizer.add_special_tokens({"eos_token": END_OF_TURN})
    own = tokenizer.chat_template is not None and "{{- BOS -}}" not in tokenizer.chat_template
    kind: Literal["own", "default"] = "own"
    if tokenizer.chat_template is None:
        begins_with_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [
            tokenizer.bos_token_id
        ]
        bos = "{{- bos_token -}}" if begins_with_bos else ""
        tokenizer.chat_template = DEFAULT_TEMPLATE.replace("{{- BOS -}}", bos)
        own = False
    if not own or tokenizer.chat_template in _defaults():
        kind = "default"
    if tokenizer.pad_token is None:
        # Batches are masked by length, never by comparing ids with the pad token, so sharing is harmless here.
        tokenizer.pad_token = tokenizer.eos_token
    end = _end_of_turn(tokenizer)
    end_id = tokenizer.convert_tokens_to_ids(end)
    stops = sorted({end_id, tokenizer.eos_token_id})
    return Equipment(kind, end, end_id, stops, tokenizer.pad_token_id, added)


def check_messages(messages: Sequence[Message], where: str) -> None:
    """Refuse a conversation that training cannot learn from.

    Raises:
        DataError: naming the row and the message.
    """
    if not messages:
        raise DataError(f"{where}: `messages` is empty; training needs at least a user and an assistant message")
    for number, message in enumerate(messages, start=1):
        if message.role not in ROLES:
            raise DataError(f"{where}: message {number}: unknown role {message.role!r}; known: {', '.join(ROLES)}")
    if messages[-1].role != "assistant":
        raise DataError(
            f"{where}: the last message is from {messages[-1].role!r}; training needs one from 'assistant' to learn "
            "from"
        )


def render(tokenizer: Any, messages: Sequence[Message]) -> Rendering:
    """Ids and loss mask of a whole conversation. The loss is on every assistant turn of weight 1.

    Where the template rewrites earlier turns once a later one is there (some drop earlier reasoning), the loss is on
    the last turn alone.

    Raises:
        DataError: the template refuses the conversation, or does not put the answer into the text.
    """
    ids: list[int] = []
    mask: list[bool] = []
    for text, target in segments(tokenizer, messages):
        piece = encode(tokenizer, text)
        ids += piece
        mask += [target] * len(piece)
    return Rendering(ids, mask)


def render_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation that the assistant is to continue: what an endpoint feeds the model."""
    pieces = segments(tokenizer, messages, add_generation_prompt=True)
    return [token for text, _ in pieces for token in encode(tokenizer, text)]


def render_answer(tokenizer: Any, equipment: Equipment, answer: str) -> list[int]:
    """Ids of an answer and its end of turn, as they stand behind any prompt."""
    probe = (Message("user", "a"), Message("assistant", answer))
    *_, (text, _target) = (piece for piece in segments(tokenizer, probe) if piece[1])
    ids = encode(tokenizer, text)
    if ids[-1] != equipment.end_of_turn_id:
        raise ModelError(f"the end of turn {equipment.end_of_turn!r} is not one token at the end of {text!r}")
    return ids


def render_text(tokenizer: Any, text: str, *, ends: bool) -> Rendering:
    """Ids of a piece of plain text, with loss on all; the end-of-sequence token follows where a document ends."""
    ids = encode(tokenizer, text)
    if ends:
        ids.append(tokenizer.eos_token_id)
    return Rendering(ids, [True] * len(ids))


def segments(
    tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> list[tuple[str, bool]]:
    """The conversation's text in pieces; True marks what an assistant says to be learnt, up to its end of turn."""
    whole = _text(tokenizer, messages, add_generation_prompt)
    turns = [number for number, message in enumerate(messages) if message.role == "assistant"]
    pieces: list[tuple[str, bool]] = []
    position = 0
    for number in turns:
        before = _text(tokenizer, messages[:number], True) if number else ""
        after = _text(tokenizer, messages[: number + 1], False)
        if not (after.startswith(before) and whole.startswith(after) and len(before) >= position):
            if number != turns[-1]:
                continue  # rewritten later: no loss on this turn
            raise DataError(
                "the chat template does not render an assistant turn as a continuation of its prompt, so training "
                "and serving would differ; set another chat template in the tokenizer"
            )
        turn = after[len(before) :]
        said = messages[number].content.strip()
        if said and said not in turn:
            raise DataError(f"the chat template drops or changes what the assistant says in message {number + 1}")
        end = _turn_end(tokenizer, turn)
        target = turn[:end] if end else turn.rstrip("\n") + tokenizer.eos_token
        if before[position:]:
            pieces.append((before[position:], False))
        pieces.append((target, bool(messages[number].weight)))
        position = len(before) + (end or len(turn))
    if (add_generation_prompt and whole[position:]) or (turns and turns[-1] != len(messages) - 1 and whole[position:]):
        pieces.append((whole[position:], False))
    elif not turns:
        pieces.append((whole, False))
    return pieces


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of one segment; the template has written every special token that belongs there."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


@dataclass(frozen=True)
class Clipped:
    """An example made to fit; `example` is None where even an empty prompt is too long."""

    example: Example | None
    length: int
    """Tokens before anything was cut."""
    rendering: Rendering


def clip(tokenizer: Any, example: Example, max_length: int) -> Clipped:
    """The example within `max_length` tokens: the longest prompt messages lose their ends, no answer loses a token."""
    whole = render(tokenizer, example.messages)
    if len(whole.ids) <= max_length:
        return Clipped(example, len(whole.ids), whole)
    messages = list(example.messages)
    tokens = {
        number: encode(tokenizer, message.content)
        for number, message in enumerate(messages[:-1])
        if message.role != "assistant"
    }
    rendering, over = whole, len(whole.ids) - max_length
    while over > 0:
        if over > sum(map(len, tokens.values())):
            return Clipped(None, len(whole.ids), whole)
        while over > 0:
            longest = max(tokens, key=lambda number: len(tokens[number]))
            others = [len(ids) for number, ids in tokens.items() if number != longest]
            drop = min(over, max(1, len(tokens[longest]) - max(others, default=0)))
            tokens[longest] = tokens[longest][: len(tokens[longest]) - drop]
            over -= drop
            shorter = tokenizer.decode(tokens[longest]).rstrip("\N{REPLACEMENT CHARACTER}")
            messages[longest] = replace(messages[longest], content=shorter)
        rendering = render(tokenizer, messages)
        over = len(rendering.ids) - max_length
    return Clipped(replace(example, messages=tuple(messages)), len(whole.ids), rendering)


def golden(tokenizer: Any, equipment: Equipment, conversations: Sequence[Sequence[Message]]) -> dict[str, Any]:
    """What was trained on, in ids: written to rendering.json, compared by whoever serves the model."""
    rows = []
    for messages in conversations:
        rendering = render(tokenizer, messages)
        rows.append(
            {
                "messages": [message.to_dict() for message in messages],
                "ids": rendering.ids,
                "mask": [int(flag) for flag in rendering.mask],
                "prompt_ids": render_prompt(tokenizer, messages[:-1]),
            }
        )
    template: str = tokenizer.chat_template
    return {
        "format": 1,
        "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        **equipment.to_dict(),
        "golden": rows,
    }


def differences(tokenizer: Any, rendering: dict[str, Any]) -> list[str]:
    """Where a tokenizer renders the golden conversations otherwise; empty when it renders them all the same.

    Each difference names the conversation and the first token that differs.
    """
    found = []
    for number, row in enumerate(rendering["golden"], start=1):
        messages = [Message(one["role"], one["content"]) for one in row["messages"]]
        try:
            served = {"prompt_ids": render_prompt(tokenizer, messages[:-1]), "ids": render(tokenizer, messages).ids}
        except DataError as error:
            found.append(f"golden conversation {number}: {error}")
            continue
        for key, ids in served.items():
            if ids == row[key]:
                continue
            at = next(
                (place for place, (one, other) in enumerate(zip(ids, row[key], strict=False)) if one != other),
                min(len(ids), len(row[key])),
            )
            here, there = (
                tokenizer.decode(each[at : at + 1]) if at < len(each) else "(nothing)" for each in (ids, row[key])
            )
            found.append(
                f"golden conversation {number} ({messages[-1].role}: {messages[-1].content[:40]!r}): token {at + 1} "
                f"is {here!r} here and was {there!r} in training"
            )
            break
    return found


def _text(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    plain = [message.to_dict() for message in messages]
    try:
        text: str = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        roles = ", ".join(message.role for message in messages)
        raise DataError(f"the chat template refuses this conversation ({roles}): {error}") from None
    return text


def _turn_end(tokenizer: Any, turn: str) -> int | None:
    """Where the end-of-turn token ends in a turn's text; None where the template writes none."""
    special = [token for token in {*tokenizer.all_special_tokens, *_added_specials(tokenizer)} if token]
    ends = [turn.rfind(token) + len(token) for token in special if token in turn]
    best = max(ends, default=None)
    return best if best is not None and not turn[best:].strip() else None


def _added_specials(tokenizer: Any) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def _end_of_turn(tokenizer: Any) -> str:
    """The token that ends an assistant's turn under this tokenizer's template."""
    pieces = segments(tokenizer, (Message("user", "a"), Message("assistant", "b")))
    target = next((text for text, is_target in pieces if is_target), None)
    if target is None or "b" not in target:
        raise ModelError("the tokenizer's chat template drops the assistant's answer; set another one")
    return target[target.rindex("b") + 1 :].strip() or str(tokenizer.eos_token)


def _defaults() -> set[str]:
    return {DEFAULT_TEMPLATE.replace("{{- BOS -}}", bos) for bos in ("", "{{- bos_token -}}")}
