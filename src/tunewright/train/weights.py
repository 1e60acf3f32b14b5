"""The weights that are trained, and how they are written: all of the base's, or an adapter's."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright import chat, models
from tunewright.chat import Equipment
from tunewright.errors import RecipeError
from tunewright.generate import savable
from tunewright.models import ModelRef
from tunewright.run import Run
from tunewright.train.frozen import freeze


@dataclass(frozen=True)
class Base:
    """What every method begins with: the base that was resolved, its tokenizer, and where it trains."""

    ref: ModelRef
    tokenizer: Any
    equipment: Equipment
    device: str

    @classmethod
    def of(cls, run: Run) -> Base:
        resolved = run.resolved()
        ref = ModelRef.from_dict(resolved["model"])
        tokenizer = models.load_tokenizer(ref)
        return cls(ref, tokenizer, chat.equip(tokenizer), resolved["device"])


def trainable(run: Run, base: Base) -> Any:
    """The base's weights, or the base with an adapter, a fresh one or an earlier run's; room made for tokens that the
    base lacks.

    Raises:
        RecipeError: the adapter does not fit this base.
    """
    train, tokenizer, equipment = run.recipe().train, base.tokenizer, base.equipment
    device = "cpu" if train.fsdp else base.device  # a shard moves on from there, layer by layer
    model = models.load_in_4_bits(base.ref) if run.method == "qlora" else models.load_model(base.ref, device=device)
    models.grow(model, len(tokenizer))
    if train.frozen_layers:
        if equipment.added_tokens:
            raise RecipeError(
                f"train.frozen_layers: the base has no token {equipment.added_tokens[0]} yet, and a frozen embedding "
                "cannot learn it; leave frozen_layers out"
            )
        freeze(model, train.frozen_layers)
    if run.method == "full":
        return model.train()
    if train.adapter is not None:
        return _earlier(model, models.find_adapter(train.adapter)).train()
    from peft import LoraConfig, get_peft_model

    lora = train.lora
    named = [lora.target_modules] if isinstance(lora.target_modules, str) else list(lora.target_modules)
    targets = "all-linear" if named == ["all-linear"] else named  # any other string PEFT would take as a pattern
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        exclude_modules=_below(train.frozen_layers),
        fan_in_fan_out=False,
        trainable_token_indices=_new_rows(model, tokenizer.convert_tokens_to_ids(equipment.added_tokens)),
    )
    try:
        with models.quiet():
            return get_peft_model(model, config).train()
    except ValueError as error:
        raise RecipeError(f"train.lora: {error}") from error


def write_weights(model: Any, folder: Path, state_dict: dict[str, Any] | None = None) -> None:
    """The weights that were trained: an adapter, or a whole model."""
    # Asked to decide for itself, PEFT looks the base up on the hub at every checkpoint. The rows of new tokens are the
    # adapter's own; the embeddings are the base's.
    adapter = hasattr(model, "peft_config")
    options: dict[str, Any] = {"save_embedding_layers": False} if adapter else {}
    if state_dict is not None:  # gathered from the processes that each hold a part
        options["state_dict"] = state_dict
    if not adapter:
        model.generation_config = savable(model.generation_config)
    with models.quiet():
        model.save_pretrained(str(folder), **options)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's own empty card; ours is package/card.md


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _below(layers: int) -> str | None:
    """A pattern of the modules in the lowest layers."""
    return rf".*\.({'|'.join(map(str, range(layers)))})\..*" if layers else None


def _earlier(model: Any, adapter: Path) -> Any:
    from peft import PeftModel
    from safetensors import safe_open

    try:
        with models.quiet():
            loaded = PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    except (ValueError, RuntimeError, OSError) as error:
        said = str(error).splitlines()[0]
        raise RecipeError(f"train.adapter: {adapter} does not fit this base: {said}") from error
    with safe_open(str(adapter / "adapter_model.safetensors"), "pt") as file:
        stored = len(file.keys())
    trained = sum(weight.requires_grad for weight in loaded.parameters())
    if stored != trained:
        raise RecipeError(
            f"train.adapter: {adapter} holds {stored} matrices and {trained} of them have a place in this base; it was "
            "made for another"
        )
    return loaded


def _new_rows(model: Any, tokens: list[int]) -> dict[str, list[int]] | None:
    """The embedding's rows that an adapter trains along with itself, and those of an output layer of its own."""
    if not tokens:
        return None
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name.rpartition(".")[2] for name, module in model.named_modules() if module in ends]
    return dict.fromkeys(names[:1] if ends[0].weight is ends[1].weight else names, tokens)
