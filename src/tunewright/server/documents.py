"""What GET /openapi.json says beyond what FastAPI reads off the handlers: how answers and errors look, bodies that are
read by hand, and keys.

Answers are not checked against these while they are given, since that would cost time on every request; a test asks
every route and compares.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

REF = "#/components/schemas/{model}"
OPEN = ("/healthz", "/readyz", "/metrics")
"""Routes that need no key."""

_bodies: list[type[BaseModel]] = []


class Shown(BaseModel):
    """A part of an answer; what is not named may be there all the same."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class ErrorSaid(Shown):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Shown):
    """What every refusal looks like under /v1 and /openai."""

    error: ErrorSaid


class ArmErrorSaid(Shown):
    code: str
    message: str


class ArmError(Shown):
    """What every refusal of the control plane looks like."""

    error: ArmErrorSaid


class File(Shown):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: None
    expires_at: int = Field(default=0, description="Left out where the file does not expire.")


class Page(Shown):
    object: Literal["list"]
    has_more: bool


class Files(Page):
    data: list[File]
    first_id: str | None
    last_id: str | None


class GraderShown(Shown):
    grader: dict[str, Any]


class GraderMetadata(Shown):
    name: str
    type: str
    errors: dict[str, Any]
    execution_time: float
    scores: dict[str, float]


class GraderRun(Shown):
    reward: float
    sub_rewards: dict[str, float]
    metadata: GraderMetadata
    model_grader_token_usage_per_model: dict[str, Any]


class UsageResult(Shown):
    object: Literal["organization.usage.completions.result"]
    input_tokens: int
    output_tokens: int
    num_model_requests: int
    api_key_id: str | None
    model: str | None


class UsageBucket(Shown):
    object: Literal["bucket"]
    start_time: int
    end_time: int
    results: list[UsageResult]


class UsagePage(Shown):
    object: Literal["page"]
    data: list[UsageBucket]
    has_more: bool
    next_page: str | None


class Deleted(Shown):
    id: str
    object: str
    deleted: Literal[True]


class Upload(Shown):
    id: str
    object: Literal["upload"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    expires_at: int
    file: File | None


class UploadPart(Shown):
    id: str
    object: Literal["upload.part"]
    created_at: int
    upload_id: str


class JobError(Shown):
    code: str | None
    message: str | None
    param: str | None


class Job(Shown):
    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    error: JobError
    fine_tuned_model: str | None
    finished_at: int | None
    hyperparameters: dict[str, Any]
    model: str
    organization_id: str
    result_files: list[str]
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    seed: int
    integrations: list[dict[str, Any]]
    estimated_finish: int | None
    method: dict[str, Any]
    metadata: dict[str, str] | None
    user_provided_suffix: str | None


class Jobs(Page):
    data: list[Job]


class Event(Shown):
    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class Events(Page):
    data: list[Event]


class Checkpoint(Shown):
    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, Any]


class Checkpoints(Page):
    data: list[Checkpoint]
    first_id: str | None
    last_id: str | None


class Model(Shown):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(Shown):
    object: Literal["list"]
    data: list[Model]


class Batch(Shown):
    id: str
    object: Literal["batch"]
    endpoint: str
    errors: dict[str, Any] | None
    input_file_id: str
    completion_window: Literal["24h"]
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    request_counts: dict[str, int]
    metadata: dict[str, str] | None


class Batches(Page):
    data: list[Batch]
    first_id: str | None
    last_id: str | None


class ModerationResult(Shown):
    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]


class Moderation(Shown):
    id: str
    model: str
    results: list[ModerationResult]


class Classifier(Shown):
    object: Literal["classifier"]
    classifier: str
    categories: list[str]
    severities: list[str]


class Usage(Shown):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatMessage(Shown):
    role: Literal["assistant"]
    content: str | None
    tool_calls: list[dict[str, Any]] = []


class ChatChoice(Shown):
    index: int
    message: ChatMessage
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter"]
    logprobs: dict[str, Any] | None = None


class ChatCompletion(Shown):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(Shown):
    index: int
    text: str
    finish_reason: Literal["stop", "length", "content_filter"]
    logprobs: dict[str, Any] | None = None


class Completion(Shown):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class Response(Shown):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "failed", "in_progress"]
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None


class Resource(Shown):
    """An account, a deployment, a policy, a blocklist or an item of one."""

    id: str
    name: str
    type: str
    properties: dict[str, Any]
    etag: str = ""


class Resources(Shown):
    value: list[Resource]


class Values(Shown):
    value: list[dict[str, Any]]


class AccountKeys(Shown):
    key1: str
    key2: str


class Health(Shown):
    status: str


Responses = dict[int | str, dict[str, Any]]

ERRORS: Responses = {
    "4XX": {"model": Error, "description": "Refused: what was wrong, and which parameter."},
    "5XX": {"model": Error, "description": "Not the client's fault; 503 can be tried again."},
}
ARM_ERRORS: Responses = {
    "4XX": {"model": ArmError, "description": "Refused: what was wrong."},
    "5XX": {"model": Error, "description": "Not the client's fault; 503 can be tried again."},
}
REFUSED: Responses = {400: {"model": Error, "description": "What cannot be done, and why."}}
GONE: Responses = {200: {"description": "Deleted."}, 204: {"description": "There was none."}}


def shows(model: type[BaseModel], *statuses: int, streamed: bool = False) -> Responses:
    """A handler's `responses`: how its answer looks, whole or as events."""
    said: dict[str, Any] = {"model": model}
    if streamed:
        said["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    return dict.fromkeys(statuses or (200,), said)


def reads(model: type[BaseModel]) -> dict[str, Any]:
    """A handler's `openapi_extra`: the body that it reads by itself."""
    if model not in _bodies:
        _bodies.append(model)
    body = {"application/json": {"schema": {"$ref": REF.format(model=model.__name__)}}}
    return {"requestBody": {"required": True, "content": body}}


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, made once."""
    if app.openapi_schema is None:
        made = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
            separate_input_output_schemas=False,
        )
        parts = made["components"]
        _, bodies = models_json_schema([(one, "validation") for one in _bodies], ref_template=REF)
        parts["schemas"] |= bodies["$defs"]
        for unused in ("HTTPValidationError", "ValidationError"):
            parts["schemas"].pop(unused, None)
        parts["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "api-key": {"type": "apiKey", "in": "header", "name": "api-key"},
        }
        made["security"] = [{"bearer": []}, {"api-key": []}]
        for path, operations in made["paths"].items():
            for operation in operations.values():
                if path in OPEN:
                    operation["security"] = []
                for reply in operation["responses"].values():
                    _plain(reply)
        app.openapi_schema = made
    return app.openapi_schema


def _plain(reply: dict[str, Any]) -> None:
    """FastAPI puts what it reads off a handler's annotation, any object, beside the reference to the model."""
    schema = reply.get("content", {}).get("application/json", {}).get("schema", {})
    if "$ref" in schema:
        reply["content"]["application/json"]["schema"] = {"$ref": schema["$ref"]}
