"""The control plane, driven by azure-mgmt-cognitiveservices and by plain requests."""

from __future__ import annotations

import shutil
import stat
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest
import requests
from azure.core.exceptions import HttpResponseError, ResourceNotFoundError
from azure.mgmt.cognitiveservices.models import (
    Account,
    AccountProperties,
    Deployment,
    DeploymentModel,
    DeploymentProperties,
    PatchResourceTagsAndSku,
    Sku,
)
from management_client import (
    LOCAL,
    PLAIN,
    SUBSCRIPTION,
    add_base,
    add_tuned,
    call,
    deployed,
    deployment,
    sdk,
)
from sqlalchemy import event, update

from server_running import Running
from tunewright.server import account_keys, keys, management, models, store, tables
from tunewright.server.management import DeploymentIn
from tunewright.server.state import Server

TUNED = "ft:gpt-4.1-mini-2025-04-14:tunewright::abcd1234"
WHEN = 1_900_000_000
"""In 2030."""


def test_an_account_and_its_deployment_from_beginning_to_end(served: Running) -> None:
    add_base(served.server, "gpt-4.1-mini-2025-04-14")
    add_tuned(served.server, TUNED, "gpt-4.1-mini-2025-04-14")
    with sdk(served) as client:
        made = client.accounts.begin_create(
            "rg",
            "Mine",
            Account(
                kind="OpenAI",
                sku=Sku(name="S0"),
                location="North Central US",
                properties=AccountProperties(custom_sub_domain_name="mine"),
            ),
            **PLAIN,
        ).result()
        assert (made.name, made.location, made.kind) == ("Mine", "northcentralus", "OpenAI")
        assert made.properties.provisioning_state == "Succeeded"
        assert made.properties.endpoint == f"{served.url}/"
        assert {one.name for one in client.accounts.list(**PLAIN)} == {"local", "Mine"}
        assert [one.name for one in client.accounts.list_by_resource_group("RG", **PLAIN)] == ["Mine"]

        poller = client.deployments.begin_create_or_update(
            "rg",
            "mine",
            "my-tuned",
            Deployment(
                sku=Sku(name="standard", capacity=3),
                properties=DeploymentProperties(model=DeploymentModel(format="OpenAI", name=TUNED, version="1")),
            ),
            **PLAIN,
        )
        assert poller.status() == "Creating"
        deployment = poller.result()
        assert deployment.properties.provisioning_state == "Succeeded"
        assert (deployment.sku.name, deployment.sku.capacity) == ("Standard", 3)
        assert deployment.properties.model.name == TUNED
        assert deployment.properties.rai_policy_name == "Microsoft.DefaultV2"
        assert {(one.key, one.renewal_period, one.count) for one in deployment.properties.rate_limits} == {
            ("request", 10, 3),
            ("token", 60, 3000),
        }
        assert client.deployments.get("rg", "mine", "my-tuned", **PLAIN).id == deployment.id
        changed = client.deployments.begin_update(
            "rg", "mine", "my-tuned", PatchResourceTagsAndSku(sku=Sku(name="Standard", capacity=5)), **PLAIN
        ).result()
        assert changed.sku.capacity == 5
        assert changed.properties.provisioning_state == "Succeeded"
        assert [one.name for one in client.deployments.list("rg", "mine", **PLAIN)] == ["my-tuned"]
        assert {one.sku.name for one in client.deployments.list_skus("rg", "mine", "my-tuned", **PLAIN)} >= {"Standard"}

        with pytest.raises(HttpResponseError, match="my-tuned") as refused:
            client.accounts.begin_delete("rg", "mine", **PLAIN)
        assert refused.value.error is not None
        assert refused.value.error.code == "CannotDeleteResource"
        with pytest.raises(openai.BadRequestError, match="my-tuned"):
            served.client().models.delete(TUNED)
        client.deployments.begin_delete("rg", "mine", "my-tuned", **PLAIN).result()
        client.deployments.begin_delete("rg", "mine", "my-tuned", **PLAIN).result()
        with pytest.raises(ResourceNotFoundError):
            client.deployments.get("rg", "mine", "my-tuned", **PLAIN)
        assert served.client().models.delete(TUNED).deleted

        client.accounts.begin_delete("rg", "mine", **PLAIN).result()
        with pytest.raises(ResourceNotFoundError):
            client.accounts.get("rg", "mine", **PLAIN)
        again = Account(kind="OpenAI", sku=Sku(name="S0"), location="northcentralus")
        with pytest.raises(HttpResponseError, match="purge"):
            client.accounts.begin_create("rg", "mine", again, **PLAIN)
        assert [one.name for one in client.deleted_accounts.list(**PLAIN)] == ["Mine"]
        assert client.deleted_accounts.get("northcentralus", "rg", "mine", **PLAIN).name == "Mine"
        client.deleted_accounts.begin_purge("northcentralus", "rg", "mine", **PLAIN).result()
        assert list(client.deleted_accounts.list(**PLAIN)) == []
        assert client.accounts.begin_create("rg", "mine", again, **PLAIN).result().name == "mine"


