"""The base model: what it is (without loading it), its tokenizer, its weights.

Heavy libraries are imported inside functions: describing a model reads its config alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tunewright import hosted_tokens, starter
from tunewright.errors import ModelError

DEFAULT_MAX_LENGTH = 1024
"""Longest example in tokens where neither the recipe nor the model's context says less."""


@dataclass(frozen=True)
class ModelRef:
    """A base model, found and described; enough to load the very same one again."""

    name: str
    """As the recipe names it."""
    source: str
    """What is loaded: a hub name or an absolute folder."""
    kind: Literal["hub", "folder", "starter", "hosted"]
    """hosted: the weights are behind an API, and `source` is what it counts tokens by."""
    revision: str | None
    """The hub's commit, so that later stages and a resumed run load the same weights."""
    architecture: str
    context: int | None
    """Longest sequence in tokens; None where the config does not say."""
    vocab_size: int
    parameters: int
    """Number of weights, counted from the config; 0 where nobody says."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> ModelRef:
        """As `to_dict` gave it, on this machine or another: the starter is where this one has it."""
        here = {"source": str(starter.model_path())} if given["kind"] == "starter" else {}
        return cls(**{key: (given | here)[key] for key in cls.__dataclass_fields__})

    def max_length(self, asked: int | None) -> int:
        """The longest example to train on.

        Raises:
            ModelError: more is asked for than the model's context holds.
        """
        if asked is not None and self.context is not None and asked > self.context:
            raise ModelError(
                f"train.max_length is {asked}, but {self.name} holds {self.context} tokens; "
                f"set train.max_length to {self.context} or less"
            )
        return asked or min(self.context or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)


def find(name: str, revision: str | None = None) -> ModelRef:
    """Look a base model up and describe it from its config, without loading weights.

    Raises:
        ModelError: there is no such model, the hub cannot be reached, or it is not a causal language model.
    """
    source, kind = _locate(name)
    if revision is not None and kind != "hub":
        raise ModelError(f"model {name}: revision {revision!r} is for models of the hub, and this is a folder")
    config = _from_pretrained("AutoConfig", source, name, revision=revision if kind == "hub" else None)
    if kind != "hub" and not any(Path(source).glob("model*.safetensors")):
        raise ModelError(f"model {name}: the folder {source} holds no *.safetensors weights")
    model = _skeleton(config, name)
    return ModelRef(
        name=name,
        source=source,
        kind=kind,
        revision=_commit(source, revision) if kind == "hub" else None,
        architecture=type(model).__name__,
        context=getattr(config.get_text_config(), "max_position_embeddings", None),
        vocab_size=config.get_text_config().vocab_size,
        parameters=sum(weight.numel() for weight in model.parameters()),
    )


def skeleton(ref: ModelRef) -> Any:
    """The base's modules without weights (on torch's `meta` device)."""
    return _skeleton(_from_pretrained("AutoConfig", ref.source, ref.name, revision=ref.revision), ref.name)


def load_tokenizer(ref: ModelRef) -> Any:
    """The base's tokenizer, as published (see `chat.equip` for what it may lack).

    Raises:
        ModelError: the base has none.
    """
    if ref.kind == "hosted":
        if hosted_tokens.is_encoding(ref.source):
            return hosted_tokens.tokenizer(ref.source)
        place = str(starter.model_path()) if ref.source == "starter" else ref.source
        return _from_pretrained("AutoTokenizer", place, ref.source)
    return _from_pretrained("AutoTokenizer", ref.source, ref.name, revision=ref.revision)


def load_model(ref: ModelRef, *, device: str = "cpu") -> Any:
    """The base's weights in float32 on `device`, in evaluation mode.

    Raises:
        ModelError: the weights cannot be read, do not fit the config, or some are missing.
    """
    import torch

    options = {"revision": ref.revision, "dtype": torch.float32, "output_loading_info": True}
    model, info = _from_pretrained("AutoModelForCausalLM", ref.source, ref.name, **options)
    if missing := sorted(info["missing_keys"]):  # Transformers would go on with random ones
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"model {ref.name}: the weights lack {missing[0]}{more}; they are not those of the config")
    return model.to(device).eval()


def find_adapter(name: str) -> Path:
    """The folder of an adapter that is named by itself or by the run that trained it.

    Raises:
        ModelError: there is no adapter.
    """
    given = Path(name).expanduser()
    for folder in (given, given / "train" / "adapter", given / "package" / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return folder.absolute()
    raise ModelError(f"train.adapter: {name} is neither an adapter (adapter_config.json) nor the run of one")


def load_in_4_bits(ref: ModelRef) -> Any:
    """The base's weights in 4 bits on the GPU (NF4, double quantisation: Dettmers et al., 2023, arXiv:2305.14314),
    ready to be trained through.

    Raises:
        ModelError: as `load_model`.
    """
    import torch
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16,
    )
    options = {"revision": ref.revision, "quantization_config": config, "device_map": {"": 0}}
    model = _from_pretrained("AutoModelForCausalLM", ref.source, ref.name, **options)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def load_folder(folder: Path, *, device: str = "cpu") -> Any:
    """Weights that training or packaging wrote, in float32, in evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True)
    return model.to(device).eval()


