"""Log-probabilities of a label tree's nodes behind prompts, each token computed as seldom as can be.

What all prompts begin with goes through the model once; every batch reads its keys and values. Behind it come the
prompts' own tokens, and behind these the tree's nodes that have children, for nothing else is asked of the model.

- A small tree stands behind each prompt in the same row: one forward pass for a batch of prompts.
- A large tree goes through in pieces, each a row of its own behind the prompt's keys and values, for a row's attention
  costs the square of its length and the nodes of different branches do not see one another.

A four-dimensional attention mask lets each node see the prompt and its own ancestors alone; its position id is the one
that it would have if only its label stood there. What is computed is exact: no node is left out. Whether an
architecture keeps to such a mask, and to keys and values that are handed to it, is for the caller to try.

Shapes: B rows, P tokens of the shared beginning, T tokens of the longest rest of a prompt, I inner nodes in a row, K
tokens that can be seen, N nodes of the tree, V vocabulary, H heads, D numbers per head.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from tunewright.generate import LabelTree

Memory = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of some tokens, B x H x K x D, for each layer of a model."""


@dataclass(frozen=True)
class Beginning:
    """What all prompts begin with, as the model left it."""

    length: int
    memory: Memory


@dataclass(frozen=True)
class Limits:
    """What a forward pass may hold at most."""

    tokens: int
    """Tokens with their padding."""
    rows: int | None
    places: int
    """Places with logits."""


def sight(model: Any) -> float:
    """The longest sequence in which each place attends to all before it under a mask and position ids of ours; 0 where
    an architecture takes no position ids, or measures its window along the sequence."""
    inner = _inner(model)
    config = inner.config.get_text_config()
    takes_places = "position_ids" in inspect.signature(inner.forward).parameters and not getattr(config, "alibi", False)
    if not takes_places or hasattr(config, "window_size"):
        return 0
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((window for window in windows if window), default=math.inf)


def remembers(model: Any) -> bool:
    """Whether what the model keeps of earlier tokens is keys and values and nothing else, in every layer."""
    inner = _inner(model)
    takes_memory = "past_key_values" in inspect.signature(inner.forward).parameters
    layers = DynamicCache(config=inner.config).layers
    return takes_memory and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def begin(model: Any, ids: Sequence[int]) -> Beginning:
    """The keys and values of what all prompts begin with."""
    cache = _Recalled(_num_layers(model), [], keeps=True)
    length = len(ids)
    _logits(
        model,
        torch.tensor([ids], dtype=torch.long),
        torch.arange(length)[None],
        torch.ones(1, length, length, dtype=torch.bool).tril(),
        torch.arange(length)[None] == length - 1,
        cache,
    )
    return Beginning(length, cache.kept())