def test_a_deleted_account_can_be_restored(served: Running) -> None:
    with sdk(served) as client:
        wanted = Account(kind="AIServices", sku=Sku(name="S0"), location="swedencentral", properties={})
        client.accounts.begin_create("rg", "mine", wanted, **PLAIN).result()
        before = client.accounts.list_keys("rg", "mine", **PLAIN)
        client.accounts.begin_delete("rg", "mine", **PLAIN).result()
        with pytest.raises(openai.AuthenticationError):
            served.client(before.key1).models.list()
        wanted.properties = AccountProperties(restore=True)
        assert client.accounts.begin_create("rg", "mine", wanted, **PLAIN).result().name == "mine"
        after = client.accounts.list_keys("rg", "mine", **PLAIN)
        assert served.client(after.key1).models.list().data == []


def test_an_accounts_keys_open_and_can_be_shown_again_and_renewed(served: Running) -> None:
    with sdk(served) as client:
        shown = client.accounts.list_keys("local", "local", **PLAIN)
        assert client.accounts.list_keys("local", "local", **PLAIN) == shown
        for key in (shown.key1, shown.key2):
            served.client(key).files.list()
            served.azure(key).files.list()
        with sdk(served, shown.key1) as other, pytest.raises(HttpResponseError) as refused:
            list(other.accounts.list(**PLAIN))
        assert refused.value.status_code == 403
        renewed = client.accounts.regenerate_key("local", "local", "Key1", **PLAIN)
    assert renewed.key1 != shown.key1
    assert renewed.key2 == shown.key2
    with pytest.raises(openai.AuthenticationError):
        served.client(shown.key1).files.list()
    served.client(renewed.key1).files.list()
    with served.server.store.begin() as connection:
        names = {one["name"]: one["account"] for one in keys.rows(connection) if one["revoked_at"] is None}
    assert {name for name, account in names.items() if account == "local"} == {"local/key1", "local/key2"}


def test_the_secret_of_account_keys_is_for_the_servers_user_alone(served: Running) -> None:
    call(served, "POST", f"{LOCAL}/listKeys")
    secret = served.server.settings.data / account_keys.FILE
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert [one.name for one in secret.parent.glob(".account-keys*")] == []


def test_a_server_with_another_secret_does_not_show_keys_that_do_not_open(served: Running) -> None:
    _, before = call(served, "POST", f"{LOCAL}/listKeys")
    (served.server.settings.data / account_keys.FILE).write_text("00" * 32)
    status, said = call(served, "POST", f"{LOCAL}/listKeys")
    assert status == 409
    assert said["error"]["code"] == "KeyOfAnotherServer"
    status, said = call(served, "POST", f"{LOCAL}/regenerateKey", {"keyName": "Key1"})
    assert status == 409  # the other one is still of the other server
    status, said = call(served, "POST", f"{LOCAL}/regenerateKey", {"keyName": "Key2"})
    assert status == 200
    assert said["key1"] not in before.values()


def test_two_servers_that_are_asked_for_keys_show_the_same(served: Running, open_server: Callable[[], Server]) -> None:
    _, shown = call(served, "POST", f"{LOCAL}/listKeys")
    assert account_keys.both(open_server(), "local") == shown


