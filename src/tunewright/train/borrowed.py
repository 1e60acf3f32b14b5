"""TRL's trainers, under our rules: nothing is sent anywhere, nothing is written but what we write, and a run that is
ended goes on exactly.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from tunewright.chat import Equipment
from tunewright.errors import RecipeError
from tunewright.run import Run
from tunewright.train.exact import Exact

STATE = "trainer_extra.pt"
"""In a checkpoint: what TRL's trainer keeps from step to step and Transformers' does not write."""
TIMES = ("runtime", "samples_per_second", "steps_per_second", "step_time")
"""Ends of names of numbers that depend on the machine's mood; the log of the same run is the same."""

TOKENS = ("eos_token_id", "bos_token_id", "pad_token_id")


def refuse_new_tokens(run: Run, equipment: Equipment) -> None:
    """TRL computes log-probabilities from the output layer's own weights, which an adapter's rows for new tokens are
    not part of.

    Raises:
        RecipeError: the base lacks a token that an adapter would have to learn.
    """
    if run.method != "full" and equipment.added_tokens:
        raise RecipeError(
            f"train.method: {run.method}: the base has no end-of-sequence token, and an adapter cannot learn one by "
            f"task: {run.recipe().task}; set train.method: full, or train on conversations (task: chat) first"
        )


class Borrowed(Exact):
    """Put before a class of trainer of TRL's."""

    STEPS: tuple[str, ...] = ()
    """Attributes that TRL's trainer carries from one step to the next, to be kept in a checkpoint."""

    def __init__(self, *, model: Any, **options: Any) -> None:
        self.settings = [
            (settings, {name: getattr(settings, name, None) for name in TOKENS})
            for settings in (model.config, model.generation_config)
        ]
        super().__init__(model=model, **options)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Exact`'s, without times, and without means of nothing."""
        for metrics in self._metrics.values():
            for key in [key for key, values in metrics.items() if key.endswith(TIMES) or _is_empty(values)]:
                del metrics[key]
        if "train_runtime" not in logs:  # that line sums a run up, and is not part of the log
            logs = {key: value for key, value in logs.items() if not key.endswith(TIMES)}
        super().log(logs, start_time)

    def _save_rng_state(self, output_dir: str) -> None:
        """With the state of the random numbers, what else the next step depends on."""
        super()._save_rng_state(output_dir)
        state = {name: getattr(self, name) for name in self.STEPS}
        torch.save(state | {"metrics": dict(self._metrics["train"])}, Path(output_dir) / STATE)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        state = torch.load(Path(checkpoint) / STATE, weights_only=True)
        self._metrics["train"].update(state.pop("metrics"))
        for name, value in state.items():
            setattr(self, name, value)

    def _send_telemetry(self) -> None:
        """TRL would tell its makers what is trained on which machine."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """TRL would write a card among the checkpoints; ours is package/card.md."""

    def train(self, *given: Any, **options: Any) -> Any:
        result = super().train(*given, **options)
        self._restore_settings()
        return result

    def _save(self, *given: Any, **options: Any) -> None:
        self._restore_settings()
        super()._save(*given, **options)

    def _restore_settings(self) -> None:
        """TRL and Transformers write the tokenizer's special tokens into the model's settings; they stay the base's."""
        for settings, kept in self.settings:
            for name, value in kept.items():
                setattr(settings, name, value)


def _is_empty(values: list[float]) -> bool:
    return not any(math.isfinite(value) for value in values)
