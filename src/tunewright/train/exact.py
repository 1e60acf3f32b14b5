"""What every method of training keeps: checkpoints that a killed run goes on from to the same weights, bit for bit, one
log, and a stop where numbers end.

A method makes its trainer (`class MyTrainer(Exact)`, or `(Exact, TheirTrainer)`); then `start = begin(run)`, and
`drive(trainer, ...)`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from tunewright import ranks
from tunewright.errors import RecipeError, StageError
from tunewright.recipe import Recipe
from tunewright.run import Run, append_json, write_json, write_text
from tunewright.tracking import Tracker
from tunewright.train import checkpoints
from tunewright.train.sharded import here, is_sharded, whole
from tunewright.train.together import gather, is_first, meet, place
from tunewright.train.weights import sha256, write_weights

OURS = {
    "method",
    "epochs",
    "learning_rate",
    "batch_size",
    "max_length",
    "tokens_per_forward",
    "frozen_layers",
    "adapter",
    "bf16",
    "preflight",
    "early_stopping_patience",
    "early_stopping_threshold",
    "lora",
    "dpo",
    "grpo",
    "warmup_ratio",
    "save_total_limit",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "fsdp",
    "fsdp_config",
}
"""Keys of the recipe's `train` that are not handed to TrainingArguments under their own name."""


SHOWN = 5
"""Rows that an error names; events.jsonl names all."""


def begin(run: Run) -> Path | None:
    """Clear away what a kill left torn; gives the last whole checkpoint, which training goes on from."""
    ranks.enter("loading")
    if is_first():
        torn = checkpoints.sweep(run.checkpoints)
        start = checkpoints.latest(run.checkpoints)
        _rewind(run, checkpoints.step(start) if start else 0)
        for one in torn:
            run.event("train", "torn checkpoint removed", checkpoint=one.name)
        run.event("train", "resumed" if start else "started", step=checkpoints.step(start) if start else 0)
    meet()
    return checkpoints.latest(run.checkpoints)


def drive(trainer: Any, watch: Watch, *, tokens: int, **more: Any) -> None:
    """Train to the end and write the weights, then train/manifest.json (`more` is added to it).

    Args:
        tokens: Of one epoch.

    Raises:
        InterruptedError: the process was asked to stop; a checkpoint of the last step was written first.
    """
    start = trainer.start
    trainable = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    with watch.heeding_sigterm():
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    trainer.tracker.flush()
    if watch.stopping:
        raise InterruptedError(f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}")
    trainer.refuse_broken_weights()
    state_dict = whole(trainer.model) if is_sharded(trainer.model) else None
    if is_first():
        _save(trainer, state_dict, trainable=trainable, tokens=tokens, resumed=start, **more)
    meet()


def arguments(
    recipe: Recipe, run: Run, device: str, kind: type[TrainingArguments] = TrainingArguments, **more: Any
) -> TrainingArguments:
    """The recipe's `train` as TrainingArguments, or as a `kind` of them with `more` of its own.

    Raises:
        RecipeError: `train` asks for something that cannot be done here.
    """
    train = recipe.train
    given = {key: value for key, value in train.model_dump().items() if key not in OURS}
    if train.warmup_ratio:
        given["warmup_steps"] = train.warmup_ratio
    if train.gradient_checkpointing:
        given["activation_checkpointing"] = True
        given["activation_checkpointing_kwargs"] = train.gradient_checkpointing_kwargs
    if train.fsdp:
        if int(os.environ.get("WORLD_SIZE", 1)) < 2:
            raise RecipeError("train.fsdp shards the weights over processes, and there is one; leave it out")
        if device == "cpu" and torch.accelerator.is_available():
            raise RecipeError("train.fsdp shards over this machine's GPUs; remove train.use_cpu, or leave out fsdp")
        given["fsdp"] = True
        given["fsdp_config"] = {
            "version": train.fsdp_config.version,
            "state_dict_type": train.fsdp_config.state_dict_type,
            "reshard_after_forward": train.reshards,
        }
    given |= {
        "output_dir": str(run.checkpoints),
        "num_train_epochs": train.epochs,
        "learning_rate": run.resolved()["learning_rate"],
        "bf16": run.resolved()["train"]["bf16"],
        "per_device_train_batch_size": train.batch_size,
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": train.dataloader_pin_memory and device != "cpu",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "prediction_loss_only": True,
        "logging_nan_inf_filter": False,
        **({"ddp_backend": "gloo"} if device == "cpu" and "WORLD_SIZE" in os.environ else {}),
        **more,
    }
    if run.method == "qlora" and device != "cuda":
        raise RecipeError("train: qlora needs a CUDA GPU, and this machine has none; use lora")
    if train.fp16 and device == "cpu":
        raise RecipeError("train: fp16 needs a GPU, and this machine has none; leave it out")
    try:
        made = kind(**given)
    except (ValueError, ImportError) as error:
        raise RecipeError(f"train: {error}") from error
    if made.n_gpu > 1:
        made._n_gpu = 1  # else Trainer would cut each batch along its rows, and the targets do not lie along them
    return made


