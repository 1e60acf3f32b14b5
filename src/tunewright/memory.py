"""How much memory training takes, said before it starts, and the choices that depend on it.

The weights, their gradients and the optimizer's state are counted. What the forward keeps for the way back is measured
on the model's own code without its weights (torch's `meta` device), so an architecture's habits are in it. What is not
covered: what other processes hold, and a GPU's fragmentation.

Shapes: T tokens of one forward.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from tunewright import attention, lean, models
from tunewright.models import ModelRef
from tunewright.recipe import Recipe, Train

LIBRARIES = 700_000_000
"""Bytes that torch, Transformers and the rest hold in the process before any weight is loaded."""
HEAD_SLICE = 2**24 * 4 * 2
"""Bytes of the logits that exist at one time, with their gradients."""
TOKENS_PER_FORWARD = {"cpu": 2048, "cuda": 16384, "mps": 4096}
"""Tokens of one forward and backward, where the recipe does not say."""
BF16_PAYS = 1_000_000
"""Weights of a model from which casting costs less than the faster products win."""
SMALL = 150_000_000
"""Weights of a model that trains whole in good time, where an adapter has little to save."""
ROOM = 0.85
"""The share of the free memory that a choice may count on."""


@dataclass(frozen=True)
class Settled:
    """What `auto` came to, each with the reason."""

    method: str
    method_why: str
    bf16: bool
    bf16_why: str
    tokens_per_forward: int
    memory_bytes: int
    """Of the training process at its peak; on a GPU, the GPU's."""
    free_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def settle(recipe: Recipe, ref: ModelRef, device: str, account: dict[str, Any]) -> Settled:
    """The method, precision and batch of a training.

    Args:
        account: What preparation says of the training rows (one split of data/checks.json).
    """
    train = recipe.train
    answer_tokens = round(account["tokens"]["answer"]["mean"] * account["used"])
    free = free_memory(device)
    budget = train.tokens_per_forward or TOKENS_PER_FORWARD[device]
    borrowed = recipe.task in ("preference", "reward")  # TRL's trainers take the whole batch in one forward
    fullest = _fullest(train, account, 2**31 if borrowed else budget)
    bf16, bf16_why = _precision(train, ref, device)
    skeleton = models.skeleton(ref)
    needs = {
        method: estimate(skeleton, train, method, device, fullest, bf16=bf16) for method in ("full", "lora", "qlora")
    }
    method: str = train.method
    why = "as the recipe says"
    if method == "auto":
        method, why = _method(ref, device, needs, free, answer_tokens, adapter_size(skeleton, train))
    return Settled(method, why, bf16, bf16_why, budget, needs[method], free)


def estimate(
    skeleton: Any, train: Train, method: str, device: str, segments: Sequence[int], *, bf16: bool = False
) -> int:
    """Bytes at the peak of training.

    Args:
        skeleton: The model on the `meta` device.
        segments: Lengths of the rows in the fullest forward.
    """
    weights = sum(weight.numel() for weight in skeleton.parameters())
    trained = weights if method == "full" else adapter_size(skeleton, train)
    held = weights * (0.6 if method == "qlora" else 4) + 12 * trained  # gradient, and AdamW's two moments
    if bf16 and method == "lora":
        held -= 2 * weights  # kept in bfloat16
    elif bf16:
        held += 2 * weights  # autocast keeps what it cast until the step is done
    head = HEAD_SLICE
    if method == "full" and (output := skeleton.get_output_embeddings()) is not None:
        head += 4 * output.weight.numel()
    each, square = _kept(skeleton)
    if train.gradient_checkpointing:
        config = skeleton.config.get_text_config()  # one layer at a time, and each layer's input
        layers: int = config.num_hidden_layers
        each, square = each / layers + 4 * config.hidden_size * layers, square / layers
    activations = sum(each * length + square * length**2 for length in segments)
    return int(held + head + activations + (0 if device == "cuda" else LIBRARIES))


def adapter_size(skeleton: Any, train: Train) -> int:
    """Numbers that a LoRA adapter has: rank times (inputs + outputs) of each module that gets one."""
    import torch
    from transformers.pytorch_utils import Conv1D

    named = train.lora.target_modules
    wanted = None if named == "all-linear" else {named} if isinstance(named, str) else set(named)
    output = skeleton.get_output_embeddings()
    total = 0
    for name, module in skeleton.named_modules():
        if not isinstance(module, torch.nn.Linear | Conv1D) or module is output:
            continue
        if wanted is None or name.rpartition(".")[2] in wanted:
            total += train.lora.r * sum(module.weight.shape)
    return total


