"""A server with chat routes without engines: the model says what it was told. All that is before an engine is real."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response

from tunewright.server import web
from tunewright.server.admission import Admission
from tunewright.server.app import PREFIXES, create_app
from tunewright.server.state import Server
from tunewright.server.web import Caller, Inference

router = APIRouter()


def echoing(server: Server) -> FastAPI:
    app = create_app(server)
    for prefix in PREFIXES:
        app.include_router(router, prefix=prefix)
    return app


@router.post("/deployments/{deployment}/chat/completions")
async def chat_with_deployment(request: Request, caller: Inference, deployment: str) -> Response:
    return await _chat(request, caller, deployment, True)


@router.post("/chat/completions")
async def chat(request: Request, caller: Inference) -> Response:
    return await _chat(request, caller, None, False)


async def _chat(request: Request, caller: Caller, deployment: str | None, in_path: bool) -> Response:
    said = await request.json()
    route = await Admission.resolve(web.server(request), caller, deployment or said["model"], in_path)
    texts = [message["content"] for message in said["messages"]]
    headers = route.admit(sum(map(len, texts)), said.get("max_tokens"), said.get("n") or 1)
    users = [message["content"] for message in said["messages"] if message["role"] in ("user", "tool")]
    prompt = await route.screen_prompt(texts, from_users=users)
    answer = texts[-1]
    annotations, blocked = await route.screen_output(answer)
    route.used(len(texts), 1)
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": None if blocked else answer, "refusal": None},
        "finish_reason": "content_filter" if blocked else "stop",
        "logprobs": None,
    }
    body = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": route.target.name}
    if annotations is not None:
        choice["content_filter_results"] = annotations
        body["prompt_filter_results"] = prompt
    usage = {"prompt_tokens": len(texts), "completion_tokens": 1, "total_tokens": len(texts) + 1}
    return JSONResponse({**body, "choices": [choice], "usage": usage}, headers=headers)
