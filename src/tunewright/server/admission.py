"""What stands between a request for a completion and its engine: which model answers, whether the quota lets it, and
what the content filter says.

`Admission.resolve` gives a `Route` for the name that a client sent; everything else is asked of that. The database is
asked at most once a second for each name; a quota never.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, select

from tunewright.endpoint.quota import duration
from tunewright.endpoint.shapes import ApiError
from tunewright.server import filter as filters
from tunewright.server import models, quota, store, tables
from tunewright.server.models import Target
from tunewright.server.quota import Allowance, Limits
from tunewright.server.state import Server
from tunewright.server.store import now
from tunewright.server.web import Caller

logger = logging.getLogger("tunewright.server")

READY = "Succeeded"
"""The state of a deployment that serves."""


class Admission:
    """The way in."""

    @staticmethod
    async def resolve(server: Server, caller: Caller, name: str, deployment: bool) -> Route:
        """What answers under a name: a deployment of the caller's account, or else a model of that name.

        A key of an account sees that account's deployments; one of the command line those of all accounts, the oldest
        account's first. A model that is asked for by its own name has no quota, and the default policy.

        Args:
            deployment: the name stood in the path, /openai/deployments/NAME.

        Raises:
            ApiError: 404, nothing does (any more, or yet).
        """
        account = caller.key.account

        async def look() -> _Found:
            said = await asyncio.to_thread(_look, server, account, name)
            if said.account is not None:
                server.quotas.settle(said.account, said.limits)
            return said.found(server)

        try:
            found: _Found = await server.routes.get((account, name), look)
        except _Absent as absent:
            raise _not_found(name, absent, azure=deployment or caller.surface == "azure") from None
        return Route(found.target, found.deployment, server, caller, found.allowance, found.policy)


@dataclass
class Route:
    """A name that a client sent, resolved."""

    target: Target
    deployment: str | None
    """Its name as it was given; None where a model is asked for without one."""
    server: Server
    caller: Caller
    allowance: Allowance | None
    policy: filters.Policy

    @property
    def screens(self) -> bool:
        """Whether answers are looked through: where not, a stream can be passed on as it comes."""
        side = self.policy.completion
        return bool(side.categories or side.blocklists)

    def admit(self, prompt_characters: int, max_tokens: int | None, best_of: int = 1) -> dict[str, str]:
        """Count the request against the deployment's quota; gives the headers that say how it stands.

        Args:
            max_tokens: the longest answer that was asked for; None where nothing was said.
            best_of: how many answers are made.

        Raises:
            ApiError: 429, there is too little of it left.
        """
        if self.allowance is None:
            return {}
        needed = quota.estimate(prompt_characters, max_tokens, best_of)
        decision = self.allowance.admit(needed)
        headers = decision.headers(azure=self.caller.surface == "azure")
        if decision.refused is None:
            return headers
        self.server.metrics.limited.labels(self.deployment, decision.refused).inc()
        raise self._limited(decision, needed, headers)

    async def screen_prompt(
        self, texts: Sequence[str], *, from_users: Sequence[str] | None = None
    ) -> list[dict[str, Any]] | None:
        """Look through a prompt; gives Azure's `prompt_filter_results`, None on OpenAI's surface, which has none.

        Args:
            texts: what the prompt consists of, such as its messages' contents.
            from_users: those of them that users and tools wrote, in which jailbreaks are looked for; default: all.

        Raises:
            ApiError: 400, it is not let through.
        """
        screened = await filters.screen(self.policy.prompt, texts, self.server.classifier, from_users=from_users)
        self._counted("prompt", screened)
        if screened.blocked:
            raise filters.refused_prompt(screened)
        if self.caller.surface != "azure":
            return None
        return [{"prompt_index": 0, "content_filter_results": screened.results}]

    async def screen_output(self, text: str) -> tuple[dict[str, Any] | None, bool]:
        """Look through an answer, or as much of it as there is: Azure's `content_filter_results` (None on OpenAI's
        surface), and whether it must not be shown."""
        screened = await filters.screen(self.policy.completion, (text,), self.server.classifier)
        self._counted("completion", screened)
        return screened.results if self.caller.surface == "azure" else None, screened.blocked

    def used(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Count what the request took."""
        self.server.usage.add(self.caller.key.id, self.target.name, prompt_tokens, completion_tokens)
        self.server.metrics.tokens.labels(self.target.name, "in").inc(prompt_tokens)
        self.server.metrics.tokens.labels(self.target.name, "out").inc(completion_tokens)

    def _counted(self, source: str, screened: filters.Screened) -> None:
        if "error" in screened.results:
            self.server.metrics.unjudged.labels(source).inc()
        for reason in screened.reasons:
            self.server.metrics.filtered.labels(source, reason).inc()

    def _limited(self, decision: quota.Decision, needed: int, headers: Mapping[str, str]) -> ApiError:
        what = "tokens per min (TPM)" if decision.refused == "tokens" else "requests per 10 s"
        window = decision.tokens if decision.refused == "tokens" else decision.requests
        asked = needed if decision.refused == "tokens" else 1
        then = f"Please try again in {duration(decision.retry_s)}."
        if not decision.possible:
            then = "Shorten the prompt, ask for fewer tokens or raise the deployment's capacity; waiting does not help."
        azure = self.caller.surface == "azure"
        return ApiError(
            429,
            f"Rate limit reached for {self.deployment} on {what}: Limit {window.limit}, Used {window.used}, Requested "
            f"{asked}. {then}",
            kind=str(decision.refused),
            code="429" if azure else "rate_limit_exceeded",
            headers=headers,
        )


