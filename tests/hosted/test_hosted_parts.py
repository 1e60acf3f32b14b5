"""The parts of the hosted backends by themselves: counting tokens, making once, keeping secrets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import tiktoken
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tunewright import chat, hosted_tokens, starter
from tunewright import recipe as recipes
from tunewright import run as run_folders
from tunewright.chat import Message
from tunewright.errors import RecipeError, StageError
from tunewright.hosted import calls
from tunewright.hosted.asking import _class
from tunewright.hosted.azure import _named
from tunewright.hosted.training import _suffix
from tunewright.models import ModelRef

WORDS = (b"th", b"the", b" th", b" the", b"in", b"er", b" c", b" ca", b" cat", b"\xc3\xbc")
PATTERN = r"""[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
RANKS = {bytes([byte]): byte for byte in range(256)} | {word: 256 + place for place, word in enumerate(WORDS)}
ENCODING = tiktoken.Encoding("tiny", pat_str=PATTERN, mergeable_ranks=RANKS, special_tokens={})
TOKENIZER = hosted_tokens.from_tiktoken(ENCODING)
SPECIAL = (hosted_tokens.START, hosted_tokens.SEPARATOR, hosted_tokens.END)


@given(st.text(max_size=60).filter(lambda text: not any(one in text for one in SPECIAL)))
def test_an_encoding_as_a_tokenizer_gives_tiktokens_ids(text: str) -> None:
    assert TOKENIZER(text, add_special_tokens=False)["input_ids"] == ENCODING.encode(text, disallowed_special=())


def test_a_conversation_has_the_tokens_that_openai_counts() -> None:
    """Three for each message, its role, its content; and three more before an answer (with the assistant's role)."""
    chat.equip(TOKENIZER)
    messages = (Message("system", "in the cat"), Message("user", "the cat"), Message("assistant", "cat"))
    counted = sum(3 + len(ENCODING.encode(one.role)) + len(ENCODING.encode(one.content)) for one in messages)
    assert len(chat.render(TOKENIZER, messages).ids) == counted
    asked = chat.render_prompt(TOKENIZER, messages[:2])
    header = 2 + len(ENCODING.encode("assistant"))
    told = sum(3 + len(ENCODING.encode(one.role)) + len(ENCODING.encode(one.content)) for one in messages[:2])
    assert len(asked) == told + header


def test_a_bases_name_tells_its_encoding() -> None:
    assert hosted_tokens.encoding_for("gpt-4.1-mini-2025-04-14") == "o200k_base"
    assert hosted_tokens.encoding_for("gpt-35-turbo") == "cl100k_base"
    assert hosted_tokens.encoding_for("something-of-ours") is None


def failing(kind: str, **headers: str) -> openai.APIError:
    request = httpx2.Request("POST", "https://example.com/v1/files")
    if kind == "cut":
        return openai.APIConnectionError(request=request)
    response = httpx2.Response(int(kind), request=request, headers=headers)
    error = {"429": openai.RateLimitError, "500": openai.InternalServerError, "400": openai.BadRequestError}[kind]
    return error("as it was told", response=response, body=None)


@pytest.mark.parametrize(
    ("outcomes", "there", "calls_made"),
    [
        (["made"], None, 1),
        (["cut", "made"], None, 2),
        (["cut"], "made", 1),  # it was acted on: found, and not made again
        (["500", "429", "made"], None, 3),
    ],
)
def test_something_is_made_once(
    outcomes: list[str], there: str | None, calls_made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls.time, "sleep", lambda _: None)
    made = []

    def make() -> str:
        made.append(1)
        outcome = outcomes[len(made) - 1]
        if outcome == "made":
            return outcome
        raise failing(outcome)

    assert calls.made_once(lambda: there, make, retries=3) == "made"
    assert len(made) == calls_made


def test_a_refusal_is_not_asked_again_and_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(calls.time, "sleep", pauses.append)
    made: list[int] = []

    def refused() -> str:
        made.append(1)
        raise failing("400")

    with pytest.raises(openai.BadRequestError):
        calls.made_once(lambda: None, refused, retries=3)
    assert len(made) == 1

    def used_up() -> str:
        made.append(1)
        error = failing("429")
        error.code = "insufficient_quota"
        raise error

    with pytest.raises(openai.RateLimitError):
        calls.made_once(lambda: None, used_up, retries=3)
    assert len(made) == 2
    with pytest.raises(StageError, match="a quota is used up"), calls.explained("creating the job"):
        used_up()

    def busy() -> str:
        raise failing("429", **{"retry-after": "7"})

    with pytest.raises(openai.RateLimitError):
        calls.made_once(lambda: None, busy, retries=2)
    assert pauses == [7, 7]


def test_what_looks_like_a_secret_is_not_said() -> None:
    calls.keep_secret("plain-words-as-a-key")
    for secret in (
        "sk-proj-abcdef0123456789",
        "Bearer abcdefghijklmnop.qrstuv",
        "eyJhbGciOiJIUzI1NiIs.eyJzdWIiOiIxMjM0NTY3ODkwIiwi",
        "0123456789abcdef0123456789abcdef",
        "plain-words-as-a-key",
    ):
        assert secret not in calls.scrubbed(f"the call with {secret} failed")
    assert calls.scrubbed("gpt-4.1-mini.ft-0123456789abcdef0123456789abcdef") == (
        "gpt-4.1-mini.ft-0123456789abcdef0123456789abcdef"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (" Good.\n", "good"),
        ("good", "good"),
        ("BAD", "bad"),
        ("good and bad", "(none of the classes)"),
        ("", "(none of the classes)"),
    ],
)
def test_an_answer_is_a_class_where_it_says_it_and_nothing_else(text: str, said: str) -> None:
    assert _class(text, ["bad", "good"]) == said


