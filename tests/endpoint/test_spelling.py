"""Tokens as text and bytes, for the two families of vocabularies."""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tunewright.endpoint.spelling import Speller

EURO = "\N{EURO SIGN}"


def byte_level() -> Any:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["so a warm film was a warm one"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def sentencepiece() -> Any:
    """As Llama 2's: spaces are written as a letter, characters that are not known as one token for each byte."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "w", "\u2581a", "\u2581w"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: place for place, piece in enumerate(pieces)},
            merges=[("\u2581", "a"), ("\u2581", "w")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def test_a_token_keeps_the_space_before_it() -> None:
    for tokenizer in (byte_level(), sentencepiece()):
        speller = Speller(tokenizer)
        texts = [speller.spell(token)[0] for token in tokenizer("a a w", add_special_tokens=False).input_ids]
        assert "".join(texts).strip() == "a a w"
        assert " a" in texts


def test_parts_of_a_character_are_spelled_in_bytes() -> None:
    for tokenizer in (byte_level(), sentencepiece()):
        speller = Speller(tokenizer)
        ids = tokenizer(f"a{EURO}", add_special_tokens=False).input_ids
        spelled = [speller.spell(token) for token in ids[-3:]]
        assert spelled == [("bytes:\\xe2", [0xE2]), ("bytes:\\x82", [0x82]), ("bytes:\\xac", [0xAC])]
        assert bytes(byte for _, raw in spelled for byte in raw or []).decode() == EURO


def test_special_tokens_have_a_name() -> None:
    tokenizer = byte_level()
    assert Speller(tokenizer).spell(tokenizer.eos_token_id) == ("<|end|>", [*b"<|end|>"])
