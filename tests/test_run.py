"""A run folder survives kills, full disks and two processes at once, and says what it cannot read."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright import recipe as recipes
from tunewright.errors import DiskFullError, RunError
from tunewright.run import (
    MANIFESTS,
    STAGES,
    Run,
    append_json,
    create,
    list_runs,
    read_json,
    read_json_lines,
    write_json,
    write_json_lines,
    write_text,
)

RECIPE = recipes.loads("name: one\nmodel: starter\ntask: classification\ndata: {train: a.csv}\n")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return create(tmp_path / "runs", RECIPE)


# Making and opening


def test_a_new_run_has_every_stage_to_do_and_the_recipe_it_was_made_for(tmp_path: Path) -> None:
    run = create(tmp_path / "a" / "runs", RECIPE, sources="abc")
    assert Run.open(run.path) == run
    assert [run.status(stage) for stage in STAGES] == ["todo"] * len(STAGES)
    assert run.recipe() == RECIPE
    assert run.state()["recipe"] == RECIPE.fingerprint()
    assert run.state()["sources"] == "abc"
    assert [event["event"] for event in run.events()] == ["created"]
    assert run.id.startswith("one-2")


def test_a_run_can_be_opened_by_a_relative_path(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.path.parent)
    assert Run.open(run.id).path == run.path


def test_runs_of_one_recipe_have_folders_of_their_own(tmp_path: Path) -> None:
    made = [create(tmp_path, RECIPE) for _ in range(20)]
    assert len({run.path for run in made}) == 20


def test_a_folder_without_state_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        Run.open(tmp_path)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ('{"format": 2}', r"written by a newer Tunewright \(run format 2; this one reads up to 1\)"),
        ("{}", "no `format`"),
        ("[]", "no `format`"),
        ('{"format": "1"}', "no `format`"),
        ('{"format": 1', r"state.json: damaged \("),
        ("", r"state.json: damaged \("),
    ],
)
def test_a_run_that_cannot_be_read_is_refused(run: Run, state: str, said: str) -> None:
    run.state_file.write_text(state)
    with pytest.raises(RunError, match=said):
        Run.open(run.path)


def test_runs_are_listed_oldest_first_without_those_that_cannot_be_opened(tmp_path: Path) -> None:
    made = [create(tmp_path, RECIPE) for _ in range(4)]
    for number, run in enumerate(made):
        write_json(run.state_file, run.state() | {"created": f"2026-01-0{9 - number}T00:00:00.000Z"})
    write_json(made[0].state_file, made[0].state() | {"format": 99})
    made[1].state_file.write_text("{")
    (tmp_path / "notes").mkdir()
    assert list_runs(tmp_path) == [made[3], made[2]]
    assert list_runs(tmp_path / "absent") == []


def test_a_place_where_no_folder_can_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RunError, match="cannot make a run folder: File exists"):
        create(tmp_path / "runs", RECIPE)
    with pytest.raises(RunError, match="cannot make a run folder: Not a directory"):
        create(tmp_path / "runs" / "below", RECIPE)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "train").write_text("a file where a folder should be")
    run = Run(tmp_path)
    for write in (lambda: write_text(run.metrics_file, "x"), lambda: append_json(run.metrics_file, {})):
        with pytest.raises(RunError, match=r"metrics.jsonl: cannot write: "):
            write()
    with (
        pytest.raises(RunError, match=r"\.lock: cannot lock the run: No such file"),
        Run(tmp_path / "absent").lock(),
    ):
        pass


# State


def test_a_stage_is_done_when_its_manifest_is_there_and_only_then(run: Run) -> None:
    for stage in STAGES:
        run.set_status(stage, "done")
        assert run.status(stage) == "todo"
        with pytest.raises(RunError, match=f"stage {stage} is not done"):
            run.manifest(stage)
        run.set_status(stage, "failed", error="why")
        assert run.status(stage) == "failed"
        write_json(run.manifest_file(stage), {"stage": stage})
        assert run.status(stage) == "done"
        assert run.manifest(stage) == {"stage": stage}
    assert run.events()[-1] | {"at": ""} == {"at": "", "stage": "test", "event": "failed", "error": "why"}


@pytest.mark.parametrize("stage", STAGES)
def test_undoing_a_stage_undoes_those_behind_it_and_no_other(run: Run, stage: str) -> None:
    for each in STAGES:
        write_json(run.manifest_file(each), {"stage": each})
    (run.checkpoints / "checkpoint-5").mkdir(parents=True)
    run.reset(stage)
    place = STAGES.index(stage)
    assert [run.status(each) == "done" for each in STAGES] == [number < place for number in range(len(STAGES))]
    assert run.checkpoints.exists() == (place > STAGES.index("train"))
    assert read_json(run.last_test_file) == {"stage": "test"}
    run.reset(stage)


def test_a_destroyed_run_that_goes_on_is_destroyed_no_longer(run: Run) -> None:
    run.mark_destroyed()
    assert run.destroyed
    run.set_status("deploy", "doing")
    assert not run.destroyed


def test_every_file_of_a_run_lies_in_its_folder(run: Run) -> None:
    for stage in STAGES:
        for path in (run.manifest_file(stage), run.log_file(stage), run.job_file(stage), run.lock_file(stage)):
            assert path.is_relative_to(run.path)
    assert len(set(MANIFESTS.values())) == len(STAGES) == len(MANIFESTS)


def test_progress_is_what_was_said_last(run: Run) -> None:
    assert run.progress("train") is None
    run.set_progress("train", 1, 10)
    run.set_progress("train", 2, 10, "loss 1.0")
    assert run.progress("train") == {"done": 2, "total": 10, "note": "loss 1.0"}


# Replacing files


@contextlib.contextmanager
def failing_write(error: BaseException, after: int) -> Iterator[None]:
    """Files take `after` bytes, then fail."""
    made = os.fdopen

    def opened(*args: Any, **options: Any) -> Any:
        file = made(*args, **options)

        def write(lines: Any) -> None:
            file.write(b"".join(lines)[:after])
            file.flush()
            raise error

        class Failing:
            writelines = staticmethod(write)
            __enter__ = lambda self: self  # noqa: E731
            __exit__ = lambda self, *_: file.close()  # noqa: E731

        return Failing()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fdopen", opened)
        yield


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error"), SystemExit()])
def test_a_write_that_is_cut_short_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"old": True})
    with failing_write(error, 5), pytest.raises((KeyboardInterrupt, SystemExit, RunError)):
        write_json(path, {"new": True})
    assert read_json(path) == {"old": True}
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file(tmp_path: Path) -> None:
    """A real process that is killed with SIGKILL between the write and the rename."""
    path = tmp_path / "state.json"
    write_json(path, {"old": True})
    script = f"""
