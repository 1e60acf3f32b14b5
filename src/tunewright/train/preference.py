"""Learning from pairs: direct preference optimization (Rafailov et al., 2023) by TRL's DPOTrainer.

TRL computes the loss. What it is given are ids that `chat.py` rendered (it tokenises and truncates nothing), and the
log-probability of every answer under the model that training begins with (the base, or the base with the adapter that
`train.adapter` names), computed once before training, so that no second model stays in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

from tunewright import chat
from tunewright.chat import Pair
from tunewright.data import prepare
from tunewright.errors import DataError, RecipeError
from tunewright.generate import LocalCompleter
from tunewright.run import Run
from tunewright.tracking import Tracker
from tunewright.train import exact
from tunewright.train.borrowed import Borrowed, refuse_new_tokens
from tunewright.train.weights import Base, trainable


def fit(run: Run, tracker: Tracker) -> None:
    """Train on pairs, going on from the last whole checkpoint; train/manifest.json is written last.

    Raises:
        DataError: there are too few pairs for one batch.
        RecipeError: `train` asks for something that cannot be done here or with this model.
        StageError: the loss is no longer a number.
        InterruptedError: the process was asked to stop; a checkpoint of the last step was written first.
    """
    recipe = run.recipe()
    base = Base.of(run)
    tokenizer, equipment = base.tokenizer, base.equipment
    refuse_new_tokens(run, equipment)
    splits = ["train", *(["validation"] if recipe.data.validation else [])]
    pairs = {
        split: [chat.render_pair(tokenizer, example) for example in prepare.examples(run, split)] for split in splits
    }
    if recipe.train.dataloader_drop_last and len(pairs["train"]) < recipe.train.batch_size:
        raise DataError(
            f"{len(pairs['train'])} pairs do not fill one batch of {recipe.train.batch_size}, and "
            "train.dataloader_drop_last leaves out what does not; lower train.batch_size"
        )
    dpo = recipe.train.dpo
    arguments = exact.arguments(
        recipe,
        run,
        base.device,
        DPOConfig,
        **dpo.model_dump(exclude={"loss_type", "loss_weights"}),
        loss_type=list(dpo.loss_type),
        loss_weights=None if dpo.loss_weights is None else list(dpo.loss_weights),
        gradient_checkpointing=None,  # TRL's own default is True; `activation_checkpointing` says it, where it is asked
        max_length=None,  # preparation cut what is too long, and said so
        precompute_ref_log_probs=True,
    )
    set_seed(recipe.train.seed)
    model = trainable(run, base)
    start = exact.begin(run)
    if start:
        arguments.eval_on_start = False  # it was measured when the run did start
    arguments.use_cache = getattr(model.config, "use_cache", True)  # else Trainer writes False into what is saved
    completer = LocalCompleter(
        model.eval(), tokenizer, equipment, batch_rows=2 * recipe.train.per_device_eval_batch_size
    )
    datasets = {}
    for split, rows in pairs.items():

        def progress(done: int, total: int, split: str = split) -> None:
            run.set_progress("train", done, total, f"log-probabilities before training ({split})")

        # As the policy's will be computed: else one that has learnt nothing yet would differ from its reference.
        with torch.autocast(torch.device(base.device).type, torch.bfloat16, enabled=arguments.bf16):
            reference_logps = log_probabilities(completer, rows, progress=progress)
        datasets[split] = _dataset(rows, reference_logps)
    watch = exact.Watch(run)
    try:
        trainer = PreferenceTrainer(
            model=model.train(),
            args=arguments,
            train_dataset=datasets["train"],
            eval_dataset=datasets.get("validation"),
            processing_class=tokenizer,
            callbacks=[watch],
            run=run,
            tracker=tracker,
            start=start,
        )
    except (ValueError, NotImplementedError) as error:
        raise RecipeError(f"train: {error}") from error
    tokens = sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs["train"])
    begun = "the base" if recipe.train.adapter is None else "the base with the adapter that training goes on from"
    reference = f"log-probabilities of {begun}, computed before training"
    exact.drive(trainer, watch, tokens=tokens, algorithm="DPO", beta=dpo.beta, reference=reference)


class PreferenceTrainer(Borrowed, DPOTrainer):
    """TRL's DPOTrainer on rows that are tokenised and have the base's log-probabilities."""

    STEPS = ("_total_train_tokens",)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if "ref" in getattr(self.model, "peft_config", {}):
            self.model.delete_adapter("ref")  # TRL's copy of the fresh adapter; the base's numbers are in the rows

    def evaluate(self, *given: Any, **options: Any) -> dict[str, float]:
        metrics: dict[str, float] = super().evaluate(*given, **options)
        self.refuse_nan("validation loss", torch.tensor(metrics["eval_loss"]), self.state.global_step)
        return metrics

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        """The rows are ids already; TRL would apply the template its own way, and leave out rows without a word."""
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any) -> Dataset:
        """They are in the rows already."""
        return dataset


def log_probabilities(
    completer: LocalCompleter, pairs: Sequence[Pair], *, progress: Any = None
) -> list[tuple[float, float]]:
    """For each pair, the log-probability (nats) of the better answer and of the worse one, with their ends of turn."""
    losses = completer.losses([both for pair in pairs for both in pair.renderings()], progress=progress)
    sums = [-loss for loss, _ in losses]
    return list(zip(sums[::2], sums[1::2], strict=True))


def _dataset(pairs: Sequence[Pair], reference: Sequence[tuple[float, float]]) -> Dataset:
    """What TRL's own preparation would have made."""
    rows = [dataclasses.asdict(pair) for pair in pairs]
    return Dataset.from_dict(
        {f"{part}_ids": [row[part] for row in rows] for part in ("prompt", "chosen", "rejected")}
        | {
            "ref_chosen_logps": [chosen for chosen, _ in reference],
            "ref_rejected_logps": [rejected for _, rejected in reference],
        }
    )
