"""Azure OpenAI: the account (made where that is asked for, in a region with quota left), the data plane under its v1
surface, deployments of the base and of the tuned model.

A deployment bills by the hour whether it is asked or not, but for the developer tier; so both stand for no longer than
the run, and `destroy` begins with them.
"""

from __future__ import annotations

import io
import json
import os
import re
import time
import weakref
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Literal
from urllib.parse import urlsplit

import openai

from tunewright.errors import EndpointError, RecipeError, StageError, UserError
from tunewright.hosted import calls
from tunewright.hosted.places import Facts, Place, tuned_model
from tunewright.hosted.settings import AzureSettings
from tunewright.run import Run

ACCOUNT, DEPLOYMENT = "azure-account", "azure-deployment"
SCOPE = "https://cognitiveservices.azure.com/.default"
READY_S = 3600
"""How long a deployment may take to stand."""
ENDED = ("Succeeded", "Failed", "Canceled", "Disabled")
TAG = "tunewright-run"


class AzurePlace(Place):
    """An Azure OpenAI account."""

    def __init__(self, settings: AzureSettings) -> None:
        self.settings: AzureSettings = settings

    # --- clients ---

    @cached_property
    def client(self) -> openai.OpenAI:  # type: ignore[override]
        asked = self.settings
        endpoint = (asked.endpoint or self._account_endpoint()).rstrip("/")
        made = calls.client(f"{endpoint}/openai/v1/", self._key(), asked)
        weakref.finalize(self, made.close)
        return made

    @cached_property
    def arm(self) -> Any:
        """The control plane's client."""
        try:
            from azure.mgmt.cognitiveservices import CognitiveServicesManagementClient
        except ImportError:
            raise RecipeError("backend.kind: azure needs its SDK; pip install 'tunewright[azure]'") from None
        asked = self.settings
        where = asked.management.rstrip("/")
        made = CognitiveServicesManagementClient(
            self._credential,
            self.subscription,
            base_url=where,
            credential_scopes=[f"{where}/.default"],
            retry_total=asked.retries,
            polling_interval=min(5.0, asked.poll_s),
            connection_timeout=asked.timeout_s,
            read_timeout=asked.timeout_s,
        )
        weakref.finalize(self, made.close)
        return made

    @property
    def subscription(self) -> str:
        found = self.settings.subscription or os.environ.get("AZURE_SUBSCRIPTION_ID", "")
        if not found:
            raise RecipeError("backend.subscription: set it, or AZURE_SUBSCRIPTION_ID")
        return found

    @property
    def plain(self) -> dict[str, Any]:
        """What the SDK is to be told on each call where the control plane is on loopback, without TLS."""
        parts = urlsplit(self.settings.management)
        return {"enforce_https": False} if parts.scheme == "http" and parts.hostname in calls.LOCAL else {}

    @cached_property
    def _credential(self) -> Any:
        if self.settings.management_token_variable:
            return _Token(self.settings.management_token_variable)
        try:
            from azure.identity import DefaultAzureCredential
        except ImportError:
            raise RecipeError("backend.kind: azure needs azure-identity; pip install 'tunewright[azure]'") from None
        return DefaultAzureCredential()

    def _key(self) -> str | Callable[[], str]:
        """The data plane's key, or a function that gives a token that is still good."""
        asked = self.settings
        if asked.auth == "identity":
            credential = self._credential
            return lambda: str(credential.get_token(SCOPE).token)
        if os.environ.get(asked.key_variable, "").strip():
            return calls.secret(asked.key_variable)
        with explained("asking for the account's key"):
            keys = self.arm.accounts.list_keys(asked.resource_group, asked.account, **self.plain)
        calls.keep_secret(str(keys.key1))
        return str(keys.key1)

    # --- the account ---

    def _account(self) -> Any:
        from azure.core.exceptions import ResourceNotFoundError

        asked = self.settings
        try:
            return self.arm.accounts.get(asked.resource_group, asked.account, **self.plain)
        except ResourceNotFoundError:
            return None

    def _account_endpoint(self) -> str:
        with explained(f"looking for account {self.settings.account}"):
            account = self._account()
        if account is None:
            raise UserError(
                f"backend.account: resource group {self.settings.resource_group} has no account {self.settings.account}"
                "; make it, or set backend.create_account: true"
            )
        return str(account.properties.endpoint)

    def is_there(self) -> bool:
        with explained(f"looking for account {self.settings.account}"):
            return self._account() is not None

    def problems(self, base: str) -> list[str]:
        """What would fail later, found without making anything: the account, the quota, the content filter."""
        asked = self.settings
        with explained("looking at the account"):
            account = self._account()
            if account is None and not asked.create_account:
                self._account_endpoint()  # says what to do
            region = self.region(base) if account is None else account.location
            found = self._ends(region, base)
            if account is None:
                return found
            left = self.quota_left(account.location, base)
            if left is not None and left < asked.capacity:
                found.append(
                    f"backend.capacity: {asked.capacity} thousand tokens a minute are wanted for {base} and {left} are "
                    f"left in {account.location}; ask for quota, or set it lower"
                )
            policies = self.arm.rai_policies.list(asked.resource_group, asked.account, **self.plain)
            if asked.content_filter and asked.content_filter not in {one.name for one in policies}:
                found.append(f"backend.content_filter: the account has no content filter {asked.content_filter!r}")
            return found

    def _ends(self, region: str, base: str) -> list[str]:
        """What a region says of a base: that it is there, may be tuned, and is not retired."""
        name, version = _named(base)
        version = self.settings.model_version or version
        known = [one.model for one in self.arm.models.list(region, **self.plain) if one.model is not None]
        ours = [one for one in known if (one.name == name and version in (None, one.version)) or one.name == base]
        if not ours:
            near = sorted({f"{one.name}-{one.version}" for one in known if one.name == name})[:5]
            hint = f"; there are {', '.join(near)}" if near else ""
            return [f"model {base}: {region} has none of that name{hint}"]
        found = []
        capabilities, ends = ours[0].capabilities or {}, ours[0].deprecation
        dates = {} if ends is None else {"answers no more": ends.inference, "takes no more jobs": ends.fine_tune}
        for what, when in dates.items():
            if when and str(when)[:10] <= time.strftime("%Y-%m-%d"):
                found.append(f"model {base}: it {what} since {str(when)[:10]}; choose a newer base")
        if not found and str(capabilities.get("fineTune", "true")).lower() == "false":
            found.append(f"model {base}: it is not open to fine-tuning in {region}; choose another, or ask for access")
        return found

    def prepare(self, run: Run) -> None:
        """Make the account where it is not there and the recipe says so."""
        from azure.mgmt.cognitiveservices.models import Account, AccountProperties, Sku

        asked = self.settings
        with explained(f"making account {asked.account}"):
            found = self._account()
            if found is not None:
                if (found.tags or {}).get(TAG) == run.id:
                    _record(run, ACCOUNT, asked.account, location=found.location)
                return
            if not asked.create_account:
                self._account_endpoint()  # says what to do
            region = self.region(run.recipe().model)
            entry = _open_entry(run, ACCOUNT, asked.account) or run.intend(ACCOUNT, asked.account, location=region)
            made = self.arm.accounts.begin_create(
                asked.resource_group,
                asked.account,
                Account(
                    kind=asked.account_kind,
                    sku=Sku(name="S0"),
                    location=region,
                    tags={TAG: run.id},
                    properties=AccountProperties(custom_sub_domain_name=asked.account.lower()),
                ),
                **self.plain,
            ).result(READY_S)
            run.made(entry, location=made.location)

    def region(self, base: str) -> str:
        """Where to make the account: as asked, else the first that has room for what will be deployed.

        Raises:
            UserError: none has.
        """
        asked = self.settings
        if asked.region != "any":
            return asked.region
        left = {region: self.quota_left(region, base) for region in asked.regions}
        for region, there in left.items():
            if there is not None and there >= asked.capacity:
                return region
        for region, there in left.items():
            if there is None:  # the region does not say; making the deployment will
                return region
        said = [f"{region} {there}" for region, there in left.items()]
        raise UserError(
            f"backend.region: any: no region has {asked.capacity} thousand tokens a minute left for {base} "
            f"({', '.join(said)}); ask for quota, set backend.capacity lower, or name other backend.regions"
        )

    def quota_left(self, region: str, base: str) -> int | None:
        """Thousand tokens a minute that are left in a region for the base's deployment and for that of what is tuned
        from it, the smaller; None where the region lists neither."""
        asked = self.settings
        found: dict[str, int] = {}
        for usage in self.arm.usages.list(region, **self.plain):
            found[str(usage.name.value if usage.name else "")] = int((usage.limit or 0) - (usage.current_value or 0))
        pools = {
            f"OpenAI.{sku}.{name}{what}"
            for name in (base, _named(base)[0])
            for sku, what in ((asked.base_sku, ""), (asked.sku, "-finetune"))
        }
        return min((left for pool, left in found.items() if pool in pools), default=None)

    # --- deployments ---

    def model(self, run: Run, name: Literal["tuned", "base"]) -> str:
        model = tuned_model(run) if name == "tuned" else run.recipe().model
        return self.ensure_deployment(run, name, model)

    def ensure_deployment(self, run: Run, which: Literal["tuned", "base"], model: str) -> str:
        """The name of a deployment of a model that stands and can be asked."""
        from azure.mgmt.cognitiveservices.models import Deployment, DeploymentProperties, Sku

        asked = self.settings
        name = deployment_name(run, which)
        with explained(f"deploying {model}"):
            found = self._deployment(name)
            if found is not None and found.properties.provisioning_state == "Failed":
                self._delete_deployment(name)
                found = None
            if found is None:
                sku = asked.sku if which == "tuned" else asked.base_sku
                entry = _open_entry(run, DEPLOYMENT, name) or run.intend(DEPLOYMENT, name, sku=sku, model=model)
                properties = DeploymentProperties(
                    model=self._model(which, model),
                    rai_policy_name=asked.content_filter,
                )
                body = Deployment(sku=Sku(name=sku, capacity=asked.capacity), properties=properties, tags={TAG: run.id})
                said = body.serialize()
                if which == "tuned" and asked.dynamic_quota:  # the SDK holds it to be read-only; the service takes it
                    said["properties"]["dynamicThrottlingEnabled"] = True
                self.arm.deployments.begin_create_or_update(
                    asked.resource_group,
                    asked.account,
                    name,
                    io.BytesIO(json.dumps(said).encode()),
                    **self.plain,
                ).result(READY_S)
                run.made(entry)
            self._wait(name)
        return name

    def _deployment(self, name: str) -> Any:
        from azure.core.exceptions import ResourceNotFoundError

        try:
            return self.arm.deployments.get(self.settings.resource_group, self.settings.account, name, **self.plain)
        except ResourceNotFoundError:
            return None

    def _wait(self, name: str) -> None:
        deadline = time.monotonic() + READY_S
        while True:
            found = self._deployment(name)
            state = None if found is None else found.properties.provisioning_state
            if state == "Succeeded":
                return
            if found is None or state in ENDED:
                raise EndpointError(f"deployment {name} did not come to stand ({state or 'it went away'})")
            if time.monotonic() > deadline:
                raise EndpointError(f"deployment {name} was not ready within {READY_S // 60} minutes")
            time.sleep(min(5.0, self.settings.poll_s))

    def _delete_deployment(self, name: str) -> None:
        from azure.core.exceptions import ResourceNotFoundError

        try:
            self.arm.deployments.begin_delete(
                self.settings.resource_group, self.settings.account, name, **self.plain
            ).result(READY_S)
        except ResourceNotFoundError:
            return

    def _model(self, which: str, model: str) -> Any:
        """What a deployment is of: a tuned model by its whole name, a base by its name and version apart."""
        from azure.mgmt.cognitiveservices.models import DeploymentModel

        if which == "tuned":
            return DeploymentModel(format="OpenAI", name=model, version="1")
        name, version = _named(model)
        return DeploymentModel(format="OpenAI", name=name, version=self.settings.model_version or version)

    # --- what a place does ---

    def job_options(self) -> dict[str, Any]:
        kind = self.settings.training_type
        return {} if kind is None else {"extra_body": {"trainingType": kind}}

    def answers(self, run: Run) -> bool:
        found = self._deployment(deployment_name(run, "tuned"))
        return found is not None and found.properties.provisioning_state == "Succeeded"

    def undeploy(self, run: Run) -> None:
        if self._account() is not None:
            self._delete_deployment(deployment_name(run, "tuned"))

    def standing(self, run: Run) -> Iterator[tuple[tuple[str, str], Facts]]:
        with explained("looking for what stands"):
            account = self._account()
            if account is None:
                return
            asked = self.settings
            names = {deployment_name(run, which) for which in ("tuned", "base")}
            for one in self.arm.deployments.list(asked.resource_group, asked.account, **self.plain):
                if one.name in names:
                    facts = {"name": one.name, "state": str(one.properties.provisioning_state).lower()}
                    facts |= {"model": one.properties.model.name, "sku": one.sku.name, "since_ms": _since(one)}
                    yield (DEPLOYMENT, one.name), facts
            if (account.tags or {}).get(TAG) == run.id:
                yield (ACCOUNT, asked.account), {"name": asked.account, "state": "there", "location": account.location}
        yield from super().standing(run)

    def remove(self, run: Run, kind: str, name: str, facts: Facts) -> Literal["gone", "going"]:
        if kind == DEPLOYMENT:
            with explained(f"removing deployment {name}"):
                if self._account() is not None:
                    self._delete_deployment(name)
            return "gone"
        if kind == ACCOUNT:
            with explained(f"removing account {name}"):
                self._remove_account(run)
            return "gone"
        with explained("looking for the account"):
            if self._account() is None:
                return "gone"
        return super().remove(run, kind, name, facts)

    def _remove_account(self, run: Run) -> None:
        """The account, where this run made it; purged too, or its name would be held for 48 hours."""
        from azure.core.exceptions import ResourceNotFoundError

        asked = self.settings
        account = self._account()
        if account is not None:
            if (account.tags or {}).get(TAG) != run.id:
                return
            self.arm.accounts.begin_delete(asked.resource_group, asked.account, **self.plain).result(READY_S)
        for one in self.arm.deleted_accounts.list(**self.plain):
            if one.name.lower() == asked.account.lower() and (one.tags or {}).get(TAG, run.id) == run.id:
                try:
                    self.arm.deleted_accounts.begin_purge(
                        one.location, asked.resource_group, asked.account, **self.plain
                    ).result(READY_S)
                except ResourceNotFoundError:
                    continue


