"""Azure's control plane for one's own resource: deployments, the models that there are, and usages.

`accounts` has accounts and their keys, `policies` content filters and blocklists; `router` is all of them.

A deployment is a name under which a model answers, with a quota and a content filter. A new one is Creating until the
server has seen that its weights are there (`settle`), then Succeeded, or Failed with the reason. One that serves goes
on serving while it is changed.

What is not as on Azure: all kinds of deployment (sku) run on this machine, so Standard, GlobalStandard and
DataZoneStandard are one thing; Developer differs in that it is removed after 24 hours. A deployment that nobody asks
stays. Versions are kept as they were given: a base's name means one model here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, ValidationError
from sqlalchemy import Connection, delete, func, insert, select, update

from tunewright.endpoint.shapes import Part, explained
from tunewright.server import accounts, arm, documents, models, policies, store, tables, web
from tunewright.server import filter as filters
from tunewright.server.accounts import Account, Tags
from tunewright.server.admission import READY
from tunewright.server.arm import Location, Name, Subscription
from tunewright.server.models import Target
from tunewright.server.quota import REQUEST_WINDOW_S, Limits
from tunewright.server.state import Server
from tunewright.server.store import now
from tunewright.server.web import Admin

logger = logging.getLogger("tunewright.server")

SKUS = {
    "standard": "Standard",
    "globalstandard": "GlobalStandard",
    "datazonestandard": "DataZoneStandard",
    "developer": "Developer",
    "developertier": "Developer",
}
"""Kinds of deployment, which all run here."""
DEVELOPER, DEVELOPER_S = "Developer", 86400
"""The kind that is for trying a model out, and how long such a deployment stays."""
SINCE = "developerSince"
"""Among a deployment's properties, and not shown: when it became one of that kind, unless it was made as one."""
POOL = 1_000_000
"""Thousands of tokens a minute that all deployments of one model and sku in a region may have together."""
FORMAT, VERSION = "OpenAI", "1"
DATED = re.compile(r"(.+)-(\d{4}-\d{2}-\d{2})")
"""A base's name that ends in its version, as clients send it to fine-tune: gpt-4.1-mini-2025-04-14."""
UPGRADES = ("OnceNewDefaultVersionAvailable", "OnceCurrentVersionExpired", "NoAutoUpgrade")

router = APIRouter(tags=["management"], route_class=web.Route)
router.include_router(accounts.router)
router.include_router(policies.router)

DEPLOYMENTS = f"{arm.ACCOUNT}/deployments"
DEPLOYMENT = f"{DEPLOYMENTS}/{{deployment}}"


class SkuIn(Part):
    name: str | None = Field(default=None, max_length=64)
    capacity: int | None = Field(default=None, ge=1, le=POOL)


class ModelIn(Part):
    name: str = Field(min_length=1, max_length=256)
    format: str | None = Field(default=None, max_length=64)
    version: str | None = Field(default=None, max_length=64)


class ScaleIn(Part):
    scaleType: Literal["Standard", "Manual"] | None = None
    capacity: int | None = Field(default=None, ge=1, le=POOL)


class PropertiesIn(Part):
    model: ModelIn
    raiPolicyName: str | None = Field(default=None, max_length=64)
    versionUpgradeOption: (
        Literal["OnceNewDefaultVersionAvailable", "OnceCurrentVersionExpired", "NoAutoUpgrade"] | None
    ) = None
    dynamicThrottlingEnabled: bool | None = None
    scaleSettings: ScaleIn | None = None
    capacitySettings: dict[str, Any] | None = None
    parentDeploymentName: str | None = None
    spilloverDeploymentName: str | None = None


class DeploymentIn(Part):
    properties: PropertiesIn
    sku: SkuIn | None = None
    tags: Tags | None = None


class DeploymentPatch(Part):
    sku: SkuIn | None = None
    tags: Tags | None = None
    properties: dict[str, Any] | None = None


@router.put(DEPLOYMENT, responses=documents.shows(documents.Resource, 200, 201))
def put_deployment(
    request: Request, _caller: Admin, account: Account, deployment: Name, wanted: DeploymentIn
) -> Response:
    row, made = _write(web.server(request), account, deployment, wanted)
    return _answer(account, row, 201 if made else 200)


