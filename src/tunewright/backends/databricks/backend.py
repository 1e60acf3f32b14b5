"""Stages as jobs: what is made, handed over, looked at, brought back and removed. Start reading at `submit`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tunewright import prices, shipping
from tunewright import recipe as recipes
from tunewright.backends.base import ABSENT, Bill, Job, Problem, Removal, Resource, Status
from tunewright.backends.databricks.calls import explained, gone
from tunewright.backends.databricks.inputs import SPLITS, Inputs
from tunewright.backends.databricks.settings import Settings
from tunewright.backends.databricks.volume import Volume
from tunewright.backends.databricks.workspace import Workspace
from tunewright.data import sources
from tunewright.errors import EndpointError, StageError, UserError
from tunewright.recipe import Recipe, backend_settings
from tunewright.run import MANIFESTS, Run, append_json, read_json, read_json_lines, write_json

TAG = "tunewright-run"
AWAY_S = 900
"""How long a workspace may be away before a job that runs there is given up (it is not lost: ask again)."""
STOP_S = 60
ENDPOINT_S = 3600
ENDED = ("TERMINATED", "SKIPPED", "INTERNAL_ERROR")
FOLDERS = {"prepare": ("data",), "train": ("train",), "evaluate": ("evaluate",), "package": ("package",)}
"""What a stage leaves, and is brought here."""
STAYS = ("train/checkpoints/",)
"""What stays on the volume, where a stage that goes on finds it."""


class DatabricksBackend:
    """Stages as jobs in a Databricks workspace."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.settings = backend_settings(Settings, "databricks", given)
        self.workspace = Workspace(self.settings)
        self.volume = Volume(lambda: self.workspace.client.files)
        self.looked: dict[str, tuple[float, Status]] = {}
        self.away_since: float | None = None

    # --- before anything is made ---

    def check(self, recipe: Recipe, stages: tuple[str, ...]) -> list[Problem]:
        problems = []
        rows = recipe.train.batch_size * recipe.train.gradient_accumulation_steps
        if self.settings.processes > rows:
            problems.append(
                Problem(f"backend.processes: {self.settings.processes} share out a step's rows, and it has {rows}")
            )
        if self.settings.processes > 1 and recipe.task in ("preference", "reward"):
            problems.append(Problem(f"backend.processes: task: {recipe.task} trains in one process; leave it out"))
        if "deploy" in stages and recipe.tracking.enabled is False:
            said = "deploy: an endpoint serves a registered model, and tracking.enabled is false; use --until package"
            problems.append(Problem(said, "warning"))
        if "deploy" in stages and recipe.tracking.enabled and recipe.deploy.content_filter != "off":
            problems.append(
                Problem("deploy.content_filter: the endpoint has none of ours; answers are as they are", "warning")
            )
        if self.settings.threads and self.settings.cluster:
            said = "backend.threads: a cluster that is there already has its own environment; leave one of them out"
            problems.append(Problem(said))
        for look in self.workspace.looks():
            try:
                look()
            except UserError as error:
                problems.append(Problem(str(error)))
                if look == self.workspace.me:  # nothing else can be known
                    break
        return problems

    def bill(self, recipe: Recipe, plan: dict[str, Any]) -> Bill:
        """Nobody knows before how long a cluster will run, so its price an hour is all that is said."""
        asked = self.settings
        makes = ["run folder", f"folder in volume {asked.volume}", "jobs, one a stage"]
        if asked.create_volume and not self.workspace.volume_there():
            makes.append(f"volume {asked.volume}")
        makes.append("serving endpoint that sleeps when nobody asks" if recipe.tracking.enabled else "no endpoint")
        if asked.cluster:
            return Bill(tuple(makes), None, None, f"cluster {asked.cluster} and the endpoint while they run")
        node, nodes = self.workspace.node(), 1 + asked.workers
        idle = f"ends after {asked.autotermination_minutes} idle minutes"
        makes.insert(1, f"cluster of {nodes} {node}, {idle}")
        rate = prices.of_cluster(prices.read(), node, nodes)
        said = "at a price not in the table" if rate is None else f"{rate[0]:.2f} to {rate[1]:.2f} USD an hour"
        return Bill(tuple(makes), None, None, f"the cluster while it runs, {said}, and the endpoint while it is awake")

    def device(self, recipe: Recipe) -> str | None:
        return "cuda" if self.settings.gpus and not recipe.train.use_cpu else "cpu"

    def tracking(self, recipe: Recipe) -> tuple[str, str]:
        """MLflow over there; experiments are named by a path in the workspace."""
        name = recipe.tracking.experiment
        return "databricks", name if name.startswith("/") else f"/Users/{self.workspace.me()}/{name}"

    # --- a stage ---

    def submit(self, stage: str, run: Run) -> Job:
        if run.job_file(stage).is_file():
            known = read_json(run.job_file(stage))
            if self._state(int(known["run_id"])) == "active":
                return Job(stage, str(known["run_id"]))
        run.failure_file(stage).unlink(missing_ok=True)
        run.progress_file(stage).unlink(missing_ok=True)
        with explained("submitting the job"):
            self._make_volume(run)
            cluster = self._make_cluster(run)
            wheel = self._upload(stage, run)
            return self._start(stage, run, cluster, wheel)

    def poll(self, job: Job, run: Run) -> Status:
        at, status = self.looked.get(job.id, (-1e9, Status("running")))
        if status.state == "running" and time.monotonic() - at < self.settings.poll_s:
            return status
        try:
            status = self._look(job, run)
            self.away_since = None
        except (UserError, StageError) as error:
            self.away_since = self.away_since or time.monotonic()
            if time.monotonic() - self.away_since > AWAY_S:
                raise
            run.event(job.stage, "workspace away", said=str(error))
            status = Status("running")
        self.looked[job.id] = (time.monotonic(), status)
        return status

    def collect(self, job: Job, run: Run) -> None:
        with explained("bringing the results"):
            self._bring(run, job.stage)

    def cancel(self, job: Job, run: Run) -> None:
        if not run.job_file(job.stage).is_file():
            return
        known = int(read_json(run.job_file(job.stage))["run_id"])
        with explained("cancelling the job"):
            if self._state(known) == "active" and job.stage == "train":
                self.volume.put(f"{self._home(run)}/jobs/ranks/stop", b"")  # a checkpoint at the end of the step
                self._wait_for_end(known, STOP_S / 2)
            if self._state(known) == "active":
                self.workspace.client.jobs.cancel_run(known)
                self._wait_for_end(known, STOP_S)
            self._bring_ledger(run)
        run.job_file(job.stage).unlink(missing_ok=True)

    # --- what stands ---

    def find(self, run: Run) -> list[Resource]:
        """The ledger's, each as it is over there, and what carries this run's name there and is not in the ledger."""
        with explained("looking for what stands"):
            self._bring_ledger(run)
            recorded = {
                (one["kind"], str(one["name"])): Resource(one["kind"], one["name"], one, one["entry"])
                for one in run.resources()
                if one["is"] != "gone"
            }
            there = dict(self._standing(run))
        known = [
            Resource(one.kind, one.name, one.facts | there.get(key, _absent(one.kind)), one.entry)
            for key, one in recorded.items()
        ]
        unrecorded = [Resource(key[0], facts["name"], facts) for key, facts in there.items() if key not in recorded]
        return known + unrecorded

    def remove(self, resource: Resource, run: Run) -> Removal:
        kind, facts = resource.kind, resource.facts
        with explained(f"removing {kind} {resource.name}"):
            if kind == "databricks-cluster":
                for cluster in self._clusters_of(run):
                    self.workspace.client.clusters.permanent_delete(cluster.cluster_id)
            elif kind == "databricks-job":
                for known in self._runs_of(run, facts.get("stage")):
                    self.workspace.client.jobs.cancel_run(known)
                    if not self._wait_for_end(known, STOP_S):
                        return "going"
                    self.workspace.client.jobs.delete_run(known)
            elif kind == "databricks-endpoint":
                self._remove_endpoint(run)
            elif kind == "databricks-folder":
                self.volume.remove_folder(self._home(run))
                self.volume.remove_if_empty(self._all_runs())
            elif kind == "databricks-volume":
                return self._remove_volume(run)
            else:
                raise StageError(f"the databricks backend does not remove a {kind}")
        return "gone"

    # --- serving ---

    def deploy(self, run: Run) -> dict[str, Any]:
        from databricks.sdk.service import serving

        logged = run.manifest("package").get("mlflow")
        if not logged:
            said = "no model is registered; package with tracking.enabled and package.formats: [safetensors, mlflow]"
            raise EndpointError(f"{run.path}: {said}")
        entity, _, version = logged.removeprefix("models:/").rpartition("/")
        name = self._endpoint_name(run)
        with explained(f"making endpoint {name}"):
            endpoint = self._endpoint(name)
            if endpoint is not None and not self._is_ours(endpoint, run):
                raise EndpointError(f"the workspace has an endpoint {name} that is not of this run; remove it first")
            if endpoint is None:
                entry = run.intend("databricks-endpoint", name)
                self.workspace.client.serving_endpoints.create(
                    name,
                    config=serving.EndpointCoreConfigInput(
                        name=name,
                        served_entities=[
                            serving.ServedEntityInput(
                                name="tuned",
                                entity_name=entity,
                                entity_version=version,
                                scale_to_zero_enabled=True,
                                workload_size=self.settings.workload_size,
                            )
                        ],
                    ),
                    tags=[serving.EndpointTag(key, value) for key, value in self._tags(run).items()],
                )
                run.made(entry)
            self._wait_for_endpoint(name)
        return {
            "base_url": f"{self.workspace.client.config.host}/serving-endpoints/{name}/invocations",
            "model": name,
            "entity": entity,
            "version": version,
            "tokens_per_minute": None,
            "content_filter": "none",
        }

    def serving(self, run: Run) -> bool:
        with explained("looking at the endpoint"):
            endpoint = self._endpoint(self._endpoint_name(run))
        return endpoint is not None and self._is_ours(endpoint, run) and _is_ready(endpoint)

    def undeploy(self, run: Run) -> None:
        with explained("removing the endpoint"):
            self._remove_endpoint(run)

    def answer(self, run: Run, messages: list[dict[str, str]], room: int | None) -> tuple[str, int]:
        """The endpoint's answer to a conversation, and no count of tokens: MLflow's models say none."""
        with explained("asking the endpoint"):
            said = self.workspace.client.api_client.do(
                "POST",
                f"/serving-endpoints/{self._endpoint_name(run)}/invocations",
                body={
                    "dataframe_records": [{"messages": messages, "text": None}],
                    **({} if room is None else {"params": {"max_new_tokens": room}}),
                },
            )
        first = (said.get("predictions") or [None])[0]
        if not isinstance(first, dict) or "prediction" not in first:
            raise StageError(f"the endpoint gave no prediction: {first!r}")
        return str(first["prediction"]), 0

    # --- making things ---

    def _make_volume(self, run: Run) -> None:
        from databricks.sdk.service import catalog

        if self.workspace.volume_there():
            return
        name = self.settings.volume
        entry = run.intend("databricks-volume", name)
        catalog_name, schema, volume = name.split(".")
        self.workspace.client.volumes.create(
            catalog_name, schema, volume, catalog.VolumeType.MANAGED, comment=self._volume_comment(run)
        )
        run.made(entry)

    def _make_cluster(self, run: Run) -> str:
        """The cluster's id: one of the user's, the run's own, or a new one."""
        if (existing := self.workspace.existing()) is not None:
            return existing
        for cluster in self._clusters_of(run):
            if str(cluster.state.value) not in ("TERMINATING", "ERROR"):
                return str(cluster.cluster_id)
        from databricks.sdk.service import compute

        asked = self.settings
        single = {"spark.databricks.cluster.profile": "singleNode", "spark.master": "local[*]"}
        for stale in run.resources():
            if stale["kind"] == "databricks-cluster" and stale["is"] != "gone":
                run.gone(stale["entry"])  # it ended and was forgotten there
        entry = run.intend("databricks-cluster", self._cluster_name(run))
        made = self.workspace.client.clusters.create(
            self.workspace.runtime(),
            cluster_name=self._cluster_name(run),
            node_type_id=self.workspace.node(),
            num_workers=asked.workers,
            autotermination_minutes=asked.autotermination_minutes,
            data_security_mode=compute.DataSecurityMode(asked.access_mode),
            single_user_name=self.workspace.me() if asked.access_mode == "SINGLE_USER" else None,
            policy_id=self.workspace.policy_id(),
            spark_env_vars=_threads(asked.threads),
            runtime_engine=compute.RuntimeEngine.STANDARD,
            spark_conf=single if asked.workers == 0 else {},
            custom_tags={**({"ResourceClass": "SingleNode"} if asked.workers == 0 else {}), **self._tags(run)},
        )
        cluster_id = str(made.response.cluster_id)
        run.made(entry, cluster_id=cluster_id, node_type=self.workspace.node(), workers=asked.workers)
        return cluster_id

    def _upload(self, stage: str, run: Run) -> str:
        """What the stage needs over there; gives the wheel's place."""
        home = self._home(run)
        if not any(one["kind"] == "databricks-folder" and one["is"] != "gone" for one in run.resources()):
            entry = run.intend("databricks-folder", home)
            self.workspace.client.files.create_directory(home)
            run.made(entry)
        there = self.volume.files(home)
        inputs = Inputs(self.volume, home, there)
        recipe, resolved = inputs.moved(run.recipe(), run.resolved())
        for name, content in (
            ("recipe.yaml", recipes.dump(self._registered(recipe, resolved)).encode()),
            ("resolved.json", json.dumps(resolved, indent=1).encode()),
            ("state.json", run.state_file.read_bytes()),
            ("plan.json", run.manifest_file("plan").read_bytes()),
        ):
            self.volume.put(f"{home}/{name}", content)
        for left in (f"jobs/{stage}-failure.json", f"jobs/{stage}-progress.json", "jobs/ranks/stop"):
            if f"{home}/{left}" in there:
                gone(partial(self.workspace.client.files.delete, f"{home}/{left}"))
        return inputs.wheel()

    def _registered(self, recipe: Recipe, resolved: dict[str, Any]) -> Recipe:
        """The recipe with the name of the registered model in Unity Catalog, in three parts."""
        if recipe.package.register_as is not None or not resolved["tracking"]["uri"].startswith("databricks"):
            return recipe
        catalog, schema, _ = self.settings.volume.split(".")
        name = f"{catalog}.{schema}.{recipe.name.replace('-', '_')}"
        return recipe.model_copy(update={"package": recipe.package.model_copy(update={"register_as": name})})

    def _start(self, stage: str, run: Run, cluster: str, wheel: str) -> Job:
        from databricks.sdk.service import compute, jobs

        name = f"tunewright {stage} {run.id}"
        earlier = [one for one in run.resources() if one["kind"] == "databricks-job" and one.get("stage") == stage]
        open_one = next((one for one in earlier if one["is"] == "intended"), None)  # a crash between call and record
        attempt = open_one["attempt"] if open_one else len(earlier)
        token = hashlib.sha256(f"{run.id} {stage} {attempt}".encode()).hexdigest()
        entry = open_one["entry"] if open_one else run.intend("databricks-job", name, stage=stage, attempt=attempt)
        recipe = run.recipe()
        given = [one for split in SPLITS for one in getattr(recipe.data, split) or ()]
        tables = any(sources.is_table(one) for one in given)
        spark = self.settings.workers > 0 or self.settings.processes > 1 or (tables and stage == "prepare")
        libraries = [compute.Library(whl=wheel)]
        libraries += [compute.Library(pypi=compute.PythonPyPiLibrary(package=one)) for one in self.settings.libraries]
        made = self.workspace.client.jobs.submit(
            run_name=name,
            idempotency_token=token,
            tasks=[
                jobs.SubmitTask(
                    task_key=stage,
                    existing_cluster_id=cluster,
                    libraries=libraries,
                    python_wheel_task=jobs.PythonWheelTask(
                        package_name=shipping.NAME,
                        entry_point="tunewright-work",
                        parameters=[stage, self._home(run), *(["--on", "spark"] if spark else [])],
                    ),
                )
            ],
        )
        known = int(made.response.run_id)
        run.made(entry, run_id=known)
        write_json(run.job_file(stage), {"run_id": known, "stage": stage, "entry": entry})
        return Job(stage, str(known))

    # --- looking ---

    def _look(self, job: Job, run: Run) -> Status:
        with explained("asking for the job"):
            found = self._run_of(int(job.id))
            if found is None:
                return Status("lost")
            state = str(found.state.life_cycle_state.value) if found.state else "PENDING"
            if state not in ENDED:
                self._bring_file(run, run.progress_file(job.stage))
                return Status("running")
            self._end_entry(run, job.stage)
            result = found.state.result_state.value if found.state.result_state else ""
            if result == "SUCCESS":
                if f"{self._home(run)}/{MANIFESTS[job.stage]}" in self.volume.files(self._home(run)):
                    return Status("done")
                said = f"{job.stage}: the job says that it is done, and {MANIFESTS[job.stage]} is not there"
                return Status("failed", "StageError", said)
            if self._bring_file(run, run.failure_file(job.stage)):
                failure = read_json(run.failure_file(job.stage))
                if failure["kind"] == "Interrupted":
                    return Status("cancelled", message=failure["message"])
                return Status("failed", failure["kind"], failure["message"])
            if result in ("CANCELED", "USER_CANCELED"):
                return Status("cancelled", message="the job was cancelled")
            return Status("failed", "StageError", f"{job.stage}: {self._why(found)}")

    def _why(self, found: Any) -> str:
        """Why a job ended, for a person; the cluster's own reason where it has one."""
        said = (found.state.state_message or "").strip() or f"the job ended as {found.state.life_cycle_state.value}"
        cluster_id = found.cluster_instance.cluster_id if found.cluster_instance else None
        for task in found.tasks or ():
            cluster_id = cluster_id or task.existing_cluster_id
        reason = ""
        if cluster_id:
            from databricks.sdk.errors import DatabricksError

            with contextlib.suppress(DatabricksError):
                cluster = self.workspace.client.clusters.get(cluster_id)
                ended = cluster.termination_reason
                if ended is not None and cluster.state.value in ("TERMINATED", "TERMINATING", "ERROR"):
                    code = ended.code.value if ended.code else "unknown"
                    more = ", ".join(f"{key}: {value}" for key, value in (ended.parameters or {}).items())
                    reason = f"; the cluster ended: {code}{f' ({more})' if more else ''}"
                    if "QUOTA" in code or "STOCKOUT" in code:
                        reason += ": ask for more cores of that kind, or set another backend.node_type"
        page = f" (page: {found.run_page_url})" if found.run_page_url else ""
        return f"{said}{reason}{page}; the same command again goes on from the last checkpoint"

    def _state(self, known: int) -> Literal["active", "ended", "absent"]:
        with explained("asking for the job"):
            found = self._run_of(known)
        if found is None:
            return "absent"
        state = str(found.state.life_cycle_state.value) if found.state else "PENDING"
        return "ended" if state in ENDED else "active"

    def _run_of(self, known: int) -> Any:
        from databricks.sdk.errors import InvalidParameterValue, NotFound

        try:
            return self.workspace.client.jobs.get_run(known)
        except (NotFound, InvalidParameterValue):
            return None

    def _wait_for_end(self, known: int, limit_s: float) -> bool:
        deadline = time.monotonic() + limit_s
        while self._state(known) == "active":
            if time.monotonic() > deadline:
                return False
            time.sleep(min(1.0, self.settings.poll_s or 0.1))
        return True

    def _end_entry(self, run: Run, stage: str) -> None:
        """A job that has ended stands no more."""
        if run.job_file(stage).is_file():
            entry = read_json(run.job_file(stage))["entry"]
            if any(one["entry"] == entry and one["is"] != "gone" for one in run.resources()):
                run.gone(entry)

    def _standing(self, run: Run) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
        """What carries this run's name over there: (kind, name) and facts."""
        for cluster in self._clusters_of(run):
            facts = {
                "name": cluster.cluster_name,
                "state": str(cluster.state.value).lower(),
                "cluster_id": cluster.cluster_id,
                "node_type": cluster.node_type_id,
                "workers": cluster.num_workers or 0,
                "autotermination_minutes": cluster.autotermination_minutes,
                "since_ms": cluster.start_time,
            }
            yield ("databricks-cluster", cluster.cluster_name), facts
        for stage in FOLDERS:
            for known in self._runs_of(run, stage):
                name = f"tunewright {stage} {run.id}"
                yield ("databricks-job", name), {"name": name, "state": "running", "run_id": known, "stage": stage}
        endpoint = self._endpoint(self._endpoint_name(run))
        if endpoint is not None and self._is_ours(endpoint, run):
            facts = {
                "name": endpoint.name,
                "state": "ready" if _is_ready(endpoint) else "starting",
                "since_ms": endpoint.creation_timestamp,
                "workload_size": self.settings.workload_size,
            }
            yield ("databricks-endpoint", endpoint.name), facts
        home = self._home(run)
        if self.volume.is_folder(home):
            yield ("databricks-folder", home), {"name": home, "state": "there"}
        if self._made_volume(run):
            yield ("databricks-volume", self.settings.volume), {"name": self.settings.volume, "state": "there"}

    def _clusters_of(self, run: Run) -> list[Any]:
        return [one for one in self.workspace.client.clusters.list() if (one.custom_tags or {}).get(TAG) == run.id]

    def _runs_of(self, run: Run, stage: str | None) -> list[int]:
        """The active runs of this run's jobs."""
        from databricks.sdk.service import jobs

        found = self.workspace.client.jobs.list_runs(active_only=True, run_type=jobs.RunType.SUBMIT_RUN)
        names = [f"tunewright {one} {run.id}" for one in ([stage] if stage else FOLDERS)]
        return [int(one.run_id) for one in found if one.run_name in names]

    def _endpoint(self, name: str) -> Any:
        from databricks.sdk.errors import NotFound

        try:
            return self.workspace.client.serving_endpoints.get(name)
        except NotFound:
            return None

    def _wait_for_endpoint(self, name: str) -> None:
        deadline = time.monotonic() + ENDPOINT_S
        while True:
            endpoint = self._endpoint(name)
            if endpoint is None:
                raise EndpointError(f"endpoint {name} went away while it was starting")
            if _is_ready(endpoint):
                return
            state = endpoint.state.config_update.value if endpoint.state and endpoint.state.config_update else ""
            if state == "UPDATE_FAILED":
                raise EndpointError(f"endpoint {name} could not start; its page in the workspace has the build's log")
            if time.monotonic() > deadline:
                raise EndpointError(f"endpoint {name} was not ready within {ENDPOINT_S // 60} minutes")
            time.sleep(self.settings.poll_s or 0.1)

    def _is_ours(self, endpoint: Any, run: Run) -> bool:
        return any(tag.key == TAG and tag.value == run.id for tag in endpoint.tags or ())

    def _made_volume(self, run: Run) -> bool:
        """Whether this run made the volume, by what was written on it then."""
        from databricks.sdk.errors import NotFound

        try:
            return bool(self.workspace.client.volumes.read(self.settings.volume).comment == self._volume_comment(run))
        except NotFound:
            return False

    # --- removing ---

    def forget(self, stage: str, run: Run) -> None:
        """A stage's files in the volume and those of all after it; checkpoints too, so that training begins afresh."""
        home = self._home(run)
        later = list(FOLDERS)[list(FOLDERS).index(stage) :] if stage in FOLDERS else ()
        with explained("removing what the stages left"):
            for one in later:
                for folder in FOLDERS[one]:
                    self.volume.remove_folder(f"{home}/{folder}")
            if "train" in later:
                self.volume.remove_folder(f"{home}/jobs/ranks")

    def _remove_endpoint(self, run: Run) -> None:
        name = self._endpoint_name(run)
        endpoint = self._endpoint(name)
        if endpoint is not None and self._is_ours(endpoint, run):
            gone(lambda: self.workspace.client.serving_endpoints.delete(name))

    def _remove_volume(self, run: Run) -> Removal:
        """The volume, where this run made it and nobody has put anything else there."""
        if not self._made_volume(run):
            return "gone"
        if self.volume.entries(self._root()):
            return "kept"
        gone(lambda: self.workspace.client.volumes.delete(self.settings.volume))
        return "gone"

    # --- files ---

    def _root(self) -> str:
        return f"/Volumes/{self.settings.volume.replace('.', '/')}"

    def _all_runs(self) -> str:
        return f"{self._root()}/tunewright"

    def _home(self, run: Run) -> str:
        return f"{self._all_runs()}/{run.id}"

    def _bring(self, run: Run, stage: str) -> None:
        """The stage's files, its manifest last; what is here already in its size is not brought again."""
        home = self._home(run)
        there = self.volume.files(home)
        wanted = [
            name
            for name in there
            if name.removeprefix(f"{home}/").startswith(tuple(f"{one}/" for one in FOLDERS[stage]))
            and not name.removeprefix(f"{home}/").startswith(STAYS)
        ]
        manifest = f"{home}/{MANIFESTS[stage]}"
        for name in sorted(wanted, key=lambda one: one == manifest):
            target = run.path / name.removeprefix(f"{home}/")
            if name == manifest or not target.is_file() or target.stat().st_size != there[name]:
                self.volume.download(name, target, there[name])
        if f"{home}/tracking.json" in there:
            self.volume.download(f"{home}/tracking.json", run.tracking_file, there[f"{home}/tracking.json"])
        self._bring_ledger(run)

    def _bring_file(self, run: Run, target: Path) -> bool:
        """One small file of the run, where it is there."""
        content = self.volume.read(f"{self._home(run)}/{target.relative_to(run.path)}")
        if content is None:
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        return True

    def _bring_ledger(self, run: Run) -> None:
        """What jobs over there wrote into their ledger (MLflow's run, the registered model)."""
        content = self.volume.read(f"{self._home(run)}/resources.jsonl")
        if content is None:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "resources.jsonl"
            path.write_bytes(content)
            ours = read_json_lines(run.ledger_file)
            for line in read_json_lines(path):
                if line not in ours:
                    append_json(run.ledger_file, line, durable=True)

    # --- names ---

    def _tags(self, run: Run) -> dict[str, str]:
        return {"tunewright": "1", **self.settings.tags, TAG: run.id}

    def _cluster_name(self, run: Run) -> str:
        return f"tunewright-{run.id}"

    def _volume_comment(self, run: Run) -> str:
        return f"made by Tunewright for run {run.id}"

    def _endpoint_name(self, run: Run) -> str:
        """At most 63 characters; one that is cut keeps what tells it from others."""
        name = f"tunewright-{run.id}"
        return name if len(name) <= 63 else f"{name[:52]}-{hashlib.sha256(run.id.encode()).hexdigest()[:10]}"


def _absent(kind: str) -> dict[str, Any]:
    """The state of something recorded that was looked for and not found; MLflow's are not looked for here."""
    return {"state": ABSENT} if kind.startswith("databricks-") else {}


def _threads(asked: int | None) -> dict[str, str] | None:
    return None if asked is None else {"OMP_NUM_THREADS": str(asked), "MKL_NUM_THREADS": str(asked)}


def _is_ready(endpoint: Any) -> bool:
    state = endpoint.state
    return bool(state and state.ready and state.ready.value == "READY")
