"""A process of our own that works for a command which waits for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

LOOK_S = 0.1


def work(arguments: Sequence[str], log: Path, look: Callable[[], None]) -> int:
    """Start `python -m tunewright.work ARGUMENTS`, call `look` again and again until it is done, and give its exit
    code; what it says goes into a log. Whatever ends the waiting, such as Ctrl-C, ends it too."""
    with log.open("wb") as said:
        child = subprocess.Popen(
            [sys.executable, "-m", "tunewright.work", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={"OMP_WAIT_POLICY": "PASSIVE"} | dict(os.environ),
            start_new_session=True,
        )
    try:
        while child.poll() is None:
            look()
            time.sleep(LOOK_S)
    except BaseException:
        os.killpg(child.pid, signal.SIGTERM)
        child.wait()
        raise
    return child.returncode


def last_words(log: Path) -> str:
    """The last line of a log."""
    return (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
