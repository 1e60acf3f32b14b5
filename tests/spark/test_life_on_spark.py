"""One recipe, on this machine and on a cluster: the same rows, the same weights, the same report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from on_spark import start
from pyarrow import parquet
from safetensors.torch import load_file

from tunewright import life
from tunewright.run import Run
from tunewright.testing import tiny_data, tiny_model

pytestmark = pytest.mark.slow  # two whole lives, one of them on a cluster: five minutes on two cores


@pytest.fixture(scope="module")
def both(master: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """The same recipe, done here and on the cluster by two processes."""
    home = tmp_path_factory.mktemp("both")
    model = tiny_model(home / "model")
    data = tiny_data(home / "data", train=57, test=40)
    here = start(home / "here", model, data, {"kind": "local", "threads": 1})
    there = start(home / "there", model, data, {"kind": "spark", "master": master, "processes": 2})
    for run in (here, there):
        life.advance(run)
    return here, there


def test_the_cluster_trains_the_weights_of_one_process(both: tuple[Run, Run]) -> None:
    here, there = both
    assert there.manifest("train")["steps"] == here.manifest("train")["steps"]
    one, other = (load_file(run.trained("full") / "model.safetensors") for run in both)
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], rtol=0, atol=1e-5)
    world = {entry["world"] for entry in _ranks(there)}
    assert (len(_ranks(there)), world) == (2, {2})


def test_prepared_rows_and_tokens_are_the_same_bytes(both: tuple[Run, Run]) -> None:
    here, there = both
    names = sorted(path.name for path in (here.path / "data").iterdir() if path.name != "log.txt")
    assert sorted(path.name for path in (there.path / "data").iterdir() if path.name != "log.txt") == names
    for name in names:
        assert (there.path / "data" / name).read_bytes() == (here.path / "data" / name).read_bytes(), name


def test_the_report_is_the_same_and_so_is_every_prediction(both: tuple[Run, Run]) -> None:
    rows = [parquet.read_table(run.predictions_file).to_pylist() for run in both]
    for one, other in zip(*rows, strict=True):
        assert (one["model"], one["id"], one["prediction"]) == (other["model"], other["id"], other["prediction"])
        if one["probabilities"] is not None:
            np.testing.assert_allclose(one["probabilities"], other["probabilities"], atol=1e-4)
    here, there = (run.manifest("evaluate") for run in both)
    assert _shape(here) == _shape(there)
    assert here["models"]["tuned"]["accuracy"] == there["models"]["tuned"]["accuracy"]
    assert here["comparison"]["verdict"] == there["comparison"]["verdict"]
    assert both[1].status("test") == "done"
    for run in both:
        life_end(run)


def life_end(run: Run) -> None:
    from tunewright import destroy
    from tunewright.backends import base

    destroy.destroy(run, base.backend(run.recipe()))


def _ranks(run: Run) -> list[dict[str, Any]]:
    from tunewright.run import read_json

    return [read_json(path) for path in sorted((run.path / "jobs" / "ranks").glob("rank-?.json"))]


def _shape(value: Any) -> Any:
    """The keys of a report, whatever stands under them."""
    if isinstance(value, dict):
        return {key: _shape(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_shape(below) for below in value[:1]]
    return "number" if isinstance(value, int | float) else type(value).__name__


def test_files_of_a_run_lie_in_its_folder_alone(both: tuple[Run, Run]) -> None:
    there = both[1]
    assert {path.name for path in there.path.parent.iterdir()} == {there.id, ".tunewright"}
    assert not list(Path.cwd().glob("spark-warehouse"))
    assert not list(Path.cwd().glob("metastore_db"))
