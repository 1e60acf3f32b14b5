"""Preparing rows: ours against `datasets.map`, and the memory that a million rows take.

Both sides render the chat template and tokenise the same rows for the same tokenizer on the same cores. `datasets.map`
starts from a table that is in Arrow already, renders each conversation once and keeps its ids. Ours starts from the
jsonl, and also checks each row, finds the answer's tokens in it, counts, hashes, looks for test rows among the training
rows, and writes the rows, the ids and the loss mask. So the ratio flatters `datasets.map`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.timing import race, table
from tunewright import chat, models, starter
from tunewright import recipe as recipes
from tunewright import run as run_folders
from tunewright.data import prepare
from tunewright.models import ModelRef

ROWS = 20_000
TEST_ROWS = 100
MEMORY_ROWS = 1_000_000
WORDS = ("a", "the", "film", "plot", "actor", "lovely", "awful", "great", "poor", "because", "nobody", "everyone")


def main() -> None:
    name, tokenizer = _tokenizer()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        where, what = Path(folder), _texts()
        characters = _write(where / "train.jsonl", what, ROWS)
        _write(where / "test.jsonl", what, TEST_ROWS)
        rivals: dict[str, Callable[[], object]] = {
            "datasets.map, threads of the tokenizer": lambda: _mapped(where, tokenizer, None),
            f"datasets.map, {cores} processes": lambda: _mapped(where, tokenizer, cores),
            "tunewright": lambda: _prepared(where, tokenizer),
        }
        spent: dict[str, list[float]] = {rival: [] for rival in rivals}
        title = f"Preparing {ROWS:,} rows of {characters / ROWS:.0f} characters, {name} tokenizer, {cores} cores"
        seconds = race({rival: _metered(run, spent[rival]) for rival, run in rivals.items()})
        best = min(list(rivals)[:2], key=lambda rival: sorted(seconds[rival])[len(seconds[rival]) // 2])
        table(title, seconds, unit="rows", count=ROWS, peer=best)
        print("Processor time of a row, all threads and processes together, in microseconds, which other work on the")
        print("same cores disturbs less (median, lowest and highest):\n")
        for rival, times in spent.items():
            low, middle, high = (1e6 / ROWS * of(times[1:]) for of in (min, statistics.median, max))
            print(f"- {rival}: {middle:.0f} ({low:.0f} to {high:.0f})")
        print()
        memory(where, MEMORY_ROWS)


def _metered(run: Callable[[], object], spent: list[float]) -> Callable[[], None]:
    """The same, noting down the processor time that it took."""

    def metered() -> None:
        before = os.times()
        run()
        spent.append(sum(os.times()[:4]) - sum(before[:4]))

    return metered


def memory(where: Path, rows: int) -> None:
    """Print what `rows` rows add to a child's memory, from after its imports to its peak."""
    _write(where / "train.jsonl", iter(_synthetic, None), rows)
    _write(where / "test.jsonl", iter(_synthetic, None), TEST_ROWS)
    command = [sys.executable, "-W", "ignore", "-m", "bench.preparing", str(where)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    grown = json.loads(said.splitlines()[-1])
    print(f"### Memory of preparing {rows:,} rows\n\n| rows | MB above the libraries, at the peak | seconds |")
    print(f"| ---: | ---: | ---: |\n| {rows:,} | {grown['bytes'] / 1e6:.0f} | {grown['seconds']:.0f} |\n")


def child(where: Path) -> None:
    """Prepare what lies in a folder, and print how far the memory grew."""
    import time

    tokenizer = models.load_tokenizer(_reference())
    chat.equip(tokenizer)
    before, began = _resident("VmRSS"), time.monotonic()
    _prepared(where, tokenizer)
    print(json.dumps({"bytes": _resident("VmHWM") - before, "seconds": time.monotonic() - began}))


def _prepared(where: Path, tokenizer: Any) -> None:
    data = {"train": str(where / "train.jsonl"), "test": str(where / "test.jsonl")}
    recipe = recipes.Recipe.model_validate({"name": "b", "model": "m", "task": "classification", "data": data})
    with tempfile.TemporaryDirectory(dir=where) as folder:
        run = run_folders.create(Path(folder), recipe)
        prepare.write(run, recipe, _reference(), tokenizer, chat.equip(tokenizer))


def _mapped(where: Path, tokenizer: Any, processes: int | None) -> None:
    """The usual way: one call of `map` that renders and tokenises in batches, from Arrow to Arrow."""
    import datasets

    datasets.disable_progress_bars()
    rows = _arrow(where)

    def tokenised(batch: dict[str, list[str]]) -> dict[str, Any]:
        conversations = [
            [{"role": "user", "content": text}, {"role": "assistant", "content": label}]
            for text, label in zip(batch["text"], batch["label"], strict=True)
        ]
        rendered = tokenizer.apply_chat_template(conversations, tokenize=False)
        return {"input_ids": tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]}

    with tempfile.TemporaryDirectory(dir=where) as folder, _parallel(processes is None):
        rows.map(
            tokenised,
            batched=True,
            num_proc=processes,
            remove_columns=rows.column_names,
            load_from_cache_file=False,
            cache_file_name=str(Path(folder) / "mapped.arrow"),
        )


