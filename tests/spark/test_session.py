"""A session on a real cluster: our package reaches the executors, their versions are compared, slots are counted."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tunewright.errors import UserError
from tunewright.spark import session
from tunewright.spark.settings import settings


def test_the_executors_run_this_very_package(master: str, tmp_path: Path) -> None:
    def where(_: Any) -> Any:
        import tunewright

        yield tunewright.__file__

    with session.session(settings({"master": master}), "test", tmp_path) as spark:
        session.wait_for_slots(spark, 2, 60)
        found = set(spark.sparkContext.parallelize(range(2), 2).mapPartitions(where).collect())
        assert all(Path(one).is_relative_to(tmp_path) for one in found)
        assert [one["versions"] for one in session.compare(spark)] == [session.versions()]
        with pytest.raises(UserError, match="3 processes need as many slots at once, and the cluster has given 2"):
            session.wait_for_slots(spark, 3, 1)


@pytest.mark.slow
def test_another_version_on_the_executors_is_named_with_both(master: str, tmp_path: Path, monkeypatch: Any) -> None:
    with session.session(settings({"master": master}), "test", tmp_path) as spark:
        monkeypatch.setattr(session, "versions", lambda: {"torch": "9.9.9"})
        with pytest.raises(UserError, match=r"torch 2\S+ \(here 9\.9\.9\)"):
            session.compare(spark)


def test_executors_without_this_python_are_explained(master: str, tmp_path: Path) -> None:
    asked = settings({"master": master, "python": "/no/such/python"})
    with (
        pytest.raises(UserError, match=r"executors cannot run Tunewright: .*backend\.python"),
        session.session(asked, "test", tmp_path),
    ):
        pass


@pytest.mark.slow
def test_a_packed_environment_is_what_the_executors_run(master: str, tmp_path: Path) -> None:
    """As venv-pack leaves one; this one borrows its libraries from ours, so that it is small."""
    packed = tmp_path / "packed"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(packed)], check=True)
    (site,) = packed.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    with tarfile.open(tmp_path / "environment.tar.gz", "w:gz") as archive:
        archive.add(packed, arcname=".")
    asked = settings({"master": master, "archive": str(tmp_path / "environment.tar.gz")})
    with session.session(asked, "test", tmp_path / "shared") as spark:
        found = session.compare(spark)
    assert {one["versions"]["torch"] for one in found} == {session.versions()["torch"]}
    assert all("/environment/bin/python" in one["python"] for one in found)
