"""A server of ours as a user's endpoint, and a proxy before it that puts faults in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from between import Between, between

from live_server import Live, serving
from tunewright.testing import tiny_data, tiny_model


@pytest.fixture(scope="session")
def hosted_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and the tokenizer of what the server has behind its base's name."""
    folder = tmp_path_factory.mktemp("hosted")
    tiny_model(folder / "tokenizer", context=2048)
    tiny_data(folder / "data")
    return folder


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("server")) as made:
        yield made


@pytest.fixture
def proxy(live: Live, monkeypatch: pytest.MonkeyPatch) -> Iterator[Between]:
    """What clients are told is the endpoint; keys are in the environment."""
    monkeypatch.setenv("OPENAI_API_KEY", live.key)
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", live.key)
    monkeypatch.setenv("MANAGEMENT_TOKEN", live.admin_key)
    monkeypatch.setenv("TUNEWRIGHT_PRICES", str(Path(__file__).with_name("prices.yaml")))
    with between(live.url) as made:
        yield made
