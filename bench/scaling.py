"""What 8, 64 and 512 executors would give: a small simulation, from constants that `python -m bench spark` (`row_s`,
`load_s`) and `python -m bench constants` (the others) measured, and some that are assumed and say so.

Tasks take times drawn around their share of the work (log-normal) and are handed to whichever slot is free; what the
driver does alone is added. `python -m bench scaling` prints the tables of docs/scaling.md.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

EXECUTORS = (1, 2, 8, 64, 512)


@dataclass(frozen=True)
class Work:
    """A kind of work on rows, one core an executor."""

    name: str
    rows: int
    row_s: float
    """Seconds of one core for a row, in a task."""
    driver_row_s: float
    """Seconds that the driver alone spends for a row: putting parts behind one another."""
    jobs: int
    job_s: float
    """Jobs, and what each costs whatever it does."""
    load_s: float
    """What each executor's Python does before its first row: imports, tokenizer, model (assumed)."""
    bytes_of_a_row: float


LAUNCH_S = 0.004
"""The driver hands out a task in about so long (assumed: 250 a second)."""
SPREAD = 0.15
"""Of tasks of the same size, as a share (assumed; a shared cluster has more)."""
DISK = 400e6
"""Bytes a second that the storage takes from one writer (assumed)."""


def main() -> None:
    for work in WORKS:
        print(f"### {work.name}: {work.rows:,} rows\n")
        print("| executors | seconds | times one | spent by the driver alone |\n| ---: | ---: | ---: | ---: |")
        one, _ = seconds(work, 1)
        for executors in EXECUTORS:
            whole, alone = seconds(work, executors)
            print(f"| {executors} | {whole:,.0f} | {one / whole:.1f} | {alone / whole:.0%} |")
        print()
    for name, step in STEPS.items():
        print(f"### {name}\n\n| processes | steps/s | times one | spent on gradients |\n| ---: | ---: | ---: | ---: |")
        one = step.seconds(1)[0]
        for processes in EXECUTORS[:-1]:
            whole, exchange = step.seconds(processes)
            print(f"| {processes} | {1 / whole:.2f} | {one / whole:.1f} | {exchange / whole:.0%} |")
        print()


def seconds(work: Work, executors: int, *, seed: int = 0) -> tuple[float, float]:
    """How long the work takes, and how much of it the driver works alone; the median of 20 draws."""
    found = [_draw(work, executors, np.random.default_rng(seed + number)) for number in range(20)]
    return sorted(found)[len(found) // 2]


def _draw(work: Work, executors: int, draw: np.random.Generator) -> tuple[float, float]:
    tasks = 3 * executors
    sizes = work.rows / tasks * work.row_s * draw.lognormal(-(SPREAD**2) / 2, SPREAD, tasks)
    free = [(work.load_s, slot) for slot in range(executors)]
    heapq.heapify(free)
    end = 0.0
    for number, size in enumerate(sizes):
        at, slot = heapq.heappop(free)
        done = max(at, number * LAUNCH_S) + size
        end = max(end, done)
        heapq.heappush(free, (done, slot))
    alone = work.jobs * work.job_s + work.rows * (work.driver_row_s + work.bytes_of_a_row / DISK)
    return end + alone, alone


@dataclass(frozen=True)
class Step:
    """A step of training by data parallelism: the rows are shared out, the gradients added up by a ring."""

    compute_s: float
    """Of the whole step in one process."""
    gradient_bytes: float
    bandwidth: float
    """Bytes a second between two machines."""
    latency_s: float

    def seconds(self, processes: int) -> tuple[float, float]:
        """The step, and the exchange in it. None of it is hidden behind the backward, the worst case."""
        if processes == 1:
            return self.compute_s, 0.0
        ring = 2 * (processes - 1)
        exchange = ring / processes * self.gradient_bytes / self.bandwidth + ring * self.latency_s
        return self.compute_s / processes + exchange, exchange


WORKS = (
    Work("Preparing", 100_000_000, 159e-6, 0.92e-6, 5, 0.43, 8, 778),
    Work("Answering, a model of 28,000 weights", 100_000_000, 775e-6, 0.0, 2, 0.43, 12, 0),
    Work("Answering, a model of 124 million weights", 10_000_000, 67.6e-3, 0.0, 2, 0.43, 20, 0),
)
STEPS = {
    "Training 124M weights whole, 8,192 tokens a step, CPUs, gloo over 10 Gbit/s": Step(54.7, 498e6, 1.1e9, 2e-4),
    "The same with LoRA of rank 16 (1.2M weights)": Step(36.9, 4.7e6, 1.1e9, 2e-4),
    "Training 124M weights whole, 65,536 tokens a step, GPUs, NCCL over 200 Gbit/s": Step(0.16, 249e6, 22e9, 2e-5),
}
