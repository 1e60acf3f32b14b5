"""The Spark session of a run: our package on every executor, versions compared first, slots counted.

On a cluster of one's own a session is made by the recipe's `backend` table. Where a session is there already (a
Databricks job, a notebook) that one is used, and left as it was.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import platform
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright import shipping
from tunewright.errors import StageError, UserError
from tunewright.run import Run
from tunewright.spark.settings import Settings, settings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

COMPARED = ("torch", "transformers", "tokenizers", "peft", "accelerate", "trl", "numpy", "pandas", "pyarrow", "pyspark")
"""Libraries that must have the driver's version on every executor: else ids, losses or pickles differ."""
PASSED_ON = re.compile(r"(HF_|HUGGINGFACE_|TRANSFORMERS_|TOKENIZERS_|MLFLOW_|DATABRICKS_|OMP_WAIT_POLICY|NCCL_|GLOO_)")
"""Environment variables that executors get as this process has them."""
PARTS = ("threads", "gpus", "partitions", "wait_s", "patience_s")
"""Settings that a session which is there already can still be given."""
LOOK_S = 1.0
ON_DATABRICKS = "DATABRICKS_RUNTIME_VERSION"
"""Set wherever a Databricks runtime runs."""
NAMED = re.compile(r"(?:Caused by: |: )?((?:[\w.]+\.)?\w+(?:Error|Exception|Failure)\b.*)")
"""A line of a traceback that names an error."""
JAVA = re.compile(r"(?:org|java|scala|py4j|io)\.|Py4J")


@contextlib.contextmanager
def opened(run: Run, stage: str, **conf: str) -> Iterator[SparkSession]:
    """A session for one stage of a run, ended with it (one that was there before stays).

    Raises:
        UserError: there is no cluster at that address, or its executors lack what a stage needs.
    """
    with session(asked(run), f"tunewright {stage} {run.id}", run.path.parent / ".tunewright", **conf) as spark:
        refuse_other_storage(spark, run)
        yield spark


def asked(run: Run) -> Settings:
    """What a run's recipe says about Spark; of a backend that is more than Spark (databricks), what it says of it."""
    chosen = run.recipe().backend
    table = chosen.model_extra or {}
    if chosen.kind == "spark":
        return settings(table)
    return settings({key: value for key, value in table.items() if key in ("processes", *PARTS)})


@contextlib.contextmanager
def session(asked: Settings, name: str, shared: Path | None, **conf: str) -> Iterator[SparkSession]:
    """A session as the settings ask for it. `shared` is a folder that driver and executors see alike, which our package
    is put into; without one it is sent to the executors, whose tasks find it and the processes that they start do not.
    """
    from pyspark.sql import SparkSession

    there = SparkSession.getActiveSession()
    if there is None and ON_DATABRICKS in os.environ:
        there = SparkSession.builder.getOrCreate()  # the cluster's own, whose libraries are ours
    if there is not None:
        compare(there)
        yield there
        return
    builder = SparkSession.builder.appName(name)
    if asked.master:
        builder = builder.master(asked.master)
    for key, value in {**_defaults(asked, shared), **conf, **_given(asked)}.items():
        builder = builder.config(key, value)
    # What the executors start; Spark reads it from the environment alone where no spark-submit comes before.
    os.environ["PYSPARK_PYTHON"] = asked.python or ("./environment/bin/python" if asked.archive else sys.executable)
    try:
        spark = builder.getOrCreate()
    except Exception as error:  # py4j's, whose class says nothing; its cause is a line of Java
        raise UserError(f"no Spark session at {asked.master or 'the default master'}: {cause(error)}") from error
    spark.sparkContext.setLogLevel("WARN")
    with tempfile.TemporaryDirectory(prefix="tunewright-spark-", ignore_cleanup_errors=True) as kept:
        try:
            if shared is None:
                _send(spark, Path(kept))
            compare(spark)
            yield spark
        finally:
            spark.stop()


def compare(spark: SparkSession) -> list[dict[str, Any]]:
    """What the executors have, one entry for each that answered.

    Raises:
        UserError: one cannot run Tunewright, or has another version of a library, named with both.
    """
    ours = versions()
    there = num_slots(spark)
    try:
        found = spark.sparkContext.parallelize(range(there), there).mapPartitions(_versions_there).collect()
    except Exception as error:
        raise UserError(
            f"the executors cannot run Tunewright: {cause(error)}; they need Python {platform.python_version()} with "
            "our libraries at backend.python, or a packed environment at backend.archive (docs/backends/spark.md)"
        ) from error
    for one in found:
        differing = [
            f"{key} {one['versions'].get(key, 'none')} (here {ours[key]})"
            for key in ours
            if one["versions"].get(key) != ours[key]
        ]
        if differing:
            raise UserError(
                f"executor on {one['host']} ({one['python']}): {', '.join(differing)}; install the same there, "
                "or send this environment along with backend.archive"
            )
    return list({(one["host"], one["python"]): one for one in found}.values())


