"""One rendering: the only code that turns messages into token ids and a loss mask.

Training, evaluation, the packaged model and the endpoint all render here, so what is served is what was trained.

How a conversation becomes ids. The chat template is rendered to text turn by turn. The text is cut into segments:
what the assistant says in a turn, up to and including its end-of-turn token, is one segment (the target); everything
between is another. Each segment is tokenised on its own. So the ids of a prompt are always the beginning of the ids
of the same prompt with its answer, whatever the tokeniser likes to merge, and the loss covers the assistant's words
and the token that ends its turn, nothing else.

Tools that a row declares, calls of tools and what tools answered are rendered by the template, as Transformers hands
them over: `tools` as JSON schemas, a call's arguments as an object. The loss covers a call as it covers words. A
template that would leave any of it out is refused, for a model cannot learn to call what it is not shown.

What is not covered: images, audio; reading calls out of generated text.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tunewright.errors import DataError, ModelError

ROLES = ("system", "user", "assistant", "developer", "tool")

DEFAULT_TEMPLATE = (
    "{{- BOS -}}"
    "{%- if tools -%}{{- 'Tools:\\n' -}}"
    "{%- for tool in tools -%}{{- tool | tojson + '\\n' -}}{%- endfor -%}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- message['role'] | capitalize + ':\\n' + message['content'] -}}"
    "{%- for call in message['tool_calls'] or [] -%}"
    "{{- '\\n' if message['content'] or not loop.first -}}"
    "{{- 'Call: ' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson -}}"
    "{%- endfor -%}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}"
    "{{- '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:\\n' -}}{%- endif -%}"
)
"""For tokenizers without a template. Every header ends in a line break, where ordinary tokenizers do not merge.

Tools stand first, one JSON schema a line under `Tools:`; each call is a line of the assistant's turn, `Call: ` and JSON
with name and arguments; what a tool answered stands under `Tool:`."""

PLAIN = {"role", "content"}
"""What a message says that has no more to say than these."""

END_OF_TURN = "<|end_of_turn|>"
"""Added to tokenizers that have no end-of-sequence token at all."""

Text = Callable[[Sequence["Message"], bool], str]
"""What the template writes for some messages, and whether an assistant's header follows."""

TODAY = datetime.datetime(2024, 7, 26)
"""What a template that writes the date writes, so that tomorrow's prompts are those of training. It is what Llama 3's
template takes where there is no clock."""


@dataclass(frozen=True)
class ToolCall:
    """A call of a function that an assistant makes."""

    name: str
    arguments: str
    """A JSON object, as text."""
    id: str | None = None
    """What the tool's message names as `tool_call_id`."""

    def to_dict(self) -> dict[str, Any]:
        """As OpenAI's endpoints take it."""
        return self._form(self.arguments)

    def for_template(self) -> dict[str, Any]:
        """As templates take it: the arguments are an object."""
        return self._form(json.loads(self.arguments))

    def _form(self, arguments: Any) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": self.name, "arguments": arguments}}
        return call if self.id is None else {"id": self.id, **call}


