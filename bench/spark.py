"""Spark against this machine alone, at equal cores: preparing rows, answering a batch, and the driver's memory.

Every measurement is a process of its own, pinned to as many cores as there are executors, the cluster and the driver
with it, so the JVMs share the cores with what they run. Start-up is measured apart: the session, the executors' Python
and its imports, the tokenizer and the model, all of which a first small job brings about. The cluster
(`scripts/spark-cluster`) has workers of one slot.

`python -m bench spark`; BENCH_ROWS and BENCH_BATCH_ROWS make it smaller.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from tunewright import chat, life, models, work
from tunewright import recipe as recipes
from tunewright.backends.spark import SparkBackend
from tunewright.models import ModelRef
from tunewright.run import Run, write_json
from tunewright.testing import tiny_model

ROWS, BATCH_ROWS, WARM_ROWS = 1_000_000, 100_000, 2_000
MEMORY_ROWS = (10_000, 100_000, 1_000_000)
WORDS = ("a", "the", "film", "plot", "actor", "lovely", "awful", "great", "poor", "because", "nobody", "everyone")
SCRIPT = Path(__file__).parent.parent / "scripts" / "spark-cluster"


def main() -> None:
    rows = int(os.environ.get("BENCH_ROWS", ROWS))
    batch_rows = int(os.environ.get("BENCH_BATCH_ROWS", BATCH_ROWS))
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        model = _model(home / "model")
        package = _package(home / "package", model)
        for count in {rows, batch_rows, WARM_ROWS, *(one for one in MEMORY_ROWS if one <= rows)}:
            _write(home / f"{count}.jsonl", count)
        found: dict[str, dict[str, Any]] = {}
        for cores in (1, 2):
            found[f"here, {cores}"] = _child(home, cores, "here", rows, batch_rows, package)
            master = _cluster(home, cores)
            found[f"spark, {cores}"] = _child(home, cores, "spark", rows, batch_rows, package, master)
            _cluster(home, 0)
        for key, title, count in (("prepare_s", "Preparing", rows), ("batch_s", "Answering", batch_rows)):
            _table(found, key, f"{title} {count:,} short rows", count)
        print("Start-up in seconds (session and a first small job): ", end="")
        print(", ".join(f"{name}: {one['start_s']:.1f}" for name, one in found.items()))
        if rows >= MEMORY_ROWS[0]:
            master = _cluster(home, 2)
            print("\nThe driver's peak memory in MB (Python + JVM), one process for each:\n")
            for count in (one for one in MEMORY_ROWS if one <= rows):
                told = _child(home, 2, "memory", count, 0, package, master)
                print(f"- {count:,} rows: {told['python_mb']:.0f} + {told['jvm_mb']:.0f}")
            _cluster(home, 0)
        print()


def _table(found: dict[str, dict[str, Any]], key: str, title: str, count: int) -> None:
    print(f"### {title}\n\n| cores | here, rows/s | Spark, rows/s | Spark's overhead |\n| ---: | ---: | ---: | ---: |")
    for cores in (1, 2):
        here, spark = found[f"here, {cores}"][key], found[f"spark, {cores}"][key]
        print(f"| {cores} | {count / here:,.0f} | {count / spark:,.0f} | {spark / here - 1:+.0%} |")
    ways = [f"{name} {found[f'{name}, 1'][key] / found[f'{name}, 2'][key]:.2f}x" for name in ("here", "spark")]
    print(f"\nFrom 1 core to 2: {', '.join(ways)}.\n")


def _child(home: Path, cores: int, *words: Any) -> dict[str, Any]:
    """A measurement in a process of its own that has so many cores."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1" if words[0] != "here" else str(cores),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }
    code = "import sys; from bench.spark import measure; measure(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(home), str(cores), *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"  {cores} cores, {words[0]}: {told}", file=sys.stderr)
    return told


def measure(words: list[str]) -> None:
    """What a child does: prints what it measured as a line of JSON."""
    home, cores, where, rows, batch_rows, package = (
        Path(words[0]),
        int(words[1]),
        words[2],
        *map(int, words[3:5]),
        words[5],
    )
    began = time.perf_counter()
    _pin(cores)
    if where == "here":
        told = _measure_here(home, rows, batch_rows, package, began)
    else:
        told = _measure_spark(home, words[6], rows, batch_rows, package, began)
    print(json.dumps(told))