def test_the_labs_put_with_an_old_api_version_and_paths_in_any_case(served: Running) -> None:
    add_base(served.server, "gpt-4.1-2025-04-14")
    add_tuned(served.server, "gpt-4.1-2025-04-14.ft-0123456789abcdef0123456789abcdef", "gpt-4.1-2025-04-14")
    body = {
        "sku": {"name": "standard", "capacity": 1},
        "properties": {
            "model": {
                "format": "OpenAI",
                "name": "gpt-4.1-2025-04-14.ft-0123456789abcdef0123456789abcdef",
                "version": "1",
            }
        },
    }
    path = (
        f"/subscriptions/{SUBSCRIPTION}/resourcegroups/LOCAL/providers/microsoft.cognitiveservices/Accounts/Local"
        "/deployments/gpt-4.1-ft?api-version=2023-05-01"
    )
    status, said = call(served, "PUT", path, body)
    assert status == 201
    assert said["properties"]["provisioningState"] == "Creating"
    assert deployed(served, "gpt-4.1-ft", body)["sku"] == {"name": "Standard", "capacity": 1}
    assert call(served, "PUT", path, body)[0] == 200


def test_a_base_is_named_with_its_version_or_without(served: Running) -> None:
    for name in ("gpt-4.1-2025-04-14", "gpt-4.1-2025-08-01", "small"):
        add_base(served.server, name)
    for model, meant in (
        ({"name": "gpt-4.1", "version": "2025-04-14"}, "gpt-4.1-2025-04-14"),
        ({"name": "gpt-4.1-2025-04-14", "version": "1"}, "gpt-4.1-2025-04-14"),
        ({"name": "gpt-4.1"}, "gpt-4.1-2025-08-01"),
        ({"name": "small", "version": "2025-04-14", "format": "Microsoft"}, "small"),
    ):
        body = {"sku": {"name": "GlobalStandard", "capacity": 2}, "properties": {"model": model}}
        deployed(served, "one", body)
        with served.server.store.read() as connection:
            found = store.row(connection, tables.deployments, name="one")
        assert found is not None
        assert found["model"] == meant


def test_what_a_deployment_cannot_be(served: Running) -> None:
    cases: list[tuple[dict[str, object], str, str]] = [
        ({"properties": {"model": {"name": "nothing"}}}, "DeploymentModelNotSupported", "nothing"),
        ({"sku": {"name": "ProvisionedManaged", "capacity": 100}}, "InvalidResourceProperties", "provisioned"),
        ({"sku": {"name": "Standard", "capacity": 0}}, "InvalidRequestContent", "capacity"),
        ({"sku": {"name": "Standard", "capacity": 2_000_000}}, "InvalidRequestContent", "capacity"),
        ({"sku": {"name": "Standard", "capacity": "ten"}}, "InvalidRequestContent", "sku.capacity"),
        ({"properties": {"model": {"name": "small"}, "raiPolicyName": "none"}}, "RaiPolicyNotFound", "none"),
        (
            {"properties": {"model": {"name": "small"}, "spilloverDeploymentName": "b"}},
            "InvalidRequestContent",
            "spilloverDeploymentName",
        ),
        (
            {"properties": {"model": {"name": "small"}, "versionUpgradeOption": "Never"}},
            "InvalidRequestContent",
            "versionUpgradeOption",
        ),
        ({"properties": {}}, "InvalidRequestContent", "properties.model"),
    ]
    add_base(served.server, "small")
    for change, code, said in cases:
        status, reply = call(served, "PUT", f"{LOCAL}/deployments/d", deployment("small") | change)
        assert (status, reply["error"]["code"]) == (400, code), change
        assert set(reply) == {"error"}
        assert said in reply["error"]["message"]
    assert call(served, "GET", f"{LOCAL}/deployments")[1] == {"value": []}


def test_a_deployment_without_weights_fails_and_says_why(served: Running) -> None:
    add_base(served.server, "small")
    add_tuned(served.server, "ft:small:tunewright::1", "small", there=False)
    with sdk(served) as client:
        poller = client.deployments.begin_create_or_update(
            "local", "local", "d", deployment("ft:small:tunewright::1"), **PLAIN
        )
        with pytest.raises(HttpResponseError, match="weights"):
            poller.result()
        assert client.deployments.get("local", "local", "d", **PLAIN).properties.provisioning_state == "Failed"


