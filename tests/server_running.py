"""A server that tests talk to."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    _clients: list[openai.OpenAI] = field(default_factory=list)

    def client(self, key: str | None = None, *, base: str = "/v1") -> openai.OpenAI:
        made = openai.OpenAI(base_url=f"{self.url}{base}", api_key=key or self.key, max_retries=0)
        self._clients.append(made)
        return made

    def azure(self, key: str | None = None) -> openai.AzureOpenAI:
        made = openai.AzureOpenAI(
            azure_endpoint=self.url, api_key=key or self.key, api_version="2024-10-21", max_retries=0
        )
        self._clients.append(made)
        return made

    def close(self) -> None:
        """Close what clients have open: a socket that is left to be collected is a warning, which is an error."""
        for client in self._clients:
            client.close()
