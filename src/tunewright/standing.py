"""What stands where because of the runs here: kind, name, since when, its state, when it ends by itself, what it costs.

Found by asking each run's backend, which knows its ledger and looks for what carries the run's name. A backend that
cannot be reached is said, and the rest is shown.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from tunewright.backends import base as backends
from tunewright.errors import RecipeError, TunewrightError
from tunewright.run import Run

PRICES = Path(__file__).with_name("prices.yaml")
FREE = ("process", "mlflow-run", "mlflow-model", "databricks-folder", "databricks-volume", "job")
"""What costs nothing by the hour (storage is billed by size)."""
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


def find(runs: Iterable[Run], prices: Path = PRICES) -> Found:
    """Ask every run's backend."""
    table = read_prices(prices)
    standing: list[Standing] = []
    unreachable: dict[str, str] = {}
    for run in runs:
        try:
            recipe = run.recipe()
            found = backends.backend(recipe).find(run)
        except TunewrightError as error:
            unreachable[run.id] = str(error)
            continue
        standing += [_standing(run, recipe.backend.kind, one, table) for one in found]
    return Found(standing, unreachable, str(table["as_of"]))


def read_prices(path: Path) -> dict[str, Any]:
    """The price table.

    Raises:
        RecipeError: it is absent, or not a table of prices.
    """
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert isinstance(table, dict)
        return {"as_of": table["as_of"], "unit": table["unit"], "clusters": {}, "endpoints": {}} | table
    except (OSError, yaml.YAMLError, AssertionError, KeyError) as error:
        raise RecipeError(f"{path}: not a price table ({error}); copy {PRICES} and change it") from None


def _standing(run: Run, backend: str, one: backends.Resource, prices: dict[str, Any]) -> Standing:
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
        dollars_an_hour=_cost(one, state, prices),
    )


def _cost(one: backends.Resource, state: str, prices: dict[str, Any]) -> tuple[float, float] | None:
    if one.kind in FREE or state in ASLEEP:
        return 0.0, 0.0
    if one.kind == "databricks-cluster" and (node := prices["clusters"].get(one.facts.get("node_type"))):
        nodes = 1 + int(one.facts.get("workers") or 0)
        low, high = (nodes * (node["machine"][end] + node["units"] * prices["unit"][end]) for end in (0, 1))
        return round(low, 2), round(high, 2)
    if one.kind == "databricks-endpoint" and (known := prices["endpoints"].get("Small")):
        return 0.0, float(known[1])  # it sleeps where nobody asks
    if one.kind == "databricks-job":
        return 0.0, 0.0  # its cluster is what costs
    return None
