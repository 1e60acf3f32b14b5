"""Every key of the recipe's `train` reaches TrainingArguments, and what cannot be honoured is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOConfig, GRPOConfig

from tunewright import recipe as recipes
from tunewright.errors import RecipeError
from tunewright.recipe import Recipe, Train
from tunewright.run import Run, write_json
from tunewright.train import exact

CHANGED: dict[str, Any] = {
    "max_steps": 7,
    "gradient_accumulation_steps": 3,
    "per_device_eval_batch_size": 5,
    "optim": "adafactor",
    "optim_args": "foreach=False",
    "weight_decay": 0.05,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 0.5,
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "warmup_steps": 4,
    "neftune_noise_alpha": 5.0,
    "bf16": True,
    "use_cpu": True,
    "torch_compile": True,
    "torch_compile_backend": "eager",
    "torch_compile_mode": "default",
    "torch_empty_cache_steps": 2,
    "logging_strategy": "epoch",
    "logging_steps": 11,
    "logging_first_step": True,
    "eval_strategy": "steps",
    "eval_steps": 13,
    "eval_delay": 2,
    "eval_on_start": True,
    "save_strategy": "steps",
    "save_steps": 17,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": False,
    "ddp_find_unused_parameters": True,
    "ddp_bucket_cap_mb": 12,
    "ddp_broadcast_buffers": False,
    "ddp_timeout": 60,
    "seed": 9,
    "data_seed": 10,
    "full_determinism": True,
    "train_sampling_strategy": "sequential",
    "dataloader_drop_last": True,
    "dataloader_num_workers": 1,
    "dataloader_pin_memory": False,
    "dataloader_persistent_workers": True,
    "dataloader_prefetch_factor": 3,
}
NEEDS: dict[str, dict[str, Any]] = {
    "eval_strategy": {"eval_steps": 5},
    "eval_steps": {"eval_strategy": "steps"},
    "eval_delay": {"eval_strategy": "epoch"},
    "eval_on_start": {"eval_strategy": "epoch"},
    "load_best_model_at_end": {"eval_strategy": "epoch", "save_strategy": "epoch"},
    "metric_for_best_model": {"eval_strategy": "epoch", "load_best_model_at_end": True},
    "greater_is_better": {"eval_strategy": "epoch", "load_best_model_at_end": True},
    "dataloader_persistent_workers": {"dataloader_num_workers": 1},
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine_with_restarts"},
    "torch_compile_backend": {"torch_compile": True},
    "torch_compile_mode": {"torch_compile": True},
}
"""What a key asks for besides itself."""
NOT_ON_A_CPU = {"fp16": True, "tf32": True}


def recipe_of(**train: Any) -> Recipe:
    data = {"train": "train.jsonl"} | ({"validation": "v.jsonl"} if train.get("eval_strategy", "no") != "no" else {})
    return recipes.loads(
        yaml.safe_dump({"name": "t", "model": "m", "task": "classification", "data": data, "train": train})
    )


def arguments_of(folder: Path, **train: Any) -> TrainingArguments:
    return exact.arguments(recipe_of(**train), run_of(folder, **train), "cpu")


def run_of(folder: Path, **train: Any) -> Run:
    """A run whose check has settled what a recipe leaves open."""
    run, recipe = Run(folder), recipe_of(**train)
    settled = {"method": recipe.train.method, "bf16": recipe.train.bf16 is True}
    rate = recipe.train.learning_rate
    write_json(run.manifest_file("check"), {"train": settled, "learning_rate": 1e-3 if rate is None else rate})
    return run


def plain(value: Any) -> Any:
    return getattr(value, "value", value)


def test_no_key_is_forgotten_here() -> None:
    assert set(CHANGED) | set(NOT_ON_A_CPU) | exact.OURS == set(Train.model_fields)


@pytest.mark.parametrize("key", list(CHANGED))
def test_a_key_reaches_training_arguments(tmp_path: Path, key: str) -> None:
    assert Train().model_dump()[key] != CHANGED[key], "this test needs a value that is not the default"
    arguments = arguments_of(tmp_path, **{key: CHANGED[key]} | NEEDS.get(key, {}))
    assert plain(getattr(arguments, key)) == CHANGED[key]


def test_keys_of_our_own_are_put_in_their_words(tmp_path: Path) -> None:
    arguments = arguments_of(
        tmp_path,
        method="full",
        epochs=2.5,
        learning_rate=3e-5,
        batch_size=6,
        warmup_ratio=0.25,
        save_total_limit=1,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    assert arguments.num_train_epochs == 2.5
    assert arguments.learning_rate == 3e-5
    assert arguments.per_device_train_batch_size == 6
    assert arguments.get_warmup_steps(40) == 10
    assert arguments.activation_checkpointing
    assert arguments.activation_checkpointing_kwargs == {"use_reentrant": False}
    assert arguments.save_total_limit is None, "ours are removed once the next one is whole, not before"
    assert arguments.output_dir == str(tmp_path / "train" / "checkpoints")
    assert arguments.report_to == []
    assert get_last_checkpoint(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("task", "method", "rate"),
    [
        ("chat", "lora", 2e-4),
        ("chat", "qlora", 2e-4),
        ("chat", "full", 2e-5),
        ("reward", "lora", 1e-5),
        ("preference", "full", 1e-6),
    ],
)
def test_the_learning_rate_has_a_default_for_each_task_and_method(task: str, method: str, rate: float) -> None:
    assert recipes.default_rate(task, method) == rate


def test_the_settled_learning_rate_is_the_one_that_trains(tmp_path: Path) -> None:
    assert arguments_of(tmp_path).learning_rate == 1e-3


@pytest.mark.parametrize("key", list(NOT_ON_A_CPU))
def test_what_this_machine_cannot_do_is_said_before_training(tmp_path: Path, key: str) -> None:
    with pytest.raises(RecipeError, match=f"^train: .*{key}"):
        arguments_of(tmp_path, **{key: True})


@pytest.mark.parametrize("kind", [DPOConfig, GRPOConfig])
def test_trls_own_defaults_do_not_come_through(tmp_path: Path, kind: type[TrainingArguments]) -> None:
    """bf16 and gradient checkpointing are on in TRL unless they are refused, and wrong on a CPU."""
    arguments = exact.arguments(recipe_of(), run_of(tmp_path), "cpu", kind, gradient_checkpointing=None)
    assert arguments.bf16 is arguments.activation_checkpointing is False
    assert arguments.logging_steps == Train().logging_steps
    asked = exact.arguments(
        recipe_of(gradient_checkpointing=True), run_of(tmp_path), "cpu", kind, gradient_checkpointing=None
    )
    assert asked.activation_checkpointing is True
