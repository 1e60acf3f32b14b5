"""What the command line shows a person: progress, findings, plans, runs, results. All of it on standard error, but for
`show`, `runs`, `plan` and `check`, whose text is the result and goes to standard output."""

from __future__ import annotations

import datetime
import json
import re
import shlex
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from tunewright import summary
from tunewright.backends.base import Problem
from tunewright.curves import plot_loss
from tunewright.data import sources
from tunewright.data.codes import CODES
from tunewright.data.mend import Mended
from tunewright.life import Checked, Outcome, Watcher
from tunewright.preflight import Preflight
from tunewright.run import STAGES, Run
from tunewright.standing import Found

PLACES_SHOWN = 40
"""Places named for one kind of finding; the rest are in data/findings.jsonl."""
SEVERITIES = ("error", "warning", "info")
PLAIN_EVERY_S = 10
"""How often progress is said in a line of its own where there is no terminal."""
AGES = ((86400, "d"), (3600, "h"), (60, "min"))
COLOURS = {"better": "green", "not better": "red", "no evidence": "yellow"}

err = Console(stderr=True, highlight=False, soft_wrap=True)
out = Console(highlight=False, soft_wrap=True)


class Bar:
    """A progress bar for one thing, which counts rows, or shows what it is told to."""

    def __init__(self, what: str, unit: str = " rows") -> None:
        self.bar = _bar("{task.description}", "{task.completed:,.0f} of {task.total:,.0f}{task.fields[note]}")
        self.what, self.unit = what, unit
        self.task: TaskID | None = None

    def __enter__(self) -> Bar:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def __call__(self, done: float, total: float, note: str = "") -> None:
        shown = self.unit or f"  {note}"
        if self.task is None:
            self.task = self.bar.add_task(self.what, total=total, note=shown)
        self.bar.update(self.task, completed=done, total=total, note=shown)


class Watching(Watcher):
    """A progress bar for the stage at hand and a line for each that is done."""

    def __init__(self) -> None:
        self.bar = _bar("{task.description:>9}", "{task.fields[note]}")
        self.task: TaskID | None = None
        self.began = 0.0
        self.said = 0.0

    def __enter__(self) -> Watching:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def started(self, run: Run, stage: str) -> None:
        self.began = self.said = time.monotonic()
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(stage, total=None, note="")

    def progress(self, run: Run, stage: str, done: float, total: float, note: str) -> None:
        assert self.task is not None
        self.bar.update(self.task, completed=done, total=total, note=note)
        if not err.is_terminal and time.monotonic() - self.said > PLAIN_EVERY_S:
            self.said = time.monotonic()
            err.print(f"{stage:>9}  {done:.0f}/{total:.0f} {note}", markup=False)

    def finished(self, run: Run, stage: str) -> None:
        line = Text(f"{stage:>9}", style="bold")
        line.append(f"  {time.monotonic() - self.began:6.1f} s  ", style="dim")
        line.append(_what(run, stage), style="")
        err.print(line)
        if stage == "prepare":
            findings(run.manifest("prepare"), "data/findings.jsonl")

    def problem(self, problem: Problem) -> None:
        err.print(Text.assemble((f"{problem.severity}: ", "yellow"), problem.message))


def outcome(result: Outcome) -> None:
    """The verdict and where to look."""
    run = result.run
    if run.status("evaluate") == "done" and (report := run.manifest("evaluate"))["rows"]:
        said = summary.sentence(report["comparison"], report["rows"])
        err.print(Text(said, style=f"bold {COLOURS[report['comparison']['verdict']]}"))
        for other in report["comparisons"]:
            if other["baseline"] != report["comparison"]["baseline"]:
                err.print(f"  {summary.sentence(other)}", markup=False)
        for line in summary.noted(report):
            err.print(f"  {line}", markup=False)
        err.print(f"report: {run.report_page}", markup=False)
    if run.status("deploy") == "done":
        endpoint = run.manifest("deploy")
        err.print(f"endpoint: {endpoint['base_url']}  model {endpoint['model']}{_key(run)}", markup=False)


