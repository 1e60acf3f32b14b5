"""The receipt measures how far two models are apart, and refuses what is too far, or no number."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tunewright.errors import StageError
from tunewright.package import fidelity
from tunewright.package.fidelity import Allowed

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
        "tokens": 16,
        "largest_logit_difference": 0.0,
        "largest_kl": 0.0,
        "same_best_token": 1.0,
        "greedy_agreement": 1.0,
        "allowed": {"largest_logit_difference": 1e-3},
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
        if options["input_ids"].shape[1] == 16:  # the shortest prompt and its answer
            output.logits[..., 7] = float("nan")
        return output

    other.register_forward_hook(spoil, with_kwargs=True)
    with pytest.raises(StageError, match="differs by nan"):
        fidelity.receipt(model, other, PROMPTS)


def test_the_answer_is_compared_up_to_the_first_token_that_differs(model: Any) -> None:
    """The other model says token 7 from the sixth token of the answer on."""
    other = copy.deepcopy(model)

    def say_seven(_: Any, __: Any, output: Any) -> Any:
        output.logits[:, 5:, 7] += 100
        return output

    other.register_forward_hook(say_seven)
    found = fidelity.receipt(model, other, PROMPTS, allowed=Allowed())
    assert found["greedy_agreement"] == pytest.approx(5 / 16, abs=1e-6)
    assert found["same_best_token"] == pytest.approx(5 / 16, abs=0.1)


def test_what_the_model_says_is_what_generate_says(model: Any) -> None:
    prompt = torch.tensor([PROMPTS[0]])
    said = model.generate(prompt, max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0)
    assert fidelity._answered(model, PROMPTS[0], 16).tolist() == said.tolist()


def test_a_prompt_as_long_as_the_context_loses_its_beginning(model: Any) -> None:
    model.config.max_position_embeddings = 20
    ids = fidelity._answered(model, list(range(20)), 16)
    assert ids.shape == (1, 20)
    assert ids[0, :4].tolist() == [16, 17, 18, 19]


def test_a_weight_that_no_prompt_touches_is_compared_all_the_same(model: Any) -> None:
    other = copy.deepcopy(model)
    embedding = other.get_input_embeddings().weight.data
    said = fidelity._answered(model, PROMPTS[0], 16).tolist()[0]
    unread = next(token for token in range(40) if token not in said)
    embedding[unread, 3] += embedding.abs().max()
    found = fidelity.receipt(model, other, PROMPTS[:1])
    assert found["largest_logit_difference"] == 0
    assert "largest_weight_error" not in found
    with pytest.raises(StageError, match=r"a weight differs, as a share of the largest of its matrix, by 1 \(allowed"):
        fidelity.receipt(model, other, PROMPTS[:1], allowed=Allowed(largest_weight_error=5e-3))


@pytest.mark.parametrize(
    ("allowed", "said"),
    [
        (Allowed(largest_kl=1e-3), r"KL divergence \(nats\) at a token is .* \(allowed: at most 0.001\)"),
        (Allowed(same_best_token=0.9), r"same best one is 0 \(allowed: at least 0.9\)"),
    ],
)
def test_a_hop_is_judged_by_its_own_limits(model: Any, allowed: Allowed, said: str) -> None:
    with pytest.raises(StageError, match=f"packaged -> somewhere: it is no longer the same model: .*{said}; nothing"):
        fidelity.receipt(model, moved(model, 100.0), PROMPTS, hop="packaged -> somewhere", allowed=allowed)
