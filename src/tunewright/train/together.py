"""Several processes that train together: which of them writes, and where they wait for each other. One by itself is the
first, and waits for nobody.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed


def is_first() -> bool:
    """Whether this is the process that writes, of those that train together."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def meet() -> None:
    """Wait until every process that trains along has come here."""
    if distributed.is_initialized():
        distributed.barrier()


def most(number: int, device: Any) -> int:
    """The largest of the numbers that the processes call it with."""
    if not distributed.is_initialized():
        return number
    largest = torch.tensor(number, device=device)
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return int(largest)