def next_steps(run: Run) -> None:
    """Three commands to try after the demo."""
    endpoint = run.manifest("deploy")
    text = run.manifest("evaluate")["examples"][0]["text"]
    body = json.dumps({"model": endpoint["model"], "messages": [{"role": "user", "content": text}]})
    where = sources.shown(run.path)
    err.print("\nThree things to try next:", style="bold")
    err.print(f"  tunewright show {where}", markup=False)
    err.print(
        f"  curl {endpoint['base_url']}/chat/completions -H 'content-type: application/json' "
        f'-H "authorization: Bearer $(cat {where}/deploy/key)" -d {shlex.quote(body)}',
        markup=False,
    )
    err.print("  tunewright init YOUR_FILE.csv && tunewright run recipe.yaml", markup=False)
    err.print(
        "(`. .venv/bin/activate` puts tunewright on your PATH.) "
        f"The endpoint runs until `tunewright destroy {where}`.\n",
        markup=False,
    )


def checked(found: Checked) -> None:
    """What `check` found, for a person."""
    if found.model is not None:
        model = found.model
        out.print(
            f"model   {model.name}: {model.architecture}, "
            + (f"{model.parameters:,} weights, " if model.parameters else "")
            + f"context {model.context} tokens",
            markup=False,
        )
    if found.data is not None:
        table = Table("split", "read", "used", "left out", "cut", "tokens", "answer tokens", box=box.SIMPLE_HEAD)
        for split, facts in found.data.splits.items():
            total, answer = facts["tokens"]["total"], facts["tokens"]["answer"]
            table.add_row(
                split,
                str(facts["read"]),
                str(facts["used"]),
                str(facts["rejected"]),
                str(facts["truncated"]),
                _spread(total),
                _spread(answer),
            )
        out.print(table)
        out.print("tokens are: fewest, median, 95th percentile, most in a row", style="dim")
        if found.data.labels:
            shown = ", ".join(found.data.labels[:12]) + (", ..." if len(found.data.labels) > 12 else "")
            out.print(f"labels  {len(found.data.labels)}: {shown}", markup=False)
        findings(found.data.findings.to_dict(), "--json", console=out)
    if found.inspection is not None:
        findings(found.inspection.to_dict(), "--json", console=out)
    for problem in found.problems:
        colour = "red" if problem.severity == "error" else "yellow"
        out.print(Text.assemble((f"{problem.severity}: ", f"bold {colour}"), problem.message))
    if not found.problems:
        out.print(Text("ready to run", style="green"))


def tried(found: Preflight | None) -> None:
    """What came of a preflight, None where `check` found an error before it."""
    if found is None:
        out.print("no preflight: mend the errors above first")
        return
    colour = {"passed": "green", "failed": "bold red", "skipped": "yellow"}[found.outcome]
    out.print(Text(found.sentence, colour))
    if found.note:
        out.print(Text(found.note, "dim"))


def checked_json(found: Checked, tried: Preflight | None = None) -> dict[str, Any]:
    return {
        "ok": not found.errors and (tried is None or tried.code is None),
        "problems": [asdict(problem) for problem in found.problems],
        "model": found.model.to_dict() if found.model else None,
        "data": found.data.checks() | {"findings": list(map(asdict, found.data.findings))} if found.data else None,
        "rendering": found.rendering.to_dict() if found.rendering else None,
        "inspection": found.inspection.to_dict() | {"findings": list(map(asdict, found.inspection))}
        if found.inspection is not None
        else None,
        "preflight": tried.to_dict() if tried is not None else None,
    }


def mended(done: Mended) -> None:
    """What `check --fix` wrote, and what it changed."""
    rows = ", ".join(f"{count} {split}" for split, count in done.rows.items())
    out.print(f"wrote   {', '.join(done.files)}: {rows} rows", markup=False, highlight=False)
    by_kind: dict[tuple[str, str], list[str]] = defaultdict(list)
    for change in done.changes:
        by_kind[change.did, change.why.partition(":")[0]].append(change.where)
    for (did, why), places in by_kind.items():
        shown = _places(places[:PLACES_SHOWN])
        more = f" and {len(places) - PLACES_SHOWN} more" if len(places) > PLACES_SHOWN else ""
        out.print(f"        {len(places)} {did} ({why}): {shown}{more}", markup=False, highlight=False)
    if not done.changes:
        out.print("        nothing had to be changed")


def _key(run: Run) -> str:
    """Where the endpoint's key is, where it is one of ours."""
    return f"  key in {run.key_file}" if run.key_file.is_file() else ""


