"""The run folder: the only code that knows its file names.

A run is a folder that a person can read. Stages meet only through its files. Everything that is replaced is replaced
by an atomic rename; a stage's manifest is written last, so a stage is done when its manifest is there, and killing
any process at any moment loses nothing that was finished.

What is not covered: what the files mean. That is for the stage that writes them.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from tunewright import recipe as recipes
from tunewright.errors import DiskFullError, RunBusyError, RunError, TunewrightError, explained
from tunewright.recipe import Recipe

FORMAT = 1
"""Version of the folder's layout. A folder with a higher one was written by a newer Tunewright and is refused."""

UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK)
"""What the system says of what a mount cannot do."""

STAGES = ("check", "plan", "prepare", "train", "evaluate", "package", "deploy", "test")
PREDICTIONS = "evaluate/predictions.parquet"
Status = Literal["todo", "doing", "done", "failed", "cancelled"]

MANIFESTS = {
    "check": "resolved.json",
    "plan": "plan.json",
    "prepare": "data/checks.json",
    "train": "train/manifest.json",
    "evaluate": "evaluate/report.json",
    "package": "package/manifest.json",
    "deploy": "deploy/endpoint.json",
    "test": "deploy/test.json",
}
"""Each stage's last file: the stage is done when it is there."""


@dataclass(frozen=True)
class Run:
    """One run folder. `Run.open` and `create` are the ways to get one."""

    path: Path

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """The run in an existing folder.

        Raises:
            RunError: there is no run there, its state cannot be read, or a newer Tunewright wrote it.
        """
        run = cls(Path(path).resolve())
        if not run.state_file.is_file():
            raise RunError(f"{path}: not a run folder (no state.json); `tunewright runs` lists the ones there are")
        state = run.state()
        version = state.get("format") if isinstance(state, dict) else None
        if not isinstance(version, int):
            raise RunError(f"{run.state_file}: no `format`; the file is damaged")
        if version > FORMAT:
            raise RunError(
                f"{path}: written by a newer Tunewright (run format {version}; this one reads up to {FORMAT}); "
                "upgrade with `pip install -U tunewright`"
            )
        return run

    # --- file names ---

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def state_file(self) -> Path:
        return self.path / "state.json"

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def ledger_file(self) -> Path:
        return self.path / "resources.jsonl"

    @property
    def readme_file(self) -> Path:
        return self.path / "README.md"

    @property
    def metrics_file(self) -> Path:
        return self.path / "train" / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "train" / "checkpoints"

    @property
    def predictions_file(self) -> Path:
        return self.path / PREDICTIONS

    @property
    def report_page(self) -> Path:
        return self.path / "evaluate" / "report.html"

    @property
    def suspects_file(self) -> Path:
        """Training rows whose label is probably wrong, the likeliest first."""
        return self.path / "evaluate" / "suspects.jsonl"

    @property
    def nearest_file(self) -> Path:
        """For each error the training rows that it probably comes from."""
        return self.path / "evaluate" / "nearest.jsonl"

    @property
    def report_text(self) -> Path:
        return self.path / "evaluate" / "report.md"

    @property
    def package(self) -> Path:
        return self.path / "package"

    @property
    def card_file(self) -> Path:
        return self.path / "package" / "card.md"

    @property
    def gguf(self) -> Path:
        return self.package / "gguf"

    @property
    def packaged_model(self) -> Path:
        return self.path / "package" / "model"

    @property
    def packaged_adapter(self) -> Path:
        return self.path / "package" / "adapter"

    @property
    def rendering_file(self) -> Path:
        return self.path / "package" / "rendering.json"

    @property
    def key_file(self) -> Path:
        return self.path / "deploy" / "key"

    @property
    def test_key_file(self) -> Path:
        return self.path / "deploy" / "test-key"

    @property
    def last_test_file(self) -> Path:
        """The test of an endpoint that is no longer there."""
        return self.path / "deploy" / "last-test.json"

    @property
    def failed_test_file(self) -> Path:
        """A test in which the endpoint answered otherwise than offline."""
        return self.path / "deploy" / "failed-test.json"

    @property
    def tracking_file(self) -> Path:
        return self.path / "tracking.json"

    def data_file(self, split: str) -> Path:
        return self.path / "data" / f"{split}.jsonl"

    def tokens_file(self, split: str, part: Literal["tokens", "mask", "sequences"]) -> Path:
        return self.path / "data" / f"{split}.{part}.npy"

    @property
    def inspection_file(self) -> Path:
        """What `check` found in the rows."""
        return self.path / "data" / "inspection.json"

    @property
    def findings_file(self) -> Path:
        """Every row that was left out or cut, one a line; the manifest has their numbers and the first of each kind."""
        return self.path / "data" / "findings.jsonl"

    def manifest_file(self, stage: str) -> Path:
        return self.path / MANIFESTS[stage]

    @property
    def preflight_file(self) -> Path:
        """What came of learning a few rows by heart before training."""
        return self.path / "train" / "preflight.json"

    @property
    def lower_file(self) -> Path:
        """What frozen layers make of the training rows, while training lasts."""
        return self.path / "train" / "lower.npy"

    def trained(self, method: str) -> Path:
        """Where training leaves its weights: an adapter or a whole model."""
        return self.path / "train" / ("model" if method == "full" else "adapter")

    def log_file(self, stage: str) -> Path:
        """What the stage's process printed."""
        return self.stage_folder(stage) / "log.txt"

    def job_file(self, stage: str) -> Path:
        return self.path / "jobs" / f"{stage}.json"

    def failure_file(self, stage: str) -> Path:
        return self.path / "jobs" / f"{stage}-failure.json"

    def progress_file(self, stage: str) -> Path:
        return self.path / "jobs" / f"{stage}-progress.json"

    def lock_file(self, stage: str) -> Path:
        return self.path / "jobs" / f"{stage}.lock"

    def stage_folder(self, stage: str) -> Path:
        return self.manifest_file(stage).parent if "/" in MANIFESTS[stage] else self.path

    # --- what was asked for and what was found ---

    def recipe(self) -> Recipe:
        """The recipe as this run was started with, paths made absolute."""
        return recipes.load(self.recipe_file)

    def manifest(self, stage: str) -> dict[str, Any]:
        """What a finished stage wrote last.

        Raises:
            RunError: the stage is not done, or the file is damaged.
        """
        path = self.manifest_file(stage)
        if not path.is_file():
            raise RunError(f"{self.path}: stage {stage} is not done; `tunewright run {self.path}` goes on from here")
        manifest: dict[str, Any] = read_json(path)
        return manifest

    def resolved(self) -> dict[str, Any]:
        return self.manifest("check")

    @property
    def method(self) -> str:
        """How this run trains: `auto` is settled by `check`."""
        method: str = self.resolved()["train"]["method"]
        return method

    # --- state ---

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = read_json(self.state_file)
        return state

    def status(self, stage: str) -> Status:
        """done if its manifest is there; else what the state says."""
        if self.manifest_file(stage).is_file():
            return "done"
        said: Status = self.state()["stages"].get(stage, {}).get("status", "todo")
        return "todo" if said == "done" else said

    def set_status(self, stage: str, status: Status, **facts: Any) -> None:
        state = {key: value for key, value in self.state().items() if key != "destroyed"}
        state["stages"][stage] = {"status": status, "at": now(), **facts}
        write_json(self.state_file, state)
        self.event(stage, status, **facts)

    def begun_on(self, sources: str) -> Run:
        """Note another fingerprint of the data, for a run that has not used any yet."""
        write_json(self.state_file, self.state() | {"sources": sources})
        return self

    def mark_destroyed(self) -> None:
        """What the run made elsewhere is gone; a new `run` of the same recipe does not go on with this one."""
        write_json(self.state_file, self.state() | {"destroyed": now()})

    @property
    def age_s(self) -> float:
        """Seconds since the run was begun."""
        began = datetime.datetime.fromisoformat(str(self.state()["created"]).replace("Z", "+00:00"))
        return (datetime.datetime.now(datetime.UTC) - began).total_seconds()

    @property
    def destroyed(self) -> bool:
        return "destroyed" in self.state()

    def reset(self, stage: str) -> None:
        """Make a stage and all that follow it undone, by removing their manifests (their other files stay)."""
        if STAGES.index(stage) <= STAGES.index("train"):
            shutil.rmtree(self.checkpoints, ignore_errors=True)  # they are of the training that is to be forgotten
        if self.manifest_file("test").is_file():
            self.manifest_file("test").replace(self.last_test_file)
        for later in reversed(STAGES[STAGES.index(stage) :]):
            self.manifest_file(later).unlink(missing_ok=True)

    def event(self, stage: str, what: str, **facts: Any) -> None:
        """Add one line to events.jsonl."""
        append_json(self.events_file, {"at": now(), "stage": stage, "event": what, **facts})

    def events(self) -> list[dict[str, Any]]:
        return read_json_lines(self.events_file)

    def metrics(self) -> list[dict[str, Any]]:
        """One entry for each logged step of training, in order."""
        return read_json_lines(self.metrics_file)

    # --- progress of a stage that runs elsewhere ---

    def set_progress(self, stage: str, done: float, total: float, note: str = "") -> None:
        write_json(self.progress_file(stage), {"done": done, "total": total, "note": note}, durable=False)

    def progress(self, stage: str) -> dict[str, Any] | None:
        path = self.progress_file(stage)
        return read_json(path) if path.is_file() else None

    # --- the ledger ---

    def intend(self, kind: str, name: str, **facts: Any) -> str:
        """Write down that something is about to be made elsewhere; call before making it. Gives the entry's id."""
        entry = secrets.token_hex(4)
        append_json(
            self.ledger_file,
            {"at": now(), "entry": entry, "is": "intended", "kind": kind, "name": name, "run": self.id, **facts},
            durable=True,
        )
        return entry

    def made(self, entry: str, **facts: Any) -> None:
        append_json(self.ledger_file, {"at": now(), "entry": entry, "is": "made", **facts}, durable=True)

    def gone(self, entry: str, **facts: Any) -> None:
        append_json(self.ledger_file, {"at": now(), "entry": entry, "is": "gone", **facts}, durable=True)

    def resources(self) -> list[dict[str, Any]]:
        """Everything that was made elsewhere (or was about to be), oldest first, each with its last state in `is`."""
        entries: dict[str, dict[str, Any]] = {}
        for line in read_json_lines(self.ledger_file):
            entries.setdefault(line["entry"], {}).update(line)
        return list(entries.values())

    # --- one at a time ---

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run while working on it; the system lets go when the process ends, however it ends.

        Raises:
            RunError: another process holds it.
        """
        handle = _take(self.path / ".lock", self.path)
        try:
            yield
        finally:
            os.close(handle)


def create(runs: Path, recipe: Recipe, *, sources: str = "") -> Run:
    """A new run folder for a recipe; `sources` is a fingerprint of the data's files at this moment.

    Raises:
        RunError: the runs folder cannot be made or written.
    """
    day = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d")
    try:
        runs.mkdir(parents=True, exist_ok=True)
        while True:
            path = runs / f"{recipe.name}-{day}-{secrets.token_hex(2)}"
            try:
                path.mkdir()
                break
            except FileExistsError:
                continue
    except OSError as error:
        raise _explained(error, runs, "cannot make a run folder") from None
    run = Run(path.resolve())
    write_text(run.recipe_file, recipes.dump(recipe))
    state = {
        "format": FORMAT,
        "run": run.id,
        "created": now(),
        "recipe": recipe.fingerprint(),
        "sources": sources,
        "stages": {stage: {"status": "todo"} for stage in STAGES},
    }
    write_json(run.state_file, state)
    run.event("run", "created")
    return run


def list_runs(runs: Path) -> list[Run]:
    """The runs in a folder, oldest first. Those that cannot be opened (damaged, or a newer version's) are left out."""
    found = []
    for path in runs.glob("*/state.json"):
        with contextlib.suppress(RunError):
            found.append(Run.open(path.parent))
    return sorted(found, key=lambda run: (str(run.state().get("created")), run.id))


def now() -> str:
    """UTC, ISO 8601, to the millisecond."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# --- files ---


def write_text(path: Path, text: str, *, mode: int = 0o644, durable: bool = True) -> None:
    """Replace a file by atomic rename.

    Raises:
        DiskFullError: no space left.
        RunError: the folder cannot be written.
    """
    _replace(path, (text,), mode=mode, durable=durable)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Replace a JSON file by atomic rename. NaN is written as null, so that every JSON reader takes the file."""
    write_text(path, _json(value, indent=1) + "\n", durable=durable)


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Replace a file of JSON lines by atomic rename."""
    _replace(path, (_json(value) + "\n" for value in values), mode=0o644, durable=True)


@contextlib.contextmanager
def replacing(path: Path, *, mode: int = 0o644, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` by atomic rename at the end; where the block raises, `path`
    stays as it was. An OSError of the block that names another file than this one is passed on.

    Raises:
        DiskFullError: no space left.
        RunError: the folder cannot be written.
    """
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w+b") as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.chmod(temporary, mode)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        if temporary and error.filename not in (None, temporary):
            raise
        raise _explained(error, path, "cannot write") from error


def append_json(path: Path, value: Any, *, durable: bool = False) -> None:
    """Add one JSON line to a file. A line that a kill left half-written is cut off first; the file is locked meanwhile,
    since a line that another process is writing looks the same.

    Where a mount of an object store takes no additions (a Databricks volume), the file is written anew with the line.
    """
    line = (_json(value) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _append(path, line, durable=durable)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise _explained(error, path, "cannot write") from error
        before = path.read_bytes() if path.is_file() else b""
        with replacing(path, durable=durable) as anew:
            anew.write(before[: before.rfind(b"\n") + 1] + line)


def _append(path: Path, line: bytes, *, durable: bool) -> None:
    rest = memoryview(line)
    with path.open("ab+", buffering=0) as file:
        lock(file.fileno(), fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
            file.truncate(path.read_bytes().rfind(b"\n") + 1)
        while rest:  # the system may take less than all; what it says then is why (no space left)
            rest = rest[os.write(file.fileno(), rest) :]
        if durable:
            os.fsync(file.fileno())


def lock(handle: int, how: int) -> None:
    """Lock an open file, as `fcntl.flock` does; not at all where the mount has no locks.

    Raises:
        BlockingIOError: another process holds it, and `how` does not wait.
    """
    try:
        fcntl.flock(handle, how)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def _replace(path: Path, chunks: Iterable[str], *, mode: int, durable: bool) -> None:
    with replacing(path, mode=mode, durable=durable) as file:
        file.writelines(chunk.encode("utf-8", errors="backslashreplace") for chunk in chunks)


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        RunError: the file is absent or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path}: no such file; the run folder is incomplete") from None
    except ValueError as error:
        raise RunError(f"{path}: damaged ({error}); restore the file or start a new run") from None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that grows. A last line cut short by a kill is left out; it had not been written."""
    if not path.is_file():
        return []
    *lines, _unfinished = path.read_bytes().split(b"\n")
    values: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            value = json.loads(line.decode())
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise RunError(f"{path}:{number}: damaged line")
        values.append(value)
    return values


def _json(value: Any, *, indent: int | None = None) -> str:
    plain = _plain(value)
    text = json.dumps(plain, indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a character, as in the name of a file that is not UTF-8
        return json.dumps(plain, indent=indent, allow_nan=False)
    return text


def _plain(value: Any) -> Any:
    """JSON-ready: NaN and infinities become null, numpy scalars become Python's."""
    if isinstance(value, dict):
        return {str(key): _plain(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(below) for below in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return str(value) if isinstance(value, Path) else value


def _take(path: Path, run: Path) -> int:
    """The handle that holds a lock file, with our process's number in the file for others to see."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _explained(error, path, "cannot lock the run") from error
    try:
        lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
    except OSError as error:
        number = os.pread(handle, 32, 0).decode()
        os.close(handle)
        if not isinstance(error, BlockingIOError):
            raise _explained(error, path, "cannot lock the run") from error
        holder = f"process {number}" if number else "another process"
        raise RunBusyError(f"{run}: {holder} is working on this run; wait for it or stop it first") from None
    return handle


def _explained(error: OSError, path: Path, what: str) -> TunewrightError:
    if error.filename is None:
        error.filename = str(path)
    known = explained(error)
    return known if isinstance(known, DiskFullError) else RunError(f"{path}: {what}: {error.strerror or error}")
