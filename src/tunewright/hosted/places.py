"""OpenAI and Azure behind one face: which model is asked, what stands because of a run, and how it is removed.

Whatever is made carries the run: files and deployments in their name, jobs in their metadata, tuned models by the job
that made them. What carries it not is never touched.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from typing import Any, Literal, TypeVar

import openai

from tunewright.hosted import calls
from tunewright.hosted.settings import AzureSettings, OpenAISettings, Settings
from tunewright.recipe import backend_settings
from tunewright.run import Run

TAG = "tunewright-run"
ACTIVE = ("validating_files", "queued", "running", "paused", "pausing", "resuming")
STOP_S = 60
"""How long a job is given to end."""
FILE, JOB, MODEL = "hosted-file", "hosted-job", "hosted-model"
One = TypeVar("One")
Facts = dict[str, Any]


class Place:
    """An API that trains and answers; `settings` are those of the recipe."""

    settings: Settings
    client: openai.OpenAI

    def model(self, run: Run, name: Literal["tuned", "base"]) -> str:
        """What chat completions call a model of the run; it is made ready first where that takes something."""
        return tuned_model(run) if name == "tuned" else run.recipe().model

    def prepare(self, run: Run) -> None:
        """Make what the first call needs to be there."""

    def answers(self, run: Run) -> bool:
        """Whether the tuned model can be asked."""
        try:
            self.client.models.retrieve(tuned_model(run))
        except openai.NotFoundError:
            return False
        return True

    def undeploy(self, run: Run) -> None:
        """Let go of what serves the tuned model, where it costs by the hour."""

    def job_options(self) -> dict[str, Any]:
        """What else a job is created with."""
        return {}

    def once(self) -> openai.OpenAI:
        """A client that repeats nothing by itself, for calls that make something."""
        return self.client.with_options(max_retries=0)

    # --- what stands ---

    def standing(self, run: Run) -> Iterator[tuple[tuple[str, str], Facts]]:
        """What carries this run there: (kind, name) and facts."""
        jobs = list(self.jobs_of(run))
        results = {one for job in jobs for one in job.result_files or ()}
        for file in self.client.files.list():
            if file.filename.startswith(prefix(run)) or file.id in results:
                name = file.id if file.id in results else file.filename
                yield (FILE, name), {"name": name, "id": file.id, "state": "there", "since_ms": 1000 * file.created_at}
        for job in jobs:
            if job.status in ACTIVE:
                facts = {"name": job_name(run, job), "id": job.id, "state": job.status}
                yield (JOB, facts["name"]), facts | {"since_ms": 1000 * job.created_at}
        tuned = tuple(job.fine_tuned_model for job in jobs if job.fine_tuned_model)
        tuned += tuple(one["name"] for one in run.resources() if one["kind"] == MODEL)
        if tuned:
            for model in self.client.models.list():
                if model.id in tuned or model.id.startswith(tuple(f"{one}:ckpt-step-" for one in tuned)):
                    yield (MODEL, model.id), {"name": model.id, "state": "there", "since_ms": 1000 * model.created}

    def remove(self, run: Run, kind: str, name: str, facts: Facts) -> Literal["gone", "going"]:
        if kind == FILE:
            for file in self.client.files.list():
                if name in (file.id, file.filename) and (file.filename.startswith(prefix(run)) or file.id == name):
                    gone(partial(self.client.files.delete, file.id))
        elif kind == JOB:
            for job in self.jobs_of(run):
                if job_name(run, job) == name and job.status in ACTIVE:
                    return self.cancel(job.id)
        elif kind == MODEL:
            gone(lambda: self.client.models.delete(name))
        else:
            raise ValueError(kind)
        return "gone"

    def cancel(self, job_id: str) -> Literal["gone", "going"]:
        """End a job, and remove what it may have made just before; `going` where it takes its time."""
        with contextlib.suppress(openai.BadRequestError):  # it ended by itself meanwhile
            self.client.fine_tuning.jobs.cancel(job_id)
        deadline = time.monotonic() + STOP_S
        while (job := self.client.fine_tuning.jobs.retrieve(job_id)).status in ACTIVE:
            if time.monotonic() > deadline:
                return "going"
            time.sleep(min(2.0, self.settings.poll_s))
        if job.fine_tuned_model:
            gone(partial(self.client.models.delete, job.fine_tuned_model))
        for file in job.result_files or ():
            gone(partial(self.client.files.delete, file))
        return "gone"

    def jobs_of(self, run: Run) -> Iterable[Any]:
        return (job for job in self.client.fine_tuning.jobs.list(limit=100) if (job.metadata or {}).get(TAG) == run.id)


class OpenAIPlace(Place):
    """OpenAI's own endpoint, or one that speaks like it."""

    def __init__(self, settings: OpenAISettings) -> None:
        self.settings: OpenAISettings = settings

    @cached_property
    def client(self) -> openai.OpenAI:  # type: ignore[override]
        asked = self.settings
        key = calls.secret(asked.key_variable)
        made = calls.client(asked.base_url, key, asked, organization=asked.organization, project=asked.project)
        weakref.finalize(self, made.close)
        return made


def of(run: Run) -> Place:
    """The place that a run's recipe names."""
    chosen = run.recipe().backend
    table = chosen.model_extra or {}
    if chosen.kind == "azure":
        from tunewright.hosted.azure import AzurePlace

        return AzurePlace(backend_settings(AzureSettings, "azure", table))
    return OpenAIPlace(backend_settings(OpenAISettings, "openai", table))


def tuned_model(run: Run) -> str:
    name: str = run.manifest("train")["model"]
    return name


def prefix(run: Run) -> str:
    """What the names of a run's files begin with."""
    return f"tunewright-{run.id}-"


def job_name(run: Run, job: Any) -> str:
    return f"fine-tuning {run.id} {(job.metadata or {}).get('tunewright-attempt', '0')}"


def gone(call: Callable[[], Any]) -> None:
    """Remove something; absent is gone."""
    with contextlib.suppress(openai.NotFoundError):
        call()
