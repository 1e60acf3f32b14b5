"""Moderations as OpenAI answers them, by the classifier that the content filter has."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import AfterValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from tunewright.endpoint.shapes import ApiError, Part
from tunewright.server import documents, web
from tunewright.server import filter as filters
from tunewright.server.store import new_id
from tunewright.server.web import Inference

router = APIRouter(tags=["moderations"], route_class=web.Route)

MODEL = "tunewright-moderation"
OPENAI = {
    "harassment": None,
    "harassment/threatening": None,
    "hate": "hate",
    "hate/threatening": None,
    "illicit": None,
    "illicit/violent": None,
    "self-harm": "self_harm",
    "self-harm/instructions": None,
    "self-harm/intent": None,
    "sexual": "sexual",
    "sexual/minors": None,
    "violence": "violence",
    "violence/graphic": None,
}
"""OpenAI's categories, all of which its SDK expects, and ours; what is not told apart here is never said."""
SCORES = {"safe": 0.0, "low": 0.3, "medium": 0.6, "high": 0.9}
FLAGGED = ("medium", "high")


def _texts(value: Any) -> list[str]:
    parts = value if isinstance(value, list) else [value]
    texts = []
    for place, part in enumerate(parts):
        if isinstance(part, dict):
            if part.get("type") != "text":
                raise PydanticCustomError("part", "part {place} is no text; only text is judged", {"place": place})
            part = part.get("text")
        if not isinstance(part, str):
            raise PydanticCustomError("part", "part {place} is no text; only text is judged", {"place": place})
        texts.append(part)
    if not texts:
        raise PydanticCustomError("part", "there is nothing in it")
    return texts


PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}
INPUT: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "items": {"anyOf": [{"type": "string"}, PART]}},
    ]
}


class ModerationIn(Part):
    input: Annotated[Any, AfterValidator(_texts), WithJsonSchema(INPUT)]
    model: str | None = None


@router.post("/moderations", responses=documents.shows(documents.Moderation))
async def moderate(request: Request, _caller: Inference, wanted: ModerationIn) -> dict[str, Any]:
    server = web.server(request)
    try:
        found = await server.classifier.classify(wanted.input)
    except filters.FilterDown as error:
        raise ApiError(
            503, f"The classifier does not answer: {error}.", kind="server_error", code="filter_down"
        ) from None
    return {"id": new_id("modr-"), "model": wanted.model or MODEL, "results": [_result(one) for one in found]}


@router.get("/moderations", responses=documents.shows(documents.Classifier))
async def describe(request: Request, _caller: Inference) -> dict[str, Any]:
    """Which classifier judges here."""
    return {
        "object": "classifier",
        "classifier": web.server(request).classifier.name,
        "categories": list(filters.CATEGORIES),
        "severities": list(filters.SEVERITIES),
    }


def _result(found: filters.Severities) -> dict[str, Any]:
    said = {name: found.get(ours, "safe") if ours else "safe" for name, ours in OPENAI.items()}
    return {
        "flagged": any(severity in FLAGGED for severity in said.values()),
        "categories": {name: severity in FLAGGED for name, severity in said.items()},
        "category_scores": {name: SCORES[severity] for name, severity in said.items()},
        "category_applied_input_types": {name: ["text"] for name in said},
    }
