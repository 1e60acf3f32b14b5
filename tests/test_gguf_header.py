"""What cannot be written as GGUF is said by `check`, before anything is trained."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.trainers import BpeTrainer, WordLevelTrainer
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen3Config,
)

from tunewright import chat, gguf_header, life, models
from tunewright import recipe as recipes
from tunewright.backends.base import Problem
from tunewright.testing import WORDS, tiny_data, tiny_model

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
TEXTS = [*(" ".join(words) for words in WORDS.values()), "12 345 6789 they'll isn't\n\n  x  (a.b)"]


def based_on(folder: Path, config: Any) -> Path:
    """tiny_model's tokenizer with another model."""
    tiny_model(folder)
    (folder / "model.safetensors").unlink()
    with models.quiet():
        AutoModelForCausalLM.from_config(config).save_pretrained(str(folder))
    return folder


def with_tokenizer(folder: Path, tokenizer: Any) -> Path:
    tiny_model(folder)
    tokenizer.save_pretrained(str(folder))
    return folder


def said(model: Path, *formats: str) -> list[Problem]:
    given = {
        "name": "kindness",
        "model": str(model),
        "task": "classification",
        "data": tiny_data(model.parent / "data", train=8, test=4),
        "package": {"formats": ["safetensors", *formats]},
        "backend": {"kind": "local"},
    }
    return life.check(recipes.loads(yaml.safe_dump(given)), inspect=False).problems


def byte_level(
    *, split: str | None = None, normalizer: Any = None, prefix: bool = False, ignore_merges: bool = False
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=split is None)
    tokenizer.pre_tokenizer = (
        level if split is None else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), level])  # type: ignore[list-item]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, BpeTrainer(vocab_size=300, special_tokens=["<|eos|>"], initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eos|>")


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES),
        MistralConfig(**SIZES, sliding_window=256),
        Qwen2Config(**SIZES),
        Qwen3Config(**SIZES),
        GPT2Config(vocab_size=300, n_positions=256, n_embd=32, n_layer=1, n_head=2),
    ],
    ids=lambda config: config.model_type,
)
def test_what_can_be_written_passes(config: Any, tmp_path: Path) -> None:
    assert said(based_on(tmp_path / "model", config), "gguf-f16", "gguf-q8_0") == []


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (
            GPTNeoXConfig(**{key: value for key, value in SIZES.items() if key != "num_key_value_heads"}),
            r"GPTNeoXForCausalLM cannot be written as GGUF \(those that can: LlamaForCausalLM, .*GPT2LMHeadModel\)",
        ),
        (LlamaConfig(**SIZES, attention_bias=True), "attention_bias: True, and GGUF's readers take False for llama"),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "hidden_act: gelu"),
        (MistralConfig(**SIZES, sliding_window=64), "sliding_window: 64"),
        (
            Qwen2Config(**SIZES, rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0}),
            r"rope scaling \(yarn\), which is not written as GGUF for qwen2",
        ),
    ],
    ids=["architecture", "bias", "activation", "window", "rope"],
)
def test_a_model_that_cannot_be_written_is_an_error(config: Any, why: str, tmp_path: Path) -> None:
    folder = based_on(tmp_path / "model", config)
    (problem,) = said(folder, "gguf-q8_0")
    assert problem.severity == "error"
    assert problem.message.startswith("package.formats: gguf-q8_0: ")
    assert problem.message.endswith("; leave it out, or take another base")
    assert re.search(why, problem.message), problem.message
    assert said(folder) == []


def test_matrices_that_q8_0_cannot_hold_are_named(tmp_path: Path) -> None:
    folder = based_on(tmp_path / "model", LlamaConfig(**SIZES | {"intermediate_size": 72, "num_hidden_layers": 3}))
    (problem,) = said(folder, "gguf-q8_0")
    assert problem.severity == "warning"
    assert problem.message == (
        "package.formats: gguf-q8_0 keeps model.layers.0.mlp.down_proj.weight and 2 more in f16: its rows are no "
        "multiple of 32 wide"
    )
    assert said(folder, "gguf-f16") == []


# --- tokenizers ---


@pytest.mark.parametrize("split", gguf_header.SPLITS)
def test_llama_3s_and_qwens_ways_of_splitting_are_known(split: str, tmp_path: Path) -> None:
    name = gguf_header.SPLITS[split]
    tokenizer = byte_level(split=split, ignore_merges=name == "llama-bpe", normalizer=normalizers.NFC())
    chat.equip(tokenizer)
    assert gguf_header.vocabulary(tokenizer, 300).split == name
    assert said(with_tokenizer(tmp_path / "model", tokenizer), "gguf-f16") == []


def test_qwens_own_tokenizer_is_known() -> None:
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "lo"]
    tokenizer = Qwen2Tokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[("l", "o")])
    assert gguf_header.vocabulary(tokenizer, len(tokenizer)).split == "qwen2"


def words() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXTS, WordLevelTrainer(special_tokens=["<|eos|>", "<unk>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eos|>", unk_token="<unk>")


def greedy_space() -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken("<mask>", lstrip=True)]})
    return tokenizer


def foreign_letters() -> PreTrainedTokenizerFast:
    """Transformers' reader takes a special token for text where it has a character that bytes are not written with."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<\uff5cuser\uff5c>"]})
    return tokenizer


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (words, "not byte-level BPE"),
        (lambda: byte_level(normalizer=normalizers.Lowercase()), r"changes text before it splits it \(Lowercase\)"),
        (lambda: byte_level(prefix=True), "puts a space before every text"),
        (lambda: byte_level(split=r"\w+|\W+"), "in a way that GGUF has no name for here"),
        (lambda: byte_level(ignore_merges=True), "in a way that GGUF has no name for here"),
        (greedy_space, "'<mask>' takes in the spaces beside it"),
        (foreign_letters, "when Transformers has it from the file"),
    ],
    ids=["words", "lower case", "prefix", "split", "whole words", "spaces", "letters"],
)
def test_a_tokenizer_that_cannot_be_written_is_an_error(
    make: Callable[[], PreTrainedTokenizerFast], why: str, tmp_path: Path
) -> None:
    (problem,) = said(with_tokenizer(tmp_path / "model", make()), "gguf-f16")
    assert problem.severity == "error"
    assert re.search(why, problem.message), problem.message


def test_weights_behind_an_api_cannot_be_written() -> None:
    ref = models.ModelRef("gpt-4.1", "o200k_base", "hosted", None, "", None, 0, 0)
    given = {"name": "x", "model": "gpt-4.1", "task": "chat", "data": {"train": "rows.jsonl"}}
    asked = recipes.loads(yaml.safe_dump(given | {"package": {"formats": ["gguf-f16"]}}))
    (problem,) = gguf_header.problems(asked, ref, None, None)  # type: ignore[arg-type]
    assert problem == ("package.formats: gguf-f16 needs the weights, which stay behind the API; leave it out", "error")
    assert gguf_header.problems(recipes.loads(yaml.safe_dump(given)), ref, None, None) == []  # type: ignore[arg-type]
