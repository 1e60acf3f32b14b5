"""The routes of the server's app as tests go through them: all that there are, so that a new one is among them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import httpx2
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from management_client import SUBSCRIPTION

OPEN = {"/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}
"""Paths that need no key."""
NAMES = {"subscription": SUBSCRIPTION, "group": "local", "account": "local", "location": "local"}
"""What stands in a path for a parameter; everything else is called `none` and is nowhere."""
PREFIXES = ("/openai/v1", "/openai", "/v1")


@dataclass(frozen=True)
class Route:
    method: str
    template: str
    reads_json: bool

    @property
    def path(self) -> str:
        return re.sub(r"\{(\w+)(:path)?\}", lambda found: NAMES.get(found[1], "none"), self.template)

    @property
    def bare(self) -> str:
        """The template without the prefix that it shares with its likes."""
        prefix = next((one for one in PREFIXES if self.template.startswith(f"{one}/")), "")
        return self.template.removeprefix(prefix)

    @property
    def scope(self) -> str | None:
        if self.template in OPEN:
            return None
        if self.template.startswith("/subscriptions"):
            return "admin"
        trains = self.bare.startswith(("/files", "/uploads", "/fine_tuning")) or self.method == "DELETE"
        return "training" if trains and not self.bare.startswith("/responses") else "inference"


def routes(app: FastAPI) -> Iterator[Route]:
    for one in iter_route_contexts(app.routes):
        assert one.path is not None
        extra = getattr(one, "openapi_extra", None) or {}
        shown = extra.get("requestBody", {}).get("content", {})
        reads_json = getattr(one, "body_field", None) is not None or "application/json" in shown
        for method in sorted((one.methods or set()) - {"HEAD"}):
            yield Route(method, one.path, reads_json)


def check_error(reply: httpx2.Response, *statuses: int) -> None:
    """The reply is an error in its surface's form."""
    asked = reply.request
    where = f"{asked.method} {asked.url} {asked.content[:200]!r}: {reply.status_code} {reply.text[:300]}"
    assert reply.status_code in statuses, where
    assert reply.headers["content-type"] == "application/json", where
    body = reply.json()
    assert set(body) == {"error"}, where
    management = reply.request.url.path.lower().startswith("/subscriptions")
    assert set(body["error"]) == ({"code", "message"} if management else {"message", "type", "param", "code"}), where
    assert body["error"]["message"], where
