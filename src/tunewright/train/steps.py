"""One step of training: its rows into bins (`assembling`), the loss on each bin's targets (`losses`), forward and
backward for each; then Transformers' Trainer clips the gradients and steps the optimizer.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from transformers import Trainer

from tunewright import attention, ranks
from tunewright.errors import OUT_OF_MEMORY, StageError
from tunewright.lean import slim
from tunewright.train import losses
from tunewright.train.assembling import Layout, Row, assemble, into_bins
from tunewright.train.frozen import Lower
from tunewright.train.together import gather


class Steps(Trainer):
    """Transformers' Trainer, each of whose batches is all the rows of a step (`assembling.collate`)."""

    def __init__(self, *, layout: Layout, pad_id: int, budget: int, lower: Lower | None = None, **options: Any) -> None:
        """`budget` is how many tokens one forward takes at most; `lower` has what frozen layers make of the rows."""
        self.lower = lower
        self.layout = layout
        self.pad_id = pad_id
        self.budget = budget
        self.at_work: list[Row] = []
        self.counts = True
        self.right = self.said = 0
        super().__init__(**options)
        self._take_noise_over()
        trained = sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)
        weights = sum(weight.numel() for weight in self.model.parameters())
        self.flops_per_token: int = 4 * weights + 2 * trained

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Loss per target of one optimizer step; its gradients are added up.

        `num_items_in_batch` is the number of targets of the step, on all devices: each counts the same, whichever bin
        or device it falls to. Where the memory does not suffice, the bins are made smaller and the step begins again.
        """
        ranks.enter("assembling")
        rows: list[Row] = inputs["rows"]
        random_state, before = _random_state(), (self.right, self.said)
        while True:
            try:
                loss = self._step(model, rows, num_items_in_batch)
                break
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
            self._make_smaller(model, rows)  # here, where the error no longer holds the step's tensors
            _set_random_state(random_state)
            self.right, self.said = before
        return loss

    def _step(self, model: Any, rows: Sequence[Row], num_items_in_batch: Any) -> torch.Tensor:
        """Forward and backward for each bin.

        Where the weights are sharded, all processes run as many as the one with most: else it would wait for layers
        that the others no longer gather. What a process has too few is its shortest row again, which counts nothing.
        """
        lengths = [len(row.ids) for row in rows]
        bins = into_bins(lengths, self.budget, layout=self.layout)
        counted = len(bins) if rows[0].counts else 0
        if self.is_fsdp_enabled:
            shortest = min(range(len(rows)), key=lengths.__getitem__)
            bins += [[shortest]] * (int(max(gather(len(bins)))) - len(bins))
        total = torch.zeros((), device=self.args.device)
        for number, held in enumerate(bins, start=1):
            self.at_work = [rows[place] for place in held]
            batch = assemble(self.at_work, self.layout, self.pad_id)
            self.counts = number <= counted
            # Sharded gradients are added up over the processes for each bin: until then each process has all of them.
            synced = self.is_fsdp_enabled or number == len(bins)
            alone = contextlib.nullcontext() if synced else self.accelerator.no_sync(model)
            below = self.lower.of(self.at_work, self.layout) if self.lower else contextlib.nullcontext()
            with alone, below:
                total += super().training_step(model, batch, num_items_in_batch)
        self.at_work = list(rows)
        return total

    def _take_noise_over(self) -> None:
        """NEFTune (Jain et al., 2023, arXiv:2310.05914): noise on the embeddings, less the longer a row is.

        Transformers' own hook takes the whole forward for one row, so with rows end to end the noise would follow
        `budget`.
        """
        alpha = self.args.neftune_noise_alpha
        self.neftune_noise_alpha: float | None = None  # which Transformers' own hook would look at
        if alpha is None:
            return
        inner = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

        def add_noise(module: Any, _: Any, embedded_BTD: torch.Tensor) -> torch.Tensor:
            if not module.training:
                return embedded_BTD
            lengths = torch.tensor([len(row.ids) for row in self.at_work], device=embedded_BTD.device)
            if self.layout == "flat":
                lengths = lengths.repeat_interleave(lengths)[None]
            largest = alpha / (lengths[..., None] * embedded_BTD.shape[-1]).sqrt().reshape(len(embedded_BTD), -1, 1)
            return embedded_BTD + (2 * torch.rand_like(embedded_BTD) - 1) * largest

        inner.get_input_embeddings().register_forward_hook(add_noise)

    def get_batch_samples(self, *given: Any) -> Any:
        ranks.enter("rows", step=self.state.global_step + 1)
        return super().get_batch_samples(*given)

    def _get_num_items_in_batch(self, *given: Any) -> Any:
        ranks.enter("counting")
        return super()._get_num_items_in_batch(*given)

    def _get_dataloader(self, *given: Any, **options: Any) -> Any:
        """As Trainer's, without Accelerate's sharing out of batches over the processes: `Rows` shares out each step's
        rows, and repeats none in an epoch's last step."""
        loader = super()._get_dataloader(*given, **options)
        if isinstance(shared := getattr(loader, "batch_sampler", None), BatchSamplerShard):
            shared.num_processes, shared.process_index, shared.even_batches = 1, 0, False
        return loader

    def get_total_train_batch_size(self, args: Any) -> int:
        """Rows of a step, of all processes together."""
        return int(self._train_batch_size * args.gradient_accumulation_steps)

    def compute_loss(self, *given: Any, **options: Any) -> Any:
        ranks.enter("forward")
        loss, outputs = super().compute_loss(*given, **options, return_outputs=True)
        ranks.enter("backward")
        if not self.counts:
            return loss * 0.0
        targets = given[1]["labels" if self.layout == "plain" else "targets"]
        right = (outputs.logits.argmax(-1) == targets).sum() if self.layout == "plain" else outputs.right
        self.right += int(right)
        self.said += len(targets)
        return loss

    def take_accuracy(self) -> float:
        """The share of targets since the last time that the model would have said itself, on all devices."""
        right, said = sum(gather(self.right)), sum(gather(self.said))
        self.right = self.said = 0
        return right / said

    def _make_smaller(self, model: Any, rows: Sequence[Row]) -> None:
        """Half the tokens in a forward, so about twice as many forwards for a step: the same sums in other pieces."""
        lengths = [len(row.ids) for row in rows]
        bins = into_bins(lengths, self.budget, layout=self.layout)
        largest = max(self._size([lengths[place] for place in held]) for held in bins)
        step, longest = self.state.global_step + 1, max(lengths)
        if largest <= longest or self.args.world_size > 1:
            what = f"a forward of {largest} tokens" + ("" if self.args.world_size > 1 else ", one row,")
            raise StageError(
                f"training: out of memory at step {step}: {what} does not fit. Set train.gradient_checkpointing: true, "
                "train.method: lora, a smaller train.tokens_per_forward or train.max_length, and run the same command"
            )
        self.budget = max(longest, largest // 2)
        model.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.say_smaller(step, largest)

    def _size(self, lengths: Sequence[int]) -> int:
        """Tokens of a bin, padding included."""
        return sum(lengths) if self.layout == "flat" else max(lengths) * len(lengths)

    def say_smaller(self, step: int, largest: int) -> None:
        """Tell that a forward of `largest` tokens did not fit and `budget` is smaller from now on."""
        print(
            f"out of memory at step {step} with {largest} tokens in a forward; going on with {self.budget} and more "
            "forwards a step: the same sums in other pieces (with dropout, other draws)",
            file=sys.stderr,
        )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of the matrix products: twice the weights a token forward, and four or two times as much backward."""
        return self.flops_per_token * sum(len(row.ids) for row in inputs["rows"])


def settle(model: Any, vocab_size: int, max_length: int) -> Layout:
    """How this model's batches are laid: the leanest way that gives the loss of its own forward, tried on it."""
    slim(model, vocab_size)
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    flat: Layout = "flat" if attention.fits(inner, vocab_size, max_length) else "padded"
    ids = torch.randint(vocab_size, (2, min(12, max_length)), generator=torch.Generator().manual_seed(1)).tolist()
    probe = [Row(number, row, [False] * (len(row) - 2) + [True] * 2) for number, row in enumerate(ids)]
    batch = {
        key: value.to(inner.device) if torch.is_tensor(value) else value
        for key, value in assemble(probe, flat, 0).items()
    }
    for narrow in (True, False):
        detach = losses.attach(inner, narrow=narrow)
        if losses.agrees(inner, batch):
            return flat
        detach()
    return "plain"


def _random_state() -> list[torch.Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def _set_random_state(state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])


def _is_out_of_memory(error: RuntimeError) -> bool:
    """On a GPU torch has an error of its own; on a CPU and on Apple's it is known by its words alone."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(words in said for words in OUT_OF_MEMORY)
