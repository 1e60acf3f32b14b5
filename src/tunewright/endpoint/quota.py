"""Tokens per minute, judged when a request arrives, as Azure OpenAI judges them.

What is counted is an estimate: the prompt and the longest answer that was asked for. The minute begins with the first
request and is fixed, so that a client can tell from one header when everything is free again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

WINDOW_S = 60.0


class Window:
    """A count up to a limit, which begins anew with the first thing that is asked for after its time is over.

    Args:
        limit: how much fits into a window; may be changed at any time, and holds from then on.
        clock: seconds.
    """

    def __init__(self, limit: int, clock: Callable[[], float], length_s: float = WINDOW_S) -> None:
        self.limit = limit
        self.used = 0
        self._clock = clock
        self._length_s = length_s
        self._opened = -math.inf

    def fits(self, amount: int) -> bool:
        """Whether so much is left; opens a new window where the last one is over."""
        now = self._clock()
        if now - self._opened >= self._length_s:
            self._opened, self.used = now, 0
        return self.used + amount <= self.limit

    def take(self, amount: int) -> None:
        """Count it, whether it fits or not."""
        self.used += amount

    @property
    def left(self) -> int:
        return max(0, self.limit - self.used)

    @property
    def reset_s(self) -> float:
        """How long until everything is free again."""
        return max(0.0, self._opened + self._length_s - self._clock())


@dataclass(frozen=True)
class Verdict:
    """Whether a request may go on, and how the window stands after it."""

    admitted: bool
    limit: int
    used: int
    reset_s: float
    fits: bool
    """False where the request is larger than the whole quota, so that waiting does not help."""

    @property
    def headers(self) -> dict[str, str]:
        """Durations are written as Go writes them, which is what api.openai.com sends."""
        said = {
            "x-ratelimit-limit-tokens": str(self.limit),
            "x-ratelimit-remaining-tokens": str(self.limit - self.used),
            "x-ratelimit-reset-tokens": duration(self.reset_s),
        }
        if not self.admitted:
            said |= retry_after(self.reset_s, helps=self.fits)
        return said


class Quota:
    """One window for a whole endpoint: as on Azure, the quota belongs to the deployment."""

    def __init__(self, tokens_per_minute: int, clock: Callable[[], float]) -> None:
        self._window = Window(tokens_per_minute, clock)

    def admit(self, tokens: int) -> Verdict:
        """Count `tokens` against this minute if they still fit into it. A refused request costs nothing."""
        window = self._window
        admitted = window.fits(tokens)
        if admitted:
            window.take(tokens)
        return Verdict(admitted, window.limit, window.used, window.reset_s, fits=tokens <= window.limit)


def retry_after(seconds: float, *, helps: bool) -> dict[str, str]:
    """The headers of a refusal. Where waiting does not help, clients are told not to try again."""
    said = {
        "retry-after": str(max(1, math.ceil(seconds))),
        "retry-after-ms": str(max(1, math.ceil(seconds * 1000))),
    }
    return said if helps else said | {"x-should-retry": "false"}


def duration(seconds: float) -> str:
    """As Go writes one: 1m30s, 15s, 0.25s."""
    minutes, rest = divmod(math.ceil(seconds * 1000) / 1000, 60)
    return f"{int(minutes)}m{rest:g}s" if minutes else f"{rest:g}s"
