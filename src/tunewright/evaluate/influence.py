"""Which training rows made the model say what it says: the gradients of its last layer, row against row.

A step of training on one row moves the loss of another by the product of their gradients (Pruthi et al., Estimating
training data influence by tracing gradient descent, 2020, arXiv:2002.08484). For the last layer a row's gradient is a
sum over its answer's tokens of the outer product of (what the model expected less what stood there) and the hidden
state that it said so from. Both are put through fixed random projections, which keep products to within noise (Choe et
al., 2024, arXiv:2405.13954), and the whole is scaled to length one, so that long rows and badly learnt ones do not
drown the others.

Shapes: N rows, B rows of a batch, K answer tokens in it, V vocabulary, H hidden size, P numbers of a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tunewright.chat import Rendering

PROJECTED = 32
"""Numbers that the expectations and the hidden states are each projected to: a sketch has their product."""
BATCH_TOKENS = 4096
MOST_TOKENS = 64
"""Of a longer answer the first tokens count."""

Progress = Callable[[int, int], None]
Array = np.ndarray[Any, Any]


def sketches(
    model: Any, renderings: Sequence[Rendering], pad_id: int, *, seed: int = 0, progress: Progress | None = None
) -> Array:
    """A row of P x P numbers, of length one, for each rendering: the direction that a step on it moves the last layer.

    A rendering without an answer, or one that is predicted perfectly, has zeros.
    """
    import torch

    head = model.get_output_embeddings()
    vocabulary, hidden = head.weight.shape
    generator = torch.Generator().manual_seed(seed)
    from_V = torch.randn(vocabulary, PROJECTED, generator=generator).to(model.device) / PROJECTED**0.5
    from_H = torch.randn(hidden, PROJECTED, generator=generator).to(model.device) / PROJECTED**0.5
    held: list[Any] = []
    hook = head.register_forward_pre_hook(lambda _, given: held.append(given[0].detach()))
    found_NPP = np.zeros((len(renderings), PROJECTED * PROJECTED), dtype=np.float32)
    done = 0
    try:
        for rows in _batches([len(one.ids) for one in renderings]):
            ids_BT, real_BT, before_BT = _padded([renderings[row] for row in rows], pad_id)
            owners_K, places_K = before_BT.nonzero(as_tuple=True)
            if len(owners_K):
                held.clear()
                with torch.no_grad():
                    logits = model(
                        input_ids=ids_BT.to(model.device),
                        attention_mask=real_BT.to(model.device),
                        logits_to_keep=before_BT.to(model.device),  # a long row's whole logits may not fit
                        use_cache=False,
                    ).logits
                owners = owners_K.to(model.device)
                wrong_KV = logits.float().softmax(-1)
                wrong_KV[torch.arange(len(owners)), ids_BT[owners_K, places_K + 1].to(model.device)] -= 1
                states_KH = held[0].reshape(-1, hidden).float()
                outer_KPP = torch.einsum("kp,kq->kpq", wrong_KV @ from_V, states_KH @ from_H).flatten(1)
                summed_BPP = torch.zeros(len(rows), PROJECTED * PROJECTED, device=model.device)
                summed_BPP.index_add_(0, owners, outer_KPP)
                found_NPP[rows] = torch.nn.functional.normalize(summed_BPP, dim=1).cpu().numpy()
            done += len(rows)
            if progress:
                progress(done, len(renderings))
    finally:
        hook.remove()
    return found_NPP


def nearest(asked: Array, among: Array, count: int) -> list[list[tuple[int, float]]]:
    """For each of the asked rows the `count` greatest products with the others: their numbers, and the products."""
    found = []
    for one in asked:
        products = among @ one
        best = np.argsort(-products, kind="stable")[:count]
        found.append([(int(row), float(products[row])) for row in best])
    return found


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Row numbers, rows of like length together, as many as fit into `BATCH_TOKENS` with their padding."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches and lengths[row] * (len(batches[-1]) + 1) <= BATCH_TOKENS:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _padded(renderings: Sequence[Rendering], pad_id: int) -> tuple[Any, Any, Any]:
    """Ids, which places are real, and which places' next tokens are answer."""
    import torch

    longest = max(len(one.ids) for one in renderings)
    ids_BT = torch.full((len(renderings), longest), pad_id, dtype=torch.long)
    real_BT = torch.zeros((len(renderings), longest), dtype=torch.long)
    before_BT = torch.zeros((len(renderings), longest), dtype=torch.bool)
    for row, one in enumerate(renderings):
        ids_BT[row, : len(one.ids)] = torch.tensor(one.ids)
        real_BT[row, : len(one.ids)] = 1
        answer = [place - 1 for place, flag in enumerate(one.mask) if flag and place > 0][:MOST_TOKENS]
        before_BT[row, answer] = True
    return ids_BT, real_BT, before_BT
