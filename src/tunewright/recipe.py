"""What the user asked for: typed, checked, frozen.

A recipe is YAML. Reading one does no I/O beyond the file itself: whether the data and the model are there is
`tunewright check`'s business. An unknown key is an error that names the nearest known one, with the line.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
import keyword
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from tunewright import expressions
from tunewright.errors import RecipeError

Task = Literal["classification", "chat", "pretraining", "preference", "reward"]
Baseline = Literal["zero-shot", "few-shot", "tfidf", "majority"]


Scheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
]
"""What Transformers calls `SchedulerType`. Spelled out, so that a typo is found before a stage begins."""

Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_torch_xla",
    "adamw_torch_npu_fused",
    "adafactor",
    "adamw_anyprecision",
    "adamw_torch_4bit",
    "adamw_torch_8bit",
    "ademamix",
    "sgd",
    "adagrad",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "ademamix_8bit",
    "lion_8bit",
    "lion_32bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "rmsprop",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
    "lomo",
    "adalomo",
    "grokadamw",
    "schedule_free_radam",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "stable_adamw",
]
"""What Transformers calls `OptimizerNames`, less GaLore and APOLLO, which need `optim_target_modules`."""

SHARDED_OPTIMIZERS: tuple[Optimizer, ...] = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop")
"""Those that were tried on sharded weights. Adagrad makes its state before there are shards, and cannot save it."""

DDP_ONLY = ("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers")
"""Keys of `train` for several processes that each have the whole model."""


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _numbers(value: Any) -> Any:
    """PyYAML reads `1e-5` as a string. Where the type of a value is not known, what looks like a number is one."""
    if isinstance(value, dict):
        return {key: _numbers(below) for key, below in value.items()}
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        return float(value)
    return value


Source = Annotated[str, Field(min_length=1)]
Sources = Annotated[
    tuple[Source, ...],
    BeforeValidator(_one_or_many, json_schema_input_type=Source | Annotated[tuple[Source, ...], Field(min_length=1)]),
    Field(min_length=1),
]
Options = Annotated[dict[str, Any], BeforeValidator(_numbers)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class Section(BaseModel):
    """A frozen part of a recipe; a key that it does not know is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


class Limit(Section):
    train: int | None = Field(default=None, ge=1)
    """Use at most this many training rows."""
    test: int | None = Field(default=None, ge=1)
    """Use at most this many test rows."""
    validation: int | None = Field(default=None, ge=1)
    """Use at most this many validation rows."""
    seed: int = 42
    """Rows are shuffled with this seed, then the first ones are taken (as `datasets` does: shuffle, select)."""


class Split(Section):
    test: float = Field(default=0.1, ge=0, lt=1)
    """The share of rows held out when no test set is named. Equal rows always fall on the same side. 0 holds out none:
    then nothing says how good the model is, so `evaluate.must_beat` must be null."""
    seed: int = 42
    """Another seed holds out other rows."""


COLUMNS: dict[str, tuple[Task, ...]] = {
    "text": ("classification", "pretraining"),
    "label": ("classification",),
    "labels": ("classification",),
    "prompt": ("chat", "preference", "reward"),
    "completion": ("chat",),
    "instruction": ("chat",),
    "input": ("chat", "preference"),
    "response": ("chat",),
    "messages": ("chat", "reward"),
    "chosen": ("preference",),
    "rejected": ("preference",),
    "preferred_output": ("preference",),
    "non_preferred_output": ("preference",),
    "system": ("classification", "chat", "preference", "reward"),
}
"""Keys of `data` that mean something for some tasks only."""

SHAPES: dict[Task, tuple[tuple[str, ...], ...]] = {
    "chat": (("messages",), ("prompt", "completion"), ("instruction", "input", "response")),
    "preference": (("prompt", "chosen", "rejected"), ("input", "preferred_output", "non_preferred_output")),
    "reward": (("messages",), ("prompt",)),
}
"""Columns of a row that belong together, for each task that has several such shapes; a recipe names those of one."""


class Data(Section):
    train: Sources
    """Hub data set and split (`imdb:train`), file, or glob (jsonl, csv, parquet, txt)."""
    test: Sources | None = None
    """As `train`. Without it, `split` holds out a share of the training rows."""
    validation: Sources | None = None
    """As `train`: rows for the loss that `train.eval_strategy` measures during training."""
    text: str | None = None
    """Column with the text (classification, pretraining)."""
    label: str | None = None
    """Column with the class, as a word or as a number (classification)."""
    labels: tuple[str, ...] | dict[int, str] | None = None
    """The classes: a list in the order of their numbers, or a mapping from number to word."""
    prompt: str | None = None
    """Column with the prompt: text (chat, preference, reward) or messages (preference, reward)."""
    completion: str | None = None
    """Column with the answer to `prompt` (chat)."""
    instruction: str | None = None
    """Column with the instruction (chat)."""
    input: str | None = None
    """Column with the instruction's optional input (chat), or with OpenAI's `{messages: [...]}` (preference)."""
    response: str | None = None
    """Column with the answer to `instruction` (chat)."""
    messages: str | None = None
    """Column with OpenAI chat messages (chat), or with those of a prompt (reward)."""
    chosen: str | None = None
    """Column with the better answer to `prompt`: text or messages (preference)."""
    rejected: str | None = None
    """Column with the worse answer (preference)."""
    preferred_output: str | None = None
    """Column with the better answer to `input`: messages, as OpenAI has it (preference)."""
    non_preferred_output: str | None = None
    """Column with the worse answer (preference)."""
    system: str | None = None
    """A system message put before every example that has none."""
    limit: Limit = Limit()
    """How many rows to use of each split. Default: all."""
    split: Split = Split()
    """How rows are held out where no test set is named."""
    over_length: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to a row longer than `train.max_length`: the prompt loses its end (never the answer), or the row
    is left out, or nothing starts. Each such row is named in data/findings.jsonl."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """What happens at a row that cannot be read (broken JSON, a missing column): stop, or leave it out and name it."""
    without: str | None = Field(default=None, min_length=1)
    """A list of training rows to leave out, as evaluation writes it (lines of evaluate/suspects.jsonl or of
    evaluate/nearest.jsonl): JSON lines with a `sha256`. `tunewright retrain` sets it."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Data:
        if self.test is not None and "split" in self.model_fields_set:
            raise ValueError("split holds out rows where no test set is named, and test names one; remove one of them")
        if self.validation is None and self.limit.validation is not None:
            raise ValueError("limit.validation limits rows that are not there; set validation")
        words = list(self.labels.values() if isinstance(self.labels, dict) else self.labels or ())
        for word in words:
            if words.count(word) > 1 or not word.strip():
                raise ValueError(f"labels names {word!r} twice" if word.strip() else "labels holds an empty word")
        return self

    @property
    def holds_out(self) -> bool:
        """Whether there are test rows."""
        return self.test is not None or self.split.test > 0

    def check_shape(self, task: Task) -> None:
        """Refuse columns that do not belong together.

        Raises:
            ValueError: naming them.
        """
        shapes = SHAPES.get(task, ())
        columns = dict.fromkeys(column for shape in shapes for column in shape)
        named = [column for column in columns if getattr(self, column) is not None]
        if named and not any(set(named) <= set(shape) for shape in shapes):
            raise ValueError(
                f"data.{named[0]}: {', '.join(named)} are not of one kind of row; choose "
                + " or ".join(" + ".join(shape) for shape in shapes)
            )
        if task == "chat" and named == ["input"]:
            raise ValueError("data.input alone says nothing; name instruction and response")


