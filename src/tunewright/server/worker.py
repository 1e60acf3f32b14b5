"""Where jobs happen: claims one, and asks `life.advance` for its run.

A job has a run folder, and everything that training needs to go on is in there; the database says who has the job. A
claim is one statement, so no two workers have a job at once. Whoever has one says so every few seconds; a claim that
is no longer renewed is handed to the next worker, which goes on from the run's last checkpoint. A worker that finds
its claim gone stops.

Files are checked in one thread and models trained in another, so that a job behind a long one still hears at once
that its file is broken.
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import and_, func, or_, select, update

from tunewright import life
from tunewright import recipe as recipes
from tunewright import run as run_folders
from tunewright.endpoint.shapes import ApiError
from tunewright.errors import DataError, ModelError, RecipeError, RunBusyError, TunewrightError
from tunewright.life import Watcher
from tunewright.recipe import Recipe
from tunewright.run import Run
from tunewright.server import files, jobs, models, store, tables
from tunewright.server.job_recipes import KEPT_CHECKPOINTS, count_lines, recipe_of
from tunewright.server.state import Server
from tunewright.server.store import new_id, now

logger = logging.getLogger("tunewright.server")

POLL_S = 0.5
BUSY_S = 2.0
"""How long a worker leaves a job alone whose worker before still holds its run."""
MIN_EXAMPLES = 10
"""OpenAI's; fewer are an error of the job."""
CHECKING = ("validating_files",)
TRAINING = ("queued", "running")


class Stopped(KeyboardInterrupt):
    """Work on a job ends before its time; `life.advance` stops the stage in order, as at Ctrl-C."""


class Worker:
    """Works on one kind of thing at a time: checks files, or trains.

    Args:
        statuses: jobs of which status it takes.
        stop: set when the worker should end; what it works on is given back, to be gone on with.
    """

    def __init__(self, server: Server, statuses: tuple[str, ...], stop: threading.Event) -> None:
        self.server = server
        self.statuses = statuses
        self.stop = stop
        self.name = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"

    def run(self) -> None:
        """Until `stop` is set."""
        while not self.stop.is_set():
            try:
                if (job := claim(self.server, self.name, self.statuses)) is not None:
                    self.work(job)
                    continue
            except Exception:  # the database is away, say: later perhaps not; a job that was claimed is handed over
                logger.exception("%s cannot go on", self.name)
            self.stop.wait(POLL_S)

    def work(self, job: dict[str, Any]) -> None:
        """Take a claimed job as far as this worker goes, whatever comes of it."""
        claimed = Claim(self.server, job, self.name, self.stop)
        with claimed.renewing():
            try:
                claimed.look()
                (check if self.statuses == CHECKING else train)(self.server, claimed)
            except Stopped:
                _settle_stopped(self.server, claimed)
            except RunBusyError as error:  # the worker before is silent and alive; it lets go when it wakes
                logger.warning("%s is given back: %s", job["id"], error)
                _give_back(claimed)
                self.stop.wait(BUSY_S)
            except store.AWAY:
                logger.exception("%s is given back, since the database does not answer", job["id"])
                _give_back(claimed)
            except TunewrightError as error:
                _fail(self.server, claimed, error)
            except Exception as error:
                logger.exception("job %s", job["id"])
                _fail(self.server, claimed, error)


@dataclass(frozen=True)
class Said:
    """An event; there is one of each `what`."""

    what: str
    message: str
    level: Literal["info", "warn", "error"] = "info"


