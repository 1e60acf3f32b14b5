"""The routes of the server's app as tests go through them: all that there are, so that a new one is among them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from management_client import SUBSCRIPTION, deployment

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
        trains = self.bare.startswith(("/files", "/uploads", "/batches", "/fine_tuning")) or self.method == "DELETE"
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


def kind_of(one: Route) -> tuple[str, str]:
    return one.method, "{account}" + one.template.partition("/accounts/{account}")[
        2
    ] if one.scope == "admin" else one.bare


ROWS = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 12
GRADER = {"type": "string_check", "name": "g", "input": "{{ sample.output_text }}", "operation": "eq", "reference": "a"}
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CHAT = {
    "model": "base",
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "n"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": "b"},
    ],
    "tools": [{"type": "function", "function": FUNCTION}],
    "stop": ["z"],
    "temperature": 1.0,
    "seed": 1,
    "max_tokens": 5,
    "logit_bias": {"5": 1},
    "metadata": {"k": "v"},
    "user": "u",
}  # fmt: skip
TEXT = {"model": "base", "prompt": ["a"], "stop": "z", "max_tokens": 5, "seed": 1, "user": "u"}
EMBEDDING = {"model": "base", "input": "a"}
JOB = {
    "model": "base",
    "training_file": "FILE",
    "suffix": "s",
    "seed": 1,
    "metadata": {"k": "v"},
    "method": {"type": "reinforcement", "reinforcement": {"grader": GRADER, "hyperparameters": {"n_epochs": 1}}},
    "integrations": [],
}
POLICY = {
    "properties": {
        "mode": "Default",
        "basePolicyName": "Microsoft.DefaultV2",
        "contentFilters": [
            {"name": "Hate", "enabled": True, "blocking": True, "severityThreshold": "Low", "source": "Prompt"}
        ],
    }
}
ITEM = {"properties": {"pattern": "p+", "isRegex": True}}
ACCOUNT = {
    "kind": "OpenAI",
    "sku": {"name": "S0"},
    "location": "local",
    "tags": {"k": "v"},
    "properties": {"customSubDomainName": "c"},
}
GOOD: dict[tuple[str, str], Any] = {
    ("POST", "/chat/completions"): CHAT,
    ("POST", "/deployments/{deployment}/chat/completions"): CHAT,
    ("POST", "/completions"): TEXT,
    ("POST", "/deployments/{deployment}/completions"): TEXT,
    ("POST", "/embeddings"): EMBEDDING,
    ("POST", "/deployments/{deployment}/embeddings"): EMBEDDING,
    ("POST", "/responses"): {
        "model": "base",
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}],
        "instructions": "i",
        "metadata": {"k": "v"},
        "text": {"format": {"type": "text"}},
        "tools": [{"type": "function", **FUNCTION}],
        "top_p": 1.0,
        "include": ["x"],
    },
    ("POST", "/uploads"): {
        "filename": "f",
        "purpose": "fine-tune",
        "bytes": 10,
        "mime_type": "text/jsonl",
        "expires_after": {"anchor": "created_at", "seconds": 3600},
    },
    ("POST", "/uploads/{upload_id}/complete"): {"part_ids": ["p"], "md5": "m"},
    ("POST", "/fine_tuning/jobs"): JOB,
    ("POST", "/batches"): {
        "input_file_id": "BATCH",
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
        "metadata": {"k": "v"},
        "output_expires_after": {"anchor": "created_at", "seconds": 3600},
    },
    ("POST", "/fine_tuning/alpha/graders/validate"): {"grader": GRADER},
    ("POST", "/fine_tuning/alpha/graders/run"): {"grader": GRADER, "model_sample": "a", "item": {"b": "c"}},
    ("POST", "/moderations"): {"input": ["a", {"type": "text", "text": "b"}], "model": "m"},
    ("PUT", "{account}"): ACCOUNT,
    ("PATCH", "{account}"): ACCOUNT,
    ("POST", "{account}/regenerateKey"): {"keyName": "Key1"},
    ("PUT", "{account}/deployments/{deployment}"): {
        **deployment("base", raiPolicyName="Microsoft.DefaultV2", scaleSettings={"capacity": 1}),
        "tags": {"k": "v"},
    },
    ("PATCH", "{account}/deployments/{deployment}"): {
        "sku": {"name": "Standard", "capacity": 2},
        "tags": {"k": "v"},
        "properties": {"model": {"name": "base"}},
    },
    ("PUT", "{account}/raiPolicies/{policy}"): POLICY,
    ("PUT", "{account}/raiBlocklists/{blocklist}"): {"properties": {"description": "d"}},
    ("PUT", "{account}/raiBlocklists/{blocklist}/raiBlocklistItems/{item}"): ITEM,
    ("POST", "{account}/raiBlocklists/{blocklist}/addRaiBlocklistItems"): [{"name": "i", **ITEM}],
    ("POST", "{account}/raiBlocklists/{blocklist}/deleteRaiBlocklistItems"): ["i"],
}  # fmt: skip
"""For each route that reads JSON a body that it takes, in an order in which they can be asked."""
