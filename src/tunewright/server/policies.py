"""Content filters of the control plane: policies (raiPolicies), blocklists and their items."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError
from sqlalchemy import Connection, Table, delete, insert, select, update

from tunewright.endpoint.shapes import Part
from tunewright.server import accounts, arm, documents, store, tables, web
from tunewright.server import filter as filters
from tunewright.server.accounts import Account
from tunewright.server.arm import Location, Name, Subscription
from tunewright.server.state import Server
from tunewright.server.store import now
from tunewright.server.web import Admin

router = APIRouter(tags=["management"], route_class=web.Route)

POLICIES = f"{arm.ACCOUNT}/raiPolicies"
LISTS = f"{arm.ACCOUNT}/raiBlocklists"
ITEMS = f"{LISTS}/{{blocklist}}/raiBlocklistItems"
MOST_ITEMS = 10_000

Source = Literal["Prompt", "Completion"]


class FilterIn(Part):
    name: str = Field(min_length=1, max_length=64)
    enabled: bool = True
    severityThreshold: Literal["Low", "Medium", "High"] | None = None
    blocking: bool | None = None
    source: Source = "Prompt"


class HeldListIn(Part):
    blocklistName: Annotated[str, Field(pattern=arm.NAME)]
    blocking: bool | None = None
    source: Source = "Prompt"


class PolicyProperties(Part):
    mode: Literal["Default", "Blocking", "Deferred", "Asynchronous_filter"] | None = None
    basePolicyName: str | None = Field(default=None, max_length=64)
    contentFilters: list[FilterIn] | None = Field(default=None, max_length=64)
    customBlocklists: list[HeldListIn] | None = Field(default=None, max_length=64)
    customTopics: list[Any] | None = None


class PolicyIn(Part):
    properties: PolicyProperties


class ListProperties(Part):
    description: str | None = Field(default=None, max_length=1024)


class ListIn(Part):
    properties: ListProperties | None = None


class ItemProperties(Part):
    pattern: str = Field(min_length=1, max_length=1000)
    isRegex: bool | None = None


def _sound(item: ItemProperties) -> ItemProperties:
    if item.isRegex:
        try:
            filters.pattern(item.pattern)
        except ValueError as error:
            raise PydanticCustomError("regex", "{said}", {"said": str(error)}) from None
    return item


class ItemIn(Part):
    properties: Annotated[ItemProperties, AfterValidator(_sound)]


class NamedItemIn(ItemIn):
    name: Annotated[str, Field(pattern=arm.NAME)]


@router.put(f"{POLICIES}/{{policy}}", responses=documents.shows(documents.Resource, 200, 201))
def put_policy(request: Request, _caller: Admin, account: Account, policy: Name, wanted: PolicyIn) -> Response:
    """Filters that are not named are those of the policy it is based on."""
    _own(policy)
    if wanted.properties.customTopics:
        raise arm.bad("properties.customTopics cannot be honoured: nothing here can tell topics.")
    server = web.server(request)
    with server.store.begin() as connection:
        properties = _complete(connection, account["name"], wanted.properties)
        try:
            filters.policy(policy, properties, {})
        except ValueError as error:
            raise arm.bad(f"The policy '{policy}': {error}.", "InvalidRaiPolicy") from None
        for held in properties["customBlocklists"]:
            _row(connection, tables.blocklists, account, held["blocklistName"], "raiBlocklists")
        made = _keep(connection, tables.policies, account, policy, {"name": policy, "properties": properties})
    server.routes.forget()
    return JSONResponse(_policy_shape(account, policy, properties), 201 if made else 200)


@router.get(f"{POLICIES}/{{policy}}", responses=documents.shows(documents.Resource))
def get_policy(request: Request, _caller: Admin, account: Account, policy: Name) -> dict[str, Any]:
    if (system := _system_name(policy)) is not None:
        return _policy_shape(account, system, filters.SYSTEM[system])
    with web.server(request).store.read() as connection:
        body = _row(connection, tables.policies, account, policy, "raiPolicies")["body"]
    return _policy_shape(account, body["name"], body["properties"])


@router.get(POLICIES, responses=documents.shows(documents.Resources))
def list_policies(request: Request, _caller: Admin, account: Account) -> dict[str, Any]:
    with web.server(request).store.read() as connection:
        own = [row["body"] for row in _rows(connection, tables.policies, account)]
    value = [_policy_shape(account, name, properties) for name, properties in filters.SYSTEM.items()]
    return {"value": value + [_policy_shape(account, body["name"], body["properties"]) for body in own]}


@router.delete(f"{POLICIES}/{{policy}}", status_code=204)
def delete_policy(request: Request, _caller: Admin, account: Account, policy: Name) -> Response:
    """One that a deployment has stays."""
    _own(policy)
    with web.server(request).store.begin() as connection:
        deployments = connection.execute(
            select(tables.deployments).where(tables.deployments.c.account == account["name"])
        ).mappings()
        for deployment in deployments:
            if (deployment["properties"].get("raiPolicyName") or "").lower() == policy.lower():
                raise arm.bad(
                    f"The deployment '{deployment['shown']}' has the policy '{policy}'; give it another one first.",
                    "RaiPolicyInUse",
                    status=409,
                )
        _drop(connection, tables.policies, account, policy)
    return Response(status_code=204)


@router.put(f"{LISTS}/{{blocklist}}", responses=documents.shows(documents.Resource, 200, 201))
def put_blocklist(request: Request, _caller: Admin, account: Account, blocklist: Name, wanted: ListIn) -> Response:
    """Its items stay."""
    description = wanted.properties.description if wanted.properties else None
    with web.server(request).store.begin() as connection:
        before = store.row(connection, tables.blocklists, account=account["name"], name=blocklist.lower())
        items = before["body"]["items"] if before is not None else {}
        body = {"name": blocklist, "description": description, "items": items}
        made = _keep(connection, tables.blocklists, account, blocklist, body)
    return JSONResponse(_list_shape(account, body), 201 if made else 200)


@router.get(f"{LISTS}/{{blocklist}}", responses=documents.shows(documents.Resource))
def get_blocklist(request: Request, _caller: Admin, account: Account, blocklist: Name) -> dict[str, Any]:
    return _list_shape(account, _list(web.server(request), account, blocklist))


@router.get(LISTS, responses=documents.shows(documents.Resources))
def list_blocklists(request: Request, _caller: Admin, account: Account) -> dict[str, Any]:
    with web.server(request).store.read() as connection:
        found = [row["body"] for row in _rows(connection, tables.blocklists, account)]
    return {"value": [_list_shape(account, body) for body in found]}


@router.delete(f"{LISTS}/{{blocklist}}", status_code=204)
def delete_blocklist(request: Request, _caller: Admin, account: Account, blocklist: Name) -> Response:
    """One that a policy holds stays: it would stop filtering without anybody having said so."""
    with web.server(request).store.begin() as connection:
        for row in _rows(connection, tables.policies, account):
            held = row["body"]["properties"]["customBlocklists"]
            if any(one["blocklistName"].lower() == blocklist.lower() for one in held):
                raise arm.bad(
                    f"The policy '{row['body']['name']}' has the blocklist '{blocklist}'; take it out first.",
                    "RaiBlocklistInUse",
                    status=409,
                )
        _drop(connection, tables.blocklists, account, blocklist)
    return Response(status_code=204)


@router.put(f"{ITEMS}/{{item}}", responses=documents.shows(documents.Resource, 200, 201))
def put_item(
    request: Request, _caller: Admin, account: Account, blocklist: Name, item: Name, wanted: ItemIn
) -> Response:
    made = _add(web.server(request), account, blocklist, {item: wanted.properties})
    return JSONResponse(_item_shape(account, blocklist, item, _kept(wanted.properties)), 201 if made else 200)


@router.get(f"{ITEMS}/{{item}}", responses=documents.shows(documents.Resource))
def get_item(request: Request, _caller: Admin, account: Account, blocklist: Name, item: Name) -> dict[str, Any]:
    body = _list(web.server(request), account, blocklist)
    found = next((one for one in body["items"].items() if one[0].lower() == item.lower()), None)
    if found is None:
        raise arm.not_found("accounts/raiBlocklists/raiBlocklistItems", item, f"blocklist '{blocklist}'")
    return _item_shape(account, body["name"], *found)


@router.get(ITEMS, responses=documents.shows(documents.Resources))
def list_items(request: Request, _caller: Admin, account: Account, blocklist: Name) -> dict[str, Any]:
    body = _list(web.server(request), account, blocklist)
    return {"value": [_item_shape(account, body["name"], name, one) for name, one in body["items"].items()]}


@router.delete(f"{ITEMS}/{{item}}", status_code=204)
def delete_item(request: Request, _caller: Admin, account: Account, blocklist: Name, item: Name) -> Response:
    _remove(web.server(request), account, blocklist, [item])
    return Response(status_code=204)


@router.post(f"{LISTS}/{{blocklist}}/addRaiBlocklistItems", responses=documents.shows(documents.Resource))
def add_items(
    request: Request, _caller: Admin, account: Account, blocklist: Name, wanted: list[NamedItemIn]
) -> dict[str, Any]:
    server = web.server(request)
    _add(server, account, blocklist, {one.name: one.properties for one in wanted})
    return _list_shape(account, _list(server, account, blocklist))


@router.post(f"{LISTS}/{{blocklist}}/deleteRaiBlocklistItems", status_code=204)
def delete_items(request: Request, _caller: Admin, account: Account, blocklist: Name, names: list[str]) -> Response:
    _remove(web.server(request), account, blocklist, names)
    return Response(status_code=204)


@router.get(f"{arm.LOCATION}/raiContentFilters", responses=documents.shows(documents.Resources))
def list_filters(request: Request, _caller: Admin, subscription: Subscription, location: Location) -> dict[str, Any]:
    """What can be filtered here."""
    place = f"/subscriptions/{subscription}/providers/{arm.PROVIDER}/locations/{location}/raiContentFilters"
    value = [
        {
            "id": f"{place}/{name}",
            "name": name,
            "type": f"{arm.PROVIDER}/locations/raiContentFilters",
            "properties": {"name": name, "isMultiLevelFilter": name != "Jailbreak", "source": source},
        }
        for name in ("Hate", "Sexual", "Violence", "Selfharm", "Jailbreak")
        for source in (("Prompt",) if name == "Jailbreak" else ("Prompt", "Completion"))
    ]
    return {"value": value}


def named(connection: Connection, account: str, name: str | None) -> str | None:
    """A policy's name as it is spelled; None for None.

    Raises:
        ApiError: 400, the account has no such policy.
    """
    if name is None or (system := _system_name(name)) is not None:
        return None if name is None else system
    found = store.row(connection, tables.policies, account=account, name=name.lower()) if name.isprintable() else None
    if found is None:
        raise arm.bad(f"The account has no raiPolicy '{name}'; GET .../raiPolicies lists them.", "RaiPolicyNotFound")
    spelled: str = found["body"]["name"]
    return spelled


def _system_name(name: str) -> str | None:
    return next((one for one in filters.SYSTEM if one.lower() == name.lower()), None)


def _own(policy: str) -> None:
    if _system_name(policy) is not None or policy.lower().startswith("microsoft."):
        raise arm.bad(f"The policy '{policy}' is not yours to change; names with Microsoft. are the system's.")


def _complete(connection: Connection, account: str, wanted: PolicyProperties) -> dict[str, Any]:
    """A policy's properties with nothing left open: what is not said comes from the policy it is based on."""
    base = wanted.basePolicyName or filters.DEFAULT
    spelled = named(connection, account, base)
    if spelled in filters.SYSTEM:
        inherited = filters.SYSTEM[spelled]["contentFilters"]
    else:
        row = store.row(connection, tables.policies, account=account, name=base.lower())
        inherited = row["body"]["properties"]["contentFilters"] if row is not None else []
    said = [
        {
            "name": one.name,
            "enabled": one.enabled,
            "severityThreshold": one.severityThreshold or "Medium",
            "blocking": True if one.blocking is None else one.blocking,
            "source": one.source,
        }
        for one in wanted.contentFilters or ()
    ]
    kept = {(_bare(one["name"]), one["source"]): one for one in [*inherited, *said]}
    held = [
        {
            "blocklistName": one.blocklistName,
            "blocking": True if one.blocking is None else one.blocking,
            "source": one.source,
        }
        for one in wanted.customBlocklists or ()
    ]
    return {
        "type": "UserManaged",
        "mode": wanted.mode or "Blocking",
        "basePolicyName": spelled,
        "contentFilters": list(kept.values()),
        "customBlocklists": held,
    }