class Lora(Section):
    r: int = Field(default=16, ge=1)
    """Rank of the update matrices."""
    lora_alpha: float = Field(default=32, gt=0)
    """The update is scaled by lora_alpha / r."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Modules that get an adapter: names, or all-linear."""


DpoLoss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
"""What TRL's DPOTrainer takes as `loss_type`."""


class Dpo(Section):
    """Direct preference optimization (task: preference). The keys are those of TRL's `DPOConfig`."""

    beta: float = Field(default=0.1, gt=0, le=2)
    """How much staying near the base weighs: the larger, the nearer. At most 2, as in OpenAI's interface."""
    loss_type: Annotated[
        tuple[DpoLoss, ...],
        BeforeValidator(
            _one_or_many, json_schema_input_type=DpoLoss | Annotated[tuple[DpoLoss, ...], Field(min_length=1)]
        ),
        Field(min_length=1),
    ] = ("sigmoid",)
    """The loss, or several that are added up."""
    loss_weights: tuple[float, ...] | None = None
    """The weight of each of several losses. Default: 1 for each."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """The share of pairs that are taken to be the wrong way round (robust), or the smoothing (exo_pair)."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """What measures the distance from the base."""
    f_alpha_divergence_coef: float = Field(default=0.5, gt=0)
    """The alpha of alpha_divergence."""

    @model_validator(mode="after")
    def _consistent(self) -> Dpo:
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"loss_weights has {len(self.loss_weights)} numbers for {len(self.loss_type)} losses; give one for each"
            )
        smoothed = [loss for loss in self.loss_type if loss in ("robust", "exo_pair")]
        if self.label_smoothing and not smoothed:
            raise ValueError("label_smoothing is for loss_type: robust or exo_pair")
        if "exo_pair" in smoothed and not self.label_smoothing:
            raise ValueError("label_smoothing must be above 0 for loss_type: exo_pair; 1e-3 is usual")
        if "f_alpha_divergence_coef" in self.model_fields_set and self.f_divergence_type != "alpha_divergence":
            raise ValueError("f_alpha_divergence_coef is for f_divergence_type: alpha_divergence")
        return self


class Grpo(Section):
    """Group relative policy optimization (task: reward). The keys are those of TRL's `GRPOConfig`."""

    num_generations: int = Field(default=8, ge=2)
    """Answers drawn for each prompt; an answer's advantage is its reward against those of its group."""
    max_completion_length: int = Field(default=128, ge=1)
    """Longest answer in tokens, in training and in evaluation. A prompt has what `train.max_length` leaves."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the draws. Evaluation answers greedily."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw among the most probable tokens that hold this much together."""
    top_k: int = Field(default=0, ge=0)
    """Draw among this many most probable tokens; 0: among all."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Draw among tokens at least this probable, as a share of the best one's probability."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Above 1, tokens that were said already become less probable."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the divergence from the base; 0 leaves it out, and saves its pass."""
    epsilon: float = Field(default=0.2, gt=0)
    """Clip of the probability ratio."""
    epsilon_high: float | None = Field(default=None, gt=0)
    """Upper clip of the ratio. Default: as `epsilon`."""
    num_iterations: int = Field(default=1, ge=1)
    """Optimizer steps on the same answers."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo"
    """How the tokens of all answers are averaged."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Advantages are divided by the standard deviation of rewards in the group, in the batch, or by nothing."""
    mask_truncated_completions: bool = False
    """Whether an answer that was cut at its longest is left out of the loss."""


class Fsdp(Section):
    """How weights are sharded. The keys are those of Transformers' `fsdp_config`."""

    version: Literal[2] = 2
    """FSDP2, with which Transformers replaced the first one."""
    reshard_after_forward: bool | None = None
    """Whether a layer's weights are let go of between its forward and its backward, and gathered again. Default: for
    all but `fsdp: shard_grad_op`."""
    state_dict_type: Literal["FULL_STATE_DICT"] = "FULL_STATE_DICT"
    """Checkpoints are whole: any other program reads their weights."""


FSDP_REFUSED = {
    "activation_checkpointing": "say train.gradient_checkpointing; this one draws another dropout the second time",
    **dict.fromkeys(
        ("auto_wrap_policy", "transformer_layer_cls_to_wrap", "min_num_params"),
        "each of the model's layers is sharded by itself",
    ),
    **dict.fromkeys(("cpu_offload",), "gloo and NCCL would both be needed, which was not tried on any GPU"),
    **dict.fromkeys(
        ("cpu_ram_efficient_loading", "sync_module_states"),
        "each process tries the model before it is sharded, so it reads all of it",
    ),
    **dict.fromkeys(
        ("backward_prefetch", "forward_prefetch", "limit_all_gathers", "use_orig_params"), "it belongs to FSDP1"
    ),
    **dict.fromkeys(("xla", "xla_fsdp_settings", "xla_fsdp_grad_ckpt", "xla_fsdp_v2"), "TPUs are not supported"),
}
"""Keys of Transformers' `fsdp_config` that ours does not take, each with the reason."""


