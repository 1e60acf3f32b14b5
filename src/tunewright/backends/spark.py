"""A Spark cluster: data preparation, training and evaluation as Spark jobs whose driver is a child process here.

What is packaged and served stays on this machine. The run folder, the data and a local base lie on storage that the
executors see at the same path (NFS, a Databricks volume, one machine).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tunewright.backends.base import Bill, Job, Problem, Removal, Resource, Status
from tunewright.backends.local import LocalBackend, no_preflight, too_few_rows
from tunewright.recipe import Recipe
from tunewright.run import Run
from tunewright.spark.settings import settings

ON_SPARK = ("prepare", "train", "evaluate")
"""Stages that are Spark jobs."""
REACH_S = 5
PROBE_S = 240


class SparkBackend:
    """Stages as Spark jobs, started from this machine; packaging and serving on it."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.settings = settings(given)
        self.here = LocalBackend({"threads": self.settings.threads})

    def check(self, recipe: Recipe, stages: tuple[str, ...]) -> list[Problem]:
        problems = self.here.check(_alone(recipe), tuple(stage for stage in stages if stage not in ON_SPARK))
        if "train" in stages:
            problems += self._cannot_train(recipe)
            if recipe.train.preflight == "always":
                problems.append(Problem(no_preflight("Spark trains")))
        if found := self._absent():
            return problems + found
        return problems + self._probe() if set(stages) & set(ON_SPARK) else problems

    def device(self, recipe: Recipe) -> str | None:
        """What the executors compute on; None leaves it to this machine."""
        return "cuda" if self.settings.gpus and not recipe.train.use_cpu else "cpu"

    def bill(self, recipe: Recipe, plan: dict[str, Any]) -> Bill:
        makes = ("run folder", "Spark applications, one a stage", "endpoint process on this machine")
        return Bill(makes, 0.0, 0.0, "nothing beyond the cluster, which is there already")

    def submit(self, stage: str, run: Run) -> Job:
        return self.here.submit(stage, run, on="spark" if stage in ON_SPARK else "here")

    def poll(self, job: Job, run: Run) -> Status:
        return self.here.poll(job, run)

    def collect(self, job: Job, run: Run) -> None:
        """Nothing to bring: the executors wrote into the run folder."""

    def cancel(self, job: Job, run: Run) -> None:
        self.here.cancel(job, run)

    def find(self, run: Run) -> list[Resource]:
        return self.here.find(run)

    def remove(self, resource: Resource, run: Run) -> Removal:
        return self.here.remove(resource, run)

    def deploy(self, run: Run) -> dict[str, Any]:
        return self.here.deploy(run)

    def serving(self, run: Run) -> bool:
        return self.here.serving(run)

    def undeploy(self, run: Run) -> None:
        self.here.undeploy(run)

    def rendered(self, run: Run, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[int]:
        return self.here.rendered(run, messages, tools)

    def _cannot_train(self, recipe: Recipe) -> list[Problem]:
        problems = []
        processes = self.settings.processes
        rows = recipe.train.batch_size * recipe.train.gradient_accumulation_steps
        if processes > 1 and recipe.task in ("preference", "reward"):
            problems.append(Problem(f"backend.processes: task: {recipe.task} trains in one process; leave it out"))
        elif processes > rows:
            problems.append(Problem(too_few_rows(processes, rows)))
        if recipe.train.fsdp and processes == 1:
            problems.append(Problem("train.fsdp shards the weights over processes, and backend.processes is 1"))
        return problems

    def _absent(self) -> list[Problem]:
        """What is missing here, found without starting anything."""
        asked = self.settings
        if importlib.util.find_spec("pyspark") is None:
            return [Problem("backend.kind: spark needs PySpark; pip install 'tunewright[spark]'")]
        if shutil.which("java") is None and not os.environ.get("JAVA_HOME"):
            return [Problem("backend.kind: spark needs Java 17 or newer here, for the driver; install it (a JRE does)")]
        if asked.archive and not _is_elsewhere(asked.archive) and not Path(asked.archive).is_file():
            return [Problem(f"backend.archive: {asked.archive}: no such file; pack one with venv-pack or conda-pack")]
        found = re.match(r"spark://([^,]+)$", asked.master or "")
        if found:
            host, _, port = found.group(1).rpartition(":")
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
            except (OSError, ValueError) as error:
                return [Problem(f"backend.master: {asked.master} does not answer ({error}); is the cluster running?")]
        return []

    def _probe(self) -> list[Problem]:
        """Start a session on the cluster and ask: do the executors run us, with our versions, in enough slots?"""
        table = self.settings.model_dump(exclude_defaults=True)
        try:
            said = subprocess.run(
                [sys.executable, "-m", "tunewright.spark.probe", json.dumps(table)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=PROBE_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return [
                Problem(
                    f"backend.master: {self.settings.master or 'the default master'} gave no executor in {PROBE_S} s; "
                    "is the cluster busy, or without workers?"
                )
            ]
        try:
            found: dict[str, Any] = json.loads(said.stdout.strip().splitlines()[-1])
        except (IndexError, ValueError):
            last = (said.stderr.strip().splitlines() or ["it said nothing"])[-1]
            return [Problem(f"backend: asking the cluster failed: {last}")]
        return [Problem(one) for one in found["problems"]]


def _alone(recipe: Recipe) -> Recipe:
    """The recipe without what is for several processes, which the local backend has a word on."""
    train = recipe.train
    keys = {key for key in train.model_fields_set if key.startswith("ddp_")} | {"fsdp"}
    kept = {key: getattr(train, key) for key in train.model_fields_set - keys}
    return recipe.model_copy(update={"train": type(train).model_construct(**kept)})


def _is_elsewhere(path: str) -> bool:
    return ":" in path.partition("/")[0]
