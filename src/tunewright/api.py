"""The verbs of the command line for a notebook.

import tunewright

life = tunewright.open("recipe.yaml")
life.check()
life.run(until="evaluate")
life.report["comparison"]["verdict"]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tunewright import destroy as removal
from tunewright import life, plan, summary
from tunewright import recipe as recipes
from tunewright.backends import base as backends
from tunewright.data.mend import Mended
from tunewright.errors import RunError
from tunewright.life import Checked, Outcome, Watcher
from tunewright.preflight import Preflight, Progress
from tunewright.recipe import Recipe
from tunewright.run import STAGES, Run

DEFAULT_RUNS = "runs"


class Life:
    """A recipe or a run, and what can be done with it. Every verb may be repeated; what is done stays done."""

    def __init__(self, recipe: Recipe, runs: Path, *, run: Run | None = None, resume: bool | None = None) -> None:
        self.recipe = recipe
        self.runs = runs
        self._run = run
        self._resume = resume

    @property
    def folder(self) -> Run:
        """The run folder: the one that was opened, an unfinished one of this recipe, or a new one."""
        if self._run is None:
            self._run = life.start(self.recipe, self.runs, resume=self._resume)
        return self._run

    @property
    def report(self) -> dict[str, Any]:
        """evaluate/report.json."""
        return self.folder.manifest("evaluate")

    def check(
        self, *, inspect: bool = True, api: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> Checked:
        """What is wrong with the backend's settings, the model and every row, found without training.

        Args:
            inspect: also take a long look at the rows: duplicates, contradictions, leaks, secrets and so on.
            api: also hold the rows to the rules of OpenAI's and Azure OpenAI's fine-tuning API.
        """
        return life.check(self.recipe, inspect=inspect, api=api, progress=progress)

    def preflight(self, *, progress: Progress | None = None) -> Preflight:
        """Learn a few of the rows by heart, and have the model say them as an endpoint would; nothing of it stays.

        Raises:
            RecipeError: `check` finds an error.
        """
        return life.preflight(self.recipe, self.check(inspect=False), progress=progress)

    def mend(self, out: str | Path) -> Mended:
        """Write a copy of the data with what can be mended mended, and every change in OUT.changes.jsonl."""
        return life.mend(self.recipe, Path(out))

    def without(self, drop: int = 0, lists: Iterable[str | Path] = ()) -> Life:
        """The same recipe without some training rows, ready to be run beside this one.

        Args:
            drop: leave out so many of the rows whose labels are the likeliest to be wrong (evaluate/suspects.jsonl).
            lists: leave out the rows that these files name too (`data.without` says how).

        Raises:
            RunError: nothing is to be left out, or there are fewer suspects.
        """
        recipe = life.without(self.folder, drop, [Path(one) for one in lists])
        return Life(recipe, self.runs)

    def plan(self) -> dict[str, Any]:
        """Tokens, steps, time, memory, and what will be made."""
        resolved = life.resolve(self.recipe, self.check(inspect=False), self.runs)
        return plan.estimate(self.recipe, resolved, backends.backend(self.recipe))

    def run(self, *, until: str = "test", watcher: Watcher | None = None) -> Outcome:
        """Every stage up to `until` that is not done yet."""
        return life.advance(self.folder, until=until, watcher=watcher)

    def prepare(self, *, watcher: Watcher | None = None) -> Outcome:
        return self.run(until="prepare", watcher=watcher)

    def train(self, *, watcher: Watcher | None = None) -> Outcome:
        return self.run(until="train", watcher=watcher)

    def evaluate(self, *, watcher: Watcher | None = None) -> Outcome:
        return self.run(until="evaluate", watcher=watcher)

    def package(self, *, watcher: Watcher | None = None) -> Outcome:
        return self.run(until="package", watcher=watcher)

    def deploy(self, *, watcher: Watcher | None = None) -> Outcome:
        return self.run(until="deploy", watcher=watcher)

    def test(self, *, watcher: Watcher | None = None) -> Outcome:
        return self.run(until="test", watcher=watcher)

    def forget(self, stage: str) -> None:
        """Make a stage and all after it undone, so that the next verb does them again; what still runs is stopped."""
        run, backend = self.folder, backends.backend(self.recipe)
        with run.lock():
            for later in STAGES[STAGES.index(stage) :]:
                if later in backends.STAGES:
                    backend.cancel(backends.Job(later, "0"), run)
            if isinstance(backend, backends.Serves):
                backend.undeploy(run)
            if isinstance(backend, backends.Remembers):
                backend.forget(stage, run)
            run.reset(stage)

    def show(self) -> dict[str, Any]:
        """What is known about the run."""
        known = summary.facts(self.folder)
        if "endpoint" in known:
            backend = backends.backend(self.recipe)
            known["endpoint"] |= {"up": isinstance(backend, backends.Serves) and backend.serving(self.folder)}
        return known

    def destroy(self, *, files: bool = False) -> list[removal.Removed]:
        """Stop and remove everything that the run made outside its folder; with `files` the folder too."""
        return removal.destroy(self.folder, backends.backend(self.recipe), files=files)


def open(
    path: str | Path, *, runs: str | Path = DEFAULT_RUNS, overrides: Iterable[str] = (), resume: bool | None = None
) -> Life:
    """A recipe file or a run folder, ready for its verbs.

    Args:
        path: recipe.yaml, or a run folder (or the id of one in `runs`).
        runs: the folder of all runs.
        overrides: `key=value`, as after `--set`; for a recipe only.
        resume: True insists on an unfinished run of the recipe, False on a new one.

    Raises:
        RecipeError, RunError: it is neither, or says something that cannot be done.
    """
    given, runs, overrides = Path(path), Path(runs), list(overrides)
    folder = next((one for one in (given, runs / given) if (one / "state.json").is_file()), None)
    if folder is not None or given.is_dir():
        run = Run.open(folder or given)
        if overrides or resume is False:
            raise RunError(
                f"{path}: this run's recipe is settled; --set and --fresh are for recipes, which start new runs"
            )
        return Life(run.recipe(), run.path.parent, run=run)
    recipe = recipes.load(given, overrides)
    return Life(life.located(recipe, given.absolute().parent), runs, resume=resume)


def for_data(source: str, *, model: str = "starter", test: str | None = None, runs: str | Path = DEFAULT_RUNS) -> Life:
    """A data file, glob, folder or hub data set with the recipe that `tunewright init` would write for it.

    Args:
        model: whose tokenizer and chat template the rows are looked at with.
        test: the test set. Default: test.* beside train.*, else a tenth is held out.

    Raises:
        DataError: nothing can be read, or nothing in it looks like something to learn.
    """
    from tunewright.data import guess

    recipe = recipes.loads(guess.recipe_for(source, model=model, test=test), f"the recipe for {source}")
    return Life(life.located(recipe, Path.cwd()), Path(runs))


__all__ = ["DEFAULT_RUNS", "STAGES", "Life", "for_data", "open"]
