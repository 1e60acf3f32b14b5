"""Models by the names that clients send: bases that `tunewright models add` named, tuned ones, and checkpoints."""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from sqlalchemy import Connection, delete, insert, select

from tunewright.endpoint.shapes import ApiError
from tunewright.errors import ModelError
from tunewright.server import documents, store, tables, web
from tunewright.server.state import Server
from tunewright.server.store import Store, now
from tunewright.server.web import Inference, Training

ORGANIZATION = "tunewright"

router = APIRouter(tags=["models"])


@dataclass(frozen=True)
class Target:
    """What is loaded to answer under a name."""

    name: str
    base: str
    """The base's name."""
    source: str
    """Hub name or folder of the base."""
    revision: str | None
    folder: Path | None
    """An adapter's or a whole model's folder; None for the base itself."""
    kind: Literal["base", "adapter", "full"]
    created: int
    retires: int | None = None
    """When a base stops answering under its name."""

    @property
    def engine(self) -> str:
        """Names the process that serves it: one for a base and all its adapters, one for each whole model."""
        weights = f"{self.source}@{self.revision}" if self.kind != "full" else str(self.folder)
        return hashlib.sha256(weights.encode()).hexdigest()[:16]


@router.get("/models", responses=documents.shows(documents.Models))
def list_models(request: Request, _caller: Inference) -> dict[str, Any]:
    server = web.server(request)
    with server.store.read() as connection:
        named = [dict(one) for one in connection.execute(select(tables.bases)).mappings()]
        tuned = [dict(one) for one in connection.execute(select(tables.models)).mappings()]
    data = [_base_shape(one) for one in named] + [_tuned_shape(one) for one in tuned if not one["checkpoint"]]
    return {"object": "list", "data": data}


@router.get("/models/{model:path}", responses=documents.shows(documents.Model))
def retrieve_model(request: Request, _caller: Inference, model: str) -> dict[str, Any]:
    with web.server(request).store.read() as connection:
        if (tuned := store.row(connection, tables.models, id=model)) is not None:
            return _tuned_shape(tuned)
        if (named := store.row(connection, tables.bases, name=model)) is not None:
            return _base_shape(named)
    raise unknown(model)


@router.delete("/models/{model:path}", responses=documents.shows(documents.Deleted))
def delete_model(request: Request, _caller: Training, model: str) -> dict[str, Any]:
    """Delete a tuned model. One that a deployment serves stays, and so do bases."""
    server = web.server(request)
    with server.store.begin() as connection:
        tuned = store.row(connection, tables.models, id=model)
        if tuned is None:
            if store.row(connection, tables.bases, name=model) is not None:
                raise ApiError(
                    403,
                    f"'{model}' is a base model; `tunewright models remove` takes its name away.",
                    param="model",
                    code="model_not_deletable",
                )
            raise unknown(model)
        query = select(tables.deployments.c.name).where(tables.deployments.c.model == model)
        if (deployment := connection.execute(query).scalar()) is not None:
            raise ApiError(
                400,
                f"The deployment '{deployment}' serves '{model}'; delete that first.",
                param="model",
                code="model_in_use",
            )
        connection.execute(delete(tables.models).where(tables.models.c.id == model))
    shutil.rmtree(server.settings.data / tuned["folder"], ignore_errors=True)
    return {"id": model, "object": "model", "deleted": True}


