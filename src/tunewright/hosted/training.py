"""The stage `train` where an API trains: files and a job are made once, whatever is killed; the job's events become the
run's metrics; in the end the tuned model's name is what there is.

Stopping the command (Ctrl-C) does not stop the job, which costs what it costs: the same command finds it again, and
`--again` and `destroy` cancel it.
"""

from __future__ import annotations

import re
import time
from typing import Any

import openai

from tunewright.errors import DataError, StageError, UserError
from tunewright.hosted import calls, rows
from tunewright.hosted.places import FILE, JOB, MODEL, TAG, Place, job_name, prefix
from tunewright.recipe import Recipe
from tunewright.run import Run, append_json, read_json, write_json
from tunewright.tracking import Tracker

AWAY_S = 900
"""How long the endpoint may be away before looking on is given up; the job is not lost."""
DENIED = 3
"""How often in a row a look may be refused for its sign-in before it is believed: tokens are renewed in between."""
RENAMED = {
    "train_loss": "loss",
    "train_mean_token_accuracy": "mean_token_accuracy",
    "valid_loss": "eval_loss",
    "valid_mean_token_accuracy": "eval_mean_token_accuracy",
    "full_valid_loss": "eval_full_loss",
    "full_valid_mean_token_accuracy": "eval_full_mean_token_accuracy",
}
"""OpenAI's names of metrics -> those of a run."""


def train(run: Run, place: Place, tracker: Tracker) -> None:
    """Hand the rows over, look on until the job has ended; train/manifest.json is written last.

    Raises:
        DataError: the API refuses the rows.
        UserError: it refuses the job (a retired base, no entitlement, a quota).
        StageError: the job failed, was cancelled there, or the endpoint stays away.
    """
    recipe = run.recipe()
    place.prepare(run)
    with calls.explained("handing over the rows"):
        files = {split: _file(run, recipe, place, split) for split in _splits(run, recipe)}
    with calls.explained("creating the fine-tuning job"):
        job_id, entry = _job(run, recipe, place, files)
    job = _follow(run, place, job_id, tracker)
    _remember(run, entry, ended=True)
    if job.status != "succeeded":
        _job_file(run).unlink(missing_ok=True)  # the next command makes another
        raise _failure(job)
    for one in (job.fine_tuned_model, *(job.result_files or ())):
        _own(run, MODEL if one == job.fine_tuned_model else FILE, one)
    write_json(run.manifest_file("train"), _manifest(run, recipe, job))


def hyperparameters(recipe: Recipe, learning_rate_multiplier: float | None) -> dict[str, Any]:
    """What the recipe and the table ask for; what they do not say is left to the API."""
    asked: dict[str, Any] = {"n_epochs": int(recipe.train.epochs)}
    if "batch_size" in recipe.train.model_fields_set:
        asked["batch_size"] = recipe.train.batch_size
    if learning_rate_multiplier is not None:
        asked["learning_rate_multiplier"] = learning_rate_multiplier
    if recipe.task == "preference":
        asked["beta"] = recipe.train.dpo.beta
    return asked


def _splits(run: Run, recipe: Recipe) -> tuple[str, ...]:
    return tuple(split for split in ("train", "validation") if run.data_file(split).is_file())


def _file(run: Run, recipe: Recipe, place: Place, split: str) -> str:
    """The id of an uploaded split; one that is there already is not uploaded again."""
    name = f"{prefix(run)}{split}.jsonl"

    def there() -> str | None:
        return next((one.id for one in place.client.files.list(purpose="fine-tune") if one.filename == name), None)

    known = next((one for one in run.resources() if (one["kind"], one["name"]) == (FILE, name)), None)
    if known is not None and known["is"] != "gone" and (found := there()) is not None:
        if known["is"] == "intended":  # killed between the call and the record
            run.made(known["entry"], id=found)
        return found
    entry = known["entry"] if known is not None and known["is"] == "intended" else run.intend(FILE, name)
    content = rows.content(run, recipe, split)

    def upload() -> str:
        made = place.once().files.create(file=(name, content), purpose="fine-tune")
        return str(made.id)

    found = calls.made_once(there, upload, place.settings.retries)
    run.made(entry, id=found, bytes=len(content))
    return found


def _job(run: Run, recipe: Recipe, place: Place, files: dict[str, str]) -> tuple[str, str]:
    """The job's id and its entry in the ledger."""
    if _job_file(run).is_file():
        known = read_json(_job_file(run))
        return known["id"], known["entry"]
    earlier = [one for one in run.resources() if one["kind"] == JOB]
    open_one = next((one for one in earlier if one["is"] == "intended"), None)  # a crash between call and record
    attempt = str(open_one["attempt"] if open_one else len(earlier))
    name = f"fine-tuning {run.id} {attempt}"
    entry: str = open_one["entry"] if open_one else run.intend(JOB, name, attempt=attempt)

    def there() -> str | None:
        return next((str(job.id) for job in place.jobs_of(run) if job_name(run, job) == name), None)

    def create() -> str:
        kind = {"preference": "dpo", "reward": "reinforcement"}.get(recipe.task, "supervised")
        options = {"hyperparameters": hyperparameters(recipe, place.settings.learning_rate_multiplier)}
        if recipe.grader is not None:
            options["grader"] = recipe.grader.model_dump(mode="json", by_alias=True, exclude_none=True)
        made = place.once().fine_tuning.jobs.create(
            model=recipe.model,
            training_file=files["train"],
            validation_file=files.get("validation", openai.omit),
            method={"type": kind, kind: options},  # type: ignore[arg-type]
            seed=recipe.train.seed % 2**31,
            suffix=place.settings.suffix or _suffix(recipe.name),
            metadata={TAG: run.id, "tunewright-attempt": attempt},
            **place.job_options(),
        )
        return str(made.id)

    found = there() if open_one else None
    job_id = found or calls.made_once(there, create, place.settings.retries)
    run.made(entry, id=job_id)
    write_json(_job_file(run), {"id": job_id, "entry": entry})
    run.event("train", "job created", job=job_id, model=recipe.model)
    return job_id, entry


