"""MLflow: one run there for each run here; parameters, metrics, checkpoints, the report, the registered model.

Each stage attaches to the same MLflow run, sets it running and ends it when the stage ends, however it ends (a killed
stage leaves it running; the stage that goes on, or `destroy`, ends it).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tunewright import chat, models
from tunewright.errors import UserError
from tunewright.run import Run, read_json, write_json

SQLITE = "sqlite:///"
ABSENT = "RESOURCE_DOES_NOT_EXIST"
BATCH = 100
"""Metrics sent in one call."""
HASTE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""How soon a server is given up that nothing depends on yet. Later calls have MLflow's own patience (minutes), so that
training outlives a restart of the server. Where these variables are set, they count."""


def settle(recipe_uri: str | None, runs: Path, environment: Mapping[str, str]) -> str:
    """The tracking URI of a run: the recipe's, else MLFLOW_TRACKING_URI, else SQLite in the runs folder.

    A file or folder is named from the root, so that a stage that starts in another folder finds the same one.
    """
    given = recipe_uri or environment.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{runs.absolute() / 'mlflow.db'}"
    for scheme in (SQLITE, "file://", "file:"):
        if given.startswith(scheme):
            return f"{scheme}{Path(given.removeprefix(scheme)).absolute()}"
    return given if ":" in given or given == "databricks" else str(Path(given).absolute())


class Tracker:
    """This run's MLflow run. With tracking off every method does nothing."""

    def __init__(self, run: Run, client: Any = None, run_id: str | None = None) -> None:
        self.run = run
        self.client = client
        self.run_id = run_id
        self._waiting: list[Any] = []
        self._flushed = time.monotonic()

    @property
    def on(self) -> bool:
        return self.client is not None

    def params(self, params: Mapping[str, Any]) -> None:
        """Log parameters; one that is there already stays."""
        if not self.on:
            return
        from mlflow.entities import Param

        there = self.client.get_run(self.run_id).data.params
        fresh = [Param(key, str(value)[:6000]) for key, value in params.items() if key not in there]
        for start in range(0, len(fresh), BATCH):
            self.client.log_batch(self.run_id, params=fresh[start : start + BATCH])

    def tags(self, tags: Mapping[str, str]) -> None:
        for key, value in tags.items() if self.on else ():
            self.client.set_tag(self.run_id, key, value)

    def metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Log numbers at a step. They are sent in batches; `flush` sends the rest."""
        if not self.on:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting += [Metric(key, float(value), now, step) for key, value in metrics.items()]
        if len(self._waiting) >= BATCH or time.monotonic() - self._flushed > 2:
            self.flush()

    def flush(self) -> None:
        for start in range(0, len(self._waiting), 1000):
            self.client.log_batch(self.run_id, metrics=self._waiting[start : start + 1000])
        self._waiting.clear()
        self._flushed = time.monotonic()

    def last_step(self, metric: str) -> int:
        """The last step at which a metric is there; -1 for none."""
        if not self.on or metric not in self.client.get_run(self.run_id).data.metrics:
            return -1
        return max(int(point.step) for point in self.client.get_metric_history(self.run_id, metric))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        if not self.on:
            return
        if path.is_dir():
            self.client.log_artifacts(self.run_id, str(path), folder)
        else:
            self.client.log_artifact(self.run_id, str(path), folder)

    def checkpoint(self, folder: Path, files: list[str]) -> None:
        """Log a checkpoint's weights."""
        for name in files if self.on else ():
            self.client.log_artifact(self.run_id, str(folder / name), f"checkpoints/{folder.name}")

    def model(
        self, code: Path, artifacts: Mapping[str, Path], *, name: str, requirements: list[str], example: Any
    ) -> str:
        """Log a model that `mlflow models predict` can answer with, and register it. Gives its `models:/` URI."""
        import mlflow

        entry = self.run.intend("mlflow-model", name)
        mlflow.set_tracking_uri(_uri(self.run))
        mlflow.set_registry_uri(_registry(_uri(self.run)))
        with warnings.catch_warnings(), mlflow.start_run(run_id=self.run_id):
            warnings.simplefilter("ignore")  # MLflow's notes on its own modules, as they are imported here
            info = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(code),
                artifacts={key: str(path) for key, path in artifacts.items()},
                registered_model_name=name,
                pip_requirements=requirements,
                signature=_signature(*example),
            )
        version = str(info.registered_model_version)
        self.run.made(entry, version=version, model_uri=info.model_uri)
        return f"models:/{name}/{version}"


