"""Standalone Spark clusters on loopback; a test that asks for one is skipped where Java is absent."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "spark-cluster"


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