class _Token:
    """A credential whose token is in the environment."""

    def __init__(self, variable: str) -> None:
        self.variable = variable

    def get_token(self, *_scopes: str, **_options: Any) -> Any:
        from azure.core.credentials import AccessToken

        return AccessToken(calls.secret(self.variable), int(time.time()) + 3600)


def deployment_name(run: Run, which: str) -> str:
    """A deployment's name, of 64 characters at most."""
    return f"tw-{which}-{run.id}"[-64:].lstrip("-_.")


def explained(doing: str) -> Any:
    """Azure's errors as ours, in one line and without what could be secret."""
    return _Explained(doing)


class _Explained:
    def __init__(self, doing: str) -> None:
        self.doing = doing

    def __enter__(self) -> None:
        """Nothing is needed before."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            return
        from azure.core.exceptions import AzureError, ClientAuthenticationError, HttpResponseError

        if not isinstance(error, AzureError):
            return
        said = calls.scrubbed((str(error).strip().splitlines() or [type(error).__name__])[0])[:400]
        if isinstance(error, ClientAuthenticationError):
            raise UserError(f"Azure: {self.doing}: not signed in ({said}); run `az login`") from None
        code = getattr(getattr(error, "error", None), "code", None)
        if isinstance(error, HttpResponseError) and (error.status_code or 500) < 500:
            more = "; ask for quota, or set backend.capacity lower" if code == "InsufficientQuota" else ""
            raise UserError(f"Azure: {self.doing}: {said}{more}") from None
        raise StageError(f"Azure: {self.doing}: {said}; the same command goes on") from None


def _named(base: str) -> tuple[str, str | None]:
    """A base's name and version, which jobs know as one word: gpt-4.1-mini and 2025-04-14."""
    found = re.fullmatch(r"(.+)-(\d{4}-\d{2}-\d{2})", base)
    return (found[1], found[2]) if found else (base, None)


def _open_entry(run: Run, kind: str, name: str) -> str | None:
    """The entry of something that was about to be made when the command was killed."""
    for one in run.resources():
        if (one["kind"], one["name"], one["is"]) == (kind, name, "intended"):
            return str(one["entry"])
    return None


def _record(run: Run, kind: str, name: str, **facts: Any) -> None:
    """Into the ledger as made, once."""
    known = [one for one in run.resources() if (one["kind"], one["name"]) == (kind, name) and one["is"] != "gone"]
    if not known:
        run.made(run.intend(kind, name, **facts))
    elif known[0]["is"] == "intended":
        run.made(known[0]["entry"], **facts)


def _since(one: Any) -> int | None:
    made = one.system_data.created_at if one.system_data else None
    return None if made is None else int(1000 * made.timestamp())
