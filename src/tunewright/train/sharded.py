"""Training whose weights, gradients and optimizer state are sharded over the processes: PyTorch's FSDP2, by Accelerate.

Each layer is gathered before its forward and its backward and let go of after them, so all processes have to run the
same forwards in the same order. What is written to disk is whole: a checkpoint has the files of one from a single
process, and the first process writes them.

What is not covered: FSDP1, weights of 4 bits, weights kept on the CPU for a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from tunewright.train.together import is_first
from tunewright.train.weights import write_weights


class Sharded(Trainer):
    """Put before a class of Trainer: whole checkpoints of sharded weights. Without `fsdp` it changes nothing."""

    is_fsdp_enabled: bool

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if not self.args.fsdp:
            return
        state = self.accelerator.state
        if not self.is_fsdp_enabled:
            _let_accelerate_shard_on_a_cpu(state, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True
        # Accelerate's own policy adds gradients up in bfloat16 too, and rounds the loss to it.
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        state.fsdp_plugin.mixed_precision_policy = half if self.args.bf16 else None

    def _prepare_for_training(self, *given: Any, **options: Any) -> Any:
        with _ends_together(self.model) if self.is_fsdp_enabled else contextlib.nullcontext():
            model, loader = super()._prepare_for_training(*given, **options)
        if self.is_fsdp_enabled and self.args.device.type == "cpu":
            for module in _units(model):
                module.set_force_sum_reduction_for_comms(True)  # gloo adds up, and cannot average
        return model, loader

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        state_dict = whole(self.model)
        if is_first():
            write_weights(self.model, Path(output_dir or self.args.output_dir), state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As Trainer's, which would write the weights a second time."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from accelerate.utils import save_fsdp_optimizer

        save_fsdp_optimizer(
            self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
        )
        if is_first():
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            load(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            load(self.model, Path(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()


def is_sharded(model: Any) -> bool:
    return isinstance(model, FSDPModule)


def whole(model: Any) -> dict[str, torch.Tensor]:
    """The weights that are trained (of a whole model: all of them) and the buffers that are saved with them, each under
    its first name, gathered in the first process; nothing in the others, which all have to come here.
    """
    _let_go(model)
    adapter = hasattr(model, "peft_config")
    first_names = {name for name, weight in model.named_parameters() if weight.requires_grad or not adapter}
    buffers = set() if adapter else {name for name, _ in model.named_buffers()}
    gathered = {}
    for name, tensor in model.state_dict().items():
        if name not in first_names | buffers:
            continue
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if is_first():
            gathered[name] = full.cpu()
    return gathered


def load(model: Any, folder: Path) -> None:
    """The weights that `whole` gave and `write_weights` wrote. Each process reads one after another, and keeps its
    part."""
    _let_go(model)
    adapter = hasattr(model, "peft_config")
    file_name = "adapter_model.safetensors" if adapter else "model.safetensors"
    with safe_open(str(folder / file_name), "pt") as file, torch.no_grad():
        for name, weight in model.named_parameters():
            if adapter and not weight.requires_grad:
                continue
            stored = file.get_tensor(name.replace(".default", "") if adapter else name)
            stored = stored.to(weight.device, weight.dtype)
            own = distribute_tensor(stored, weight.device_mesh, weight.placements, src_data_rank=None)
            weight.copy_(own)


def here(weight: torch.Tensor) -> torch.Tensor:
    """What this process holds of a weight."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _let_go(model: Any) -> None:
    """Of the layers that a forward without a backward (an evaluation) left gathered."""
    for module in _units(model):
        module.reshard()


def _units(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def _ends_together(model: Any) -> Iterator[None]:
    """Keep Accelerate from sharding the embeddings and the output layer apart where an adapter trains rows of them:
    PEFT makes their weights up when asked, so that they do not look shared where they are. They stay with the model's
    outermost weights, which are gathered for the whole of a forward and backward."""
    if not any("trainable_tokens" in name for name, _ in model.named_parameters()):
        yield
        return
    model.get_input_embeddings = model.get_output_embeddings = lambda: None
    try:
        yield
    finally:
        del model.get_input_embeddings, model.get_output_embeddings


def _let_accelerate_shard_on_a_cpu(state: Any, options: dict[str, Any]) -> None:
    """Accelerate takes its way through FSDP for accelerators only, and on CPUs would copy the whole model to each
    process without a word (accelerate 1.15, AcceleratorState)."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**options)
