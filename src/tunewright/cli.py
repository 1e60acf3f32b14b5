"""The command line: each command is a few lines over the library.

What a program reads goes to standard output, everything else to standard error. Exit codes: 0 done, 1 a fault of ours
or of the machine, 2 the input is wrong, 3 evaluated and not better than `must_beat`, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import enum
import json
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import TyperException

from tunewright import __version__, errors

if TYPE_CHECKING:
    from tunewright.api import Life
    from tunewright.destroy import Removed

app = typer.Typer(
    name="tunewright",
    help="Fine-tune a language model on your own data, prove that it got better, serve it behind the OpenAI API.",
    epilog="Exit codes: 0 done, 1 a fault of ours or of the machine, 2 the input is wrong, 3 not better than "
    "must_beat, 130 stopped by Ctrl-C.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RunsOption = Annotated[
    Path, typer.Option("--runs", metavar="DIR", help="The folder of all runs.", envvar="TUNEWRIGHT_RUNS")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe, such as train.learning_rate=1e-4."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]
RecipeOrRun = Annotated[Path, typer.Argument(metavar="RECIPE|RUN", help="A recipe file, or a run folder.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or its name in the runs folder.")]
ResumeOption = Annotated[
    bool | None,
    typer.Option(
        "--resume/--fresh",
        help="Insist on going on with an unfinished run, or on a new one. "
        "Default: go on if there is an unfinished run of the same recipe on the same data.",
    ),
]
AgainOption = Annotated[bool, typer.Option("--again", help="Do this stage again, and forget the stages after it.")]
YesOption = Annotated[
    bool,
    typer.Option("--yes", "-y", help="Agree to what costs money (once a run; nothing on this machine does)."),
]
RUNS = Path("runs")
DAY = "%Y-%m-%d"
DataOption = Annotated[
    Path,
    typer.Option("--data", metavar="DIR", help="Everything that the server keeps.", envvar="TUNEWRIGHT_DATA"),
]
DatabaseOption = Annotated[
    str | None,
    typer.Option(
        "--database",
        metavar="URL",
        help="PostgreSQL, such as postgresql://user@host/name. Default: SQLite in --data.",
        envvar="TUNEWRIGHT_DATABASE",
    ),
]
FilesOption = Annotated[
    str | None,
    typer.Option(
        "--files",
        metavar="URL",
        help="Where uploaded files lie: a folder, or an object store by fsspec URL. Default: in --data.",
        envvar="TUNEWRIGHT_FILES",
    ),
]
DATA = Path("tunewright-data")


class Where(enum.StrEnum):
    local = "local"
    spark = "spark"


class Api(enum.StrEnum):
    openai = "openai"
    azure = "azure"


class LogFormat(enum.StrEnum):
    text = "text"
    json = "json"


LogOption = Annotated[
    LogFormat,
    typer.Option(help="text: lines for a person. json: one object a line.", envvar="TUNEWRIGHT_LOG_FORMAT"),
]

keys = typer.Typer(name="keys", help="The keys that open the server.", no_args_is_help=True)
models = typer.Typer(name="models", help="The bases that clients of the server can name.", no_args_is_help=True)
app.add_typer(keys)
app.add_typer(models)


def main() -> None:
    """The entry point: runs a command and turns errors into one line and an exit code."""
    try:
        code = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
    except typer.Exit as leave:
        code = leave.exit_code
    except TyperException as error:
        _say(f"error: {error.format_message()} See `tunewright --help`, or the --help of the command.")
        code = errors.BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        code = errors.INTERRUPTED
    except BrokenPipeError:
        code = 0
    except Exception as error:  # noqa: BLE001 - the edge of the program: nothing is hidden, it is said in one line
        code = _explain(error)
    if code == errors.INTERRUPTED:  # Typer turns Ctrl-C into this code itself
        _say("\nstopped; the same command again goes on from here")
    sys.exit(code if isinstance(code, int) else 0)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def init(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="A data file, a glob, or a hub data set such as imdb:train.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the recipe.")] = Path("recipe.yaml"),
    model: Annotated[str, typer.Option(help="The base: a hub name, a folder, or starter.")] = "starter",
    name: Annotated[str | None, typer.Option(help="The recipe's name. Default: from the file's name.")] = None,
    test: Annotated[
        str | None, typer.Option(help="The test set. Default: test.* beside train.*, else a tenth is held out.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a recipe that is there.")] = False,
) -> None:
    """Write a recipe for your data."""
    from tunewright import recipe
    from tunewright.data import guess
    from tunewright.run import write_text

    if output.exists() and not force:
        raise errors.RecipeError(f"{output}: is there already; --force replaces it, --output names another")
    text = guess.recipe_for(data, model=model, name=name, test=test)
    recipe.loads(text, str(output))
    write_text(output, text)
    _say(text)
    _say(f"next: tunewright check {output}, then tunewright run {output}")
    print(output)


@app.command()
def check(
    given: Annotated[str, typer.Argument(metavar="DATA|RECIPE", help="A data file, a hub data set, or a recipe.")],
    sets: SetOption = None,
    api: Annotated[
        Api | None, typer.Option("--for", help="Hold the rows to the rules of OpenAI's and Azure OpenAI's API.")
    ] = None,
    fix: Annotated[
        Path | None,
        typer.Option("--fix", metavar="OUT", help="Write a mended copy: a file for the training rows, or a folder."),
    ] = None,
    model: Annotated[str, typer.Option(help="For data: whose tokenizer and chat template to look with.")] = "starter",
    test: Annotated[
        str | None, typer.Option(help="For data: the test set. Default: test.* beside train.*, else a tenth.")
    ] = None,
    try_: Annotated[
        bool,
        typer.Option(
            "--try", help="Where no error is found: learn a few rows by heart, and have the model say them and stop."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Find what is wrong with the recipe, the model and every row of the data, without training.

    With --try a model is trained for a moment, on a few rows and on this machine; nothing of it stays.
    """
    from tunewright import api as verbs
    from tunewright import life as lives
    from tunewright import screen

    if _is_data(given):
        if sets:
            raise errors.RecipeError(f"--set is for recipes; `tunewright init {given}` writes one")
        life = verbs.for_data(given, model=model, test=test)
    else:
        life = _open(Path(given), RUNS, sets)
    with screen.Bar("rows") as progress:
        checked = life.check(api=api is not None, progress=progress)
    mended = life.mend(fix) if fix is not None else None
    if not as_json:
        screen.checked(checked)
        if mended is not None:
            screen.mended(mended)
    tried = None
    if try_ and not checked.errors:
        with screen.Bar("preflight", "") as bar:
            tried = lives.preflight(life.recipe, checked, progress=bar)
    if as_json:
        facts = screen.checked_json(checked, tried) | ({"mended": mended.to_dict()} if mended is not None else {})
        print(json.dumps(facts, indent=1))
    elif try_:
        screen.tried(tried)
    failed = checked.errors or (tried is not None and tried.code is not None)
    raise typer.Exit(errors.BAD_INPUT if failed else errors.DONE)


