"""Graders tried out before a reinforcement job pays for them: is one well-formed, and what does it give an answer?"""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field, TypeAdapter

from tunewright import recipe as recipes
from tunewright.endpoint.shapes import Part
from tunewright.errors import GraderError
from tunewright.graders import Answer, opened
from tunewright.server import documents, jobs, web
from tunewright.server.jobs import GraderIn
from tunewright.server.web import Training

SAMPLE = 100_000
"""Characters of an answer at most; some measures take the square of its length."""
ERRORS = (
    "formula_parse_error",
    "invalid_variable_error",
    "model_grader_parse_error",
    "model_grader_refusal_error",
    "model_grader_server_error",
    "other_error",
    "python_grader_runtime_error",
    "python_grader_server_error",
    "sample_parse_error",
    "truncated_observation_error",
    "unresponsive_reward_error",
)
"""OpenAI's names of what may go wrong."""
ERROR_OF = {
    "python": ("python_grader_runtime_error", "python_grader_runtime_error_details"),
    "score_model": ("model_grader_server_error", "model_grader_server_error_details"),
    "label_model": ("model_grader_server_error", "model_grader_server_error_details"),
}
"""What a kind of grader that fails is said to have, and where its words go."""

router = APIRouter(tags=["graders"], route_class=web.Route, prefix="/fine_tuning/alpha/graders")


class ValidateIn(Part):
    grader: GraderIn


class RunIn(ValidateIn):
    model_sample: Annotated[str, Field(max_length=SAMPLE)]
    item: dict[str, Any] | None = None


@router.post("/validate", responses=documents.shows(documents.GraderShown))
def validate_grader(request: Request, _caller: Training, wanted: ValidateIn) -> dict[str, Any]:
    """Whether a job would take the grader; says what is wrong with it where not."""
    jobs.refuse_unsafe(wanted.grader, web.server(request).settings, param="grader")
    return {"grader": wanted.grader}


@router.post("/run", responses=documents.shows(documents.GraderRun))
def run_grader(request: Request, _caller: Training, wanted: RunIn) -> dict[str, Any]:
    """What the grader gives one answer. One that fails gives 0, and `metadata.errors` says why, as on OpenAI's."""
    jobs.refuse_unsafe(wanted.grader, web.server(request).settings, param="grader")
    began = time.perf_counter()
    errors: dict[str, Any] = dict.fromkeys(ERRORS, False)
    reward, parts = 0.0, {}
    try:
        with opened(TypeAdapter(recipes.Grader).validate_python(wanted.grader)) as grading:
            (grade,) = grading.score([Answer(wanted.model_sample, wanted.item or {}, "item")])
            reward, parts = grade.score, grade.parts
    except GraderError as error:
        kind, details = ERROR_OF.get(wanted.grader["type"], ("other_error", "other_error_details"))
        errors |= {kind: True, details: str(error)}
    name = wanted.grader.get("name") or wanted.grader["type"]
    return {
        "reward": reward,
        "sub_rewards": parts,
        "metadata": {
            "name": name,
            "type": wanted.grader["type"],
            "errors": errors,
            "execution_time": time.perf_counter() - began,
            "scores": parts or {name: reward},
            "token_usage": None,
            "sampled_model_name": wanted.grader.get("model"),
        },
        "model_grader_token_usage_per_model": {},
    }