@contextlib.contextmanager
def followed(spark: SparkSession, job: str, parts: int, told: Callable[[int], None]) -> Iterator[None]:
    """While the block runs a job, tell how many of its parts are done, about once a second."""
    context = spark.sparkContext
    over = threading.Event()

    def look() -> None:
        tracker = context.statusTracker()
        while not over.wait(LOOK_S):
            stages = [tracker.getStageInfo(stage) for stage in tracker.getActiveStageIds()]
            of_it = [stage for stage in stages if stage is not None and stage.numTasks == parts]
            if of_it:
                told(of_it[-1].numCompletedTasks)

    looking = threading.Thread(target=look, name="progress", daemon=True)
    context.setJobDescription(job)
    looking.start()
    try:
        yield
    finally:
        over.set()
        looking.join()


def refuse_other_storage(spark: SparkSession, run: Run) -> None:
    """Stop where an executor does not see the run folder.

    Raises:
        UserError: names the executor's host.
    """
    there = num_slots(spark)
    path, state = str(run.state_file), run.state_file.read_text()

    def look(_: Iterator[int]) -> Iterator[str]:
        try:
            same = Path(path).read_text() == state
        except OSError:
            same = False
        if not same:
            yield platform.node()

    blind = spark.sparkContext.parallelize(range(there), there).mapPartitions(look).collect()
    if blind:
        raise UserError(
            f"{run.path}: the executor on {blind[0]} does not see this folder; --runs must name storage that all "
            "machines of the cluster have at the same path"
        )


def versions() -> dict[str, str]:
    """Python and the libraries that must be the same everywhere."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in COMPARED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def num_slots(spark: SparkSession) -> int:
    """Tasks that the executors which are there now run at the same time."""
    context = spark.sparkContext._jsc.sc()
    count: int = context.maxNumConcurrentTasks(context.resourceProfileManager().defaultResourceProfile())
    return max(1, count)


def wait_for_slots(spark: SparkSession, needed: int, wait_s: float) -> None:
    """Return once the cluster has so many slots.

    Raises:
        UserError: it has not after `wait_s` seconds; says how many there are.
    """
    deadline = time.monotonic() + wait_s
    while (there := num_slots(spark)) < needed:
        if time.monotonic() > deadline:
            raise UserError(
                f"backend.processes: {needed} processes need as many slots at once, and the cluster has given {there} "
                f"in {wait_s:g} s; lower it, add executors, or raise spark.cores.max"
            )
        time.sleep(0.2)


def _defaults(asked: Settings, shared: Path | None) -> dict[str, str]:
    """What a session has unless the recipe says otherwise."""
    threads = str(asked.threads or asked.conf.get("spark.task.cpus", 1))
    conf = {
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.execution.arrow.pyspark.enabled": "true",
        **({} if shared is None else {"spark.executorEnv.PYTHONPATH": str(shipping.unpacked(shared))}),
        "spark.executorEnv.OMP_NUM_THREADS": threads,
        "spark.executorEnv.MKL_NUM_THREADS": threads,
        "spark.executorEnv.OMP_WAIT_POLICY": "PASSIVE",
        # A barrier stage that asks for more slots than there are is refused within seconds instead of ten minutes.
        "spark.scheduler.barrier.maxConcurrentTasksCheck.interval": "2s",
        "spark.scheduler.barrier.maxConcurrentTasksCheck.maxFailures": "5",
        **{f"spark.executorEnv.{key}": value for key, value in os.environ.items() if PASSED_ON.match(key)},
    }
    if asked.archive:
        conf["spark.archives"] = f"{asked.archive}#environment"
    if _is_loopback(asked.master):
        conf |= {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
    return conf


def _send(spark: SparkSession, folder: Path) -> None:
    """Our package to whoever runs a task; each fetches it from `folder` when it gets its first."""
    spark.sparkContext.addPyFile(str(shipping.wheel(folder)))


def _given(asked: Settings) -> dict[str, str]:
    return {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in asked.conf.items()}


def _is_loopback(master: str | None) -> bool:
    found = re.match(r"spark://\[?([^],/]+?)\]?(:\d+)?$", master or "")
    if not found:
        return False
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(found.group(1)).is_loopback
    return found.group(1) == "localhost"


def _versions_there(_: Iterator[int]) -> Iterator[dict[str, Any]]:
    """Runs on an executor."""
    import socket

    from tunewright.spark import session as ours

    yield {"host": socket.gethostname(), "python": sys.executable, "versions": ours.versions()}


def cause(error: BaseException) -> str:
    """The line of a Java or Python traceback that says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [found.group(1) for line in lines if (found := NAMED.match(line))]
    ours = [line for line in named if not JAVA.match(line)]
    return (ours or named[::-1] or lines[:1] or [type(error).__name__])[-1][:500]


def failed(error: BaseException, doing: str) -> StageError:
    """A Spark job's end as an error of ours, in one line."""
    return StageError(f"{doing} failed on Spark: {cause(error)}")