class Exact(Trainer):
    """Put before a class of Trainer: sealed checkpoints, a log that a resume rewrites, a stop where numbers end."""

    def __init__(self, *, run: Run, tracker: Tracker, start: Path | None, **options: Any) -> None:
        self.run = run
        self.recipe = run.recipe()
        self.tracker = tracker
        self.start = start
        self.began = time.monotonic() - (checkpoints.facts(start)["seconds"] if start else 0.0)
        self.tracked_to: dict[str, int] = {}
        self.control: Any
        self.patience: EarlyStoppingCallback | None = None
        super().__init__(**options)
        train = self.recipe.train
        if train.early_stopping_patience is not None:
            self.patience = EarlyStoppingCallback(train.early_stopping_patience, train.early_stopping_threshold)
            self.add_callback(self.patience)

    @property
    def seconds(self) -> float:
        """Time spent training, in this process and in those before it up to their last checkpoints."""
        return round(time.monotonic() - self.began, 2)

    def tokens_done(self, of_one_epoch: int) -> int:
        """Tokens that were trained on."""
        return int(of_one_epoch * (self.state.epoch or 0))

    def training_step(self, *given: Any, **options: Any) -> Any:
        loss = super().training_step(*given, **options)
        self.refuse_nan("loss", loss, self.state.global_step + 1)
        return loss

    def sealed_facts(self) -> dict[str, Any]:
        """What else a resumed run has to know."""
        no_better = self.patience.early_stopping_patience_counter if self.patience else 0
        return {"no_better": no_better, "processes": place()[1]}

    def _is_past_the_best(self) -> bool:
        patience = self.patience
        return patience is not None and patience.early_stopping_patience_counter >= patience.early_stopping_patience

    def rows_at_work(self) -> list[str]:
        """Where the rows come from (file:line) that the last forward was given; empty where a method does not say."""
        return []

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One line of train/metrics.jsonl, and the same to MLflow, which has it already where a resume repeats it."""
        super().log(logs, start_time)
        step = self.state.global_step
        if "train_runtime" in logs:
            return
        if not self.args.fp16:  # there, a step whose gradients overflow is left out and the scale is lowered
            self.refuse_nan("gradient's norm", torch.tensor(logs.get("grad_norm", 0.0)), step)
        if not is_first():
            return
        append_json(self.run.metrics_file, {"step": step, **logs})
        fresh = {key: value for key, value in logs.items() if key != "epoch" and step > self._tracked_to(key)}
        self.tracker.metrics(fresh, step=step)

    def _tracked_to(self, key: str) -> int:
        if key not in self.tracked_to:
            self.tracked_to[key] = self.tracker.last_step(key)
        return self.tracked_to[key]

    def refuse_nan(self, what: str, value: Any, step: int) -> None:
        if not torch.isfinite(value):
            self.stop(what, f"is {float(value)}", step)

    def stop(self, what: str, how: str, step: int) -> None:
        """Stop for good: says the step, the rows that were at work, and the checkpoint that is left."""
        last = checkpoints.latest(self.run.checkpoints)
        where = f"the last whole checkpoint is {last.name}" if last else "there is no checkpoint yet"
        sources = list(dict.fromkeys(self.rows_at_work()))
        self.run.event("train", "diverged", step=step, value=what, how=how, rows=sources)
        more = f" and {len(sources) - SHOWN} more" if len(sources) > SHOWN else ""
        rows = f" (rows {', '.join(sources[:SHOWN])}{more})" if sources else ""
        raise StageError(
            f"training: the {what} {how} at step {step}{rows}; {where}. Look at these rows, or lower "
            "train.learning_rate, and start again"
        )

    def refuse_broken_weights(self) -> None:
        """Nothing is saved that holds a weight which is no number; all processes find it, whoever holds it."""
        trained = [here(weight.detach()) for weight in self.model.parameters() if weight.requires_grad]
        own = torch.stack([weight.abs().max() for weight in trained if weight.numel()] or [torch.zeros(())]).max()
        for largest in gather(float(own)):
            self.refuse_nan("largest weight", torch.tensor(largest), self.state.global_step)

    def _run_epoch(self, **options: Any) -> None:
        """As Trainer's, from where the checkpoint stood: its loss since the last log, no step beyond the last."""
        if self.start is not None:
            sealed = checkpoints.facts(self.start)
            self._tr_loss += sealed["loss_since_log"]
            self._globalstep_last_logged = sealed["logged_at"]
            self.start = None
            if self.patience is not None:
                self.patience.early_stopping_patience_counter = sealed["no_better"]
        if self.state.global_step >= self.state.max_steps or self._is_past_the_best():
            self.control.should_training_stop = True
            return
        super()._run_epoch(**options)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint is sealed once MLflow has it and every number up to it, so a resume has nothing to make up."""
        ranks.enter("saving")
        self.refuse_broken_weights()
        super()._save_checkpoint(model, trial)
        losses = gather(self._tr_loss.item())  # each process has written its own part
        facts = self.sealed_facts()  # all processes, since they may have to ask each other
        if is_first():
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            self._seal(folder, loss_since_log=sum(losses) / len(losses), **facts)
        meet()

    def _seal(self, folder: Path, **facts: Any) -> None:
        self.tracker.flush()
        if self.recipe.tracking.checkpoints:
            self.tracker.checkpoint(folder, [name for name in checkpoints.WEIGHTS if (folder / name).is_file()])
        checkpoints.seal(
            folder,
            seconds=self.seconds,
            logged_at=self._globalstep_last_logged,
            **facts,
        )
        checkpoints.rotate(
            Path(self.args.output_dir), self.recipe.train.save_total_limit, best=self.state.best_model_checkpoint
        )
        self.run.event("train", "checkpoint", step=self.state.global_step)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As Trainer's. In a checkpoint by another number of processes there may be no state for this one: then it
        draws anew, the same in every attempt, so that dropout differs from an unbroken run's and nothing else does."""
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        rank, world = place()
        before = checkpoints.facts(Path(checkpoint)).get("processes", world)
        if before != world and is_first():
            self.run.event("train", "another number of processes", before=before, now=world)
        if not (Path(checkpoint) / (f"rng_state_{rank}.pth" if world > 1 else "rng_state.pth")).is_file():
            set_seed(self.args.seed + 1_000_003 * (self.state.global_step + 1) + rank)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if is_first():
            write_weights(self.model, Path(output_dir or self.args.output_dir), state_dict)