class Train(Section):
    """How to train. Keys beyond the first block carry the names of Transformers' `TrainingArguments`."""

    method: Literal["lora", "full", "qlora", "auto"] = "lora"
    """Train a low-rank adapter, all weights, or an adapter on weights of 4 bits (qlora: a CUDA GPU). auto chooses from
    the data and the memory there is; `plan` says what and why."""
    adapter: str | None = Field(default=None, min_length=1)
    """Go on from an earlier run's adapter: its run folder, or an adapter's own (lora and qlora)."""
    epochs: float = Field(default=3.0, gt=0)
    """Passes over the training rows."""
    learning_rate: float | None = Field(default=None, ge=0)
    """Peak learning rate. Default: 2e-4 for an adapter, 2e-5 for all weights; for preference and reward, which need
    small steps, 1e-5 and 1e-6."""
    batch_size: int = Field(default=8, ge=1)
    """Examples per device and step: rows, pairs (preference), or drawn answers (reward)."""
    max_length: int | None = Field(default=None, ge=8)
    """Longest example in tokens. Default: the model's context, at most 1,024."""
    lora: Lora = Lora()
    """The adapter (method: lora)."""
    dpo: Dpo = Dpo()
    """How to learn from pairs (task: preference)."""
    grpo: Grpo = Grpo()
    """How to learn from a grader (task: reward)."""

    frozen_layers: int = Field(default=0, ge=0)
    """The lowest layers that stay as they are, and the embeddings with them. What they make of each row is computed
    once, without dropout, and kept on disk while training lasts (4 bytes x hidden size x tokens)."""
    tokens_per_forward: int | None = Field(default=None, ge=1)
    """Tokens that one forward and backward takes at most (a longer row goes alone). The rows of a step are spread over
    as many forwards as that needs; the sums are the same (but for dropout, whose draws follow the forwards), the memory
    is not. Default: 2,048 on a CPU, 16,384 on a GPU."""

    max_steps: int = Field(default=-1, ge=-1)
    """Stop after this many optimizer steps; -1 leaves it to `epochs`."""
    preflight: Literal["auto", "always", "never"] = "auto"
    """Learn a few rows by heart before training and have the model say them, as `tunewright check --try` does; what
    goes wrong ends the run before its first step. auto: where the plan says that training takes ten minutes or more.
    Not done where several processes train, and on Spark."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    per_device_eval_batch_size: int = Field(default=8, ge=1)
    optim: Optimizer = "adamw_torch_fused"
    optim_args: str | None = None
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    lr_scheduler_type: Scheduler = "linear"
    lr_scheduler_kwargs: Options | None = None
    warmup_steps: float = Field(default=0, ge=0)
    """Steps of linear warm-up; below 1, a share of all steps."""
    warmup_ratio: float | None = Field(default=None, ge=0, lt=1)
    """Share of all steps spent warming up. Newer Transformers takes it as `warmup_steps` below 1."""
    neftune_noise_alpha: float | None = None
    bf16: bool | Literal["auto"] = "auto"
    """Matrix products in bfloat16, weights in float32. auto: where the processor or the GPU has instructions for it."""
    fp16: bool = False
    tf32: bool | None = None
    use_cpu: bool = False
    gradient_checkpointing: bool = False
    gradient_checkpointing_kwargs: Options | None = None
    torch_compile: bool = False
    torch_compile_backend: str | None = None
    torch_compile_mode: str | None = None
    torch_empty_cache_steps: int | None = Field(default=None, ge=1)
    logging_strategy: Literal["no", "steps", "epoch"] = "steps"
    logging_steps: float = Field(default=1, gt=0)
    logging_first_step: bool = False
    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    """When to measure the loss on `data.validation`."""
    eval_steps: float | None = Field(default=None, gt=0)
    eval_delay: float = Field(default=0, ge=0)
    eval_on_start: bool = False
    save_strategy: Literal["no", "steps", "epoch"] = "epoch"
    """When to write a checkpoint that a killed run goes on from."""
    save_steps: float = Field(default=500, gt=0)
    save_total_limit: int | None = Field(default=2, ge=1)
    load_best_model_at_end: bool = False
    metric_for_best_model: Literal["loss", "eval_loss", "accuracy", "eval_accuracy"] | None = None
    """The validation metric that chooses the best checkpoint. accuracy is for classes. Default: loss."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stop once the metric has been no better for so many measurements."""
    early_stopping_threshold: float = Field(default=0.0, ge=0)
    """What counts as better: by more than this."""
    greater_is_better: bool | None = None
    fsdp: bool | Literal["full_shard", "shard_grad_op", "full_shard auto_wrap", "shard_grad_op auto_wrap"] = False
    """Shard the weights, gradients and optimizer state over `backend.processes`, for a model that does not fit one
    device. true, as full_shard: weights are let go of after each layer's forward; shard_grad_op: after its backward."""
    fsdp_config: Fsdp = Fsdp()
    """Options of `fsdp`."""
    ddp_find_unused_parameters: bool | None = None
    ddp_bucket_cap_mb: int | None = Field(default=None, ge=1)
    ddp_broadcast_buffers: bool | None = None
    ddp_timeout: int = Field(default=1800, ge=1)
    seed: int = Field(default=42, ge=0)
    data_seed: int | None = None
    full_determinism: bool = False
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = "random"
    dataloader_drop_last: bool = False
    dataloader_num_workers: int = Field(default=0, ge=0)
    dataloader_pin_memory: bool = True
    dataloader_persistent_workers: bool = False
    dataloader_prefetch_factor: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Train:
        if self.warmup_ratio and self.warmup_steps:
            raise ValueError("warmup_ratio and warmup_steps are both set; choose one")
        if self.bf16 is True and self.fp16:
            raise ValueError("bf16 and fp16 are both set; choose one")
        if self.adapter is not None and self.method == "full":
            raise ValueError("adapter goes on from an adapter, and method: full has none; use lora")
        if self.adapter is not None and "lora" in self.model_fields_set:
            raise ValueError("lora says how a fresh adapter is made, and adapter names one that is there; remove one")
        if self.max_steps == 0:
            raise ValueError("max_steps is 0; say how many, or -1 to leave it to epochs")
        for key in ("logging_steps", "eval_steps", "save_steps"):
            steps = getattr(self, key)
            if steps is not None and steps > 1 and steps != int(steps):
                raise ValueError(f"{key} is {steps:g}; say whole steps, or a share of all steps below 1")
        if "eval_steps" in self.model_fields_set and "eval_strategy" not in self.model_fields_set:
            raise ValueError("eval_steps is set but eval_strategy is 'no'; add eval_strategy: steps")
        if self.eval_strategy == "no":
            for key in ("load_best_model_at_end", "eval_on_start", "early_stopping_patience"):
                if getattr(self, key):
                    raise ValueError(f"{key} needs a validation loss; add eval_strategy: steps or epoch")
            if self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
                raise ValueError(
                    f"lr_scheduler_type: {self.lr_scheduler_type} follows the validation loss; "
                    "add eval_strategy: steps or epoch"
                )
        if self.early_stopping_patience and not self.load_best_model_at_end:
            raise ValueError(
                "early_stopping_patience stops once the best checkpoint is past; add load_best_model_at_end: true"
            )
        if self.frozen_layers and (self.adapter is not None or self.neftune_noise_alpha):
            other = "adapter" if self.adapter is not None else "neftune_noise_alpha"
            raise ValueError(f"frozen_layers leaves the lower layers alone, and {other} changes them; remove one")
        if self.early_stopping_threshold and not self.early_stopping_patience:
            raise ValueError("early_stopping_threshold does nothing without early_stopping_patience")
        self._can_be_sharded()
        if self.load_best_model_at_end:
            self._saves_what_it_measures()
        if not self.dataloader_num_workers:
            for key in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
                if getattr(self, key):
                    raise ValueError(f"{key} is for worker processes; set dataloader_num_workers")
        return self

    @property
    def reshards(self) -> bool:
        """Whether `fsdp` lets go of a layer's weights between its forward and its backward."""
        chosen = self.fsdp_config.reshard_after_forward
        return "shard_grad_op" not in str(self.fsdp) if chosen is None else chosen

    def _can_be_sharded(self) -> None:
        """What `fsdp` needs, and what it cannot do."""
        if not self.fsdp:
            if "fsdp_config" in self.model_fields_set:
                raise ValueError("fsdp_config has the options of fsdp, which is not set; add fsdp: full_shard")
            return
        if self.method == "qlora":
            raise ValueError("method: qlora has weights of 4 bits, and fsdp cannot shard those; use lora")
        if self.method == "auto":
            raise ValueError("method: auto weighs the memory of one device, and fsdp has several; say lora or full")
        if self.frozen_layers:
            raise ValueError("frozen_layers starts in the middle of a model, and fsdp gathers it from its first layer")
        for key in ("fp16", "torch_compile"):
            if getattr(self, key):
                raise ValueError(f"{key} was not tried with fsdp and is not supported there; remove one of them")
        if self.optim not in SHARDED_OPTIMIZERS:
            raise ValueError(
                f"optim: {self.optim} was not tried on sharded weights; with fsdp choose one of "
                + ", ".join(SHARDED_OPTIMIZERS)
            )
        own = self.fsdp_config.reshard_after_forward
        if isinstance(self.fsdp, str) and own not in (None, "full_shard" in self.fsdp):
            raise ValueError(f"fsdp: {self.fsdp} and reshard_after_forward: {str(own).lower()} contradict; remove one")
        for key in sorted(self.model_fields_set & {*DDP_ONLY}):
            raise ValueError(f"{key} is for training without fsdp, where each process has the whole model; remove it")

    def _saves_what_it_measures(self) -> None:
        """The best checkpoint can only be loaded if there is one for each measurement."""
        if self.save_strategy != self.eval_strategy:
            raise ValueError(
                "load_best_model_at_end needs save_strategy and eval_strategy to be the same; "
                f"they are {self.save_strategy} and {self.eval_strategy}"
            )
        every = self.eval_steps or self.logging_steps
        if self.save_strategy == "steps" and self.save_steps != every:
            raise ValueError(
                f"load_best_model_at_end needs a checkpoint for each measurement: save_steps is {self.save_steps:g} "
                f"and eval_steps {every:g}; make them the same"
            )

    @model_validator(mode="before")
    @classmethod
    def _steps_mean_steps(cls, given: Any) -> Any:
        """`save_steps: 50` alone means steps, as it does under TrainingArguments' own default strategy."""
        if isinstance(given, Mapping) and "save_steps" in given and "save_strategy" not in given:
            return {**given, "save_strategy": "steps"}
        return given


