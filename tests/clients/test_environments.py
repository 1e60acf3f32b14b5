"""The environments of clients: they know nothing of this checkout, and half an install is not taken for a whole one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import environments
import pytest


def test_a_client_cannot_import_tunewright() -> None:
    code = "from importlib.util import find_spec as find; print(bool(find('openai')), bool(find('tunewright')))"
    command = [str(environments.python("openai-1")), "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environments.clean_environment(), check=True)
    assert done.stdout.strip() == "True False"


def test_an_install_that_fails_is_skipped_with_its_reason_and_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEWRIGHT_CLIENTS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    for _ in range(2):
        with pytest.raises(pytest.skip.Exception, match="No matching distribution found for openai"):
            environments.python("openai-1")
        assert not list(tmp_path.glob("*/.made"))
