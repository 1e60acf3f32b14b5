"""The same arithmetic in fewer passes over memory: what costs most on a CPU once the matrix products are fast.

`slim` changes how a model's modules compute, not what: each change is tried on the model at hand, and taken back where
the logits are not the same but for rounding.

Shapes: T tokens, I and O inputs and outputs of a layer, R rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.pytorch_utils import Conv1D

SAME = 1e-4
"""Two logits nearer than this, relative to the largest, are the same but for rounding."""


def slim(model: Any, vocab_size: int) -> list[str]:
    """Take the leaner ways that fit this model; gives their names.

    Args:
        model: In training mode or not; an adapter around it or not.
    """
    kept = []
    ids = torch.randint(vocab_size, (1, 12), generator=torch.Generator().manual_seed(2)).to(model.device)
    was_training = model.training
    model.eval()
    for name, change in (("fused gelu", fuse_gelu), ("lean lora", _lean_lora)):
        with torch.no_grad():
            before = model(input_ids=ids, use_cache=False).logits
            undo = change(model)
            if undo is None:
                continue
            after = model(input_ids=ids, use_cache=False).logits
        if (before - after).abs().max() <= SAME * before.abs().max():
            kept.append(name)
        else:
            undo()
    model.train(was_training)
    return kept


def fuse_gelu(model: Any) -> Callable[[], None] | None:
    """GPT-2's GELU as one kernel: Transformers writes the formula out, which takes eight passes and keeps five of them
    for the way back."""
    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, NewGELUActivation)
    ]
    before = [getattr(parent, name) for parent, name in places]
    for parent, name in places:
        setattr(parent, name, GELUTanh())

    def undo() -> None:
        for (parent, name), own in zip(places, before, strict=True):
            setattr(parent, name, own)

    return undo if places else None


def halve_frozen(model: Any) -> None:
    """Keep the weights that are only multiplied with, and not trained, in bfloat16.

    Under autocast each forward would make the very same copies of them again. The embeddings and the output layer,
    which may share their weights, stay as they are.
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    spared = {id(weight) for end in ends if end is not None for weight in end.parameters()}
    for module in model.modules():
        if not isinstance(module, torch.nn.Linear | Conv1D) or module.weight.requires_grad:
            continue
        for weight in module.parameters(recurse=False):
            if id(weight) not in spared:
                weight.data = weight.data.to(torch.bfloat16)


def _lean_lora(model: Any) -> Callable[[], None] | None:
    """PEFT's LoRA layers without a cast of their input to the adapter's type, and with the scale on T x R numbers
    instead of T x O (Hu et al., 2021, arXiv:2106.09685: h = W x + s B A x)."""
    if not hasattr(model, "peft_config"):
        return None
    from peft.tuners.lora.layer import Linear

    changed = [module for module in model.modules() if type(module) is Linear and _is_plain(module)]
    for module in changed:
        module.forward = _lean_forward(module, module.forward)

    def undo() -> None:
        for module in changed:
            del module.forward  # of the instance; its class has the own one

    return undo if changed else None


def _is_plain(module: Any) -> bool:
    """One adapter, without dropout, bias or a variant of LoRA."""
    return (
        module.active_adapters == ["default"]
        and isinstance(module.lora_dropout["default"], torch.nn.Identity)
        and not getattr(module, "lora_variant", None)
        and module.lora_B["default"].bias is None
    )


def _lean_forward(module: Any, own_forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    down, up, scale = module.lora_A["default"], module.lora_B["default"], module.scaling["default"]

    def forward(hidden: Tensor, *given: Any, **options: Any) -> Tensor:
        if given or options or module.disable_adapters or module.merged:
            return own_forward(hidden, *given, **options)
        base = module.base_layer(hidden)
        low_TR = down(hidden) * scale
        size = base.shape[-1]
        return torch.addmm(base.reshape(-1, size), low_TR.reshape(-1, low_TR.shape[-1]), up.weight.T).view(base.shape)

    return forward
