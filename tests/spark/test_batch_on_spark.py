"""Batch inference on a real cluster gives the rows and answers of one machine; so does MLflow's own function."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from on_spark import executors, kill, when
from pyarrow import parquet

import tunewright
from clusters import cluster, stop
from tunewright.package.batch import Asked
from tunewright.run import Run
from tunewright.spark import batching, session
from tunewright.spark.settings import settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("cluster")
    yield made
    stop(made)


@pytest.fixture(scope="module")
def spark(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    master = cluster(folder)
    with session.session(settings({"master": master}), "test", tmp_path_factory.mktemp("site")) as made:
        yield made


def write(path: Path, rows: int) -> Path:
    lines = [json.dumps({"id": number, "text": f"lovely {number}"}) for number in range(rows)]
    lines[7] = "{broken"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.slow
def test_the_cluster_answers_as_one_machine_does(spark: Any, packaged_classifier: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", 2500)
    told: list[tuple[int, int]] = []
    asked = Asked(str(packaged_classifier.package), [str(source)], str(tmp_path / "there.parquet"))
    summary = batching.answer(asked, spark, lambda done, total: told.append((done, total)))
    here = tunewright.batch(packaged_classifier.path, [str(source)], tmp_path / "here.parquet")
    assert (summary["rows"], summary["errors"]) == (here["rows"], here["errors"]) == (2500, 1)
    assert told[-1] == (2500, 2500)
    ours, theirs = (parquet.read_table(tmp_path / f"{name}.parquet").to_pylist() for name in ("there", "here"))
    for one, other in zip(ours, theirs, strict=True):
        assert {key: one[key] for key in ("row", "id", "text", "prediction", "error")} == {
            key: other[key] for key in ("row", "id", "text", "prediction", "error")
        }
        if one["error"] is None:
            assert one["probability"] == pytest.approx(other["probability"], abs=1e-6)


@pytest.mark.slow
def test_a_table_is_answered(spark: Any, packaged_classifier: Run, tmp_path: Path) -> None:
    spark.createDataFrame([(f"awful {n}", n) for n in range(60)], "text string, n int").createOrReplaceTempView("asked")
    summary = batching.answer(
        Asked(str(packaged_classifier.package), ["spark:asked"], str(tmp_path / "out"), limit=50),
        spark,
        lambda *_: None,
    )
    assert (summary["rows"], summary["errors"]) == (50, 0)
    found = spark.read.parquet((tmp_path / "out").as_uri())
    assert found.count() == 50
    assert found.where("prediction is null").count() == 0
    assert {row["row"] for row in found.collect()} == {f"spark:asked:row {number}" for number in range(1, 51)}


@pytest.mark.slow
def test_mlflows_function_over_a_column_gives_the_same_answers(spark: Any, packaged_classifier: Run) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's notes on its own modules
        import mlflow

        uri = packaged_classifier.resolved()["tracking"]["uri"]
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        path = mlflow.artifacts.download_artifacts(packaged_classifier.manifest("package")["mlflow"])
        answer = mlflow.pyfunc.spark_udf(spark, path, result_type="prediction string", env_manager="local")
    known = [
        row for row in parquet.read_table(packaged_classifier.predictions_file).to_pylist() if row["model"] == "tuned"
    ]
    frame = spark.createDataFrame(_texts(packaged_classifier), "text string")
    said = frame.select(answer(frame["text"]).getField("prediction").alias("said")).collect()
    assert [row["said"] for row in said] == [row["prediction"] for row in known]


def _texts(run: Run) -> list[tuple[str]]:
    source = Path(run.recipe().data.test[0])  # type: ignore[index]
    return [(json.loads(line)["text"],) for line in source.read_text().splitlines()]


@pytest.mark.slow
def test_an_executor_that_is_killed_costs_time_and_no_row(
    spark: Any, folder: Path, packaged_classifier: Run, tmp_path: Path
) -> None:
    source = write(tmp_path / "in.jsonl", 20_000)
    asked = Asked(str(packaged_classifier.package), [str(source)], str(tmp_path / "out"))

    def strike() -> None:
        when(lambda: len(list(asked.parts.glob("part-*.json"))) >= 3)
        kill(executors(folder)[0].pid)

    striking = threading.Thread(target=strike)
    striking.start()
    summary = batching.answer(asked, spark, lambda *_: None)
    striking.join()
    assert (summary["rows"], summary["errors"]) == (20_000, 1)
    tables = [parquet.read_table(path) for path in sorted((tmp_path / "out").glob("part-*"))]
    assert len({row["row"] for table in tables for row in table.to_pylist()}) == 20_000
    assert (tmp_path / "out" / "_SUCCESS").is_file()
