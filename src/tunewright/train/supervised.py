"""Supervised fine-tuning and continued pretraining: Transformers' Trainer with our batches, checkpoints and log.

One step of training is `steps.Steps.training_step`; read on from there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import set_seed

from tunewright.chat import Rendering
from tunewright.data import prepare
from tunewright.errors import DataError
from tunewright.generate import LocalCompleter
from tunewright.lean import halve_frozen
from tunewright.run import Run
from tunewright.tracking import Tracker
from tunewright.train import checkpoints, exact
from tunewright.train.assembling import LengthGrouped, Rows, collate
from tunewright.train.exact import Exact
from tunewright.train.frozen import Lower
from tunewright.train.sharded import Sharded
from tunewright.train.steps import Steps, settle
from tunewright.train.together import gather, is_first, place
from tunewright.train.weights import Base, trainable


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
    base = Base.of(run)
    tokenizer, equipment = base.tokenizer, base.equipment
    rows = _rows(run, "train", tokenizer)
    validation = _rows(run, "validation", tokenizer) if recipe.data.validation else None
    together = recipe.train.batch_size * recipe.train.gradient_accumulation_steps
    if recipe.train.dataloader_drop_last and len(rows) < together:
        raise DataError(
            f"{len(rows)} training rows do not fill one step of {together}, and train.dataloader_drop_last leaves out "
            "what does not; lower train.batch_size or train.gradient_accumulation_steps"
        )
    arguments = exact.arguments(
        recipe, run, base.device, per_device_train_batch_size=together, gradient_accumulation_steps=1
    )
    set_seed(recipe.train.seed)
    model = trainable(run, base)
    layout = settle(model, len(tokenizer), resolved["max_length"])
    if resolved["train"]["bf16"] and hasattr(model, "peft_config"):
        halve_frozen(model)
    budget = resolved["train"]["tokens_per_forward"]
    start = exact.begin(run)
    lower = None
    if recipe.train.frozen_layers:
        inner = model.get_base_model() if hasattr(model, "peft_config") else model
        lower = Lower(inner, recipe.train.frozen_layers, run.lower_file)
        lower.fill(rows, layout, equipment.pad_id, budget, bf16=resolved["train"]["bf16"])
    if start:
        arguments.eval_on_start = False  # it was measured when the run did start
    arguments.use_cache = getattr(model.config, "use_cache", True)  # else Trainer writes False into what is saved
    watch = exact.Watch(run)
    trainer = SupervisedTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=validation,
        data_collator=collate,
        callbacks=[watch],
        run=run,
        tracker=tracker,
        layout=layout,
        pad_id=equipment.pad_id,
        budget=budget,
        lower=lower,
        completer=LocalCompleter(model, tokenizer, equipment, batch_rows=recipe.train.per_device_eval_batch_size),
        labels=run.manifest("prepare")["labels"],
        start=start,
    )
    exact.drive(trainer, watch, tokens=int(rows.store.lengths.sum()), layout=layout)
    run.lower_file.unlink(missing_ok=True)


class SupervisedTrainer(Steps, Sharded, Exact):
    """Steps of bins, weights that may be sharded, an exact validation loss, and what `Exact` keeps."""

    def __init__(
        self,
        *,
        completer: LocalCompleter,
        labels: Sequence[str] | None,
        **options: Any,
    ) -> None:
        self.completer = completer
        self.labels = labels
        self.smooth_loss: float | None = None
        self.highest_loss = math.inf
        super().__init__(**options)
        if self.start is not None:
            sealed = checkpoints.facts(self.start)
            self.budget = sealed["tokens_per_forward"]
            if is_first():
                self.right, self.said = sealed["right_since_log"], sealed["said_since_log"]
            self.smooth_loss, self.highest_loss = sealed["smooth_loss"], sealed["highest_loss"]

    def training_step(self, *given: Any, **options: Any) -> torch.Tensor:
        loss = super().training_step(*given, **options)
        self._refuse_explosion(float(loss))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {"loss": logs["loss"], "mean_token_accuracy": self.take_accuracy(), **logs}
        super().log(logs, start_time)

    def say_smaller(self, step: int, largest: int) -> None:
        self.run.event("train", "out of memory", step=step, tokens=largest, tokens_per_forward=self.budget)
        super().say_smaller(step, largest)

    def _refuse_explosion(self, loss: float) -> None:
        """Stop where the loss, smoothed over about ten steps, is twice that of guessing or of the first step."""
        if self.smooth_loss is None:
            guessing = math.log(self.model.config.get_text_config().vocab_size)
            self.smooth_loss, self.highest_loss = loss, 2 * max(guessing, loss)
        self.smooth_loss += 0.1 * (loss - self.smooth_loss)
        if self.smooth_loss > self.highest_loss:
            self.stop("loss", f"has risen to {loss:.2f}", self.state.global_step + 1)

    def evaluate(self, eval_dataset: Any = None, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss and accuracy over the validation rows' targets, each target counting the same; for classes, also
        the accuracy by label scores, as the evaluation after training has it."""
        rows: Rows = eval_dataset or self.eval_dataset
        renderings = [rows.store[row] for row in range(len(rows))]
        self.model.eval()
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16):
            told = self.completer.tell(renderings)
            accuracy = {} if self.labels is None else {"eval_accuracy": self._accuracy(renderings, self.labels)}
        self.model.train()
        targets = sum(len(one.logprobs) for one in told)
        loss = sum(one.loss for one in told) / targets
        self.refuse_nan("validation loss", torch.tensor(loss), self.state.global_step)
        metrics = {
            "eval_loss": loss,
            "eval_perplexity": math.exp(min(loss, 700.0)),
            "eval_mean_token_accuracy": sum(one.right for one in told) / targets,
            **accuracy,
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _accuracy(self, renderings: Sequence[Rendering], labels: Sequence[str]) -> float:
        """Share of the rows whose own label has the highest score."""
        tree = self.completer.tree(labels)
        prompts = [one.ids[: one.mask.index(True)] for one in renderings]
        scores = self.completer.score(prompts, tree)
        right = 0
        for one, row in zip(renderings, scores, strict=True):
            best = max(range(len(labels)), key=row.__getitem__)
            right += [tree.tokens[node] for node in tree.paths[best]] == one.ids[one.mask.index(True) :]
        return right / len(renderings)

    def sealed_facts(self) -> dict[str, Any]:
        return super().sealed_facts() | {
            "tokens_per_forward": self.budget,
            "right_since_log": sum(gather(self.right)),
            "said_since_log": sum(gather(self.said)),
            "smooth_loss": self.smooth_loss,
            "highest_loss": self.highest_loss,
        }

    def rows_at_work(self) -> list[str]:
        return [self.train_dataset.store.source(row.number) for row in self.at_work]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGrouped(self.train_dataset, self.args.train_batch_size, seed)


def _rows(run: Run, split: str, tokenizer: Any) -> Rows:
    """The prepared rows; preparation left out, by name, those that there is nothing to learn from."""
    store = prepare.stored(run, split, tokenizer)
    if not store.targets.all():
        raise DataError(f"{run.data_file(split)}: a row has no token to learn from; prepare the data again")
    return Rows(store, *place())
