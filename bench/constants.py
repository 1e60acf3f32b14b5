"""What the simulation of `bench/scaling.py` takes for granted: a row of the driver's own work, a job, a row through a
model of GPT-2's size, and a step of its training. Prints the median of a few, with the lowest and highest.

`python -m bench constants`; takes some minutes.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import spark as of_spark
from tunewright import work
from tunewright.data import tokens
from tunewright.data.tokens import SEQUENCE, Part
from tunewright.run import Run

ROWS, SCORED, STEP_TOKENS = 200_000, 16, 1024


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        of_spark._model(home / "model")
        row_bytes, joined = _joined(home)
        _say(f"the driver puts a row of {row_bytes} bytes behind another", joined, 1e6 / ROWS, "us")
        master = of_spark._cluster(home, 2)
        _say("a Spark job of six empty tasks", _jobs(master, home), 1, "s")
        of_spark._cluster(home, 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _say("a row through 124M weights, two labels, one core", _scored(), 1e3 / SCORED, "ms")
    torch.set_num_threads(threads)
    for method in ("full", "lora"):
        what = f"8,192 tokens of training, 124M weights, {method}, float32, {threads} cores"
        _say(what, _stepped(method), 8192 / STEP_TOKENS, "s")


def _say(what: str, seconds: list[float], times: float, unit: str) -> None:
    low, middle, high = (times * one for one in (min(seconds), statistics.median(seconds), max(seconds)))
    print(f"- {what}: {middle:.2f} {unit} ({low:.2f} to {high:.2f})")


def _repeat(run: Callable[[], Any], repeats: int = 5) -> list[float]:
    run()
    return [of_spark._timed(run) for _ in range(repeats)]


def _joined(home: Path) -> tuple[int, list[float]]:
    """Bytes of a row with its tokens, and seconds to put the parts of a split behind one another."""
    of_spark._write(home / f"{ROWS}.jsonl", ROWS)
    of_spark._write(home / f"{of_spark.WARM_ROWS}.jsonl", of_spark.WARM_ROWS)
    run = of_spark._run(home, ROWS, "local")
    work.prepare(run)
    part = _part(run, home / "part")
    files = (part.rows, part.tokens, part.mask, part.sequences)
    return sum(path.stat().st_size for path in files) // ROWS, _repeat(lambda: tokens.join(run, "train", [part]))


def _part(run: Run, folder: Path) -> Part:
    """A prepared split as one part, as a task writes it: without the arrays' headers."""
    folder.mkdir()
    paths = {"rows": folder / "rows.jsonl"} | {name: folder / name for name in ("tokens", "mask", "sequences")}
    shutil.copyfile(run.data_file("train"), paths["rows"])
    for name in ("tokens", "mask", "sequences"):
        np.load(run.tokens_file("train", name), mmap_mode="r").tofile(paths[name])  # type: ignore[arg-type]
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    return Part(
        **paths,
        num_rows=ROWS,
        num_tokens=sizes["mask"],
        num_sequences=sizes["sequences"] // SEQUENCE.itemsize,
        num_bytes=sizes["rows"],
    )


def _jobs(master: str, home: Path) -> list[float]:
    from tunewright.spark import session
    from tunewright.spark.settings import settings

    with session.session(settings({"master": master}), "constants", home / "site") as spark:
        return _repeat(lambda: spark.sparkContext.parallelize(range(6), 6).count())


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config())


def _scored() -> list[float]:
    """Seconds for a batch of prompts of 24 tokens and the two tokens of a label behind each, as a label tree has it."""
    model = _gpt2().eval()
    ids = torch.randint(50_000, (SCORED, 26))

    @torch.no_grad()
    def score() -> None:
        model(input_ids=ids, logits_to_keep=2)

    return _repeat(score)


def _stepped(method: str) -> list[float]:
    """Seconds for the forward and backward of a step's tokens."""
    model = _gpt2()
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=16, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
        )
    ids = torch.randint(50_000, (STEP_TOKENS // 128, 128))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    return _repeat(step, 3)
