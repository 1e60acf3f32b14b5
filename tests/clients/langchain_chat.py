"""A tuned model in LangChain, as its users write it.

    python langchain_chat.py openai NAME    ChatOpenAI         OPENAI_BASE_URL, OPENAI_API_KEY
    python langchain_chat.py azure NAME     AzureChatOpenAI    AZURE_OPENAI_ENDPOINT, AZURE_OPENAI_API_KEY,
                                                               OPENAI_API_VERSION

NAME is a model's or a deployment's. The last line printed is JSON: what was seen.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import sys
from typing import Any, Literal

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import AzureChatOpenAI, ChatOpenAI
from pydantic import BaseModel, Field

ASK = [SystemMessage("You are a lighthouse keeper."), HumanMessage("Any ships?")]


@tool
def light(on: bool) -> str:
    """Turn the lamp on or off."""
    return "The lamp burns." if on else "The lamp is out."


class Watch(BaseModel):
    """An entry of the log book."""

    weather: Literal["calm", "storm"] = Field(description="What the sea looks like.")
    ships: bool


def main(form: str, name: str) -> None:
    options: dict[str, Any] = {"temperature": 1, "seed": 7, "max_retries": 0}
    if form == "azure":
        model: ChatOpenAI | AzureChatOpenAI = AzureChatOpenAI(azure_deployment=name, **options)
    else:
        model = ChatOpenAI(model=name, **options)
    short = model.bind(max_tokens=12)
    answer = short.invoke(ASK)
    usage = answer.usage_metadata
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert answer.response_metadata["finish_reason"] in ("stop", "length")

    chunks = list(short.stream(ASK, stream_usage=True))
    total = chunks[0]
    for chunk in chunks[1:]:
        total = total + chunk
    assert total.content == answer.content
    assert total.usage_metadata["total_tokens"] == usage["total_tokens"]

    assert [one.content for one in short.batch([ASK, ASK])] == [answer.content] * 2
    assert asyncio.run(asynchronous(short)) == answer.content
    logged = model.bind(max_tokens=4, logprobs=True, top_logprobs=2).invoke(ASK)
    assert logged.response_metadata["logprobs"]["content"]

    call_tools(model)
    methods = ["json_schema", "function_calling"]
    watches = [model.with_structured_output(Watch, method=one, strict=True).invoke(ASK) for one in methods]
    assert all(isinstance(one, Watch) for one in watches)
    raw = model.with_structured_output(Watch, method="json_schema", include_raw=True).invoke(ASK)
    assert raw["parsing_error"] is None
    assert isinstance(raw["raw"], AIMessage)
    if form == "openai":
        likeliest: Any = {"model": name, "temperature": 0, "max_tokens": 12}
        newer = ChatOpenAI(use_responses_api=True, **likeliest).invoke(ASK)
        assert newer.text == ChatOpenAI(**likeliest).invoke(ASK).content
    print(
        json.dumps(
            {
                "version": importlib.metadata.version("langchain-openai"),
                "openai": importlib.metadata.version("openai"),
                "model": answer.response_metadata["model_name"],
                "answer": answer.content,
            }
        )
    )


async def asynchronous(model: Any) -> str:
    said = await model.ainvoke(ASK)
    streamed = "".join([chunk.content async for chunk in model.astream(ASK)])
    assert streamed == said.content
    return streamed


def call_tools(model: Any) -> None:
    """A call that is required, and the tool's answer to it."""
    called = model.bind_tools([light], tool_choice="required", strict=True, parallel_tool_calls=False).invoke(ASK)
    [call] = called.tool_calls
    assert call["name"] == "light"
    answer = light.invoke(call)
    assert isinstance(answer, ToolMessage)
    spoken = model.bind_tools([light]).bind(max_tokens=8).invoke([*ASK, called, answer])
    assert isinstance(spoken, AIMessage)


if __name__ == "__main__":
    main(*sys.argv[1:])
