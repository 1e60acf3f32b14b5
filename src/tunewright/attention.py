"""Attention that stays inside each example of a batch laid end to end, without padding and without a mask.

A batch laid end to end is one row of tokens: the examples one behind the other, position ids that begin again at each.
`register` gives Transformers an attention of the name FLAT. Where the model's forward is called with `segments` (the
examples' lengths, in their order), each example's queries meet its own keys alone; where it is not, this is the
ordinary SDPA with the ordinary mask. `fits` proves on the model at hand that the two agree before anything is trained.

On a GPU in half precision the examples go through FlashAttention's varlen kernel, as torch has it; elsewhere each goes
through SDPA by itself, which on a CPU is faster than a block-diagonal mask over the whole row.

Shapes: B rows, H heads, T tokens, D numbers per head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FLAT = "tunewright_flat"
SAME = 1e-4
"""Two logits nearer than this, relative to the largest, are the same but for rounding."""


def register() -> None:
    """Make FLAT known to Transformers; again changes nothing."""
    AttentionInterface.register(FLAT, attend)
    AttentionMaskInterface.register(FLAT, sdpa_mask)


def no_mask(device: Any = None) -> torch.Tensor:
    """What a batch laid end to end gives as its attention mask: a mask of four dimensions is handed on as it is, so
    that none is built. It says nothing; `attend` does not look at it."""
    return torch.zeros(1, 1, 1, 1, device=device)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Sequence[int] | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as Transformers asks for it: queries, keys and values B x H x T x D; gives B x T x H x D.

    Args:
        segments: Lengths of the examples that lie end to end in the only row, T together.
        sliding_window: How many tokens each sees, itself included.
    """
    if segments is None:
        plain: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return plain
    if (
        options.get("softcap") is not None
        or options.get("position_bias") is not None
        or options.get("s_aux") is not None
    ):
        raise ValueError("this attention has no soft cap, no bias and no sinks")
    half = _half(query)
    if half is not None and not dropout:
        query, key, value = (one.to(half) for one in (query, key, value))
        return _varlen(query, key, value, segments, scaling, sliding_window), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    pieces = []
    lengths = list(segments)
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        mask = None
        if sliding_window is not None and q.shape[2] > sliding_window:
            sees = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
            mask = sees.triu(1 - sliding_window)
        with _without_plans(q):
            pieces.append(
                functional.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, is_causal=mask is None
                )
            )
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def fits(model: Any, vocab_size: int, max_length: int) -> bool:
    """Whether this model's attention can be kept inside each example, and then asks it to do so.

    Tried, not looked up: two random examples laid end to end must give the logits that each gives by itself. They are
    longer than a sliding window, where there is one that `max_length` (tokens) reaches.
    """
    config = model.config.get_text_config()
    before = config._attn_implementation
    if before != "sdpa" or set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return False
    register()
    window = getattr(config, "sliding_window", None) or 0
    longer = min(max_length, window + 8 if window else 24)
    generator = torch.Generator().manual_seed(0)
    lengths = [min(12, max_length), longer]
    rows = [torch.randint(vocab_size, (1, length), generator=generator).to(model.device) for length in lengths]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            apart = torch.cat([model(input_ids=row, use_cache=False).logits for row in rows], dim=1)
            model.set_attn_implementation(FLAT)
            batch = lay([row[0].tolist() for row in rows], model.device)
            together = model(**batch, use_cache=False).logits
            if model.device.type == "cuda":  # the kernel of half precision, which the line above does not reach
                with torch.autocast("cuda", torch.get_autocast_dtype("cuda")):
                    model(**batch, use_cache=False)
    except (ValueError, TypeError, RuntimeError, KeyError, IndexError):
        agree = False  # an architecture that takes no such batch
    else:
        agree = bool((apart - together).abs().max() <= SAME * apart.abs().max())
    finally:
        model.train(was_training)
    if not agree:
        model.set_attn_implementation(before)
    return agree


def lay(rows: Sequence[Sequence[int]], device: Any = None) -> dict[str, Any]:
    """Token ids of some examples, laid end to end: what a model's forward takes, 1 x T."""
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row]], device=device),
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None].to(device),
        "attention_mask": no_mask(device),
        "segments": [len(row) for row in rows],
    }


def _half(query: torch.Tensor) -> torch.dtype | None:
    """The half precision that attention over these queries is computed in on a GPU, None where it is none. Under
    autocast the queries themselves may be whole: turning them by their positions makes them so."""
    if not query.is_cuda:
        return None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def _without_plans(query: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """On a GPU, keep cuDNN out of it. A call took about 12 ms on an H100, where nearly every example has a shape of its
    own (measured); that this is cuDNN's planning for each new shape is inferred, and the mend has not run on a GPU."""
    if not query.is_cuda:
        return contextlib.nullcontext()
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    kept: contextlib.AbstractContextManager[Any] = sdpa_kernel(kernels)
    return kept


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Sequence[int],
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """FlashAttention over examples of their own lengths (Dao, 2023, arXiv:2307.08691), by torch's own kernel."""
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    ends = torch.tensor([0, *segments], device=query.device).cumsum(0).to(torch.int32)
    out = varlen_attn(
        *(one[0].transpose(0, 1).contiguous() for one in (query, key, value)),
        ends,
        ends,
        max(segments),
        max(segments),
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
    )
    return out[None]
