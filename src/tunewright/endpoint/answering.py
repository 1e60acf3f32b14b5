"""A request to a served model, answered: in tokens, computed in the model's thread, written as a reply or a stream.

Both the endpoint of one model and the engine of many answer through here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from tunewright.endpoint import guide, tools
from tunewright.endpoint.answers import Ask, Call, End, Piece
from tunewright.endpoint.diary import CLIENT_LEFT, Entry, entry, server_error
from tunewright.endpoint.served import Served
from tunewright.endpoint.shapes import (
    ApiError,
    Asking,
    ChatRequest,
    Choice,
    Reply,
    TextReply,
    TextRequest,
    event,
    invalid,
)
from tunewright.endpoint.tools import Toolbox
from tunewright.endpoint.worker import Worker
from tunewright.errors import DataError

T = TypeVar("T")

logger = logging.getLogger("tunewright.endpoint")

DONE = "data: [DONE]\n\n"

Admit = Callable[[int, Entry], None]
"""Lets a request of so many tokens (an estimate) through, or raises an ApiError."""


async def chat(
    request: Request, served: Served, worker: Worker, wanted: ChatRequest, *, name: str, admit: Admit | None = None
) -> Response:
    """The reply to a chat completion request, under the model's `name`.

    Raises:
        ApiError: the request does not fit the model.
    """
    ask = await asyncio.to_thread(_chat_ask, served, wanted)
    note = entry(request)
    note.notes["prompt_tokens"] = len(ask.prompt)
    if admit is not None:
        admit(served.estimate(ask), note)
    reply = Reply(
        id=f"chatcmpl-{secrets.token_hex(12)}",
        created=int(time.time()),
        model=name,
        speller=served.speller,
        logprobs=wanted.logprobs,
        include_usage=wanted.include_usage,
    )
    job = _Job(lambda: served.answer(ask), reply, len(ask.prompt), ask.n, note)
    return await _respond(request, worker, job, stream=wanted.stream)


async def text(
    request: Request, served: Served, worker: Worker, wanted: TextRequest, *, name: str, admit: Admit | None = None
) -> Response:
    """The reply to a request to the older completions route.

    Raises:
        ApiError: the request does not fit the model.
    """
    asks = await asyncio.to_thread(_text_asks, served, wanted)
    note = entry(request)
    prompt_tokens = sum(len(ask.prompt) for ask in asks)
    note.notes["prompt_tokens"] = prompt_tokens
    if admit is not None:
        admit(prompt_tokens + len(asks) * max(wanted.n or 1, wanted.best_of or 1) * wanted.most, note)
    n = wanted.n or 1
    offsets: dict[int, int] = {}
    if wanted.logprobs is not None and not wanted.echo:  # offsets count from the prompt's beginning, shown or not
        for place, ask in enumerate(asks):
            shown = len(served.completer.tokenizer.decode(ask.prompt, skip_special_tokens=True))
            offsets |= dict.fromkeys(range(place * n, place * n + n), shown)
    reply = TextReply(
        id=f"cmpl-{secrets.token_hex(12)}",
        created=int(time.time()),
        model=name,
        speller=served.speller,
        num_top=wanted.logprobs,
        include_usage=wanted.include_usage,
        offsets=offsets,
    )

    def write() -> Iterator[tuple[int, Piece | End]]:
        for place, ask in enumerate(asks):
            for index, said in served.go_on(ask, best_of=wanted.best_of, echo=wanted.echo):
                yield place * n + index, said

    job = _Job(write, reply, prompt_tokens, n * len(asks), note)
    return await _respond(request, worker, job, stream=wanted.stream)


def _chat_ask(served: Served, wanted: ChatRequest) -> Ask:
    """A chat request in tokens, known to fit into the model's context."""
    toolbox = _toolbox(wanted)
    ask = _ask(served, wanted, wanted.most, wanted.top_logprobs)
    ask = replace(ask, toolbox=toolbox)
    if served.classifier is not None:
        _refuse_shaping(ask, wanted)
    ids = prompt(served, wanted)
    ask = replace(ask, prompt=ids, guide=_guide(served, wanted, toolbox))
    _check_room(served, len(ids), served.needed(ask), "messages")
    return ask


