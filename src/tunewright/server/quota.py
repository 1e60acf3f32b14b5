"""Tokens and requests for each deployment, judged when a request arrives, as Azure OpenAI judges them.

Capacity is counted in thousands of tokens a minute. Each unit also gives six requests a minute, which are judged over
ten seconds: one request in ten seconds for each unit, so that a minute's requests cannot come at once. Tokens are an
estimate, for the answer is not known yet; they are not corrected afterwards, nor are requests that fail later.

With dynamic quota, a deployment may have more than its own while the other deployments of its account leave theirs.
What it borrowed is taken from nobody: the others have their whole quota when they want it.

What is not covered: other servers on the same database. Each server admits a deployment's whole quota.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Literal

from tunewright.endpoint.quota import Window, duration, retry_after

TOKENS_PER_UNIT = 1000
REQUESTS_PER_UNIT = 6
"""Requests a minute, Azure's for chat models."""
REQUEST_WINDOW_S = 10.0
WINDOWS_PER_MINUTE = 6
ANSWER_TOKENS = 16
"""Counted for the answer where a request sets no limit: OpenAI's default before chat, and Azure's estimate still."""
CHARACTERS_PER_TOKEN = 4


def estimate(prompt_characters: int, max_tokens: int | None, best_of: int = 1) -> int:
    """Tokens that a request is taken to need."""
    answer = ANSWER_TOKENS if max_tokens is None else max_tokens
    return math.ceil(prompt_characters / CHARACTERS_PER_TOKEN) + answer * best_of


@dataclass(frozen=True)
class Limits:
    """A deployment's quota."""

    capacity: int
    """Thousands of tokens a minute."""
    dynamic: bool = False

    @property
    def tokens(self) -> int:
        """A minute's."""
        return self.capacity * TOKENS_PER_UNIT

    @property
    def requests(self) -> int:
        """Ten seconds'."""
        return self.capacity * REQUESTS_PER_UNIT // WINDOWS_PER_MINUTE


@dataclass(frozen=True)
class Decision:
    """Whether a request may go on, and how its deployment stands after it."""

    refused: Literal["tokens", "requests"] | None
    """What there was too little of."""
    tokens: Window
    requests: Window
    possible: bool = True
    """False where the request is larger than the whole quota, so that waiting does not help."""

    @property
    def retry_s(self) -> float:
        return (self.requests if self.refused == "requests" else self.tokens).reset_s

    def headers(self, *, azure: bool) -> dict[str, str]:
        """Azure writes whole seconds, OpenAI durations as Go does. Requests are counted for the ten seconds."""
        said = {}
        for name, window in (("requests", self.requests), ("tokens", self.tokens)):
            reset_s = window.reset_s
            said[f"x-ratelimit-limit-{name}"] = str(window.limit)
            said[f"x-ratelimit-remaining-{name}"] = str(window.left)
            said[f"x-ratelimit-reset-{name}"] = str(math.ceil(reset_s)) if azure else duration(reset_s)
        return said if self.refused is None else said | retry_after(self.retry_s, helps=self.possible)


class Pool:
    """What all deployments of an account have together: their limits added up, and what any of them was admitted."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.tokens = Window(0, clock)
        self.requests = Window(0, clock, REQUEST_WINDOW_S)


class Allowance:
    """One deployment's quota: constant time for each request, and nothing asked of a database."""

    def __init__(self, limits: Limits, pool: Pool, clock: Callable[[], float]) -> None:
        self.pool = pool
        self.tokens = Window(0, clock)
        self.requests = Window(0, clock, REQUEST_WINDOW_S)
        self.set(limits)

    def set(self, limits: Limits) -> None:
        """Change the limits; what was used of the running windows stays used."""
        self.limits = limits
        self.tokens.limit, self.requests.limit = limits.tokens, limits.requests

    def admit(self, tokens: int) -> Decision:
        """Count a request, if there is room for it. One that is refused for its tokens was a request all the same."""
        if not self._take(self.requests, self.pool.requests, 1):
            return Decision("requests", self.tokens, self.requests)
        if not self._take(self.tokens, self.pool.tokens, tokens):
            most = max(self.tokens.limit, self.pool.tokens.limit if self.limits.dynamic else 0)
            return Decision("tokens", self.tokens, self.requests, possible=tokens <= most)
        return Decision(None, self.tokens, self.requests)

    def _take(self, own: Window, shared: Window, amount: int) -> bool:
        fits, spare = own.fits(amount), shared.fits(amount)
        if not fits and not (self.limits.dynamic and spare):
            return False
        own.take(amount)
        shared.take(amount)
        return True


class Quotas:
    """The quotas of every deployment that this server was asked for."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pools: dict[str, Pool] = {}
        self._allowances: dict[tuple[str, Hashable], Allowance] = {}

    def settle(self, account: str, deployments: Mapping[Hashable, Limits]) -> None:
        """Take over the limits of all of an account's deployments; one that is not named any more is forgotten."""
        pool = self._pools.setdefault(account, Pool(self._clock))
        pool.tokens.limit = sum(one.tokens for one in deployments.values())
        pool.requests.limit = sum(one.requests for one in deployments.values())
        for gone in [key for key in self._allowances if key[0] == account and key[1] not in deployments]:
            del self._allowances[gone]
        for deployment, limits in deployments.items():
            known = self._allowances.get((account, deployment))
            if known is None:
                self._allowances[account, deployment] = Allowance(limits, pool, self._clock)
            elif known.limits != limits:
                known.set(limits)

    def of(self, account: str, deployment: Hashable) -> Allowance:
        """A deployment's quota, which `settle` was told of."""
        return self._allowances[account, deployment]
