"""The batch that training sees has the loss, and the gradient, of the ordinary one."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from tunewright.chat import Rendering
from tunewright.data import prepare
from tunewright.train import losses
from tunewright.train.assembling import (
    Layout,
    LengthGrouped,
    Rendered,
    Row,
    Rows,
    assemble,
    collate,
    into_bins,
)
from tunewright.train.steps import settle

PAD = 0
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 48},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


def model_of(kind: str) -> Any:
    config = AutoConfig.for_model(
        kind,
        vocab_size=61,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        **SHAPES[kind],
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).double().train()


@pytest.fixture(scope="module", params=list(SHAPES))
def models_pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model made ready for training, and the same one as it came."""
    reference = model_of(request.param)
    model = copy.deepcopy(reference)
    assert settle(model, 61, 64) == "flat"
    return model, reference


def renderings() -> st.SearchStrategy[list[Rendering]]:
    def masked(ids: list[int]) -> st.SearchStrategy[Rendering]:
        flags = st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))
        return flags.filter(lambda mask: any(mask[1:])).map(lambda mask: Rendering(ids, mask))

    ids = st.lists(st.integers(0, 60), min_size=2, max_size=14)  # PAD may stand in the text too
    return st.lists(ids.flatmap(masked), min_size=1, max_size=4)


def plain_loss(model: Any, rows: list[Rendering]) -> torch.Tensor:
    """The mean over all targets, each row alone, unpadded, every logit computed; no code of ours."""
    losses = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, :-1]
        labels = torch.tensor([token if flag else -100 for token, flag in zip(row.ids, row.mask, strict=True)][1:])
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100))
    return torch.stack(losses).sum() / sum(sum(row.mask[1:]) for row in rows)


