"""What a name in a request leads to, and on which terms: a deployment's quota and content filter.

`chat` asks here and nowhere else. What is here now lets everything through.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunewright.server import models
from tunewright.server.models import Target
from tunewright.server.state import Server
from tunewright.server.web import Caller

FRESH_S = 1.0
"""How long a name that was looked up is taken as it was."""
REMEMBERED = 10_000


@dataclass
class Route:
    """Where a request goes, and what holds on the way."""

    target: Target
    deployment: str | None = None
    """The deployment's name; None where a model was named itself."""
    screens: bool = False
    """Whether anything is screened: where not, a stream is passed on as it comes."""

    def admit(self, prompt_characters: int, max_tokens: int | None, best_of: int) -> dict[str, str]:
        """Count a request that arrives; gives headers for its reply.

        Raises:
            ApiError: 429, the quota is used up.
        """
        return {}

    async def screen_prompt(self, texts: Sequence[str]) -> Any:
        """The prompt's annotations, None where there is no filter.

        Raises:
            ApiError: 400, it is not let through.
        """
        return None

    async def screen_output(self, text: str) -> tuple[Any, bool]:
        """An answer's annotations, and whether it is held back."""
        return None, False

    def used(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Say what an admitted request came to."""


class Admission:
    """The way in."""

    @staticmethod
    async def resolve(server: Server, caller: Caller, name: str, deployment: bool) -> Route:
        """What answers under a name; what was found lately is not looked up again.

        Args:
            deployment: whether the name is one of a deployment, and of nothing else.

        Raises:
            ApiError: 404, nothing does.
        """
        looked, target = server.routes.get(name, (0.0, None))
        if target is None or time.monotonic() - looked > FRESH_S:
            target = await asyncio.to_thread(models.find, server, name)
            if len(server.routes) >= REMEMBERED:
                server.routes.clear()
            server.routes[name] = (time.monotonic(), target)
        return Route(target)