def _signature(given: Any, gives: Any, params: dict[str, Any] | None) -> Any:
    """What the model takes and gives. A column of lists may be anything: where a table has no such column MLflow makes
    one of NaN, and holds it against the signature."""
    from mlflow.models import infer_signature
    from mlflow.models.signature import ModelSignature
    from mlflow.types.schema import AnyType, Array, ColSpec, Schema

    inferred = infer_signature(given, gives, params)
    columns = [
        ColSpec(AnyType() if isinstance(one.type, Array) else one.type, one.name, required=one.required)
        for one in inferred.inputs.inputs
    ]
    return ModelSignature(inputs=Schema(columns), outputs=inferred.outputs, params=inferred.params)


@contextlib.contextmanager
def attach(run: Run) -> Iterator[Tracker]:
    """This run's tracker, for the length of a stage.

    Raises:
        UserError: MLflow cannot be reached.
    """
    resolved = run.resolved()
    if not run.recipe().tracking.enabled:
        yield Tracker(run)
        return
    uri = resolved["tracking"]["uri"]
    with _reaching(uri):
        client = _client(uri)
        run_id = _mlflow_run(run, client, resolved["tracking"])
    tracker = Tracker(run, client, run_id)
    try:
        yield tracker
    except BaseException as error:
        stopped = isinstance(error, InterruptedError | KeyboardInterrupt)
        with contextlib.suppress(UserError), _reaching(uri):  # the stage's own error is the one to report
            tracker.flush()
            client.set_terminated(run_id, "KILLED" if stopped else "FAILED")
        raise
    tracker.flush()
    client.set_terminated(run_id, "FINISHED")


@contextlib.contextmanager
def _reaching(uri: str) -> Iterator[None]:
    """Calls that find out soon, and say plainly, that there is no MLflow at an address."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    hurried = {name: value for name, value in HASTE.items() if name not in os.environ}
    os.environ.update(hurried)
    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        said = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"MLflow at {uri} cannot be used: {said}; set tracking.uri, MLFLOW_TRACKING_URI, or tracking.enabled: false"
        ) from error
    finally:
        for name in hurried:
            os.environ.pop(name, None)


def end(run: Run) -> bool:
    """End this run's MLflow run if it is still running (a stage was killed); whether it was."""
    if not run.tracking_file.is_file() and not any(one["kind"] == "mlflow-run" for one in run.resources()):
        return False
    with _reaching(_uri(run)):
        client = _client(_uri(run))
        run_id = _known_id(run, client)
        running = run_id is not None and client.get_run(run_id).info.status == "RUNNING"
        if running:
            client.set_terminated(run_id, "KILLED")
    return running


def _known_id(run: Run, client: Any) -> str | None:
    """The id of this run's MLflow run, also where a kill came between making it and writing it down."""
    if run.tracking_file.is_file():
        known: str = read_json(run.tracking_file)["mlflow_run_id"]
        return known if _is_there(client, known) else None
    experiment = client.get_experiment_by_name(run.resolved()["tracking"]["experiment"])
    if experiment is None:
        return None
    found = client.search_runs([experiment.experiment_id], f"tags.`tunewright.run` = '{run.id}'", max_results=1)
    return str(found[0].info.run_id) if found else None


