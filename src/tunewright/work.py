"""What runs inside a backend: `python -m tunewright.work STAGE RUN [--on spark]`.

Does one stage for one run, in this process. What goes wrong is written to the run folder as one line for a person;
the traceback goes to standard error, which the backend keeps as the stage's log.

`python -m tunewright.work engine --socket PATH --source BASE` is the server's: it holds weights and answers.
"""

from __future__ import annotations

import argparse
import faulthandler
import fcntl
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tunewright import ranks
from tunewright import run as run_folders
from tunewright.errors import FAULT, INTERRUPTED, DiskFullError, StageError, explained
from tunewright.run import Run, read_json, write_json


def main(arguments: list[str] | None = None) -> int:
    """Do a stage; gives the process's exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["engine"]:
        return engine(arguments[1:])
    if arguments[:1] == ["batch"]:
        return batch(Path(arguments[1]))
    parser = argparse.ArgumentParser(prog="python -m tunewright.work")
    parser.add_argument("stage", choices=[*STAGES, "serve", "preflight"])
    parser.add_argument("run", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument(
        "--on",
        choices=["here", "spark", "hosted"],
        default="here",
        help="spark: this is its driver; hosted: an API trains",
    )
    given = parser.parse_args(arguments)
    run = Run.open(given.run)
    stage: str = "deploy" if given.stage == "serve" else given.stage
    lock_file = run.lock_file(stage)
    if (rank := int(os.environ.get("RANK", 0))) > 0:  # several processes train together; each has a lock of its own
        lock_file = lock_file.with_name(f"{lock_file.name}.{rank}")
    lock_file.parent.mkdir(exist_ok=True)
    handle = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        run_folders.lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"another process works on {stage} of {run.id}", file=sys.stderr)
        os.close(handle)
        return FAULT
    try:
        if given.stage == "serve":
            serve(run, given.host, given.port)
        elif given.stage == "preflight":
            preflight(run)
        else:
            (STAGES | ON.get(given.on, {}))[given.stage](run)
    except (InterruptedError, KeyboardInterrupt) as error:
        print(f"stopped: {error}", file=sys.stderr)
        _report(run, stage, "Interrupted", str(error) or "stopped")
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the edge of the process: everything is reported, nothing is hidden
        traceback.print_exc()
        known = explained(error)
        if known is None:
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            known = StageError(f"{stage} failed: {said}{_traceback(run, stage)}")
        _report(run, stage, type(known).__name__, str(known))
        return known.exit_code
    finally:
        os.close(handle)
    return 0


def engine(arguments: list[str]) -> int:
    """Serve a model to the server that started this process; what goes wrong is the last line of its log."""
    from tunewright.endpoint import engine as engines

    parser = argparse.ArgumentParser(prog="python -m tunewright.work engine")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--revision")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args(arguments)
    try:
        engines.serve(given.socket, given.source, revision=given.revision, folder=given.folder)
    except Exception as error:  # noqa: BLE001 - the edge of the process: everything is reported, nothing is hidden
        known = explained(error)
        if known is None:
            traceback.print_exc()
        print(known or f"{type(error).__name__}: {error}".splitlines()[0], file=sys.stderr, flush=True)
        return known.exit_code if known else FAULT
    return 0


def batch(folder: Path) -> int:
    """Answer the batch that `asked.json` in a folder describes; progress, the summary or the failure go there too."""
    said = read_json(folder / "asked.json")

    def progress(done: int, total: int) -> None:
        write_json(folder / "progress.json", {"done": done, "total": total}, durable=False)

    try:
        from tunewright.package import batch as batches

        asked = batches.Asked(**said["asked"])
        with batches.alone(asked):
            summary = (
                _batch_on_spark(asked, said["spark"], progress)
                if said["spark"]
                else batches.answer_all(asked, progress)
            )
        write_json(folder / "summary.json", summary)
    except Exception as error:  # noqa: BLE001 - the edge of the process: everything is reported, nothing is hidden
        traceback.print_exc()
        reason = next(iter(str(error).splitlines()), "")
        known = explained(error) or StageError(f"batch failed: {type(error).__name__}: {reason}")
        write_json(folder / "failure.json", {"kind": type(known).__name__, "message": str(known)})
        return known.exit_code
    return 0


def _batch_on_spark(asked: Any, table: dict[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    from tunewright.spark import batching, session
    from tunewright.spark.settings import settings

    shared = asked.parts.parent / f".{Path(asked.output).name}.tunewright"
    try:
        with session.session(settings(table), f"tunewright batch {asked.output}", shared) as spark:
            return batching.answer(asked, spark, progress)
    finally:
        shutil.rmtree(shared, ignore_errors=True)


def _report(run: Run, stage: str, kind: str, message: str) -> None:
    """What the backend tells whoever asked; where the disk is full, the log alone has it. Of several processes the
    one that failed first says it: the others fail because it does."""
    if "RANK" in os.environ and (first := ranks.failure(run)) is not None:
        kind, message = first["kind"], first["message"]
    try:
        write_json(run.failure_file(stage), {"kind": kind, "message": message})
    except DiskFullError:
        print(message, file=sys.stderr)


def _traceback(run: Run, stage: str) -> str:
    return f"; the traceback is in {run.log_file(stage)}" if stage in run_folders.STAGES else ""


def preflight(run: Run) -> None:
    from tunewright.train import preflight as trying

    def tell(done: int, total: int, note: str) -> None:
        run.set_progress("preflight", done, total, note)

    write_json(run.preflight_file, trying.attempt(run, trying.given(run), tell).to_dict())


def prepare(run: Run) -> None:
    from tunewright import chat, models
    from tunewright.data import prepare as preparing
    from tunewright.models import ModelRef

    ref = ModelRef.from_dict(run.resolved()["model"])
    tokenizer = models.load_tokenizer(ref)
    equipment = chat.equip(tokenizer)
    preparing.write(
        run,
        run.recipe(),
        ref,
        tokenizer,
        equipment,
        progress=lambda done, total: run.set_progress("prepare", done, total),
    )


def train(run: Run) -> None:
    from tunewright.train import stage

    stage.train(run)


def evaluate(run: Run) -> None:
    from tunewright import tracking
    from tunewright.evaluate import measure

    with tracking.attach(run) as tracker:
        measure.evaluate(run, tracker)


def package(run: Run) -> None:
    from tunewright import pages, tracking
    from tunewright.package import formats

    with tracking.attach(run) as tracker:
        formats.package(run, tracker)
        pages.write(run)
        if run.report_page.is_file():
            tracker.artifact(run.report_page, "report")


def serve(run: Run, host: str, port: int) -> None:
    from tunewright import endpoint

    endpoint.serve(run, host=host, port=port)


STAGES: dict[str, Callable[[Run], None]] = {
    "prepare": prepare,
    "train": train,
    "evaluate": evaluate,
    "package": package,
}


def _train_on_spark(run: Run) -> None:
    from tunewright.spark import session, training

    with training.heeding_sigterm() as asked_to_stop, session.opened(run, "train") as spark:
        training.train(run, spark, session.asked(run), asked_to_stop)


def _prepare_on_spark(run: Run) -> None:
    from tunewright.spark import preparing, session

    with session.opened(run, "prepare") as spark:
        preparing.prepare(run, spark, session.asked(run))


def _evaluate_on_spark(run: Run) -> None:
    from tunewright.spark import scoring, session

    with session.opened(run, "evaluate") as spark:
        scoring.evaluate(run, spark, session.asked(run))


ON_SPARK: dict[str, Callable[[Run], None]] = {
    "prepare": _prepare_on_spark,
    "train": _train_on_spark,
    "evaluate": _evaluate_on_spark,
}
"""Stages as Spark jobs; the others run in this process, the driver."""


def _train_hosted(run: Run) -> None:
    from tunewright import tracking
    from tunewright.hosted import places, training

    with tracking.attach(run) as tracker:
        training.train(run, places.of(run), tracker)


def _evaluate_hosted(run: Run) -> None:
    from tunewright import tracking
    from tunewright.evaluate import measure
    from tunewright.hosted import asking, places

    with tracking.attach(run) as tracker:
        measure.evaluate(run, tracker, asking.Asker(run, places.of(run)))


def _package_hosted(run: Run) -> None:
    from tunewright import pages, tracking
    from tunewright.hosted import packaging, places

    with tracking.attach(run) as tracker:
        packaging.package(run, places.of(run), tracker)
        pages.write(run)


ON: dict[str, dict[str, Callable[[Run], None]]] = {
    "spark": ON_SPARK,
    "hosted": {"train": _train_hosted, "evaluate": _evaluate_hosted, "package": _package_hosted},
}


if __name__ == "__main__":
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
