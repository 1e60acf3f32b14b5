"""Clients whose calls have an end, what their errors mean to a person, and no secret in what is said."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

import openai

from tunewright.errors import RecipeError, StageError, UserError
from tunewright.hosted.settings import Settings

One = TypeVar("One")
SECRET = re.compile(
    r"(?i)\b(sk-[\w*-]{6,}|bearer\s+[\w.~+/=*-]{12,}|eyJ[\w-]{10,}\.[\w.-]{10,}|(?<![-\w])[0-9a-f]{32,})"
)
"""What looks like a key or a token."""
_known: set[str] = set()
"""Keys that this process has used."""
LOCAL = ("127.0.0.1", "localhost", "::1")
WAIT_S = (0.5, 20.0)


def client(base_url: str | None, key: str | Callable[[], str], settings: Settings, **more: Any) -> openai.OpenAI:
    """A client of an API; `key` may be a function that gives a token whenever one is wanted."""
    there = base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    return openai.OpenAI(
        base_url=there,
        api_key=key,
        max_retries=settings.retries,
        timeout=settings.timeout_s,
        http_client=openai.DefaultHttpxClient(trust_env=urlsplit(there).hostname not in LOCAL),
        **more,
    )


def secret(variable: str) -> str:
    """A key from the environment.

    Raises:
        RecipeError: it is not set there.
    """
    found = os.environ.get(variable, "").strip()
    if not found:
        raise RecipeError(f"{variable} is not set; put the key into that environment variable (not into the recipe)")
    keep_secret(found)
    return found


def keep_secret(key: str) -> None:
    """A key that came from elsewhere: it will be in nothing that is said."""
    _known.add(key)


@contextlib.contextmanager
def explained(doing: str) -> Iterator[None]:
    """The SDK's errors as ours, in one line and without what could be secret."""
    try:
        yield
    except openai.AuthenticationError as error:
        raise UserError(f"{doing}: not signed in ({said(error)}); is the key right, and of this endpoint?") from None
    except openai.PermissionDeniedError as error:
        raise UserError(f"{doing}: not allowed ({said(error)}); the programme may be closed to you") from None
    except openai.RateLimitError as error:
        what = "a quota is used up" if error.code == "insufficient_quota" else "asked too often, again and again"
        raise StageError(f"{doing}: {what} ({said(error)}); wait, or ask for more") from None
    except openai.APIStatusError as error:
        kind = StageError if error.status_code >= 500 else UserError
        raise kind(f"{doing}: {said(error)}") from None
    except openai.APIConnectionError as error:
        raise StageError(f"{doing}: the endpoint does not answer ({said(error)}); the same command goes on") from None
    except openai.OpenAIError as error:
        raise StageError(f"{doing}: {said(error)}") from None


def said(error: BaseException) -> str:
    """An error in one line, without what looks like a key or a token."""
    body = getattr(error, "body", None)
    words = body.get("message") if isinstance(body, dict) and body.get("message") else str(error)
    line = (str(words).strip().splitlines() or [type(error).__name__])[0]
    cause = error.__cause__ if isinstance(error, openai.APIConnectionError) else None
    return scrubbed(f"{line} {cause}" if cause else line)[:400]


def scrubbed(text: str) -> str:
    """A text without the keys that were used, and without what looks like a key or a token."""
    for key in _known:
        text = text.replace(key, "***")
    return SECRET.sub("***", text)


def made_once(look: Callable[[], One | None], make: Callable[[], One], retries: int) -> One:
    """Make something exactly once: where it is not known whether a call was acted on (a connection that was cut, a
    fault of the service), it is looked for before it is asked again. `make` must not repeat by itself."""
    for attempt in range(retries + 1):
        try:
            return make()
        except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError) as error:
            if isinstance(error, openai.RateLimitError) and error.code == "insufficient_quota":
                raise
            if (found := look()) is not None:
                return found
            if attempt == retries:
                raise
            time.sleep(_pause(error, attempt))
    raise AssertionError("unreachable")


def _pause(error: openai.APIError, attempt: int) -> float:
    """What the service asks for, else twice as long each time."""
    headers = error.response.headers if isinstance(error, openai.APIStatusError) else {}
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with contextlib.suppress(ValueError):
            return min(60.0, max(0.0, float(headers.get(name, "")) * scale))
    return float(min(WAIT_S[1], WAIT_S[0] * 2**attempt))