@router.patch(DEPLOYMENT, responses=documents.shows(documents.Resource))
def patch_deployment(
    request: Request, _caller: Admin, account: Account, deployment: Name, changes: DeploymentPatch
) -> Response:
    """Change what is named, and keep the rest."""
    server = web.server(request)
    row = _found(server, account, deployment)
    properties = {"model": row["properties"]["model"], **_settings(row["properties"]), **(changes.properties or {})}
    sku = {
        **row["sku"],
        **(changes.sku.model_dump(include={"name", "capacity"}, exclude_none=True) if changes.sku else {}),
    }
    tags = row["tags"] if changes.tags is None else changes.tags
    try:
        wanted = DeploymentIn.model_validate({"properties": properties, "sku": sku, "tags": tags})
    except ValidationError as error:
        raise explained(error.errors(include_url=False, include_context=False)[0]) from None
    row, _ = _write(server, account, deployment, wanted)
    return _answer(account, row, 200)


@router.get(DEPLOYMENT, responses=documents.shows(documents.Resource))
def get_deployment(request: Request, _caller: Admin, account: Account, deployment: Name) -> Response:
    return _answer(account, _found(web.server(request), account, deployment), 200)


@router.get(DEPLOYMENTS, responses=documents.shows(documents.Resources))
def list_deployments(request: Request, _caller: Admin, account: Account) -> dict[str, Any]:
    with web.server(request).store.read() as connection:
        return {"value": [shape(account, row) for row in _of(connection, account["name"])]}


@router.delete(DEPLOYMENT, status_code=204, responses=documents.GONE)
def delete_deployment(request: Request, _caller: Admin, account: Account, deployment: Name) -> Response:
    """It stops answering at once; in other servers, within a second."""
    server = web.server(request)
    table = tables.deployments
    with server.store.begin() as connection:
        gone = connection.execute(
            delete(table).where(table.c.account == account["name"], table.c.name == deployment.lower())
        )
    server.routes.forget()
    return Response(status_code=200 if gone.rowcount else 204)


@router.get(f"{DEPLOYMENT}/skus", responses=documents.shows(documents.Values))
def list_deployment_skus(request: Request, _caller: Admin, account: Account, deployment: Name) -> dict[str, Any]:
    _found(web.server(request), account, deployment)
    value = [
        {"resourceType": f"{arm.PROVIDER}/accounts/deployments", "sku": {"name": name}, "capacity": CAPACITY}
        for name in dict.fromkeys(SKUS.values())
    ]
    return {"value": value}


@router.get(f"{arm.ACCOUNT}/models", responses=documents.shows(documents.Values))
def list_account_models(request: Request, _caller: Admin, account: Account) -> dict[str, Any]:
    with web.server(request).store.read() as connection:
        return {"value": list(_models(connection))}


@router.get(f"{arm.LOCATION}/models", responses=documents.shows(documents.Values))
def list_models(request: Request, _caller: Admin, subscription: Subscription, location: Location) -> dict[str, Any]:
    with web.server(request).store.read() as connection:
        return {"value": [{"kind": "OpenAI", "skuName": "S0", "model": one} for one in _models(connection)]}


@router.get(f"{arm.LOCATION}/usages", responses=documents.shows(documents.Values))
def list_usages(request: Request, _caller: Admin, subscription: Subscription, location: Location) -> dict[str, Any]:
    with web.server(request).store.read() as connection:
        return {"value": _usages(_capacities(connection, subscription, arm.location(location)))}


@router.get(f"{arm.ACCOUNT}/usages", responses=documents.shows(documents.Values))
def list_account_usages(request: Request, _caller: Admin, account: Account) -> dict[str, Any]:
    with web.server(request).store.read() as connection:
        found: dict[str, int] = {}
        for row in _of(connection, account["name"]):
            pool = _pool(connection, row["sku"]["name"], row["model"])
            found[pool] = found.get(pool, 0) + row["sku"]["capacity"]
        return {"value": _usages(found)}


def settle(server: Server) -> None:
    """Take deployments that are Creating to their end: Succeeded where the weights are there, Failed where not."""
    table = tables.deployments
    with server.store.read() as connection:
        creating = [
            (row, models.known(connection, server.settings.data, row["model"]))
            for row in connection.execute(select(table).where(table.c.state == "Creating")).mappings().all()
        ]
    settled = [
        (row, _missing(row["model"], target) or (_retired(target) if target is not None else None))
        for row, target in creating
    ]
    for row, problem in settled:
        values = {"state": READY, "error": None} if problem is None else {"state": "Failed", "error": problem}
        with server.store.begin() as connection:
            same = (table.c.number == row["number"], table.c.state == "Creating", table.c.model == row["model"])
            connection.execute(update(table).where(*same).values(**values))
    if settled:
        server.routes.forget()