def _bar(what: str, note: str) -> Progress:
    """A progress bar on a terminal, nothing elsewhere."""
    return Progress(
        TextColumn(what),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn(note),
        TimeRemainingColumn(compact=True),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


def findings(found: dict[str, Any], rest: str, *, console: Console = err) -> None:
    """Each kind of finding with how often and where; `found` has the first of each kind, `rest` says where all are."""
    kinds: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in found["findings"]:
        kinds[row["split"], row["code"], row["severity"]].append(row)
    counts = {(one["split"], one["code"], one["severity"]): one["count"] for one in found["counts"]}
    for (split, code, severity), group in sorted(kinds.items(), key=lambda kind: SEVERITIES.index(kind[0][2])):
        count = counts[split, code, severity]
        line = Text.assemble((f"  {severity} ", "yellow" if severity == "warning" else ""), f"{split}: {count} {code}")
        line.append(f"{', such as' if count > 1 else ':'} {group[0]['where']}: {group[0]['message']}")
        console.print(line)
        if text := group[0].get("text"):
            console.print(Text(f"    text: {' '.join(text.split())}", style="dim"))
        if code in CODES:
            console.print(Text(f"    do: {CODES[code].fix}", style="dim"))
        if count > 1:
            shown = group[:PLACES_SHOWN]
            more = f" and {count - len(shown)} more, in {rest}" if count > len(shown) else ""
            console.print(Text(f"    all: {_places([row['where'] for row in shown])}{more}", style="dim"))


def plan(planned: dict[str, Any], *, console: Console = out) -> None:
    low, high = planned["seconds"]
    console.print(f"backend  {planned['backend']}", markup=False)
    console.print("rows     " + ", ".join(f"{count} {split}" for split, count in planned["rows"].items()))
    console.print(f"steps    {planned['steps'] or 'as many as the API chooses a batch size for'}")
    tokens = planned["tokens"]
    console.print(
        f"tokens   {tokens['train']:,} in training ({tokens['train_per_epoch']:,} an epoch), "
        f"{tokens['test']:,} in the test set, up to {tokens['evaluate']:,} in evaluation"
    )
    if planned["method"] == "hosted":
        sent, answered = tokens["input"], tokens["output"]
        console.print(f"asks     {sent:,} tokens of questions, up to {answered:,} of answers, in evaluation and test")
        console.print("time     not known before: the API's queue and its training")
    else:
        told = "guessed from this machine's matrix products" if planned["here"] else "were it this machine"
        console.print(f"time     {_duration(low)} to {_duration(high)}, {told}")
        console.print(f"method   {planned['method']}: {planned['why']['method']}", markup=False)
        console.print(f"memory   about {planned['memory_bytes'] / 1e9:.1f} GB")
        console.print(f"disk     about {planned['disk_bytes'] / 1e9:.1f} GB")
    cost = planned["cost"]
    if cost["high"] is None:
        console.print(f"cost     not known before: {cost['note']}", markup=False)
    else:
        money = f"{cost['low']:.2f} to {cost['high']:.2f}" if cost["high"] else "0"
        console.print(f"cost     {money} {cost['currency']} ({cost['note']})", markup=False)
    for made in planned["makes"]:
        console.print(f"makes    {made}", markup=False)
    for warning in planned["warnings"]:
        console.print(Text.assemble(("warning  ", "yellow"), warning))


def standing(found: Found, *, console: Console = out) -> None:
    """A table of what stands, what it costs an hour together, and what could not be asked."""
    for run, why in found.unreachable.items():
        err.print(Text(f"{run}: not asked: {why}", "yellow"))
    if not found.standing:
        console.print("nothing stands" + (" where it could be asked" if found.unreachable else ""))
        return
    for run in dict.fromkeys(one.run for one in found.standing):
        here = [one for one in found.standing if one.run == run]
        console.print(Text(f"{run} ({here[0].backend})", "bold"))
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2))
        for column in ("what", "state", "age", "ends by itself"):
            table.add_column(column, no_wrap=True, style="dim" if column == "age" else "")
        table.add_column("$ an hour", justify="right", no_wrap=True)
        table.add_column("name", overflow="fold")
        for one in here:
            what = re.sub("^(databricks|hosted)-", "", one.kind)
            name = one.name if one.recorded else f"{one.name} (not in the ledger)"
            cells = (what, one.state, _age(one.since), one.ends_by_itself or "-", _dollars(one.dollars_an_hour), name)
            table.add_row(*cells)
        console.print(table)
    known = [one.dollars_an_hour for one in found.standing if one.dollars_an_hour is not None]
    low, high = (sum(both[end] for both in known) for end in (0, 1))
    unknown = len(found.standing) - len(known)
    more = f", and {unknown} whose price is unknown" if unknown else ""
    if high or unknown:
        console.print(f"together {_dollars((low, high))} dollars an hour{more} (list prices of {found.prices_as_of})")
        console.print("tunewright destroy RUN removes what a run made")


