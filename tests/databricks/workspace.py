"""A Databricks workspace on loopback: the REST calls that databricks-sdk makes for our backend, as its source has them,
with real jobs (a process each, from the wheel that was uploaded), real files and a real MLflow registry behind.

A field that the SDK's own method does not have is refused, and so is one that it needs and that is missing. Faults are
put in by `fault`. What is not covered: permissions, tokens that expire, and how long things take.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from databricks.sdk.service import catalog, compute, jobs, serving

TOKEN = "dapi-not-a-real-one-3f1c"
ME = "someone@example.com"
RUNTIMES = ("16.4.x-scala2.13", "17.3.x-cpu-ml-scala2.13", "17.3.x-gpu-ml-scala2.13", "18.0.x-cpu-ml-scala2.13")
MAKES = re.compile(r"POST /api/.*(volumes|clusters/create|runs/submit|serving-endpoints)$|PUT /api/2\.0/fs/")
"""Calls that make something."""


def _node(name: str, cores: int, gpus: int) -> dict[str, Any]:
    return {
        "node_type_id": name,
        "memory_mb": cores * 4096,
        "num_cores": cores,
        "num_gpus": gpus,
        "description": name,
        "instance_type_id": name,
        "category": "General Purpose",
        "node_info": {"status": []},
        "is_deprecated": False,
    }


NODES = [_node("Standard_D4ds_v5", 4, 0), _node("Standard_NC4as_T4_v3", 4, 1)]
POLICIES = [{"policy_id": "P1", "name": "Personal Compute"}]


class Refused(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Run:
    """A one-time run of a task."""

    id: int
    body: dict[str, Any]
    life: str = "PENDING"
    result: str | None = None
    message: str = ""
    process: subprocess.Popen[bytes] | None = None
    ended: threading.Event = field(default_factory=threading.Event)


@dataclass
class Fault:
    """What happens to calls that match, so many times."""

    call: str
    how: str
    """429, 500, cut (acted on, not answered), kill (acted on, then a process is killed), or a handler."""
    times: int = 1
    pid: int = 0


class Workspace:
    """The service. `start` it, point DATABRICKS_HOST at `host`, `stop` it."""

    def __init__(self, folder: Path, *, registry: str | None = None) -> None:
        self.root = folder / "Volumes"
        self.scratch = folder / "machines"
        self.registry = registry
        self.volumes = {"main.default.files": ""}
        """With their comments."""
        self.clusters: dict[str, dict[str, Any]] = {}
        self.runs: dict[int, Run] = {}
        self.tokens: dict[str, int] = {}
        self.endpoints: dict[str, dict[str, Any]] = {}
        self.loaded: dict[str, Any] = {}
        self.calls: list[str] = []
        self.faults: list[Fault] = []
        self.runtimes: tuple[str, ...] = RUNTIMES
        self.environment: dict[str, str] = {}
        """Of the jobs' processes."""
        self.replay: Path | None = None
        """A folder of results by stage, which jobs leave instead of working."""
        self.before_job: Callable[[Run], None] = lambda run: None
        self.lock = threading.RLock()
        for volume in self.volumes:
            (self.root / volume.replace(".", "/")).mkdir(parents=True)

    # --- the service ---

    def start(self) -> None:
        workspace = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                """Nothing: `calls` has them."""

            def answer(self) -> None:
                workspace.serve(self)

            do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.host = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        for run in list(self.runs.values()):
            self._end(run)
        self.server.shutdown()
        self.server.server_close()

    def fault(self, call: str, how: str, times: int = 1, pid: int = 0) -> None:
        self.faults.append(Fault(call, how, times, pid))

    def standing(self) -> list[str]:
        """Everything that a user would be billed for, or have to clear away."""
        files = [
            str(path.relative_to(self.root))
            for path in self.root.rglob("*")
            if path.is_file() or not any(path.iterdir())
        ]
        empty = {volume.replace(".", "/") for volume in self.volumes}
        return [
            *(f"cluster {one['cluster_name']}" for one in self.clusters.values()),
            *(f"run {run.id}" for run in self.runs.values() if not run.ended.is_set()),
            *(f"endpoint {name}" for name in self.endpoints),
            *(f"file {name}" for name in files if name not in empty),
            *(f"volume {name}" for name in self.volumes if name != "main.default.files"),
        ]

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        path = unquote(parts.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        call = f"{request.command} {path}"
        with self.lock:
            self.calls.append(call)
        fault = next((one for one in self.faults if one.times and re.search(one.call, call)), None)
        if fault is not None:
            fault.times -= 1
            if fault.how in ("429", "500"):
                code = {"429": "RESOURCE_EXHAUSTED", "500": "INTERNAL_ERROR"}[fault.how]
                headers = {"Retry-After": "0"} if fault.how == "429" else {}
                self._reply(request, int(fault.how), {"error_code": code, "message": "as it was told"}, headers)
                return
        try:
            if request.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/.well-known"):
                raise Refused(401, "UNAUTHENTICATED", "no such token")
            said = self._do(request.command, path, query, body)
            status = 200
        except Refused as refused:
            status, said = refused.status, {"error_code": refused.code, "message": str(refused)}
        except Exception as error:  # noqa: BLE001 - a fault of this service, which a test must see and not wait for
            traceback.print_exc()
            status, said = 400, {"error_code": "BUG", "message": repr(error)}
        if fault is not None and fault.how in ("cut", "kill"):
            if fault.how == "kill":
                os.kill(fault.pid, signal.SIGKILL)
            request.close_connection = True
            with contextlib.suppress(OSError):
                request.connection.close()
            return
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._reply(request, status, said, {})

    def _reply(self, request: BaseHTTPRequestHandler, status: int, said: Any, headers: dict[str, str]) -> None:
        content = said if isinstance(said, bytes) else json.dumps(said).encode()
        request.send_response(status)
        kind = "application/octet-stream" if isinstance(said, bytes) else "application/json"
        size = headers.pop("size", None)
        for key, value in {"Content-Type": kind, "Content-Length": size or str(len(content)), **headers}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)

    def _do(self, method: str, path: str, query: dict[str, str], body: bytes) -> Any:
        if path.startswith("/api/2.0/fs/"):
            return self._files(method, path.removeprefix("/api/2.0/fs/"), query, body)
        given = json.loads(body) if body else {}
        for pattern, handler in self._routes().items():
            if found := re.fullmatch(pattern, f"{method} {path}"):
                return handler(*found.groups(), **({"query": query} if method == "GET" else {"given": given}))
        raise Refused(404, "ENDPOINT_NOT_FOUND", f"no {method} {path}")

    def _routes(self) -> dict[str, Callable[..., Any]]:
        return {
            r"GET /\.well-known/databricks-config": lambda query: {"host_type": "workspace", "workspace_id": "1"},
            r"GET /api/2\.0/preview/scim/v2/Me": lambda query: {"userName": ME, "id": "1"},
            r"GET /api/2\.1/clusters/spark-versions": lambda query: {
                "versions": [{"key": key, "name": f"{key.split('.x')[0]} LTS"} for key in self.runtimes]
            },
            r"GET /api/2\.1/clusters/list-node-types": lambda query: {"node_types": NODES},
            r"GET /api/2\.1/clusters/list": lambda query: {"clusters": list(self.clusters.values())},
            r"GET /api/2\.1/clusters/get": self._cluster,
            r"POST /api/2\.1/clusters/create": self._create_cluster,
            r"POST /api/2\.1/clusters/permanent-delete": self._delete_cluster,
            r"GET /api/2\.0/policies/clusters/list": lambda query: {"policies": POLICIES},
            r"GET /api/2\.1/unity-catalog/volumes/(.+)": self._volume,
            r"POST /api/2\.1/unity-catalog/volumes": self._create_volume,
            r"DELETE /api/2\.1/unity-catalog/volumes/(.+)": self._delete_volume,
            r"POST /api/2\.2/jobs/runs/submit": self._submit,
            r"GET /api/2\.2/jobs/runs/get": lambda query: self._said(self._run(query["run_id"])),
            r"GET /api/2\.2/jobs/runs/list": self._list_runs,
            r"POST /api/2\.2/jobs/runs/cancel": self._cancel,
            r"POST /api/2\.2/jobs/runs/delete": self._delete_run,
            r"POST /api/2\.0/serving-endpoints": self._create_endpoint,
            r"GET /api/2\.0/serving-endpoints/([^/]+)": self._get_endpoint,
            r"DELETE /api/2\.0/serving-endpoints/([^/]+)": self._delete_endpoint,
            r"POST /serving-endpoints/([^/]+)/invocations": self._invoke,
        }

    # --- files ---

    def _files(self, method: str, rest: str, query: dict[str, str], body: bytes) -> Any:
        kind, _, name = rest.partition("/")
        path = self.root / name.removeprefix("Volumes/")
        if kind == "endpoints":
            raise Refused(404, "ENDPOINT_NOT_FOUND", "not served here")
        if not self._in_volume(name):
            raise Refused(404, "NOT_FOUND", f"/{name} is in no volume")
        if kind == "directories":
            if method == "PUT":
                path.mkdir(parents=True, exist_ok=True)
                return {}
            if not path.is_dir():
                raise Refused(404, "NOT_FOUND", f"no directory /{name}")
            if method == "DELETE":
                if any(path.iterdir()):
                    raise Refused(400, "FAILED_PRECONDITION", "the directory is not empty")
                path.rmdir()
                return {}
            found = sorted(path.iterdir())
            return (
                b""
                if method == "HEAD"
                else {
                    "contents": [
                        {"path": f"/{name.rstrip('/')}/{one.name}", "name": one.name, "is_directory": one.is_dir()}
                        | ({} if one.is_dir() else {"file_size": one.stat().st_size})
                        for one in found
                    ]
                }
            )
        if method == "PUT":
            if path.exists() and query.get("overwrite") != "true":
                raise Refused(409, "ALREADY_EXISTS", f"/{name} is there")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body)
            return {}
        if not path.is_file():
            raise Refused(404, "NOT_FOUND", f"no file /{name}")
        if method == "DELETE":
            path.unlink()
            return {}
        return path.read_bytes()

    def _in_volume(self, name: str) -> bool:
        return any(
            name == f"Volumes/{one.replace('.', '/')}" or name.startswith(f"Volumes/{one.replace('.', '/')}/")
            for one in self.volumes
        )

    def _volume(self, name: str, query: Any) -> Any:
        if name not in self.volumes:
            raise Refused(404, "NOT_FOUND", f"Volume '{name}' does not exist.")
        return {"full_name": name, "name": name.split(".")[-1], "comment": self.volumes[name]}

    def _create_volume(self, given: dict[str, Any]) -> Any:
        _hold(catalog.VolumesAPI.create, given)
        name = f"{given['catalog_name']}.{given['schema_name']}.{given['name']}"
        if name in self.volumes:
            raise Refused(409, "ALREADY_EXISTS", f"Volume '{name}' exists.")
        self.volumes[name] = given.get("comment", "")
        (self.root / name.replace(".", "/")).mkdir(parents=True)
        return {"full_name": name}

    def _delete_volume(self, name: str, given: Any) -> Any:
        self._volume(name, None)
        del self.volumes[name]
        shutil.rmtree(self.root / name.replace(".", "/"))
        return {}

    # --- clusters ---

    def _create_cluster(self, given: dict[str, Any]) -> Any:
        _hold(compute.ClustersAPI.create, given)
        cluster_id = f"1126-{len(self.calls):06d}-tune"
        state = {"state": "RUNNING", "cluster_id": cluster_id, "start_time": int(time.time() * 1000)}
        self.clusters[cluster_id] = given | state
        return {"cluster_id": cluster_id}

    def _cluster(self, query: dict[str, str]) -> Any:
        if query["cluster_id"] not in self.clusters:
            raise Refused(400, "INVALID_PARAMETER_VALUE", f"Cluster {query['cluster_id']} does not exist")
        return self.clusters[query["cluster_id"]]

    def _delete_cluster(self, given: dict[str, Any]) -> Any:
        self.clusters.pop(given["cluster_id"], None)
        return {}

    def lose_cluster(self, code: str = "SPOT_INSTANCE_TERMINATION") -> None:
        """Every cluster dies, and what ran on it."""
        for cluster in self.clusters.values():
            cluster |= {"state": "TERMINATED", "termination_reason": {"code": code, "type": "CLOUD_FAILURE"}}
        for run in self.runs.values():
            if not run.ended.is_set():
                self._end(run, "INTERNAL_ERROR", "FAILED", "Cluster was terminated.")

    # --- jobs ---

    def _submit(self, given: dict[str, Any]) -> Any:
        _hold(jobs.JobsAPI.submit, given)
        for task in given["tasks"]:
            if jobs.SubmitTask.from_dict(task).as_dict() != task:
                raise Refused(400, "INVALID_PARAMETER_VALUE", f"unknown fields in {task}")
            if task["existing_cluster_id"] not in self.clusters:
                raise Refused(400, "INVALID_PARAMETER_VALUE", f"Cluster {task['existing_cluster_id']} does not exist")
        token = given.get("idempotency_token")
        if token in self.tokens:
            return {"run_id": self.tokens[token]}
        run = Run(1000 + len(self.runs), given)
        self.runs[run.id] = run
        if token:
            self.tokens[token] = run.id
        threading.Thread(target=self._work, args=(run,), daemon=True).start()
        return {"run_id": run.id}

    def _work(self, run: Run) -> None:
        """Do what the task says, as a cluster's driver would."""
        task = run.body["tasks"][0]
        wheel = task["python_wheel_task"]
        stage, home, *more = wheel["parameters"]
        folder = self.root / home.removeprefix("/Volumes/")
        run.life = "RUNNING"
        self.before_job(run)
        if run.ended.is_set():
            return
        if self.replay is not None:
            shutil.copytree(self.replay / stage, folder, dirs_exist_ok=True)
            self._end(run, "TERMINATED", "SUCCESS")
            return
        site = self.scratch / task["existing_cluster_id"] / "site-packages"
        for library in task["libraries"]:
            if "whl" in library:
                with zipfile.ZipFile(self.root / library["whl"].removeprefix("/Volumes/")) as archive:
                    archive.extractall(site)
        entry = next(path for path in site.glob("*.dist-info/entry_points.txt")).read_text()
        module = re.search(rf"{wheel['entry_point']} = (\S+):(\w+)", entry).groups()  # type: ignore[union-attr]
        for name in ("recipe.yaml", "resolved.json"):  # this machine has no /Volumes: as if it were mounted
            path = folder / name
            path.write_text(path.read_text().replace("/Volumes/", f"{self.root}/"))
        code = f"import sys; from {module[0]} import {module[1]} as run; sys.exit(run(sys.argv[1:]))"
        environment = os.environ | {"PYTHONPATH": str(site), "DATABRICKS_RUNTIME_VERSION": "17.3"} | self.environment
        log = (self.scratch / f"run-{run.id}.log").open("wb")
        with log:
            run.process = subprocess.Popen(
                [sys.executable, "-c", code, stage, str(folder), *more],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        returned = run.process.wait()
        if not run.ended.is_set():
            said = "" if returned == 0 else f"Workload failed, see run output for details (exit code {returned})"
            self._end(run, "TERMINATED", "SUCCESS" if returned == 0 else "FAILED", said)

    def _end(self, run: Run, life: str = "TERMINATED", result: str = "CANCELED", message: str = "") -> None:
        if run.ended.is_set():
            return
        run.life, run.result, run.message = life, result, message
        run.ended.set()
        if run.process is not None and run.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.process.pid, signal.SIGKILL)

    def _run(self, known: Any) -> Run:
        if int(known) not in self.runs:
            raise Refused(400, "INVALID_PARAMETER_VALUE", f"Run {known} does not exist.")
        return self.runs[int(known)]

    def _said(self, run: Run) -> dict[str, Any]:
        state = {"life_cycle_state": run.life, "state_message": run.message}
        state |= {"result_state": run.result} if run.result else {}
        names = ("task_key", "existing_cluster_id")
        tasks = [{name: task[name] for name in names} for task in run.body["tasks"]]
        return {
            "run_id": run.id,
            "run_name": run.body.get("run_name"),
            "run_page_url": f"{self.host}/#job/{run.id}",
            "state": state,
            "tasks": tasks,
        }

    def _list_runs(self, query: dict[str, str]) -> Any:
        active = query.get("active_only") == "true"
        return {"runs": [self._said(run) for run in self.runs.values() if not (active and run.ended.is_set())]}

    def _cancel(self, given: dict[str, Any]) -> Any:
        self._end(self._run(given["run_id"]))
        return {}

    def _delete_run(self, given: dict[str, Any]) -> Any:
        run = self._run(given["run_id"])
        if not run.ended.is_set():
            raise Refused(400, "INVALID_STATE", "the run is active")
        del self.runs[run.id]
        return {}

    # --- serving ---

    def _create_endpoint(self, given: dict[str, Any]) -> Any:
        _hold(serving.ServingEndpointsAPI.create, given)
        if serving.EndpointCoreConfigInput.from_dict(given["config"]).as_dict() != given["config"]:
            raise Refused(400, "INVALID_PARAMETER_VALUE", f"unknown fields in {given['config']}")
        if given["name"] in self.endpoints:
            raise Refused(409, "RESOURCE_ALREADY_EXISTS", f"{given['name']} exists")
        self.endpoints[given["name"]] = given | {"creation_timestamp": int(time.time() * 1000)}
        return self._get_endpoint(given["name"], None)

    def _get_endpoint(self, name: str, query: Any) -> Any:
        if name not in self.endpoints:
            raise Refused(404, "RESOURCE_DOES_NOT_EXIST", f"no endpoint {name}")
        state = {"ready": "READY", "config_update": "NOT_UPDATING"}
        return {key: self.endpoints[name][key] for key in ("name", "tags", "creation_timestamp")} | {"state": state}

    def _delete_endpoint(self, name: str, given: Any) -> Any:
        self._get_endpoint(name, None)
        del self.endpoints[name]
        return {}

    def _invoke(self, name: str, given: dict[str, Any]) -> Any:
        """The registered model answers, as MLflow loads it."""
        import pandas as pd

        self._get_endpoint(name, None)
        with self.lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MLflow's notes on its own modules
            import mlflow

            if name not in self.loaded:
                entity = self.endpoints[name]["config"]["served_entities"][0]
                mlflow.set_tracking_uri(self.registry)
                mlflow.set_registry_uri(self.registry)
                uri = f"models:/{entity['entity_name']}/{entity['entity_version']}"
                self.loaded[name] = mlflow.pyfunc.load_model(uri)
            frame = pd.DataFrame(given["dataframe_records"])
            return {"predictions": self.loaded[name].predict(frame, params=given.get("params")).to_dict("records")}


def _hold(method: Any, given: dict[str, Any]) -> None:
    """Refuse what the SDK's own method does not know, or lacks."""
    parameters = {name: one for name, one in inspect.signature(method).parameters.items() if name != "self"}
    unknown = set(given) - set(parameters)
    missing = {name for name, one in parameters.items() if one.default is one.empty} - set(given)
    if unknown or missing:
        raise Refused(400, "INVALID_PARAMETER_VALUE", f"unknown {sorted(unknown)}, missing {sorted(missing)}")


@contextlib.contextmanager
def running(folder: Path, **options: Any) -> Iterator[Workspace]:
    workspace = Workspace(folder, **options)
    workspace.start()
    try:
        yield workspace
    finally:
        workspace.stop()