def remove_expired(server: Server) -> None:
    """End the Developer deployments whose day is over.

    One statement: one that becomes of another kind meanwhile stays.
    """
    table = tables.deployments
    since = func.coalesce(table.c.properties[SINCE].as_integer(), table.c.created_at)
    over_now = (table.c.sku["name"].as_string() == DEVELOPER, since <= now() - DEVELOPER_S)
    with server.store.begin() as connection:
        ended = delete(table).where(*over_now).returning(table.c.shown, table.c.account)
        over = connection.execute(ended).mappings().all()
    for row in over:
        logger.info("the Developer deployment %s of %s has been removed after 24 hours", row["shown"], row["account"])
    if over:
        server.routes.forget()


def shape(account: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """A deployment as clients see it."""
    limits = Limits(row["sku"]["capacity"])
    properties = {
        "model": row["properties"]["model"],
        "versionUpgradeOption": UPGRADES[0],
        "raiPolicyName": filters.DEFAULT,
        "dynamicThrottlingEnabled": False,
        **_settings(row["properties"]),
        "capabilities": {"chatCompletion": "true", "completion": "true"},
        "currentCapacity": limits.capacity,
        "rateLimits": [
            {"key": "request", "renewalPeriod": REQUEST_WINDOW_S, "count": limits.requests},
            {"key": "token", "renewalPeriod": 60, "count": limits.tokens},
        ],
        "provisioningState": row["state"],
    }
    shown = {
        "id": f"{accounts.id_of(dict(account))}/deployments/{row['shown']}",
        "name": row["shown"],
        "type": f"{arm.PROVIDER}/accounts/deployments",
        "sku": row["sku"],
        "properties": properties,
        "systemData": {"createdAt": arm.iso(row["created_at"])},
    }
    if row["tags"]:
        shown["tags"] = row["tags"]
    shown["etag"] = arm.etag(shown)
    if row["error"]:  # where the SDK's poller looks for the reason
        shown["error"] = {"code": "DeploymentFailed", "message": row["error"]}
    return shown


SETTINGS = ("raiPolicyName", "versionUpgradeOption", "dynamicThrottlingEnabled")
CAPACITY = {"minimum": 1, "maximum": POOL, "step": 1, "default": 10}


def _settings(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {name: properties[name] for name in SETTINGS if properties.get(name) is not None}


def _answer(account: Mapping[str, Any], row: Mapping[str, Any], status: int) -> Response:
    """While a deployment is being made, clients are told to look again in a second; their own pause is 30."""
    headers = {"retry-after": "1"} if row["state"] == "Creating" else {}
    return JSONResponse(shape(account, row), status, headers)


def _write(server: Server, account: Mapping[str, Any], name: str, wanted: DeploymentIn) -> tuple[dict[str, Any], bool]:
    """Make or change a deployment; gives its row, and whether it is a new one.

    Raises:
        ApiError: 400, it asks for what is not there, cannot be honoured, or is more than the quota.
    """
    sku = _sku(wanted)
    table = tables.deployments
    with server.store.begin() as connection:
        live = select(tables.accounts.c.deleted_at).where(tables.accounts.c.number == account["number"])
        if connection.execute(live.with_for_update()).one_or_none() != (None,):
            raise arm.not_found("accounts", account["body"]["name"], f"resource group '{account['resource_group']}'")
        target = _target(connection, server.settings.data, wanted.properties.model)
        before = store.row(connection, table, account=account["name"], name=name.lower())
        properties = {
            "model": {
                "format": wanted.properties.model.format or FORMAT,
                "name": wanted.properties.model.name,
                "version": wanted.properties.model.version or VERSION,
            },
            **_settings(wanted.properties.model_dump(include=set(SETTINGS))),
        }
        policy = policies.named(connection, account["name"], properties.get("raiPolicyName"))
        if policy is not None:
            properties["raiPolicyName"] = policy
        _check_quota(connection, account, sku, target, before)
        if (since := _since(sku, before)) is not None:
            properties[SINCE] = since
        values = {"model": target.name, "sku": sku, "properties": properties, "tags": wanted.tags, "error": None}
        if before is not None and before["state"] == READY:
            problem = _missing(target.name, target)
            if problem is None and target.name != before["model"]:
                problem = _retired(target)
            if problem is not None:  # it goes on serving what it serves
                raise arm.bad(problem, "DeploymentModelNotSupported")
            state = READY
        else:
            state = "Creating"
        if before is None:
            row = {"account": account["name"], "name": name.lower(), "shown": name, "created_at": now()}
            connection.execute(insert(table).values(**row, **values, state=state))
        else:
            connection.execute(update(table).where(table.c.number == before["number"]).values(**values, state=state))
        after = store.row(connection, table, account=account["name"], name=name.lower())
    assert after is not None
    server.routes.forget()
    return after, before is None


def _since(sku: Mapping[str, Any], before: Mapping[str, Any] | None) -> int | None:
    """When a deployment became a Developer one; None for one that is none, or was made as one."""
    if before is None or sku["name"] != DEVELOPER:
        return None
    if before["sku"]["name"] != DEVELOPER:
        return now()
    since: int | None = before["properties"].get(SINCE)
    return since


def _sku(wanted: DeploymentIn) -> dict[str, Any]:
    properties = wanted.properties
    for name in ("capacitySettings", "parentDeploymentName", "spilloverDeploymentName"):
        if getattr(properties, name):
            raise arm.bad(f"properties.{name} cannot be honoured: deployments are not tied to one another here.")
    scale = properties.scaleSettings
    said = wanted.sku.name if wanted.sku is not None and wanted.sku.name else "Standard"
    sku = SKUS.get(said.casefold())
    if sku is None:
        why = (
            "it counts in provisioned units or batches"
            if re.search("provisioned|batch", said, re.I)
            else "there is none"
        )
        raise arm.bad(
            f"The sku '{said}' cannot be honoured: {why}. Choose {', '.join(dict.fromkeys(SKUS.values()))}, whose "
            "capacity is thousands of tokens a minute.",
            "InvalidResourceProperties",
        )
    capacity = (wanted.sku.capacity if wanted.sku else None) or (scale.capacity if scale else None) or 1
    return {"name": sku, "capacity": capacity}


def _target(connection: Connection, data: Path, wanted: ModelIn) -> Target:
    """The model that a deployment names: by name and version as one (gpt-4.1-2025-04-14), by its name, or by the newest
    version of its name that there is."""
    names = [f"{wanted.name}-{wanted.version}"] if wanted.version else []
    names.append(wanted.name)
    if not wanted.version:
        query = select(tables.bases.c.name)
        dated = [
            name for name in connection.execute(query).scalars() if (m := DATED.fullmatch(name)) and m[1] == wanted.name
        ]
        names += sorted(dated, reverse=True)
    for name in names:
        if (target := models.known(connection, data, name)) is not None:
            return target
    raise arm.bad(
        f"The model 'Format: {wanted.format or FORMAT}, Name: {wanted.name}, Version: {wanted.version or ''}' of "
        "account deployment is not supported: no base and no tuned model has this name. `tunewright models add` "
        "names a base; GET .../models lists what there is.",
        "DeploymentModelNotSupported",
    )


def _missing(name: str, target: Target | None) -> str | None:
    """What a model lacks to serve; None for nothing, as far as can be seen without loading it."""
    if target is None:
        return f"The model '{name}' is gone."
    if target.folder is not None and not target.folder.is_dir():
        return f"The weights of '{name}' are not in the data folder any more."
    if target.kind != "full" and Path(target.source).is_absolute() and not Path(target.source).exists():
        return f"The base of '{name}', {target.source}, is not there any more."
    return None


def _retired(target: Target) -> str | None:
    """That a base answers no more, from the day that was set for it; what was tuned from it goes on."""
    if target.retires is None or target.retires > now():
        return None
    return f"The model '{target.name}' was retired on {models.day(target.retires)}."


def _check_quota(
    connection: Connection,
    account: Mapping[str, Any],
    sku: Mapping[str, Any],
    target: Target,
    before: Mapping[str, Any] | None,
) -> None:
    pool = _pool(connection, sku["name"], target.name)
    used = _capacities(connection, account["subscription"], account["location"]).get(pool, 0)
    if before is not None and _pool(connection, before["sku"]["name"], before["model"]) == pool:
        used -= before["sku"]["capacity"]
    if used + sku["capacity"] > POOL:
        raise arm.bad(
            f"This operation requires {sku['capacity']} new capacity in quota {_label(pool)}, which is bigger than the "
            f"current available capacity {POOL - used}. The current quota usage is {used} and the quota limit is "
            f"{POOL}.",
            "InsufficientQuota",
        )


def _pool(connection: Connection, sku: str, model: str) -> str:
    """What a deployment's capacity is counted under, as Azure names it: OpenAI.Standard.gpt-4.1-finetune."""
    tuned = store.row(connection, tables.models, id=model)
    return f"OpenAI.{sku}.{model}" if tuned is None else f"OpenAI.{sku}.{tuned['base']}-finetune"


def _label(pool: str) -> str:
    _, sku, model = pool.split(".", 2)
    return f"Tokens Per Minute (thousands) - {model} - {sku}"


def _capacities(connection: Connection, subscription: str, location: str) -> dict[str, int]:
    """Capacity in use in a region, by what it is counted under."""
    there = [
        one["name"]
        for one in connection.execute(select(tables.accounts)).mappings()
        if one["subscription"].lower() == subscription.lower() and one["location"] == location
    ]
    found: dict[str, int] = {}
    table = tables.deployments
    for row in connection.execute(select(table).where(table.c.account.in_(there))).mappings().all():
        pool = _pool(connection, row["sku"]["name"], row["model"])
        found[pool] = found.get(pool, 0) + row["sku"]["capacity"]
    return found


def _usages(found: Mapping[str, int]) -> list[dict[str, Any]]:
    return [
        {
            "name": {"value": pool, "localizedValue": _label(pool)},
            "currentValue": float(used),
            "limit": float(POOL),
            "unit": "Count",
        }
        for pool, used in sorted(found.items())
    ]


def _of(connection: Connection, account: str) -> list[dict[str, Any]]:
    table = tables.deployments
    query = select(table).where(table.c.account == account).order_by(table.c.number)
    return [dict(row) for row in connection.execute(query).mappings()]


def _found(server: Server, account: Mapping[str, Any], name: str) -> dict[str, Any]:
    with server.store.read() as connection:
        row = store.row(connection, tables.deployments, account=account["name"], name=name.lower())
    if row is None:
        raise arm.not_found("accounts/deployments", name, f"account '{account['body']['name']}'")
    return row


def _models(connection: Connection) -> Iterable[dict[str, Any]]:
    """Bases and tuned models in the form that Azure lists models in."""
    bases = {one["name"]: one for one in models.named_bases(connection)}
    newest: dict[str, str] = {}
    for name in bases:  # in the order of their names, so that the last version stays
        root, _ = _versioned(name)
        newest[root] = name
    for name, base in bases.items():
        root, version = _versioned(name)
        yield _model(root, version, base, default=newest[root] == name, finetune=True)
    for tuned in connection.execute(select(tables.models).order_by(tables.models.c.number)).mappings():
        root, version = _versioned(tuned["base"])
        shown = _model(tuned["id"], VERSION, bases.get(tuned["base"]), default=True, finetune=not tuned["checkpoint"])
        yield shown | {"baseModel": {"format": FORMAT, "name": root, "version": version}}


def _versioned(name: str) -> tuple[str, str]:
    match = DATED.fullmatch(name)
    return (match[1], match[2]) if match else (name, VERSION)


def _model(name: str, version: str, base: Mapping[str, Any] | None, *, default: bool, finetune: bool) -> dict[str, Any]:
    retires = base["retires_at"] if base is not None else None
    until = base["fine_tune_until"] if base is not None else None
    dates = {"fineTune": until, "inference": retires}
    said: dict[str, Any] = {key: arm.iso(value) for key, value in dates.items() if value is not None}
    status = "GenerallyAvailable"
    if said:
        said["deprecationStatus"] = "Planned"
        status = "Deprecated" if retires is not None and retires <= now() else "Deprecating"
    trainable = finetune and (until is None or until > now())
    return {
        "format": FORMAT,
        "name": name,
        "version": version,
        "isDefaultVersion": default,
        "maxCapacity": POOL,
        "skus": [
            {
                "name": sku,
                "usageName": f"OpenAI.{sku}.{name}",
                "capacity": CAPACITY,
                "rateLimits": [
                    {"key": "request", "renewalPeriod": REQUEST_WINDOW_S, "count": 1},
                    {"key": "token", "renewalPeriod": 60, "count": 1000},
                ],
            }
            for sku in dict.fromkeys(SKUS.values())
        ],
        "capabilities": {"chatCompletion": "true", "completion": "true", "fineTune": str(trainable).lower()},
        "lifecycleStatus": status,
        "deprecation": said,
    }
