"""A standalone cluster with two workers on loopback for each process that runs tests; skipped where Java is absent."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "spark-cluster"


def cluster(folder: Path, *options: str) -> str:
    """Start a cluster; gives its address."""
    if shutil.which("java") is None:
        pytest.skip("no Java; install 17 or newer (Debian: openjdk-17-jre-headless)")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "start", "--folder", str(folder), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def stop(folder: Path) -> None:
    subprocess.run([sys.executable, str(SCRIPT), "stop", "--folder", str(folder)], check=True, capture_output=True)


@pytest.fixture(scope="session")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster of two workers, with one slot and 2 GB each."""
    folder = tmp_path_factory.mktemp("cluster")
    yield cluster(folder)
    stop(folder)