def _follow(run: Run, place: Place, job_id: str, tracker: Tracker) -> Any:
    """Look on until the job has ended; gives it."""
    seen = _Seen(run, tracker)
    away_since: float | None = None
    denied = 0
    while True:
        try:
            job = place.client.fine_tuning.jobs.retrieve(job_id)
            seen.take(place, job)
            away_since, denied = None, 0
            if job.status not in ("validating_files", "queued", "running", "paused", "pausing", "resuming"):
                return job
        except openai.NotFoundError as error:
            _job_file(run).unlink(missing_ok=True)
            said = f"the endpoint no longer knows job {job_id} ({calls.said(error)}); the same command makes another"
            raise StageError(said) from None
        except openai.OpenAIError as error:
            denied = denied + 1 if isinstance(error, openai.AuthenticationError) else 0
            passing = isinstance(error, openai.APIConnectionError | openai.InternalServerError | openai.RateLimitError)
            away_since = away_since or time.monotonic()
            if not (passing or 0 < denied <= DENIED) or time.monotonic() - away_since > AWAY_S:
                with calls.explained(f"looking at job {job_id}, which goes on over there"):
                    raise
            run.event("train", "endpoint away", said=calls.said(error))
        time.sleep(place.settings.poll_s)


class _Seen:
    """The events of a job that were seen, and what they became; a run that goes on sees none twice."""

    def __init__(self, run: Run, tracker: Tracker) -> None:
        self.run, self.tracker = run, tracker
        self.events = {one["id"] for one in run.events() if one["event"] == "job"}
        self.steps = {(entry["step"], "loss" in entry) for entry in run.metrics()}
        self.total = 0

    def take(self, place: Place, job: Any) -> None:
        fresh = []
        for event in place.client.fine_tuning.jobs.list_events(job.id, limit=100):  # the newest first
            if event.id in self.events:
                break
            fresh.append(event)
        for event in reversed(fresh):
            self.events.add(event.id)
            data = event.data if isinstance(event.data, dict) else {}
            if event.type == "metrics" and "step" in data:
                self._measured(data)
            said = calls.scrubbed(event.message)
            self.run.event("train", "job", id=event.id, level=event.level, message=said)
        done = max((step for step, _ in self.steps), default=0)
        self.run.set_progress("train", done, max(self.total, done, 1), job.status)

    def _measured(self, data: dict[str, Any]) -> None:
        step = int(data["step"])
        self.total = int(data.get("total_steps") or 0) or self.total
        values = {ours: data[theirs] for theirs, ours in RENAMED.items() if data.get(theirs) is not None}
        for learnt in (True, False):  # training and validation are entries of their own, as where we train
            part = {key: value for key, value in values.items() if key.startswith("eval_") != learnt}
            if part and (step, learnt) not in self.steps:
                self.steps.add((step, learnt))
                self.run.metrics_file.parent.mkdir(exist_ok=True)
                append_json(self.run.metrics_file, {"step": step, **part})
                self.tracker.metrics(part, step=step)


def _remember(run: Run, entry: str, *, ended: bool) -> None:
    """A job that has ended stands no more."""
    if ended and any(one["entry"] == entry and one["is"] != "gone" for one in run.resources()):
        run.gone(entry)


def _own(run: Run, kind: str, name: str) -> None:
    """Into the ledger, once: the API made it for us, and it is ours to remove."""
    if not any((one["kind"], one["name"]) == (kind, name) and one["is"] != "gone" for one in run.resources()):
        run.made(run.intend(kind, name), id=name)


def _failure(job: Any) -> UserError | StageError:
    if job.status == "cancelled":
        return StageError(f"job {job.id} was cancelled over there; the same command makes another")
    code, message = (getattr(job.error, key, None) or "" for key in ("code", "message"))
    said = calls.scrubbed(f"job {job.id} failed: {message or 'it does not say why'}" + (f" ({code})" if code else ""))
    if code.startswith(("invalid_training_file", "invalid_validation_file", "invalid_n_examples")):
        return DataError(said)
    return UserError(said) if code in ("exceeded_quota", "model_not_available", "invalid_model") else StageError(said)


def _manifest(run: Run, recipe: Recipe, job: Any) -> dict[str, Any]:
    losses = [entry["loss"] for entry in run.metrics() if "loss" in entry]
    settled = job.method.model_dump() if job.method is not None else {}
    return {
        "method": "hosted",
        "model": job.fine_tuned_model,
        "job": job.id,
        "base": job.model,
        "settled": settled,
        "steps": max((entry["step"] for entry in run.metrics()), default=None),
        "epochs": float(recipe.train.epochs),
        "examples": run.manifest("prepare")["splits"]["train"]["used"],
        "tokens": job.trained_tokens,
        "seconds": round(job.finished_at - job.created_at, 1) if job.finished_at else None,
        "resumed_from": None,
        "device": "hosted",
        "trainable_parameters": None,
        "parameters": None,
        "final_loss": losses[-1] if losses else None,
        "sha256": {},
    }


def _suffix(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9-]+", "-", name)[:18].strip("-") or "tuned"


def _job_file(run: Run) -> Any:
    return run.path / "jobs" / "hosted-job.json"
