"""Quotas of deployments, on a clock that the test turns."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from tunewright.server.quota import Decision, Limits, Quotas, estimate

ACCOUNT = "local"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Tally:
    """What a deployment was admitted, window by window, counted by the test itself."""

    length_s: float
    opened: float = -math.inf
    used: int = 0
    history: list[int] = field(default_factory=list)

    def at(self, now: float) -> int:
        """What was used in the window of this moment."""
        if now - self.opened >= self.length_s:
            self.opened, self.used = now, 0
        return self.used

    def add(self, amount: int) -> None:
        self.used += amount
        self.history.append(self.used)


def quotas(clock: Clock, **limits: Limits) -> Quotas:
    made = Quotas(clock)
    made.settle(ACCOUNT, dict(limits))
    return made


def test_a_unit_is_a_thousand_tokens_a_minute_and_a_request_in_ten_seconds() -> None:
    clock = Clock()
    one = quotas(clock, d=Limits(1)).of(ACCOUNT, "d")
    first = one.admit(400)
    assert first.refused is None
    assert first.headers(azure=True) == {
        "x-ratelimit-limit-requests": "1",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "10",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "600",
        "x-ratelimit-reset-tokens": "60",
    }
    clock.now += 4.25
    second = one.admit(1)
    assert second.refused == "requests"
    assert second.headers(azure=True) | {"retry-after": "6", "retry-after-ms": "5750"} == second.headers(azure=True)
    assert second.headers(azure=False)["x-ratelimit-reset-requests"] == "5.75s"
    assert second.headers(azure=False)["x-ratelimit-reset-tokens"] == "55.75s"
    clock.now += 6
    assert one.admit(600).refused is None
    clock.now += 10
    assert one.admit(1).refused == "tokens"
    clock.now += 40
    assert one.admit(1000).refused is None


def test_a_request_that_is_refused_for_its_tokens_was_a_request() -> None:
    one = quotas(Clock(), d=Limits(2)).of(ACCOUNT, "d")
    assert one.admit(2001).refused == "tokens"
    assert one.admit(2000).refused is None
    assert one.admit(0).refused == "requests"


def test_what_can_never_fit_is_not_worth_trying_again() -> None:
    made = quotas(Clock(), a=Limits(1), b=Limits(2, dynamic=True))
    refused = made.of(ACCOUNT, "a").admit(1001)
    assert (refused.refused, refused.possible) == ("tokens", False)
    assert refused.headers(azure=True)["x-should-retry"] == "false"
    more = made.of(ACCOUNT, "b").admit(2500)
    assert more.refused is None
    later = made.of(ACCOUNT, "b").admit(2500)
    assert (later.refused, later.possible) == ("tokens", True)
    assert "x-should-retry" not in later.headers(azure=True)


def test_dynamic_quota_borrows_what_others_leave_and_takes_it_from_nobody() -> None:
    made = quotas(Clock(), busy=Limits(1, dynamic=True), idle=Limits(9))
    busy, idle = made.of(ACCOUNT, "busy"), made.of(ACCOUNT, "idle")
    assert busy.admit(9000).refused is None
    assert busy.admit(1001).refused == "tokens"
    assert idle.admit(9000).refused is None
    assert idle.admit(1).refused == "tokens"


def test_a_deployment_without_dynamic_quota_borrows_nothing() -> None:
    made = quotas(Clock(), busy=Limits(1), idle=Limits(9))
    assert made.of(ACCOUNT, "busy").admit(1001).refused == "tokens"


def test_a_changed_capacity_holds_at_once_and_forgets_nothing() -> None:
    made = quotas(Clock(), d=Limits(3))
    one = made.of(ACCOUNT, "d")
    assert one.admit(3000).refused is None
    made.settle(ACCOUNT, {"d": Limits(5)})
    assert made.of(ACCOUNT, "d") is one
    assert one.admit(2001).refused == "tokens"
    assert one.admit(2000).refused is None
    made.settle(ACCOUNT, {"d": Limits(1)})
    refused = one.admit(1)
    assert refused.refused == "requests"
    assert refused.headers(azure=True)["x-ratelimit-remaining-tokens"] == "0"


def test_estimates_count_every_answer() -> None:
    assert estimate(0, None) == 16
    assert estimate(9, 100, 3) == 3 + 300


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]),
        st.integers(0, 4000),
        st.floats(0, 30, allow_nan=False),
        st.none() | st.integers(1, 4),
    ),
    max_size=60,
)


@given(STEPS, st.lists(st.integers(1, 4), min_size=3, max_size=3), st.lists(st.booleans(), min_size=3, max_size=3))
def test_never_more_than_the_limit_and_never_less(
    steps: list[tuple[str, int, float, int | None]], capacities: list[int], dynamic: list[bool]
) -> None:
    """Whatever comes when: a window admits no more than its limit unless borrowing is allowed and there is something to
    borrow, and nothing that fits into a deployment's own is refused, whatever the others do."""
    clock = Clock()
    limits = {
        name: Limits(capacity, borrows) for name, capacity, borrows in zip("abc", capacities, dynamic, strict=True)
    }
    made = Quotas(clock)
    made.settle(ACCOUNT, dict(limits))
    tokens = {name: Tally(60) for name in limits}
    requests = {name: Tally(10) for name in limits}
    pool_tokens, pool_requests = Tally(60), Tally(10)
    for name, wanted, wait_s, capacity in steps:
        clock.now += wait_s
        if capacity is not None:
            limits[name] = Limits(capacity, limits[name].dynamic)
            made.settle(ACCOUNT, dict(limits))
        limit = limits[name]
        total_tokens = sum(one.tokens for one in limits.values())
        total_requests = sum(one.requests for one in limits.values())
        own_request = requests[name].at(clock.now) + 1 <= limit.requests
        spare_request = pool_requests.at(clock.now) + 1 <= total_requests
        decision: Decision = made.of(ACCOUNT, name).admit(wanted)
        may_request = own_request or (limit.dynamic and spare_request)
        assert (decision.refused == "requests") == (not may_request)
        if decision.refused == "requests":
            continue
        requests[name].add(1)
        pool_requests.add(1)
        own = tokens[name].at(clock.now) + wanted <= limit.tokens
        spare = pool_tokens.at(clock.now) + wanted <= total_tokens
        assert (decision.refused == "tokens") == (not (own or (limit.dynamic and spare)))
        if decision.refused is None:
            tokens[name].add(wanted)
            pool_tokens.add(wanted)
            if not limit.dynamic:
                assert tokens[name].used <= limit.tokens
                assert requests[name].used <= limit.requests
        headers = decision.headers(azure=True)
        assert all(value.isdigit() for key, value in headers.items() if key.startswith("x-ratelimit"))
        assert int(headers["x-ratelimit-remaining-tokens"]) >= 0