RENAMED = {
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "evaluation_strategy": "eval_strategy",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "no_cuda": "use_cpu",
    "lora_r": "lora: {r: ...}",
    "lora_rank": "lora: {r: ...}",
    "lora_alpha": "lora: {lora_alpha: ...}",
    "lora_dropout": "lora: {lora_dropout: ...}",
    "target_modules": "lora: {target_modules: ...}",
}
"""Keys of `train` that people bring from elsewhere, and what they are called here."""

REFUSED = {
    **dict.fromkeys(("logging_nan_inf_filter",), "a loss that is no number always stops training"),
    **dict.fromkeys(
        ("output_dir", "overwrite_output_dir", "run_name", "project", "resume_from_checkpoint"),
        "the run folder decides; see --runs and --resume",
    ),
    **dict.fromkeys(("report_to",), "tracking goes to MLflow; see the section `tracking`"),
    **dict.fromkeys(
        ("log_level", "log_level_replica", "log_on_each_node", "disable_tqdm", "debug", "skip_memory_metrics"),
        "the stage's log is train/log.txt",
    ),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "stages are commands; see --until"),
    **dict.fromkeys(
        (
            "remove_unused_columns",
            "label_names",
            "prediction_loss_only",
            "length_column_name",
            "use_cache",
            "include_for_metrics",
            "batch_eval_metrics",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "eval_accumulation_steps",
            "bf16_full_eval",
            "fp16_full_eval",
            "include_num_input_tokens_seen",
            "label_smoothing_factor",
            "dataloader_in_order",
            "dataloader_multiprocessing_context",
        ),
        "the batches and their loss are Tunewright's own",
    ),
    **dict.fromkeys(
        (
            "save_only_model",
            "save_on_each_node",
            "enable_jit_checkpoint",
            "ignore_data_skip",
            "restore_callback_states_from_checkpoint",
            "auto_find_batch_size",
        ),
        "a run could then not go on exactly from its checkpoint",
    ),
    **dict.fromkeys(
        (
            "push_to_hub",
            "hub_token",
            "hub_private_repo",
            "hub_model_id",
            "hub_strategy",
            "hub_always_push",
            "hub_revision",
            "trackio_space_id",
            "trackio_bucket_id",
            "trackio_static_space_id",
        ),
        "nothing is uploaded from training",
    ),
    **dict.fromkeys(("local_rank",), "the backend starts the processes; see backend.processes"),
    **dict.fromkeys(("ddp_static_graph",), "it fails where a step takes several forwards (tokens_per_forward)"),
    **dict.fromkeys(("ddp_backend",), "the device decides: NCCL between GPUs, gloo between CPUs"),
    **dict.fromkeys(("deepspeed", "parallelism_config"), "a model is sharded by PyTorch's own FSDP; see fsdp"),
    **dict.fromkeys(("accelerator_config",), "the batches and their loss are Tunewright's own"),
    **dict.fromkeys(("average_tokens_across_devices",), "each target counts the same, whichever device it falls to"),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), "it patches model classes for the whole process"),
    **dict.fromkeys(("activation_checkpointing", "activation_checkpointing_kwargs"), "say gradient_checkpointing"),
    **dict.fromkeys(("optim_target_modules",), "only layer-wise optimizers read it; choose modules with lora"),
}
"""Keys of TrainingArguments that `train` does not take, each with the reason. A test holds that none is forgotten."""


