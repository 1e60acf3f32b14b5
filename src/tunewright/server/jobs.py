"""Fine-tuning jobs as clients see them. What a job does, `worker` does.

A request to create one is answered at once, whatever its files hold: errors of content come on the job, since clients
that retry a refused request would otherwise retry for ever.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError
from sqlalchemy import Connection, case, delete, exists, insert, select, update
from sqlalchemy.exc import IntegrityError

from tunewright import recipe as recipes
from tunewright.endpoint.shapes import ApiError, Part
from tunewright.server import documents, files, models, store, tables, web
from tunewright.server.state import Server, Settings
from tunewright.server.store import new_id, now
from tunewright.server.web import After, Limit20, Training

FINAL = ("succeeded", "failed", "cancelled")
ORGANIZATION = "org-tunewright"

router = APIRouter(tags=["fine-tuning"], route_class=web.Route)

Auto = Literal["auto"]
Epochs = Annotated[int, Field(ge=1, le=50)] | Auto | None
BatchSize = Annotated[int, Field(ge=1, le=256)] | Auto | None
Multiplier = Annotated[float, Field(gt=0, le=1000)] | Auto | None


class Hyperparameters(Part):
    n_epochs: Epochs = None
    batch_size: BatchSize = None
    learning_rate_multiplier: Multiplier = None


class DpoHyperparameters(Hyperparameters):
    beta: Annotated[float, Field(gt=0, le=2)] | Auto | None = None


class ReinforcementHyperparameters(Hyperparameters):
    compute_multiplier: Annotated[float, Field(ge=1e-5, le=10)] | Auto | None = None
    eval_interval: Annotated[int, Field(ge=1)] | Auto | None = None
    eval_samples: Annotated[int, Field(ge=1)] | Auto | None = None
    reasoning_effort: Literal["default", "low", "medium", "high"] | None = None


def _grader(value: dict[str, Any]) -> dict[str, Any]:
    try:
        TypeAdapter(recipes.Grader).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PydanticCustomError(
            "grader", "{said}", {"said": f"{where}: {first['msg']}" if where else first["msg"]}
        ) from None
    return value


GraderIn = Annotated[dict[str, Any], AfterValidator(_grader)]


class Supervised(Part):
    hyperparameters: Hyperparameters | None = None


class Dpo(Part):
    hyperparameters: DpoHyperparameters | None = None


class Reinforcement(Part):
    grader: GraderIn
    hyperparameters: ReinforcementHyperparameters | None = None
    response_format: dict[str, Any] | None = None


class Method(Part):
    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: Reinforcement | None = None

    def settings(self) -> Supervised | Dpo | Reinforcement | None:
        found: Supervised | Dpo | Reinforcement | None = getattr(self, self.type)
        return found


Metadata = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]


def _suffix(value: str) -> str:
    if not value.isprintable():
        raise PydanticCustomError("suffix", "it has characters that cannot be printed")
    return value


class JobIn(Part):
    model: str = Field(min_length=1, max_length=256)
    training_file: str = Field(min_length=1, max_length=128)
    validation_file: Annotated[str, Field(max_length=128)] | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_suffix)] | None = None
    seed: Annotated[int, Field(ge=0, le=2147483647)] | None = None
    metadata: Metadata | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    integrations: list[dict[str, Any]] | None = Field(default=None, max_length=5)


@router.post("/fine_tuning/jobs", responses=documents.shows(documents.Job))
def create_job(request: Request, caller: Training, wanted: JobIn) -> dict[str, Any]:
    server = web.server(request)
    method = _method(wanted)
    if wanted.integrations:
        raise ApiError(
            400,
            "'integrations' cannot be honoured: metrics go to MLflow, and every job has its run there.",
            param="integrations",
            code="unsupported_parameter",
        )
    for param in ("training_file", "validation_file"):
        if (file_id := getattr(wanted, param)) is not None:
            found = files.find(server, file_id, param=param)
            if found["purpose"] != "fine-tune":
                raise ApiError(
                    400,
                    f"Invalid '{param}': '{file_id}' was uploaded with purpose '{found['purpose']}'; fine-tuning needs "
                    "'fine-tune'.",
                    param=param,
                    code="invalid_file_purpose",
                )
    models.find_trainable(server, wanted.model)
    if method["type"] == "reinforcement":
        refuse_unsafe(method["reinforcement"]["grader"], server.settings, param="method.reinforcement.grader")
    settings = method.get(method["type"]) or {}
    asked = settings.get("hyperparameters") or {}
    job: dict[str, Any] = {
        "id": new_id("ftjob-"),
        "created_at": now(),
        "key_id": caller.key.id,
        "surface": caller.surface,
        "model": wanted.model,
        "training_file": wanted.training_file,
        "validation_file": wanted.validation_file,
        "suffix": wanted.suffix,
        "seed": secrets.randbelow(2**31) if wanted.seed is None else wanted.seed,
        "method": method,
        "metadata": wanted.metadata or None,
        "integrations": None,
        "hyperparameters": {
            key: asked.get(key) or "auto" for key in ("n_epochs", "batch_size", "learning_rate_multiplier")
        },
        "status": "validating_files",
        "wanted": "run",
        "result_files": [],
    }
    with server.store.begin() as connection:
        connection.execute(insert(tables.jobs).values(**job))
        if wanted.metadata:
            pairs = [{"job_id": job["id"], "key": key, "value": value} for key, value in wanted.metadata.items()]
            connection.execute(insert(tables.job_metadata), pairs)
        say(connection, job["id"], "created", f"Created fine-tuning job: {job['id']}")
        say(connection, job["id"], "validating", f"Validating training file: {wanted.training_file}")
    return shape(retrieve(server, job["id"]))


@router.get("/fine_tuning/jobs", responses=documents.shows(documents.Jobs))
def list_jobs(request: Request, _caller: Training, after: After = None, limit: Limit20 = 20) -> dict[str, Any]:
    query = select(tables.jobs)
    pairs = tables.job_metadata
    asked = web.asked_metadata(request)
    if asked is None:
        query = query.where(~exists().where(pairs.c.job_id == tables.jobs.c.id))
    for key, value in (asked or {}).items():
        query = query.where(
            exists().where(pairs.c.job_id == tables.jobs.c.id, pairs.c.key == key, pairs.c.value == value)
        )
    with web.server(request).store.read() as connection:
        found = web.listed(connection, query, tables.jobs, shape, after=after, limit=limit, what="job")
    return {"object": "list", "data": found["data"], "has_more": found["has_more"]}


@router.get("/fine_tuning/jobs/{job_id}", responses=documents.shows(documents.Job))
def retrieve_job(request: Request, _caller: Training, job_id: str) -> dict[str, Any]:
    return shape(retrieve(web.server(request), job_id))


@router.post("/fine_tuning/jobs/{job_id}/cancel", responses=documents.shows(documents.Job))
def cancel_job(request: Request, _caller: Training, job_id: str) -> dict[str, Any]:
    """Cancelling takes effect at the next step; a job that no worker has begun is cancelled at once."""
    return _ask(web.server(request), job_id, "cancel", refused=FINAL)


@router.post("/fine_tuning/jobs/{job_id}/pause", responses=documents.shows(documents.Job))
def pause_job(request: Request, _caller: Training, job_id: str) -> dict[str, Any]:
    """A checkpoint is written at the next step; `resume` goes on from it."""
    return _ask(web.server(request), job_id, "pause", refused=(*FINAL, "paused"))


@router.post("/fine_tuning/jobs/{job_id}/resume", responses=documents.shows(documents.Job))
def resume_job(request: Request, _caller: Training, job_id: str) -> dict[str, Any]:
    return _ask(web.server(request), job_id, "run", refused=(*FINAL, "validating_files", "queued", "running"))


@router.delete("/fine_tuning/jobs/{job_id}", status_code=204)
def delete_job(request: Request, _caller: Training, job_id: str) -> None:
    """Forget a job that has ended (Azure); its model stays."""
    server = web.server(request)
    job = retrieve(server, job_id)
    if job["status"] not in FINAL:
        raise ApiError(400, f"Job '{job_id}' is {job['status']}; cancel it first.", param="id", code="job_not_finished")
    with server.store.begin() as connection:
        connection.execute(delete(tables.jobs).where(tables.jobs.c.id == job_id))


@router.get("/fine_tuning/jobs/{job_id}/events", responses=documents.shows(documents.Events))
def list_events(
    request: Request, _caller: Training, job_id: str, after: After = None, limit: Limit20 = 20
) -> dict[str, Any]:
    server = web.server(request)
    retrieve(server, job_id)
    query = select(tables.events).where(tables.events.c.job_id == job_id)
    with server.store.read() as connection:
        found = web.listed(connection, query, tables.events, event_shape, after=after, limit=limit, what="event")
    return {"object": "list", "data": found["data"], "has_more": found["has_more"]}


@router.get("/fine_tuning/jobs/{job_id}/checkpoints", responses=documents.shows(documents.Checkpoints))
def list_checkpoints(
    request: Request,
    _caller: Training,
    job_id: str,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
) -> dict[str, Any]:
    server = web.server(request)
    retrieve(server, job_id)
    query = select(tables.checkpoints).where(tables.checkpoints.c.job_id == job_id)
    with server.store.read() as connection:
        return web.listed(
            connection,
            query,
            tables.checkpoints,
            checkpoint_shape,
            after=after,
            limit=limit,
            what="checkpoint",
        )


def retrieve(server: Server, job_id: str) -> dict[str, Any]:
    """A job's row.

    Raises:
        ApiError: 404, there is none.
    """
    with server.store.read() as connection:
        job = store.row(connection, tables.jobs, id=job_id)
    if job is None:
        raise ApiError(
            404, f"Could not find fine tune: {job_id[:128]}", param="fine_tune_id", code="fine_tune_not_found"
        )
    return job


def say(
    connection: Connection,
    job_id: str,
    what: str,
    message: str,
    *,
    level: Literal["info", "warn", "error"] = "info",
    data: dict[str, Any] | None = None,
) -> None:
    """Add an event to a job, unless it has one of this `what` already: a worker that begins again says it once."""
    seen = exists().where(tables.events.c.job_id == job_id, tables.events.c.what == what)
    if connection.execute(select(seen)).scalar():
        return
    row = {
        "id": new_id("ftevent-"),
        "created_at": now(),
        "job_id": job_id,
        "what": what,
        "level": level,
        "message": message,
        "type": "message" if data is None else "metrics",
        "data": data,
    }
    savepoint = connection.begin_nested()
    try:
        connection.execute(insert(tables.events).values(**row))
        savepoint.commit()
    except IntegrityError:  # another worker said it this moment
        savepoint.rollback()


def shape(job: dict[str, Any]) -> dict[str, Any]:
    """A job as clients see it: every key is there, null where it has no value. Without an error, OpenAI sends one of
    nulls, into which its clients look, and Azure sends null, for which its clients ask."""
    no_error = None if job["surface"] == "azure" else {"code": None, "message": None, "param": None}
    return {
        "id": job["id"],
        "object": "fine_tuning.job",
        "created_at": job["created_at"],
        "error": job["error"] or no_error,
        "fine_tuned_model": job["fine_tuned_model"],
        "finished_at": job["finished_at"],
        "hyperparameters": job["hyperparameters"],
        "model": job["model"],
        "organization_id": ORGANIZATION,
        "result_files": job["result_files"],
        "status": job["status"],
        "trained_tokens": job["trained_tokens"],
        "training_file": job["training_file"],
        "validation_file": job["validation_file"],
        "seed": job["seed"],
        "integrations": job["integrations"] or [],
        "estimated_finish": job["estimated_finish"],
        "method": job["method"],
        "metadata": job["metadata"],
        "user_provided_suffix": job["suffix"],
    }


def event_shape(event: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": event["id"],
        "object": "fine_tuning.job.event",
        "created_at": event["created_at"],
        "level": event["level"],
        "message": event["message"],
        "type": event["type"],
        "data": event["data"] or {},
    }


def checkpoint_shape(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": checkpoint["id"],
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint["created_at"],
        "fine_tuned_model_checkpoint": checkpoint["model"],
        "fine_tuning_job_id": checkpoint["job_id"],
        "step_number": checkpoint["step"],
        "metrics": checkpoint["metrics"],
    }


def _method(wanted: JobIn) -> dict[str, Any]:
    """The method in its full form. Older clients send top-level `hyperparameters`, for supervised."""
    if wanted.method is None:
        asked = _without_null(wanted.hyperparameters)
        return {"type": "supervised", "supervised": {"hyperparameters": _all_auto(asked)}}
    method = wanted.method
    if wanted.hyperparameters is not None and _without_null(wanted.hyperparameters):
        raise ApiError(
            400,
            "'hyperparameters' and 'method' are both set; put the hyperparameters into the method.",
            param="hyperparameters",
            code="invalid_parameter_combination",
        )
    settings = method.settings()
    if method.type == "reinforcement" and settings is None:
        raise ApiError(
            400,
            "Missing required parameter: 'method.reinforcement.grader'.",
            param="method.reinforcement.grader",
            code="missing_required_parameter",
        )
    for other in ("supervised", "dpo", "reinforcement"):
        if other != method.type and getattr(method, other) is not None:
            raise ApiError(
                400,
                f"'method.{other}' is set, and 'method.type' is '{method.type}'.",
                param=f"method.{other}",
                code="invalid_value",
            )
    said: dict[str, Any] = {"hyperparameters": _all_auto(_without_null(settings.hyperparameters if settings else None))}
    if isinstance(settings, Reinforcement):
        said["grader"] = settings.grader
        if settings.response_format is not None:
            raise ApiError(
                400,
                "'method.reinforcement.response_format' cannot be honoured: answers are drawn as plain text.",
                param="method.reinforcement.response_format",
                code="unsupported_parameter",
            )
    return {"type": method.type, method.type: said}


def refuse_unsafe(grader: dict[str, Any], settings: Settings, *, param: str) -> None:
    """Whoever may train may not therefore run code here, or have this machine's environment sent somewhere.

    Raises:
        ApiError: 400, the grader would.
    """
    for one in (grader, *(grader.get("graders") or {}).values()):
        said = None
        if one.get("type") == "python" and not settings.python_graders:
            said = "a python grader runs code on this machine; `tunewright serve --python-graders` allows it"
        for key in ("base_url", "api_key_env"):
            if one.get(key) is not None:
                said = f"'{key}' is the operator's to choose, by OPENAI_BASE_URL and OPENAI_API_KEY of the worker"
        if said is not None:
            raise ApiError(
                400,
                f"Invalid '{param}': {said}.",
                param=param,
                code="unsupported_grader",
            )


def _without_null(given: Hyperparameters | None) -> dict[str, Any]:
    if given is None:
        return {}
    unknown = sorted(set(given.model_extra or {}) - {"prompt_loss_weight"})  # Azure's examples send this one
    if unknown:
        raise ApiError(
            400,
            f"Unknown hyperparameter: '{unknown[0]}'.",
            param=f"hyperparameters.{unknown[0]}",
            code="unknown_parameter",
        )
    return {key: value for key, value in given.model_dump(exclude_none=True).items() if key in type(given).model_fields}


def _all_auto(asked: dict[str, Any]) -> dict[str, Any]:
    return {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"} | asked


def _ask(server: Server, job_id: str, wanted: str, *, refused: tuple[str, ...]) -> dict[str, Any]:
    """Note what is wanted of a job. Where no worker has it, it happens at once."""
    job = retrieve(server, job_id)
    verb = "resume" if wanted == "run" else wanted
    taken_back = wanted == "run" and job["wanted"] == "pause"  # a pause that has not come about yet
    if job["status"] in refused and not taken_back:
        raise ApiError(
            400, f"Job '{job_id}' is {job['status']}; it cannot {verb}.", param="id", code=f"job_cannot_{verb}"
        )  # fmt: skip
    table = tables.jobs
    values: dict[str, Any] = {"wanted": wanted}
    checked = exists().where(tables.events.c.job_id == job_id, tables.events.c.what == "validated")
    states: dict[str, dict[str, Any]] = {
        "run": {"status": case((checked, "queued"), else_="validating_files")},
        "pause": {"status": "paused"},
        "cancel": {"status": "cancelled", "finished_at": now()},
    }
    with server.store.begin() as connection:
        same = (table.c.id == job_id, table.c.status.notin_(FINAL))
        unclaimed = connection.execute(
            update(table).where(*same, table.c.claimed_by.is_(None)).values(**values, **states[wanted])
        )
        if unclaimed.rowcount:
            message = {"run": "Job resumed", "pause": "Job paused", "cancel": "Job cancelled"}[wanted]
            say(connection, job_id, f"{wanted} {new_id('', size=6)}", message)
        else:
            connection.execute(update(table).where(*same).values(**values))
    return shape(retrieve(server, job_id))