def _arrow(where: Path) -> Any:
    import datasets

    if not (where / "arrow").is_dir():
        lines = (where / "train.jsonl").read_text().splitlines()
        datasets.Dataset.from_list([json.loads(line) for line in lines]).save_to_disk(where / "arrow")
    return datasets.load_from_disk(where / "arrow")


@contextlib.contextmanager
def _parallel(threads: bool) -> Iterator[None]:
    """Whether the tokenizer may use threads of its own; it must not where processes are forked."""
    before = os.environ.pop("TOKENIZERS_PARALLELISM", None)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads else "false"
    try:
        yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _tokenizer() -> tuple[str, Any]:
    tokenizer = models.load_tokenizer(_reference())
    chat.equip(tokenizer)
    return _reference().name, tokenizer


def _reference() -> ModelRef:
    """GPT-2's tokenizer where there is one, else the starter's; the model itself is not loaded."""
    named = os.environ.get("TUNEWRIGHT_SHARED", "")
    folder = Path(named) / "models" / "gpt2-tokenizer"
    if named and folder.is_dir():
        return ModelRef("gpt2", str(folder), "folder", None, "GPT2LMHeadModel", 1024, 50257, 0)
    return ModelRef("starter", str(starter.model_path()), "folder", None, "", 1024, 0, 0)


def _texts() -> Iterator[dict[str, str]]:
    """Real reviews over and over, no two alike, where there are some; else made-up ones."""
    files = sorted(Path(os.environ.get("TUNEWRIGHT_SHARED", ".")).glob("data/imdb-cad/*_train.jsonl"))
    if not files:
        yield from iter(_synthetic, None)
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    for number in itertools.count():
        row = rows[number % len(rows)]
        yield {"text": f"{number} {row['text']}", "label": row["label"]}


def _synthetic(generator: random.Random = random.Random(0)) -> dict[str, str]:  # noqa: B008 - one for all rows
    words = generator.choices(WORDS, k=generator.randint(5, 60))
    return {"text": f"{generator.getrandbits(32)} {' '.join(words)}", "label": generator.choice(["good", "bad"])}


def _write(path: Path, rows: Iterator[dict[str, str]], count: int) -> int:
    characters = 0
    with path.open("w") as file:
        for row in itertools.islice(rows, count):
            file.write(json.dumps(row) + "\n")
            characters += len(row["text"])
    return characters


def _resident(what: str) -> int:
    """Bytes of memory of this process: VmRSS now, or VmHWM at the peak (Linux)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[what].split()[0]) * 1024


if __name__ == "__main__":
    child(Path(sys.argv[1]))