class Evaluate(Section):
    baselines: tuple[Baseline, ...] | None = None
    """What the tuned model is compared with. zero-shot is the base model on the same rows and is always there.
    Default: zero-shot, tfidf and majority for classes; zero-shot for text."""
    must_beat: Literal["base", "few-shot", "tfidf", "majority"] | None = "base"
    """The run exits with 3 unless the tuned model is better than this one. null asks for no such thing."""
    metric: (
        Literal[
            "accuracy", "f1_macro", "exact_match", "rouge_l", "loss", "reward_margin", "preference_accuracy", "reward"
        ]
        | None
    ) = None
    """What the verdict is about. Default: accuracy for classes, rouge_l for chat, loss for pretraining, reward_margin
    for preference, reward for reward."""
    batch_size: int = Field(default=16, ge=1)
    """Rows that a model answers at once."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest answer generated for a chat test row."""
    few_shot: int = Field(default=4, ge=1)
    """Training examples shown to the base model by the few-shot baseline."""
    bootstrap: int = Field(default=2000, ge=200)
    """Resamples behind each interval."""
    seed: int = 42
    """Of the resamples, the permutations and the few-shot examples."""
    slices: tuple[Source, ...] = ()
    """Columns of the test rows (a product, a language, a source): for each of their values there is a verdict too."""
    against: str | None = Field(default=None, min_length=1)
    """The folder of an earlier run with the same test rows: its tuned model's answers are one more baseline."""
    traced_rows: int = Field(default=2000, ge=0)
    """Training rows among which those are looked for that an error comes from; of more, those that are nearest to an
    error in their words. 0: errors are not traced."""


class Package(Section):
    formats: tuple[Literal["safetensors", "mlflow", "gguf-f16", "gguf-q8_0"], ...] = ("safetensors", "mlflow")
    """safetensors is always written; mlflow logs the model so that `mlflow models predict` answers; gguf-f16 and
    gguf-q8_0 write it as one file for llama.cpp and Ollama, with 16 or about 8 bits a weight."""
    register_as: str | None = Field(default=None, alias="register")
    """Name in MLflow's model registry. Default: the recipe's name."""


class Deploy(Section):
    name: Name | None = None
    """The model's name at the endpoint. Default: the recipe's name."""
    host: str = "127.0.0.1"
    """Address that the endpoint listens on."""
    port: int | None = Field(default=None, ge=1, le=65535)
    """Default: any free port."""
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Quota for the client key, judged when a request arrives: prompt tokens plus max_tokens."""
    content_filter: Literal["default", "off"] = "off"
    """The local endpoint has no content filter yet; `check` warns where a recipe asks for one."""
    test_rows: int = Field(default=50, ge=1)
    """Test rows sent over HTTP by `test`."""


METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "f1_macro"),
    "chat": ("rouge_l", "exact_match", "loss"),
    "pretraining": ("loss",),
    "preference": ("reward_margin", "preference_accuracy"),
    "reward": ("reward",),
}
"""What can be the verdict's metric for a task; the first is the default."""

NOT_IN_EVERY_TASK: dict[str, tuple[Task, ...]] = {
    "dpo": ("preference",),
    "grpo": ("reward",),
    "tokens_per_forward": ("classification", "chat", "pretraining"),
    "frozen_layers": ("classification", "chat", "pretraining"),
    "preflight": ("classification", "chat", "pretraining", "preference"),
    "fsdp": ("classification", "chat", "pretraining"),
    "fsdp_config": ("classification", "chat", "pretraining"),
}
"""Keys of `train` that some tasks do not read."""


def _templated(text: str) -> str:
    expressions.template(text)
    return text


Templated = Annotated[str, AfterValidator(_templated)]
"""Text that may hold `{{ item.COLUMN }}` and `{{ sample.output_text }}`."""


class StringCheck(Section):
    """1 where the answer compares as asked with the reference, else 0."""

    type: Literal["string_check"]
    """The kind of grader."""
    name: str | None = None
    """For people; in `multi` the key names the grader."""
    input: Templated = "{{ sample.output_text }}"
    """What is looked at."""
    reference: Templated
    """What it is compared with, such as `{{ item.answer }}`."""
    operation: Literal["eq", "ne", "like", "ilike"]
    """eq: equal; ne: not equal; like: contains the reference; ilike: contains it, upper and lower case alike."""


class TextSimilarity(Section):
    """How near the answer's text is to the reference, from 0 to 1."""

    type: Literal["text_similarity"]
    """The kind of grader."""
    name: str | None = None
    """For people; in `multi` the key names the grader."""
    input: Templated = "{{ sample.output_text }}"
    """What is looked at."""
    reference: Templated
    """What it is compared with."""
    evaluation_metric: Literal[
        "fuzzy_match", "bleu", "gleu", "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l"
    ]
    """fuzzy_match: difflib's ratio of matching characters; bleu and gleu: nltk's; rouge: rouge_score's F-measure."""

    @model_validator(mode="before")
    @classmethod
    def _can_be_had(cls, given: Any) -> Any:
        why = {"cosine": "needs a model of embeddings", "meteor": "needs WordNet, which nltk downloads"}
        asked = given.get("evaluation_metric") if isinstance(given, Mapping) else None
        if isinstance(asked, str) and asked in why:
            raise ValueError(f"evaluation_metric: {asked} {why[asked]}, and is not supported; choose rouge_l or gleu")
        return given


class PythonGrader(Section):
    """What a function of yours says: `def grade(sample, item) -> float`. It runs in a child process, unconfined."""

    type: Literal["python"]
    """The kind of grader."""
    name: str | None = None
    """For people; in `multi` the key names the grader."""
    source: str = Field(min_length=1)
    """Python that defines `grade(sample, item)`: sample["output_text"] is the answer, item the row. It runs as you,
    with your files and network: run no source that you do not trust."""
    timeout_s: float = Field(default=10.0, gt=0)
    """Seconds that one answer may take."""

    @model_validator(mode="before")
    @classmethod
    def _runs_here(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("image_tag") is not None:
            raise ValueError("image_tag names a container of OpenAI's, and source runs in this Python; remove it")
        return given

    @model_validator(mode="after")
    def _has_grade(self) -> PythonGrader:
        try:
            tree = ast.parse(self.source)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            at = f" (its line {error.lineno})" if isinstance(error, SyntaxError) and error.lineno else ""
            raise ValueError(f"source is not Python{at}: {str(error).splitlines()[0]}") from None
        found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "grade"]
        if not found:
            raise ValueError("source defines no function grade(sample, item)")
        arguments = found[-1].args
        given = len(arguments.posonlyargs) + len(arguments.args)
        if not (given - len(arguments.defaults) <= 2 <= given or arguments.vararg):
            raise ValueError(f"source: grade takes {given} arguments; it is called with two: sample and item")
        return self