def unregister(run: Run, name: str, version: str) -> None:
    """Remove a model version from the registry, and the registered model with its last version. Absent is fine."""
    from mlflow.exceptions import MlflowException

    with _reaching(_uri(run)):
        client = _client(_uri(run))
        try:
            client.delete_model_version(name, version)
            if not client.search_model_versions(f"name='{name}'"):
                client.delete_registered_model(name)
        except MlflowException as error:
            if error.error_code != ABSENT:
                raise


def rendering_differences(run: Run, uri: str) -> list[str]:
    """Where the model that is registered under a `models:/` URI renders otherwise than the package: its tokenizer and
    its golden conversations are fetched from there and compared. Its weights are not fetched.

    Raises:
        UserError: it cannot be had.
    """
    import mlflow

    trained = read_json(run.rendering_file)
    names = [*trained["tokenizer_files"], "config.json"]  # Transformers reads the kind of model, too
    with tempfile.TemporaryDirectory() as folder:
        with _reaching(_uri(run)):
            _client(_uri(run))
            mlflow.set_tracking_uri(_uri(run))
            mlflow.set_registry_uri(_registry(_uri(run)))
            for name in (*(f"model/{name}" for name in names), run.rendering_file.name):
                mlflow.artifacts.download_artifacts(f"{uri}/artifacts/{name}", dst_path=folder)
        there = Path(folder) / "artifacts"
        if read_json(there / run.rendering_file.name) != trained:
            return [f"its {run.rendering_file.name} is not the package's"]
        return chat.differences(models.load_folder_tokenizer(there / "model"), trained, there / "model")


def versions_of(run: Run, name: str) -> list[str]:
    """Versions of a registered model that this run made, recorded or not."""
    if not run.tracking_file.is_file():
        return []
    run_id = read_json(run.tracking_file)["mlflow_run_id"]
    with _reaching(_uri(run)):
        found = _client(_uri(run)).search_model_versions(f"name='{name}'")
    return [str(version.version) for version in found if version.run_id == run_id]


def _mlflow_run(run: Run, client: Any, settings: dict[str, Any]) -> str:
    """The id of this run's MLflow run, set running; made on first use, and again where somebody has deleted it."""
    if run.tracking_file.is_file():
        known: str = read_json(run.tracking_file)["mlflow_run_id"]
        if _is_there(client, known):
            client.update_run(known, status="RUNNING")
            return known
    experiment_id = _experiment(client, settings)
    tag = {"tunewright.run": run.id}
    made = client.search_runs([experiment_id], f"tags.`tunewright.run` = '{run.id}'", max_results=1)
    entry = run.intend("mlflow-run", run.id, uri=settings["uri"])
    run_id: str = (
        made[0].info.run_id if made else client.create_run(experiment_id, tags=tag, run_name=run.id).info.run_id
    )
    write_json(run.tracking_file, {"uri": settings["uri"], "experiment_id": experiment_id, "mlflow_run_id": run_id})
    run.made(entry, mlflow_run_id=run_id)
    return run_id


def _experiment(client: Any, settings: dict[str, Any]) -> str:
    """The id of the experiment, made where it is not there; beside a database file its artifacts lie beside it too."""
    from mlflow.exceptions import MlflowException

    name = settings["experiment"]
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        local = settings["uri"].startswith(SQLITE)
        place = Path(settings["uri"].removeprefix(SQLITE)).parent / "mlartifacts" if local else None
        try:
            made: str = client.create_experiment(name, artifact_location=place.as_uri() if place else None)
            return made
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(name)  # another run made it in between
    found: str = experiment.experiment_id
    return found


def _is_there(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        there: bool = client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code != ABSENT:
            raise
        return False
    return there


def _uri(run: Run) -> str:
    uri: str = run.resolved()["tracking"]["uri"]
    return uri


def _client(uri: str) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=_registry(uri))


def _registry(uri: str) -> str:
    """Where models are registered: on Databricks in Unity Catalog, else where the runs are."""
    return uri.replace("databricks", "databricks-uc", 1) if uri.split(":")[0] == "databricks" else uri