def gradients(model: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def batch_of(rows: list[Rendering], layout: Layout) -> dict[str, Any]:
    return assemble([Row(number, row.ids, row.mask) for number, row in enumerate(rows)], layout, PAD)


@given(rows=renderings(), layout=st.sampled_from(["flat", "padded", "plain"]), slices=st.booleans())
def test_loss_and_every_gradient_equal_the_plain_ones(
    models_pair: tuple[Any, Any], rows: list[Rendering], layout: Layout, slices: bool
) -> None:
    model, reference = models_pair
    with pytest.MonkeyPatch.context() as patch:
        if slices:  # of two places each
            patch.setattr(losses, "SLICE", 2 * 61)
        batch = batch_of(rows, layout)
        if layout == "plain":
            # Transformers' own loss goes through float32 whatever the model's type, so its logits are compared.
            kept = {key: value for key, value in batch.items() if key not in ("labels", "shift_labels")}
            loss = torch.nn.functional.cross_entropy(model(**kept).logits, batch["shift_labels"])
        else:
            loss = model(**batch).loss
        plain = plain_loss(reference, rows)
        torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(gradients(model, loss), gradients(reference, plain), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@given(rows=renderings(), budget=st.integers(1, 40), layout=st.sampled_from(["flat", "padded"]))
def test_however_the_rows_fall_into_bins_the_gradient_is_that_of_the_whole(
    models_pair: tuple[Any, Any], rows: list[Rendering], budget: int, layout: Layout
) -> None:
    model, reference = models_pair
    total = sum(sum(row.mask[1:]) for row in rows)
    parts = [
        model(**batch_of([rows[place] for place in held], layout), num_items_in_batch=total).loss
        for held in into_bins([len(row.ids) for row in rows], budget, layout=layout)
    ]
    whole = plain_loss(reference, rows)
    for ours, theirs in zip(gradients(model, torch.stack(parts).sum()), gradients(reference, whole), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@given(rows=renderings(), layout=st.sampled_from(["flat", "padded"]))
def test_every_target_is_kept_once_and_no_padding_is(rows: list[Rendering], layout: Layout) -> None:
    batch = batch_of(rows, layout)
    targets = [token for row in rows for place, token in enumerate(row.ids) if place and row.mask[place]]
    assert batch["targets"].tolist() == targets
    assert batch["input_ids"].flatten()[batch["kept"] + 1].tolist() == targets
    if layout == "flat":
        assert batch["input_ids"].tolist() == [[token for row in rows for token in row.ids]]
        assert batch["position_ids"].tolist() == [[place for row in rows for place in range(len(row.ids))]]


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=20),
    budget=st.integers(1, 120),
    layout=st.sampled_from(["flat", "padded"]),
)
def test_bins_hold_every_row_once_and_no_more_than_their_budget(
    lengths: list[int], budget: int, layout: Layout
) -> None:
    bins = into_bins(lengths, budget, layout=layout)
    assert sorted(row for held in bins for row in held) == list(range(len(lengths)))
    for held in bins:
        tokens = [lengths[row] for row in held]
        size = sum(tokens) if layout == "flat" else max(tokens) * len(tokens)
        assert len(held) == 1 or size <= budget
    if layout == "flat":  # best-fit decreasing: no two bins would fit into one
        used = sorted(sum(lengths[row] for row in held) for held in bins)
        assert len(used) < 2 or used[0] + used[1] > budget


def test_the_rows_of_a_step_are_handed_on_whole_with_their_targets_counted() -> None:
    rows = [Row(4, [1, 2, 3], [False, True, True]), Row(9, [5, 6], [True, True])]
    batch = collate(rows)
    assert batch["rows"] == rows
    assert batch["shift_labels"].tolist() == [2, 3, 6]  # a first token is nobody's target


@given(length=st.integers(2, 60), size=st.integers(2, 20))
def test_a_long_text_is_cut_so_that_each_token_but_the_first_is_a_target_once(length: int, size: int) -> None:
    whole = Rendering(list(range(100, 100 + length)), [True] * length)
    cut = prepare.pieces(whole, size)
    targets = [token for piece in cut for token, flag in zip(piece.ids, piece.mask, strict=True) if flag]
    assert targets == whole.ids[1:]
    assert all(len(piece.ids) <= size for piece in cut)
    assert all(later.ids[0] == earlier.ids[-1] for earlier, later in itertools.pairwise(cut))


def rows_of(lengths: Sequence[int]) -> Rows:
    return Rows(Rendered([Rendering([1] * length, [True] * length) for length in lengths], [""] * len(lengths)))


def test_rows_of_like_length_stand_together_in_an_order_of_seed_and_epoch() -> None:
    rows = rows_of((9, 2, 8, 3, 9, 2, 8, 3) * 8)
    sampler = LengthGrouped(rows, 4, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    torch.manual_seed(99)
    again = LengthGrouped(rows, 4, seed=3)
    again.set_epoch(1)
    assert list(again) == second != first
    assert sorted(first) == list(range(len(rows)))


def test_grouped_batches_need_less_padding_than_random_ones() -> None:
    lengths = torch.randint(2, 60, (256,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = rows_of(lengths)

    def padding(order: list[int]) -> int:
        batches = [[lengths[row] for row in order[at : at + 8]] for at in range(0, len(order), 8)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding(list(LengthGrouped(rows, 8, seed=0))) < padding(list(range(256))) / 3


@pytest.mark.parametrize(("places", "size"), [(5, 2**24), (40, 2**24), (100, 2**24), (100, 7 * 300)])
def test_the_head_s_gradients_under_autocast_are_those_of_float32_but_for_rounding(
    places: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few places, which stay in float32; one slice, whose weight gradient is made on the way back; more; slices."""
    monkeypatch.setattr(losses, "SLICE", size)
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(64, 300)
    hidden = torch.randn(places, 64, generator=generator)
    targets = torch.randint(300, (places,), generator=generator)

    def gradients(*, autocast: bool, ours: bool) -> list[torch.Tensor]:
        head.zero_grad()
        inputs = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if ours:
                loss, right = losses.head_loss(inputs, head, targets)
                assert abs(int(right) - int((head(inputs).argmax(-1) == targets).sum())) <= 1  # a tie may be rounded
            else:
                loss = torch.nn.functional.cross_entropy(head(inputs), targets, reduction="sum")
        (loss / (3 * places)).backward()
        return [inputs.grad, head.weight.grad.clone(), head.bias.grad.clone()]

    for found, wanted in zip(gradients(autocast=True, ours=True), gradients(autocast=False, ours=False), strict=True):
        error = (found - wanted).norm() / wanted.norm()
        assert error < (1e-5 if places <= losses.FEW else 1e-2)
        assert found.dtype == torch.float32
        along = (found * wanted).sum() / wanted.square().sum()  # what rounding of the scale would move as a whole
        assert abs(along - 1) < 1e-3