class Watch(TrainerCallback):
    """Progress for whoever looks on, a stop at the end of a step when the process is asked to stop, and at most one
    checkpoint for each step: one that falls on the end of an epoch is written when the epoch's numbers are logged."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.asked_to_stop = False
        self.stopping = False
        self.save_later = False
        self.shown = 0.0

    @contextlib.contextmanager
    def heeding_sigterm(self) -> Iterator[None]:
        """SIGTERM asks to stop, instead of ending the process."""
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._show(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._all_stop() and state.global_step < state.max_steps:
            control.should_training_stop = self.stopping = True
        if control.should_save and (control.should_training_stop or state.epoch == int(state.epoch)):
            control.should_save, self.save_later = False, True
        if time.monotonic() - self.shown > 0.2 or state.global_step == state.max_steps:
            self._show(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.stopping and state.epoch != int(state.epoch):  # the epoch goes on when the run does
            control.should_log = control.should_evaluate = False
        control.should_save = control.should_save or self.save_later or self.stopping
        self.save_later = False

    def _all_stop(self) -> bool:
        """Whether any of the processes was asked to stop; all of them stop at the same step, or none."""
        ranks.enter("waiting")
        return any(gather(self.asked_to_stop or ranks.asked_to_stop()))

    def _show(self, state: Any) -> None:
        if not is_first():
            return
        self.shown = time.monotonic()
        last = next((entry for entry in reversed(state.log_history) if "loss" in entry), None)
        key = "reward" if last and "reward" in last else "loss"  # a reward's loss is about 0 all along
        note = "" if last is None else f"{key} {last[key]:.4f}"
        self.run.set_progress("train", state.global_step, state.max_steps, note)

    def _ask(self, *_: Any) -> None:
        self.asked_to_stop = True


def _rewind(run: Run, step: int) -> None:
    """Cut the log back to a step, so that a resumed run's log is that of an unbroken one."""
    kept = [entry for entry in run.metrics() if entry["step"] <= step] if step else []
    write_text(run.metrics_file, "".join(json.dumps(entry) + "\n" for entry in kept))


def _save(trainer: Any, state_dict: Any, *, trainable: int, tokens: int, resumed: Path | None, **more: Any) -> None:
    """The trained weights (`state_dict`, where they were gathered), then train/manifest.json."""
    run: Run = trainer.run
    target = run.trained(run.method)
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    write_weights(trainer.model, fresh, state_dict)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(fresh, target)
    model = trainer.model
    losses = [entry["loss"] for entry in run.metrics() if "loss" in entry]
    manifest = {
        "method": run.method,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "examples": len(trainer.train_dataset),
        "tokens": trainer.tokens_done(tokens),
        "seconds": trainer.seconds,
        "resumed_from": resumed.name if resumed else None,
        "device": str(model.device),
        "trainable_parameters": trainable,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "parameters_held": sum(here(weight).numel() for weight in model.parameters()),
        "final_loss": losses[-1] if losses else None,
        "sha256": {path.name: sha256(path) for path in sorted(target.glob("*.safetensors"))},
        **more,
    }
    write_json(run.manifest_file("train"), manifest)
    trainer.tracker.metrics({"train_seconds": manifest["seconds"]}, step=manifest["steps"])
