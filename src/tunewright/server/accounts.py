"""Accounts of the control plane: made, changed, deleted softly and purged; their keys.

An account is a namespace for deployments, policies and keys. One, `local` in the resource group `local`, is there
from the start. What an account promises on Azure about networks and encryption cannot be promised here, and is
refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field
from sqlalchemy import Connection, Select, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from tunewright.endpoint.shapes import Part
from tunewright.server import account_keys, arm, documents, store, tables, web
from tunewright.server.arm import Group, Location, Name, Subscription
from tunewright.server.state import Server
from tunewright.server.store import now
from tunewright.server.web import Admin

LOCAL = "local"
"""The account that is there from the start, its resource group and its region."""
LOCAL_SUBSCRIPTION = "00000000-0000-0000-0000-000000000000"
KINDS = {"openai": "OpenAI", "aiservices": "AIServices", "cognitiveservices": "CognitiveServices"}
PURGED_AFTER_S = 48 * 3600
"""Azure purges a deleted account by itself after 48 hours. Here it waits until somebody does; the date is shown."""

router = APIRouter(tags=["management"], route_class=web.Route)

Tags = Annotated[
    dict[Annotated[str, Field(max_length=512)], Annotated[str, Field(max_length=256)]], Field(max_length=50)
]


class SkuIn(Part):
    name: str = Field(max_length=64)


class AclsIn(Part):
    defaultAction: str | None = None


class AccountProperties(Part):
    customSubDomainName: Annotated[str, Field(pattern=arm.NAME)] | None = None
    publicNetworkAccess: Literal["Enabled", "Disabled", "SecuredByPerimeter"] | None = None
    networkAcls: AclsIn | None = None
    disableLocalAuth: bool | None = None
    encryption: dict[str, Any] | None = None
    restore: bool | None = None


class AccountIn(Part):
    kind: str | None = Field(default=None, max_length=64)
    sku: SkuIn | None = None
    location: Annotated[str, Field(pattern=r"^[A-Za-z0-9 ._-]{1,64}$")] | None = None
    tags: Tags | None = None
    properties: AccountProperties | None = None


class RegenerateIn(Part):
    keyName: Literal["Key1", "Key2", "key1", "key2"]


def ensure_local(server: Server) -> None:
    """Make the account that is there from the start, unless it is or was there: one that was deleted stays deleted."""
    with server.store.begin() as connection:
        if store.row(connection, tables.accounts, name=LOCAL) is not None:
            return
        savepoint = connection.begin_nested()
        body = {"name": LOCAL, "kind": "OpenAI", "sku": {"name": "S0"}, "tags": {}, "properties": {}}
        try:
            _insert(connection, LOCAL_SUBSCRIPTION, LOCAL, LOCAL, body)
            savepoint.commit()
        except IntegrityError:  # another server has made it this moment
            savepoint.rollback()


def found(request: Request, subscription: Subscription, group: Group, account: Name) -> dict[str, Any]:
    """A dependency: the account that a path names.

    Raises:
        ApiError: 404, there is none (any more).
    """
    with web.server(request).store.read() as connection:
        row = _find(connection, subscription, group, account)
    if row is None or row["deleted_at"] is not None:
        raise arm.not_found("accounts", account, f"resource group '{group}'")
    return row


Account = Annotated[dict[str, Any], Depends(found)]


@router.put(arm.ACCOUNT, responses=documents.shows(documents.Resource, 200, 201))
def put_account(
    request: Request, _caller: Admin, subscription: Subscription, group: Group, account: Name, wanted: AccountIn
) -> Response:
    server = web.server(request)
    properties = _properties(wanted.properties)
    with server.store.begin() as connection:
        row = store.row(connection, tables.accounts, name=account.lower())
        elsewhere = row is not None and not _same(row, subscription, group)
        if elsewhere:
            raise arm.bad(
                f"The name '{account}' is taken by an account in another resource group.",
                "AccountNameInUse",
                status=409,
            )
        restored = False
        if row is not None and row["deleted_at"] is not None:
            if wanted.properties is None or not wanted.properties.restore:
                raise arm.bad(
                    f"An existing resource with ID '{id_of(row)}' has been soft-deleted. To restore the resource, you "
                    "must specify 'restore' to be 'true' in the property. If you don't want to restore existing "
                    "resource, please purge it first.",
                    "FlagMustBeSetForRestore",
                    status=409,
                )
            restored = True
        if row is None and not wanted.location:
            raise arm.bad("The location property is required for this definition.", "LocationRequired")
        region = arm.location(wanted.location or row["location"])  # type: ignore[index]
        if row is not None and region != row["location"]:
            raise arm.bad(
                f"The account is in '{row['location']}' and cannot move to '{region}'.",
                "InvalidResourceLocation",
                status=409,
            )
        earlier = row["body"] if row is not None else {"name": account, "kind": "OpenAI", "sku": {"name": "S0"}}
        body = {
            **earlier,
            "kind": _kind(wanted.kind) if wanted.kind is not None else earlier["kind"],
            "sku": {"name": wanted.sku.name} if wanted.sku is not None else earlier["sku"],
            "tags": wanted.tags or {},
            "properties": properties,
        }
        if row is None:
            _insert(connection, subscription, group, region, body)
        else:
            values = {"body": body, "deleted_at": None}
            connection.execute(
                update(tables.accounts).where(tables.accounts.c.number == row["number"]).values(**values)
            )
        made = store.row(connection, tables.accounts, name=account.lower())
    assert made is not None
    if restored:
        server.routes.forget()
    return JSONResponse(shape(made, request), 201 if row is None else 200)


@router.patch(arm.ACCOUNT, responses=documents.shows(documents.Resource))
def patch_account(request: Request, _caller: Admin, account: Account, wanted: AccountIn) -> dict[str, Any]:
    if wanted.location is not None and arm.location(wanted.location) != account["location"]:
        raise arm.bad("An account cannot move to another location.", "InvalidResourceLocation", status=409)
    body = dict(account["body"])
    if wanted.sku is not None:
        body["sku"] = {"name": wanted.sku.name}
    if wanted.tags is not None:
        body["tags"] = wanted.tags
    if wanted.properties is not None:
        body["properties"] = {**body["properties"], **_properties(wanted.properties)}
    with web.server(request).store.begin() as connection:
        connection.execute(
            update(tables.accounts).where(tables.accounts.c.number == account["number"]).values(body=body)
        )
    return shape({**account, "body": body}, request)


@router.get(arm.ACCOUNT, responses=documents.shows(documents.Resource))
def get_account(request: Request, _caller: Admin, account: Account) -> dict[str, Any]:
    return shape(account, request)


@router.get(arm.ACCOUNTS, responses=documents.shows(documents.Resources))
def list_accounts_of_group(
    request: Request, _caller: Admin, subscription: Subscription, group: Group
) -> dict[str, Any]:
    return _listed(request, _in(subscription, group).where(tables.accounts.c.deleted_at.is_(None)))


@router.get(f"{arm.SUBSCRIPTION}/providers/{arm.PROVIDER}/accounts", responses=documents.shows(documents.Resources))
def list_accounts(request: Request, _caller: Admin, subscription: Subscription) -> dict[str, Any]:
    return _listed(request, _in(subscription).where(tables.accounts.c.deleted_at.is_(None)))


@router.delete(arm.ACCOUNT, status_code=204, responses=documents.GONE)
def delete_account(
    request: Request, _caller: Admin, subscription: Subscription, group: Group, account: Name
) -> Response:
    """Soft: its keys end, and its name is kept until it is purged. One that has deployments stays."""
    server = web.server(request)
    with server.store.begin() as connection:
        row = _find(connection, subscription, group, account)
        if row is None or row["deleted_at"] is not None:
            return Response(status_code=204)
        query = select(tables.deployments.c.shown).where(tables.deployments.c.account == row["name"])
        if (deployment := connection.execute(query).scalar()) is not None:
            raise arm.bad(
                f"Cannot delete the account while it has nested resources; delete the deployment '{deployment}' first.",
                "CannotDeleteResource",
                status=409,
            )
        account_keys.end(connection, row["name"])
        connection.execute(
            update(tables.accounts).where(tables.accounts.c.number == row["number"]).values(deleted_at=now())
        )
    server.keyring.forget()
    server.routes.forget()
    return Response(status_code=200)


@router.get(
    f"{arm.SUBSCRIPTION}/providers/{arm.PROVIDER}/deletedAccounts", responses=documents.shows(documents.Resources)
)
def list_deleted(request: Request, _caller: Admin, subscription: Subscription) -> dict[str, Any]:
    return _listed(request, _in(subscription).where(tables.accounts.c.deleted_at.is_not(None)))


DELETED = f"{arm.LOCATION}/resourceGroups/{{group}}/deletedAccounts/{{account}}"


@router.get(DELETED, responses=documents.shows(documents.Resource))
def get_deleted(
    request: Request, _caller: Admin, subscription: Subscription, location: Location, group: Group, account: Name
) -> dict[str, Any]:
    with web.server(request).store.read() as connection:
        row = _deleted(connection, subscription, location, group, account)
    if row is None:
        raise arm.not_found("deletedAccounts", account, f"location '{location}'")
    return shape(row, request)


@router.delete(DELETED, status_code=204, responses=documents.GONE)
def purge(
    request: Request, _caller: Admin, subscription: Subscription, location: Location, group: Group, account: Name
) -> Response:
    """Forget a deleted account, its policies and its blocklists; the name is free again."""
    with web.server(request).store.begin() as connection:
        row = _deleted(connection, subscription, location, group, account)
        if row is None:
            return Response(status_code=204)
        for table in (tables.policies, tables.blocklists):
            connection.execute(delete(table).where(table.c.account == row["name"]))
        connection.execute(delete(tables.accounts).where(tables.accounts.c.number == row["number"]))
    return Response(status_code=200)


@router.post(f"{arm.ACCOUNT}/listKeys", responses=documents.shows(documents.AccountKeys))
def list_keys(request: Request, _caller: Admin, account: Account) -> dict[str, str]:
    return account_keys.both(web.server(request), account["name"])


@router.post(f"{arm.ACCOUNT}/regenerateKey", responses=documents.shows(documents.AccountKeys))
def regenerate_key(request: Request, _caller: Admin, account: Account, wanted: RegenerateIn) -> dict[str, str]:
    return account_keys.renew(web.server(request), account["name"], wanted.keyName.lower())


@router.get(f"{arm.SUBSCRIPTION}/locations", responses=documents.shows(documents.Values))
def list_locations(request: Request, _caller: Admin, subscription: Subscription) -> dict[str, Any]:
    """This machine, and the regions that accounts say they are in; all of them are this machine."""
    with web.server(request).store.read() as connection:
        query = select(tables.accounts.c.location).where(tables.accounts.c.deleted_at.is_(None)).distinct()
        regions = sorted({LOCAL, *connection.execute(query).scalars()})
    value = [
        {"id": f"/subscriptions/{subscription}/locations/{one}", "name": one, "displayName": one, "type": "Region"}
        for one in regions
    ]
    return {"value": value}


def shape(row: dict[str, Any], request: Request) -> dict[str, Any]:
    """An account as clients see it. Its endpoint is the address that it was asked for under."""
    body = row["body"]
    endpoint = str(request.base_url)
    deleted = row["deleted_at"]
    properties = {
        "provisioningState": "Succeeded",
        "endpoint": endpoint,
        "endpoints": {"OpenAI Language Model Instance API": endpoint},
        "customSubDomainName": body["properties"].get("customSubDomainName"),
        "publicNetworkAccess": "Enabled",
        "dateCreated": arm.iso(row["created_at"]),
        "capabilities": [],
    }
    if deleted is not None:
        properties |= {
            "provisioningState": "Deleted",
            "deletionDate": arm.iso(deleted),
            "scheduledPurgeDate": arm.iso(deleted + PURGED_AFTER_S),
        }
    return {
        "id": id_of(row) if deleted is None else _deleted_id(row),
        "name": body["name"],
        "type": f"{arm.PROVIDER}/accounts" if deleted is None else f"{arm.PROVIDER}/deletedAccounts",
        "kind": body["kind"],
        "sku": body["sku"],
        "location": row["location"],
        "tags": body["tags"],
        "etag": arm.etag(body),
        "properties": properties,
    }


def _properties(wanted: AccountProperties | None) -> dict[str, Any]:
    """What is kept of an account's properties; what cannot be promised here is refused."""
    if wanted is None:
        return {}
    cannot = {
        "publicNetworkAccess": wanted.publicNetworkAccess not in (None, "Enabled"),
        "networkAcls": wanted.networkAcls is not None and wanted.networkAcls.defaultAction not in (None, "Allow"),
        "disableLocalAuth": bool(wanted.disableLocalAuth),
        "encryption": wanted.encryption is not None,
    }
    for name, asked in cannot.items():
        if asked:
            raise arm.bad(
                f"properties.{name} cannot be honoured: who reaches the server is settled by `tunewright serve --host` "
                "and by its keys, and the data folder is as safe as its disk."
            )
    return {"customSubDomainName": wanted.customSubDomainName} if wanted.customSubDomainName else {}


