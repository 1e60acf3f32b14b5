"""Clients of the control plane for tests: the SDK, and plain requests as labs make them."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from typing import Any

from azure.core.credentials import AccessToken
from azure.mgmt.cognitiveservices import CognitiveServicesManagementClient
from sqlalchemy import insert

from server_running import Running
from tunewright.server import models, tables
from tunewright.server.state import Server
from tunewright.server.store import now

SUBSCRIPTION = "00000000-0000-0000-0000-000000000000"
LOCAL = (
    f"/subscriptions/{SUBSCRIPTION}/resourceGroups/local/providers/Microsoft.CognitiveServices/accounts/local"
)  # fmt: skip
PLAIN = {"enforce_https": False}
"""What the SDK needs to be told on each call: loopback has no TLS."""


class Token:
    """A credential whose token is one of our keys."""

    def __init__(self, key: str) -> None:
        self.key = key

    def get_token(self, *_scopes: str, **_others: Any) -> AccessToken:
        return AccessToken(self.key, int(time.time()) + 3600)


def sdk(served: Running, key: str | None = None) -> CognitiveServicesManagementClient:
    return CognitiveServicesManagementClient(
        Token(key or served.admin_key),
        SUBSCRIPTION,
        base_url=served.url,
        credential_scopes=[f"{served.url}/.default"],
        retry_total=0,
        polling_interval=0.05,
    )


def call(
    served: Running, method: str, path: str, body: Any = None, *, key: str | None = None, **headers: str
) -> tuple[int, Any]:
    """Status and JSON of a plain request."""
    sent = urllib.request.Request(
        f"{served.url}{path}",
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={
            "authorization": f"Bearer {key or served.admin_key}",
            "content-type": "application/json",
            **headers,
        },
    )
    try:
        with urllib.request.urlopen(sent, timeout=30) as reply:
            text = reply.read()
            return reply.status, json.loads(text) if text else None
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def add_base(server: Server, name: str, **dates: int) -> None:
    """A base of a name; its weights are nowhere, for nothing loads them here."""
    models.add_base(server.store, name, "some/base")
    if dates:
        with server.store.begin() as connection:
            connection.execute(tables.bases.update().where(tables.bases.c.name == name).values(**dates))


def add_tuned(server: Server, name: str, base: str, *, there: bool = True) -> None:
    """A tuned model, with or without its folder."""
    folder = f"runs/{abs(hash(name))}/adapter"
    if there:
        (server.settings.data / folder).mkdir(parents=True)
    row = {"id": name, "created_at": now(), "job_id": "ftjob-1", "base": base, "source": "some/base"}
    row |= {"folder": folder, "kind": "adapter", "checkpoint": False}
    with server.store.begin() as connection:
        connection.execute(insert(tables.models).values(**row))


def deployment(model: str, *, capacity: int = 1, sku: str = "Standard", **properties: Any) -> dict[str, Any]:
    """The body of a PUT."""
    return {
        "sku": {"name": sku, "capacity": capacity},
        "properties": {"model": {"format": "OpenAI", "name": model, "version": "1"}, **properties},
    }


def deployed(served: Running, name: str, body: dict[str, Any]) -> dict[str, Any]:
    """Put a deployment and wait until it serves."""
    status, said = call(served, "PUT", f"{LOCAL}/deployments/{name}", body)
    assert status in (200, 201), said
    deadline = time.monotonic() + 10
    while said["properties"]["provisioningState"] == "Creating":
        assert time.monotonic() < deadline, said
        time.sleep(0.05)
        _, said = call(served, "GET", f"{LOCAL}/deployments/{name}")
    assert said["properties"]["provisioningState"] == "Succeeded", said
    return said