@app.command()
def plan(recipe: RecipeOrRun, runs: RunsOption = RUNS, sets: SetOption = None, as_json: JsonOption = False) -> None:
    """Say what a run will take: tokens, steps, time, memory, cost, and everything that it will make."""
    from tunewright import screen

    planned = _open(recipe, runs, sets).plan()
    if as_json:
        print(json.dumps(planned, indent=1))
    else:
        screen.plan(planned)


@app.command()
def run(
    recipe: RecipeOrRun,
    runs: RunsOption = RUNS,
    until: Annotated[str, typer.Option(metavar="STAGE", help="The last stage to do.")] = "test",
    sets: SetOption = None,
    resume: ResumeOption = None,
    yes: YesOption = False,
    max_cost: Annotated[
        float | None, typer.Option("--max-cost", min=0, metavar="DOLLARS", help="Agree if it costs no more; else stop.")
    ] = None,
) -> None:
    """Take a recipe from data to a tested endpoint. The last line of standard output is the run folder's path."""
    from tunewright.run import STAGES

    if until not in STAGES:
        raise errors.RecipeError(f"--until {until}: no such stage; stages are {', '.join(STAGES)}")
    _advance(_open(recipe, runs, sets, resume), until, yes, max_cost=max_cost, verdict_counts=True)


@app.command()
def prepare(
    recipe: RecipeOrRun,
    runs: RunsOption = RUNS,
    sets: SetOption = None,
    again: AgainOption = False,
    yes: YesOption = False,
) -> None:
    """Read, check, split and select the data."""
    _stage("prepare", recipe, runs, sets, again, yes)


