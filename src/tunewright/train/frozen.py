"""Lower layers that stay as they are: what they make of each row is computed once and used again in every epoch.

The layers below are skipped in training; the first one above is given the kept numbers. They are computed without
dropout, before the first step and in an order that nothing but the rows decides, so a resumed run has the same ones.

Shapes: T tokens of a row, D hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunewright import models
from tunewright.errors import RecipeError
from tunewright.train.assembling import Layout, Row, Rows, assemble, into_bins
from tunewright.train.together import is_first, meet

TOGETHER = 512
"""Rows that are put into bins at once."""


def freeze(model: Any, layers: int) -> None:
    """Let the embeddings and the lowest layers stay as they are.

    Raises:
        RecipeError: the model has no more layers than these, or none that are known.
    """
    stack = _stack(model)
    if layers >= len(stack):
        raise RecipeError(f"train.frozen_layers is {layers} of the model's {len(stack)} layers; leave some to train")
    for module in (model.get_input_embeddings(), *stack[:layers]):
        module.requires_grad_(False)
    for name, weight in model.get_decoder().named_parameters():
        if "embed" in name or name.startswith(("wpe", "wte")):  # of positions, where there are such
            weight.requires_grad_(False)


class Lower:
    """What the layers below make of every row, in a file that is mapped into memory: T x D numbers for each row."""

    def __init__(self, model: Any, layers: int, path: Path) -> None:
        """`model` is the one whose layers run: the base of an adapter, not the adapter around it."""
        self.model = model
        self.path = path
        self.hidden: torch.Tensor | None = None
        self.stack = _stack(model)
        self.first = self.stack[layers]
        for layer in self.stack[:layers]:
            self._skip(layer)
        self.first.register_forward_pre_hook(self._give, with_kwargs=True)

    def fill(self, rows: Rows, layout: Layout, pad_id: int, budget: int, *, bf16: bool) -> None:
        """Compute and keep what the layers below make of each row. Done by one process where several train together."""
        self.starts = np.concatenate([[0], np.cumsum(rows.store.lengths)])
        size = self.model.config.get_text_config().hidden_size
        shape = (int(self.starts[-1]), size)
        if is_first():
            kept = np.lib.format.open_memmap(self.path, mode="w+", dtype=np.float32, shape=shape)
            device = self.model.device
            self.model.eval()
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                for some in self._bins(rows, layout, budget):
                    for row, hidden_TD in zip(some, self._below(some, layout, pad_id), strict=True):
                        kept[self.starts[row.number] : self.starts[row.number + 1]] = hidden_TD.float().cpu().numpy()
            self.model.train()
            kept.flush()
        meet()
        self.kept = np.load(self.path, mmap_mode="r")

    def _bins(self, rows: Rows, layout: Layout, budget: int) -> Iterator[list[Row]]:
        """All rows in bins, some rows at a time: best fit looks at every bin for every row."""
        for start in range(0, len(rows), TOGETHER):
            some = [rows[number] for number in range(start, min(start + TOGETHER, len(rows)))]
            for held in into_bins([len(row.ids) for row in some], budget, layout=layout):
                yield [some[place] for place in held]

    @contextlib.contextmanager
    def of(self, rows: Sequence[Row], layout: Layout) -> Iterator[None]:
        """Within it, the model's forward goes on from what is kept of these rows, in a batch of this layout."""
        parts = [torch.from_numpy(np.array(self.kept[self.starts[r.number] : self.starts[r.number + 1]])) for r in rows]
        if layout == "flat":
            hidden = torch.cat(parts)[None]
        else:
            hidden = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        self.hidden = hidden.to(self.model.device)
        try:
            yield
        finally:
            self.hidden = None

    def _below(self, rows: Sequence[Row], layout: Layout, pad_id: int) -> list[torch.Tensor]:
        """For each row, the hidden states that the first layer above is given."""
        batch = assemble(rows, layout, pad_id)
        given = {
            key: value.to(self.model.device) if torch.is_tensor(value) else value
            for key, value in batch.items()
            if key not in ("kept", "targets", "labels", "shift_labels", "logits_to_keep")
        }
        seen: list[torch.Tensor] = []

        def stop(_: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen.append(positional[0] if positional else named["hidden_states"])
            raise _EnoughError

        hook = self.first.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.model.get_decoder()(**given)
        except _EnoughError:
            pass  # the layers above are not needed for this
        finally:
            hook.remove()
        if layout == "flat":
            return list(seen[0][0].split([len(row.ids) for row in rows]))
        return [hidden_TD[: len(row.ids)] for hidden_TD, row in zip(seen[0], rows, strict=True)]

    def _skip(self, layer: Any) -> None:
        own_forward = layer.forward

        def forward(hidden_states: torch.Tensor, *given: Any, **options: Any) -> Any:
            if self.hidden is None:
                return own_forward(hidden_states, *given, **options)
            return hidden_states

        layer.forward = forward

    def _give(self, _: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if self.hidden is None:
            return None
        if positional:
            return (self.hidden, *positional[1:]), named
        return positional, {**named, "hidden_states": self.hidden}


def _stack(model: Any) -> Any:
    if not (found := models.layers_of(model)):
        raise RecipeError(f"train.frozen_layers: {type(model).__name__} has no known list of layers; leave it out")
    return found


class _EnoughError(Exception):
    """Ends a forward once what was wanted of it is there."""