async def flush(server: Server) -> None:
    """Write down what keys have used since the last time; what cannot be written is kept for the next."""
    counted = server.usage.taken()
    try:
        await asyncio.to_thread(server.usage.write, counted)
    except store.AWAY as error:
        server.usage.give_back(counted)
        logger.warning("usage could not be written, and is kept: %s", error)


class _Absent(Exception):
    """Nothing answers under a name; says why, where there is a reason to say."""


@dataclass(frozen=True)
class _Found:
    target: Target
    deployment: str | None
    allowance: Allowance | None
    policy: filters.Policy


@dataclass(frozen=True)
class _Said:
    """What the database says of a name."""

    target: Target
    policy: filters.Policy
    account: str | None = None
    deployment: str | None = None
    number: int = 0
    limits: Mapping[Hashable, Limits] = field(default_factory=dict)

    def found(self, server: Server) -> _Found:
        allowance = None if self.account is None else server.quotas.of(self.account, self.number)
        return _Found(self.target, self.deployment, allowance, self.policy)


def _look(server: Server, account: str | None, name: str) -> _Said:
    """Raises:
    _Absent: nothing answers under the name.
    """
    if not name.isprintable():  # a NUL or half a letter would be an error of the database
        raise _Absent
    with server.store.read() as connection:
        deployment = _deployment(connection, account, name.lower())
        if deployment is None:
            target = models.known(connection, server.settings.data, name)
            if target is None:
                raise _Absent
            _refuse_retired(target)
            return _Said(target, default_policy())
        if deployment["state"] != READY:
            raise _Absent(f"the deployment is {deployment['state']}" + _because(deployment["error"]))
        target = models.known(connection, server.settings.data, deployment["model"])
        if target is None:
            raise _Absent(f"the deployment's model '{deployment['model']}' is gone")
        _refuse_retired(target)
        policy = _policy(connection, deployment)
        limits = _limits(connection, deployment["account"])
    return _Said(target, policy, deployment["account"], deployment["shown"], deployment["number"], limits)


def _refuse_retired(target: Target) -> None:
    if target.retires is not None and target.retires <= now():
        raise _Absent(f"the model '{target.name}' was retired on {models.day(target.retires)}")


def _deployment(connection: Connection, account: str | None, name: str) -> dict[str, Any] | None:
    accounts, deployments = tables.accounts, tables.deployments
    query = (
        select(deployments)
        .join(accounts, accounts.c.name == deployments.c.account)
        .where(deployments.c.name == name, accounts.c.deleted_at.is_(None))
        .order_by(accounts.c.number)
    )
    if account is not None:
        query = query.where(accounts.c.name == account)
    found = connection.execute(query).mappings().first()
    return dict(found) if found is not None else None


def _limits(connection: Connection, account: str) -> dict[Hashable, Limits]:
    """The quotas of all deployments of an account that serve, by number: dynamic quota borrows among them."""
    table = tables.deployments
    query = select(table).where(table.c.account == account, table.c.state == READY)
    return {
        one["number"]: Limits(one["sku"]["capacity"], bool(one["properties"].get("dynamicThrottlingEnabled")))
        for one in connection.execute(query).mappings()
    }


def _policy(connection: Connection, deployment: Mapping[str, Any]) -> filters.Policy:
    name = deployment["properties"].get("raiPolicyName") or filters.DEFAULT
    if name in filters.SYSTEM:
        return _compiled(name, json.dumps(filters.SYSTEM[name]), "{}")
    row = store.row(connection, tables.policies, account=deployment["account"], name=name.lower())
    if row is None:  # cannot be deleted while it is used; should it be gone all the same, the default holds
        return default_policy()
    query = select(tables.blocklists).where(tables.blocklists.c.account == deployment["account"])
    lists = {one["name"]: one["body"] for one in connection.execute(query).mappings()}
    wanted = {str(one["blocklistName"]).lower() for one in row["body"]["properties"].get("customBlocklists") or ()}
    held = {key: body for key, body in sorted(lists.items()) if key in wanted}
    return _compiled(row["body"]["name"], json.dumps(row["body"]["properties"]), json.dumps(held))


def default_policy() -> filters.Policy:
    return _compiled(filters.DEFAULT, json.dumps(filters.SYSTEM[filters.DEFAULT]), "{}")


@functools.lru_cache(maxsize=128)
def _compiled(name: str, properties: str, lists: str) -> filters.Policy:
    """A policy made ready; kept as long as what it says stays the same, for long blocklists take their time."""
    made = {key: filters.Blocklist(body["name"], body["items"].values()) for key, body in json.loads(lists).items()}
    return filters.policy(name, json.loads(properties), made)


def _because(reason: str | None) -> str:
    return f": {reason}" if reason else ""


def _not_found(name: str, absent: _Absent, *, azure: bool) -> ApiError:
    reason = f" ({absent})" if str(absent) else ""
    if azure:
        return ApiError(
            404,
            f"The API deployment '{name[:128]}' for this resource does not exist{reason}. If you created the "
            "deployment within the last 5 minutes, please wait a moment and try again.",
            code="DeploymentNotFound",
        )
    if not reason:
        return models.unknown(name)
    return ApiError(404, f"The model '{name[:128]}' does not answer{reason}.", param="model", code="model_not_found")
