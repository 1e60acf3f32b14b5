"""What the server counts, for Prometheus: GET /metrics.

No key is needed there: it says how many requests, tokens and jobs there were, by route, model and status, never what
was asked, or by whose key. Whoever must not read the names of models should not reach the server's port.

Each process counts its own; what Prometheus adds up. Jobs are counted in the database when they are asked for.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunewright.server import tables
from tunewright.server.store import Store

TEXT = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
UNMATCHED = "unmatched"
"""The route of a request that none answers, so that made-up paths do not become labels."""

router = APIRouter()


@router.get("/metrics", response_class=PlainTextResponse)
def show(request: Request) -> Response:
    return Response(generate_latest(request.app.state.server.metrics.registry), media_type=TEXT)


class Metrics:
    """The counters of one server."""

    def __init__(self, store: Store) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "tunewright_requests", "Requests that were answered.", ("route", "method", "status"), registry=registry
        )
        self.seconds = Histogram(
            "tunewright_request_seconds",
            "Time to the end of the answer.",
            ("route",),
            buckets=BUCKETS,
            registry=registry,
        )
        self.tokens = Counter(
            "tunewright_tokens", "Tokens of prompts (in) and answers (out).", ("model", "kind"), registry=registry
        )
        self.limited = Counter(
            "tunewright_rate_limited", "Requests refused for a quota (429).", ("deployment", "kind"), registry=registry
        )
        self.filtered = Counter(
            "tunewright_filtered", "Texts that the content filter stopped.", ("source", "reason"), registry=registry
        )
        self.unjudged = Counter(
            "tunewright_filter_down",
            "Texts let through since the classifier did not answer.",
            ("source",),
            registry=registry,
        )
        self.engines = Gauge(
            "tunewright_engines", "Engines that are up: processes that hold a model.", registry=registry
        )
        self.registry.register(_Jobs(store))
        self._answered: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request. The children are kept, since finding them takes longer than counting."""
        key = (route, method, status)
        found = self._answered.get(key)
        if found is None:
            found = self._answered[key] = (self.requests.labels(route, method, status), self.seconds.labels(route))
        found[0].inc()
        found[1].observe(seconds)


class Measured:
    """ASGI middleware: counts what was answered."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 499  # where the client left before there was an answer

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            self.metrics.answered(_route(scope), scope["method"], status, time.perf_counter() - began)


class _Jobs(Collector):
    """Jobs by status, counted when somebody looks."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterable[GaugeMetricFamily]:
        family = GaugeMetricFamily("tunewright_jobs", "Fine-tuning jobs.", labels=("status",))
        with self._store.read() as connection:
            query = select(tables.jobs.c.status, func.count()).group_by(tables.jobs.c.status)
            for status, count in connection.execute(query):
                family.add_metric((status,), count)
        yield family

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """Without this the registry would ask the database when it is made."""
        return [GaugeMetricFamily("tunewright_jobs", "Fine-tuning jobs.", labels=("status",))]


METHODS = frozenset(("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"))
PREFIXES = ("/openai/v1", "/v1", "/openai")


def _route(scope: Scope) -> str:
    """The template of the route that answered, such as /v1/files/{file_id}."""
    template = getattr(scope.get("route"), "path_format", None)
    if template is None or scope["method"] not in METHODS:
        return UNMATCHED
    for prefix in PREFIXES:  # FastAPI notes a route as its router has it, without the prefix it was included with
        if scope["path"].startswith(f"{prefix}/"):
            return str(template) if template.startswith(f"{prefix}/") else prefix + template
    return str(template)
