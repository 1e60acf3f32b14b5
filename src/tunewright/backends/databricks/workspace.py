"""The workspace: who is asked for, and what there is to choose from. Nothing is made here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

from tunewright import shipping
from tunewright.backends.databricks.calls import explained
from tunewright.backends.databricks.settings import Settings
from tunewright.errors import RecipeError

HTTP_S, RETRY_S = 60, 300
"""How long one call may take, and how long it is tried again."""


class Workspace:
    """A workspace as the settings name it; asked when something is wanted of it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def looks(self) -> tuple[Callable[[], Any], ...]:
        """Everything that can be found wrong without making anything, the signing in first."""
        return self.me, self.runtime, self.node, self.policy_id, self.existing, self.volume_there

    @cached_property
    def client(self) -> Any:
        """The SDK's client, all of whose waits have an end."""
        try:
            from databricks.sdk import WorkspaceClient
            from databricks.sdk.config import Config
        except ImportError:
            raise RecipeError("backend.kind: databricks needs the SDK; pip install 'tunewright[databricks]'") from None
        where: dict[str, Any] = {"host": self.settings.host, "profile": self.settings.profile}
        config = Config(
            **{key: value for key, value in where.items() if value},
            http_timeout_seconds=HTTP_S,
            retry_timeout_seconds=RETRY_S,
            product="tunewright",
            product_version=shipping.version(),
        )
        return WorkspaceClient(config=config)

    def me(self) -> str:
        with explained("signing in"):
            return str(self._user)

    @cached_property
    def _user(self) -> str:
        return str(self.client.current_user.me().user_name)

    def runtime(self) -> str:
        with explained("looking for a runtime"):
            return self._spark_version

    @cached_property
    def _spark_version(self) -> str:
        asked = self.settings
        if asked.spark_version:
            there = {one.key for one in self.client.clusters.spark_versions().versions or ()}
            if asked.spark_version not in there:
                raise RecipeError(f"backend.spark_version: the workspace has no {asked.spark_version}")
            return asked.spark_version
        newest = newest_ml(self.client.clusters.spark_versions().versions or (), gpus=asked.gpus)
        if newest is None:
            kind = "for GPUs" if asked.gpus else "for CPUs"
            said = f"the workspace offers no ML runtime {kind} that is no beta; set backend.spark_version"
            raise RecipeError(said)
        return newest

    def node(self) -> str:
        with explained("looking for a node type"):
            return self._node_type

    @cached_property
    def _node_type(self) -> str:
        asked = self.settings
        if asked.cluster:
            return ""
        if asked.node_type:
            there = {one.node_type_id for one in self.client.clusters.list_node_types().node_types or ()}
            if asked.node_type not in there:
                raise RecipeError(f"backend.node_type: the workspace has no {asked.node_type}")
            return asked.node_type
        try:
            return str(
                self.client.clusters.select_node_type(min_cores=4, min_memory_gb=16, min_gpus=1 if asked.gpus else 0)
            )
        except ValueError:
            raise RecipeError("the workspace offers no node type that fits; set backend.node_type") from None

    def policy_id(self) -> str | None:
        asked = self.settings.policy
        if asked is None:
            return None
        with explained("looking for the policy"):
            for policy in self.client.cluster_policies.list():
                if asked in (policy.name, policy.policy_id):
                    return str(policy.policy_id)
        raise RecipeError(f"backend.policy: the workspace has no policy {asked!r} that is open to you")

    def existing(self) -> str | None:
        asked = self.settings.cluster
        if asked is None:
            return None
        with explained("looking for the cluster"):
            for cluster in self.client.clusters.list():
                if asked in (cluster.cluster_name, cluster.cluster_id):
                    return str(cluster.cluster_id)
        raise RecipeError(f"backend.cluster: the workspace has no cluster {asked!r}")

    def volume_there(self) -> bool:
        from databricks.sdk.errors import NotFound

        with explained("looking at the volume"):
            try:
                self.client.volumes.read(self.settings.volume)
                return True
            except NotFound:
                if self.settings.create_volume:
                    return False
        raise RecipeError(
            f"backend.volume: there is no {self.settings.volume}, or it is not open to you; name another, or set "
            "backend.create_volume: true"
        )


def newest_ml(versions: Iterable[Any], *, gpus: bool) -> str | None:
    """The newest ML runtime that is no beta. (The SDK's own choice takes Scala 2.12 alone unless it is told, which the
    newest runtimes no longer have.)"""
    found = {}
    for one in versions:
        numbers = re.match(r"(\d+)\.(\d+)\.x-" + ("gpu" if gpus else "cpu") + "-ml-", one.key or "")
        if numbers and "beta" not in (one.name or "").lower():
            found[int(numbers[1]), int(numbers[2])] = str(one.key)
    return found[max(found)] if found else None
