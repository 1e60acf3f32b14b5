"""The packaged model as one GGUF file, for llama.cpp, Ollama and whoever else reads the format; and back again.

Weights are read and written one tensor at a time, so a file takes the memory of its largest tensor. What has one
dimension stays in float32, as does GPT-2's table of positions. `read_model` has Transformers read the file, which
shares no code with the writing here, and gives it the few facts of the header that it leaves aside.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunewright import gguf_header, models
from tunewright.chat import Equipment
from tunewright.errors import StageError
from tunewright.package.fidelity import Allowed

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

ALLOWED = {
    "f16": Allowed(largest_kl=1e-3, same_best_token=0.9, largest_weight_error=6e-4),
    "q8_0": Allowed(largest_kl=0.1, same_best_token=0.8, largest_weight_error=5e-3),
}
"""How far a file may be from the packaged model.

Weights are rounded to 11 bits in f16 (an error of 2^-11, 4.9e-4) and to half of a 127th of the largest of 32 in Q8_0
(3.9e-3, with its scale in f16 4.2e-3): what is within that is the same weight; two rows that changed places are not.

Logits were measured on 8 prompts with 16 tokens each. The starter and a Llama of 260,000 weights that writes stories:
f16 up to 3e-6 nats and the same best token everywhere, q8_0 up to 0.01 nats and another best token once in 128. Models
of random weights, where many tokens are nearly even: f16 2e-4 nats, q8_0 0.06 nats and another best token once in ten.
Keys in the wrong order for rotary positions cost 1 to 8 nats. The share leaves room for one even token where only one
row is held out."""

ROPE_FACTORS = "rope_freqs.weight"
"""Where GGUF has what rotary frequencies are divided by."""

LARGEST_F16 = 65504.0

IN_FLOAT32 = ("position_embd.weight",)
"""Matrices that are added, not multiplied: llama.cpp takes them in float32 alone."""

TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
"""GPT-2 keeps these with their inputs as rows; everybody else has the outputs there."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of the packaged model, and where it goes."""

    file: Path
    key: str
    """Its name there."""
    name: str
    """Its name in GGUF."""
    shape: tuple[int, ...]
    """As GGUF will have it, rows first."""
    type: GGMLQuantizationType
    heads: int | None
    """Of a matrix whose rows are paired up for rotary positions: how many heads they belong to."""

    @property
    def is_transposed(self) -> bool:
        return self.key.endswith(TRANSPOSED)


def write(folder: Path, path: Path, kind: Literal["f16", "q8_0"], equipment: Equipment, *, name: str) -> list[str]:
    """Write the model in `folder` (weights, config, tokenizer) to `path`.

    Returns:
        the tensors that were to be in Q8_0 and are in f16, because their rows do not divide into blocks.

    Raises:
        ModelError: it cannot be written as GGUF (`gguf_header.problems` says so beforehand).
        StageError: a weight does not fit.
    """
    from gguf import GGUFWriter, LlamaFileType
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    architecture = gguf_header.architecture(config, config.architectures[0])
    tensors = list(_tensors(folder, config, architecture, kind))
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    tokenizer = models.load_folder_tokenizer(folder)
    factors = gguf_header.rope_factors(config)
    rows = next(tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
    with contextlib.closing(GGUFWriter(fresh, architecture)) as writer:
        gguf_header.add(writer, config, architecture, tokenizer, equipment, rows=rows, name=name)
        writer.add_file_type(LlamaFileType.MOSTLY_F16 if kind == "f16" else LlamaFileType.MOSTLY_Q8_0)
        writer.add_quantization_version(2)
        if factors is not None:
            writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, _dtype(tensor), _size(tensor), raw_dtype=tensor.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for tensor in tensors:
            writer.write_tensor_data(_data(tensor))
    os.replace(fresh, path)
    return [tensor.name for tensor in tensors if kind == "q8_0" and tensor.type.name == "F16"]


def read_model(path: Path) -> Any:
    """The model in a file as Transformers reads it: in float32, in evaluation mode."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    said = GGUFReader(path)
    left_aside = {"qwen3": {"head_dim": "attention.key_length"}, "gpt2": {"n_positions": "context_length"}}
    architecture = said.fields["general.architecture"].contents()
    options = {
        key: said.fields[f"{architecture}.{field}"].contents()
        for key, field in left_aside.get(architecture, {}).items()
    }
    with models.quiet(), Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):  # a bar
        model = AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch.float32, local_files_only=True, **options
        )
    for tensor in said.tensors:
        if tensor.name == ROPE_FACTORS:
            rotary = model.model.rotary_emb
            rotary.inv_freq = rotary.inv_freq / torch.tensor(tensor.data)
    return model.eval()


def _tensors(folder: Path, config: Any, architecture: str, kind: str) -> Iterator[Tensor]:
    from gguf import MODEL_ARCH, GGMLQuantizationType, get_tensor_name_map
    from safetensors import safe_open

    names = get_tensor_name_map(MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    heads = {".attn_q.": config.num_attention_heads, ".attn_k.": getattr(config, "num_key_value_heads", None)}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for key in sorted(stored.keys()):
                name = names.get_name(key, try_suffixes=(".weight", ".bias"))
                if name is None:
                    raise StageError(f"{file.name}: GGUF has no name for the weights {key}; nothing was deployed")
                shape = tuple(stored.get_slice(key).get_shape())
                shape = shape[::-1] if key.endswith(TRANSPOSED) else shape
                held = GGMLQuantizationType.F16
                if len(shape) == 1 or name in IN_FLOAT32:
                    held = GGMLQuantizationType.F32
                elif kind == "q8_0" and not gguf_header.is_narrow(shape):
                    held = GGMLQuantizationType.Q8_0
                paired = next((count for part, count in heads.items() if part in name), None)
                yield Tensor(file, key, name, shape, held, paired if architecture == "llama" else None)


def _dtype(tensor: Tensor) -> Any:
    import numpy as np

    return np.dtype(np.float16 if tensor.type.name == "F16" else np.float32)


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor in the file."""
    import math

    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[tensor.type]
    return math.prod(tensor.shape) // block * size


def _data(tensor: Tensor) -> Any:
    """A tensor's values as they stand in the file."""
    import numpy as np
    from gguf.quants import quantize
    from safetensors import safe_open

    with safe_open(tensor.file, "pt") as stored:
        values = stored.get_tensor(tensor.key).float().numpy()
    if tensor.is_transposed:
        values = np.ascontiguousarray(values.T)
    if tensor.heads is not None:
        values = _interleaved(values, tensor.heads)
    if tensor.type.name != "F32" and not np.abs(values).max() <= LARGEST_F16:
        raise StageError(
            f"{tensor.key} holds {np.abs(values).max():.3g}, and 16 bits hold no more than {LARGEST_F16:.0f}; "
            "nothing was deployed. Leave the GGUF formats out of package.formats"
        )
    return quantize(values, tensor.type)


def _interleaved(values: Any, heads: int) -> Any:
    """The rows of each head in the order in which llama.cpp turns them.

    Rotary positions turn pairs of rows. Transformers pairs row i of a head with row i + width / 2, llama.cpp's Llama
    pairs neighbours: rows 0, 1, 2, 3, 4, 5 become 0, 3, 1, 4, 2, 5.
    """
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)
