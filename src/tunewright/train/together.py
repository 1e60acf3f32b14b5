"""Several processes that train together: which of them writes, where they wait for each other, and what each of them
has. One by itself is the first, and waits for nobody.
"""

from __future__ import annotations

import gc
import os

import torch
from torch import distributed

from tunewright import ranks


def is_first() -> bool:
    """Whether this is the process that writes, of those that train together."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def place() -> tuple[int, int]:
    """This process's number among those that train together, and how many they are, as whoever started them says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def leave() -> None:
    """End the processes' connection, once nothing holds on to it any more.

    While the object that adds gradients up is alive, ending its connection hangs now and then (torch 2.13, gloo), and
    so does one process that ends it while another still uses it.
    """
    if distributed.is_initialized():
        gc.collect()
        distributed.barrier()
        distributed.destroy_process_group()


def meet() -> None:
    """Wait until every process that trains along has come here."""
    if distributed.is_initialized():
        ranks.enter("waiting")
        distributed.barrier()


def gather(number: float) -> list[float]:
    """The number that each process comes here with; all of them get the same list."""
    if not distributed.is_initialized():
        return [number]
    own = torch.tensor(number, dtype=torch.float64)
    own = own.cuda() if distributed.get_backend() == "nccl" else own
    all_of_them = [torch.zeros_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(all_of_them, own)
    return [float(one) for one in all_of_them]
