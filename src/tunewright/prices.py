"""The price table: what things that stand cost an hour, in US dollars, as ranges. What is not listed is unknown."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from tunewright.errors import RecipeError

PRICES = Path(__file__).with_name("prices.yaml")


def read(path: Path | None = None) -> dict[str, Any]:
    """The price table: the one at `path`, else the one that TUNEWRIGHT_PRICES names, else ours.

    Raises:
        RecipeError: it is absent, or not a table of prices.
    """
    path = path or Path(os.environ.get("TUNEWRIGHT_PRICES") or PRICES)
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(table, dict):
            raise TypeError("it is no mapping")
        return {"as_of": table["as_of"], "unit": table["unit"], "clusters": {}, "endpoints": {}} | table
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise RecipeError(f"{path}: not a price table ({error}); copy {PRICES} and change it") from None


def of_cluster(table: dict[str, Any], node_type: str | None, nodes: int) -> tuple[float, float] | None:
    """Low and high of a cluster an hour: its machines and Databricks' units for them."""
    node = table["clusters"].get(node_type)
    if node is None:
        return None
    low, high = (nodes * (node["machine"][end] + node["units"] * table["unit"][end]) for end in (0, 1))
    return round(low, 2), round(high, 2)


def of_model(table: dict[str, Any], name: str) -> dict[str, Any] | None:
    """What a base behind an API costs (`train`, `input`, `output`: low and high for a million tokens; `hosting_hour`
    of a deployment), by the longest entry that its name begins with."""
    known = [entry for entry in table.get("models", {}) if name.startswith(entry)]
    return None if not known else dict(table["models"][max(known, key=len)])


def of_deployment(table: dict[str, Any], model: str, sku: str) -> tuple[float, float] | None:
    """Low and high of a deployment an hour. One of a base is paid for by its tokens alone, and so is the developer
    tier; a tuned model (`.ft-`, `ft:`) is hosted by the hour, asked or not."""
    tuned = ".ft-" in model or model.startswith("ft:")
    if not tuned or sku.casefold() in ("developer", "developertier"):
        return 0.0, 0.0
    known = of_model(table, model.removeprefix("ft:"))
    return (
        None if known is None or "hosting_hour" not in known else (known["hosting_hour"][0], known["hosting_hour"][1])
    )


def of_endpoint(table: dict[str, Any], workload_size: str | None) -> tuple[float, float] | None:
    """Low and high of a serving endpoint an hour; it sleeps where nobody asks, so the low is 0."""
    known = table["endpoints"].get(workload_size)
    return None if known is None else (0.0, float(known[1]))