class GraderMessage(Section):
    """A message to the judging model."""

    role: Literal["system", "developer", "user", "assistant"]
    """Who says it."""
    content: Templated
    """What it says."""


class Sampling(Section):
    """How the judging model answers; the keys are those of the chat completions API."""

    temperature: float | None = Field(default=None, ge=0, le=2)
    """Default: the endpoint's."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Default: the endpoint's."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """Longest answer in tokens."""
    seed: int | None = None
    """Where the endpoint keeps to one."""


class Judge(Section):
    """Another model, behind an endpoint that speaks the OpenAI API."""

    name: str | None = None
    """For people; in `multi` the key names the grader."""
    model: str = Field(min_length=1)
    """The model's name at its endpoint."""
    input: tuple[GraderMessage, ...]
    """The conversation that it answers."""
    base_url: str | None = None
    """The endpoint, such as http://127.0.0.1:8000/v1. Default: OPENAI_BASE_URL, else OpenAI's own."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key. The key itself is never written down."""
    sampling_params: Sampling = Sampling()
    """How it answers."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Seconds that one answer may take."""

    @model_validator(mode="after")
    def _asks(self) -> Judge:
        if not self.input:
            raise ValueError("input is empty; say what the model is asked, such as {role: user, content: ...}")
        return self


class ScoreModel(Judge):
    """The number that another model gives."""

    type: Literal["score_model"]
    """The kind of grader."""
    range: tuple[float, float] = (0.0, 1.0)
    """The lowest and the highest number that it may give. It is told so."""

    @model_validator(mode="after")
    def _in_order(self) -> ScoreModel:
        if not self.range[0] < self.range[1]:
            raise ValueError(f"range goes from {self.range[0]:g} to {self.range[1]:g}; the lower number comes first")
        return self


class LabelModel(Judge):
    """1 where another model gives a passing label, else 0."""

    type: Literal["label_model"]
    """The kind of grader."""
    labels: Annotated[tuple[str, ...], Field(min_length=2)]
    """What it may answer. It is told so."""
    passing_labels: Annotated[tuple[str, ...], Field(min_length=1)]
    """Those that are worth 1."""

    @model_validator(mode="after")
    def _known(self) -> LabelModel:
        unknown = [label for label in self.passing_labels if label not in self.labels]
        if unknown:
            raise ValueError(f"passing_labels: {unknown[0]!r} is not among labels")
        return self


Simple = Annotated[StringCheck | TextSimilarity | PythonGrader | ScoreModel | LabelModel, Field(discriminator="type")]


