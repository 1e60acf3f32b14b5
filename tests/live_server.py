"""A server's process as its operator starts it."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tunewright.testing import tiny_model

MODEL = "gpt-4.1-mini-2025-04-14"
"""What clients call the base."""
SETS = (
    "train.use_cpu=true",
    "train.max_length=512",
    "tracking.enabled=false",
    "evaluate.max_new_tokens=8",
    "evaluate.bootstrap=200",
)


@dataclass(frozen=True)
class Live:
    """A server that answers, and a key for each scope."""

    url: str
    key: str
    inference_key: str
    admin_key: str

    def client(self) -> dict[str, str]:
        """For an `OpenAI` of the tests' own."""
        return {"base_url": f"{self.url}/v1", "api_key": self.key}

    def openai(self) -> dict[str, str]:
        """What users of OpenAI set."""
        return {"OPENAI_BASE_URL": f"{self.url}/v1", "OPENAI_API_KEY": self.key}

    def azure(self, version: str = "2025-04-01-preview") -> dict[str, str]:
        """What users of Azure OpenAI set, and the control plane's address and token for deployments."""
        return {
            "AZURE_OPENAI_ENDPOINT": self.url,
            "AZURE_OPENAI_API_KEY": self.key,
            "OPENAI_API_VERSION": version,
            "AZURE_MANAGEMENT_ENDPOINT": self.url,
            "AZURE_MANAGEMENT_TOKEN": self.admin_key,
        }


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Live]:
    """`tunewright serve` with the worker that it starts, a base under a client's name, and keys.

    It has to end when it is asked to, with nothing in its log that it did not expect.
    """
    data = ["--data", str(folder / "data")]
    model = tiny_model(folder / "model", context=2048)
    _tunewright("models", "add", MODEL, str(model), *(part for one in SETS for part in ("--set", one)), *data)
    scopes = ("training", "inference", "admin")
    keys = [_tunewright("keys", "create", scope, "--scope", scope, *data).strip() for scope in scopes]
    command = [sys.executable, "-u", "-m", "tunewright.cli", "serve", "--port", "0", *data]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder)
    assert server.stdout is not None
    log: list[str] = []
    with server.stdout as lines:
        url = next((found[1] for line in lines if (found := _ready(line, log))), None)
        reading = threading.Thread(target=lambda: log.extend(lines))
        reading.start()
        try:
            assert url is not None, "".join(log)
            yield Live(url, *keys)
        finally:
            server.terminate()
            ended = server.wait(150)
            reading.join()
    assert ended == 0, "".join(log)
    assert "Traceback" not in "".join(log), "".join(log)


def _ready(line: str, log: list[str]) -> re.Match[str] | None:
    log.append(line)
    return re.search(r"serving at (http://\S+)/v1", line)


def _tunewright(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "tunewright.cli", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