def test_names_are_taken_apart_and_made_short() -> None:
    assert _named("gpt-4.1-mini-2025-04-14") == ("gpt-4.1-mini", "2025-04-14")
    assert _named("my-base") == ("my-base", None)
    assert _suffix("Reviews of films, 2026 edition") == "Reviews-of-films-2"
    assert _suffix("é") == "tuned"


def test_the_starter_is_found_where_this_machine_has_it() -> None:
    there = ModelRef("starter", "/elsewhere/model", "starter", None, "A", 1, 1, 1)
    assert ModelRef.from_dict(there.to_dict()).source == str(starter.model_path())


def test_of_several_runs_what_stands_is_shown_and_agreed_to(tmp_path: Path) -> None:
    given_recipe: dict[str, Any] = {"name": "s", "model": "starter", "task": "chat", "data": {"train": "x.jsonl"}}
    runs = [run_folders.create(tmp_path / "runs", recipes.loads(yaml.safe_dump(given_recipe))) for _ in range(2)]
    runs[0].made(runs[0].intend("process", "endpoint s", stage="deploy"), pid=2**22 + 1)
    words = [sys.executable, "-m", "tunewright.cli", "destroy", "--runs", str(tmp_path / "runs")]

    def said(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*words, *more], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)

    assert "name one run, or --all" in said().stderr
    assert "such as 7d" in said("--older-than", "soon").stderr
    assert said("--older-than", "1d", "--yes").returncode == 0
    assert not runs[0].destroyed  # they are younger
    refused = said("--all")
    assert refused.returncode == 2
    assert "endpoint s" in refused.stderr
    assert "2 runs would be destroyed" in refused.stderr
    assert said("--all", "--yes").returncode == 0
    assert all(run.destroyed for run in runs)
    assert said("--all", "--yes").stderr == "nothing to remove\n"


def test_a_key_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(RecipeError, match="MY_KEY is not set"):
        calls.secret("MY_KEY")