import os, signal
from pathlib import Path
from tunewright import run
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
run.write_json(Path({str(path)!r}), {{"new": True}})
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    assert read_json(path) == {"old": True}


def test_a_file_has_the_mode_that_was_asked_for(tmp_path: Path) -> None:
    write_text(tmp_path / "key", "secret", mode=0o600)
    write_text(tmp_path / "page", "text")
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "page").stat().st_mode) == 0o644


def test_numbers_that_json_has_not_are_null(tmp_path: Path) -> None:
    path = tmp_path / "a" / "report.json"
    value = {
        "nan": float("nan"),
        "inf": [float("inf"), -np.inf],
        "numpy": np.float32("nan"),
        "array": np.array([1.0, np.nan]),
        "whole": np.int64(3),
        "flag": np.bool_(True),
        "path": Path("a/b"),
        "pair": (1, 2.5),
        5: "number as a key",
    }
    write_json(path, value)
    assert json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name)) == {
        "nan": None,
        "inf": [None, None],
        "numpy": None,
        "array": [1.0, None],
        "whole": 3,
        "flag": True,
        "path": "a/b",
        "pair": [1, 2.5],
        "5": "number as a key",
    }


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(), below, max_size=3),
    max_leaves=8,
)


@given(value=JSON)
def test_what_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    write_json(path, value, durable=False)
    assert read_json(path) == value