@app.command()
def train(
    recipe: RecipeOrRun,
    runs: RunsOption = RUNS,
    sets: SetOption = None,
    again: AgainOption = False,
    resume: ResumeOption = None,
    yes: YesOption = False,
) -> None:
    """Train, going on from the last checkpoint where there is one."""
    _stage("train", recipe, runs, sets, again, yes, resume)


@app.command()
def evaluate(
    recipe: RecipeOrRun,
    runs: RunsOption = RUNS,
    sets: SetOption = None,
    again: AgainOption = False,
    yes: YesOption = False,
) -> None:
    """Compare the tuned model with its base and the baselines on the same held-out rows."""
    _stage("evaluate", recipe, runs, sets, again, yes, verdict_counts=True)


@app.command()
def package(
    recipe: RecipeOrRun,
    runs: RunsOption = RUNS,
    sets: SetOption = None,
    again: AgainOption = False,
    yes: YesOption = False,
) -> None:
    """Write the merged model, its adapter, golden token ids and card, and register it."""
    _stage("package", recipe, runs, sets, again, yes)


@app.command()
def deploy(
    recipe: RecipeOrRun,
    runs: RunsOption = RUNS,
    sets: SetOption = None,
    again: AgainOption = False,
    yes: YesOption = False,
) -> None:
    """Serve the packaged model behind the OpenAI API."""
    _stage("deploy", recipe, runs, sets, again, yes)


@app.command()
def test(
    recipe: RecipeOrRun,
    runs: RunsOption = RUNS,
    sets: SetOption = None,
    again: AgainOption = False,
    yes: YesOption = False,
) -> None:
    """Ask the endpoint what was asked offline, and compare."""
    _stage("test", recipe, runs, sets, again, yes)


@app.command()
def retrain(
    run: RunFolder,
    drop: Annotated[
        int, typer.Option(min=0, metavar="N", help="Leave out the N rows whose labels are the likeliest to be wrong.")
    ] = 0,
    without: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Leave out the rows of such a list (evaluate/nearest.jsonl, or your own)."),
    ] = None,
    runs: RunsOption = RUNS,
    until: Annotated[str, typer.Option(metavar="STAGE", help="The last stage to do.")] = "evaluate",
    yes: YesOption = False,
) -> None:
    """Drop training rows that look wrong and train again, in a run of its own; the report compares the two."""
    from tunewright.run import STAGES

    if until not in STAGES:
        raise errors.RecipeError(f"--until {until}: no such stage; stages are {', '.join(STAGES)}")
    life = _open_run(run, runs).without(drop, without or ())
    _advance(life, until, yes, verdict_counts=True)