def prompt(served: Served, wanted: ChatRequest) -> list[int]:
    """The ids that the model is given for a chat request.

    Raises:
        ApiError: the chat template refuses it.
    """
    try:
        return served.prompt(wanted.conversation, () if wanted.tool_choice == "none" else wanted.tool_dicts)
    except DataError as error:
        param = "tools" if wanted.tools and "`tools`" in str(error) else "messages"
        said = str(error).replace("the row's `tools`", "`tools`")  # it speaks of training data elsewhere
        raise invalid(param, f"Invalid '{param}': {said}.") from None


def _text_asks(served: Served, wanted: TextRequest) -> list[Ask]:
    asks = []
    plain = _ask(served, wanted, wanted.most, wanted.logprobs)
    for number, prompt in enumerate(wanted.prompt):
        ids = served.ids(prompt) if isinstance(prompt, str) else list(prompt)
        ids = ids or [served.completer.equipment.stop_ids[0]]  # the beginning of a document, as OpenAI has it
        if max(ids) >= served.completer.num_tokens:
            raise invalid(
                "prompt",
                f"Invalid 'prompt': prompt {number} has the token {max(ids)}, and this model has "
                f"{served.completer.num_tokens} of them.",
            )
        _check_room(served, len(ids), wanted.most, "prompt")
        asks.append(replace(plain, prompt=ids))
    return asks


def _ask(served: Served, wanted: Asking, most: int | None, num_top: int | None) -> Ask:
    """What both kinds of requests say alike."""
    bias = {int(token): value for token, value in wanted.logit_bias.items()}
    if bias and max(bias) >= served.completer.num_tokens:
        raise invalid(
            "logit_bias",
            f"Invalid 'logit_bias': there is no token {max(bias)}; this model has {served.completer.num_tokens}.",
        )
    return Ask(
        prompt=[],
        max_tokens=most,
        temperature=wanted.temperature,
        top_p=1.0 if wanted.top_p is None else wanted.top_p,
        seed=wanted.seed,
        n=wanted.n or 1,
        stop=tuple(wanted.stop),
        num_top=num_top or 0,
        frequency_penalty=wanted.frequency_penalty or 0.0,
        presence_penalty=wanted.presence_penalty or 0.0,
        logit_bias=bias,
    )


def _toolbox(wanted: ChatRequest) -> Toolbox | None:
    choice = wanted.tool_choice
    if not wanted.tools or choice == "none":
        return None
    several = wanted.parallel_tool_calls is not False
    if isinstance(choice, dict):
        chosen = tuple(one for one in wanted.tool_dicts if one["function"]["name"] == choice["function"]["name"])
        return Toolbox(chosen[:1], must=True, several=False)
    return Toolbox(wanted.tool_dicts, must=choice == "required", several=several)


def _guide(served: Served, wanted: ChatRequest, toolbox: Toolbox | None) -> guide.Guide | None:
    """What the answer is held to: JSON, calls, or one of both."""
    schema = wanted.schema_asked
    must = toolbox is not None and toolbox.must
    if schema is None and not must:
        return None
    form = served.form if toolbox is not None else None
    if must and form is None:
        raise invalid(
            "tool_choice",
            "Invalid 'tool_choice': this model's chat template does not write calls as JSON, so that an answer cannot "
            "be held to one; send 'auto'.",
        )
    try:
        if toolbox is None or form is None:
            assert schema is not None
            return served.guides.compile(guide.of_schema(schema))
        answer = None if must else schema
        return served.guides.compile(tools.grammar(served.completer.tokenizer, form, toolbox, answer))
    except DataError as error:
        param = "tools" if must else "response_format"
        raise invalid(param, f"Invalid '{param}': the answer cannot be held to this schema: {error}.") from None


