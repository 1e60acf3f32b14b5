"""Supervised fine-tuning and continued pretraining: Transformers' Trainer with our batches, checkpoints and log.

One step of training: `assembling.Collator` makes the batch, the model's own forward computes the loss on its targets
(Transformers divides by the number of targets in all accumulated batches), Trainer steps the optimizer.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from tunewright import chat, models
from tunewright.chat import Equipment
from tunewright.data import prepare
from tunewright.errors import DataError, StageError
from tunewright.generate import LocalCompleter
from tunewright.models import ModelRef
from tunewright.recipe import Recipe
from tunewright.run import Run, append_json, write_json, write_text
from tunewright.tracking import Tracker
from tunewright.train import checkpoints
from tunewright.train.assembling import Collator, Rows, render_all

OURS = {"method", "epochs", "learning_rate", "batch_size", "max_length", "lora", "warmup_ratio", "save_total_limit"}
"""Keys of the recipe's `train` that are not handed to TrainingArguments under their own name."""


def fit(run: Run, tracker: Tracker) -> None:
    """Train what the recipe asks for, going on from the last whole checkpoint; train/manifest.json is written last.

    Raises:
        DataError: no row has anything to learn from.
        StageError: the loss is no longer a number.
        InterruptedError: the process was asked to stop; a checkpoint of the last step was written first.
    """
    recipe = run.recipe()
    resolved = run.resolved()
    ref = ModelRef.from_dict(resolved["model"])
    tokenizer = models.load_tokenizer(ref)
    equipment = chat.equip(tokenizer)
    rows = _rows(run, "train", tokenizer, resolved["max_length"])
    validation = _rows(run, "validation", tokenizer, resolved["max_length"]) if recipe.data.validation else None
    device = resolved["device"]
    set_seed(recipe.train.seed)
    model = _trainable(recipe, ref, tokenizer, equipment, device)
    arguments = TrainingArguments(**_arguments(recipe, run, device))
    torn = checkpoints.sweep(run.checkpoints)
    start = checkpoints.latest(run.checkpoints)
    _rewind(run, checkpoints.step(start) if start else 0)
    for one in torn:
        run.event("train", "torn checkpoint removed", checkpoint=one.name)
    run.event("train", "resumed" if start else "started", step=checkpoints.step(start) if start else 0)
    watch = Watch(run)
    trainer = SupervisedTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=validation,
        data_collator=Collator(equipment.pad_id),
        callbacks=[watch],
        run=run,
        tracker=tracker,
        completer=LocalCompleter(model, tokenizer, equipment),
        keep=recipe.train.save_total_limit,
    )
    began = time.monotonic()
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    tracker.flush()
    if watch.asked_to_stop and trainer.state.global_step < trainer.state.max_steps:
        raise InterruptedError(f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}")
    _save(run, recipe, trainer, began, resumed=start)