@dataclass(frozen=True)
class Message:
    role: str
    content: str
    """Empty where an assistant only calls tools."""
    weight: int = 1
    """0: an assistant's turn that is shown but not learnt from (OpenAI's `weight`)."""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    """Of a tool's message: the call that it answers."""
    name: str | None = None
    """Of a tool's message: the function."""

    def to_dict(self) -> dict[str, Any]:
        """As endpoints take it."""
        row: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            row |= {"content": self.content or None, "tool_calls": [call.to_dict() for call in self.tool_calls]}
        return row | self._answers()

    def for_template(self) -> dict[str, Any]:
        """As templates take it. Content is always text, for many templates write null as a word."""
        row: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            row["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return row | self._answers()

    def _answers(self) -> dict[str, str]:
        return {key: value for key in ("tool_call_id", "name") if (value := getattr(self, key)) is not None}

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Message:
        """What `to_dict` wrote, and with `weight` what `Example.to_dict` did."""
        calls = tuple(
            ToolCall(call["function"]["name"], call["function"]["arguments"], call.get("id"))
            for call in row.get("tool_calls") or ()
        )
        content = row["content"] or ""
        return cls(row["role"], content, row.get("weight", 1), calls, row.get("tool_call_id"), row.get("name"))


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
    tools: tuple[dict[str, Any], ...] = ()
    """Functions that the assistant may call: OpenAI's `tools`."""
    rejected: str | None = None
    """Preference: the worse answer; the last message is the better one."""
    item: dict[str, Any] | None = None
    """Reward: the row, for the grader; then the messages are a prompt without an answer."""
    slices: dict[str, str] | None = None
    """Columns that the recipe has the verdict sliced by: column -> this row's value."""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """What comes before the answer."""
        return self.messages if self.item is not None else self.messages[:-1]

    @property
    def answer(self) -> str:
        """What the last message says, and the calls that it makes as lines of JSON."""
        if not self.messages or self.item is not None:
            return ""
        last = self.messages[-1]
        return "\n".join(
            [*([last.content] if last.content or not last.tool_calls else []), *map(tool_line, last.tool_calls)]
        )

    def sha256(self) -> str:
        """Of what the row says, wherever it stands."""
        said = {key: value for key, value in self.to_dict().items() if key not in ("id", "source", "slices")}
        return hashlib.sha256(
            json.dumps(said, sort_keys=True, ensure_ascii=False).encode(errors="surrogatepass")
        ).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        row: dict[str, Any] = {"id": self.id, "source": self.source}
        if self.slices is not None:
            row["slices"] = self.slices
        if self.text is not None:
            return {**row, "text": self.text, "ends": self.ends}
        row["messages"] = [message.to_dict() | ({} if message.weight else {"weight": 0}) for message in self.messages]
        extra = {
            "tools": list(self.tools) or None,
            "label": self.label,
            "rejected": self.rejected,
            "item": self.item,
        }
        return row | {key: value for key, value in extra.items() if value is not None}

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Example:
        return cls(
            row["id"],
            row["source"],
            tuple(map(Message.from_dict, row.get("messages", ()))),
            row.get("label"),
            row.get("text"),
            row.get("ends", True),
            tuple(row.get("tools", ())),
            row.get("rejected"),
            row.get("item"),
            row.get("slices"),
        )


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
    """Tokens of ours, which the base had no embedding for; the model grows by them and trains them."""

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def equip(tokenizer: Any) -> Equipment:
    """Give a tokenizer what fine-tuning needs and it lacks: a chat template, an end of turn, a pad token.

    Changes the tokenizer in place; calling it again changes nothing.

    Raises:
        ModelError: the tokenizer's own template does not put an assistant's answer into the text.
    """
    if tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": END_OF_TURN})
    if tokenizer.chat_template is None:
        begins_with_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [
            tokenizer.bos_token_id
        ]
        tokenizer.chat_template = DEFAULT_TEMPLATE.replace(
            "{{- BOS -}}", "{{- bos_token -}}" if begins_with_bos else ""
        )
    try:
        tokenizer.chat_template = _without_clock(tokenizer.get_chat_template())  # of several, the one called default
    except ValueError as error:
        raise ModelError(f"the tokenizer's chat template: {error}") from None
    if tokenizer.pad_token is None:
        # Batches are masked by length, never by comparing ids with the pad token, so sharing is harmless here.
        tokenizer.pad_token = tokenizer.eos_token
    end, end_id = _end_of_turn(tokenizer)
    return Equipment(
        template="default" if tokenizer.chat_template in _defaults() else "own",
        end_of_turn=end,
        end_of_turn_id=end_id,
        stop_ids=sorted({end_id, tokenizer.eos_token_id}),
        pad_id=tokenizer.pad_token_id,
        added_tokens=[END_OF_TURN] if tokenizer.eos_token == END_OF_TURN else [],
    )


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
    _check_calls(messages, where)
    if messages[-1].role != "assistant":
        raise DataError(
            f"{where}: the last message is from {messages[-1].role!r}; training needs one from 'assistant' to learn "
            "from"
        )
    if len(messages) == 1:
        raise DataError(f"{where}: there is nothing before the assistant's message; training needs a user's to answer")


def _check_calls(messages: Sequence[Message], where: str) -> None:
    """Every tool's message answers a call of the assistant's message before it, and every call but those of the last
    message is answered before the conversation goes on."""
    waiting: list[str | None] = []
    for number, message in enumerate(messages, start=1):
        here = f"{where}: message {number}"
        if message.role == "tool":
            if message.tool_call_id not in waiting:
                made = f"; calls without an answer: {', '.join(map(repr, waiting))}" if waiting else ""
                raise DataError(f"{here}: tool_call_id {message.tool_call_id!r} answers no call before it{made}")
            waiting.remove(message.tool_call_id)
            continue
        if waiting:
            raise DataError(
                f"{here} ({message.role}) stands where the call {waiting[0]!r} needs its answer: a message of role "
                "'tool' with that tool_call_id"
            )
        if message.tool_calls and message.role != "assistant":
            raise DataError(f"{here} ({message.role}) has tool_calls; only an assistant calls tools")
        waiting = [call.id for call in message.tool_calls]
        if len(set(waiting)) < len(waiting) and set(waiting) != {None}:
            raise DataError(f"{here}: two of its tool_calls have one id; answers could not be told apart")


def render(tokenizer: Any, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> Rendering:
    """Ids and loss mask of a whole conversation. The loss is on every assistant turn of weight 1.

    Where the template rewrites earlier turns once a later one is there (some drop earlier reasoning), the loss is on
    the last turn alone.

    Raises:
        DataError: the template refuses the conversation, or does not put the answer, the tools, a call of one or what
            it answered into the text.
    """
    ids: list[int] = []
    mask: list[bool] = []
    pieces = segments(tokenizer, messages, tools)
    for piece, (_, target) in zip(_encode_each(tokenizer, pieces), pieces, strict=True):
        ids += piece
        mask += [target] * len(piece)
    return Rendering(ids, mask)


def render_all(
    tokenizer: Any, conversations: Sequence[Sequence[Message]], tools: Sequence[Sequence[dict[str, Any]]] | None = None
) -> list[Rendering | DataError]:
    """`render` for a block of conversations: the same ids, with few calls of the template and one of the tokenizer.

    Where a conversation cannot be rendered, the error that `render` raises stands in its place. Those with tools or
    calls of them go to `render` one by one.
    """
    has_tools = [bool(one) for one in tools] if tools is not None else [False] * len(conversations)
    by_themselves = [
        its or any(message.role == "tool" or message.tool_calls for message in messages)
        for its, messages in zip(has_tools, conversations, strict=True)
    ]
    plain = [messages for messages, alone in zip(conversations, by_themselves, strict=True) if not alone]
    rendered = iter(_render_plain(tokenizer, plain))
    return [
        _render_or_error(tokenizer, messages, tools[place] if tools is not None else ()) if alone else next(rendered)
        for place, (messages, alone) in enumerate(zip(conversations, by_themselves, strict=True))
    ]


def _render_or_error(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
) -> Rendering | DataError:
    try:
        return render(tokenizer, messages, tools)
    except DataError as error:
        return error


def _render_plain(tokenizer: Any, conversations: Sequence[Sequence[Message]]) -> list[Rendering | DataError]:
    pieces: list[list[tuple[str, bool]] | DataError] = []
    for messages, text in zip(conversations, _texts(tokenizer, conversations), strict=True):
        try:
            pieces.append(segments(tokenizer, messages, text=text))
        except DataError as error:
            pieces.append(error)
    ids = iter(encode_all(tokenizer, [text for one in pieces if isinstance(one, list) for text, _ in one]))
    rendered: list[Rendering | DataError] = []
    for one in pieces:
        if isinstance(one, DataError):
            rendered.append(one)
            continue
        rendering = Rendering([], [])
        for _, target in one:
            piece = next(ids)
            rendering.ids.extend(piece)
            rendering.mask.extend([target] * len(piece))
        rendered.append(rendering)
    return rendered


def render_prompt(tokenizer: Any, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
    """Ids of a conversation that the assistant is to continue: what an endpoint feeds the model."""
    pieces = segments(tokenizer, messages, tools, add_generation_prompt=True)
    return [token for piece in _encode_each(tokenizer, pieces) for token in piece]


@dataclass(frozen=True)
class Pair:
    """A prompt's ids, and those of two answers to it, each with its end of turn."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    def renderings(self) -> tuple[Rendering, Rendering]:
        """The prompt with each answer, with the loss on the answer alone."""
        before = [False] * len(self.prompt)
        chosen, rejected = (
            Rendering(self.prompt + answer, before + [True] * len(answer)) for answer in (self.chosen, self.rejected)
        )
        return chosen, rejected


def render_pair(tokenizer: Any, example: Example) -> Pair:
    """Ids of a prompt and of the better and the worse answer behind it.

    Raises:
        DataError: the template renders the prompt otherwise once an answer follows.
    """
    prompt = render_prompt(tokenizer, example.prompt)
    answers = []
    for said in (example.answer, str(example.rejected)):
        ids = render(tokenizer, (*example.prompt, Message("assistant", said))).ids
        if ids[: len(prompt)] != prompt:
            raise DataError("the chat template renders the prompt otherwise once an answer follows it")
        answers.append(ids[len(prompt) :])
    return Pair(prompt, *answers)


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
    return _plain(tokenizer, encode(tokenizer, text), ends)


def render_texts(tokenizer: Any, texts: Sequence[str], ends: Sequence[bool]) -> list[Rendering]:
    """`render_text` for a block of texts."""
    encoded = zip(encode_all(tokenizer, texts), ends, strict=True)
    return [_plain(tokenizer, ids, document_ends) for ids, document_ends in encoded]


def _plain(tokenizer: Any, ids: list[int], ends: bool) -> Rendering:
    if ends:
        ids.append(tokenizer.eos_token_id)
    return Rendering(ids, [True] * len(ids))


def segments(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] = (),
    *,
    add_generation_prompt: bool = False,
    text: Text | None = None,
) -> list[tuple[str, bool]]:
    """The conversation's text in pieces; True marks what an assistant says to be learnt, up to its end of turn.

    `text` gives what the template writes for the conversation's beginnings, where that is known already.
    """
    if text is None:

        def text(messages: Sequence[Message], add_generation_prompt: bool) -> str:
            return _text(tokenizer, messages, tools, add_generation_prompt)

    whole = text(messages, add_generation_prompt)
    _refuse_losses(tokenizer, messages, tools, add_generation_prompt, whole)
    last = len(messages) - 1
    pieces: list[tuple[str, bool]] = []
    position = 0
    for number, message in enumerate(messages):
        if message.role != "assistant":
            continue
        is_end = number == last and not add_generation_prompt
        before = text(messages[:number], True) if number else _greeting(tokenizer, tools)
        after = whole if is_end else text(messages[: number + 1], False)
        if not (after.startswith(before) and whole.startswith(after) and len(before) >= position):
            if not is_end:
                continue  # rewritten later: no loss on this turn
            raise DataError(
                "the chat template does not render an assistant turn as a continuation of its prompt, so training "
                "and serving would differ; set another chat template in the tokenizer"
            )
        turn = after[len(before) :]
        said = message.content.strip()
        if said and said not in turn:
            raise DataError(f"the chat template drops or changes what the assistant says in message {number + 1}")
        end = _turn_end(tokenizer, turn)
        target = turn[:end] if end else _without_tail(turn, message) + tokenizer.eos_token
        if before[position:]:
            pieces.append((before[position:], False))
        pieces.append((target, bool(message.weight)))
        position = len(before) + (end or len(turn))
    if whole[position:] and (add_generation_prompt or messages[last].role != "assistant"):
        pieces.append((whole[position:], False))
    return pieces


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of one segment; the template has written every special token that belongs there."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def encode_all(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """`encode` for many texts. Threads may call it side by side: the Rust tokenizer lets go of the interpreter's lock.

    The Rust tokenizer is asked without the places of tokens in the text, which takes a fifth of the time and which
    nobody here wants, unless the tokenizer has ways of its own or was told to cut, to pad or to split.
    """
    from transformers import PreTrainedTokenizerFast

    if not texts:
        return []
    rust = getattr(tokenizer, "backend_tokenizer", None)
    if (
        rust is None
        or type(tokenizer)._encode_plus is not PreTrainedTokenizerFast._encode_plus
        or type(tokenizer).__call__ is not PreTrainedTokenizerFast.__call__
        or rust.truncation is not None
        or rust.padding is not None
        or rust.encode_special_tokens != tokenizer.split_special_tokens
    ):
        ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
        return ids
    return [encoding.ids for encoding in rust.encode_batch_fast(list(texts), add_special_tokens=False)]


def _encode_each(tokenizer: Any, pieces: Sequence[tuple[str, bool]]) -> list[list[int]]:
    """Each segment's ids by itself, in one call, since a call takes longer than a short text."""
    texts = [text for text, _ in pieces]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []
    return ids


@dataclass(frozen=True)
class Clipped:
    """An example made to fit; `example` is None where even an empty prompt is too long."""

    example: Example | None
    length: int
    """Tokens before anything was cut."""
    rendering: Rendering
    cut: int = 0
    """Tokens of the prompt that were cut."""


def clip(tokenizer: Any, example: Example, max_length: int) -> Clipped:
    """The example within `max_length` tokens: the longest prompt messages lose their ends, no answer loses a token.

    Of a pair, the prompt with the longer answer is within; its rendering holds both answers. Of a prompt without an
    answer, the prompt is.
    """
    if example.rejected is not None:
        return _clip_pair(tokenizer, example, max_length)
    return _clip(tokenizer, example, max_length, _whole(tokenizer, example, example.messages))


def clip_all(tokenizer: Any, examples: Sequence[Example], max_lengths: Sequence[int]) -> list[Clipped | DataError]:
    """`clip` for a block of examples, each with its own limit; errors of `render` stand in their places."""
    usual = [example for example in examples if example.rejected is None and example.item is None]
    rendered = iter(render_all(tokenizer, [one.messages for one in usual], [one.tools for one in usual]))
    clipped: list[Clipped | DataError] = []
    for example, max_length in zip(examples, max_lengths, strict=True):
        try:
            if example.rejected is None and example.item is None:
                whole = next(rendered)
                clipped.append(whole if isinstance(whole, DataError) else _clip(tokenizer, example, max_length, whole))
            else:
                clipped.append(clip(tokenizer, example, max_length))
        except DataError as error:  # the template refuses it, or what is left of it
            clipped.append(error)
    return clipped


def _clip(tokenizer: Any, example: Example, max_length: int, whole: Rendering) -> Clipped:
    """`clip`, with the rendering of all that there is."""
    if len(whole.ids) <= max_length:
        return Clipped(example, len(whole.ids), whole)
    messages = list(example.messages)
    starts = {
        number: _starts(tokenizer, message.content)
        for number, message in enumerate(example.prompt)
        if message.role != "assistant"
    }
    rendering = whole
    while (over := len(rendering.ids) - max_length) > 0:
        if not any(starts.values()):
            return Clipped(None, len(whole.ids), whole)
        for number, end in _shorten(starts, over).items():
            messages[number] = replace(messages[number], content=messages[number].content[:end])
        rendering = _whole(tokenizer, example, messages)
    cut = len(whole.ids) - len(rendering.ids)
    return Clipped(replace(example, messages=tuple(messages)), len(whole.ids), rendering, cut)


def _whole(tokenizer: Any, example: Example, messages: Sequence[Message]) -> Rendering:
    """The rendering of an example's messages: a conversation, or a prompt that nothing is learnt from."""
    if example.item is None:
        return render(tokenizer, messages, example.tools)
    ids = render_prompt(tokenizer, messages, example.tools)
    return Rendering(ids, [False] * len(ids))


def _clip_pair(tokenizer: Any, example: Example, max_length: int) -> Clipped:
    """The pair with its prompt cut so far that the longer answer fits behind it."""
    pair = render_pair(tokenizer, example)
    chosen, rejected = example.answer, str(example.rejected)
    longer = chosen if len(pair.chosen) >= len(pair.rejected) else rejected
    alone = replace(example, messages=(*example.prompt, Message("assistant", longer)), rejected=None)
    clipped = clip(tokenizer, alone, max_length)
    if clipped.example is None:
        return clipped
    fitted = replace(clipped.example, messages=(*clipped.example.prompt, example.messages[-1]), rejected=rejected)
    pair = render_pair(tokenizer, fitted)
    one, other = pair.renderings()
    return Clipped(fitted, clipped.length, Rendering(one.ids + other.ids, one.mask + other.mask), clipped.cut)


def golden(
    tokenizer: Any, equipment: Equipment, conversations: Sequence[Sequence[Message] | Example]
) -> dict[str, Any]:
    """What was trained on, in ids: written to rendering.json, compared by whoever serves the model."""
    rows = []
    for one in conversations:
        messages, tools = (one.messages, one.tools) if isinstance(one, Example) else (one, ())
        rendering = render(tokenizer, messages, tools)
        rows.append(
            {
                "messages": [message.to_dict() | ({} if message.weight else {"weight": 0}) for message in messages],
                **({"tools": list(tools)} if tools else {}),
                "ids": rendering.ids,
                "mask": [int(flag) for flag in rendering.mask],
                "prompt_ids": render_prompt(tokenizer, messages[:-1], tools),
                "ends": message_ends(tokenizer, messages, tools),
            }
        )
    template: str = tokenizer.chat_template
    return {
        "format": 1,
        "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        **equipment.to_dict(),
        "golden": rows,
    }


def message_ends(tokenizer: Any, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int | None]:
    """How many of the conversation's ids there are up to the end of each message; None where the template writes a
    message otherwise once others follow it, or not by itself."""
    whole = render(tokenizer, messages, tools).ids
    ends: list[int | None] = []
    for number in range(1, len(messages)):
        try:
            ids = render(tokenizer, messages[:number], tools).ids
        except DataError:  # a system's message alone, say
            ids = []
        # The last token may take in the first character of what follows.
        ends.append(len(ids) if ids and ids[:-1] == whole[: len(ids) - 1] else None)
    return [*ends, len(whole)]


def differences(tokenizer: Any, rendering: dict[str, Any], folder: Path | None = None) -> list[str]:
    """Where a tokenizer renders the golden conversations otherwise; empty when it renders them all the same, by the
    template of training, and was read from the very files that were packaged.

    Each difference names the conversation, the message and the first token that differs.

    Args:
        folder: where the tokenizer was read from, if that is the package or a copy of it.
    """
    found = []
    for number, row in enumerate(rendering["golden"], start=1):
        named = f"golden conversation {number}"
        messages, tools = list(map(Message.from_dict, row["messages"])), row.get("tools", ())
        try:
            prompt_ids = render_prompt(tokenizer, messages[:-1], tools)
            ids = render(tokenizer, messages, tools).ids
        except DataError as error:
            found.append(f"{named}: {error}{_first_in_text(tokenizer, row, messages, tools)}")
            continue
        said = first_difference(tokenizer, row, prompt_ids, row["prompt_ids"])
        said = said or first_difference(tokenizer, row, ids, row["ids"])
        if said:
            found.append(f"{named}, {said}")
    here, there = hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest(), rendering["template_sha256"]
    if not found and here != there:
        found.append(
            f"the chat template is not the one of training (sha256 {here[:12]} here, {there[:12]} there), though the "
            "golden conversations come out the same"
        )
    return found or (_changed_files(folder, rendering) if folder is not None else [])


def first_difference(tokenizer: Any, row: dict[str, Any], ids: Sequence[int], trained: Sequence[int]) -> str | None:
    """The first token of a conversation that is not the one of training, and the message that it belongs to; None where
    all are the same.

    Args:
        row: the conversation: its `messages`, and their `ends` where they are known.
    """
    if list(ids) == list(trained):
        return None
    at = next(
        (place for place, (one, other) in enumerate(zip(ids, trained, strict=False)) if one != other),
        min(len(ids), len(trained)),
    )
    here, there = (
        f"{each[at]} {tokenizer.decode([each[at]])!r}" if at < len(each) else "(nothing)" for each in (ids, trained)
    )
    return f"{_message_at(row, at)}: token {at + 1} is {here} here and was {there} in training"


def _message_at(row: dict[str, Any], at: int) -> str:
    """The message that a token belongs to; several, where it is not known where one ends."""
    messages = list(map(Message.from_dict, row["messages"]))
    ends: Sequence[int | None] = row.get("ends") or [None] * len(messages)
    last = next((place for place, end in enumerate(ends) if end is not None and end > at), len(messages) - 1)
    first = last
    while first and ends[first - 1] is None:
        first -= 1
    if first < last:
        return f"messages {first + 1} to {last + 1} ({', '.join(one.role for one in messages[first : last + 1])})"
    said = messages[last].content or ", ".join(call.name for call in messages[last].tool_calls)
    return f"message {last + 1} ({messages[last].role}: {said[:40]!r})"


def _first_in_text(
    tokenizer: Any, row: dict[str, Any], messages: Sequence[Message], tools: Sequence[dict[str, Any]]
) -> str:
    """Where the text of a conversation that cannot be rendered parts from training, if the template writes any."""
    try:
        ids = encode(tokenizer, _text(tokenizer, messages, tools, False))
    except DataError:
        return ""
    trained = row["ids"]
    if ids[: len(trained)] == trained:
        return ""
    return f"; first, in {first_difference(tokenizer, row, ids, trained)}"


def _changed_files(folder: Path, rendering: dict[str, Any]) -> list[str]:
    """The tokenizer's files that are not those of the package, by their sha256: a merge or a token that no golden
    conversation has need of is told by nothing else."""
    found = []
    for name, there in rendering.get("tokenizer_files", {}).items():
        path = folder / name
        here = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        if here is None:
            found.append(f"{name}, which the tokenizer was packaged with, is not there")
        elif here != there:
            found.append(
                f"{name} is not the one that was packaged (sha256 {here[:12]} here, {there[:12]} there), though the "
                "golden conversations come out the same"
            )
    return found


def tool_line(call: ToolCall) -> str:
    """A call as a line of JSON: what an answer that calls is compared by."""
    return json.dumps({"name": call.name, "arguments": json.loads(call.arguments)}, ensure_ascii=False)


def _refuse_losses(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]],
    add_generation_prompt: bool,
    whole: str,
) -> None:
    """Refuse a template that writes the same text without the tools, a message's calls, or what a tool answered."""

    def is_same(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> bool:
        try:
            return _text(tokenizer, messages, tools, add_generation_prompt) == whole
        except DataError:
            return False  # it misses what was taken away

    advice = "use a model whose template knows tools, or set another chat template in the tokenizer"
    if tools and is_same(messages, ()):
        raise DataError(f"the chat template does not write the row's `tools`; {advice}")
    for number, message in enumerate(messages):
        if message.tool_calls:
            lost = next((call.name for call in message.tool_calls if call.name not in whole), None)
            bare = [*messages[:number], replace(message, tool_calls=()), *messages[number + 1 :]]
            if lost is not None or is_same(bare, tools):
                name = lost or message.tool_calls[0].name
                raise DataError(
                    f"the chat template does not write the call of {name!r} in message {number + 1}; {advice}"
                )
        elif message.role == "tool" and message.content.strip():
            bare = [*messages[:number], replace(message, content=""), *messages[number + 1 :]]
            if is_same(bare, tools):
                raise DataError(
                    f"the chat template does not write what the tool says in message {number + 1}; {advice}"
                )


def _text(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[dict[str, Any]], add_generation_prompt: bool
) -> str:
    specials = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    declared = json.dumps(list(tools)) if tools else ""
    return _written(tokenizer, tokenizer.chat_template, specials, tuple(messages), declared, add_generation_prompt)


@functools.lru_cache(maxsize=256)
def _written(
    tokenizer: Any,
    _template: str,
    _specials: tuple[str | None, ...],
    messages: tuple[Message, ...],
    tools: str,
    add_generation_prompt: bool,
) -> str:
    """The template's text. A conversation's beginnings are asked for again and again (once for the whole, once for the
    prompt), so it is kept; `_template` and `_specials` tell when the tokenizer has changed."""
    from jinja2 import TemplateError

    plain = [message.for_template() for message in messages]
    try:
        text: str = tokenizer.apply_chat_template(
            plain,
            tools=json.loads(tools) if tools else None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except (TemplateError, TypeError) as error:  # TypeError: it puts text and something else together
        roles = ", ".join(message.role for message in messages)
        raise DataError(f"the chat template refuses this conversation ({roles}): {error}") from None
    return text


def _texts(tokenizer: Any, conversations: Sequence[Sequence[Message]]) -> list[Text]:
    """For each conversation, what `segments` will ask of the template, asked for all of them together: a call for one
    takes twice as long as the template itself."""
    known: list[dict[tuple[int, bool], str | DataError]] = [{} for _ in conversations]
    for header in (False, True):
        asked = [
            (place, length) for place, messages in enumerate(conversations) for length in _beginnings(messages, header)
        ]
        texts = _text_all(tokenizer, [conversations[place][:length] for place, length in asked], header)
        for (place, length), text in zip(asked, texts, strict=True):
            known[place][length, header] = text

    def reader(of_one: dict[tuple[int, bool], str | DataError]) -> Text:
        def text(messages: Sequence[Message], add_generation_prompt: bool) -> str:
            found = of_one[len(messages), add_generation_prompt]
            if isinstance(found, DataError):
                raise found
            return found

        return text

    return [reader(of_one) for of_one in known]


def _beginnings(messages: Sequence[Message], header: bool) -> list[int]:
    """How many messages each text has that `segments` needs, with or without an assistant's header behind them."""
    turns = [number for number, message in enumerate(messages) if message.role == "assistant"]
    if header:
        return [number for number in turns if number]
    return sorted({len(messages), *(number + 1 for number in turns)})


def _text_all(
    tokenizer: Any, conversations: Sequence[Sequence[Message]], add_generation_prompt: bool
) -> list[str | DataError]:
    """`_text` of each, or its error."""
    from jinja2 import TemplateError

    plain = [[message.for_template() for message in messages] for messages in conversations]
    if tokenizer.chat_template in _defaults() and all(message.keys() == PLAIN for one in plain for message in one):
        return [_default_text(tokenizer, one, add_generation_prompt) for one in plain]
    try:
        if not all(plain):
            raise ValueError("a conversation without messages")
        texts: list[str | DataError] = tokenizer.apply_chat_template(
            plain, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return texts
    except (TemplateError, TypeError, ValueError):  # one of them: which, and what it says
        return [_text_or_error(tokenizer, messages, add_generation_prompt) for messages in conversations]


def _default_text(tokenizer: Any, messages: Sequence[dict[str, str]], add_generation_prompt: bool) -> str:
    """What the default template writes, without Jinja, which takes ten times as long."""
    text = tokenizer.bos_token if "bos_token" in tokenizer.chat_template else ""
    for message in messages:
        end = tokenizer.eos_token if message["role"] == "assistant" else ""
        text += f"{message['role'].capitalize()}:\n{message['content']}{end}\n"
    return text + "Assistant:\n" if add_generation_prompt else text


def _text_or_error(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool) -> str | DataError:
    try:
        return _text(tokenizer, messages, (), add_generation_prompt)
    except DataError as error:
        return error


def _greeting(tokenizer: Any, tools: Sequence[dict[str, Any]]) -> str:
    """What the template writes before an assistant's message that begins a conversation."""
    one, other = (_text(tokenizer, (Message("assistant", said),), tools, False) for said in "ab")
    return one[: next((place for place, pair in enumerate(zip(one, other, strict=False)) if len(set(pair)) > 1), None)]


def _turn_end(tokenizer: Any, turn: str) -> int | None:
    """Where the end-of-turn token ends in a turn's text; None where the template writes none."""
    specials = _specials(tokenizer, len(tokenizer), tokenizer.eos_token)
    best = max((turn.rfind(token) + len(token) for token in specials if token in turn), default=None)
    return best if best is not None and not turn[best:].strip() else None


def _without_tail(turn: str, message: Message) -> str:
    """A turn's text up to the end of what was said, without the line break that a template puts behind it."""
    said = message.content
    if message.tool_calls:
        return turn.rstrip("\n")
    end = len(said) if turn.startswith(said) else turn.rfind(said) + len(said)
    return turn[:end] if said in turn and not turn[end:].strip() else turn.rstrip("\n")


@functools.lru_cache(maxsize=8)
def _specials(tokenizer: Any, size: int, eos: str) -> tuple[str, ...]:
    """The tokenizer's special tokens; `size` and `eos` tell when to look again. Asking takes long, so it is kept."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(token for token in {*tokenizer.all_special_tokens, *added} if token)


def _without_clock(template: str) -> str:
    return re.sub(
        r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", lambda found: repr(TODAY.strftime(found.group(2))), template
    )


def _end_of_turn(tokenizer: Any) -> tuple[str, int]:
    """The token that ends an assistant's turn under this tokenizer's template, and its id."""
    try:
        *_, (target, _is_target) = segments(tokenizer, (Message("user", "a"), Message("assistant", "b")))
    except DataError as error:
        raise ModelError(f"this model cannot be tuned: {error}") from None
    end_id = encode(tokenizer, target)[-1]
    end = str(tokenizer.convert_ids_to_tokens(end_id))
    if end not in _specials(tokenizer, len(tokenizer), tokenizer.eos_token):
        raise ModelError(f"the tokenizer reads the end of an assistant's turn, {target!r}, as text; it needs a token")
    return end, end_id


def _starts(tokenizer: Any, text: str) -> list[int]:
    """Where in the text each token starts; each character, where the tokenizer does not say."""
    if not tokenizer.is_fast:
        return list(range(len(text)))
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False).offset_mapping
    return [0, *(start for start, _ in spans[1:])] if text else []


def _shorten(starts: dict[int, list[int]], over: int) -> dict[int, int]:
    """Take `over` tokens, or all there are, from the ends of the longest; where each of these now ends."""
    ends = {}
    while over > 0 and any(starts.values()):
        longest = max(starts, key=lambda number: len(starts[number]))
        others = max((len(each) for number, each in starts.items() if number != longest), default=0)
        drop = min(over, max(1, len(starts[longest]) - others))
        ends[longest] = starts[longest][-drop]
        del starts[longest][-drop:]
        over -= drop
    return ends


def _defaults() -> set[str]:
    return {DEFAULT_TEMPLATE.replace("{{- BOS -}}", bos) for bos in ("", "{{- bos_token -}}")}
