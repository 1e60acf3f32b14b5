"""The receipt measures how far two models are apart, and refuses what is too far, or no number."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tunewright.errors import StageError
from tunewright.package import fidelity

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8]]


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def moved(model: Any, by: float) -> Any:
    """The same model with one logit moved."""
    other = copy.deepcopy(model)

    def add(_: Any, __: Any, output: Any) -> Any:
        output.logits[..., 7] += by
        return output

    other.register_forward_hook(add)
    return other


def test_a_model_equals_itself(model: Any) -> None:
    assert fidelity.receipt(model, copy.deepcopy(model), PROMPTS) == {
        "rows": 3,
        "largest_logit_difference": 0.0,
        "largest_kl": 0.0,
        "same_best_token": 1.0,
        "threshold": fidelity.THRESHOLD,
    }


def test_the_largest_difference_is_reported(model: Any) -> None:
    found = fidelity.receipt(model, moved(model, 5e-4), PROMPTS)
    assert found["largest_logit_difference"] == pytest.approx(5e-4, rel=1e-2)
    assert 0 <= found["largest_kl"] < 1e-6


@pytest.mark.parametrize("by", [2e-3, -2e-3, float("nan"), float("inf")])
def test_what_is_too_far_or_no_number_is_refused(model: Any, by: float) -> None:
    with pytest.raises(StageError, match="nothing was deployed"):
        fidelity.receipt(model, moved(model, by), PROMPTS)


def test_one_bad_row_among_many_is_enough(model: Any) -> None:
    other = copy.deepcopy(model)

    def spoil(_: Any, given: Any, options: Any, output: Any) -> Any:
        if options["input_ids"].shape[1] == 1:
            output.logits[..., 7] = float("nan")
        return output

    other.register_forward_hook(spoil, with_kwargs=True)
    with pytest.raises(StageError, match="differs by nan"):
        fidelity.receipt(model, other, PROMPTS)