class Claim:
    """A job that this worker has: what is wanted of it by now, and whether it is still ours."""

    def __init__(self, server: Server, job: dict[str, Any], worker: str, stop: threading.Event) -> None:
        self.server = server
        self.job = job
        self.worker = worker
        self.wanted: str = job["wanted"]
        self.ours = True
        self._stop = stop

    @property
    def id(self) -> str:
        found: str = self.job["id"]
        return found

    @property
    def reason(self) -> str | None:
        """Why work should end now; None where it should not."""
        if not self.ours:
            return "lost"
        if self.wanted != "run":
            return self.wanted
        return "stop" if self._stop.is_set() else None

    def look(self) -> None:
        """Raises:
        Stopped: work should end.
        """
        if self.reason is not None:
            raise Stopped(self.reason)

    def set(self, *said: Said, **values: Any) -> None:
        """Write to the job's row, while it is ours, and what is said of it: both or neither.

        Raises:
            Stopped: it is no longer.
        """
        with self.server.store.begin() as connection:
            written = connection.execute(self._mine().values(**values))
            if written.rowcount:
                for one in said:
                    jobs.say(connection, self.id, one.what, one.message, level=one.level)
        if not written.rowcount:
            self.ours = False
            raise Stopped("lost")
        self.job |= values

    def say(self, what: str, message: str, **more: Any) -> None:
        with self.server.store.begin() as connection:
            jobs.say(connection, self.id, what, message, **more)

    @contextlib.contextmanager
    def renewing(self) -> Iterator[None]:
        """Renew the claim, and hear what is wanted, until the end of the block."""
        ended = threading.Event()

        def renew() -> None:
            while not ended.wait(POLL_S):
                try:
                    with self.server.store.begin() as connection:
                        found = connection.execute(
                            self._mine().values(heartbeat_at=time.time()).returning(tables.jobs.c.wanted)
                        ).scalar()
                except Exception:  # until it is back the claim stands, as long as nobody else takes it
                    logger.exception("the claim of %s cannot be renewed", self.id)
                    continue
                self.ours = found is not None
                if found is not None:
                    self.wanted = found

        thread = threading.Thread(target=renew, name=f"claim {self.id}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _mine(self) -> Any:
        return update(tables.jobs).where(tables.jobs.c.id == self.id, tables.jobs.c.claimed_by == self.worker)


def claim(server: Server, worker: str, statuses: tuple[str, ...]) -> dict[str, Any] | None:
    """Take the next job: of the key that was served longest ago, its oldest. None where there is nothing to do."""
    table = tables.jobs
    other = table.alias("other")
    at = time.time()
    served = (
        select(func.max(other.c.begun_at)).where(other.c.key_id == table.c.key_id).correlate(table).scalar_subquery()
    )
    free = or_(table.c.claimed_by.is_(None), table.c.heartbeat_at < at - server.settings.handover_s)
    left = and_(table.c.claimed_by.is_not(None), table.c.wanted != "run")  # its worker died before it could stop it
    chosen = (
        select(table.c.number)
        .where(table.c.status.in_(statuses), free, or_(table.c.wanted == "run", left))
        .order_by(func.coalesce(served, 0.0), table.c.number)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    take = update(table).where(table.c.number == chosen).values(claimed_by=worker, heartbeat_at=at, begun_at=at)
    with server.store.begin() as connection:
        found = connection.execute(take.returning(*table.c)).mappings().first()
    return dict(found) if found is not None else None


def check(server: Server, claimed: Claim) -> None:
    """Look at a job's files and settle its numbers; then it waits for its turn to train.

    Raises:
        TunewrightError: the job cannot be done.
    """
    job = claimed.job
    _count(server, job)
    run = _run_of(server, claimed)
    life.advance(run, until="plan", watcher=Watching(claimed))
    resolved = run.resolved()
    recipe = run.recipe()
    settled = job["hyperparameters"] | {
        "n_epochs": _whole(recipe.train.epochs),
        "batch_size": recipe.train.batch_size // (recipe.train.grpo.num_generations if recipe.task == "reward" else 1),
        "learning_rate_multiplier": _multiplier(recipe, resolved),
    }
    method = dict(job["method"])
    own = dict(method[method["type"]])
    method[method["type"]] = own | {"hyperparameters": own.get("hyperparameters", {}) | settled}
    said = Said("validated", "Files validated, moving job to queued state")
    claimed.set(said, status="queued", hyperparameters=settled, method=method, claimed_by=None, heartbeat_at=None)


def train(server: Server, claimed: Claim) -> None:
    """Take a checked job's run to its package, and the package to a model that can be asked.

    Raises:
        TunewrightError: a stage failed.
    """
    run = _run_of(server, claimed)
    claimed.set(Said("started", "Fine-tuning job started"), status="running")
    watching = Watching(claimed)
    life.advance(run, until="package", watcher=watching)
    watching.catch_up(run)
    _finish(server, claimed, run)


class Watching(Watcher):
    """Tells a job's events what its run does, and stops the run where the job should end."""

    def __init__(self, claimed: Claim) -> None:
        self.claimed = claimed
        self.told = 0

    def waiting(self, run: Run, stage: str) -> None:
        if stage == "train":
            try:
                self.catch_up(run)
            except store.AWAY as error:  # training does not need it, and what was not said is said the next time
                logger.warning("%s: the database does not answer: %s", self.claimed.id, error)
        self.claimed.look()

    def started(self, run: Run, stage: str) -> None:
        self.claimed.look()

    def problem(self, problem: Any) -> None:
        digest = re.sub(r"\W+", "-", problem.message)[:48]
        self.claimed.say(f"warning {digest}", problem.message, level="warn")

    def catch_up(self, run: Run) -> None:
        """Say what training has logged since the last time, and keep its new checkpoints."""
        metrics = run.metrics()
        total = _total_steps(run)
        for entry in metrics[self.told :]:
            step = entry["step"]
            if "loss" in entry:
                message = f"Step {step}/{total}: training loss={entry['loss']:.2f}"
                self.claimed.say(f"step {step}", message, data=_metrics_data(entry, total))
            elif "eval_loss" in entry:
                message = f"Step {step}/{total}: validation loss={entry['eval_loss']:.2f}"
                self.claimed.say(f"validation {step}", message, data=_metrics_data(entry, total))
        self.told = len(metrics)
        keep_checkpoints(self.claimed.server, self.claimed, run)


def keep_checkpoints(server: Server, claimed: Claim, run: Run) -> None:
    """Make models of the run's checkpoints, the last `KEPT_CHECKPOINTS` of them."""
    job = claimed.job
    found = {
        int(one.parent.name.rpartition("-")[2]): one.parent
        for one in run.checkpoints.glob("checkpoint-*/complete.json")
    }
    for step, folder in sorted(found.items()):
        with server.store.read() as connection:
            if store.row(connection, tables.checkpoints, job_id=job["id"], step=step) is not None:
                continue
        kept = Path("models") / job["id"] / f"step-{step}"
        try:
            _link_weights(folder, server.settings.data / kept)
        except FileNotFoundError:  # training has put a newer one in its place meanwhile
            continue
        name = models.tuned_name(job["model"], job["suffix"], job["id"], surface=job["surface"], step=step)
        start = models.find(server, job["model"])
        kind = "full" if run.method == "full" else "adapter"
        prefix = "ftckpt_" if job["surface"] == "openai" else "ftchkpt-"
        row = {"id": new_id(prefix), "created_at": now(), "job_id": job["id"], "model": name, "step": step}
        with server.store.begin() as connection:
            models.record(connection, name, job_id=job["id"], start=start, folder=str(kept), kind=kind, checkpoint=True)
            connection.execute(tables.checkpoints.insert().values(**row, metrics=_at_step(run, step)))
            jobs.say(connection, job["id"], f"checkpoint {step}", f"Checkpoint created at step {step}")
            over = _beyond(connection, job["id"])
        for old in over:
            shutil.rmtree(server.settings.data / old, ignore_errors=True)


def _run_of(server: Server, claimed: Claim) -> Run:
    """The job's run folder; made, and noted on the job, where there is none yet."""
    if claimed.job["run_id"] is not None:
        return Run.open(server.settings.runs / claimed.job["run_id"])
    recipe, unused = recipe_of(server, claimed.job)
    run = run_folders.create(server.settings.runs, recipe)
    claimed.set(run_id=run.id)
    for number, message in enumerate(unused):
        claimed.say(f"unused setting {number}", message, level="warn")
    return run


def _count(server: Server, job: dict[str, Any]) -> None:
    """Refuse a file of too few examples, as OpenAI does.

    Raises:
        Refused: with OpenAI's code.
    """
    for param, what in (("training_file", "Training"), ("validation_file", "Validation")):
        if job[param] is None:
            continue
        try:
            found = files.find(server, job[param])
        except ApiError:
            raise Refused(f"{what} file {job[param]} was deleted", f"invalid_{param}", param) from None
        rows = count_lines(server.blobs.local(found["id"], ".jsonl"))
        least = MIN_EXAMPLES if param == "training_file" else 1
        if rows < least:
            raise Refused(
                f"{what} file has {rows} example(s), but must have at least {least} examples",
                "invalid_n_examples",
                param,
            )


class Refused(DataError):
    """A job that cannot be done, with OpenAI's code for it."""

    def __init__(self, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


def _finish(server: Server, claimed: Claim, run: Run) -> None:
    """The package becomes a model with a name, the log a file; then the job has succeeded."""
    job = claimed.job
    start = models.find(server, job["model"])
    full = run.method == "full"
    kept = Path("models") / job["id"] / "final"
    _link_all(run.packaged_model if full else run.packaged_adapter, server.settings.data / kept)
    _link_all(run.rendering_file, server.settings.data / kept / run.rendering_file.name)
    name = models.tuned_name(job["model"], job["suffix"], job["id"], surface=job["surface"])
    table = results_csv(run, azure=job["surface"] == "azure").encode()
    result = files.keep(server, iter([table]), "results.csv", "fine-tune-results")
    manifest = run.manifest("train")
    try:
        with server.store.begin() as connection:
            models.record(
                connection, name, job_id=job["id"], start=start, folder=str(kept), kind="full" if full else "adapter"
            )
        claimed.set(
            Said("model", f"New fine-tuned model created: {name}"),
            Said("done", "The job has successfully completed"),
            status="succeeded",
            fine_tuned_model=name,
            finished_at=now(),
            trained_tokens=manifest["tokens"],
            result_files=[result["id"]],
            claimed_by=None,
        )
    except BaseException:
        files.remove(server, result["id"])  # the worker that has the job now makes its own
        raise


def _settle_stopped(server: Server, claimed: Claim) -> None:
    """Say what became of a job whose work ended before its time."""
    reason = claimed.reason or "stop"
    with contextlib.suppress(Stopped):
        if reason == "pause" and claimed.job["run_id"] is not None:
            run = Run.open(server.settings.runs / claimed.job["run_id"])
            Watching(claimed).catch_up(run)  # the checkpoint of the last step too, which stopping wrote
        match reason:
            case "cancel":
                claimed.set(Said("cancelled", "Job cancelled"), status="cancelled", finished_at=now(), claimed_by=None)
            case "pause":
                claimed.set(Said(f"paused {new_id('', size=6)}", "Job paused"), status="paused", claimed_by=None)
            case "stop":
                _give_back(claimed)


def _give_back(claimed: Claim) -> None:
    """Let another worker have the job. Where the database is away, its claim grows old instead."""
    back = "queued" if claimed.job["status"] == "running" else claimed.job["status"]
    with contextlib.suppress(Stopped, *store.AWAY):
        claimed.set(status=back, claimed_by=None)


def _fail(server: Server, claimed: Claim, error: Exception) -> None:
    """The job has failed, with OpenAI's code and a message that names the file as the client knows it."""
    code, param, message = _explained(claimed.job, error)
    with contextlib.suppress(Stopped):
        claimed.set(
            Said("failed", f"The job failed: {message}", level="error"),
            status="failed",
            finished_at=now(),
            claimed_by=None,
            error={"code": code, "message": message, "param": param},
        )


def _explained(job: dict[str, Any], error: Exception) -> tuple[str, str | None, str]:
    """Code, parameter and message of what went wrong."""
    message = str(error)
    if isinstance(error, Refused):
        return error.code, error.param, message
    if isinstance(error, ApiError):  # a file or a base that was taken away meanwhile
        known = error.body["error"]
        return known["code"] or "not_found", known["param"], message
    if not isinstance(error, TunewrightError):
        return "server_error", None, "The server had an error; its log has the reason."
    for param in ("validation_file", "training_file"):
        file_id = job[param]
        if file_id is not None and file_id in message:
            plain = re.sub(rf"\S*{re.escape(file_id)}\.jsonl(?::(\d+))?", _named(file_id), message)
            if isinstance(error, DataError | RecipeError):
                return f"invalid_{param}", param, f"The job failed due to an invalid {param.replace('_', ' ')}. {plain}"
            message = plain
    if isinstance(error, DataError):
        return "invalid_training_file", "training_file", message
    if isinstance(error, RecipeError):
        return "invalid_hyperparameters", "hyperparameters", message
    return (
        ("model_not_available", "model", message)
        if isinstance(error, ModelError)
        else ("training_failed", None, message)
    )


def _named(file_id: str) -> Callable[[re.Match[str]], str]:
    return lambda found: f"{file_id} line {found[1]}" if found[1] else file_id


def results_csv(run: Run, *, azure: bool) -> str:
    """The training log as OpenAI's or Azure's results.csv: a line for each logged step."""
    names = {
        "step": "step",
        "loss": "train_loss",
        "mean_token_accuracy": "train_mean_token_accuracy" if azure else "train_accuracy",
        "eval_loss": "valid_loss",
        "eval_mean_token_accuracy": "validation_mean_token_accuracy" if azure else "valid_mean_token_accuracy",
    }
    if azure:
        names |= {"full_eval_loss": "full_valid_loss", "full_eval_accuracy": "full_valid_mean_token_accuracy"}
    steps: dict[int, dict[str, Any]] = {}
    for entry in run.metrics():
        steps.setdefault(entry["step"], {}).update(entry)
        if "eval_loss" in entry:
            steps[entry["step"]] |= {
                "full_eval_loss": entry["eval_loss"],
                "full_eval_accuracy": entry.get("eval_mean_token_accuracy"),
            }
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(names.values())
    for step in sorted(steps):
        cells = [steps[step].get(key) for key in names]
        table.writerow("" if cell is None else f"{cell:.5f}" if isinstance(cell, float) else cell for cell in cells)
    return text.getvalue()


def _metrics_data(entry: dict[str, Any], total: int) -> dict[str, Any]:
    """A step's numbers under OpenAI's names."""
    names = {
        "loss": "train_loss",
        "mean_token_accuracy": "train_mean_token_accuracy",
        "eval_loss": "full_valid_loss",
        "eval_mean_token_accuracy": "full_valid_mean_token_accuracy",
    }
    said = {ours: entry[key] for key, ours in names.items() if entry.get(key) is not None}
    return {"step": entry["step"], "total_steps": total, **said}


def _at_step(run: Run, step: int) -> dict[str, Any]:
    """What is known of a checkpoint's step."""
    said: dict[str, Any] = {"step": step}
    for entry in run.metrics():
        if entry["step"] == step:
            said |= _metrics_data(entry, 0)
    said.pop("total_steps", None)
    return said


def _total_steps(run: Run) -> int:
    seen = run.progress("train")
    return int(seen["total"]) if seen else int(run.manifest("plan").get("steps", 0))


def _beyond(connection: Any, job_id: str) -> list[str]:
    """Forget a job's oldest checkpoints beyond those that are kept; gives their folders."""
    table = tables.checkpoints
    names = list(
        connection.execute(
            select(table.c.model).where(table.c.job_id == job_id).order_by(table.c.step.desc())
        ).scalars()
    )[KEPT_CHECKPOINTS:]
    old = tables.models.c.id.in_(names)
    folders = list(connection.execute(select(tables.models.c.folder).where(old)).scalars())
    connection.execute(tables.models.delete().where(old))
    connection.execute(table.delete().where(table.c.model.in_(names)))
    return folders


def _link_weights(checkpoint: Path, target: Path) -> None:
    """A checkpoint's weights without its optimizer's state."""
    weights = [
        path for path in checkpoint.iterdir() if path.suffix == ".safetensors" or path.name.endswith("config.json")
    ]
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for path in weights:
        _link(path, fresh / path.name)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(fresh, target)


def _link_all(source: Path, target: Path) -> None:
    """A file or a folder at another place, sharing the bytes where the file system can."""
    if source.is_file():
        target.unlink(missing_ok=True)
        _link(source, target)
        return
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=_link)


def _link(source: Any, target: Any) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _multiplier(recipe: Recipe, resolved: dict[str, Any]) -> float:
    usual = recipes.default_rate(recipe.task, resolved["train"]["method"])
    return float(round(resolved["learning_rate"] / usual, 6))
