"""The life of a run, top to bottom.

    check -> plan -> prepare -> train -> evaluate -> package -> deploy -> test          (destroy ends it)

`advance` does the stages that are not done yet, in this order. The command line, the Python API and the server all
call it; there is no other way to make things happen. A stage is done when its manifest is in the run folder, so a run
that was killed anywhere goes on from where it stood.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from tunewright import chat, deploy, errors, gguf_header, memory, models, tracking
from tunewright import preflight as preflights
from tunewright import recipe as recipes
from tunewright import run as run_folders
from tunewright.backends import base as backends
from tunewright.backends.base import Backend, Job, Problem, Serves
from tunewright.data import mend as mending
from tunewright.data import prepare, sources
from tunewright.data.findings import Findings
from tunewright.data.inspection import LEAKS, Inspector
from tunewright.data.mend import Mended
from tunewright.data.prepare import Assembled
from tunewright.errors import NOT_BETTER, RecipeError, RunError, StageError
from tunewright.models import ModelRef
from tunewright.plan import estimate, free_disk
from tunewright.preflight import Few, Preflight
from tunewright.recipe import BackendChoice, Recipe, Tracking, Train
from tunewright.run import PREDICTIONS, STAGES, Run, read_json_lines, write_json, write_json_lines
from tunewright.summary import write_readme

POLL_S = 0.1
LIBRARIES = (
    "tunewright",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "mlflow-skinny",
    "scikit-learn",
    "numpy",
    "openai",
)


class Watcher:
    """Who looks on. This one says nothing; the command line's draws progress bars."""

    def started(self, run: Run, stage: str) -> None: ...

    def waiting(self, run: Run, stage: str) -> None:
        """Called again and again while a backend is at a stage. A KeyboardInterrupt raised here stops it in order."""

    def progress(self, run: Run, stage: str, done: float, total: float, note: str) -> None: ...

    def finished(self, run: Run, stage: str) -> None: ...

    def problem(self, problem: Problem) -> None: ...


@dataclass(frozen=True)
class Checked:
    """What `check` found."""

    problems: list[Problem]
    model: ModelRef | None = None
    data: Assembled | None = None
    rendering: chat.Equipment | None = None
    inspection: Findings | None = None
    """What a long look at the rows found; None where nobody looked, or could."""
    few: tuple[chat.Example, ...] = ()
    """Training rows that a preflight would learn by heart."""

    @property
    def errors(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.severity == "error"]


@dataclass(frozen=True)
class Outcome:
    """How far a run got."""

    run: Run
    verdict: str | None
    """better, not better or no evidence; None before evaluation, or where the recipe asks for no comparison."""
    did: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return NOT_BETTER if self.verdict not in (None, "better") else 0


def start(recipe: Recipe, runs: Path, *, resume: bool | None = None) -> Run:
    """The run of a recipe: the newest unfinished one that asks for the same on the same data, else a new one.

    Args:
        recipe: with its paths made absolute (`located`).
        runs: the folder of all runs.
        resume: True insists on an unfinished run, False on a new one.

    Raises:
        RunError: `resume` is True and there is no unfinished run.
    """
    now = prepare.source_fingerprint(recipe)
    for run in reversed(run_folders.list_runs(runs)) if resume is not False else ():
        state = run.state()
        same = (state["recipe"], state["sources"]) == (recipe.fingerprint(), now)
        if same and not run.destroyed and any(run.status(stage) != "done" for stage in STAGES):
            return run
        if state["recipe"] == recipe.fingerprint() and run.status("check") != "done":
            return run.begun_on(now)  # nothing came of it yet: the data was mended, and it is the same run
    if resume:
        raise RunError(f"{runs}: no unfinished run of this recipe on this data; leave --resume out to start one")
    return run_folders.create(runs, recipe, sources=now)


