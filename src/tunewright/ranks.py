"""Signs of life of processes that train together, kept as files of the run, so that whoever looks on knows which one
hangs, which one failed first, and whether one of an earlier command is still alive.

    jobs/ranks/attempt.json         which attempt may train; a process of another one ends itself
    jobs/ranks/stop                 there: stop at the end of the step, with a checkpoint
    jobs/ranks/rank-0.json          where the process stands; `beat` grows every two seconds, whatever it computes
    jobs/ranks/rank-0-failure.json  what it failed on, with the traceback

Whether one hangs is told by the clock of the one that looks on, which notes when it saw something change. Which one
failed first is told by the processes' own clocks; between machines whose clocks differ it may be the second.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tunewright.errors import FAULT, RunError, StageError, explained
from tunewright.run import Run, read_json, write_json, write_text

BEAT_S = 2.0
SILENT_S = 60.0
"""A process without a beat for so long is stopped, dead, or cut off."""
PHASES = ("starting", "loading", "rows", "counting", "assembling", "forward", "backward", "waiting", "saving", "done")
"""Where a process may be, in the order of a step: of two at the same step, the earlier one is behind. While they are
counting, backward, waiting and saving they exchange numbers, so one that is there may wait for one that is not."""
SHUT_OUT = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "timed out", "Broken pipe")
"""What torch says in a process whose peer went away: never the first cause."""

_beat: _Beat | None = None


def folder(run: Run) -> Path:
    return run.path / "jobs" / "ranks"


# --- in a process that trains ---


def enter(phase: str, *, step: int | None = None) -> None:
    """Note where this process is; free where it trains alone."""
    if _beat is not None:
        _beat.enter(phase, step)


def asked_to_stop() -> bool:
    """Whether somebody wants training to stop at the end of the step."""
    return _beat is not None and _beat.stop_asked


@contextlib.contextmanager
def reporting(run: Run, attempt: str | None = None) -> Iterator[None]:
    """Beat for this process (RANK of WORLD_SIZE), and write down what it fails on. One by itself does neither."""
    global _beat
    world = int(os.environ.get("WORLD_SIZE", 1))
    if "RANK" not in os.environ:
        yield
        return
    rank = int(os.environ["RANK"])
    _beat = _Beat(run, attempt, rank, world)
    _beat.start()
    try:
        yield
        _beat.enter("done")
    except BaseException as error:
        _write_failure(run, rank, world, error)
        raise
    finally:
        _beat.end()
        _beat = None


class _Beat(threading.Thread):
    def __init__(self, run: Run, attempt: str | None, rank: int, world: int) -> None:
        super().__init__(name="signs of life", daemon=True)
        self.path = folder(run) / f"rank-{rank}.json"
        self.attempt_file, self.stop_file = folder(run) / "attempt.json", folder(run) / "stop"
        self.attempt = attempt
        self.stop_asked = False
        self.ended = threading.Event()
        self.facts: dict[str, Any] = {
            "rank": rank,
            "world": world,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "attempt": attempt,
            "phase": "starting",
            "step": 0,
            "entered": 0,
            "beat": 0,
        }

    def enter(self, phase: str, step: int | None = None) -> None:
        facts = self.facts
        facts["phase"], facts["entered"] = phase, facts["entered"] + 1
        if step is not None:
            facts["step"] = step

    def run(self) -> None:
        while not self.ended.is_set():
            self.show()
            self.ended.wait(BEAT_S)

    def show(self) -> None:
        if self.attempt is not None and self._other_attempt():
            print("another command trains this run now; this process ends", file=sys.stderr, flush=True)
            os._exit(FAULT)
        self.stop_asked = self.stop_asked or self.stop_file.exists()
        self.facts["beat"] += 1
        with contextlib.suppress(RunError):  # a disk that is away for a moment must not end training
            write_json(self.path, dict(self.facts), durable=False)

    def end(self) -> None:
        self.ended.set()
        self.join()
        self.show()

    def _other_attempt(self) -> bool:
        with contextlib.suppress(RunError):
            return bool(read_json(self.attempt_file)["attempt"] != self.attempt)
        return False


def _write_failure(run: Run, rank: int, world: int, error: BaseException) -> None:
    stopped = isinstance(error, InterruptedError | KeyboardInterrupt)
    known = explained(error)
    said = (str(error).splitlines() or [""])[0]
    if stopped:
        kind, message = "Interrupted", str(error) or "stopped"
    elif known is not None:
        kind, message = type(known).__name__, str(known)
    else:
        kind, message = StageError.__name__, f"train failed: {type(error).__name__}: {said}"
    if not stopped and world > 1:
        message = f"training process {rank} of {world}: {message}"
    trace = "".join(traceback.format_exception(error))
    failure = {"rank": rank, "kind": kind, "message": message, "traceback": trace, "at": time.time()}
    write_json(folder(run) / f"rank-{rank}-failure.json", failure)


# --- for whoever looks on ---


def begin(run: Run, attempt: str) -> None:
    """Forget what processes of before left, and say which attempt may train from now on."""
    shutil.rmtree(folder(run), ignore_errors=True)
    write_json(folder(run) / "attempt.json", {"attempt": attempt})


def shut_out(run: Run) -> None:
    """Tell the processes of every earlier attempt to end themselves."""
    write_json(folder(run) / "attempt.json", {"attempt": None})


def ask_to_stop(run: Run) -> None:
    """Ask the processes to stop at the end of their step, with a checkpoint."""
    if not (folder(run) / "stop").exists():
        write_text(folder(run) / "stop", "")


def failure(run: Run) -> dict[str, Any] | None:
    """What training failed on: the first failure that is no echo of another process's end; None where none failed."""
    found = []
    for path in folder(run).glob("rank-*-failure.json"):
        with contextlib.suppress(RunError):
            found.append(read_json(path))
    first = sorted(found, key=lambda one: (_is_echo(one), one["at"]))
    return first[0] if first else None