def test_a_deployment_that_serves_stays_as_it_is_when_its_change_is_refused(served: Running) -> None:
    add_base(served.server, "small")
    add_tuned(served.server, "ft:small:tunewright::1", "small")
    add_tuned(served.server, "ft:small:tunewright::2", "small", there=False)
    before = deployed(served, "d", deployment("ft:small:tunewright::1", dynamicThrottlingEnabled=True))
    assert call(served, "PUT", f"{LOCAL}/deployments/d", deployment("ft:small:tunewright::2"))[0] == 400
    assert call(served, "GET", f"{LOCAL}/deployments/d")[1] == before
    status, changed = call(served, "PATCH", f"{LOCAL}/deployments/D", {"properties": {"model": {"name": "small"}}})
    assert status == 200
    assert changed["properties"]["provisioningState"] == "Succeeded"
    assert changed["properties"]["dynamicThrottlingEnabled"] is True
    assert changed["name"] == "d"
    status, said = call(served, "PATCH", f"{LOCAL}/deployments/d", {"properties": {"raiPolicyName": 7}})
    assert (status, said["error"]["code"]) == (400, "InvalidRequestContent")


def test_a_quota_that_is_larger_than_its_pool_is_refused(served: Running) -> None:
    add_base(served.server, "small")
    deployed(served, "a", deployment("small", capacity=999_999))
    status, said = call(served, "PUT", f"{LOCAL}/deployments/b", deployment("small", capacity=2))
    assert status == 400
    assert said["error"]["code"] == "InsufficientQuota"
    deployed(served, "b", deployment("small", capacity=1))
    deployed(served, "a", deployment("small", capacity=10))


def test_usages_add_up_capacity(served: Running) -> None:
    add_base(served.server, "small")
    add_tuned(served.server, "ft:small:tunewright::1", "small")
    for name, body in (
        ("a", deployment("small", capacity=2)),
        ("b", deployment("small", capacity=3)),
        ("c", deployment("ft:small:tunewright::1", capacity=5)),
    ):
        deployed(served, name, body)
    with sdk(served) as client:
        found = {one.name.value: one.current_value for one in client.usages.list("local", **PLAIN)}
        assert found == {"OpenAI.Standard.small": 5, "OpenAI.Standard.small-finetune": 5}
        account = client.accounts.list_usages("local", "local", **PLAIN)
        assert {one.name.value: one.current_value for one in account.value} == found
        assert list(client.usages.list("elsewhere", **PLAIN)) == []


