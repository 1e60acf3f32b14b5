"""What an engine holds: adapters that fit, each with the rendering that it was trained on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tunewright import chat, models
from tunewright.chat import Message
from tunewright.endpoint.answers import Ask, Piece
from tunewright.endpoint.engine import Shelf
from tunewright.endpoint.served import Served
from tunewright.errors import EndpointError, ModelError
from tunewright.run import read_json, write_json
from tunewright.testing import tiny_model


def equipped(base: Path) -> tuple[Any, chat.Equipment]:
    tokenizer = models.load_folder_tokenizer(base)
    return tokenizer, chat.equip(tokenizer)


def make_adapter(base: Path, folder: Path, seed: int) -> Path:
    """A random adapter that trains the rows of tokens which the base lacks, as training makes them."""
    from peft import LoraConfig, get_peft_model

    tokenizer, equipment = equipped(base)
    model = models.load_folder(base)
    models.grow(model, len(tokenizer))
    added = tokenizer.convert_tokens_to_ids(equipment.added_tokens)
    rows = {"embed_tokens": added} if added else None
    torch.manual_seed(seed)
    with models.quiet():
        config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", trainable_token_indices=rows)
        tuned = get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_" in name or "delta" in name:
                weight.normal_(std=0.5)
    with models.quiet():
        tuned.save_pretrained(str(folder), save_embedding_layers=False)
    golden = chat.golden(tokenizer, equipment, [(Message("user", "is it?"), Message("assistant", "good"))])
    write_json(folder / "rendering.json", {**golden, "task": "chat", "labels": None})
    return folder


def said(served: Served) -> str:
    ask = Ask(served.prompt([Message("user", "is it good?")]), max_tokens=12, temperature=0)
    return "".join(event.text for _, event in served.answer(ask) if isinstance(event, Piece))


def alone(base: Path, adapter: Path) -> str:
    from tunewright.generate import LocalCompleter

    tokenizer, equipment = equipped(base)
    model = models.load_folder(base)
    models.grow(model, len(tokenizer))
    return said(Served(LocalCompleter(models.merge(model, adapter), tokenizer, equipment)))


@pytest.fixture(params=[True, False], ids=["eos", "no eos"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "base", eos=request.param)


def test_adapters_stand_side_by_side_with_the_tokens_that_they_brought(base: Path, tmp_path: Path) -> None:
    folders = [make_adapter(base, tmp_path / f"adapter{seed}", seed) for seed in (1, 2)]
    shelf = Shelf.load(str(base), device="cpu")
    plain = said(shelf.own)
    for folder in folders:
        shelf.load_adapter(str(folder))
    for _ in range(2):
        assert [said(shelf.adapters[str(folder)]) for folder in folders] == [alone(base, folder) for folder in folders]
    assert said(shelf.own) == plain
    shelf.unload_adapter(str(folders[0]))
    shelf.unload_adapter(str(folders[0]))
    assert said(shelf.adapters[str(folders[1])]) == alone(base, folders[1])
    shelf.load_adapter(str(folders[0]))
    assert said(shelf.adapters[str(folders[0])]) == alone(base, folders[0])


def test_a_checkpoints_adapter_has_no_rendering_to_compare(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", 1)
    (adapter / "rendering.json").unlink()
    shelf = Shelf.load(str(base), device="cpu")
    shelf.load_adapter(str(adapter))
    assert said(shelf.adapters[str(adapter)]) == alone(base, adapter)


def test_what_does_not_fit_is_refused_and_the_rest_goes_on(tmp_path: Path) -> None:
    base, other = tiny_model(tmp_path / "base"), tiny_model(tmp_path / "other")
    adapter = make_adapter(base, tmp_path / "adapter", 1)
    shelf = Shelf.load(str(base), device="cpu")
    with pytest.raises(ModelError, match=r"no adapter there \(adapter_config.json\)"):
        shelf.load_adapter(str(tmp_path))
    broken = shutil.copytree(adapter, tmp_path / "broken")
    rendering = read_json(broken / "rendering.json")
    rendering["golden"][0]["ids"][0] += 1
    write_json(broken / "rendering.json", rendering)
    with pytest.raises(EndpointError, match="renders otherwise than in training"):
        shelf.load_adapter(str(broken))
    torn = shutil.copytree(adapter, tmp_path / "torn")
    (torn / "adapter_model.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(ModelError, match="does not fit this base"):
        shelf.load_adapter(str(torn))
    config = read_json(other / "config.json")
    write_json(other / "config.json", {**config, "num_hidden_layers": 1})
    small = models.load_folder(other)
    small.save_pretrained(str(other))
    foreign = Shelf.load(str(other), device="cpu")
    with pytest.raises(ModelError, match=r"it was made for another|does not fit this base"):
        foreign.load_adapter(str(adapter))
    shelf.load_adapter(str(adapter))
    assert said(shelf.adapters[str(adapter)]) == alone(base, adapter)


def test_a_whole_models_checkpoint_takes_its_bases_tokenizer(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    folder = tmp_path / "step-3"
    models.load_folder(base).save_pretrained(str(folder))
    shelf = Shelf.load(str(base), folder=folder, device="cpu")
    assert said(shelf.own) == said(Shelf.load(str(base), device="cpu").own)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        Shelf.load(str(base), folder=folder, device="cpu")
