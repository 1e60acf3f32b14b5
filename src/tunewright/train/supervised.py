"""Supervised fine-tuning and continued pretraining: Transformers' Trainer with our batches, checkpoints and log.

One step of training: `assembling.Collator` makes the batch, the model's own forward computes the loss on its targets
(Transformers divides by the number of targets in all accumulated batches), Trainer steps the optimizer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import set_seed

from tunewright import chat, models
from tunewright.data import prepare
from tunewright.errors import DataError
from tunewright.generate import LocalCompleter
from tunewright.models import ModelRef
from tunewright.run import Run
from tunewright.tracking import Tracker
from tunewright.train import exact
from tunewright.train.assembling import Collator, LengthGrouped, Rows
from tunewright.train.exact import Exact
from tunewright.train.weights import trainable


def fit(run: Run, tracker: Tracker) -> None:
    """Train what the recipe asks for, going on from the last whole checkpoint; train/manifest.json is written last.

    Raises:
        DataError: a row has nothing to learn from, or there are too few for one batch.
        RecipeError: `train` asks for something that cannot be done here or with this model.
        StageError: the loss is no longer a number.
        InterruptedError: the process was asked to stop; a checkpoint of the last step was written first.
    """
    recipe = run.recipe()
    resolved = run.resolved()
    ref = ModelRef.from_dict(resolved["model"])
    tokenizer = models.load_tokenizer(ref)
    equipment = chat.equip(tokenizer)
    rows = _rows(run, "train", tokenizer)
    validation = _rows(run, "validation", tokenizer) if recipe.data.validation else None
    if recipe.train.dataloader_drop_last and len(rows) < recipe.train.batch_size:
        raise DataError(
            f"{len(rows)} training rows do not fill one batch of {recipe.train.batch_size}, and "
            "train.dataloader_drop_last leaves out what does not; lower train.batch_size"
        )
    device = resolved["device"]
    arguments = exact.arguments(recipe, run, device)
    set_seed(recipe.train.seed)
    model = trainable(recipe, ref, tokenizer, equipment, device)
    start = exact.begin(run)
    if start:
        arguments.eval_on_start = False  # it was measured when the run did start
    arguments.use_cache = getattr(model.config, "use_cache", True)  # else Trainer writes False into what is saved
    watch = exact.Watch(run)
    trainer = SupervisedTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=validation,
        data_collator=Collator(equipment.pad_id),
        callbacks=[watch],
        run=run,
        tracker=tracker,
        completer=LocalCompleter(model, tokenizer, equipment, batch_rows=recipe.train.per_device_eval_batch_size),
        start=start,
    )
    exact.drive(trainer, watch, tokens=sum(rows.lengths))


class SupervisedTrainer(Exact):
    """Transformers' Trainer with an exact validation loss, and what `Exact` keeps."""

    def __init__(self, *, completer: LocalCompleter, **options: Any) -> None:
        self.completer = completer
        super().__init__(**options)

    def evaluate(self, eval_dataset: Any = None, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss over the validation rows' targets, each target counting the same."""
        rows: Rows = eval_dataset or self.eval_dataset
        self.model.eval()
        results = self.completer.losses(rows.renderings)
        self.model.train()
        loss = sum(total for total, _ in results) / sum(count for _, count in results)
        self.refuse_nan("validation loss", torch.tensor(loss), self.state.global_step)
        metrics = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        together = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGrouped(self.train_dataset, together, seed)


def _rows(run: Run, split: str, tokenizer: Any) -> Rows:
    """The prepared rows; preparation left out, by name, those that there is nothing to learn from."""
    store = prepare.stored(run, split, tokenizer)
    if not store.targets.all():
        raise DataError(f"{run.data_file(split)}: a row has no token to learn from; prepare the data again")
    return Rows(store)