def _is_echo(one: dict[str, Any]) -> bool:
    return any(words in one["message"] for words in SHUT_OUT)


@dataclass
class Lookout:
    """Looks on at the processes of a run, again and again, and says which of them hangs."""

    run: Run
    patience_s: float
    began: float = field(default_factory=time.monotonic)
    beats: dict[int, tuple[int, float]] = field(default_factory=dict)
    """Rank -> its last beat, and when that was seen here."""
    places: dict[int, tuple[int, float]] = field(default_factory=dict)
    """Rank -> how many phases it has entered, and when the last was seen here."""

    def hangs(self) -> str | None:
        """The process that hangs, in words; None where all is well."""
        now = time.monotonic()
        ranks = self._look(now)
        for rank, facts in ranks.items():
            silent = now - self.beats[rank][1]
            if facts["phase"] != "done" and silent > min(SILENT_S, self.patience_s):
                return f"{_who(facts)} has given no sign of life for {silent:.0f} s ({_where(facts)})"
        if self.places and now - max(seen for _, seen in self.places.values()) > self.patience_s:
            least = min(map(_place, ranks.values()))
            behind = [facts for facts in ranks.values() if _place(facts) == least]
            others = ", and the others wait for it" if len(behind) < len(ranks) else ""
            who = " and ".join(map(_who, behind))
            return f"{who} moved on no more for {self.patience_s:g} s ({_where(behind[0])}){others}"
        if not ranks and now - self.began > self.patience_s:
            return f"no process has begun to train within {self.patience_s:g} s"
        return None

    def alive(self) -> str | None:
        """A process that has shown a sign of life since this began to look on, or is seen on this machine."""
        ranks = self._look(time.monotonic())
        for rank, facts in ranks.items():
            if facts["phase"] == "done":
                continue
            if facts["host"] == socket.gethostname():
                if _is_process(facts["pid"]):
                    return _who(facts)
            elif self.beats[rank][1] > self.began or time.monotonic() - self.began < 3 * BEAT_S:
                return _who(facts)
        return None

    def _look(self, now: float) -> dict[int, dict[str, Any]]:
        ranks = {}
        for path in sorted(folder(self.run).glob("rank-*.json")):
            if path.stem.endswith("-failure"):
                continue
            try:
                facts = read_json(path)
            except RunError:
                continue
            rank = facts["rank"]
            ranks[rank] = facts
            for seen, value in ((self.beats, facts["beat"]), (self.places, facts["entered"])):
                if rank not in seen or seen[rank][0] != value:
                    first = rank not in seen and now - self.began < 1
                    seen[rank] = (value, self.began if first else now)
        return ranks


def _place(facts: dict[str, Any]) -> tuple[int, int]:
    return facts["step"], PHASES.index(facts["phase"]) if facts["phase"] in PHASES else 0


def _who(facts: dict[str, Any]) -> str:
    return f"training process {facts['rank']} of {facts['world']} ({facts['host']}, process {facts['pid']})"


def _where(facts: dict[str, Any]) -> str:
    return f"in step {facts['step']}, {facts['phase']}" if facts["step"] else f"{facts['phase']}"


def _is_process(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
