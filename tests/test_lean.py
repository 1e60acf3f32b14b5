"""Leaner arithmetic is the same arithmetic."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import NewGELUActivation

from tunewright import lean, models

SMALL: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def model_of(kind: str, *, lora: dict[str, Any] | None = None) -> Any:
    torch.manual_seed(0)
    more: dict[str, Any] = {"intermediate_size": 48}
    if kind == "gpt2":
        more = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    more["tie_word_embeddings"] = True
    config = AutoConfig.for_model(kind, bos_token_id=1, eos_token_id=2, **SMALL | more)
    model = AutoModelForCausalLM.from_config(config)
    if lora is None:
        return model
    with models.quiet():
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **lora))
    with torch.no_grad():  # a fresh adapter adds nothing; one that has learnt does
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return model


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    logits = model(input_ids=ids, use_cache=False).logits
    functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize(
    ("kind", "lora", "ways"),
    [
        ("gpt2", None, ["fused gelu"]),
        ("gpt2", {"r": 4}, ["fused gelu", "lean lora"]),
        ("llama", {"r": 4, "lora_alpha": 7}, ["lean lora"]),
        ("llama", {"r": 4, "lora_dropout": 0.1}, []),
        ("llama", {"r": 4, "use_dora": True}, []),
        ("llama", None, []),
    ],
)
def test_logits_and_gradients_are_the_plain_ones(kind: str, lora: dict[str, Any] | None, ways: list[str]) -> None:
    plain = model_of(kind, lora=lora).double().eval()
    slim = copy.deepcopy(plain)
    assert lean.slim(slim, 61) == ways
    ids = torch.randint(61, (1, 20), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(slim(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-9, atol=1e-9)
    theirs = gradients(plain, ids)
    ours = gradients(slim, ids)
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-7, atol=1e-9)


def test_what_is_not_the_same_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean, "GELUTanh", torch.nn.ReLU)
    model = model_of("gpt2").eval()
    ids = torch.arange(10)[None]
    before = model(input_ids=ids).logits
    assert lean.slim(model, 61) == []
    assert torch.equal(model(input_ids=ids).logits, before)
    assert isinstance(model.transformer.h[0].mlp.act, NewGELUActivation)


def test_an_adapter_that_is_switched_off_stays_off() -> None:
    model = model_of("llama", lora={"r": 4}).eval()
    lean.slim(model, 61)
    ids = torch.arange(10)[None]
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(input_ids=ids).logits, model_of("llama").eval()(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_frozen_weights_in_half_give_the_numbers_of_autocast_bit_for_bit(kind: str) -> None:
    whole = model_of(kind, lora={"r": 4}).train()
    half = copy.deepcopy(whole)
    lean.halve_frozen(half)
    kept = [weight.dtype for name, weight in half.named_parameters() if "base_layer.weight" in name]
    assert set(kept) == {torch.bfloat16}
    assert all(weight.dtype == torch.float32 for weight in half.parameters() if weight.requires_grad)
    ids = torch.arange(20)[None]
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = gradients(half, ids), gradients(whole, ids)
    for name, grad in ours.items():
        assert torch.equal(grad, theirs[name]), name


def test_embeddings_stay_whole_where_the_output_layer_shares_them() -> None:
    """An adapter that learns a new token wraps both ends, so that neither is the plain layer that it was."""
    model = model_of("llama", lora={"r": 4, "trainable_token_indices": {"embed_tokens": [60]}})
    lean.halve_frozen(model)
    ends = {name: weight.dtype for name, weight in model.named_parameters() if "embed" in name or "lm_head" in name}
    assert set(ends.values()) == {torch.float32}, ends
