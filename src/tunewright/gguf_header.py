"""What a GGUF file says of a model before its weights: sizes, tokenizer, chat template; and whether it can be said.

GGUF is the one-file form that llama.cpp, Ollama and others load. A file names an architecture and a way of splitting
text that its readers have built in, so not every model can be written. `problems` finds out without weights: it writes
the header alone, has Transformers read the tokenizer back, and compares ids.

What is covered: Llama, Mistral, Qwen2, Qwen3 and GPT-2, with byte-level BPE split as GPT-2, Llama 3 or Qwen2 do.
Rotary positions may be scaled as Llama 3.1 does, or linearly, for Llama and Mistral.
What is not covered: SentencePiece vocabularies, other rope scaling, sliding windows, mixtures of experts. A tokenizer
that puts text into NFC first (Qwen's) is written without that step, which no reader of the format takes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tunewright import models
from tunewright.chat import Equipment
from tunewright.errors import ModelError
from tunewright.models import ModelRef
from tunewright.recipe import Recipe

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GPT2LMHeadModel": "gpt2",
}
"""Transformers' class, and what GGUF calls it."""

EXPECTED: dict[str, dict[str, Any]] = {
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    "qwen2": {"hidden_act": "silu"},
    "qwen3": {"hidden_act": "silu", "attention_bias": False},
    "gpt2": {
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
}
"""What the readers take for granted of an architecture, since the file has no key for it."""

SCALED = ("default", "linear", "llama3")
"""Kinds of rope scaling that come down to a factor for each frequency."""

BLOCK = 32
"""Weights of a row that share a scale in Q8_0."""

GPT2_SPLIT = "gpt-2"
SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}
"""The pattern that a tokenizer splits text by, and what `tokenizer.ggml.pre` calls it."""

WHOLE_WORDS_FIRST = ("llama-bpe",)
"""Those whose readers look a word up as a whole before they merge its parts."""

PROBES = (
    "Hello, world! It's 2026, isn't it? They'LL see.",
    "  two  spaces,\ttabs\n\nand   lines \r\n end ",
    "1 12 123 1234 12345678 3.14159 -7e10",
    "na\u00efve caf\u00e9 \u2014 \u4f60\u597d\u4e16\u754c \U0001f642 \u00fcber \u2713 \u0627\u0644\u0639",
    "def f(x):\n    return {'a': [x**2, \"b\"]}  # ok\n",
    "internationalization unbelievableness aaaaaaaaaa ____ ====",
)
"""Texts that tell tokenizers apart; each special token is tried besides."""

Said = tuple[str, Literal["error", "warning"]]


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE tokenizer as GGUF has it."""

    split: str
    tokens: list[str]
    types: list[int]
    merges: list[str]


def formats(recipe: Recipe) -> dict[str, Literal["f16", "q8_0"]]:
    """The recipe's GGUF formats, and the type of each one's weights."""
    kinds: dict[str, Literal["f16", "q8_0"]] = {"gguf-f16": "f16", "gguf-q8_0": "q8_0"}
    return {name: kind for name, kind in kinds.items() if name in recipe.package.formats}


def problems(recipe: Recipe, ref: ModelRef, tokenizer: Any, equipment: Equipment) -> list[Said]:
    """Why the recipe's GGUF formats cannot be written for this base, and what of them will be otherwise than named.

    `tokenizer` has been equipped.
    """
    asked = formats(recipe)
    if not asked:
        return []
    key = f"package.formats: {', '.join(asked)}"
    if ref.kind == "hosted":
        return [(f"{key} needs the weights, which stay behind the API; leave it out", "error")]
    try:
        bare = models.skeleton(ref)
        models.grow(bare, len(tokenizer))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "header.gguf"
            _write_alone(path, bare, tokenizer, equipment)
            _compare(tokenizer, read_tokenizer(path))
    except ModelError as error:
        return [(f"{key}: {error}; leave it out, or take another base", "error")]
    narrow = [name for name, weight in bare.named_parameters() if is_narrow(tuple(weight.shape))]
    if not narrow or "gguf-q8_0" not in asked:
        return []
    more = f" and {len(narrow) - 1} more" if len(narrow) > 1 else ""
    return [
        (
            f"package.formats: gguf-q8_0 keeps {narrow[0]}{more} in f16: its rows are no multiple of {BLOCK} wide",
            "warning",
        )
    ]


def is_narrow(shape: tuple[int, ...]) -> bool:
    """Whether a matrix's rows do not divide into blocks, so that Q8_0 cannot hold them."""
    return len(shape) > 1 and shape[-1] % BLOCK != 0


def architecture(config: Any, name: str) -> str:
    """What GGUF calls the architecture of a model of class `name`.

    Raises:
        ModelError: it has none that we write, or the config asks for what its readers do not do.
    """
    if name not in ARCHITECTURES:
        raise ModelError(f"{name} cannot be written as GGUF (those that can: {', '.join(ARCHITECTURES)})")
    found = ARCHITECTURES[name]
    for key, expected in EXPECTED[found].items():
        if (given := getattr(config, key, expected)) != expected:
            raise ModelError(f"its config has {key}: {given}, and GGUF's readers take {expected} for {found}")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise ModelError(f"its config has sliding_window: {window}, which GGUF's readers do not do for {found}")
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in (SCALED if found == "llama" else ("default",)) or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"its config has rope scaling ({kind}), which is not written as GGUF for {found}")
    return found


