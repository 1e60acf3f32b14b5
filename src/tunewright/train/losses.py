"""The loss where there is one, and nothing computed for places that no loss looks at.

`attach` gives a model's forward a second way: called with `kept` (the places whose next token is a target), it runs the
decoder, takes those places alone, and hands them to `head_loss`, which never holds more than a slice of the logits. The
last layer's work for each token is done at those places alone too. `agrees` proves on the model at hand that this loss
is the one of the model's own forward before anything is trained.

Shapes: T tokens of a batch, K of them kept, C of these in a slice, D hidden size, V vocabulary.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutput

from tunewright import models

SLICE = 2**24
"""Numbers in a slice of the logits (64 MB in float32): C x V at most."""
SAME = 1e-4
"""Two losses nearer than this, relative to the larger, are the same but for rounding."""
FEW = 32
"""At most so many places are multiplied with the head's weight in its own type, whatever autocast says."""
NARROW_BELOW = 0.75
"""The last layer is narrowed where fewer than this share of the places are kept; else copying costs what it wins."""


@dataclass
class Learnt(CausalLMOutput):
    """What a forward with `kept` gives."""

    right: Tensor | None = None
    """How many of the targets the model would have said itself."""


def attach(model: Any, *, narrow: bool = True) -> Callable[[], None]:
    """Let a causal language model's forward take `kept` and `targets`, and give their loss. Gives what undoes it.

    Args:
        model: A model whose `get_decoder` and `get_output_embeddings` are what its own forward uses (see `agrees`).
        narrow: Whether the last layer works at the kept places alone.
    """
    own_forward, narrowing = model.forward, Narrowing(model if narrow else None)
    head = model.get_output_embeddings()
    take_off = _put_loss_into(head)

    def forward(
        self: Any, *given: Any, kept: Tensor | None = None, targets: Tensor | None = None, **options: Any
    ) -> Any:
        if kept is None or targets is None:
            narrowing.kept = None
            return own_forward(*given, **options)
        number = options.pop("num_items_in_batch", None)
        # Stays until the next batch: with gradient checkpointing the layer runs again on the way back.
        narrowing.kept = kept if len(kept) < NARROW_BELOW * options["input_ids"].numel() else None
        hidden_TD = self.get_decoder()(*given, **options).last_hidden_state.flatten(0, 1)
        total, right = head(hidden_TD[kept], targets=targets)
        return Learnt(loss=total / (len(targets) if number is None else number), right=right)

    def detach() -> None:
        narrowing.undo()
        take_off()
        del model.forward  # of the instance; its class has the own one

    model.forward = types.MethodType(forward, model)
    return detach


