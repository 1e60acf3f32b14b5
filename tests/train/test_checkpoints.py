"""A checkpoint counts when it is whole, and one that counts is not lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunewright.train import checkpoints


def make(folder: Path, step: int, *, whole: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights" * 10)
    (checkpoint / "optimizer.pt").write_bytes(b"state" * 10)
    if whole:
        checkpoints.seal(checkpoint, seconds=1.5)
    return checkpoint


def test_a_sealed_checkpoint_is_whole_and_knows_its_facts(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 7)
    assert checkpoints.is_whole(checkpoint)
    assert checkpoints.facts(checkpoint)["seconds"] == 1.5
    assert checkpoints.facts(checkpoint)["step"] == 7


@pytest.mark.parametrize("tear", ["no seal", "shorter file", "lost file", "damaged seal"])
def test_a_torn_checkpoint_is_seen_and_swept(tmp_path: Path, tear: str) -> None:
    kept = make(tmp_path, 2)
    torn = make(tmp_path, 4, whole=tear != "no seal")
    if tear == "shorter file":
        (torn / "model.safetensors").write_bytes(b"weig")
    elif tear == "lost file":
        (torn / "optimizer.pt").unlink()
    elif tear == "damaged seal":
        (torn / checkpoints.SEAL).write_text("{")
    assert checkpoints.latest(tmp_path) == kept
    assert checkpoints.sweep(tmp_path) == [torn]
    assert not torn.exists()
    assert checkpoints.sweep(tmp_path) == []


def test_the_latest_is_the_one_of_the_highest_step(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        make(tmp_path, step)
    latest = checkpoints.latest(tmp_path)
    assert latest is not None
    assert latest.name == "checkpoint-100"
    assert checkpoints.latest(tmp_path / "nowhere") is None


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-last").mkdir()
    (tmp_path / "notes").mkdir()
    assert checkpoints.sweep(tmp_path) == []
    assert (tmp_path / "checkpoint-last").is_dir()


def test_rotation_removes_the_oldest_and_never_the_best(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        make(tmp_path, step)
    checkpoints.rotate(tmp_path, 2, best=str(tmp_path / "checkpoint-2"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-6", "checkpoint-8"]
    checkpoints.rotate(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-8"]
    checkpoints.rotate(tmp_path, None)
    assert checkpoints.latest(tmp_path) is not None
