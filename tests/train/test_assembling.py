"""The batch that training sees has the loss, and the gradient, of the ordinary one."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from tunewright import chat, models
from tunewright.chat import Example, Message, Rendering
from tunewright.data import prepare
from tunewright.train.assembling import Collator, LengthGrouped, Rows, render_all

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
def model(request: pytest.FixtureRequest) -> Any:
    return model_of(request.param)


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


@given(rows=renderings())
def test_loss_and_every_gradient_equal_the_plain_ones(model: Any, rows: list[Rendering]) -> None:
    batch = Collator(PAD)(rows)
    logits = model(**{key: value for key, value in batch.items() if key not in ("labels", "shift_labels")}).logits
    # Transformers' own loss goes through float32 whatever the model's type, so its value is compared less strictly.
    loss = torch.nn.functional.cross_entropy(logits, batch["shift_labels"])
    plain = plain_loss(model, rows)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(model, loss), gradients(model, plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    own = model(**batch).loss
    torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-6, check_dtype=False)


@given(rows=renderings())
def test_the_loss_is_that_of_labels_of_minus_100(model: Any, rows: list[Rendering]) -> None:
    batch = Collator(PAD)(rows)
    labels_BT = torch.full_like(batch["input_ids"], -100)
    for number, row in enumerate(rows):
        for place, (token, flag) in enumerate(zip(row.ids, row.mask, strict=True)):
            if flag:
                labels_BT[number, place] = token
    usual = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels_BT)
    torch.testing.assert_close(model(**batch).loss, usual.loss, rtol=1e-6, atol=1e-7)


@given(rows=renderings())
def test_every_target_is_kept_once_and_no_padding_is(rows: list[Rendering]) -> None:
    batch = Collator(PAD)(rows)
    assert batch["labels"].tolist() == [
        token for row in rows for place, token in enumerate(row.ids) if place and row.mask[place]
    ]
    assert int(batch["logits_to_keep"].sum()) == len(batch["labels"])
    assert not (batch["logits_to_keep"] & (batch["attention_mask"] == 0)).any()
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(row.ids) for row in rows]


@given(length=st.integers(2, 60), size=st.integers(2, 20))
def test_a_long_text_is_cut_so_that_each_token_but_the_first_is_a_target_once(length: int, size: int) -> None:
    whole = Rendering(list(range(100, 100 + length)), [True] * length)
    cut = prepare.pieces(whole, size)
    targets = [token for piece in cut for token, flag in zip(piece.ids, piece.mask, strict=True) if flag]
    assert targets == whole.ids[1:]
    assert all(len(piece.ids) <= size for piece in cut)
    assert all(later.ids[0] == earlier.ids[-1] for earlier, later in itertools.pairwise(cut))


def test_only_plain_text_is_cut_in_pieces(base: Path) -> None:
    ref = models.find(str(base))
    tokenizer = models.load_tokenizer(ref)
    chat.equip(tokenizer)
    text = Example("a", "a", text="lovely great fine superb kind " * 4)
    talk = Example("b", "b", (Message("user", "lovely " * 20), Message("assistant", "good")))
    rendered = render_all(tokenizer, [text, talk], 16)
    assert max(len(one.ids) for one in rendered[:-1]) == 16
    assert rendered[-1] == chat.render(tokenizer, talk.messages)
    assert rendered[-2].ids[-1] == tokenizer.eos_token_id


def test_rows_of_like_length_stand_together_in_an_order_of_seed_and_epoch() -> None:
    rows = Rows([Rendering([1] * length, [True] * length) for length in (9, 2, 8, 3, 9, 2, 8, 3) * 8])
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
    rows = Rows([Rendering([1] * length, [True] * length) for length in lengths])

    def padding(order: list[int]) -> int:
        batches = [[lengths[row] for row in order[at : at + 8]] for at in range(0, len(order), 8)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding(list(LengthGrouped(rows, 8, seed=0))) < padding(list(range(256))) / 3
