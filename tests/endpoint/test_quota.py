"""Tokens per minute, on a clock that the test turns."""

from __future__ import annotations

from tunewright.endpoint.quota import Quota


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_minute_begins_with_the_first_request_and_is_fixed() -> None:
    clock = Clock()
    quota = Quota(100, clock)
    assert quota.admit(60).headers == {
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "40",
        "x-ratelimit-reset-tokens": "1m0s",
    }
    clock.now += 45
    assert quota.admit(40).headers["x-ratelimit-reset-tokens"] == "15s"
    clock.now += 14.5
    refused = quota.admit(1)
    assert not refused.admitted
    assert refused.headers["retry-after"] == "1"
    assert refused.headers["retry-after-ms"] == "500"
    assert "x-should-retry" not in refused.headers
    clock.now += 0.5
    assert quota.admit(100).admitted


def test_a_refused_request_costs_nothing() -> None:
    quota = Quota(100, Clock())
    assert quota.admit(90).admitted
    assert not quota.admit(20).admitted
    assert quota.admit(10).admitted


def test_a_request_larger_than_the_quota_is_not_worth_retrying() -> None:
    verdict = Quota(100, Clock()).admit(101)
    assert not verdict.admitted
    assert not verdict.fits
    assert verdict.headers["x-should-retry"] == "false"
    assert verdict.headers["x-ratelimit-remaining-tokens"] == "100"
