"""The forms of Azure's control plane: its paths, ids, errors and lists."""

from __future__ import annotations

import hashlib
import json
import re
import time
from typing import Annotated, Any

from fastapi import Path
from starlette.types import ASGIApp, Receive, Scope, Send

from tunewright.endpoint.shapes import ApiError

PROVIDER = "Microsoft.CognitiveServices"
SUBSCRIPTION = "/subscriptions/{subscription}"
ACCOUNTS = f"{SUBSCRIPTION}/resourceGroups/{{group}}/providers/{PROVIDER}/accounts"
ACCOUNT = f"{ACCOUNTS}/{{account}}"
LOCATION = f"{SUBSCRIPTION}/providers/{PROVIDER}/locations/{{location}}"

WORDS = (
    "subscriptions",
    "resourceGroups",
    "providers",
    "accounts",
    "deletedAccounts",
    "deployments",
    "locations",
    "models",
    "usages",
    "skus",
    "listKeys",
    "regenerateKey",
    "raiPolicies",
    "raiBlocklists",
    "raiBlocklistItems",
    "addRaiBlocklistItems",
    "deleteRaiBlocklistItems",
    "raiContentFilters",
)
SPELLED = {word.lower(): word for word in WORDS}

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
LOOSE = r"^[A-Za-z0-9_().-]{1,90}$"

Subscription = Annotated[str, Path(pattern=LOOSE)]
Group = Annotated[str, Path(pattern=LOOSE)]
Location = Annotated[str, Path(pattern=r"^[A-Za-z0-9 ._-]{1,64}$")]
Name = Annotated[str, Path(pattern=NAME)]

CODES = {
    400: "InvalidRequestContent",
    401: "InvalidAuthenticationToken",
    403: "AuthorizationFailed",
    404: "ResourceNotFound",
    405: "MethodNotAllowed",
    408: "RequestTimeout",
    409: "Conflict",
    413: "RequestTooLarge",
    415: "UnsupportedMediaType",
    503: "ServiceUnavailable",
}
"""What the control plane calls an error that the rest of the server calls otherwise."""


class AnyCase:
    """ASGI middleware: in paths of the control plane, the words that Azure takes in any case are spelled as routes are.

    What stands for a kind of thing is every second part of a path; what stands between are names, which stay.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and is_path(scope["path"]):
            parts = scope["path"].split("/")
            for place in range(1, len(parts), 2):
                parts[place] = SPELLED.get(parts[place].lower(), parts[place])
                if (
                    parts[place] == "providers"
                    and place + 1 < len(parts)
                    and parts[place + 1].lower() == PROVIDER.lower()
                ):
                    parts[place + 1] = PROVIDER
            scope = {**scope, "path": "/".join(parts)}
        await self.app(scope, receive, send)


def is_path(path: str) -> bool:
    """Whether it is the control plane that a path asks."""
    return path[:14].lower() == "/subscriptions"


def body(error: ApiError) -> dict[str, Any]:
    """An error as the control plane says it."""
    said = error.body["error"]
    code = said["code"] if (said["code"] or "")[:1].isupper() else CODES.get(error.status, "InternalServerError")
    return {"error": {"code": code, "message": said["message"]}}


def not_found(kind: str, name: str, where: str) -> ApiError:
    return ApiError(
        404, f"The Resource '{PROVIDER}/{kind}/{name}' under {where} was not found.", code="ResourceNotFound"
    )


def bad(message: str, code: str = "InvalidRequestContent", *, status: int = 400) -> ApiError:
    return ApiError(status, message, code=code)


def location(said: str) -> str:
    """A region's name as Azure compares them: North Central US is northcentralus."""
    return re.sub(r"\s", "", said).lower()


def iso(seconds: int) -> str:
    """Unix time as the control plane writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def etag(value: Any) -> str:
    """Changes when the value does."""
    return f'"{hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]}"'