def load_folder_tokenizer(folder: Path) -> Any:
    """Raises:
    ModelError: its files are damaged.
    OSError, ValueError: as Transformers has it, where there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        # The Rust tokenizer has no class of its own for a file that it cannot read.
        if type(error) is not Exception and not isinstance(error, json.JSONDecodeError):
            raise
        raise ModelError(f"{folder}: its tokenizer cannot be read: {error}") from error


def grow(model: Any, vocab_size: int) -> None:
    """Make room in the embeddings for tokens that were added to the tokenizer; never shrinks."""
    if model.get_input_embeddings().weight.shape[0] < vocab_size:
        with quiet():
            model.resize_token_embeddings(vocab_size, mean_resizing=False)


def layers_of(model: Any) -> Any | None:
    """The decoder's layers, the lowest first; None where an architecture has no list of them that is known."""
    decoder = model.get_decoder()
    return next((getattr(decoder, name) for name in ("layers", "h") if hasattr(decoder, name)), None)


def merge(model: Any, adapter: Path) -> Any:
    """The base with a LoRA adapter merged into its weights (consumes `model`)."""
    from peft import PeftModel

    with quiet():
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return merged.eval()


def best_device(*, use_cpu: bool = False) -> str:
    """cuda, mps or cpu: the best that torch finds here."""
    import torch

    if use_cpu:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and notices of loading out of the way of ours."""
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    level = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _locate(name: str) -> tuple[str, Literal["hub", "folder", "starter"]]:
    if name == "starter":
        if not (starter.model_path() / "config.json").is_file():
            raise ModelError("model starter: it is not part of this installation; make it with scripts/make_starter.py")
        return str(starter.model_path()), "starter"
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return str(folder.absolute()), "folder"
    if folder.is_dir():
        raise ModelError(f"model {name}: the folder holds no config.json, so it is not a model")
    if folder.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1:
        raise ModelError(f"model {name}: no such folder")
    return name, "hub"


def _skeleton(config: Any, name: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"), quiet():
            return AutoModelForCausalLM.from_config(config)
    except ValueError:
        raise ModelError(
            f"model {name}: {config.model_type} is not a causal language model that can be tuned"
        ) from None


def _commit(name: str, revision: str | None) -> str | None:
    """The commit that the config in the hub's cache, where it was just read from, is of."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(path).parent.name if isinstance(path, str) else revision


def _from_pretrained(kind: str, source: str, name: str, **options: Any) -> Any:
    """`transformers.<kind>.from_pretrained`, with the hub's failures explained."""
    import transformers
    from huggingface_hub import constants
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        with quiet():
            # False, or a repository with code of its own has a person asked on the terminal whether to run it.
            return getattr(transformers, kind).from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" not in str(error):
            raise
        said = textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__
        if "ignore_mismatched_sizes" in str(error):
            said = "its weights do not have the sizes that its config says"
        if Path(source).is_dir():
            raise ModelError(f"model {name}: cannot be read from {source}: {said}") from error
        if "is not a valid git identifier" in str(error):
            raise ModelError(f"model {name}: the hub has no revision {options.get('revision')!r} of it") from error
        absent = "is not a local folder and is not a valid model identifier" in str(error)
        raise ModelError(
            f"model {name}: no folder of that name here, and the hub at {constants.ENDPOINT} "
            + ("has no such model; check the name, or give a folder" if absent else f"did not give it: {said}")
        ) from error
