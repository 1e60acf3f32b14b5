"""The stage `package` where the weights are elsewhere: a card, and which model of which endpoint it is."""

from __future__ import annotations

import hashlib
from typing import Any

from tunewright.hosted.asking import room
from tunewright.hosted.places import Place, tuned_model
from tunewright.package.card import card
from tunewright.run import Run, write_json, write_text
from tunewright.tracking import Tracker


def package(run: Run, place: Place, tracker: Tracker) -> None:
    """package/manifest.json is written last."""
    recipe = run.recipe()
    pointer: dict[str, Any] = {"model": tuned_model(run), "base": recipe.model, "endpoint": str(place.client.base_url)}
    pointer |= {"max_answer_tokens": room(run)}
    write_json(run.package / "hosted.json", pointer)
    write_text(run.card_file, card(run, recipe))
    manifest: dict[str, Any] = {
        "format": 1,
        "name": recipe.name,
        "run": run.id,
        "base": run.resolved()["model"],
        "task": recipe.task,
        "fidelity": {},
        "mlflow": None,
        "hosted": pointer,
        "files": {
            str(path.relative_to(run.package)): {
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "bytes": path.stat().st_size,
            }
            for path in (run.package / "hosted.json", run.card_file)
        },
    }
    write_json(run.manifest_file("package"), manifest)
    tracker.artifact(run.manifest_file("package"), "package")
