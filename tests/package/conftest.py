"""Runs of a tiny model that are evaluated, and packaged with tracking on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tunewright import life, models, tracking, work
from tunewright import recipe as recipes
from tunewright.evaluate import measure
from tunewright.package import formats
from tunewright.run import Run
from tunewright.testing import tiny_data, tiny_model
from tunewright.tracking import Tracker
from tunewright.train import supervised

Make = Callable[..., Run]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A run up to `evaluate`, without tracking unless `tracking` says otherwise; keywords are sections."""
    torch.set_num_threads(1)

    def begin(*, model: Path | None = None, **sections: Any) -> Run:
        folder = tmp_path_factory.mktemp("package")
        given = {
            "name": "kindness",
            "model": str(model or tiny_model(folder / "model")),
            "task": "classification",
            "data": tiny_data(folder / "data", train=32, test=10),
            "train": {"learning_rate": 1e-2, "epochs": 1, "batch_size": 8, "lora": {"r": 4}},
            "evaluate": {"bootstrap": 200, "baselines": ["zero-shot"]},
            "tracking": {"enabled": False},
        }
        run = life.start(recipes.loads(yaml.safe_dump(given | sections)), folder / "runs", resume=False)
        life.advance(run, until="check")
        work.prepare(run)
        with tracking.attach(run) as tracker:
            supervised.fit(run, tracker)
            measure.evaluate(run, tracker)
        return run

    return begin


@pytest.fixture(scope="session")
def packaged(make: Make) -> Run:
    """An adapter trained on classes, packaged and registered. Not to be changed."""
    run = make(tracking={"enabled": True})
    with tracking.attach(run) as tracker:
        formats.package(run, tracker)
    return run


@pytest.fixture(scope="session")
def endless(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Packaged from a base without an end of sequence, whose head is not its embedding."""
    folder = tiny_model(tmp_path_factory.mktemp("endless") / "model", eos=False)
    model = models.load_folder(folder)
    model.get_input_embeddings().weight.data *= 10
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    with models.quiet():
        model.save_pretrained(str(folder))
    train = {"learning_rate": 1e-2, "epochs": 15, "batch_size": 8, "lora": {"r": 8}}
    run = make(model=folder, train=train)
    formats.package(run, Tracker(run))
    return run
