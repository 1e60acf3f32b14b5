"""The ordinary training code in several processes of the cluster, by Spark's TorchDistributor.

TorchDistributor gives each process a slot, an address to meet at, and an end when one of them ends. What it does not
do is done here: it is given a function (of a script that fails it says nothing), and what the function returns is
checked against the files that it vouches for; it waits for ever, so the processes' signs of life are watched and the
one that hangs is named; its own error names no cause, so each process writes down its own; and where the command was
killed and started again, processes of before that are still alive are waited for, since two would write one folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tunewright import errors, ranks
from tunewright.errors import RunBusyError, StageError
from tunewright.run import Run, read_json
from tunewright.spark import session
from tunewright.spark.settings import Settings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

LOOK_S = 0.5
END_S = 20
"""Seconds that a process which failed is given to say why, and the others to end with it."""
FENCE_S = 60
"""Seconds that processes of an earlier command are given to end."""


def train(run: Run, spark: SparkSession, asked: Settings, asked_to_stop: Callable[[], bool]) -> None:
    """Train by `asked.processes` processes, one in each slot, going on from the last whole checkpoint.

    Raises:
        UserError: the cluster has too few slots.
        StageError: a process failed, hung or was lost; which one, and why.
        InterruptedError: it was asked to stop; a checkpoint of the last step was written first.
    """
    session.wait_for_slots(spark, asked.processes, asked.wait_s)
    _fence(run)
    attempt = secrets.token_hex(4)
    ranks.begin(run, attempt)
    job = _Job(spark, asked, run, attempt)
    job.start()
    gone_since: float | None = None
    lookout = ranks.Lookout(run, asked.patience_s)
    while job.is_alive():
        job.join(LOOK_S)
        if asked_to_stop():
            ranks.ask_to_stop(run)
        if ranks.failure(run) is not None:
            gone_since = gone_since or time.monotonic()
            if time.monotonic() - gone_since > END_S:
                job.cancel()
                break
        elif (hung := lookout.hangs()) is not None:
            job.cancel()
            raise StageError(f"training: {hung}; run the same command again, it goes on from the last checkpoint")
    if (failure := ranks.failure(run)) is not None:
        if failure["kind"] == "Interrupted":
            raise InterruptedError(failure["message"])
        raise errors.from_name(failure["kind"], failure["message"])
    if job.error is not None:
        raise StageError(
            f"training on Spark ended without a word from its processes ({session.cause(job.error)}): an executor was "
            "lost or killed, or out of memory. Run the same command again, it goes on from the last checkpoint"
        ) from job.error
    _believe(run, job.result)


@contextlib.contextmanager
def heeding_sigterm() -> Iterator[Callable[[], bool]]:
    """SIGTERM asks to stop, instead of ending the process; gives a function that says whether it did."""
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def rank(path: str, attempt: str) -> dict[str, Any]:
    """What each process does: train. Gives what the driver holds against the files."""
    from tunewright.train import stage

    run = Run.open(path)
    stage.train(run, attempt)
    return {"attempt": attempt, "manifest_sha256": _sha256(run)}


class _Job(threading.Thread):
    """TorchDistributor at work, in a thread of its own, so that it can be watched."""

    def __init__(self, spark: SparkSession, asked: Settings, run: Run, attempt: str) -> None:
        super().__init__(name="TorchDistributor", daemon=True)
        self.spark, self.asked, self.path, self.attempt = spark, asked, str(run.path), attempt
        self.group = f"train {run.id} {attempt}"
        self.result: Any = None
        self.error: Exception | None = None

    def run(self) -> None:
        from pyspark.ml.torch.distributor import TorchDistributor

        context = self.spark.sparkContext
        context.setJobGroup(self.group, self.group, interruptOnCancel=True)
        try:
            distributor = TorchDistributor(self.asked.processes, local_mode=False, use_gpu=self.asked.gpus)
            self.result = distributor.run(rank, self.path, self.attempt)
        except Exception as error:  # noqa: BLE001 - handed to the thread that looks on
            self.error = error

    def cancel(self) -> None:
        """End what still runs, and wait for it a while."""
        self.spark.sparkContext.cancelJobGroup(self.group)
        self.join(END_S)


def _fence(run: Run) -> None:
    """Wait until no process of an earlier command trains this run.

    Raises:
        RunBusyError: one still does after a minute.
    """
    ranks.shut_out(run)
    lookout = ranks.Lookout(run, FENCE_S)
    deadline = time.monotonic() + FENCE_S
    while (alive := lookout.alive()) is not None:
        if time.monotonic() > deadline:
            raise RunBusyError(f"{run.path}: {alive} of an earlier command still trains it; end it, then try again")
        time.sleep(LOOK_S)


def _believe(run: Run, result: Any) -> None:
    """Hold what the first process returned against the files that it vouches for.

    Raises:
        StageError: they are not there, or are others.
    """
    said = result.get("manifest_sha256") if isinstance(result, dict) else None
    if said is None or not run.manifest_file("train").is_file() or _sha256(run) != said:
        raise StageError(
            f"training was reported to be done, and {run.manifest_file('train')} is not what it wrote; is the run "
            "folder on storage that the whole cluster sees?"
        )
    trained = run.trained(run.method)
    for name, digest in read_json(run.manifest_file("train"))["sha256"].items():
        with (trained / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                run.manifest_file("train").unlink()
                raise StageError(f"{trained / name} is not what training wrote; run the same command again")


def _sha256(run: Run) -> str:
    return hashlib.sha256(run.manifest_file("train").read_bytes()).hexdigest()