def _refuse_shaping(ask: Ask, wanted: ChatRequest) -> None:
    """A classifier says one of its labels and nothing else."""
    shaping = {
        "tools": ask.toolbox is not None,
        "response_format": wanted.schema_asked is not None,
        "logit_bias": bool(ask.logit_bias),
        "frequency_penalty": bool(ask.frequency_penalty),
        "presence_penalty": bool(ask.presence_penalty),
    }
    for param, asked in shaping.items():
        if asked:
            raise ApiError(
                400,
                f"'{param}' cannot be honoured: the model answers with one of its labels.",
                param=param,
                code="unsupported_parameter",
            )


def _check_room(served: Served, prompt: int, needed: int, param: str) -> None:
    context = served.completer.context
    if context is not None and prompt + needed > context:
        raise ApiError(
            400,
            f"This model's maximum context length is {context} tokens. However, you requested {prompt + needed} "
            f"tokens ({prompt} in the {param}, {needed} in the completion). Please reduce the length of the "
            f"{param} or completion.",
            param=param,
            code="context_length_exceeded",
        )


@dataclass(frozen=True)
class _Job:
    """What is to be computed and written."""

    make: Callable[[], Iterator[tuple[int, Piece | Call | End]]]
    reply: Reply | TextReply
    prompt_tokens: int
    num_choices: int
    note: Entry


async def _respond(request: Request, worker: Worker, job: _Job, *, stream: bool) -> Response:
    if stream:
        return StreamingResponse(
            _stream(worker, job),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )
    choices = await while_connected(request, _collect(worker, job))
    if choices is None:
        return Response(status_code=CLIENT_LEFT)
    return JSONResponse(job.reply.whole(choices, job.prompt_tokens))


async def _collect(worker: Worker, job: _Job) -> list[Choice]:
    choices = [Choice() for _ in range(job.num_choices)]
    async with contextlib.aclosing(worker.run(job.make)) as events:
        async for index, said in events:
            choices[index].add(said)
    job.note.notes["completion_tokens"] = sum(choice.num_tokens for choice in choices)
    return choices


async def _stream(worker: Worker, job: _Job) -> AsyncIterator[str]:
    """The answer as server-sent events. An error on the way is the last event, for the status is already sent."""
    reply, note = job.reply, job.note
    speaking = -1
    pieces = finished = completion_tokens = calls = 0
    try:
        async with contextlib.aclosing(worker.run(job.make)) as events:
            async for index, said in events:
                if index != speaking:
                    speaking, calls = index, 0
                    for chunk in reply.first(index):
                        yield chunk
                if isinstance(said, Piece):
                    pieces += 1
                    if said.text or said.tokens:
                        yield reply.piece(index, said)
                elif isinstance(said, Call):
                    for chunk in reply.call(index, calls, said):
                        yield chunk
                    calls += 1
                else:
                    finished += 1
                    completion_tokens += said.num_tokens
                    yield reply.last(index, said)
        if reply.include_usage:
            yield reply.usage(job.prompt_tokens, completion_tokens)
        yield DONE
    except Exception:
        logger.exception("%s failed while streaming", note.id)
        yield event(server_error(note).body)
    finally:
        note.notes["completion_tokens"] = completion_tokens
        if finished < job.num_choices:
            note.notes |= {"completion_tokens": pieces, "cut_off": "yes"}


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` gives; None where the client left before, and then the work is stopped."""
    working = asyncio.current_task()
    assert working is not None
    left, over = False, False

    async def watch() -> None:
        nonlocal left
        while (await request.receive())["type"] != "http.disconnect":
            pass
        if not over:
            left = True
            working.cancel()

    gone = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if left and not working.uncancel():
            return None
        raise  # the server stops
    finally:
        over = True
        gone.cancel()