def shared_beginning(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts have in common at their beginning; one of each is left, to be predicted from."""
    first, last = min(prompts), max(prompts)
    longest = min(map(len, prompts)) - 1
    return next((place for place in range(longest) if first[place] != last[place]), longest)


def score_at_once(
    model: Any, prompts: Sequence[Sequence[int]], tree: LabelTree, beginning: Beginning | None, pad_id: int
) -> torch.Tensor:
    """Log-probability of each tree node given its prompt and ancestors, B x N, in one forward pass."""
    P = beginning.length if beginning else 0
    inner = tree.inner
    place = {-1: 0} | {node: number for number, node in enumerate(inner, start=1)}
    ids_BT, lengths_B = _padded([prompt[P:] for prompt in prompts], pad_id)
    B, T = ids_BT.shape
    I = len(inner)  # noqa: E741
    tokens_I = torch.tensor([tree.tokens[node] for node in inner], dtype=torch.long)
    depths_I = torch.tensor([tree.depths[node] for node in inner], dtype=torch.long)
    real_BT = torch.arange(T) < lengths_B[:, None]
    sees_BTK = torch.zeros((B, T + I, P + T + I), dtype=torch.bool)
    sees_BTK[:, :, :P] = True
    sees_BTK[:, :T, P : P + T] = torch.ones(T, T, dtype=torch.bool).tril()  # padding stands behind and is not seen
    sees_BTK[:, T:, P : P + T] = real_BT[:, None, :]
    sees_BTK[:, T:, P + T :] = _ancestry(tree, inner)
    keep_BT = torch.zeros((B, T + I), dtype=torch.bool)
    keep_BT[torch.arange(B), lengths_B - 1] = True
    keep_BT[:, T:] = True
    logits = _logits(
        model,
        torch.cat([ids_BT, tokens_I.expand(B, I)], dim=1),
        P + torch.cat([torch.arange(T).expand(B, T), lengths_B[:, None] + depths_I], dim=1),
        sees_BTK,
        keep_BT,
        _Recalled(_num_layers(model), [beginning.memory]) if beginning else None,
    )
    rows = torch.tensor([place[parent] for parent in tree.parents])
    return _logprobs(logits.view(B, 1 + I, -1), rows, torch.tensor(tree.tokens))


def score_in_pieces(
    model: Any,
    prompts: Sequence[Sequence[int]],
    tree: LabelTree,
    beginning: Beginning | None,
    pad_id: int,
    limits: Limits,
) -> torch.Tensor:
    """The same for a large tree: the prompts in one forward pass, then the tree's pieces behind each of them."""
    P = beginning.length if beginning else 0
    layers = _num_layers(model)
    shared = [beginning.memory] if beginning else []
    ids_BT, lengths_B = _padded([prompt[P:] for prompt in prompts], pad_id)
    B, T = ids_BT.shape
    keep_BT = torch.zeros((B, T), dtype=torch.bool)
    keep_BT[torch.arange(B), lengths_B - 1] = True
    causal_TK = torch.ones(T, P + T, dtype=torch.bool).tril(P)
    cache = _Recalled(layers, shared, keeps=True)
    logits = _logits(model, ids_BT, P + torch.arange(T).expand(B, T), causal_TK.expand(B, T, P + T), keep_BT, cache)
    own = cache.kept()
    found_BN = torch.zeros((B, len(tree.tokens)), dtype=torch.float64)
    roots = [node for node, parent in enumerate(tree.parents) if parent < 0]
    tokens = torch.tensor([tree.tokens[node] for node in roots])
    found_BN[:, roots] = _logprobs(logits.view(B, 1, -1), torch.zeros_like(tokens), tokens)
    real_BT = torch.arange(T) < lengths_B[:, None]
    for piece in tree.pieces:
        nodes = [*piece.ancestors, *piece.nodes]
        I = len(nodes)  # noqa: E741
        tokens_I = torch.tensor([tree.tokens[node] for node in nodes], dtype=torch.long)
        depths_I = torch.tensor([tree.depths[node] for node in nodes], dtype=torch.long)
        ancestry_II = _ancestry(tree, nodes)
        children = [node for one in piece.nodes for node in tree.children[one]]
        number = {node: place for place, node in enumerate(piece.nodes)}
        parents = torch.tensor([number[tree.parents[node]] for node in children])
        tokens = torch.tensor([tree.tokens[node] for node in children])
        for rows in _few(B, I, len(piece.nodes), limits):
            R = rows.stop - rows.start
            sees_RIK = torch.ones((R, I, P + T + I), dtype=torch.bool)
            sees_RIK[:, :, P : P + T] = real_BT[rows, None, :]
            sees_RIK[:, :, P + T :] = ancestry_II
            keep_RI = torch.zeros((R, I), dtype=torch.bool)
            keep_RI[:, len(piece.ancestors) :] = True
            logits = _logits(
                model,
                tokens_I.expand(R, I),
                P + lengths_B[rows, None] + depths_I,
                sees_RIK,
                keep_RI,
                _Recalled(layers, [*shared, [(keys[rows], values[rows]) for keys, values in own]]),
            )
            found_BN[rows, children] = _logprobs(logits.view(R, len(piece.nodes), -1), parents, tokens)
    return found_BN


class _Recalled(Cache):
    """Keys and values of earlier tokens for every layer, handed out before those of the new ones.

    A shared beginning has one row, whatever the batch; it is repeated for one layer at a time, while that layer runs.

    Args:
        num_layers: Of the model.
        before: Earlier tokens, one part behind the other.
        keeps: Whether the new tokens' keys and values are kept; `kept` gives them.
    """

    def __init__(self, num_layers: int, before: Sequence[Memory], *, keeps: bool = False) -> None:
        super().__init__([_Layer([part[number] for part in before], keeps) for number in range(num_layers)])

    def kept(self) -> Memory:
        return [layer.kept for layer in self.layers]


class _Layer(DynamicLayer):
    def __init__(self, before: list[tuple[torch.Tensor, torch.Tensor]], keeps: bool) -> None:
        super().__init__()
        self.before = before
        self.keeps = keeps
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        new = (key_states, value_states)
        if self.keeps:
            self.kept = new
        if not self.before:
            return new
        rows = key_states.shape[0]
        keys, values = (
            torch.cat([*(part[which].expand(rows, -1, -1, -1) for part in self.before), new[which]], dim=-2)
            for which in (0, 1)
        )
        return keys, values

    def get_seq_length(self) -> int:
        return sum(keys.shape[-2] for keys, _ in self.before)


def _inner(model: Any) -> Any:
    """The model itself, where an adapter is around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _num_layers(model: Any) -> int:
    return len(DynamicCache(config=_inner(model).config).layers)


def _logits(
    model: Any,
    ids_BT: torch.Tensor,
    positions_BT: torch.Tensor,
    sees_BTK: torch.Tensor,
    keep_BT: torch.Tensor,
    cache: Cache | None,
) -> torch.Tensor:
    """Logits of the places that are kept, as the model gives them."""
    device, dtype = model.device, model.dtype
    # Numbers to add, not truth values: an attention without a kernel adds what it is given.
    mask_BTK = torch.zeros(sees_BTK.shape, dtype=dtype).masked_fill_(~sees_BTK, torch.finfo(dtype).min)
    with torch.no_grad():
        logits: torch.Tensor = model(
            input_ids=ids_BT.to(device),
            position_ids=positions_BT.to(device),
            attention_mask=mask_BTK[:, None].to(device),
            logits_to_keep=keep_BT.to(device),
            past_key_values=cache,
            use_cache=cache is not None,
        ).logits
    return logits


def _logprobs(logits_BIV: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probability of some tokens, each at a place, for each row. The logits are used up: a second copy of them
    would be as large as all else."""
    if logits_BIV.dtype in (torch.float16, torch.bfloat16):
        logits_BIV = logits_BIV.float()
    highest_BI1 = logits_BIV.amax(-1, keepdim=True)
    logits_BIV -= highest_BI1
    chosen = logits_BIV[:, places.to(logits_BIV.device), tokens.to(logits_BIV.device)].double()
    total_BI = logits_BIV.exp_().sum(-1).double().log()
    return (chosen - total_BI[:, places.to(total_BI.device)]).cpu()


def _padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in one tensor with padding behind them, and their lengths."""
    ids_BT = torch.full((len(rows), max(map(len, rows))), pad_id, dtype=torch.long)
    for number, row in enumerate(rows):
        ids_BT[number, : len(row)] = torch.tensor(row)
    return ids_BT, torch.tensor([len(row) for row in rows])


def _ancestry(tree: LabelTree, nodes: Sequence[int]) -> torch.Tensor:
    """Which of the nodes each node sees: itself and its ancestors. Each stands behind its parent."""
    place = {node: number for number, node in enumerate(nodes)}
    sees_II = torch.eye(len(nodes), dtype=torch.bool)
    for number, node in enumerate(nodes):
        if tree.parents[node] in place:
            sees_II[number] |= sees_II[place[tree.parents[node]]]
    return sees_II


def _few(count: int, tokens: int, places: int, limits: Limits) -> Iterator[slice]:
    """`count` rows of `tokens` and `places` with logits, so many at a time as the limits allow."""
    size = max(1, min(limits.tokens // tokens, limits.places // places, limits.rows or count))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
