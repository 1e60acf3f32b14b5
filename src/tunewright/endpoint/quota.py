"""Tokens per minute, judged when a request arrives, as Azure OpenAI judges them.

What is counted is an estimate: the prompt and the longest answer that was asked for. The minute begins with the first
request and is fixed, so that a client can tell from one header when everything is free again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

WINDOW_S = 60.0


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
            "x-ratelimit-reset-tokens": _duration(self.reset_s),
        }
        if not self.admitted:
            said["retry-after"] = str(max(1, math.ceil(self.reset_s)))
            said["retry-after-ms"] = str(max(1, math.ceil(self.reset_s * 1000)))
            if not self.fits:
                said["x-should-retry"] = "false"
        return said


class Quota:
    """One window for a whole endpoint: as on Azure, the quota belongs to the deployment."""

    def __init__(self, tokens_per_minute: int, clock: Callable[[], float]) -> None:
        self.limit = tokens_per_minute
        self._clock = clock
        self._opened = -math.inf
        self._used = 0

    def admit(self, tokens: int) -> Verdict:
        """Count `tokens` against this minute if they still fit into it. A refused request costs nothing."""
        now = self._clock()
        if now - self._opened >= WINDOW_S:
            self._opened, self._used = now, 0
        admitted = self._used + tokens <= self.limit
        if admitted:
            self._used += tokens
        left_s = self._opened + WINDOW_S - now
        return Verdict(admitted, self.limit, self._used, left_s, fits=tokens <= self.limit)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds * 1000) / 1000, 60)
    return f"{int(minutes)}m{rest:g}s" if minutes else f"{rest:g}s"