def _bare(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _keep(connection: Connection, table: Table, account: dict[str, Any], name: str, body: dict[str, Any]) -> bool:
    """Whether it is a new one."""
    same = (table.c.account == account["name"], table.c.name == name.lower())
    if connection.execute(update(table).where(*same).values(body=body)).rowcount:
        return False
    row = {"account": account["name"], "name": name.lower(), "body": body, "created_at": now()}
    connection.execute(insert(table).values(**row))
    return True


def _drop(connection: Connection, table: Table, account: dict[str, Any], name: str) -> None:
    connection.execute(delete(table).where(table.c.account == account["name"], table.c.name == name.lower()))


def _rows(connection: Connection, table: Table, account: dict[str, Any]) -> list[dict[str, Any]]:
    query = select(table).where(table.c.account == account["name"]).order_by(table.c.number)
    return [dict(row) for row in connection.execute(query).mappings()]


def _row(connection: Connection, table: Table, account: dict[str, Any], name: str, kind: str) -> dict[str, Any]:
    query = select(table).where(table.c.account == account["name"], table.c.name == name.lower()).with_for_update()
    found = connection.execute(query).mappings().first()
    if found is None:
        raise arm.not_found(f"accounts/{kind}", name, f"account '{account['body']['name']}'")
    return dict(found)


def _list(server: Server, account: dict[str, Any], name: str) -> dict[str, Any]:
    with server.store.read() as connection:
        body: dict[str, Any] = _row(connection, tables.blocklists, account, name, "raiBlocklists")["body"]
    return body


def _kept(item: ItemProperties) -> dict[str, Any]:
    return {"pattern": item.pattern, "isRegex": bool(item.isRegex)}


def _add(server: Server, account: dict[str, Any], name: str, wanted: dict[str, ItemProperties]) -> bool:
    """Whether none of them was there before."""
    with server.store.begin() as connection:
        row = _row(connection, tables.blocklists, account, name, "raiBlocklists")
        given = {key.lower() for key in wanted}
        items = {key: one for key, one in row["body"]["items"].items() if key.lower() not in given}
        fresh = len(items) == len(row["body"]["items"])
        items |= {key: _kept(one) for key, one in wanted.items()}
        if len(items) > MOST_ITEMS:
            raise arm.bad(f"A blocklist has at most {MOST_ITEMS:,} items.", "TooManyItems")
        _keep(connection, tables.blocklists, account, name, {**row["body"], "items": items})
    server.routes.forget()
    return fresh


def _remove(server: Server, account: dict[str, Any], name: str, gone: list[str]) -> None:
    with server.store.begin() as connection:
        row = _row(connection, tables.blocklists, account, name, "raiBlocklists")
        lower = {key.lower() for key in gone}
        items = {key: one for key, one in row["body"]["items"].items() if key.lower() not in lower}
        _keep(connection, tables.blocklists, account, name, {**row["body"], "items": items})
    server.routes.forget()


def _policy_shape(account: dict[str, Any], name: str, properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"{accounts.id_of(account)}/raiPolicies/{name}",
        "name": name,
        "type": f"{arm.PROVIDER}/accounts/raiPolicies",
        "etag": arm.etag(properties),
        "properties": properties,
    }


def _list_shape(account: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"{accounts.id_of(account)}/raiBlocklists/{body['name']}",
        "name": body["name"],
        "type": f"{arm.PROVIDER}/accounts/raiBlocklists",
        "etag": arm.etag(body),
        "properties": {"description": body["description"]},
    }


def _item_shape(account: dict[str, Any], blocklist: str, name: str, item: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"{accounts.id_of(account)}/raiBlocklists/{blocklist}/raiBlocklistItems/{name}",
        "name": name,
        "type": f"{arm.PROVIDER}/accounts/raiBlocklists/raiBlocklistItems",
        "etag": arm.etag(item),
        "properties": item,
    }
