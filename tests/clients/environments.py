"""Environments in which client libraries are installed as their users have them, one for each set of pins.

They are made when they are first asked for, and kept beside the interpreter's own packages (`TUNEWRIGHT_CLIENTS` names
another folder). A stamp that is written last holds what an environment was made from: one that is without it, or with
another, is made anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest

ROOT = Path(__file__).parents[2]
INSTALL_S = 1200


def _constrained(package: str) -> str:
    """The version of a package that the product is tested with."""
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert found is not None, f"constraints.txt does not pin {package}"
    return found[1]


PINS: dict[str, tuple[str, ...]] = {
    "openai-1": ("openai==1.109.1",),
    "openai-2": ("openai==2.54.0",),
    "openai-3": (f"openai=={_constrained('openai')}",),
    "langchain": ("langchain-openai==1.7.4",),
    "litellm": ("litellm==1.110.2", "numpy==2.4.6", "requests==2.34.2"),
    "npm": ("openai@7.57.0",),
}
"""What each environment has; `npm` is Node's."""


class Run(Protocol):
    """The fixture `run`."""

    def __call__(self, environment: str, script: str, *arguments: str, **variables: str) -> Any: ...


def command(name: str, script: Path) -> list[str]:
    """What runs a script in an environment, which is made where it is not there."""
    if script.suffix != ".mjs":
        return [str(python(name)), str(script)]
    program, folder = node()
    copied = folder / script.name  # Node looks for packages beside the script
    shutil.copyfile(script, copied)
    return [program, str(copied)]


def python(name: str) -> Path:
    """The interpreter of an environment; the test is skipped where it cannot be made, with pip's reason."""
    folder = _folder(name)
    interpreter = folder / "bin" / "python"
    with _making(folder, [sys.version, *PINS[name]]) as missing:
        if missing:
            _run([sys.executable, "-m", "venv", str(folder)])
            _run([str(interpreter), "-m", "pip", "install", "--disable-pip-version-check", *PINS[name]])
    return interpreter


def node() -> tuple[str, Path]:
    """Node's program, and a folder whose `node_modules` has the pinned packages."""
    programs = [shutil.which(name) for name in ("node", "npm")]
    if programs[0] is None or programs[1] is None:
        pytest.skip("node and npm are not installed")
    folder = _folder("npm")
    with _making(folder, list(PINS["npm"])) as missing:
        if missing:
            folder.mkdir(parents=True)
            (folder / "package.json").write_text('{"private": true}\n')
            _run([programs[1], "install", "--no-audit", "--no-fund", "--prefix", str(folder), *PINS["npm"]])
    return programs[0], folder


def encodings(name: str) -> Path:
    """The folder of tiktoken's files that LiteLLM brings; tiktoken itself would fetch them."""
    packages = (python(name).parents[1] / "lib").glob("python*/site-packages")
    return next(packages) / "litellm" / "litellm_core_utils" / "tokenizers"


def clean_environment() -> dict[str, str]:
    """The environment variables of a user who knows nothing of this checkout."""
    kept = ("PATH", "HOME", "LANG", "TMPDIR", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS")
    settings = ("PIP_", "SSL_CERT_", "npm_config_", "NPM_CONFIG_")
    return {name: value for name, value in os.environ.items() if name in kept or name.startswith(settings)}


def _folder(name: str) -> Path:
    return Path(os.environ.get("TUNEWRIGHT_CLIENTS", Path(sys.prefix) / "clients")) / name


@contextlib.contextmanager
def _making(folder: Path, parts: Sequence[str]) -> Iterator[bool]:
    """Whether the folder has to be made, by one process at a time. What is half made has no stamp."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    stamp, wanted = folder / ".made", json.dumps(parts)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = not stamp.is_file() or stamp.read_text() != wanted
        if missing:
            shutil.rmtree(folder, ignore_errors=True)
        yield missing
        if missing:
            written = folder / ".made.new"
            written.write_text(wanted)
            written.replace(stamp)


def _run(command: Sequence[str]) -> None:
    made = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), timeout=INSTALL_S)
    if made.returncode:
        said = (made.stderr.strip() or made.stdout.strip()).splitlines()
        pytest.skip(f"{' '.join(command[:4])} failed: {said[-1] if said else made.returncode}")
