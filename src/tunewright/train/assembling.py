"""Rendered rows into batches.

The rows of one optimizer step are put into bins, each one forward and backward. In a bin the rows lie end to end,
without padding, and attention stays inside each (`attention`); for architectures that take no such batch they are
padded. Either way the bin says which places' next tokens are targets, and the head of the model is computed there alone
(`losses`). The loss and its gradients equal the ordinary ones, however the rows fall into bins.

Shapes: B rows, T tokens of a bin (B x T when padded), K targets in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from tunewright import attention
from tunewright.chat import Rendering

Layout = Literal["flat", "padded", "plain"]
"""flat: end to end; padded: a rectangle; plain: a rectangle, and the loss by the model's own forward."""


class Store(Protocol):
    """Rendered rows, wherever they are kept."""

    lengths: np.ndarray[Any, Any]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Rendering: ...

    def source(self, index: int) -> str:
        """file:line of the row."""
        ...


class Rendered:
    """A store in memory."""

    def __init__(self, renderings: Sequence[Rendering], sources: Sequence[str]) -> None:
        self.renderings = renderings
        self.sources = sources
        self.lengths = np.array([len(one.ids) for one in renderings])

    def __len__(self) -> int:
        return len(self.renderings)

    def __getitem__(self, index: int) -> Rendering:
        return self.renderings[index]

    def source(self, index: int) -> str:
        return self.sources[index]


@dataclass(frozen=True)
class Row:
    """One rendered row and its number among the training rows."""

    number: int
    ids: list[int]
    mask: list[bool]
    counts: bool = True
    """False where it stands in for no row at all: a process runs it along with the others, and nothing comes of it."""


class Rows(Dataset[Row]):
    """The training rows, in their order.

    Where several processes train together, each asks for all rows of a step and is given its share of them, so what a
    step learns from, and in which order, does not depend on how many they are.

    Args:
        store: the rendered rows.
        rank: this process's number.
        world: how many processes there are.
    """

    def __init__(self, store: Store, rank: int = 0, world: int = 1) -> None:
        self.store = store
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> Row:
        rendering = self.store[index]
        return Row(index, rendering.ids, rendering.mask)

    def __getitems__(self, step: Sequence[int]) -> list[Row]:
        """This process's share of a step's rows. Of fewer rows than processes some get none, and run one along."""
        first, end = (len(step) * rank // self.world for rank in (self.rank, self.rank + 1))
        if first == end:
            return [replace(self[step[0]], counts=False)]
        return [self[index] for index in step[first:end]]


def collate(rows: Sequence[Row]) -> dict[str, Any]:
    """The rows of one step as Trainer hands them on: as they are, with their targets to be counted."""
    targets = torch.tensor(
        [token for row in rows for token, flag in zip(row.ids[1:], row.mask[1:], strict=True) if flag and row.counts],
        dtype=torch.long,
    )
    return {"rows": list(rows), "labels": targets, "shift_labels": targets}


def into_bins(lengths: Sequence[int], budget: int, *, layout: Layout = "flat") -> list[list[int]]:
    """Which rows go into which bin, the longest rows first, each into the fullest bin that has room for it (best-fit
    decreasing). The order decides nothing but the order of the sums.

    Args:
        lengths: Tokens of each row.
        budget: Tokens of a bin, padding included; a longer row has a bin to itself.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    bins: list[list[int]] = []
    used: list[int] = []
    for row in order:
        best = None
        for number, held in enumerate(bins):
            size = used[number] + lengths[row] if layout == "flat" else lengths[held[0]] * (len(held) + 1)
            if size <= budget and (best is None or used[number] > used[best]):
                best = number
        if best is None:
            bins.append([row])
            used.append(lengths[row])
        else:
            bins[best].append(row)
            used[best] += lengths[row]
    return bins


def assemble(rows: Sequence[Row], layout: Layout, pad_id: int) -> dict[str, Any]:
    """Rows into what a model's forward takes."""
    if layout == "flat":
        given = attention.lay([row.ids for row in rows])
        ids_T = given["input_ids"][0]
        target_T = torch.tensor([place > 0 and flag for row in rows for place, flag in enumerate(row.mask)])
    else:
        longest = max(len(row.ids) for row in rows)
        ids_BT = torch.full((len(rows), longest), pad_id)
        real_BT = torch.zeros((len(rows), longest), dtype=torch.long)
        target_BT = torch.zeros((len(rows), longest), dtype=torch.bool)
        for number, row in enumerate(rows):
            ids_BT[number, : len(row.ids)] = torch.tensor(row.ids)
            real_BT[number, : len(row.ids)] = 1
            target_BT[number, : len(row.ids)] = torch.tensor(row.mask)
        target_BT[:, 0] = False  # nothing comes before the first token, so nothing predicts it
        given = {"input_ids": ids_BT, "attention_mask": real_BT}
        ids_T, target_T = ids_BT.flatten(), target_BT.flatten()
        if layout == "plain":
            targets = ids_BT[target_BT]
            keep = target_BT.roll(-1, dims=1)  # the place before each target predicts it
            return given | {"logits_to_keep": keep, "labels": targets, "shift_labels": targets, "use_cache": False}
    places_K = target_T.nonzero()[:, 0]
    return given | {"kept": places_K - 1, "targets": ids_T[places_K], "use_cache": False}


class LengthGrouped(Sampler[int]):
    """Row numbers with rows of like length side by side, in an order that the seed and the epoch alone decide.

    Transformers' own sampler draws from the global generator, so a resumed run would see its epoch in another order.
    """

    def __init__(self, rows: Rows, batch_size: int, seed: int) -> None:
        self.lengths = rows.store.lengths.tolist()
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