def add_base(
    database: Store,
    name: str,
    source: str,
    *,
    revision: str | None = None,
    overrides: Sequence[str] = (),
    retires_at: int | None = None,
    fine_tune_until: int | None = None,
) -> None:
    """Let clients call a base by a name; an earlier meaning of the name is replaced.

    Args:
        source: hub name, folder or starter, known to be a model (see `tunewright.models.find`).
        overrides: `key=value`, as after `--set`: how jobs on this base train.
        retires_at: when the base stops answering by this name; what was tuned from it goes on.
        fine_tune_until: when jobs on the base, and on what was tuned from it, are no longer taken.

    Raises:
        ModelError: the name could not be sent, or could be taken for a tuned model's.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}", name):
        raise ModelError(f"model {name!r}: a name has letters, digits and . _ / - alone, at most 128 of them")
    with database.begin() as connection:
        connection.execute(delete(tables.bases).where(tables.bases.c.name == name))
        connection.execute(
            insert(tables.bases).values(
                name=name,
                source=source,
                revision=revision,
                recipe=list(overrides),
                created_at=now(),
                retires_at=retires_at,
                fine_tune_until=fine_tune_until,
            )
        )


def remove_base(database: Store, name: str) -> None:
    """Take a base's name away; models that were tuned from it go on being served.

    Raises:
        ModelError: there is no such name.
    """
    with database.begin() as connection:
        if not connection.execute(delete(tables.bases).where(tables.bases.c.name == name)).rowcount:
            raise ModelError(f"model {name!r}: no such name; `tunewright models list` shows them")


def find(server: Server, name: str) -> Target:
    """What answers under a name.

    Raises:
        ApiError: 404, nothing does.
    """
    with server.store.read() as connection:
        found = known(connection, server.settings.data, name)
    if found is None:
        raise unknown(name)
    return found


def known(connection: Connection, data: Path, name: str) -> Target | None:
    """What answers under a name, None where nothing does."""
    if not name.isprintable():  # a NUL or half a letter would be an error of the database
        return None
    if (tuned := store.row(connection, tables.models, id=name)) is not None:
        said = {key: tuned[key] for key in ("base", "source", "revision", "kind")}
        return Target(name, folder=data / tuned["folder"], created=tuned["created_at"], **said)
    if (base := store.row(connection, tables.bases, name=name)) is not None:
        said = {"folder": None, "kind": "base", "created": base["created_at"], "retires": base["retires_at"]}
        return Target(name, name, base["source"], base["revision"], **said)
    return None


def find_trainable(server: Server, name: str) -> Target:
    """What a job starts from: a base, or a tuned model whose adapter it goes on with.

    Raises:
        ApiError: 404, there is no such model; 400, it takes no more jobs.
    """
    found = find(server, name)
    with server.store.read() as connection:
        base = store.row(connection, tables.bases, name=found.base)
    until = [] if base is None else [base[key] for key in ("fine_tune_until", "retires_at") if base[key] is not None]
    if until and min(until) <= now():
        raise ApiError(
            400,
            f"The model '{name[:128]}' has taken no new fine-tuning jobs since {day(min(until))}.",
            param="model",
            code="model_not_available",
        )
    return found


def day(at: int) -> str:
    """The day (UTC) of a time, such as 2027-01-06."""
    return time.strftime("%Y-%m-%d", time.gmtime(at))


def unknown(name: str) -> ApiError:
    return ApiError(
        404,
        f"The model '{name[:128]}' does not exist here; GET /v1/models lists those that do, and `tunewright models "
        "add` names another base.",
        param="model",
        code="model_not_found",
    )


def tuned_name(base: str, suffix: str | None, job_id: str, *, surface: str, step: int | None = None) -> str:
    """What a job's model is called: OpenAI's `ft:base:org:suffix:id`, or Azure's `base.ft-hex-suffix`."""
    slug = re.sub(r"[^a-z0-9]+", "-", (suffix or "").lower()).strip("-")
    root = base.split(":")[1] if base.startswith("ft:") else base.split(".ft-")[0]
    if surface == "azure":
        digest = hashlib.sha256(job_id.encode()).hexdigest()[:32]
        name = f"{root}.ft-{digest}" + (f"-{slug[:40]}" if slug else "")
        return name if step is None else f"{name}-ckpt-step-{step}"
    name = f"ft:{root}:{ORGANIZATION}:{slug}:{job_id.removeprefix('ftjob-')[:8]}"
    return name if step is None else f"{name}:ckpt-step-{step}"


def record(
    connection: Connection,
    name: str,
    *,
    job_id: str,
    start: Target,
    folder: str,
    kind: str,
    checkpoint: bool = False,
) -> None:
    """Note a tuned model, once; `start` is what its job started from, `folder` is relative to the data folder."""
    if store.row(connection, tables.models, id=name) is None:
        row = {"id": name, "created_at": now(), "job_id": job_id, "base": start.base, "source": start.source}
        row |= {"revision": start.revision, "folder": folder, "kind": kind, "checkpoint": checkpoint}
        connection.execute(insert(tables.models).values(**row))


def named_bases(connection: Connection) -> list[dict[str, Any]]:
    query = select(tables.bases).order_by(tables.bases.c.name)
    return [dict(one) for one in connection.execute(query).mappings()]


def _base_shape(base: dict[str, Any]) -> dict[str, Any]:
    shown = {"id": base["name"], "object": "model", "created": base["created_at"], "owned_by": "system"}
    if base["retires_at"] is not None:
        shown["shutdown_date"] = day(base["retires_at"])
    return shown


def _tuned_shape(tuned: dict[str, Any]) -> dict[str, Any]:
    return {"id": tuned["id"], "object": "model", "created": tuned["created_at"], "owned_by": ORGANIZATION}