def head_loss(
    hidden_KD: Tensor, head: Any, targets_K: Tensor, own_forward: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood (nats) of the targets, from the hidden states that predict them; and how many of
    the targets are the most probable token at their place.

    Logits exist for a slice of places at a time, and the gradients are computed with them, so that nothing is kept or
    computed again for the way back.
    """
    if type(head).forward is torch.nn.Linear.forward:  # also where sharding made a class of its own of it
        size = max(1, SLICE // head.weight.shape[0])
        both: tuple[Tensor, Tensor] = _HeadLoss.apply(hidden_KD, head.weight, head.bias, targets_K, size)
        return both
    total = hidden_KD.new_zeros((), dtype=torch.float32)
    right = torch.zeros((), dtype=torch.long, device=hidden_KD.device)
    for hidden_CD, targets_C in zip(hidden_KD.split(1024), targets_K.split(1024), strict=True):
        loss, best_C = torch.utils.checkpoint.checkpoint(
            _slice_loss, own_forward or head, hidden_CD, targets_C, use_reentrant=False
        )
        total = total + loss
        right = right + (best_C == targets_C).sum()
    return total, right


def agrees(model: Any, batch: dict[str, Any]) -> bool:
    """Whether the loss of a batch with `kept` and `targets` is that of the model's own logits there.

    Architectures that scale their logits do not agree. Those that cap them are not asked, since small logits, which are
    all that a try may have, are hardly changed by a cap; nor those that add a loss of their own (the routers' of a
    mixture of experts, where the config asks for it).
    """
    config = model.config.get_text_config()
    if getattr(config, "final_logit_softcapping", None) or getattr(config, "output_router_logits", False):
        return False
    was_training = model.training
    model.eval()
    plain = {key: value for key, value in batch.items() if key not in ("kept", "targets")}
    try:
        with torch.no_grad():
            ours = model(**batch).loss
            logits_TV = model(**plain).logits.flatten(0, 1)
            theirs = functional.cross_entropy(logits_TV[batch["kept"]].float(), batch["targets"])
    except (AttributeError, TypeError, ValueError, RuntimeError, KeyError, IndexError):
        return False  # an architecture with other parts
    finally:
        model.train(was_training)
    return bool((ours - theirs).abs() <= SAME * theirs.abs())


def _put_loss_into(head: Any) -> Callable[[], None]:
    """Let the head's forward take `targets`, and give their loss. Where weights are sharded, a module's own are there
    while it is called, and not before."""
    if head is None:
        return lambda: None
    own_forward: Callable[..., Tensor] = head.forward

    def forward(hidden: Tensor, *given: Any, targets: Tensor | None = None, **options: Any) -> Any:
        if targets is None:
            return own_forward(hidden, *given, **options)
        return head_loss(hidden, head, targets, own_forward)

    def take_off() -> None:
        del head.forward  # of the instance

    head.forward = forward
    return take_off


class Narrowing:
    """The last layer's work for each token (queries, output projection, feed-forward) at some places alone.

    What these modules give elsewhere is zeros, which nobody reads: keys and values are computed everywhere, the head
    looks at the kept places alone, and there is no layer above.
    """

    def __init__(self, model: Any | None) -> None:
        self.kept: Tensor | None = None
        self.modules = [] if model is None else _last_layer_modules(model)
        for module in self.modules:
            self._wrap(module)

    def undo(self) -> None:
        for module in self.modules:
            del module.forward

    def _wrap(self, module: Any) -> None:
        own_forward: Callable[[Tensor], Any] = module.forward

        def forward(hidden: Tensor) -> Any:
            if self.kept is None:
                return own_forward(hidden)
            flat = hidden.reshape(-1, hidden.shape[-1])
            few = own_forward(flat[self.kept][None])
            if not torch.is_tensor(few):
                raise TypeError(f"{type(module).__name__} does not give a tensor, so it cannot be narrowed")
            everywhere = few.new_zeros(flat.shape[0], few.shape[-1]).index_copy(0, self.kept, few[0])
            return everywhere.view(*hidden.shape[:-1], -1)

        module.forward = forward


def _last_layer_modules(model: Any) -> list[Any]:
    """Of the last layer, the modules that see each token by itself, but for those that make keys and values."""
    layers = models.layers_of(model)
    if not layers:
        return []
    last = layers[-1]
    found = [getattr(last, name) for name in ("mlp", "feed_forward") if hasattr(last, name)]
    attention = next((getattr(last, name) for name in ("self_attn", "attn") if hasattr(last, name)), None)
    names = (
        ("o_proj", "q_proj") if hasattr(attention, "k_proj") else ("c_proj",) if hasattr(attention, "c_attn") else ()
    )
    return found + [getattr(attention, name) for name in names if hasattr(attention, name)]


class _HeadLoss(torch.autograd.Function):
    """Linear layer and cross-entropy in slices, the gradients made on the way forward.

    Where one slice takes all places, what is kept is the gradient of its logits instead of the weight's, which is then
    made on the way back, in one pass. A few places are multiplied with the weight as it is: a copy of it in the type of
    autocast would cost more than it gives.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_KD: Tensor, weight_VD: Tensor, bias_V: Any, targets_K: Tensor, size: int
    ) -> tuple[Tensor, Tensor]:
        device = hidden_KD.device.type
        few = len(targets_K) <= FEW
        cast = torch.is_autocast_enabled(device) and not few
        dtype = torch.get_autocast_dtype(device) if cast else weight_VD.dtype
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        hidden, weight = hidden_KD.to(dtype), weight_VD.to(dtype)
        later = wants_weight and len(targets_K) <= min(size, hidden.shape[1])
        total = hidden_KD.new_zeros((), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros_like(weight_VD) if wants_weight and not later else None
        d_bias = torch.zeros_like(bias_V) if wants_bias else None
        d_CV = None
        right = torch.zeros((), dtype=torch.long, device=hidden_KD.device)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(targets_K), size):
                part = slice(start, start + size)
                targets_C = targets_K[part]
                logits_CV = hidden[part] @ weight.T
                if bias_V is not None:
                    logits_CV += bias_V.to(dtype)
                logits_CV = logits_CV.to(total.dtype)
                total_C = logits_CV.logsumexp(-1)
                told_C = logits_CV.gather(1, targets_C[:, None])[:, 0]
                total += (total_C - told_C).sum()
                right += (told_C == logits_CV.amax(-1)).sum()
                if not (wants_hidden or wants_weight or wants_bias):
                    continue
                # d loss / d logits: the softmax, less one at the target.
                d_CV = logits_CV.sub_(total_C[:, None]).exp_()
                d_CV.scatter_add_(1, targets_C[:, None], -torch.ones_like(total_C)[:, None])
                if d_bias is not None:
                    d_bias += d_CV.sum(0).to(d_bias.dtype)
                d_CV = d_CV.to(dtype)
                if d_hidden is not None:
                    d_hidden[part] = d_CV @ weight
                if d_weight is not None:
                    if dtype == d_weight.dtype:
                        d_weight.addmm_(d_CV.T, hidden[part])
                    else:
                        d_weight += d_CV.T @ hidden[part]
        kept = (d_hidden, d_weight, d_bias, d_CV if later else None, hidden if later else None)
        ctx.save_for_backward(*kept)
        ctx.dtypes = hidden_KD.dtype, weight_VD.dtype
        ctx.mark_non_differentiable(right)
        return total, right

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        scale = grads[0]
        d_hidden, d_weight, d_bias, d_CV, hidden = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        if d_CV is not None:
            with torch.autocast(d_CV.device.type, enabled=False):
                d_weight = (d_CV.T @ (hidden.to(scale.dtype) * scale).to(hidden.dtype)).to(weight_dtype)
        elif d_weight is not None:
            d_weight.mul_(scale)
        return (
            None if d_hidden is None else d_hidden.to(hidden_dtype) * scale,
            d_weight,
            None if d_bias is None else d_bias.mul_(scale),
            None,
            None,
        )


def _slice_loss(head: Any, hidden_CD: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    logits_CV = head(hidden_CD).float()
    return functional.cross_entropy(logits_CV, targets_C, reduction="sum"), logits_CV.detach().argmax(-1)
