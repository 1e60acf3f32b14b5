"""Frozen lower layers: computed once, the same as if they were computed each time."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training import Prepare, fit, result, stop_at

from tunewright.errors import RecipeError
from tunewright.run import Run
from tunewright.train import supervised
from tunewright.train.assembling import Layout
from tunewright.train.frozen import Lower

FROZEN = {"bf16": False, "epochs": 3, "batch_size": 8, "learning_rate": 1e-3, "frozen_layers": 1}


class Computed(Lower):
    """Does the lower layers' work each time anew."""

    def of(self, *_: Any) -> Any:
        return contextlib.nullcontext()


def losses(run: Run) -> list[float]:
    return [entry["loss"] for entry in run.metrics() if "loss" in entry]


@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_kept_numbers_train_as_computed_ones(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch, method: str, layout: Layout
) -> None:
    if layout == "padded":
        monkeypatch.setattr("tunewright.attention.fits", lambda *_: False)
    kept, computed = (prepare(train=FROZEN | {"method": method}) for _ in range(2))
    fit(kept)
    monkeypatch.setattr(supervised, "Lower", Computed)
    fit(computed)
    assert kept.manifest("train")["layout"] == layout
    assert losses(kept) == pytest.approx(losses(computed), rel=1e-5)
    assert losses(kept)[-1] < losses(kept)[0]
    for path in kept.trained(method).glob("*.safetensors"):
        theirs = load_file(computed.trained(method) / path.name)
        for name, weight in load_file(path).items():
            torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=1e-5)
    assert not kept.lower_file.exists()


def test_what_is_frozen_stays_bit_for_bit(prepare: Prepare, base: Path) -> None:
    run = prepare(train=FROZEN | {"method": "full"})
    fit(run)
    before, after = load_file(base / "model.safetensors"), load_file(run.trained("full") / "model.safetensors")
    for name, weight in after.items():
        assert torch.equal(weight, before[name]) == ("embed" in name or "layers.0." in name or "lm_head" in name), name


def test_an_adapter_has_nothing_in_the_frozen_layers(prepare: Prepare) -> None:
    run = prepare(train=FROZEN)
    fit(run)
    names = load_file(run.trained("lora") / "adapter_model.safetensors")
    assert names
    assert all("layers.0." not in name for name in names)


@pytest.mark.parametrize("at", [2, 5])
def test_a_stopped_run_goes_on_exactly(prepare: Prepare, at: int) -> None:
    unbroken, broken = (prepare(train=FROZEN | {"lora": {"lora_dropout": 0.1}}) for _ in range(2))
    fit(unbroken)
    with pytest.raises(InterruptedError):
        stop_at(broken, at)
    fit(broken)
    assert result(broken) == result(unbroken)


def test_rows_that_are_binned_some_at_a_time_are_all_there(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, in_parts = (prepare(train=FROZEN) for _ in range(2))
    fit(at_once)
    monkeypatch.setattr("tunewright.train.frozen.TOGETHER", 5)
    fit(in_parts)
    assert losses(in_parts) == pytest.approx(losses(at_once), rel=1e-5)


def test_a_layer_must_be_left_to_train(prepare: Prepare) -> None:
    with pytest.raises(RecipeError, match=r"train.frozen_layers is 9 of the model's \d layers"):
        fit(prepare(train=FROZEN | {"frozen_layers": 9}))
