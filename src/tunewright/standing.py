"""What stands where because of the runs here: kind, name, since when, its state, when it ends by itself, what it costs.

Found by asking each run's backend, which knows its ledger and looks for what carries the run's name. A backend that
cannot be reached is said, and the rest is shown.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from tunewright import prices
from tunewright.backends import base as backends
from tunewright.errors import TunewrightError
from tunewright.run import Run

HOSTED = ("hosted-file", "hosted-job", "hosted-model", "azure-account")
FREE = ("process", "mlflow-run", "mlflow-model", "databricks-folder", "databricks-volume", "databricks-job", *HOSTED)
"""What costs nothing by the hour: storage is billed by size, a job by its cluster."""
ASLEEP = ("terminated", "stopped", "ended")


@dataclass(frozen=True)
class Standing:
    """One thing that stands."""

    run: str
    backend: str
    kind: str
    name: str
    state: str
    since: str | None
    """UTC, ISO 8601."""
    ends_by_itself: str | None
    recorded: bool
    """In the run's ledger; else it was found by the run's name alone."""
    dollars_an_hour: tuple[float, float] | None
    """Low and high; None where nobody here knows."""


@dataclass(frozen=True)
class Found:
    """What stands, and which runs could not be asked about."""

    standing: list[Standing]
    unreachable: dict[str, str]
    prices_as_of: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find(runs: Iterable[Run], table: dict[str, Any]) -> Found:
    """Ask every run's backend; `table` is that of `prices.read`."""
    standing: list[Standing] = []
    unreachable: dict[str, str] = {}
    for run in runs:
        try:
            recipe = run.recipe()
            found = backends.backend(recipe).find(run)
        except TunewrightError as error:
            unreachable[run.id] = str(error)
            continue
        standing += [
            _standing(run, recipe.backend.kind, one, table)
            for one in found
            if one.facts.get("state") != backends.ABSENT
        ]
    return Found(standing, unreachable, str(table["as_of"]))


def _standing(run: Run, backend: str, one: backends.Resource, table: dict[str, Any]) -> Standing:
    facts = one.facts
    minutes = facts.get("autotermination_minutes")
    since = facts.get("at")
    if facts.get("since_ms"):
        moment = datetime.datetime.fromtimestamp(facts["since_ms"] / 1000, datetime.UTC)
        since = moment.isoformat(timespec="seconds").replace("+00:00", "Z")
    state = facts.get("state") or {"intended": "unknown", "made": "there"}.get(str(facts.get("is")), "there")
    return Standing(
        run=run.id,
        backend=backend,
        kind=one.kind,
        name=one.name,
        state=state,
        since=since,
        ends_by_itself=f"after {minutes} min idle" if minutes else None,
        recorded=one.entry is not None,
        dollars_an_hour=_cost(one, state, table),
    )


def _cost(one: backends.Resource, state: str, table: dict[str, Any]) -> tuple[float, float] | None:
    if one.kind in FREE or state in ASLEEP:
        return 0.0, 0.0
    if one.kind == "databricks-cluster":
        return prices.of_cluster(table, one.facts.get("node_type"), 1 + int(one.facts.get("workers") or 0))
    if one.kind == "azure-deployment":
        return prices.of_deployment(table, str(one.facts.get("model") or ""), str(one.facts.get("sku") or ""))
    if one.kind == "databricks-endpoint":
        return prices.of_endpoint(table, one.facts.get("workload_size"))
    return None