def _kind(said: str) -> str:
    if said.casefold() not in KINDS:
        raise arm.bad(f"The kind '{said}' is not supported; choose {', '.join(KINDS.values())}.", "InvalidKind")
    return KINDS[said.casefold()]


def _insert(connection: Connection, subscription: str, group: str, region: str, body: dict[str, Any]) -> None:
    row = {"name": body["name"].lower(), "subscription": subscription, "resource_group": group, "location": region}
    connection.execute(insert(tables.accounts).values(**row, body=body, created_at=now()))


def _find(connection: Connection, subscription: str, group: str, account: str) -> dict[str, Any] | None:
    row = store.row(connection, tables.accounts, name=account.lower())
    return row if row is not None and _same(row, subscription, group) else None


def _deleted(
    connection: Connection, subscription: str, location: str, group: str, account: str
) -> dict[str, Any] | None:
    row = _find(connection, subscription, group, account)
    there = row is not None and row["deleted_at"] is not None and row["location"] == arm.location(location)
    return row if there else None


def _same(row: dict[str, Any], subscription: str, group: str) -> bool:
    said = (row["subscription"].lower(), row["resource_group"].lower())
    return said == (subscription.lower(), group.lower())


def _in(subscription: str, group: str | None = None) -> Select[Any]:
    table = tables.accounts
    query = select(table).where(func.lower(table.c.subscription) == subscription.lower()).order_by(table.c.number)
    return query if group is None else query.where(func.lower(table.c.resource_group) == group.lower())


def _listed(request: Request, query: Select[Any]) -> dict[str, Any]:
    with web.server(request).store.read() as connection:
        return {"value": [shape(dict(row), request) for row in connection.execute(query).mappings()]}


def id_of(row: dict[str, Any]) -> str:
    group = f"/subscriptions/{row['subscription']}/resourceGroups/{row['resource_group']}"
    return f"{group}/providers/{arm.PROVIDER}/accounts/{row['body']['name']}"


def _deleted_id(row: dict[str, Any]) -> str:
    place = f"/subscriptions/{row['subscription']}/providers/{arm.PROVIDER}/locations/{row['location']}"
    return f"{place}/resourceGroups/{row['resource_group']}/deletedAccounts/{row['body']['name']}"
