"""The ledger of everything made anywhere, and its removal.

`destroy` is safe to repeat and safe to kill: what is gone is written down after it is gone, and what was made but not
recorded is found by the run's name.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from tunewright import tracking
from tunewright.backends.base import Backend, Resource
from tunewright.errors import StageError
from tunewright.run import STAGES, Run


@dataclass(frozen=True)
class Removed:
    """One thing that `destroy` ended or removed."""

    kind: str
    name: str
    what: str


def standing(run: Run, backend: Backend) -> list[Resource]:
    """Everything that stands because of this run: recorded in its ledger, or found by its name."""
    return backend.find(run)


def destroy(run: Run, backend: Backend, *, files: bool = False) -> list[Removed]:
    """End and remove everything that this run made outside its folder.

    Processes are stopped, the registered model version is removed, the MLflow run is ended (its record stays, as the
    history). `files` removes the run folder too.
    """
    with run.lock():
        removed = []
        # What answers and costs goes first, so that a tracking server that is away cannot keep it alive.
        for resource in sorted(standing(run, backend), key=_order):
            removed.append(_remove(run, backend, resource))
            if resource.entry:
                run.gone(resource.entry)
        if run.manifest_file("check").is_file() and tracking.end(run):
            removed.append(Removed("mlflow-run", run.id, "ended"))
        run.reset("deploy")
        run.mark_destroyed()
        for path in (run.key_file, run.test_key_file, *(run.job_file(stage) for stage in STAGES)):
            path.unlink(missing_ok=True)
        run.event("run", "destroyed", removed=[f"{one.kind} {one.name}: {one.what}" for one in removed])
        if files:
            shutil.rmtree(run.path)
            removed.append(Removed("folder", str(run.path), "removed"))
    return removed


FIRST = (
    "process",
    "azure-deployment",
    "databricks-endpoint",
    "databricks-job",
    "hosted-job",
    "databricks-cluster",
    "mlflow-model",
    "mlflow-run",
)
LAST = ("azure-account", "databricks-folder", "databricks-volume")


def _order(one: Resource) -> int:
    """What costs goes first; where files lie that the others need, last."""
    if one.kind in LAST:
        return len(FIRST) + 1 + LAST.index(one.kind)
    return FIRST.index(one.kind) if one.kind in FIRST else len(FIRST)


def _remove(run: Run, backend: Backend, resource: Resource) -> Removed:
    name = resource.name
    if resource.kind == "mlflow-run":
        tracking.end(run)
        return Removed(resource.kind, name, "ended; its record stays")
    if resource.kind == "mlflow-model":
        known = resource.facts.get("version")
        for version in [known] if known else tracking.versions_of(run, name):
            tracking.unregister(run, name, version)
        return Removed(resource.kind, f"{name} version {known or '(not recorded)'}", "removed from the registry")
    removed = backend.remove(resource, run)
    if removed == "kept":
        return Removed(resource.kind, name, "left, because it holds what is not of this run")
    if removed == "going":
        raise StageError(
            f"{resource.kind} {name} is still going; run `tunewright destroy {run.path}` again in a minute"
        )
    return Removed(resource.kind, name, "stopped" if resource.kind == "process" else "removed")