def rope_factors(config: Any) -> Any | None:
    """What each rotary frequency is divided by (float32), None where positions are not scaled."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = getattr(config, "rope_parameters", None) or {"rope_type": "default"}
    if rope["rope_type"] == "default":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    scaled = scaled.double().numpy()
    plain = float(rope["rope_theta"]) ** -(np.arange(len(scaled)) / len(scaled))
    return (plain / scaled).astype(np.float32)


def add(
    writer: GGUFWriter, config: Any, architecture: str, tokenizer: Any, equipment: Equipment, *, rows: int, name: str
) -> None:
    """Put all that a reader needs besides the weights into a file.

    Args:
        rows: rows of the embedding; where the tokenizer has fewer tokens, unused ones fill up.

    Raises:
        ModelError: the tokenizer cannot be written.
    """
    words = vocabulary(tokenizer, rows)
    # Transformers takes this one name for an architecture.
    writer.add_name("mistral-tuned" if name == "mistral" else name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if architecture == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(width)
        writer.add_value_length(width)
        writer.add_rope_dimension_count(width)
        writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.split)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges(words.merges)
    begins, ends = _frame(tokenizer)
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(ends)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_eot_token_id(equipment.end_of_turn_id)
    writer.add_pad_token_id(equipment.pad_id)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """The tokenizer as GGUF has it, filled up to as many tokens as the embedding has rows.

    Raises:
        ModelError: it is of a kind that is not written.
    """
    from gguf import TokenType

    if not tokenizer.is_fast:
        raise ModelError("its tokenizer is not one of the `tokenizers` library")
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    split = _split(described)
    tokens, types = [f"[PAD{number}]" for number in range(rows)], [int(TokenType.UNUSED)] * rows
    known = tokenizer.get_vocab()
    if (last := max(known.values())) >= rows:
        raise ModelError(f"its tokenizer has a token {last}, and its embedding ends at {rows - 1}")
    for token, number in known.items():
        tokens[number], types[number] = token, int(TokenType.NORMAL)
    for number, token in tokenizer.added_tokens_decoder.items():
        if token.lstrip or token.rstrip or token.single_word:
            raise ModelError(f"its token {token.content!r} takes in the spaces beside it, which GGUF cannot say")
        types[number] = int(TokenType.CONTROL if token.special else TokenType.USER_DEFINED)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in described["model"]["merges"]]
    if not merges:
        raise ModelError("its tokenizer has bytes alone and no merges, which GGUF's readers do not expect")
    return Vocabulary(split, tokens, types, merges)


def read_tokenizer(path: Path) -> Any:
    """The tokenizer in a file, as Transformers reads it."""
    from transformers import PreTrainedTokenizerFast

    with models.quiet():
        return PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)


def _split(described: dict[str, Any]) -> str:
    """What `tokenizer.ggml.pre` calls the way in which a tokenizer (its tokenizer.json) splits text."""
    model, normalizer = described["model"], described["normalizer"]
    steps = described["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    if model["type"] != "BPE" or model.get("byte_fallback") or steps[-1].get("type") != "ByteLevel":
        raise ModelError("its tokenizer is not byte-level BPE, the one kind that is written as GGUF")
    if normalizer is not None and normalizer["type"] != "NFC":
        raise ModelError(
            f"its tokenizer changes text before it splits it ({normalizer['type']}), GGUF's readers do not"
        )
    if steps[-1]["add_prefix_space"]:
        raise ModelError("its tokenizer puts a space before every text, which GGUF cannot say of byte-level BPE")
    first, found = steps[0], None
    if len(steps) == 1 and first.get("use_regex", True):
        found = GPT2_SPLIT
    elif len(steps) == 2 and first["type"] == "Split" and (first["behavior"], first["invert"]) == ("Isolated", False):
        found = SPLITS.get(first["pattern"].get("Regex", ""))
    if found is not None and (found in WHOLE_WORDS_FIRST) == bool(model.get("ignore_merges")):
        return found
    raise ModelError("its tokenizer splits text in a way that GGUF has no name for here (GPT-2's, Llama 3's, Qwen2's)")


def _frame(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer itself begins a text with the bos token, and ends it with the eos token."""
    ids = tokenizer("a").input_ids
    return ids[:1] == [tokenizer.bos_token_id], ids[-1:] == [tokenizer.eos_token_id]


def _write_alone(path: Path, bare: Any, tokenizer: Any, equipment: Equipment) -> None:
    """A file with the header and no weights."""
    from gguf import GGUFWriter

    name = architecture(bare.config, type(bare).__name__)
    writer = GGUFWriter(path, name)
    rows = bare.get_input_embeddings().weight.shape[0]
    add(writer, bare.config, name, tokenizer, equipment, rows=rows, name="header")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _compare(tokenizer: Any, read: Any) -> None:
    """Refuse a tokenizer that comes out of a file other than it went in."""
    for text in (*PROBES, *_around(tokenizer)):
        one, other = (each(text, add_special_tokens=False).input_ids for each in (tokenizer, read))
        if one != other:
            raise ModelError(
                f"its tokenizer reads {text!r} as {one[:8]}, and as {other[:8]} when Transformers has it from the file"
            )


def _around(tokenizer: Any) -> Iterator[str]:
    """Texts with a special token in their midst."""
    for token in tokenizer.added_tokens_decoder.values():
        yield f"a {token.content} b{token.content}\nc"
