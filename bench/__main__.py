"""`make bench`: all benchmarks, or those named (`python -m bench train`). Prints Markdown tables."""

from __future__ import annotations

import platform
import sys

import torch

from bench import accuracy, checking, constants, preparing, scaling, scoring, server, spark, train

BENCHMARKS = {
    "train": train.main,
    "accuracy": accuracy.main,
    "scoring": scoring.main,
    "checking": checking.main,
    "preparing": preparing.main,
    "server": server.main,
    "spark": spark.main,
    "constants": constants.main,
    "scaling": scaling.main,
}


def main(names: list[str]) -> None:
    unknown = set(names) - set(BENCHMARKS)
    if unknown:
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    for name in names or BENCHMARKS:
        BENCHMARKS[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