class Multi(Section):
    """Several graders, and a formula over their scores."""

    type: Literal["multi"]
    """The kind of grader."""
    name: str | None = None
    """For people."""
    graders: Annotated[dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w{0,63}$")], Simple], Field(min_length=1)]
    """Name -> grader."""
    calculate_output: str
    """The score from those of the graders, by name: numbers, + - * / ^, ( ), min, max, abs, floor, ceil, exp, sqrt,
    log. Such as `0.8 * right + 0.2 * short`."""

    @model_validator(mode="after")
    def _computes(self) -> Multi:
        taken = sorted(set(self.graders) & {*expressions.FUNCTIONS, *keyword.kwlist})
        if taken:
            raise ValueError(f"graders: {taken[0]} cannot be a grader's name; call it {taken[0]}_score")
        try:
            expressions.check_formula(self.calculate_output, self.graders)
        except ValueError as error:
            raise ValueError(f"calculate_output: {error}") from None
        unused = sorted(set(self.graders) - expressions.names(self.calculate_output))
        if unused:
            raise ValueError(f"calculate_output does not use the grader {unused[0]}; use it or remove it")
        return self


Grader = Annotated[
    StringCheck | TextSimilarity | PythonGrader | ScoreModel | LabelModel | Multi, Field(discriminator="type")
]
GRADERS: dict[str, type[Section]] = {
    "string_check": StringCheck,
    "text_similarity": TextSimilarity,
    "python": PythonGrader,
    "score_model": ScoreModel,
    "label_model": LabelModel,
    "multi": Multi,
}
"""The section for each `type` of a grader."""


def item_places(grader: Section) -> list[expressions.Place]:
    """Where a grader's templates look into the row, each place once."""
    found: dict[expressions.Place, None] = {}
    for simple in grader.graders.values() if isinstance(grader, Multi) else (grader,):
        texts = [message.content for message in simple.input] if isinstance(simple, Judge) else []
        if isinstance(simple, StringCheck | TextSimilarity):
            texts = [simple.input, simple.reference]
        found |= dict.fromkeys(place for text in texts for place in expressions.item_places(text))
    return list(found)


class Tracking(Section):
    enabled: bool = True
    """Whether MLflow gets a run for each run here."""
    uri: str | None = None
    """MLflow tracking URI. Default: MLFLOW_TRACKING_URI, else sqlite in the runs folder."""
    experiment: str = "tunewright"
    """MLflow experiment that the run is listed under."""
    checkpoints: bool = True
    """Log each checkpoint's weights (not the optimizer's state) as artifacts."""


class BackendChoice(BaseModel):
    """`kind` names a backend; the rest of the table belongs to that backend, which validates it."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    kind: str = "local"
    """The backend's name; the other keys are its own."""


Settings = TypeVar("Settings", bound=BaseModel)


def backend_settings(model: type[Settings], kind: str, table: dict[str, Any]) -> Settings:
    """A backend's own keys of the table, checked.

    Raises:
        RecipeError: it holds something unknown or wrong; the first is named.
    """
    try:
        return model.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        known = ", ".join(model.model_fields)
        what = f"unknown key; known: {known}" if first["type"] == "extra_forbidden" else first["msg"]
        raise RecipeError(f"backend.{key}: {what} (backend.kind: {kind})") from None


class Recipe(Section):
    name: Name
    """Names the run folder, the endpoint's model and the registered model."""
    model: str = Field(min_length=1)
    """The base: a hub name, a folder, or `starter` (ships with Tunewright)."""
    revision: str | None = None
    """Branch, tag or commit of a hub model. What was used is written to resolved.json."""
    task: Task
    """What is learnt: the class of a text, an assistant's turns, the text itself, the better of two answers, or what a
    grader rewards."""
    data: Data
    """Where the rows come from and which of their columns say what."""
    train: Train = Train()
    """How to train."""
    grader: Grader | None = None
    """What gives an answer its reward (task: reward): a grader in one of OpenAI's forms."""
    evaluate: Evaluate = Evaluate()
    """What the tuned model is measured by, and against what."""
    package: Package = Package()
    """What is made of the trained weights."""
    deploy: Deploy = Deploy()
    """The endpoint."""
    tracking: Tracking = Tracking()
    """MLflow."""
    backend: BackendChoice = BackendChoice()
    """Where the stages run."""

    @model_validator(mode="after")
    def _fits_the_task(self) -> Recipe:
        for key, tasks in COLUMNS.items():
            if getattr(self.data, key) is not None and self.task not in tasks:
                raise ValueError(f"data.{key} is for task: {' or '.join(tasks)}, not for {self.task}")
        self.data.check_shape(self.task)
        self._fits_the_method()
        if self.task == "pretraining" and self.data.over_length != "truncate":
            raise ValueError("data.over_length is for prompts; a long text is learnt in pieces, none of it is lost")
        if self.task != "classification":
            for baseline in (*(self.evaluate.baselines or ()), self.evaluate.must_beat):
                if baseline in ("tfidf", "majority"):
                    raise ValueError(f"evaluate: the baseline {baseline} needs task: classification")
        if self.task not in ("classification", "chat") and "few-shot" in self.baselines:
            raise ValueError("evaluate: the baseline few-shot needs task: classification or chat")
        wanted = self.evaluate.must_beat
        if wanted is not None and not self.data.holds_out:
            raise ValueError(
                f"evaluate.must_beat is {wanted}, and data.split.test: 0 leaves no rows to compare on; name data.test, "
                "hold some out, or set evaluate.must_beat: null"
            )
        if wanted not in (None, "base") and wanted not in self.baselines:
            raise ValueError(f"evaluate.must_beat is {wanted}, which is not among evaluate.baselines; add it there")
        if self.metric not in METRICS[self.task]:
            raise ValueError(
                f"evaluate.metric: {self.metric} is not measured for task: {self.task}; "
                f"choose {' or '.join(METRICS[self.task])}"
            )
        if "accuracy" in (self.train.metric_for_best_model or "") and self.task != "classification":
            raise ValueError(f"train.metric_for_best_model: accuracy needs task: classification, not {self.task}")
        if self.train.eval_strategy != "no" and self.data.validation is None:
            raise ValueError(
                "train.eval_strategy measures the loss on data.validation, which is not set; name its rows"
            )
        return self

    def _fits_the_method(self) -> None:
        """What preference and reward need, and what they cannot do."""
        for key, tasks in NOT_IN_EVERY_TASK.items():
            if key in self.train.model_fields_set and self.task not in tasks:
                raise ValueError(f"train.{key} is for task: {' or '.join(tasks)}, not for {self.task}")
        if (self.grader is not None) != (self.task == "reward"):
            raise ValueError(
                f"grader is missing: task: reward needs one, of type {', '.join(GRADERS)}"
                if self.task == "reward"
                else f"grader is for task: reward, not for {self.task}"
            )
        if self.task not in ("preference", "reward"):
            return
        train = self.train
        if train.lora.lora_dropout:
            raise ValueError(
                "train.lora.lora_dropout: dropout would blur the log-probabilities that task: "
                f"{self.task} compares; leave it 0"
            )
        if train.neftune_noise_alpha is not None:
            raise ValueError(f"train.neftune_noise_alpha is for supervised training, not for {self.task}")
        if train.train_sampling_strategy == "group_by_length":
            raise ValueError(f"train.train_sampling_strategy: group_by_length is not for {self.task}")
        if self.task == "preference":
            return
        if train.dataloader_drop_last:
            raise ValueError("train.dataloader_drop_last is not for reward, which fills its last step with other rows")
        together = train.batch_size * train.gradient_accumulation_steps
        if together % train.grpo.num_generations:
            raise ValueError(
                f"train.batch_size times gradient_accumulation_steps is {together}, which is no multiple of "
                f"train.grpo.num_generations ({train.grpo.num_generations}): a step needs whole groups of answers"
            )
        if train.eval_strategy != "no" or self.data.validation is not None:
            raise ValueError(
                "train.eval_strategy and data.validation measure a loss, and task: reward has none; its log has the "
                "reward of every step"
            )
        if "max_new_tokens" in self.evaluate.model_fields_set:
            raise ValueError("evaluate.max_new_tokens is for chat; a reward's answers have grpo.max_completion_length")

    @property
    def max_new_tokens(self) -> int:
        """The longest answer that evaluation and the endpoint's test ask for."""
        return self.train.grpo.max_completion_length if self.task == "reward" else self.evaluate.max_new_tokens

    @property
    def answer_room(self) -> int:
        """Tokens of `max_length` that a prompt leaves free, since its answer is still to be drawn."""
        return self.train.grpo.max_completion_length if self.task == "reward" else 0

    @property
    def baselines(self) -> tuple[Baseline, ...]:
        """The baselines to measure, the base model always among them."""
        by_task: tuple[Baseline, ...] = ("zero-shot", "tfidf", "majority")
        if self.task != "classification":
            by_task = ("zero-shot",)
        chosen = by_task if self.evaluate.baselines is None else self.evaluate.baselines
        return chosen if "zero-shot" in chosen else ("zero-shot", *chosen)

    @property
    def metric(self) -> str:
        """What the verdict is about."""
        return self.evaluate.metric or METRICS[self.task][0]

    @property
    def endpoint_name(self) -> str:
        return self.deploy.name or self.name

    @property
    def registered_name(self) -> str:
        return self.package.register_as or self.name

    def fingerprint(self) -> str:
        """sha256 of everything asked for (hex); two recipes that ask the same have the same."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def default_rate(task: str, method: str) -> float:
    """The peak learning rate of a task and a method where the recipe names none."""
    if task in ("preference", "reward"):  # TRL's own default for all weights, and ten times that
        return 1e-6 if method == "full" else 1e-5
    return 2e-5 if method == "full" else 2e-4


def load(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `--set key=value` overrides applied.

    Raises:
        RecipeError: the file is absent, is not YAML, or says something that no recipe says (with file:line).
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe; `tunewright init DATA` writes one for your file") from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as a recipe: {error}") from None
    return loads(text, str(path), overrides)


def loads(text: str, where: str = "recipe", overrides: Iterable[str] = ()) -> Recipe:
    """As `load`, from text; `where` names the source in errors."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        given = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2026-13-45
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{where}{line}: not YAML: {_said(error)}") from None
    for key, at in _repeated(node):
        raise RecipeError(f"{where}:{at}: `{key}` is given a second time; remove one of them")
    if not isinstance(given, dict):
        raise RecipeError(f"{where}: a recipe is a table of keys such as name, model, task and data")
    overrides = list(overrides)
    for override in overrides:
        _apply(given, override)
    try:
        return Recipe.model_validate(given)
    except ValidationError as error:
        said: dict[str, dict[str, None]] = {}
        for problem in error.errors():
            place, message = _explain(problem, node, where, overrides)
            said.setdefault(place, {})[message] = None
        lines = [f"{place}: {', or '.join(messages)}".removesuffix(": ") for place, messages in said.items()]
        raise RecipeError("\n".join(lines)) from None


def dump(recipe: Recipe) -> str:
    """YAML of what the recipe sets, without the defaults."""
    given = recipe.model_dump(mode="json", exclude_unset=True, by_alias=True)
    return yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=110)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors."""
    schema = Recipe.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Tunewright recipe"}


def _apply(given: dict[str, Any], override: str) -> None:
    """`train.learning_rate=1e-4` into the tree."""
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {override}: say key=value, such as --set train.learning_rate=1e-4")
    *parents, last = key.strip().split(".")
    for parent in parents:
        if given.get(parent) is None:
            given[parent] = {}
        below = given[parent]
        if not isinstance(below, dict):
            raise RecipeError(f"--set {override}: {parent} is not a table")
        given = below
    try:
        given[last] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"--set {override}: {_said(error)}") from None


def _said(error: Exception) -> str:
    return getattr(error, "problem", None) or str(error).splitlines()[0]


def _repeated(node: yaml.Node | None) -> Iterator[tuple[str, int]]:
    """Keys that stand twice in one table, of which YAML would silently take the last; each with its line."""
    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        if isinstance(node, yaml.MappingNode):
            keys = set()
            for key, below in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in keys:
                        yield key.value, key.start_mark.line + 1
                    keys.add(key.value)
                waiting.append(below)


def _explain(problem: Mapping[str, Any], node: yaml.Node | None, where: str, overrides: list[str]) -> tuple[str, str]:
    """One of pydantic's findings: the place (file:line and key), and what is wrong there and what to do."""
    path, grader = _keys_in(problem["loc"])
    message = str(problem["msg"]).removeprefix("Value error, ").replace("a valid tuple", "a list")
    own = problem["type"] == "value_error"  # a validator of ours: its message begins with the key
    line = _line(node, path + message.split()[0].rstrip(":,").split(".") if own else path)
    dotted = ".".join(str(part) for part in path)
    place = f"{where}:{line}" if line else where
    for override in overrides:
        key = override.partition("=")[0].strip()
        if dotted == key or dotted.startswith(key + "."):
            place = f"--set {override}"
    if problem["type"] == "extra_forbidden":
        return f"{place}: {_unknown_key(path, grader)}", ""
    if problem["type"] == "missing":
        return f"{place}: `{dotted}` is missing", ""
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        given = problem["input"].get("type") if isinstance(problem["input"], Mapping) else None
        known = [kind for kind in GRADERS if dotted == "grader" or kind != "multi"]
        return f"{place}: `{dotted}.type`", f"a grader is of type {', '.join(known)}" + (
            f" (it says {given!r})" if given is not None else ""
        )
    if problem["type"] == "literal_error":
        message = _nearest_value(message, problem["input"])
    shown = "" if isinstance(problem["input"], dict | BaseModel) else f" (it says {repr(problem['input'])[:80]})"
    return f"{place}: `{dotted}`" if dotted else place, f"{message}{shown}"