def located(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with file paths absolute: as seen from here, else from the recipe's own folder."""
    data: dict[str, Any] = {
        split: tuple(sources.absolute(source, folder) for source in given)
        for split in prepare.SPLITS
        if (given := getattr(recipe.data, split)) is not None
    }
    model = recipe.model
    for candidate in (Path(model).expanduser(), folder / model):
        if (candidate / "config.json").is_file():
            model = str(candidate.absolute())
            break
    judged = {"against": sources.absolute(earlier, folder)} if (earlier := recipe.evaluate.against) else {}
    if (without := recipe.data.without) is not None:
        data["without"] = sources.absolute(without, folder)
    update: dict[str, Any] = {"data": recipe.data.model_copy(update=data), "model": model}
    update["evaluate"] = recipe.evaluate.model_copy(update=judged)
    if (adapter := recipe.train.adapter) is not None:
        beside = folder / adapter
        whole = Path(adapter).expanduser() if Path(adapter).expanduser().exists() else beside
        update["train"] = recipe.train.model_copy(update={"adapter": str(whole.absolute())})
    return recipe.model_copy(update=update)


def advance(run: Run, *, until: str = "test", watcher: Watcher | None = None) -> Outcome:
    """Do every stage up to `until` that is not done yet.

    Raises:
        TunewrightError: a stage failed; the run folder says which and why, and the same call goes on from there.
        KeyboardInterrupt: passed on after the stage was stopped cleanly.
    """
    watcher = watcher or Watcher()
    recipe = run.recipe()
    backend = backends.backend(recipe)
    did = []
    with run.lock():
        for stage in STAGES[: STAGES.index(until) + 1]:
            if run.status(stage) == "done" and not (stage == "deploy" and _fell(run, backend)):
                continue
            if stage == "deploy":
                run.reset(stage)  # an endpoint that fell: neither it nor its test is done any more
            run.set_status(stage, "doing")
            watcher.started(run, stage)
            try:
                _do(stage, run, recipe, backend, watcher)
            except KeyboardInterrupt:
                run.set_status(stage, "cancelled")
                raise
            except Exception as error:
                known = errors.explained(error)
                run.set_status(stage, "failed", error=str(known or error))
                raise known or error from error
            run.set_status(stage, "done")
            write_readme(run)
            watcher.finished(run, stage)
            did.append(stage)
    return Outcome(run, verdict(run), did)


def verdict(run: Run) -> str | None:
    """What evaluation said about `must_beat`; None where it has not spoken or was not asked."""
    if run.status("evaluate") != "done":
        return None
    report = run.manifest("evaluate")
    said: str | None = report["comparison"]["verdict"] if report["must_beat"] else None
    return said


def check(
    recipe: Recipe,
    stages: Iterable[str] = STAGES,
    *,
    inspect: bool = True,
    api: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Checked:
    """What is wrong with the backend's settings, the model and every row, found without training.

    Problems are returned, not raised, so that a person sees them all.

    Args:
        inspect: also take a long look at the rows: duplicates, contradictions, leaks, secrets and so on.
        api: also hold the rows to the rules of OpenAI's and Azure OpenAI's fine-tuning API.
    """
    problems: list[Problem] = []
    try:
        problems += backends.backend(recipe).check(recipe, tuple(stages))
    except RecipeError as error:
        problems.append(Problem(str(error)))
        if backends.hosts(recipe.backend.kind):
            return Checked(problems)  # without the API nobody knows the base
    ref, data, equipment, inspection, few = None, None, None, None, Few()
    if recipe.evaluate.against is not None and not (Path(recipe.evaluate.against) / PREDICTIONS).is_file():
        problems.append(Problem(f"evaluate.against: {recipe.evaluate.against} is no evaluated run (no {PREDICTIONS})"))
    if recipe.train.adapter is not None:
        try:
            models.find_adapter(recipe.train.adapter)
        except errors.ModelError as error:
            problems.append(Problem(str(error)))
    for key, asked in (("method: qlora", recipe.train.method == "qlora"), ("fp16", recipe.train.fp16)):
        if asked and _device(recipe) != "cuda":
            problems.append(Problem(f"train.{key} needs a CUDA GPU, and there is none where it runs; leave it out"))
    try:
        hosted = _hosted(recipe)
        ref = models.find(recipe.model, recipe.revision) if hosted is None else hosted.base(recipe)
        tokenizer = models.load_tokenizer(ref)
        equipment = chat.equip(tokenizer)
        problems += [Problem(*said) for said in gguf_header.problems(recipe, ref, tokenizer, equipment)]
        if unread := _tables_elsewhere(recipe):
            data = prepare.unread(recipe, ref)
            names = ", ".join(unread)
            said = f"the rows of {names} are looked at in prepare, where Spark is; the plan does not count them"
            problems.append(Problem(said, "warning"))
        else:
            inspector = Inspector(recipe, tokenizer, equipment, api=api) if inspect else None

            def look(split: str, example: chat.Example, rendering: chat.Rendering) -> None:
                if split == "train":
                    few.add(example, len(rendering.ids))
                if inspector is not None:
                    inspector.add(split, example, rendering)

            data = prepare.assemble(recipe, ref, tokenizer, equipment, look=look, lenient=True, progress=progress)
            problems += [Problem(str(error)) for error in prepare.stops(recipe, data)]
            inspection = inspector.finish(data.splits) if inspector else None
            problems += hosted.check_rows(recipe, data) if hosted is not None else []
    except errors.UserError as error:
        problems.append(Problem(str(error)))
    problems += (
        [Problem(f"{one.where}: {one.message}") for one in inspection.first if one.severity == "error"]
        if (inspection)
        else []
    )
    return Checked(problems, ref, data, equipment, inspection, tuple(few.chosen()))


def preflight(recipe: Recipe, checked: Checked, *, progress: preflights.Progress | None = None) -> Preflight:
    """Learn a few of the rows that `check` saw by heart, on this machine, and have the model say them.

    Raises:
        RecipeError: the first error that `check` found.
        TunewrightError: as training itself would, such as a module that LoRA does not find.
    """
    backend = backends.backend(recipe)
    elsewhere = isinstance(backend, backends.Elsewhere)
    if isinstance(backend, backends.Hosts):
        return Preflight("skipped", seen=f"backend.kind: {recipe.backend.kind} trains behind an API, weights and all")
    if recipe.task == "reward":
        return Preflight("skipped", seen="task: reward has no answers to learn by heart; its answers are drawn")
    if not checked.few and not checked.errors:
        return Preflight("skipped", seen="the rows are where Spark is, and this machine reads none of them")
    resolved = resolve(recipe, checked, Path())
    method = resolved["train"]["method"]
    if elsewhere and method == "qlora" and models.best_device(use_cpu=recipe.train.use_cpu) != "cuda":
        return Preflight("skipped", seen="train.method: qlora needs a CUDA GPU, and this machine has none")
    # One process of this machine, whatever trains later.
    kept = recipe.train.model_dump(exclude_unset=True)
    kept = {key: value for key, value in kept.items() if not key.startswith(("ddp_", "fsdp"))}
    own = recipe.model_copy(
        update={
            "backend": BackendChoice(),
            "tracking": Tracking(enabled=False),
            "train": Train.model_validate(kept | {"method": method} | ({"fp16": False} if elsewhere else {})),
        }
    )
    found = preflights.apart(own, resolve(own, checked, Path()), checked.few, progress or (lambda *_: None))
    there = f"done on this machine; backend.kind: {recipe.backend.kind} trains elsewhere" if elsewhere else ""
    return replace(found, note=there)


def _do(stage: str, run: Run, recipe: Recipe, backend: Backend, watcher: Watcher) -> None:
    match stage:
        case "check":
            _check(run, recipe, watcher)
        case "plan":
            planned = estimate(recipe, run.resolved(), backend)
            if planned["disk_bytes"] > (free := free_disk(run.path)):
                watcher.problem(
                    Problem(
                        f"the run will take about {planned['disk_bytes'] / 1e9:.1f} GB of disk and {free / 1e9:.1f} GB "
                        "are free here; free some, set train.save_total_limit lower, or use another --runs",
                        "warning",
                    )
                )
            settled = run.resolved()["train"]
            shared = recipe.train.fsdp or not planned["here"]  # each has its share; elsewhere has other memory
            if settled["memory_bytes"] > settled["free_bytes"] and not shared:
                watcher.problem(
                    Problem(
                        f"training will take about {settled['memory_bytes'] / 1e9:.1f} GB of memory and "
                        f"{settled['free_bytes'] / 1e9:.1f} GB are free; set train.method: lora, "
                        "train.gradient_checkpointing: true, or fewer train.tokens_per_forward",
                        "warning",
                    )
                )
            write_json(run.manifest_file("plan"), planned)
        case "deploy":
            deploy.deploy(run, backend)
        case "test":
            deploy.test(run, backend, progress=lambda done, total: watcher.progress(run, "test", done, total, ""))
        case _:
            _hand_over(stage, run, backend, watcher)


def _fell(run: Run, backend: Backend) -> bool:
    """Whether an endpoint that was deployed no longer answers (the machine was restarted, say)."""
    return isinstance(backend, Serves) and not backend.serving(run)


def _check(run: Run, recipe: Recipe, watcher: Watcher) -> None:
    """Stop at the first error; else write down all that was settled (resolved.json)."""
    checked = check(recipe)
    for problem in checked.problems:
        if problem is not next(iter(checked.errors), None):  # that one is raised below
            watcher.problem(problem)
    if checked.inspection is not None:
        write_json(run.inspection_file, checked.inspection.to_dict() | {"leaked": leaked(checked)})
    write_json(run.manifest_file("check"), resolve(recipe, checked, run.path.parent))


def mend(recipe: Recipe, out: Path) -> Mended:
    """Write a copy of the recipe's data with what can be mended mended (data/mend.py says what).

    Raises:
        DataError, ModelError: as `mend.mend`, and as the base's tokenizer.
    """
    hosted = _hosted(recipe)
    ref = models.find(recipe.model, recipe.revision) if hosted is None else hosted.base(recipe)
    tokenizer = models.load_tokenizer(ref)
    return mending.mend(recipe, ref, tokenizer, chat.equip(tokenizer), out)


def without(run: Run, drop: int, lists: Iterable[Path]) -> Recipe:
    """The recipe of a run without some training rows, to be compared with that run. The list of the rows is written
    into the run's folder.

    Raises:
        RunError: nothing is to be left out, or there are fewer suspects than `drop`.
        DataError: a list cannot be read.
    """
    recipe = run.recipe()
    found = read_json_lines(run.suspects_file)
    if drop > len(found):
        raise RunError(
            f"{run.suspects_file}: {len(found)} rows have a label that is probably wrong; drop that many or fewer"
            if run.suspects_file.is_file()
            else f"{run.path}: no row is known to have a wrong label (no {run.suspects_file.name}); evaluate a "
            "classification first, or name rows with --without FILE"
        )
    digests = {str(one["sha256"]) for one in found[:drop]}
    for source in (*([recipe.data.without] if recipe.data.without else []), *map(str, lists)):
        digests |= prepare.unwanted(source)
    if not digests:
        raise RunError("no row is to be left out; say how many with --drop N, or which with --without FILE")
    name = hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()[:12]
    path = run.stage_folder("evaluate") / f"without-{name}.jsonl"
    write_json_lines(path, [{"sha256": digest} for digest in sorted(digests)])
    data = recipe.data.model_copy(update={"without": str(path.absolute())})
    judged = recipe.evaluate.model_copy(update={"against": str(run.path.absolute()) if recipe.data.holds_out else None})
    return recipe.model_copy(update={"data": data, "evaluate": judged})


def leaked(checked: Checked) -> list[str]:
    """Where the test rows stand whose text training has seen, exactly or nearly."""
    found = (*(checked.data.findings if checked.data else ()), *(checked.inspection or ()))
    return sorted({one.where for one in found if one.code in LEAKS})


def resolve(recipe: Recipe, checked: Checked, runs: Path) -> dict[str, Any]:
    """Everything that was settled: what resolved.json says.

    Raises:
        RecipeError: the first error that `check` found.
    """
    if checked.errors:
        raise RecipeError(checked.errors[0].message)
    assert checked.model is not None
    assert checked.data is not None
    device = _device(recipe)
    if checked.model.kind == "hosted":
        device = "hosted"
        settled = memory.Settled("hosted", "the API trains", False, "the API trains", 0, 0, 0)
    else:
        settled = memory.settle(recipe, checked.model, device, checked.data.splits["train"])
    rate = recipe.train.learning_rate
    return {
        "format": 1,
        "recipe": recipe.model_dump(mode="json", by_alias=True),
        "recipe_sha256": recipe.fingerprint(),
        "model": checked.model.to_dict(),
        "max_length": checked.data.max_length,
        "train": settled.to_dict(),
        "learning_rate": _rate(recipe, settled.method) if rate is None else rate,
        "metric": recipe.metric,
        "baselines": list(recipe.baselines),
        "seed": recipe.train.seed,
        "device": device,
        "tracking": _tracking(recipe, runs),
        "data": checked.data.splits,
        "rendering": checked.rendering.to_dict() if checked.rendering else None,
        "warnings": [problem.message for problem in checked.problems],
        "versions": {"python": platform.python_version()} | _versions(),
        "platform": platform.platform(),
        "source_commit": _source_commit(),
    }


def _rate(recipe: Recipe, method: str) -> float | None:
    return None if method == "hosted" else recipes.default_rate(recipe.task, method)


def _hosted(recipe: Recipe) -> backends.Hosts | None:
    """The backend, where the weights are behind it."""
    try:
        backend = backends.backend(recipe)
    except RecipeError:  # reported by its own check
        return None
    return backend if isinstance(backend, backends.Hosts) else None


def _tracking(recipe: Recipe, runs: Path) -> dict[str, str]:
    """Where MLflow is: as the recipe says, else where the backend has one, else as the environment says, else here."""
    backend = backends.backend(recipe)
    if recipe.tracking.enabled and recipe.tracking.uri is None and isinstance(backend, backends.Tracks):
        uri, experiment = backend.tracking(recipe)
        return {"uri": uri, "experiment": experiment}
    uri = tracking.settle(recipe.tracking.uri, runs, os.environ)
    return {"uri": uri, "experiment": recipe.tracking.experiment}


def _tables_elsewhere(recipe: Recipe) -> list[str]:
    """The recipe's tables that its backend reads, and this machine does not."""
    try:
        backend = backends.backend(recipe)
    except RecipeError:  # reported by its own check
        return []
    given = [source for split in prepare.SPLITS for source in getattr(recipe.data, split) or ()]
    return [one for one in given if sources.is_table(one)] if isinstance(backend, backends.Elsewhere) else []


def _device(recipe: Recipe) -> str:
    """What training computes on: here, or where the backend says."""
    try:
        backend = backends.backend(recipe)
    except RecipeError:  # reported by its own check
        backend = None
    elsewhere = backend.device(recipe) if isinstance(backend, backends.Elsewhere) else None
    return elsewhere or models.best_device(use_cpu=recipe.train.use_cpu)


def _hand_over(stage: str, run: Run, backend: Backend, watcher: Watcher) -> None:
    """Ask the backend for a stage and look on until it is done."""
    job = Job(stage, "0")
    try:
        job = backend.submit(stage, run)
        while (status := backend.poll(job, run)).state == "running":
            try:
                if (seen := run.progress(stage)) is not None:
                    watcher.progress(run, stage, seen["done"], seen["total"], seen["note"])
                watcher.waiting(run, stage)
            except Exception:  # whoever looks on cannot go on, so nobody would know of what runs
                backend.cancel(job, run)
                raise
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        backend.cancel(job, run)
        raise
    match status.state:
        case "done":
            backend.collect(job, run)
        case "failed":
            raise errors.from_name(status.kind, status.message)
        case "cancelled":
            raise StageError(
                f"{stage} was stopped ({status.message}); run the same command again, it goes on from there"
            )
        case _:
            raise StageError(
                f"{stage} vanished (killed, or out of memory?); its log is {run.log_file(stage)}. "
                "Run the same command again, it goes on from the last checkpoint"
            )


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _source_commit() -> str | None:
    """The commit of Tunewright's own source, where it runs from a checkout."""
    folder = Path(__file__).parent
    if shutil.which("git") is None or not any((parent / ".git").exists() for parent in folder.parents):
        return None
    said = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return said.stdout.strip() or None
