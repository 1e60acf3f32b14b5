"""What all tests share: a small model, the shared folder, an environment of their own, and no network but loopback.

What is not covered: child processes. They inherit the environment, which says that the hub is offline; those that are
to speak to a hub get `Hub.environment`.
"""

from __future__ import annotations

import atexit
import ipaddress
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tunewright.run import Run

OURS = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_", "MLFLOW_", "OPENAI_", "AZURE_", "DATABRICKS_")
LONG = ("spark", "hosted", "databricks", "clients")
"""Folders whose files take minutes."""
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


def _settle_environment() -> None:
    """Tests see the same whatever the developer has set. Libraries read this at import, so it comes first."""
    for name in list(os.environ):
        if name.startswith(OURS) or name.lower() in PROXIES:
            del os.environ[name]
    home = tempfile.mkdtemp(prefix="tunewright-tests-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    os.environ |= {
        "HF_HOME": home,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": "PASSIVE",  # as the local backend sets it: spinning threads starve each other
    }


_settle_environment()

settings.register_profile("tunewright", deadline=None)
settings.load_profile("tunewright")


def _is_here(address: Any) -> bool:
    """Whether a socket address stays on this machine."""
    if not isinstance(address, tuple):
        return True  # a Unix socket's path
    host = str(address[0])
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("", "localhost")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that of several processes none is left with one alone at the end."""
    items.sort(key=lambda item: LONG.index(item.path.parent.name) if item.path.parent.name in LONG else len(LONG))


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """A connection that would leave this machine is an error that names where it was going."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def guarded(self: socket.socket, address: Any) -> None:
        if not _is_here(address):
            raise AssertionError(f"a test tried to reach {address}; tests stay on loopback")
        connect(self, address)

    def guarded_ex(self: socket.socket, address: Any) -> int:
        if not _is_here(address):
            raise AssertionError(f"a test tried to reach {address}; tests stay on loopback")
        return connect_ex(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        patch.setattr(socket.socket, "connect_ex", guarded_ex)
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of a few thousand weights with its tokenizer. Not to be changed."""
    from tunewright.testing import tiny_model

    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def packaged_classifier(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that is packaged and logged to an MLflow of its own. Not to be changed."""
    import yaml

    from tunewright import life
    from tunewright import recipe as recipes
    from tunewright.testing import tiny_data, tiny_model

    home = tmp_path_factory.mktemp("packaged")
    given = {
        "name": "batch",
        "model": str(tiny_model(home / "model")),
        "task": "classification",
        "data": tiny_data(home / "data"),
        "train": {"method": "full", "max_steps": 4},
        "evaluate": {"bootstrap": 200, "baselines": []},
        "tracking": {"uri": f"sqlite:///{home / 'mlflow.db'}"},
        "backend": {"kind": "local", "threads": 1},
    }
    run = life.start(recipes.loads(yaml.safe_dump(given)), home / "runs")
    life.advance(run, until="package")
    return run


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data and models, which only developers have: `TUNEWRIGHT_SHARED`, or `../shared`."""
    from hub import shared_folder

    folder = shared_folder()
    if folder is None:
        pytest.skip("no shared folder beside the checkout, and TUNEWRIGHT_SHARED names none")
    return folder
