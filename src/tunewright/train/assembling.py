"""Rendered rows into batches.

A batch holds the padded ids and, instead of a label for each place, which places' logits are wanted and what the
targets there are: the head of the model is computed only where there is a loss. The loss and its gradients equal the
ordinary ones.

Shapes: B rows, T tokens in the longest, K targets in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from tunewright.chat import Example, Rendering
from tunewright.data import prepare
from tunewright.data.tokens import TokenStore


class Rows(Dataset[Rendering]):
    """Rendered rows, in their order: a list of them, or the store on disk that preparation wrote."""

    def __init__(self, renderings: Sequence[Rendering]) -> None:
        self.renderings = renderings

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        if isinstance(self.renderings, TokenStore):
            return [int(length) for length in self.renderings.lengths]
        return [len(rendering.ids) for rendering in self.renderings]

    def __len__(self) -> int:
        return len(self.renderings)

    def __getitem__(self, index: int) -> Rendering:
        return self.renderings[index]


def render_all(tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Rendering]:
    """Every example's rendering; plain text longer than `max_length` in pieces, so that no token is lost."""
    renderings = []
    for example in examples:
        whole = prepare.render(tokenizer, example)
        if example.text is None:
            renderings.append(whole)
        else:
            renderings += prepare.pieces(whole, max_length)
    return renderings


class LengthGrouped(Sampler[int]):
    """Row numbers with rows of like length side by side, in an order that the seed and the epoch alone decide.

    Transformers' own sampler draws from the global generator, so a resumed run would see its epoch in another order.
    """

    def __init__(self, rows: Rows, batch_size: int, seed: int) -> None:
        self.lengths = rows.lengths
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


class Collator:
    """Rows into one batch for a causal language model's forward."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[Rendering]) -> dict[str, torch.Tensor | bool]:
        longest = max(len(row.ids) for row in rows)
        ids_BT = torch.full((len(rows), longest), self.pad_id, dtype=torch.long)
        real_BT = torch.zeros((len(rows), longest), dtype=torch.long)
        target_BT = torch.zeros((len(rows), longest), dtype=torch.bool)
        for number, row in enumerate(rows):
            ids_BT[number, : len(row.ids)] = torch.tensor(row.ids)
            real_BT[number, : len(row.ids)] = 1
            target_BT[number, : len(row.ids)] = torch.tensor(row.mask)
        target_BT[:, 0] = False  # nothing comes before the first token, so nothing predicts it
        targets_K = ids_BT[target_BT]
        return {
            "input_ids": ids_BT,
            "attention_mask": real_BT,
            "logits_to_keep": target_BT.roll(-1, dims=1),  # the place before each target predicts it
            "labels": targets_K,
            "shift_labels": targets_K,  # says that the targets are already aligned with the kept logits
            "use_cache": False,
        }
