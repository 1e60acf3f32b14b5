"""This machine: each stage is a child process, and the endpoint is one that stays.

A child lives in a session of its own, so killing the command that started it does not kill training: the same command
again finds it and looks on. Ctrl-C does stop it, at the end of a step, with a checkpoint.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel, ConfigDict, Field

from tunewright import errors, ranks
from tunewright.backends.base import Bill, Job, Problem, Removal, Resource, Status
from tunewright.errors import DataError, EndpointError, StageError
from tunewright.recipe import Recipe, backend_settings
from tunewright.run import Run, now, read_json, write_json, write_text

CANCEL_S = 60
"""How long a stage has to finish its step and write a checkpoint before it is killed."""
START_S = 300
"""How long an endpoint has to load its weights."""
RENDER_S = 60
"""How long an endpoint has to make ids of a conversation."""

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Loopback is never asked through a proxy."""
STARTED: dict[int, subprocess.Popen[bytes]] = {}
"""Children of this process: kept so that an ended one can be reaped, and a running one may outlive its backend."""


class Settings(BaseModel):
    """The rest of the recipe's `backend` table."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    threads: int | None = Field(default=None, ge=1)
    """Threads for arithmetic. Default: as many as the libraries take."""
    processes: int = Field(default=1, ge=1)
    """Processes that train together, one for each GPU (or, without one, sharing the cores). They share out the rows of
    a step (`train.batch_size`), so their number changes how long training takes, not what is learnt."""


class LocalBackend:
    """Stages as child processes of this machine."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = backend_settings(Settings, "local", settings)

    def check(self, recipe: Recipe, stages: tuple[str, ...]) -> list[Problem]:
        problems = []
        if self.settings.processes > 1 and recipe.task in ("preference", "reward"):
            problems.append(Problem(f"backend.processes: task: {recipe.task} trains in one process; leave it out"))
        elif self.settings.processes > (rows := recipe.train.batch_size * recipe.train.gradient_accumulation_steps):
            problems.append(Problem(too_few_rows(self.settings.processes, rows)))
        if self.settings.processes > 1 and recipe.train.preflight == "always":
            problems.append(Problem(no_preflight(f"backend.processes is {self.settings.processes}")))
        if self.settings.processes == 1:
            if recipe.train.fsdp:
                problems.append(
                    Problem(
                        "train.fsdp shards the weights over several processes, and backend.processes is 1; set it to "
                        "the number of GPUs, or leave out fsdp"
                    )
                )
            problems += [
                Problem(f"train.{key} is for several processes, and backend.processes is 1; leave it out")
                for key in sorted(recipe.train.model_fields_set)
                if key.startswith("ddp_")
            ]
        if "deploy" in stages:
            if recipe.deploy.content_filter != "off":
                problems.append(
                    Problem(
                        f"deploy.content_filter: {recipe.deploy.content_filter}: the local endpoint has no content "
                        "filter yet, answers are served as they are",
                        "warning",
                    )
                )
            port = recipe.deploy.port
            if port and not _is_free(recipe.deploy.host, port):
                problems.append(Problem(_busy(recipe.deploy.host, port)))
        return problems

    def bill(self, recipe: Recipe, plan: dict[str, Any]) -> Bill:
        return Bill(("run folder", "endpoint process on this machine"), 0.0, 0.0, "runs on this machine")

    def submit(self, stage: str, run: Run, *, on: str = "here") -> Job:
        """Asked for more by the backends that start their stages from this machine: `on` is what `work` is told."""
        alive = _process(run, stage) or _adopt(run, stage)
        if alive is None:
            run.failure_file(stage).unlink(missing_ok=True)
            run.progress_file(stage).unlink(missing_ok=True)
            if stage == "train":
                shutil.rmtree(ranks.folder(run), ignore_errors=True)
            alive = self._start(stage, run, [stage, str(run.path), *(() if on == "here" else ("--on", on))])
        return Job(stage, str(alive.pid))

    def poll(self, job: Job, run: Run) -> Status:
        if (process := _process(run, job.stage)) is not None and process.pid == int(job.id):
            return Status("running")
        if (child := STARTED.pop(int(job.id), None)) is not None:
            child.wait(CANCEL_S)  # it has ended; only its last threads are still leaving
        if run.manifest_file(job.stage).is_file():
            return Status("done")
        if run.failure_file(job.stage).is_file():
            failure = read_json(run.failure_file(job.stage))
            if failure["kind"] == "Interrupted":
                return Status("cancelled", message=failure["message"])
            return Status("failed", failure["kind"], failure["message"])
        return Status("lost")

    def collect(self, job: Job, run: Run) -> None:
        """Nothing to bring: the child wrote into the run folder."""

    def cancel(self, job: Job, run: Run) -> None:
        _stop(_process(run, job.stage))
        run.job_file(job.stage).unlink(missing_ok=True)

    def find(self, run: Run) -> list[Resource]:
        recorded = [
            Resource(entry["kind"], entry["name"], entry, entry["entry"])
            for entry in run.resources()
            if entry["is"] != "gone"
        ]
        pids = {resource.facts.get("pid") for resource in recorded}
        strays = [
            Resource("process", f"{stage} of {run.id}", {"pid": process.pid, "stage": stage})
            for process, stage in _processes_of(run)
            if process.pid not in pids
        ]
        return recorded + strays

    def remove(self, resource: Resource, run: Run) -> Removal:
        if resource.kind != "process":
            raise StageError(f"the local backend does not remove a {resource.kind}")
        stage = resource.facts["stage"]
        _stop(_process(run, stage))
        for process, its_stage in _processes_of(run):
            if its_stage == stage:
                _stop(process)
        return "gone"

    def deploy(self, run: Run) -> dict[str, Any]:
        recipe = run.recipe()
        host = recipe.deploy.host
        if (alive := _process(run, "deploy")) is not None:
            if self.serving(run):
                return _endpoint(run, read_json(run.job_file("deploy")))
            _stop(alive)
        for process, stage in _processes_of(run):
            if stage == "deploy":
                _stop(process)
        for left in run.resources():
            if left["kind"] == "process" and left["is"] != "gone":
                run.gone(left["entry"])  # an endpoint that died, or that the machine's restart ended
        port = recipe.deploy.port or _free_port(host)
        if not _is_free(host, port):
            raise EndpointError(_busy(host, port))
        for key_file, prefix in ((run.key_file, "tw"), (run.test_key_file, "tw-test")):
            if not key_file.is_file():
                write_text(key_file, f"{prefix}-{secrets.token_urlsafe(24)}\n", mode=0o600)
        run.failure_file("deploy").unlink(missing_ok=True)
        entry = run.intend("process", f"endpoint {recipe.endpoint_name}", stage="deploy", port=port)
        base_url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        words = ["serve", str(run.path), "--host", host, "--port", str(port)]
        process = self._start("deploy", run, words, base_url=base_url, entry=entry)
        run.made(entry, pid=process.pid, base_url=base_url)
        job = read_json(run.job_file("deploy"))
        deadline = time.monotonic() + START_S
        try:
            while not _answers(job):
                if _process(run, "deploy") is None:
                    raise _failure(run, "deploy")
                if time.monotonic() > deadline:
                    raise StageError(f"the endpoint did not answer within {START_S} s; see {run.log_file('deploy')}")
                time.sleep(0.1)
        except BaseException:  # Ctrl-C too: nothing half-started stays
            self.undeploy(run)
            run.gone(entry)
            raise
        return _endpoint(run, job)

    def serving(self, run: Run) -> bool:
        return _process(run, "deploy") is not None and _answers(read_json(run.job_file("deploy")))

    def undeploy(self, run: Run) -> None:
        _stop(_process(run, "deploy"))
        run.job_file("deploy").unlink(missing_ok=True)

    def rendered(self, run: Run, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[int]:
        url = f"{read_json(run.job_file('deploy'))['base_url'].removesuffix('/v1')}/tokenize"
        asked = {"model": run.recipe().endpoint_name, "messages": messages, **({"tools": tools} if tools else {})}
        headers = {"authorization": f"Bearer {run.test_key_file.read_text().strip()}"}
        try:
            with DIRECT.open(
                urllib.request.Request(url, json.dumps(asked).encode(), headers), timeout=RENDER_S
            ) as reply:
                ids: list[int] = json.load(reply)["tokens"]
        except urllib.error.HTTPError as error:
            with error:
                said = error.read().decode(errors="replace")
            if error.code != http.HTTPStatus.BAD_REQUEST:
                raise StageError(f"{url}: {error.code}: {said[:500]}; see {run.log_file('deploy')}") from None
            raise DataError(str(json.loads(said)["error"]["message"])) from None
        except (OSError, http.client.HTTPException) as error:
            raise StageError(f"{url} did not answer: {error}; see {run.log_file('deploy')}") from error
        return ids

    def _start(self, stage: str, run: Run, arguments: list[str], **facts: str) -> psutil.Process:
        # Threads that spin while they wait make training several times slower when anything else is busy on the
        # machine (docs/benchmarks.md); sleeping costs next to nothing when nothing else is.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", "THP_MEM_ALLOC_ENABLE": "1"} | dict(os.environ)
        if self.settings.threads:
            environment |= {
                "OMP_NUM_THREADS": str(self.settings.threads),
                "MKL_NUM_THREADS": str(self.settings.threads),
            }
        log = run.log_file(stage)
        log.parent.mkdir(parents=True, exist_ok=True)
        together = ["torch.distributed.run", "--standalone", f"--nproc-per-node={self.settings.processes}", "-m"]
        with log.open("ab") as output:
            child = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    *(together if stage == "train" and self.settings.processes > 1 else []),
                    "tunewright.work",
                    *arguments,
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        STARTED[child.pid] = child
        process = psutil.Process(child.pid)
        job = {"pid": child.pid, "created": process.create_time(), "at": now(), "stage": stage, **facts}
        write_json(run.job_file(stage), job)
        return process


def no_preflight(why: str) -> str:
    return (
        f"train.preflight: always: {why}, and a preflight is for one process of this machine; leave it out, "
        "`tunewright check --try` does it before"
    )


def too_few_rows(processes: int, rows: int) -> str:
    """What to say where there are more processes than rows to share out."""
    return (
        f"backend.processes: {processes} processes share out the rows of a step, and a step has {rows} "
        "(train.batch_size x train.gradient_accumulation_steps); lower the one or raise the other"
    )


def _endpoint(run: Run, job: dict[str, Any]) -> dict[str, Any]:
    recipe = run.recipe()
    return {
        "base_url": job["base_url"],
        "model": recipe.endpoint_name,
        "key_file": str(run.key_file),
        "pid": job["pid"],
        "entry": job["entry"],
        "tokens_per_minute": recipe.deploy.tokens_per_minute,
        "content_filter": "none",
    }


def _process(run: Run, stage: str) -> psutil.Process | None:
    """The stage's process, if it is still that process and still runs."""
    if not run.job_file(stage).is_file():
        return None
    job = read_json(run.job_file(stage))
    if (child := STARTED.get(job["pid"])) is not None:
        child.poll()
    try:
        process = psutil.Process(job["pid"])
        same = abs(process.create_time() - job["created"]) < 2  # the clock behind it may be set a little
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _adopt(run: Run, stage: str) -> psutil.Process | None:
    """A process of this stage that no job file names: the command was killed just after it had started it."""
    for process, its_stage in _processes_of(run):
        if its_stage == stage and process.pid != os.getpid():
            write_json(run.job_file(stage), {"pid": process.pid, "created": process.create_time(), "stage": stage})
            return process
    return None


def _processes_of(run: Run) -> list[tuple[psutil.Process, str]]:
    """Every process on this machine that works for this run, whether or not a job file names it."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "tunewright.work" in words and any(Path(word).resolve() == run.path.resolve() for word in words[-6:]):
            stage = words[words.index("tunewright.work") + 1]
            found.append((process, "deploy" if stage == "serve" else stage))
    return found


def _stop(process: psutil.Process | None) -> None:
    """End a process: politely, then not."""
    if process is None:
        return
    try:
        process.send_signal(signal.SIGTERM)
        try:
            _wait(process, CANCEL_S)
        except psutil.TimeoutExpired:
            process.kill()
            _wait(process, 10)
    except psutil.NoSuchProcess:
        return


def _wait(process: psutil.Process, timeout_s: float) -> None:
    """Until a process has ended; reaps it where it is our child."""
    child = STARTED.pop(process.pid, None)
    if child is None:
        process.wait(timeout_s)
        return
    try:
        child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        STARTED[process.pid] = child
        raise psutil.TimeoutExpired(timeout_s, process.pid) from None


def _failure(run: Run, stage: str) -> errors.TunewrightError:
    if run.failure_file(stage).is_file():
        failure = read_json(run.failure_file(stage))
        return errors.from_name(failure["kind"], failure["message"])
    return StageError(f"{stage} ended without saying why; see {run.log_file(stage)}")


def _answers(job: dict[str, Any]) -> bool:
    """Whether the endpoint of a job answers: that very process, not another that came to have its port."""
    try:
        with DIRECT.open(f"{job['base_url'].removesuffix('/v1')}/healthz", timeout=5) as reply:
            said = json.load(reply)
    except (OSError, http.client.HTTPException, ValueError):
        return False
    return isinstance(said, dict) and said.get("pid") == job["pid"]


def _busy(host: str, port: int) -> str:
    return f"deploy.port: {port} on {host} is in use; set another, or leave it out for any free one"


def _is_free(host: str, port: int) -> bool:
    try:
        with _socket(host) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError:
        return False
    return True


def _free_port(host: str) -> int:
    try:
        with _socket(host) as probe:
            probe.bind((host, 0))
            port: int = probe.getsockname()[1]
            return port
    except OSError as error:
        raise EndpointError(f"deploy.host: {host} is not an address of this machine ({error.strerror})") from None


def _socket(host: str) -> socket.socket:
    family, *_ = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    return socket.socket(family, socket.SOCK_STREAM)