def test_half_a_character_can_be_written_and_read(tmp_path: Path) -> None:
    """As in the name of a file that is not UTF-8."""
    write_json(tmp_path / "a.json", {"path": "caf\udce9"})
    append_json(tmp_path / "b.jsonl", {"path": "caf\udce9"})
    write_text(tmp_path / "c.md", "caf\udce9")
    assert read_json(tmp_path / "a.json") == read_json_lines(tmp_path / "b.jsonl")[0] == {"path": "caf\udce9"}
    assert (tmp_path / "c.md").read_text() == "caf\\udce9"


def test_a_damaged_or_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_bytes(b'{"a": \xff}')
    with pytest.raises(RunError, match=r"broken.json: damaged"):
        read_json(tmp_path / "broken.json")
    with pytest.raises(RunError, match=r"absent.json: no such file; the run folder is incomplete"):
        read_json(tmp_path / "absent.json")


# Files that grow


def test_lines_come_back_in_their_order(run: Run) -> None:
    for step in range(3):
        append_json(run.metrics_file, {"step": step, "loss": float("nan") if step else 1.5, "text": "a\nb\u2028c"})
    assert [entry["step"] for entry in run.metrics()] == [0, 1, 2]
    assert [entry["loss"] for entry in run.metrics()] == [1.5, None, None]
    assert read_json_lines(run.path / "absent.jsonl") == []


