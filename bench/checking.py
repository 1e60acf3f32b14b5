"""`check` on many rows: how long the long look at the rows takes, and the memory that a million short ones take.

The peer is `check` without the look (`inspect=False`), which reads, shapes, tokenises and counts each row and looks for
repeated texts; the difference is what near duplicates, contradictions, secrets and the rest cost.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.timing import race, table
from tunewright import life
from tunewright import recipe as recipes

ROWS = 100_000
MANY_ROWS = 1_000_000
TEST_ROWS = 1_000
WORDS = 2_000
"""Words that the rows are made of, drawn as Zipf's law has it: texts that share words as real ones do."""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        characters = write(where, ROWS)
        rivals: dict[str, Callable[[], object]] = {
            "check without the look": lambda: life.check(_recipe(where), inspect=False),
            "check": lambda: life.check(_recipe(where)),
        }
        seconds = race(rivals, repeats=3)
        title = f"Checking {ROWS:,} rows of {characters / ROWS:.0f} characters"
        table(title, seconds, unit="rows", count=ROWS, peer="check without the look")
        print("| rows | MB at the peak, libraries included | seconds | findings |\n| ---: | ---: | ---: | ---: |")
        for rows in (ROWS, MANY_ROWS):
            write(where, rows)
            command = [sys.executable, "-W", "ignore", "-m", "bench.checking", str(where)]
            told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(
                f"| {rows:,} | {told['bytes'] / 1e6:.0f} | {told['seconds']:.0f} | {told['findings']:,} |", flush=True
            )
        print()


def write(where: Path, rows: int) -> int:
    """Rows of some ten words, and 1,000 test rows; gives the number of characters."""
    chance = random.Random(1)
    words = ["".join(chance.choices("aeioubcdfglmnprst", k=chance.randint(2, 9))) for _ in range(WORDS)]
    weights = [1 / (place + 10) for place in range(WORDS)]
    characters = 0
    for name, count in (("train", rows), ("test", TEST_ROWS)):
        with (where / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(count):
                text = " ".join(chance.choices(words, weights, k=chance.randint(6, 14)))
                characters += len(text) * (name == "train")
                file.write(json.dumps({"text": text, "label": chance.choice(("good", "bad"))}) + "\n")
    return characters


def _recipe(where: Path) -> recipes.Recipe:
    data = {"train": str(where / "train.jsonl"), "test": str(where / "test.jsonl")}
    return recipes.Recipe.model_validate({"name": "b", "model": "starter", "task": "classification", "data": data})


def child(where: Path) -> None:
    """Check what lies in a folder; print the peak of the memory, the seconds and the number of findings."""
    began = time.monotonic()
    checked = life.check(_recipe(where))
    seconds = time.monotonic() - began
    assert checked.inspection is not None
    assert not checked.errors, checked.errors
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    found = sum(one["count"] for one in checked.inspection.to_dict()["counts"])
    print(json.dumps({"bytes": int(peak.split()[1]) * 1024, "seconds": seconds, "findings": found}))


if __name__ == "__main__":
    child(Path(sys.argv[1]))
