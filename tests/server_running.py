"""A server that tests talk to."""

from __future__ import annotations

from dataclasses import dataclass

import openai

from tunewright.server.state import Server


@dataclass
class Running:
    """A server that answers, and a key for each scope."""

    server: Server
    url: str
    key: str
    inference_key: str
    admin_key: str

    def client(self, key: str | None = None) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or self.key, max_retries=0)

    def azure(self, key: str | None = None) -> openai.AzureOpenAI:
        return openai.AzureOpenAI(
            azure_endpoint=self.url, api_key=key or self.key, api_version="2024-10-21", max_retries=0
        )
