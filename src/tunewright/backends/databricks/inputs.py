"""What a run's stages read over there, uploaded under a name that says what it holds, so that nothing goes twice and
two files of one name stay two.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunewright import models, shipping
from tunewright.backends.databricks.volume import Volume
from tunewright.data import sources
from tunewright.recipe import Recipe
from tunewright.run import Run

SPLITS = ("train", "test", "validation")
BLOCK = 2**20


class Inputs:
    """The folder `inputs` of a run in the volume; `there` is what lies below the run's folder, with sizes in bytes."""

    def __init__(self, volume: Volume, home: str, there: dict[str, int]) -> None:
        self.volume, self.home, self.there = volume, home, there

    def wheel(self) -> str:
        """The place of Tunewright's own wheel."""
        with tempfile.TemporaryDirectory() as folder:
            return self._file(shipping.wheel(Path(folder)))

    def moved(self, recipe: Recipe, resolved: dict[str, Any]) -> tuple[Recipe, dict[str, Any]]:
        """The recipe and what was resolved as they are over there: files of this machine are sent and named by their
        place, hub names, tables and what ships with Tunewright stay as they are."""
        data: dict[str, Any] = {
            split: tuple(place for source in given for place in self._source(source, f"data.{split}"))
            for split in SPLITS
            if (given := getattr(recipe.data, split)) is not None
        }
        if recipe.data.without is not None:
            data["without"] = self._file(Path(recipe.data.without))
        update: dict[str, Any] = {"data": recipe.data.model_copy(update=data)}
        if recipe.evaluate.against is not None:
            there = self._run(Run.open(recipe.evaluate.against))
            update["evaluate"] = recipe.evaluate.model_copy(update={"against": there})
        if recipe.train.adapter is not None:
            adapter = self._folder(models.find_adapter(recipe.train.adapter))
            update["train"] = recipe.train.model_copy(update={"adapter": adapter})
        if resolved["model"]["kind"] == "folder":
            place = self._folder(Path(resolved["model"]["source"]))
            resolved = resolved | {"model": resolved["model"] | {"source": place}}
        return recipe.model_copy(update=update), resolved

    def _source(self, source: str, key: str) -> list[str]:
        if not sources.is_file(source) or source.startswith(sources.STARTER):
            return [source]
        return [self._file(path) for path in sources.files(source, key)]

    def _file(self, path: Path) -> str:
        return self._sent([path], _digest(path)) + f"/{path.name}"

    def _folder(self, folder: Path) -> str:
        """A folder's files (not those of folders in it: a model and an adapter need none)."""
        files = sorted(one for one in folder.iterdir() if one.is_file())
        known = json.dumps([(one.name, _digest(one)) for one in files])
        return self._sent(files, hashlib.sha256(known.encode()).hexdigest())

    def _run(self, run: Run) -> str:
        """What an earlier run is compared by: its test rows and its answers."""
        files = [
            one
            for one in (
                *(run.state_file, run.recipe_file, run.manifest_file("prepare"), run.data_file("test")),
                run.predictions_file,
            )
            if one.is_file()
        ]
        known = json.dumps([(one.name, _digest(one)) for one in files])
        place = f"{self.home}/inputs/{hashlib.sha256(known.encode()).hexdigest()[:16]}/{run.id}"
        for path in files:
            name = f"{place}/{path.relative_to(run.path).as_posix()}"
            if self.there.get(name) != path.stat().st_size:
                self.volume.upload(name, path)
        return place

    def _sent(self, files: Sequence[Path], digest: str) -> str:
        place = f"{self.home}/inputs/{digest[:16]}"
        for path in files:
            if self.there.get(f"{place}/{path.name}") != path.stat().st_size:
                self.volume.upload(f"{place}/{path.name}", path)
        return place


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