def _age(since: str | None) -> str:
    """How long ago a moment was (ISO 8601, UTC), in its largest unit."""
    if since is None:
        return "-"
    began = datetime.datetime.fromisoformat(since.replace("Z", "+00:00"))
    seconds = max(0.0, (datetime.datetime.now(datetime.UTC) - began).total_seconds())
    size, unit = next(((size, unit) for size, unit in AGES if seconds >= size), (1, "s"))
    return f"{seconds / size:.0f} {unit}"


def _dollars(both: tuple[float, float] | None) -> str:
    if both is None:
        return "unknown"
    low, high = both
    return "-" if high == 0 else f"{low:.2f} to {high:.2f}"


def runs(found: Sequence[dict[str, Any]], folder: Path) -> None:
    if not found:
        out.print(f"no runs in {folder}; `tunewright run RECIPE` makes one, `tunewright demo` shows how", markup=False)
        return
    table = Table(Column("run", no_wrap=True), "model", "stage", "result", "endpoint", box=box.SIMPLE_HEAD)
    for one in found:
        comparison = one.get("comparison")
        result = (
            f"{comparison['verdict']}, {comparison['metric']} {summary.number(comparison['tuned'])}"
            if comparison
            else ""
        )
        table.add_row(
            Text(one["run"]),
            Text(one["model"].rpartition("/")[2]),
            _reached(one),
            Text(result, style=COLOURS[comparison["verdict"]] if comparison else ""),
            _standing(one),
        )
    out.print(table)


def keys(found: Sequence[dict[str, Any]]) -> None:
    if not found:
        out.print("no keys; `tunewright keys create NAME` makes one")
        return
    table = Table("name", "scope", "made", "expires", "state", box=box.SIMPLE_HEAD)
    for one in found:
        over = one["expires_at"] is not None and one["expires_at"] <= time.time()
        state = "revoked" if one["revoked_at"] is not None else "expired" if over else "opens"
        expires = "never" if one["expires_at"] is None else _day(one["expires_at"])
        table.add_row(Text(one["name"]), one["scope"], _day(one["created_at"]), expires, state)
    out.print(table)


def usage(found: Sequence[dict[str, Any]], days: int) -> None:
    if not found:
        out.print(f"nothing was used in the last {days} days")
        return
    table = Table("day", "key", "model", box=box.SIMPLE_HEAD)
    for column in ("requests", "tokens in", "tokens out"):
        table.add_column(column, justify="right")
    numbers = ("num_model_requests", "input_tokens", "output_tokens")
    for one in found:
        table.add_row(one["day"], Text(one["key"]), Text(one["model"]), *(f"{one[name]:,}" for name in numbers))
    table.add_section()
    table.add_row("all", "", "", *(f"{sum(one[name] for one in found):,}" for name in numbers))
    out.print(table)


def bases(found: Sequence[dict[str, Any]]) -> None:
    if not found:
        out.print("no bases; `tunewright models add NAME SOURCE` names one")
        return
    table = Table("name", "source", "revision", "jobs train with", "jobs until", "retires", box=box.SIMPLE_HEAD)
    for one in found:
        dates = ("" if one[key] is None else _day(one[key]) for key in ("fine_tune_until", "retires_at"))
        revision = (one["revision"] or "")[:12]
        table.add_row(Text(one["name"]), Text(one["source"]), revision, Text(" ".join(one["recipe"])), *dates)
    out.print(table)