def free_memory(device: str) -> int:
    """Bytes that a new process could take."""
    if device == "cuda":
        import torch

        free: int = torch.cuda.mem_get_info()[0]
        return free
    available: int = psutil.virtual_memory().available
    return available


def has_bf16(device: str) -> bool:
    """Whether the machine multiplies bfloat16 matrices faster than float32 ones: asked by instruction set, since
    torch computes them on any processor, on most of them slower."""
    import torch

    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device == "cpu":
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
    return False


def _precision(train: Train, ref: ModelRef, device: str) -> tuple[bool, str]:
    if train.bf16 != "auto":
        return bool(train.bf16), "as the recipe says"
    if train.fp16:
        return False, "fp16 is set"
    if not has_bf16(device):
        return False, f"this {device} has no fast bfloat16"
    if ref.parameters < BF16_PAYS:
        return False, f"a model of {ref.parameters:,} weights gains nothing from bfloat16"
    return True, f"this {device} has fast bfloat16; the weights stay in float32"


def _method(
    ref: ModelRef, device: str, needs: dict[str, int], free: int, answer_tokens: int, adapter: int
) -> tuple[str, str]:
    def gigabytes(count: float) -> str:
        return f"{count / 1e9:.1f} GB"

    room = free * ROOM
    if needs["full"] <= room:
        fits = f"all weights fit ({gigabytes(needs['full'])} of {gigabytes(free)} free)"
        if ref.parameters <= SMALL:
            return "full", f"{fits}, and the model is small ({ref.parameters / 1e6:.0f}M weights)"
        if answer_tokens > adapter:
            return (
                "full",
                f"{fits}, and {answer_tokens:,} tokens to learn are more than an adapter's {adapter:,} numbers",
            )
        return "lora", f"{answer_tokens:,} tokens to learn fit into an adapter's {adapter:,} numbers"
    if needs["lora"] <= room or device != "cuda":
        short = f"all weights would need {gigabytes(needs['full'])} of {gigabytes(free)} free"
        return "lora", f"{short}; an adapter needs {gigabytes(needs['lora'])}"
    return "qlora", f"an adapter on whole weights would need {gigabytes(needs['lora'])} of {gigabytes(free)} free"


def _fullest(train: Train, account: dict[str, Any], budget: int) -> list[int]:
    """Lengths of the rows in the fullest forward: the longest, and others that are longer than most."""
    tokens = account["tokens"]["total"]
    rows = min(train.batch_size * train.gradient_accumulation_steps, account["sequences"])
    longest = min(tokens["max"], train.max_length or tokens["max"])
    others = min(round(tokens["p95"]), longest)
    return [longest] + [others] * min(rows - 1, max(0, budget - longest) // max(1, others))


def _kept(skeleton: Any) -> tuple[float, float]:
    """Bytes that the decoder's forward keeps for the way back: so many for each token, and for each pair of tokens of
    one row (where attention has dropout, its probabilities are kept)."""
    one, two = (_kept_by(skeleton, length) for length in (64, 128))
    square = max(0.0, (two - 2 * one) / (128**2 - 2 * 64**2))
    return (one - square * 64**2) / 64, square


def _kept_by(skeleton: Any, length: int) -> int:
    import torch

    attention.register()
    model = copy.deepcopy(skeleton).train()
    lean.fuse_gelu(model)
    storages: dict[int, Any] = {}
    own = {weight.untyped_storage()._cdata for weight in model.parameters()}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage  # held, or its number would be given to another
        return tensor

    flat = attention.lay([[0] * length], "meta")
    padded = {"input_ids": flat["input_ids"]}
    masked = padded | {"attention_mask": flat["attention_mask"]}
    usual = model.config._attn_implementation
    # The first way that the architecture takes: without a mask, which the meta device cannot look into, where it can.
    for way, given in ((attention.FLAT, flat), ("eager", masked), (usual, padded)):
        storages.clear()
        try:
            model.set_attn_implementation(way)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                hidden = model.get_decoder()(**given, use_cache=False).last_hidden_state
        except (ValueError, TypeError, RuntimeError, KeyError, IndexError):
            if given is padded:
                raise
        else:
            break
    del hidden
    return sum(storage.nbytes() for storage in storages.values())