@app.command()
def batch(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A run folder, its name, or a package folder.")],
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="Files or globs; on Spark also spark:TABLE or delta:PATH.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A .jsonl or .parquet file, else a folder of Parquet files.")
    ],
    runs: RunsOption = RUNS,
    text: Annotated[
        str | None, typer.Option(help="The column to answer. Default: messages, text or prompt, whichever there is.")
    ] = None,
    messages: Annotated[str | None, typer.Option(help="The column of conversations to answer.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer of a model that writes.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many rows.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows in a forward at most.")] = None,
    backend: Annotated[Where, typer.Option(help="Where to answer.")] = Where.local,
    master: Annotated[str | None, typer.Option(help="The Spark cluster, such as spark://host:7077.")] = None,
    conf: Annotated[
        list[str] | None, typer.Option("--conf", metavar="KEY=VALUE", help="A setting of Spark's own.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Answer every row of a file or table with a packaged model.

    Each row comes out with its columns and `prediction`, or with `error` saying why it could not be used (then the exit
    code is 2). Killed, the same command goes on where it stood.
    """
    from tunewright import batches, screen

    if backend is Where.local and (master or conf):
        raise errors.RecipeError("--master and --conf are for --backend spark")
    spark: dict[str, Any] | None = None
    if backend is Where.spark:
        spark = {"master": master} if master else {}
        spark["conf"] = dict(one.partition("=")[::2] for one in conf or ())
    folder = next((one for one in (model, runs / model) if one.is_dir()), model)
    with screen.Bar("batch") as bar:
        summary = batches.batch(
            folder,
            inputs,
            output,
            text=text,
            messages=messages,
            max_new_tokens=max_new_tokens,
            limit=limit,
            batch_rows=batch_size,
            spark=spark,
            force=force,
            progress=bar,
        )
    if as_json:
        print(json.dumps(summary, indent=1))
    else:
        _say(batches.summary_line(summary))
        print(summary["output"])
    raise typer.Exit(errors.BAD_INPUT if summary["errors"] else errors.DONE)


@app.command()
def destroy(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="A run folder, or its name in the runs folder.")
    ] = None,
    runs: RunsOption = RUNS,
    every: Annotated[bool, typer.Option("--all", help="Of all runs.")] = False,
    older_than: Annotated[
        str | None, typer.Option("--older-than", metavar="AGE", help="Of all runs older than 30m, 12h or 7d.")
    ] = None,
    files: Annotated[bool, typer.Option("--files", help="Remove the run folder too.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="With --all and --older-than: do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove what a run made outside its folder: endpoints, deployments, clusters, jobs, uploaded files, tuned and
    registered models. The MLflow run is ended; its record stays as the history.

    The run folder stays unless --files. Of several runs, what stands is shown first. Repeat it as you like.
    """
    if (run is not None) + every + (older_than is not None) != 1:
        raise errors.RunError("name one run, or --all, or --older-than AGE")
    if run is not None:
        removed = _open_run(run, runs).destroy(files=files)
    else:
        removed = _destroy_several(runs, older_than, files, yes)
    if as_json:
        print(json.dumps([one.__dict__ for one in removed], indent=1))
        return
    for one in removed:
        _say(f"{one.kind} {one.name}: {one.what}")
    if not removed:
        _say("nothing to remove")


@app.command()
def resources(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Only this run's.")] = None,
    runs: RunsOption = RUNS,
    prices: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A price table of yours. Default: the one that ships.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what stands where because of the runs: state, since when, when it ends by itself, dollars an hour."""
    from tunewright import prices as table
    from tunewright import run as run_folders
    from tunewright import screen, standing

    asked = run_folders.list_runs(runs) if run is None else [_open_run(run, runs).folder]
    found = standing.find(asked, table.read(prices) if prices else table.read())
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        screen.standing(found)


@app.command("runs")
def list_runs(runs: RunsOption = RUNS, as_json: JsonOption = False) -> None:
    """List the runs: how far each got, and its verdict."""
    from tunewright import run as run_folders
    from tunewright import screen

    found = []
    for one in run_folders.list_runs(runs):
        try:
            found.append(_open_run(one.path, runs).show())
        except errors.TunewrightError as error:  # a run that cannot be read does not hide the others
            _say(f"{one.path}: {error}")
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        screen.runs(found, runs)


@app.command()
def show(run: RunFolder, runs: RunsOption = RUNS, as_json: JsonOption = False) -> None:
    """Show a run: its stages, its data, the loss as a curve, the result, the endpoint."""
    from tunewright import screen

    life = _open_run(run, runs)
    if as_json:
        print(json.dumps(life.show() | {"metrics": life.folder.metrics()}, indent=1))
    else:
        screen.show(life.folder, life.show())


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from tunewright import recipe

    print(json.dumps(recipe.json_schema(), indent=1))


@app.command()
def demo(
    runs: RunsOption = RUNS, fresh: Annotated[bool, typer.Option("--fresh", help="Start a new run.")] = False
) -> None:
    """Fine-tune the small model that ships with Tunewright on the data that ships with it, all stages, offline."""
    from tunewright import run as run_folders
    from tunewright import screen, starter

    for earlier in run_folders.list_runs(runs):
        if earlier.id.startswith("demo-") and not earlier.destroyed and earlier.status("test") == "done":
            _open_run(earlier.path, runs).destroy()
    life = _open(starter.recipe_path(), runs, None, False if fresh else None)
    code = _advance(life, "test", True, verdict_counts=True, leave=False)
    screen.next_steps(life.folder)
    print(life.folder.path)
    raise typer.Exit(code)


@app.command()
def serve(
    data: DataOption = DATA,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8000,
    database: DatabaseOption = None,
    files: FilesOption = None,
    workers: Annotated[int, typer.Option(min=0, help="Worker processes to start beside it.")] = 1,
    engines: Annotated[int, typer.Option(min=1, help="Processes with a model's weights at once, at most.")] = 2,
    sets: SetOption = None,
    filter: Annotated[
        str,
        typer.Option(
            metavar="CLASSIFIER",
            help="Who judges texts for the content filter: words (a short list that ships), the base URL of an "
            "OpenAI-style /moderations (its key in TUNEWRIGHT_FILTER_KEY), or package.module:name.",
            envvar="TUNEWRIGHT_FILTER",
        ),
    ] = "words",
    python_graders: Annotated[
        bool,
        typer.Option("--python-graders", help="Let reinforcement jobs bring graders in Python, which run as you do."),
    ] = False,
    log_format: LogOption = LogFormat.text,
) -> None:
    """Serve the OpenAI and Azure OpenAI fine-tuning API, until Ctrl-C or SIGTERM."""
    from tunewright.server import process

    settings = _settings(
        data,
        database,
        files,
        sets,
        filter=filter,
        log_format=log_format.value,
        engines=engines,
        python_graders=python_graders,
    )
    process.serve(settings, host=host, port=port, workers=workers)


@app.command()
def worker(
    data: DataOption = DATA,
    database: DatabaseOption = None,
    files: FilesOption = None,
    sets: SetOption = None,
    handover: Annotated[
        float, typer.Option(min=1, help="Seconds after which a silent worker loses its job to the next.")
    ] = 30.0,
    with_parent: Annotated[bool, typer.Option("--with-parent", help="End when standard input ends.")] = False,
    log_format: LogOption = LogFormat.text,
) -> None:
    """Work on the server's fine-tuning jobs, until Ctrl-C or SIGTERM. `serve` starts one by itself."""
    from tunewright.server import process

    settings = _settings(data, database, files, sets, handover_s=handover, log_format=log_format.value)
    process.work(settings, with_parent=with_parent)


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the key is called in lists and logs.")],
    data: DataOption = DATA,
    scope: Annotated[
        str, typer.Option(help="inference: ask models. training: files and jobs too. admin: everything.")
    ] = "training",
    expires: Annotated[
        str | None, typer.Option(metavar="30d", help="When it stops opening, such as 12h or 30d. Default: never.")
    ] = None,
    database: DatabaseOption = None,
) -> None:
    """Make a key. It is printed once, alone on standard output; only its hash is kept."""
    from tunewright.server import keys as keyring
    from tunewright.server.store import Store

    seconds = None if expires is None else keyring.duration(expires)
    store = Store(_settings(data, database).prepared().database_url)
    print(keyring.create(store, name, scope=scope, expires_s=seconds))


@keys.command("list")
def list_keys(data: DataOption = DATA, database: DatabaseOption = None, as_json: JsonOption = False) -> None:
    """List the keys, without what opens."""
    from tunewright import screen
    from tunewright.server import keys as keyring
    from tunewright.server.store import Store

    with Store(_settings(data, database).prepared().database_url).begin() as connection:
        found = keyring.rows(connection)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        screen.keys(found)


@keys.command("rotate")
def rotate_key(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    data: DataOption = DATA,
    grace: Annotated[
        str | None, typer.Option(metavar="24h", help="How long the old key still opens. Default: not at all.")
    ] = None,
    database: DatabaseOption = None,
) -> None:
    """Make a new key in the place of an old one: same name, same scope, same end. It is printed once, alone."""
    from tunewright.server import keys as keyring
    from tunewright.server.store import Store

    seconds = 0 if grace is None else keyring.duration(grace, "--grace")
    print(keyring.rotate(Store(_settings(data, database).prepared().database_url), name, grace_s=seconds))


@keys.command("usage")
def show_usage(
    data: DataOption = DATA,
    days: Annotated[int, typer.Option(min=1, max=36500, help="How many days back, today (UTC) with them.")] = 30,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what each key has used: requests and tokens, by day and model."""
    from tunewright import screen
    from tunewright.server import keys as keyring
    from tunewright.server import organization
    from tunewright.server.store import Store

    today = datetime.now(UTC).date()
    with Store(_settings(data, database).prepared().database_url).begin() as connection:
        used = organization.used(connection, today - timedelta(days=days - 1), today, ("api_key_id", "model"))
        names = {one["id"]: one["name"] for one in keyring.rows(connection)}
    found = [{"key": names.get(one["api_key_id"], one["api_key_id"]), **one} for one in used]
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        screen.usage(found, days)


@keys.command("revoke")
def revoke_key(
    name: Annotated[str, typer.Argument(metavar="NAME")], data: DataOption = DATA, database: DatabaseOption = None
) -> None:
    """End a key. Running servers hear of it within seconds."""
    from tunewright.server import keys as keyring
    from tunewright.server.store import Store

    keyring.revoke(Store(_settings(data, database).prepared().database_url), name)


@models.command("add")
def add_model(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What clients send, such as gpt-4.1-mini.")],
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A hub name, a folder, or starter.")],
    data: DataOption = DATA,
    revision: Annotated[str | None, typer.Option(help="The hub's commit, tag or branch.")] = None,
    sets: SetOption = None,
    retires: Annotated[
        datetime | None,
        typer.Option(formats=[DAY], metavar="DATE", help="From then on (UTC) it answers no more; tuned ones do."),
    ] = None,
    fine_tune_until: Annotated[
        datetime | None, typer.Option(formats=[DAY], metavar="DATE", help="From then on it takes no new jobs.")
    ] = None,
    database: DatabaseOption = None,
) -> None:
    """Let clients call a base of yours by a name. --set changes how jobs on it train."""
    from tunewright import models as bases
    from tunewright import recipe as recipes
    from tunewright.server import models as named
    from tunewright.server.store import Store

    ref = bases.find(source, revision)
    trial = {"name": "trial", "model": ref.source, "task": "chat", "data": {"train": "trial.jsonl"}}
    recipes.loads(json.dumps(trial), "--set", sets or ())
    store = Store(_settings(data, database).prepared().database_url)
    named.add_base(
        store,
        name,
        ref.source,
        revision=ref.revision,
        overrides=sets or (),
        retires_at=_second(retires),
        fine_tune_until=_second(fine_tune_until),
    )
    _say(f"{name} is {ref.source} ({ref.parameters:,} weights)")


@models.command("list")
def list_models(data: DataOption = DATA, database: DatabaseOption = None, as_json: JsonOption = False) -> None:
    """List the bases by their names."""
    from tunewright import screen
    from tunewright.server import models as named
    from tunewright.server.store import Store

    with Store(_settings(data, database).prepared().database_url).begin() as connection:
        found = named.named_bases(connection)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        screen.bases(found)


@models.command("remove")
def remove_model(
    name: Annotated[str, typer.Argument(metavar="NAME")], data: DataOption = DATA, database: DatabaseOption = None
) -> None:
    """Take a base's name away. Models tuned from it go on being served."""
    from tunewright.server import models as named
    from tunewright.server.store import Store

    named.remove_base(Store(_settings(data, database).prepared().database_url), name)


def _second(day: datetime | None) -> int | None:
    """When a day begins (UTC), in Unix seconds."""
    return None if day is None else int(day.replace(tzinfo=UTC).timestamp())


def _settings(
    data: Path, database: str | None, files: str | None = None, sets: list[str] | None = None, **others: Any
) -> Any:
    from tunewright.server.state import Settings

    return Settings(data.absolute(), database, files, overrides=tuple(sets or ()), **others)


def _stage(
    stage: str,
    path: Path,
    runs: Path,
    sets: list[str] | None,
    again: bool,
    yes: bool,
    resume: bool | None = None,
    *,
    verdict_counts: bool = False,
) -> None:
    """One stage (and those before it that are not done)."""
    life = _open(path, runs, sets, resume)
    if life.folder.status(stage) == "done":
        if not again:
            _say(f"{stage} is done already; --again does it again")
        else:
            life.forget(stage)
    _advance(life, stage, yes, verdict_counts=verdict_counts)


def _advance(
    life: Life, until: str, yes: bool, *, verdict_counts: bool, leave: bool = True, max_cost: float | None = None
) -> int:
    from tunewright import screen

    _say(f"run folder: {life.folder.path}")
    _agree(life, until, yes, max_cost)
    with screen.Watching() as watcher:
        outcome = life.run(until=until, watcher=watcher)
    screen.outcome(outcome)
    code = outcome.exit_code if verdict_counts else errors.DONE
    if leave:
        print(outcome.run.path)
        raise typer.Exit(code)
    return code


def _open(path: Path, runs: Path, sets: list[str] | None, resume: bool | None = None) -> Life:
    from tunewright import api

    return api.open(path, runs=runs, overrides=sets or (), resume=resume)


def _is_data(given: str) -> bool:
    """Whether an argument names data rather than a recipe or a run."""
    from tunewright.data import sources

    path = Path(given)
    if path.suffix.lower() in (".yaml", ".yml") or (path / "state.json").is_file():
        return False
    if not path.exists() and (RUNS / given / "state.json").is_file():
        return False
    return sources.is_file(given) or sources.HUB.fullmatch(given) is not None


def _destroy_several(runs: Path, older_than: str | None, files: bool, yes: bool) -> list[Removed]:
    """Show what stands, ask, remove; a run that cannot be destroyed does not keep the others."""
    from tunewright import destroy as removal
    from tunewright import prices, screen, standing
    from tunewright import run as run_folders
    from tunewright.backends import base

    least_s = _seconds(older_than) if older_than is not None else 0.0
    chosen = [one for one in run_folders.list_runs(runs) if one.age_s >= least_s and (files or not one.destroyed)]
    if not chosen:
        return []
    screen.standing(standing.find(chosen, prices.read()), console=screen.err)
    if not yes:
        if not sys.stdin.isatty():
            raise errors.RunError(f"{len(chosen)} runs would be destroyed (what stands is above); add --yes to agree")
        if not typer.confirm(f"Destroy {len(chosen)} runs?", err=True):
            raise typer.Exit(errors.INTERRUPTED)
    removed, failed = [], None
    for one in chosen:
        try:
            removed += removal.destroy(one, base.backend(one.recipe()), files=files)
        except errors.TunewrightError as error:
            failed = failed or error
            _say(f"{one.id}: {error}")
    if failed is not None:
        raise failed
    return removed


def _seconds(age: str) -> float:
    """30m, 12h, 7d.

    Raises:
        RunError: it is no such age.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([mhd])", age.strip())
    if found is None:
        raise errors.RunError(f"--older-than {age}: give a number and m, h or d, such as 7d")
    return float(found[1]) * {"m": 60, "h": 3600, "d": 86400}[found[2]]


def _agree(life: Life, until: str, yes: bool, max_cost: float | None) -> None:
    """Ask, once a run, before anything is made that costs money."""
    from tunewright import screen
    from tunewright.backends import base
    from tunewright.run import STAGES

    run = life.folder
    if STAGES.index(until) < STAGES.index(base.STAGES[0]):
        return
    if run.status("plan") != "done":
        with screen.Watching() as watcher:
            life.run(until="plan", watcher=watcher)
    planned = run.manifest("plan")
    if max_cost is not None:
        _hold_to(planned, max_cost)
        yes = True
    if not planned.get("cost", {}).get("asks") or any(one["event"] == "agreed" for one in run.events()):
        return
    if not yes:
        screen.plan(planned, console=screen.err)
        if not sys.stdin.isatty():
            raise errors.RecipeError("this run costs money (the plan is above); add --yes to agree")
        if not typer.confirm("Go on?", err=True):
            _say("nothing was made; the same command asks again")
            raise typer.Exit(errors.INTERRUPTED)
    run.event("plan", "agreed")


def _hold_to(planned: dict[str, Any], max_cost: float) -> None:
    """Stop where a run may cost more than was agreed to."""
    cost = planned.get("cost", {"high": 0.0})
    if cost["high"] is None:
        raise errors.RecipeError(f"--max-cost {max_cost:g}: what it costs is not known before ({cost['note']})")
    if cost["high"] > max_cost:
        raise errors.RecipeError(
            f"--max-cost {max_cost:g}: it may cost {cost['high']:.2f} {cost['currency']} ({cost['note']}); use fewer "
            "rows or epochs, or allow more"
        )


def _open_run(path: Path, runs: Path) -> Life:
    """A run folder; a recipe file is not taken here."""
    from tunewright import api

    if path.is_file():
        raise errors.RunError(f"{path}: is a file; give a run folder (`tunewright runs` lists them)")
    if not path.exists() and not (runs / path).exists():
        raise errors.RunError(f"{path}: no such run folder; `tunewright runs` lists the ones there are")
    return api.open(path, runs=runs)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _explain(error: Exception) -> int:
    """One line for a person. A fault of ours leaves its traceback in a file and says where."""
    known: Any = errors.explained(error)
    if known is None:
        import tempfile
        import traceback

        with tempfile.NamedTemporaryFile("w", prefix="tunewright-fault-", suffix=".log", delete=False) as log:
            traceback.print_exception(error, file=log)
        _say(f"error: a fault of ours: {type(error).__name__}: {error}; the traceback is in {log.name}")
        return errors.FAULT
    _say(f"error: {known}")
    code: int = known.exit_code
    return code


if __name__ == "__main__":
    main()