def _measure_here(home: Path, rows: int, batch_rows: int, package: str, began: float) -> dict[str, Any]:
    from tunewright.package import batch

    work.prepare(_run(home, WARM_ROWS, "local"))
    _answer(lambda asked: batch.answer_all(asked, _quiet), home, WARM_ROWS, package)
    told = {"start_s": time.perf_counter() - began}
    run = _run(home, rows, "local")
    told["prepare_s"] = _timed(lambda: work.prepare(run))
    told["batch_s"] = _timed(lambda: _answer(lambda asked: batch.answer_all(asked, _quiet), home, batch_rows, package))
    return told


def _measure_spark(home: Path, master: str, rows: int, batch_rows: int, package: str, began: float) -> dict[str, Any]:
    from tunewright.spark import batching, preparing, session
    from tunewright.spark.settings import settings

    asked = settings({"master": master, "conf": {"spark.executor.memory": "1g"}})
    with session.session(asked, "bench", home / "site") as spark:
        preparing.prepare(_run(home, WARM_ROWS, "spark"), spark, asked)
        if batch_rows:
            _answer(lambda one: batching.answer(one, spark, _quiet), home, WARM_ROWS, package)
        told = {"start_s": time.perf_counter() - began}
        run = _run(home, rows, "spark")
        told["prepare_s"] = _timed(lambda: preparing.prepare(run, spark, asked))
        if batch_rows:
            told["batch_s"] = _timed(
                lambda: _answer(lambda one: batching.answer(one, spark, _quiet), home, batch_rows, package)
            )
        told["python_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        jvms = [one for one in psutil.Process().children(recursive=True) if one.name() == "java"]
        told["jvm_mb"] = sum(_peak_kb(one.pid) for one in jvms) / 1024
        return told


def _peak_kb(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _timed(run: Any) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _quiet(done: int, total: int) -> None:
    """Nobody looks on."""


def _answer(by: Any, home: Path, rows: int, package: str) -> None:
    from tunewright.package.batch import Asked

    output = home / f"out-{time.monotonic_ns()}"
    summary = by(Asked(package, [str(home / f"{rows}.jsonl")], str(output)))
    assert (summary["rows"], summary["errors"]) == (rows, 0), summary


def _run(home: Path, rows: int, kind: str) -> Run:
    """A run whose data is to be prepared."""
    given = {
        "name": "bench",
        "model": str(home / "model"),
        "task": "classification",
        "data": {"train": str(home / f"{rows}.jsonl"), "test": str(home / f"{WARM_ROWS}.jsonl")},
        "tracking": {"enabled": False},
        "backend": {"kind": kind},
    }
    recipe = recipes.loads(yaml.safe_dump(given))
    run = life.start(recipe, home / "runs", resume=False)
    small = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": recipe.data.test})})
    plain, SparkBackend.check = SparkBackend.check, lambda *_: []  # type: ignore[assignment,method-assign]
    checked = life.check(small)
    SparkBackend.check = plain  # type: ignore[method-assign]
    write_json(run.manifest_file("check"), life.resolve(recipe, checked, run.path.parent))
    return run


def _write(path: Path, rows: int) -> None:
    draw = random.Random(rows)
    with path.open("w") as file:
        for number in range(rows):
            text = " ".join(draw.choices(WORDS, k=draw.randint(6, 24)))
            file.write(json.dumps({"text": f"{text} {number}", "label": ("good", "bad")[number % 2]}) + "\n")


def _model(folder: Path) -> Path:
    return tiny_model(folder, context=512)


def _package(folder: Path, model: Path) -> Path:
    """A packaged classifier, as `package` writes it, of weights that have learnt nothing."""
    ref: ModelRef = models.find(str(model), None)
    tokenizer = models.load_tokenizer(ref)
    equipment = chat.equip(tokenizer)
    weights = models.load_model(ref)
    models.grow(weights, len(tokenizer))
    with models.quiet():
        weights.save_pretrained(str(folder / "model"))
        tokenizer.save_pretrained(str(folder / "model"))
    rendering = chat.golden(tokenizer, equipment, [[chat.Message("user", "a"), chat.Message("assistant", "b")]])
    facts = {
        "task": "classification",
        "labels": ["good", "bad"],
        "system": None,
        "max_length": 512,
        "max_new_tokens": 64,
    }
    write_json(folder / "rendering.json", rendering | facts)
    return folder


def _cluster(home: Path, workers: int) -> str:
    """The address of a cluster of so many workers with one slot each; 0 ends it."""
    words = [sys.executable, str(SCRIPT), "start" if workers else "stop", "--folder", str(home / "cluster")]
    done = subprocess.run(
        [*words, "--workers", str(workers)],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: _pin(workers) if workers else None,
    )
    return done.stdout.strip()


def _pin(cores: int) -> None:
    """Keep this process, and whatever it starts, on so many cores."""
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:cores]))
