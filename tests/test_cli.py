"""The command line as a person meets it: help, errors in one line, exit codes, what goes to which stream."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tunewright import cli
from tunewright import recipe as recipes
from tunewright import run as run_folders
from tunewright.run import Run, read_json, write_json
from tunewright.testing import tiny_data

HEAVY = ("torch", "transformers", "mlflow", "pyspark", "openai", "azure", "databricks", "pandas", "sklearn", "pydantic")
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Run a command in this process, from an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tunewright", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return code, said.out, said.err

    return run


@pytest.fixture
def recipe(model_folder: Path, tmp_path: Path) -> Path:
    """A recipe that would run; tests break it."""
    data = tiny_data(tmp_path / "data")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"name: cli\nmodel: {model_folder}\ntask: classification\n"
        f"data: {{train: {data['train']}, test: {data['test']}}}\n"
        "train: {epochs: 1, batch_size: 8, learning_rate: 5.0e-3}\nevaluate: {bootstrap: 200}\n"
        "tracking: {enabled: false}\nbackend: {kind: local, threads: 1}\n"
    )
    return path


def one_line(error: str) -> str:
    """The error's line; there is just one, and no traceback."""
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


def test_importing_and_help_load_nothing_heavy() -> None:
    script = (
        "import sys, tunewright\nassert tunewright.__version__\n"
        "from tunewright import cli\nsys.argv = ['tunewright', '--help']\n"
        "try: cli.main()\nexcept SystemExit as end: assert end.code == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    for name in ("init", "check", "plan", "run", "prepare", "train", "evaluate", "package", "deploy", "test"):
        assert f"  {name} " in done.stdout
    for name in ("destroy", "runs", "show", "schema", "demo"):
        assert f"  {name} " in done.stdout


def test_no_command_is_help_and_a_wrong_one_is_the_users_error(command: Command) -> None:
    assert command()[0] == 0
    code, _, error = command("trian", "x")
    assert code == 2
    assert "trian" in one_line(error)


def test_schema_is_json_on_standard_output(command: Command) -> None:
    code, out, _ = command("schema")
    assert code == 0
    assert json.loads(out)["properties"]["train"]


def test_init_writes_a_recipe_that_checks(command: Command, model_folder: Path, tmp_path: Path) -> None:
    tiny_data(tmp_path / "data")
    code, out, _ = command("init", "data/train.jsonl", "--model", str(model_folder))
    assert (code, out.strip()) == (0, "recipe.yaml")
    made = recipes.load(tmp_path / "recipe.yaml")
    assert made.task == "classification"
    assert made.data.test == ("data/test.jsonl",)
    code, _, error = command("init", "data/train.jsonl")
    assert code == 2
    assert "--force" in one_line(error)
    code, out, _ = command("check", "recipe.yaml", "--json")
    assert code == 0
    assert json.loads(out)["data"]["splits"]["train"]["used"] == 60


def test_plan_says_what_will_be_made(command: Command, recipe: Path) -> None:
    code, out, _ = command("plan", recipe, "--json")
    assert code == 0
    planned = json.loads(out)
    assert planned["steps"] == 8
    assert planned["cost"]["high"] == 0
    code, out, _ = command("plan", recipe)
    assert "endpoint process" in out


def test_run_until_a_stage_prints_the_folder_alone_and_goes_on_later(command: Command, recipe: Path) -> None:
    code, out, error = command("run", recipe, "--until", "prepare", "--runs", "here", "--yes")
    assert code == 0, error
    assert Run.open(out.strip()).status("prepare") == "done"
    assert out.count("\n") == 1
    code, again, error = command("run", recipe, "--until", "prepare", "--runs", "here")
    assert again == out
    code, listed, _ = command("runs", "--runs", "here", "--json")
    assert [one["path"] for one in json.loads(listed)] == [out.strip()]
    code, shown, _ = command("show", out.strip())
    assert code == 0
    assert "prepare done" in shown
    code, shown, _ = command("show", Path(out.strip()).name, "--runs", "here", "--json")
    assert json.loads(shown)["stages"]["prepare"] == "done"


def test_a_stage_that_is_done_is_done_again_only_when_asked(command: Command, recipe: Path) -> None:
    _, out, _ = command("prepare", recipe)
    run = Run.open(out.strip())
    made = run.manifest_file("prepare").stat().st_mtime_ns
    code, _, error = command("prepare", run.path)
    assert code == 0
    assert "--again" in error
    assert run.manifest_file("prepare").stat().st_mtime_ns == made
    command("prepare", run.path, "--again")
    assert run.manifest_file("prepare").stat().st_mtime_ns > made


def test_runs_of_an_empty_folder_says_how_to_begin(command: Command) -> None:
    code, out, _ = command("runs")
    assert code == 0
    assert "tunewright demo" in out


# --- bad input: one line that says where and what next, exit code 2 ---


def broken_at_37(folder: Path) -> None:
    lines = (folder / "data" / "train.jsonl").read_text().splitlines()
    lines[36] = lines[36][:-1]
    (folder / "data" / "train.jsonl").write_text("\n".join(lines))


def rewrite(name: str, change: Callable[[list[dict[str, str]]], list[dict[str, str]]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "data" / name
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))

    return apply


def recipe_line(old: str, new: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "recipe.yaml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return apply


BAD = {
    "a missing file": (lambda folder: (folder / "data/train.jsonl").unlink(), ["data.train", "train.jsonl", "no such"]),
    "a wrong column": (
        rewrite("train.jsonl", lambda rows: [{"txt": row["text"], "label": row["label"]} for row in rows]),
        ["train.jsonl:1", "'text'", "did you mean 'txt'"],
    ),
    "an unknown label in the test set": (
        rewrite("test.jsonl", lambda rows: [*rows[:4], {"text": "so so", "label": "meh"}, *rows[5:]]),
        ["test.jsonl:5", "'meh'"],
    ),
    "an empty data set": (rewrite("train.jsonl", lambda rows: []), ["data.train", "no rows"]),
    "broken JSON at line 37": (broken_at_37, ["train.jsonl:37", "broken JSON"]),
    "one class only": (
        rewrite("train.jsonl", lambda rows: [row for row in rows if row["label"] == "good"]),
        ["data.train", "one class", "'good'"],
    ),
    "a row longer than the context, where the recipe forbids it": (
        lambda folder: (
            rewrite("train.jsonl", lambda rows: [*rows, {"text": "fine " * 400, "label": "good"}])(folder),
            recipe_line("data: {", "data: {over_length: error, ")(folder),
        ),
        ["train.jsonl:61", "tokens", "data.over_length"],
    ),
    "a model that does not exist": (recipe_line("model: ", "model: /no/such"), ["/no/such", "no such folder"]),
    "more length than the model holds": (recipe_line("epochs: 1", "epochs: 1, max_length: 4096"), ["4096", "256"]),
    "a key that nobody knows": (recipe_line("epochs: 1", "epoch: 1"), ["recipe.yaml:5", "did you mean `epochs`"]),
    "a backend that nobody knows": (recipe_line("kind: local", "kind: cloud"), ["backend.kind", "local"]),
    "not YAML": (recipe_line("name: cli", "name: [cli"), ["recipe.yaml", "not YAML"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(command: Command, recipe: Path, tmp_path: Path, name: str) -> None:
    harm, wanted = BAD[name]
    harm(tmp_path)
    code, out, error = command("run", recipe)
    assert code == 2
    assert out == ""
    line = one_line(error)
    for word in wanted:
        assert word in line
    if name not in ("a key that nobody knows", "not YAML"):
        code, out, _ = command("check", recipe)
        assert code == 2
        assert all(word in " ".join(out.split()) for word in wanted)
        assert len(run_folders.list_runs(tmp_path / "runs")) <= 1


def test_a_row_longer_than_the_context_is_cut_and_named_on_screen(
    command: Command, recipe: Path, tmp_path: Path
) -> None:
    rewrite("train.jsonl", lambda rows: [*rows, {"text": "fine " * 400, "label": "good"}])(tmp_path)
    code, out, error = command("run", recipe, "--until", "prepare")
    assert code == 0
    assert "train.jsonl:61" in error
    assert "the answer is whole" in error
    checks = Run.open(out.strip()).manifest("prepare")
    assert checks["splits"]["train"]["truncated"] == 1
    assert next(one["where"] for one in checks["findings"] if one["code"] == "over_length").endswith("train.jsonl:61")


def test_a_busy_port_is_found_before_training(command: Command, recipe: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, error = command("run", recipe, "--set", f"deploy.port={port}")
    assert code == 2
    assert f"{port} on 127.0.0.1 is in use" in one_line(error)


def test_a_run_folder_of_a_newer_version_is_refused(command: Command, recipe: Path) -> None:
    _, out, _ = command("run", recipe, "--until", "plan")
    run = Run.open(out.strip())
    write_json(run.state_file, run.state() | {"format": 99})
    for words in (("show", run.path), ("run", run.path), ("destroy", run.path)):
        code, _, error = command(*words)
        assert code == 2
        assert "newer Tunewright" in one_line(error)


def test_what_is_no_run_and_no_recipe_is_said(command: Command, tmp_path: Path) -> None:
    for words, wanted in (
        (("run", "nothing.yaml"), "no such recipe"),
        (("run", tmp_path), "not a run folder"),
        (("show", "nothing"), "no such run folder"),
        (("run", "nothing.yaml", "--until", "lunch"), "stages are check, plan"),
    ):
        code, _, error = command(*words)
        assert code == 2
        assert wanted in one_line(error)


def test_settings_of_a_settled_run_cannot_be_changed(command: Command, recipe: Path) -> None:
    _, out, _ = command("run", recipe, "--until", "plan")
    code, _, error = command("run", out.strip(), "--set", "train.epochs=9")
    assert code == 2
    assert "settled" in one_line(error)


def test_a_fault_of_ours_is_one_line_and_its_traceback_is_kept(
    command: Command, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr("tunewright.api.open", broken)
    code, _, error = command("run", recipe)
    assert code == 1
    line = one_line(error)
    log = Path(line.rpartition(" ")[2])
    assert "ZeroDivisionError: boom" in log.read_text()
    log.unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with 400 KB on it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount command")
def test_a_full_disk_is_said_and_the_run_goes_on_after_it_is_freed(
    command: Command, recipe: Path, small_disk: Path
) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 180_000)
    words = ("run", recipe, "--runs", small_disk / "runs", "--until", "train", "--set", "train.method=full")
    code, _, error = command(*words)
    assert code == 1, error
    assert "no space left" in one_line(error)
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=40m", str(small_disk)], check=True)
    code, out, error = command(*words)
    assert code == 0, error
    assert Run.open(out.strip()).status("train") == "done"
    assert len(run_folders.list_runs(small_disk / "runs")) == 1


@pytest.mark.parametrize("stage", ["prepare", "evaluate", "deploy"])
@pytest.mark.slow
def test_ctrl_c_at_any_stage_stops_it_and_the_same_command_goes_on(recipe: Path, tmp_path: Path, stage: str) -> None:
    words = [sys.executable, "-m", "tunewright.cli", "run", str(recipe), "--runs", str(tmp_path / "runs")]
    first = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while True:
        assert time.monotonic() < deadline
        assert first.poll() is None
        found = run_folders.list_runs(tmp_path / "runs")
        if found and found[0].job_file(stage).is_file():
            break
        time.sleep(0.01)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=90)
    assert first.returncode == 130
    assert "goes on from here" in said
    run = found[0]
    assert run.state()["stages"][stage]["status"] == "cancelled"
    pid = read_json(run.job_file(stage))["pid"] if run.job_file(stage).is_file() else None
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            pytest.fail(f"process {pid} of stage {stage} is still there")
    second = subprocess.run(words, capture_output=True, text=True, check=False)
    assert second.returncode in (0, 3), second.stderr
    assert Run.open(second.stdout.strip()).path == run.path
    subprocess.run([*words[:3], "destroy", str(run.path)], check=True, capture_output=True)