def _keys_in(location: Sequence[str | int]) -> tuple[list[str | int], type[Section] | None]:
    """The keys in pydantic's location, and the section of the grader that it lies in."""
    path: list[str | int] = []
    grader = None
    for place, part in enumerate(location):
        before = location[max(0, place - 2) : place]
        if part in GRADERS and (before[-1:] == ("grader",) or (len(before) == 2 and before[0] == "graders")):
            grader = GRADERS[str(part)]
        elif not _is_branch(part):
            path.append(part)
    return path, grader


def _is_branch(part: str | int) -> bool:
    """Whether a part of pydantic's location is no key but one of the types that a key may have."""
    return isinstance(part, str) and (
        part in ("str", "bool", "[key]") or part.startswith(("function-", "tuple[", "dict[", "literal["))
    )


def _nearest_value(message: str, given: Any) -> str:
    known = re.findall(r"'([^']+)'", message)
    near = difflib.get_close_matches(str(given), known, n=1)
    if not near:
        return message
    return f"did you mean {near[0]!r}?" if len(known) > 8 else f"{message}; did you mean {near[0]!r}?"


def _unknown_key(path: list[Any], grader: type[Section] | None) -> str:
    *parents, key = path
    section = grader if grader and (parents[-1:] == ["grader"] or parents[-2:-1] == ["graders"]) else _section(parents)
    inside = f" in `{'.'.join(map(str, parents))}`" if parents else ""
    if section is Train and key in RENAMED:
        return f"`{key}`{inside} is called `{RENAMED[key]}` here"
    if section is Fsdp and (why := FSDP_REFUSED.get(str(key).removeprefix("fsdp_"))):
        return f"`{key}`{inside} cannot be set: {why}"
    if section is Train and key in REFUSED:
        return f"`{key}`{inside} cannot be set: {REFUSED[key]}"
    known = _keys(section) if section else []
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.55)
    home = [name for name in Recipe.model_fields if (other := _section([name])) and key in _keys(other)]
    if near:
        hint = f"did you mean `{near[0]}`?"
    elif home:
        hint = f"it belongs in {' or '.join(f'`{name}`' for name in home)}"
    else:
        hint = f"known keys: {', '.join(known)}"
    return f"unknown key `{key}`{inside}; {hint}"


def _keys(section: type[Section]) -> list[str]:
    return [field.alias or name for name, field in section.model_fields.items()]


def _section(path: list[Any]) -> type[Section] | None:
    """The section class that a path of keys leads to."""
    found: Any = Recipe
    for part in path:
        field = found.model_fields.get(part) if isinstance(found, type) and issubclass(found, BaseModel) else None
        if field is None:
            return None
        kinds = (field.annotation, *typing.get_args(field.annotation))
        found = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
    return found if isinstance(found, type) else None


def _line(node: yaml.Node | None, path: list[Any]) -> int | None:
    """1-based line of the deepest part of `path` that stands in the YAML."""
    line = None
    for part in path:
        if isinstance(node, yaml.MappingNode):
            pair = next(((key, value) for key, value in node.value if key.value == str(part)), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line