def _day(at: int) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def show(run: Run, known: dict[str, Any]) -> None:
    """Stages, data, loss curve, result, endpoint."""
    out.print(Text(known["run"], style="bold"), Text(f" {known['model']} for {known['task']}"))
    out.print("  ".join(f"{stage} {status}" for stage, status in known["stages"].items()), markup=False)
    for stage, message in known["errors"].items():
        out.print(Text.assemble((f"{stage} failed: ", "bold red"), message))
    for split, facts in known.get("data", {}).items():
        out.print(
            f"{split}: {facts['used']} of {facts['read']} rows, {facts['rejected']} left out, {facts['truncated']} cut"
        )
    points = [(entry["step"], entry["loss"]) for entry in run.metrics() if "loss" in entry]
    if points:
        out.file.write(plot_loss(points, width=min(100, out.width), height=16, colour=out.is_terminal) + "\n")
    if "models" in known:
        names = ("accuracy", "f1_macro", "exact_match", "rouge_l", "loss", "perplexity")
        columns = [key for key in names if key in known["models"]["tuned"]]
        table = Table("model", *columns, box=box.SIMPLE_HEAD)
        for name, values in known["models"].items():
            table.add_row(name, *(f"{values[key]:.4f}" if key in values else "" for key in columns))
        out.print(table)
        comparison = known["comparison"]
        out.print(Text(summary.sentence(comparison), style=f"bold {COLOURS[comparison['verdict']]}"))
        out.print(f"report: {known['report']}", markup=False)
    if "endpoint" in known:
        endpoint = known["endpoint"]
        down = "" if endpoint["up"] else "  (not running; `tunewright deploy` starts it)"
        out.print(f"endpoint: {endpoint['base_url']}  model {endpoint['model']}{_key(run)}{down}", markup=False)
    if "test" in known:
        test = known["test"]
        out.print(
            f"test: {test['equal']} of {test['compared']} answers over HTTP equal the offline ones; median "
            f"{1000 * test['latency_s']['median']:.0f} ms, p95 {1000 * test['latency_s']['p95']:.0f} ms"
        )


def _what(run: Run, stage: str) -> str:
    """A done stage in a few words."""
    manifest = run.manifest(stage)
    match stage:
        case "check":
            size = f"{manifest['model']['parameters']:,} weights, " if manifest["model"]["parameters"] else ""
            where = "behind an API" if manifest["device"] == "hosted" else f"on {manifest['device']}"
            return f"{manifest['model']['name']}, {size}{where}"
        case "plan":
            low, high = manifest["seconds"]
            took = f"{_duration(low)} to {_duration(high)}"
            steps = f"{manifest['steps']} steps, " if manifest["steps"] else ""
            return f"{steps}{manifest['tokens']['train']:,} tokens" + (f", {took}" if manifest["here"] else "")
        case "prepare":
            return ", ".join(
                f"{facts['used']} {split} rows"
                + (f" ({facts['rejected']} left out)" if facts["rejected"] else "")
                + (f" ({facts['truncated']} cut)" if facts["truncated"] else "")
                for split, facts in manifest["splits"].items()
            )
        case "train":
            loss = manifest["final_loss"]
            shown = f"loss {loss:.4f}" if loss is not None else ""
            if manifest["trainable_parameters"] is None:
                return f"{manifest['model']}, {manifest['tokens'] or 0:,} tokens billed" + (
                    f", {shown}" if shown else ""
                )
            return f"{manifest['steps']} steps, {shown}, {manifest['trainable_parameters']:,} weights trained"
        case "evaluate":
            comparison = manifest["comparison"]
            if comparison is None:
                return "no rows were held out"
            other = f"{comparison['baseline']} {summary.number(comparison['baseline_value'])}"
            return f"{comparison['metric']} {summary.number(comparison['tuned'])}, {other}"
        case "package":
            size = sum(file["bytes"] for file in manifest["files"].values())
            return f"{len(manifest['files'])} files, {size / 1e6:.1f} MB" + (
                f", {manifest['mlflow']}" if manifest["mlflow"] else ""
            )
        case "deploy":
            return f"{manifest['base_url']}, model {manifest['model']}"
        case _:
            return (
                f"{manifest['equal']} of {manifest['compared']} answers as offline, "
                f"median {1000 * manifest['latency_s']['median']:.0f} ms"
            )


def _reached(known: dict[str, Any]) -> str:
    done = [stage for stage in STAGES if known["stages"][stage] == "done"]
    unusual = [
        f"{stage} {status}" for stage, status in known["stages"].items() if status in ("failed", "doing", "cancelled")
    ]
    return unusual[0] if unusual else (done[-1] if done else "new")


def _standing(known: dict[str, Any]) -> str:
    """The endpoint of a run, in a word or its address."""
    if known["destroyed"]:
        return "destroyed"
    endpoint = known.get("endpoint")
    if endpoint is None:
        return ""
    return str(endpoint["base_url"]) if endpoint["up"] else "not running"


def _places(places: Sequence[str]) -> str:
    """`train.jsonl:3, :7, test.jsonl:1`: the file's name once for a run of places in it."""
    words = []
    last = ""
    for place in places:
        file, colon, line = place.rpartition(":")
        words.append(f":{line}" if colon and file == last else place)
        last = file
    return ", ".join(words)


def _spread(values: dict[str, float]) -> str:
    return " ".join(f"{values[key]:.0f}" for key in ("min", "median", "p95", "max")) if values else ""


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