class SupervisedTrainer(Trainer):
    """Transformers' Trainer with an exact validation loss, sealed checkpoints and a log that a resume rewrites."""

    def __init__(
        self, *, run: Run, tracker: Tracker, completer: LocalCompleter, keep: int | None, **options: Any
    ) -> None:
        self.run = run
        self.tracker = tracker
        self.completer = completer
        self.keep = keep
        self.tracked_to = tracker.last_step("loss")
        self.control: Any
        super().__init__(**options)

    def evaluate(self, eval_dataset: Any = None, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss over the validation rows' targets, each target counting the same."""
        rows: Rows = eval_dataset or self.eval_dataset
        self.model.eval()
        results = self.completer.losses(rows.renderings)
        self.model.train()
        loss = sum(total for total, _ in results) / sum(count for _, count in results)
        metrics = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One line of train/metrics.jsonl, and the same to MLflow."""
        super().log(logs, start_time)
        step = self.state.global_step
        if "train_runtime" in logs:
            return
        if not math.isfinite(logs.get("loss", 0.0)):
            last = checkpoints.latest(self.run.checkpoints)
            where = f"the last whole checkpoint is {last.name}" if last else "there is no checkpoint yet"
            raise StageError(
                f"training: the loss is {logs['loss']} at step {step}; {where}. "
                "Lower train.learning_rate and start again"
            )
        append_json(self.run.metrics_file, {"step": step, **logs})
        if step > self.tracked_to:
            self.tracker.metrics({key: value for key, value in logs.items() if key != "epoch"}, step=step)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        checkpoints.seal(folder)
        checkpoints.rotate(Path(self.args.output_dir), self.keep, best=self.state.best_model_checkpoint)
        self.run.event("train", "checkpoint", step=self.state.global_step)
        if self.run.recipe().tracking.checkpoints and folder.is_dir():
            self.tracker.checkpoint(folder, [name for name in checkpoints.WEIGHTS if (folder / name).is_file()])


class Watch(TrainerCallback):
    """Progress for whoever looks on, and a stop at the end of a step when the process is asked to stop."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.asked_to_stop = False
        self.shown = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        signal.signal(signal.SIGTERM, self._ask)
        self._show(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.asked_to_stop and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if time.monotonic() - self.shown > 0.2 or state.global_step == state.max_steps:
            self._show(state)

    def _show(self, state: Any) -> None:
        self.shown = time.monotonic()
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        note = f"loss {losses[-1]:.4f}" if losses else ""
        self.run.set_progress("train", state.global_step, state.max_steps, note)

    def _ask(self, *_: Any) -> None:
        self.asked_to_stop = True


def _rows(run: Run, split: str, tokenizer: Any, max_length: int) -> Rows:
    renderings = render_all(tokenizer, prepare.examples(run, split), max_length)
    if not any(any(rendering.mask[1:]) for rendering in renderings):
        raise DataError(f"{run.data_file(split)}: no row has a token to learn from; is the assistant's text empty?")
    return Rows([rendering for rendering in renderings if any(rendering.mask[1:])])


def _trainable(recipe: Recipe, ref: ModelRef, tokenizer: Any, equipment: Equipment, device: str) -> Any:
    """The base's weights, or the base with a fresh adapter; room made for tokens that it lacks."""
    model = models.load_model(ref, device=device)
    models.grow(model, len(tokenizer))
    if recipe.train.method == "full":
        return model.train()
    from peft import LoraConfig, get_peft_model

    lora = recipe.train.lora
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        fan_in_fan_out=False,
        trainable_token_indices=tokenizer.convert_tokens_to_ids(equipment.added_tokens) or None,
    )
    with models.quiet():
        return get_peft_model(model, config).train()


def _arguments(recipe: Recipe, run: Run, device: str) -> dict[str, Any]:
    """The recipe's `train` as TrainingArguments takes it."""
    train = recipe.train
    given = {key: value for key, value in train.model_dump().items() if key not in OURS}
    if train.warmup_ratio:
        given["warmup_steps"] = train.warmup_ratio
    return given | {
        "output_dir": str(run.checkpoints),
        "num_train_epochs": train.epochs,
        "learning_rate": recipe.learning_rate,
        "per_device_train_batch_size": train.batch_size,
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": train.dataloader_pin_memory and device != "cpu",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "prediction_loss_only": True,
    }


def _rewind(run: Run, step: int) -> None:
    """Cut the log back to a step, so that a resumed run's log is that of an unbroken one."""
    kept = [entry for entry in run.metrics() if entry["step"] <= step] if step else []
    write_text(run.metrics_file, "".join(json.dumps(entry) + "\n" for entry in kept))


def _save(run: Run, recipe: Recipe, trainer: SupervisedTrainer, began: float, *, resumed: Path | None) -> None:
    """The trained weights, then train/manifest.json."""
    target = run.trained(recipe.train.method)
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    with models.quiet():
        trainer.model.save_pretrained(str(fresh))
    (fresh / "README.md").unlink(missing_ok=True)  # PEFT's own empty card; ours is package/card.md
    shutil.rmtree(target, ignore_errors=True)
    os.replace(fresh, target)
    model = trainer.model
    trained_tokens = sum(len(rendering.ids) for rendering in trainer.train_dataset.renderings)
    losses = [entry["loss"] for entry in run.metrics() if "loss" in entry]
    manifest = {
        "method": recipe.train.method,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "examples": len(trainer.train_dataset),
        "tokens": int(trained_tokens * (trainer.state.epoch or 0)),
        "seconds": round(time.monotonic() - began, 2),
        "resumed_from": resumed.name if resumed else None,
        "device": str(model.device),
        "trainable_parameters": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "final_loss": losses[-1] if losses else None,
        "sha256": {path.name: sha256(path) for path in sorted(target.glob("*.safetensors"))},
    }
    write_json(run.manifest_file("train"), manifest)
    trainer.tracker.metrics({"train_seconds": manifest["seconds"]}, step=manifest["steps"])


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