def test_a_developer_deployment_is_removed_after_a_day(served: Running) -> None:
    add_base(served.server, "small")
    for name, sku in (("old", "Developer"), ("new", "developertier"), ("standard", "Standard")):
        body = deployment("small", capacity=1)
        deployed(served, name, body | {"sku": body["sku"] | {"name": sku}})
    table = tables.deployments
    with served.server.store.begin() as connection:
        old = table.c.name.in_(("old", "standard"))
        connection.execute(update(table).where(old).values(created_at=store.now() - 86400))
    management.remove_expired(served.server)
    assert [call(served, "GET", f"{LOCAL}/deployments/{name}")[0] for name in ("old", "new", "standard")] == [
        404, 200, 200,
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
def test_an_old_deployment_that_becomes_a_developer_one_has_a_day_from_then_on(
    served: Running, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_base(served.server, "small")
    deployed(served, "d", deployment("small"))
    made, day = store.now(), 86400
    path = f"{LOCAL}/deployments/d"

    def later(seconds: int) -> None:
        monkeypatch.setattr(management, "now", lambda: made + seconds)

    def become(sku: str, capacity: int = 1) -> None:
        body = {"sku": {"name": sku, "capacity": capacity}}
        status, said = call(served, method, path, body if method == "PATCH" else deployment("small") | body)
        assert (status, said["sku"]) == (200, body["sku"])
        assert "developerSince" not in str(said)

    def there() -> bool:
        management.remove_expired(served.server)
        return call(served, "GET", path)[0] == 200

    later(10 * day)
    become("Developer")
    assert there()
    later(11 * day - 60)
    become("Developer", 2)  # another change does not make the day longer
    assert there()
    become("Standard")
    later(20 * day)
    assert there()
    become("Developer")
    later(21 * day - 60)
    assert there()
    later(21 * day + 60)
    assert not there()


@pytest.mark.slow
@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_deployment_that_becomes_of_another_kind_while_it_is_looked_at_stays(served: Running) -> None:
    add_base(served.server, "small")
    deployed(served, "d", deployment("small", sku="Developer"))
    table = tables.deployments
    with served.server.store.begin() as connection:
        connection.execute(update(table).values(created_at=store.now() - 86400))
        engine = connection.engine

    def change(_connection: Any, _cursor: Any, statement: str, *_others: Any) -> None:
        if statement.startswith("DELETE FROM deployments"):
            assert call(served, "PATCH", f"{LOCAL}/deployments/d", {"sku": {"name": "Standard"}})[0] == 200

    event.listen(engine, "before_cursor_execute", change)
    try:
        management.remove_expired(served.server)
    finally:
        event.remove(engine, "before_cursor_execute", change)
    assert call(served, "GET", f"{LOCAL}/deployments/d")[0] == 200


def test_a_deployment_of_a_retired_base_fails_and_says_since_when(served: Running) -> None:
    add_base(served.server, "old", retires_at=1_000_000_000)
    add_base(served.server, "leaving", retires_at=WHEN)
    add_tuned(served.server, "ft:old:tunewright::1", "old")
    deployed(served, "tuned", deployment("ft:old:tunewright::1"))
    serving = deployed(served, "d", deployment("leaving"))
    with sdk(served) as client:
        poller = client.deployments.begin_create_or_update("local", "local", "late", deployment("old"), **PLAIN)
        with pytest.raises(HttpResponseError, match="'old' was retired on 2001-09-09"):
            poller.result()
        assert client.deployments.get("local", "local", "late", **PLAIN).properties.provisioning_state == "Failed"
    status, said = call(served, "PUT", f"{LOCAL}/deployments/d", deployment("old"))
    assert (status, said["error"]["code"]) == (400, "DeploymentModelNotSupported")
    assert call(served, "GET", f"{LOCAL}/deployments/d")[1] == serving


def test_a_deployment_whose_base_was_retired_since_can_still_be_changed(served: Running) -> None:
    add_base(served.server, "old")
    deployed(served, "d", deployment("old"))
    with served.server.store.begin() as connection:
        connection.execute(update(tables.bases).values(retires_at=1_000_000_000))
    status, said = call(served, "PATCH", f"{LOCAL}/deployments/d", {"sku": {"capacity": 2}})
    assert (status, said["properties"]["currentCapacity"]) == (200, 2)


def test_models_have_their_dates_of_retirement(served: Running) -> None:
    add_base(served.server, "gpt-4.1-2025-04-14", retires_at=WHEN, fine_tune_until=WHEN - 86400 * 365)
    add_base(served.server, "old", retires_at=1_000_000_000)
    add_base(served.server, "small")
    add_tuned(served.server, "ft:small:tunewright::1", "small")
    with sdk(served) as client:
        found = {one.name: one for one in client.accounts.list_models("local", "local", **PLAIN)}
        assert {one.model.name for one in client.models.list("local", **PLAIN)} == set(found)
    assert set(found) == {"gpt-4.1", "old", "small", "ft:small:tunewright::1"}
    dated = found["gpt-4.1"]
    assert (dated.version, dated.lifecycle_status) == ("2025-04-14", "Deprecating")
    assert (dated.deprecation.inference, dated.deprecation.fine_tune) == (
        "2030-03-17T17:46:40Z",
        "2029-03-17T17:46:40Z",
    )
    assert found["old"].lifecycle_status == "Deprecated"
    assert found["small"].lifecycle_status == "GenerallyAvailable"
    assert found["ft:small:tunewright::1"].base_model.name == "small"
    assert found["small"].skus[0].capacity.minimum == 1


def test_promises_that_cannot_be_kept_are_not_given(served: Running) -> None:
    body: dict[str, Any] = {"kind": "OpenAI", "sku": {"name": "S0"}, "location": "local"}
    path = LOCAL.removesuffix("local") + "mine"
    for name, asked in {
        "publicNetworkAccess": "Disabled",
        "networkAcls": {"defaultAction": "Deny"},
        "disableLocalAuth": True,
        "encryption": {"keySource": "Microsoft.KeyVault"},
    }.items():
        status, said = call(served, "PUT", path, body | {"properties": {name: asked}})
        assert status == 400
        assert name in said["error"]["message"]
    body["properties"] = {"publicNetworkAccess": "Enabled", "networkAcls": {"defaultAction": "Allow"}}
    assert call(served, "PUT", path, body)[0] == 201
    assert call(served, "PATCH", path, {"tags": {"a": "b"}})[1]["tags"] == {"a": "b"}


def test_errors_are_in_the_control_planes_form(served: Running) -> None:
    cases = [
        ("GET", f"{LOCAL}x", served.admin_key, 404, "ResourceNotFound"),
        ("GET", f"{LOCAL}/nothing", served.admin_key, 404, "ResourceNotFound"),
        ("DELETE", f"{LOCAL}/models", served.admin_key, 405, "MethodNotAllowed"),
        ("GET", LOCAL, "wrong", 401, "InvalidAuthenticationToken"),
        ("GET", LOCAL, served.key, 403, "AuthorizationFailed"),
        ("GET", f"{LOCAL}/deployments/%00", served.admin_key, 400, "InvalidRequestContent"),
        ("GET", LOCAL.replace(SUBSCRIPTION, "another"), served.admin_key, 404, "ResourceNotFound"),
    ]
    for method, path, key, status, code in cases:
        found, said = call(served, method, path, key=key)
        assert (found, said["error"]["code"]) == (status, code), path
        assert set(said["error"]) == {"code", "message"}
    status, said = call(served, "PUT", f"{LOCAL}/deployments/d", "no object")
    assert (status, set(said)) == (400, {"error"})
    status, said = call(served, "GET", LOCAL, key="nothing", **{"api-key": served.admin_key})
    assert status == 401  # the bearer token counts where both are sent


def test_an_admins_key_is_taken_as_api_key_too(served: Running) -> None:
    with requests.Session() as session:
        session.trust_env = False
        reply = session.get(f"{served.url}{LOCAL}", headers={"api-key": served.admin_key})
        assert reply.status_code == 200
        assert reply.json()["name"] == "local"
        regions = session.get(
            f"{served.url}/subscriptions/{SUBSCRIPTION}/locations", headers={"api-key": served.admin_key}
        )
        assert [one["name"] for one in regions.json()["value"]] == ["local"]


def test_a_deployment_is_made_whichever_server_it_was_asked_of(
    served: Running, open_server: Callable[[], Server]
) -> None:
    """The one that answers here settles what another wrote."""
    add_base(served.server, "small")
    other = open_server()
    account = {
        "name": "local",
        "number": 1,
        "subscription": SUBSCRIPTION,
        "location": "local",
        "body": {"name": "local"},
    }
    management._write(other, account, "d", DeploymentIn.model_validate(deployment("small")))
    deadline = time.monotonic() + 5
    while call(served, "GET", f"{LOCAL}/deployments/d")[1]["properties"]["provisioningState"] != "Succeeded":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_base_folder_that_is_gone_fails_the_deployment(served: Running) -> None:
    folder = served.server.settings.data / "base"
    folder.mkdir()
    models.add_base(served.server.store, "mine", str(folder))
    deployed(served, "one", deployment("mine"))
    shutil.rmtree(folder)
    call(served, "PUT", f"{LOCAL}/deployments/two", deployment("mine"))
    deadline = time.monotonic() + 5
    while (said := call(served, "GET", f"{LOCAL}/deployments/two")[1])["properties"]["provisioningState"] == "Creating":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert said["properties"]["provisioningState"] == "Failed"
    assert str(folder) in said["error"]["message"]