@given(st.lists(JSON.map(lambda value: {"value": value}), max_size=4), st.data())
def test_a_last_line_cut_anywhere_is_left_out_and_mended_by_the_next(
    tmp_path_factory: pytest.TempPathFactory, lines: list[dict[str, Any]], data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "grows.jsonl"
    write_json_lines(path, lines)
    whole = path.read_bytes()
    torn = json.dumps({"at": "now", "text": "h\u00e4lf \N{PARTY POPPER}"}, ensure_ascii=False).encode()
    path.write_bytes(whole + torn[: data.draw(st.integers(0, len(torn)))])
    assert read_json_lines(path) == lines
    append_json(path, {"next": True})
    assert read_json_lines(path) == [*lines, {"next": True}]
    assert path.read_bytes() == whole + b'{"next": true}\n'


def test_a_file_of_one_torn_line_is_mended(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a')
    assert read_json_lines(tmp_path / "a.jsonl") == []
    append_json(tmp_path / "a.jsonl", {"b": 1})
    assert read_json_lines(tmp_path / "a.jsonl") == [{"b": 1}]


@pytest.mark.parametrize("damage", [b'{"a": 1', b"\xff\xfe", b"5", b"[]", b"null", b'{"a": 1}{"a": 2}'])
def test_a_damaged_line_in_the_middle_is_named(run: Run, damage: bytes) -> None:
    whole = run.events_file.read_bytes()
    run.events_file.write_bytes(whole + damage + b"\n" + whole)
    with pytest.raises(RunError, match=r"events.jsonl:2: damaged line"):
        run.events()


def test_empty_lines_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    assert len(read_json_lines(tmp_path / "a.jsonl")) == 2


def test_processes_that_append_at_once_lose_no_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    script = f"""
from pathlib import Path
from tunewright.run import append_json
for number in range(200):
    append_json(Path({str(path)!r}), {{"number": number, "text": "x" * 9000}})
"""
    processes = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert sorted(line["number"] for line in read_json_lines(path)) == sorted([*range(200), *range(200)])


# The ledger


def test_the_ledger_folds_to_one_entry_for_each_thing(run: Run) -> None:
    assert run.resources() == []
    endpoint = run.intend("endpoint", "imdb", port=8000)
    model = run.intend("model", "imdb")
    run.made(endpoint, pid=17)
    forgotten = run.intend("cluster", "c")
    run.gone(endpoint)
    assert [(one["kind"], one["name"], one["is"], one["entry"]) for one in run.resources()] == [
        ("endpoint", "imdb", "gone", endpoint),
        ("model", "imdb", "intended", model),
        ("cluster", "c", "intended", forgotten),
    ]
    assert run.resources()[0]["pid"] == 17
    assert run.resources()[0]["port"] == 8000
    assert all(one["run"] == run.id for one in run.resources())
    assert len(run.ledger_file.read_text().splitlines()) == 5


def test_the_ledger_is_on_the_disk_before_anything_is_made(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    run.intend("endpoint", "imdb")
    assert synced == [run.ledger_file.stat().st_size]


# One at a time


HOLD = """
import sys
from tunewright.run import Run
with Run.open(sys.argv[1]).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held_elsewhere(run: Run) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_two_processes_cannot_work_on_one_run(run: Run) -> None:
    with held_elsewhere(run) as other:
        with pytest.raises(RunError, match=f"process {other.pid} is working on this run"), run.lock():
            pytest.fail("the lock was given twice")
        other.kill()
        other.wait()
        with run.lock():  # the system let go of it
            pass
    with run.lock():
        pass


def test_a_process_does_not_get_its_own_lock_twice(run: Run) -> None:
    with run.lock():
        with pytest.raises(RunError, match=f"process {os.getpid()} is working"), run.lock():
            pass
        with pytest.raises(RunError, match=f"process {os.getpid()} is working"), run.lock():
            pass


def test_a_lock_that_nobody_signed_names_no_process(run: Run) -> None:
    with run.lock():
        (run.path / ".lock").write_text("")
        with pytest.raises(RunError, match="another process is working on this run"), run.lock():
            pass


def test_the_lock_is_given_back_when_the_work_fails(run: Run) -> None:
    with pytest.raises(OSError, match="mine"), run.lock():
        raise OSError("mine")
    with run.lock():
        pass


def test_a_child_does_not_keep_its_parent_s_lock(run: Run) -> None:
    with run.lock():
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with run.lock():
            pass
    finally:
        child.communicate(b"\n")


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 kB, where we may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("may not mount a small disk here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_named_and_leaves_what_was_there(small_disk: Path) -> None:
    run = create(small_disk / "runs", RECIPE)
    state = run.state()

    def fill() -> None:
        for _ in range(1000):
            run.event("train", "x" * 1000)

    with pytest.raises(DiskFullError, match=r"no space left on the disk; free some and run the same command again"):
        fill()
    with pytest.raises(DiskFullError):
        write_json(run.state_file, {"large": "x" * 100_000})
    assert run.state() == state
    assert all(event["stage"] in ("run", "train") for event in run.events())
    assert [path.name for path in run.path.iterdir() if path.name.startswith(".state")] == []


def full(*_: Any, **__: Any) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_named_whatever_is_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "write", full)
    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(os, "pwrite", full)
    for write in (
        lambda: append_json(run.events_file, {}),
        lambda: write_json(run.state_file, {}),
        lambda: write_json_lines(run.data_file("train"), [{}]),
        lambda: run.lock().__enter__(),
    ):
        with pytest.raises(DiskFullError, match=f"{run.path}.*: no space left"):
            write()
    monkeypatch.undo()
    assert run.status("check") == "todo"
    with run.lock():
        pass


def test_a_line_that_the_disk_took_half_of_is_an_error_and_is_mended(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def half(handle: int, text: Any) -> int:
        if len(text) < 20:
            return full()
        return write(handle, text[: len(text) // 2])

    before = run.events()
    monkeypatch.setattr(os, "write", half)
    with pytest.raises(DiskFullError):
        run.event("train", "x" * 100)
    monkeypatch.undo()
    assert run.events() == before
    run.event("train", "y")
    assert [event["event"] for event in run.events()] == ["created", "y"]


def test_a_mount_that_takes_no_additions_and_no_locks_still_keeps_every_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a volume of an object store is mounted: open for adding and flock are not supported."""
    import errno
    import fcntl

    path = tmp_path / "lines.jsonl"
    append_json(path, {"n": 1})
    plain = Path.open

    def no_additions(self: Path, mode: str = "r", *given: Any, **options: Any) -> Any:
        if "a" in mode:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported", str(self))
        return plain(self, mode, *given, **options)

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(Path, "open", no_additions)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    for number in (2, 3):
        append_json(path, {"n": number})
    with path.open("rb+") as file:
        file.seek(0, 2)
        file.write(b'{"n": "half')
    append_json(path, {"n": 4}, durable=True)
    assert read_json_lines(path) == [{"n": number} for number in (1, 2, 3, 4)]
