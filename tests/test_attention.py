"""Attention inside each example of a batch laid end to end, on many architectures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tunewright import attention
from tunewright.train.assembling import Row, assemble
from tunewright.train.steps import settle

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
ARCHITECTURES: dict[str, tuple[dict[str, Any], str]] = {
    "llama": (GROUPED, "flat"),
    "qwen2": (GROUPED, "flat"),
    "qwen3": (GROUPED, "flat"),
    "mistral": (GROUPED | {"sliding_window": 6}, "flat"),
    "olmo2": (GROUPED, "flat"),
    "gpt2": ({}, "flat"),
    "gpt_neox": ({"intermediate_size": 48}, "flat"),
    "phi": ({"intermediate_size": 48}, "flat"),
    # Soft caps, biases by distance and states are not for this attention: these are padded. Capped logits, and a loss
    # that the routers add, are not for this loss either.
    "gemma2": (GROUPED | {"sliding_window": 6}, "plain"),
    "mixtral": (GROUPED | {"output_router_logits": True, "num_local_experts": 2}, "plain"),
    "bloom": ({}, "padded"),
    "mamba": ({"state_size": 4}, "padded"),
}


def model_of(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL | ARCHITECTURES.get(kind, ({}, ""))[0] | more)
    return AutoModelForCausalLM.from_config(config).train()


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
@pytest.mark.filterwarnings("ignore")
def test_each_architecture_trains_by_the_leanest_layout_that_gives_its_own_loss(kind: str) -> None:
    assert settle(model_of(kind), 61, 64) == ARCHITECTURES[kind][1]


@pytest.mark.parametrize("kind", ["gemma2", "llama"])
def test_the_loss_of_the_plain_layout_is_that_of_each_row_by_itself(kind: str) -> None:
    model = model_of(kind).eval()
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number, length in enumerate((9, 5, 12)):
        ids = torch.randint(3, 61, (length,), generator=generator).tolist()
        rows.append(Row(number, ids, [False] * (length - 3) + [True] * 3))
    total, count = 0.0, 0
    with torch.no_grad():
        loss = model(**assemble(rows, "plain", 0)).loss
        for row in rows:
            logits_TV = model(input_ids=torch.tensor([row.ids])).logits[0]
            targets = torch.tensor(row.ids[-3:])
            total += float(torch.nn.functional.cross_entropy(logits_TV[-4:-1], targets, reduction="sum"))
            count += 3
    assert float(loss) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_a_text_does_not_see_its_neighbour(kind: str) -> None:
    model = model_of(kind).eval()
    assert attention.fits(model, 61, 64)
    one, other, third = [3, 4, 5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16]
    with torch.no_grad():
        first = model(**attention.lay([one, third]), use_cache=False).logits[0, -3:]
        second = model(**attention.lay([other, third]), use_cache=False).logits[0, -3:]
        alone = model(input_ids=torch.tensor([third])).logits[0]
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first, alone)


def test_ordinary_calls_are_answered_as_before() -> None:
    """Validation and generation use the same model with padded batches and a mask."""
    plain, flat = model_of("llama").eval(), model_of("llama").eval()
    assert attention.fits(flat, 61, 64)
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad():
        for given in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids}):
            ours, theirs = flat(**given).logits, plain(**given).logits
            torch.testing.assert_close(ours[0], theirs[0])
            torch.testing.assert_close(ours[1, :2], theirs[1, :2])
    torch.manual_seed(0)
    ours = flat.generate(ids[:1], max_new_tokens=5, do_sample=False, pad_token_id=0)
    torch.testing.assert_close(ours, plain.generate(ids[:1], max_new_tokens=5, do_sample=False, pad_token_id=0))


def test_what_does_not_fit_is_left_as_it_was() -> None:
    model = model_of("gemma2").eval()
    before = model.config._attn_implementation
    assert not attention.fits(model, 61, 64)
    assert model.config._attn_implementation == before
