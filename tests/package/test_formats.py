"""What is packaged is what was trained, loads with plain from_pretrained, and is written down to the byte."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunewright import chat, models
from tunewright.chat import Message
from tunewright.data import prepare
from tunewright.errors import StageError
from tunewright.models import ModelRef
from tunewright.package import formats
from tunewright.run import Run, read_json
from tunewright.tracking import Tracker

Make = Callable[..., Run]


def copied(run: Run, folder: Path) -> Run:
    """The run up to `evaluate`, free to be spoilt."""
    shutil.copytree(run.path, folder / run.id, ignore=shutil.ignore_patterns("package"))
    return Run.open(folder / run.id)


def trained_model(run: Run) -> Any:
    """The base with its adapter beside it, as PEFT loads it."""
    ref = ModelRef.from_dict(run.resolved()["model"])
    tokenizer = models.load_tokenizer(ref)
    chat.equip(tokenizer)
    base = models.load_model(ref)
    models.grow(base, len(tokenizer))
    with models.quiet():
        return PeftModel.from_pretrained(base, str(run.trained("lora"))).eval()


@pytest.mark.parametrize("which", ["packaged", "endless"])
def test_it_loads_with_plain_transformers_and_no_warning(
    which: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    run: Run = request.getfixturevalue(which)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        model = AutoModelForCausalLM.from_pretrained(run.packaged_model)
        tokenizer = AutoTokenizer.from_pretrained(run.packaged_model)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "lovely"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert not caplog.records
    assert len(out[0]) <= prompt["input_ids"].shape[1] + 8


@pytest.mark.parametrize("which", ["packaged", "endless"])
def test_merged_logits_equal_those_of_base_and_adapter(which: str, request: pytest.FixtureRequest) -> None:
    run: Run = request.getfixturevalue(which)
    merged, beside = models.load_folder(run.packaged_model), trained_model(run)
    tokenizer = models.load_folder_tokenizer(run.packaged_model)
    for example in prepare.examples(run, "test"):
        ids = torch.tensor([chat.render(tokenizer, example.messages).ids])
        with torch.no_grad():
            torch.testing.assert_close(merged(ids).logits, beside(ids).logits, rtol=1e-4, atol=1e-4)
    (hop,) = run.manifest("package")["fidelity"].values()
    assert hop["rows"] == 8
    assert hop["largest_logit_difference"] < 1e-4
    assert hop["same_best_token"] == 1.0


def test_a_fully_trained_model_is_packaged_bit_for_bit(make: Make) -> None:
    run = make(train={"method": "full", "max_steps": 2, "batch_size": 4})
    formats.package(run, Tracker(run))
    trained, packaged = (
        load_file(folder / "model.safetensors") for folder in (run.trained("full"), run.packaged_model)
    )
    assert set(trained) == set(packaged)
    assert all(torch.equal(trained[name], packaged[name]) for name in trained)
    assert not run.packaged_adapter.exists()
    assert read_json(run.packaged_model / "config.json")["use_cache"] is True


def test_the_adapter_is_there_too_and_loads_on_its_base(packaged: Run) -> None:
    base = models.load_model(ModelRef.from_dict(packaged.resolved()["model"]))
    with models.quiet():
        loaded = PeftModel.from_pretrained(base, str(packaged.packaged_adapter))
    assert any("lora" in name for name, _ in loaded.named_parameters())


# --- what was written down ---


def test_every_file_is_in_the_manifest_with_its_hash(packaged: Run) -> None:
    listed = packaged.manifest("package")["files"]
    there = {
        str(path.relative_to(packaged.package)): path
        for path in packaged.package.rglob("*")
        if path.is_file() and path.name not in ("manifest.json", "log.txt")
    }
    assert set(listed) == set(there)
    for name, path in there.items():
        assert listed[name] == {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }


def test_weights_are_safetensors_and_nothing_is_a_pickle(packaged: Run) -> None:
    suffixes = {path.suffix for path in packaged.package.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jinja", ".md", ".txt"}
    assert (packaged.packaged_model / "model.safetensors").is_file()


def test_the_golden_ids_are_rendered_again_the_same(packaged: Run, endless: Run) -> None:
    for run in (packaged, endless):
        rendering = read_json(run.rendering_file)
        tokenizer = models.load_folder_tokenizer(run.packaged_model)
        assert chat.differences(tokenizer, rendering) == []
        assert rendering["labels"] == ["bad", "good"]
        assert rendering["task"] == "classification"
        assert rendering["template_sha256"] == hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
        rows = [example.messages for example in prepare.examples(run, "test")]
        golden = [[Message.from_dict(one) for one in row["messages"]] for row in rendering["golden"]]
        assert golden[:4] == [list(messages) for messages in rows[:4]]
        assert len(golden) == 4 + len(formats.PLAIN_CONVERSATIONS) + len(formats.TOOL_CONVERSATIONS)
        for row, messages in zip(rendering["golden"], golden, strict=True):
            tools = row.get("tools", [])
            again = chat.render(tokenizer, messages, tools)
            assert row["ids"] == again.ids
            assert row["mask"] == [int(flag) for flag in again.mask]
            assert (
                row["ids"][: len(row["prompt_ids"])]
                == row["prompt_ids"]
                == chat.render_prompt(tokenizer, messages[:-1], tools)
            )


def test_another_template_is_noticed(packaged: Run) -> None:
    tokenizer = models.load_folder_tokenizer(packaged.packaged_model)
    tokenizer.chat_template = tokenizer.chat_template.replace("capitalize", "upper")
    rendering = read_json(packaged.rendering_file)
    assert len(chat.differences(tokenizer, rendering)) == len(rendering["golden"])


def test_generation_ends_at_the_end_of_turn(packaged: Run, endless: Run) -> None:
    for run in (packaged, endless):
        rendering = read_json(run.rendering_file)
        settings = read_json(run.packaged_model / "generation_config.json")
        assert settings["eos_token_id"] == rendering["stop_ids"]
        assert rendering["end_of_turn_id"] in settings["eos_token_id"]
        assert settings["pad_token_id"] == rendering["pad_id"]


def test_a_base_without_end_of_sequence_answers_and_stops_in_plain_transformers(endless: Run) -> None:
    model = AutoModelForCausalLM.from_pretrained(endless.packaged_model)
    tokenizer = AutoTokenizer.from_pretrained(endless.packaged_model)
    assert tokenizer.eos_token == chat.END_OF_TURN
    said = []
    for example in prepare.examples(endless, "test"):
        prompt = torch.tensor([chat.render_prompt(tokenizer, example.prompt)])
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12)[0, prompt.shape[1] :]
        said.append(tokenizer.decode(out, skip_special_tokens=True))
        assert out[-1] == tokenizer.eos_token_id
    assert set(said) <= {"good", "bad"}


def test_the_bases_own_generation_settings_survive(make: Make, tmp_path: Path) -> None:
    """Published chat models bring a temperature; a config that holds one without do_sample is refused when saved."""
    from tunewright.testing import tiny_model

    folder = tiny_model(tmp_path / "warm")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(read_json(path) | {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}))
    for method in ("lora", "full"):
        run = make(model=folder, train={"method": method, "max_steps": 1, "batch_size": 2})
        formats.package(run, Tracker(run))
        settings = read_json(run.packaged_model / "generation_config.json")
        assert settings["temperature"] == 0.6
        assert settings["repetition_penalty"] == 1.1


def test_the_card_holds_the_numbers(packaged: Run) -> None:
    card = (packaged.package / "card.md").read_text()
    assert card == (packaged.packaged_model / "README.md").read_text()
    report, trained = packaged.manifest("evaluate"), packaged.manifest("train")
    comparison = report["comparison"]
    for said in (
        packaged.id,
        f"**{comparison['verdict'].capitalize()}** against base on 10 held-out rows",
        f"accuracy {comparison['tuned']:.4f} against {comparison['baseline_value']:.4f}",
        f"p = {comparison['p_value']:.3g}",
        f"lora, {trained['steps']} steps",
        f"{trained['trainable_parameters']:,} of {trained['parameters']:,} weights",
        "train: 32 rows of 32",
        packaged.manifest("prepare")["splits"]["train"]["sha256"][:16],
        "It answers with one of: bad, good.",
    ):
        assert said in card
    for name, values in report["models"].items():
        assert f"| {name} | {values['accuracy']:.4f} | {values['f1_macro']:.4f} |" in card


@pytest.mark.parametrize("task", ["chat", "pretraining"])
def test_other_tasks_are_packaged_too(make: Make, tmp_path: Path, task: str) -> None:
    row = {"chat": {"prompt": "hello", "completion": "lovely"}, "pretraining": {"text": "lovely great fine"}}[task]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(6)))
    run = make(
        task=task,
        data={"train": str(path), "test": str(path)},
        train={"max_steps": 2, "batch_size": 2},
        evaluate={"bootstrap": 200, "max_new_tokens": 4},
    )
    formats.package(run, Tracker(run))
    manifest = run.manifest("package")
    assert manifest["task"] == task
    assert manifest["mlflow"] is None
    assert manifest["fidelity"]["trained -> packaged"]["rows"] == 6
    assert read_json(run.rendering_file)["labels"] is None
    assert f"fine-tuned for {task}" in (run.package / "card.md").read_text()


def test_packaging_again_gives_the_same_files(packaged: Run, tmp_path: Path) -> None:
    """Also where a kill left half of an earlier attempt."""
    run = copied(packaged, tmp_path)
    (run.package / ".model.new").mkdir(parents=True)
    (run.package / ".model.new" / "model.safetensors").write_bytes(b"half")
    run.packaged_adapter.mkdir()
    (run.packaged_adapter / "old").write_text("old")
    formats.package(run, Tracker(run))
    one, other = (each.manifest("package")["files"] for each in (packaged, run))
    assert set(one) == set(other)
    assert [name for name in one if one[name] != other[name]] == []


# --- a package that is not what was trained ---


def spoil(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def zero_b(weights: dict[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        if "lora_B" in name:
            weight.zero_()


def one_weight(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] += 0.5


def no_number(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"][3] = float("nan")


@pytest.mark.parametrize("change", [one_weight, no_number])
def test_a_changed_weight_is_caught(
    packaged: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[..., None]
) -> None:
    run = copied(packaged, tmp_path)
    write = formats._write_model

    def spoiling(run: Run, *given: Any) -> None:
        write(run, *given)
        spoil(run.packaged_model / "model.safetensors", change)

    monkeypatch.setattr(formats, "_write_model", spoiling)
    with pytest.raises(StageError, match="trained -> packaged: it is no longer the same model: a logit differs by"):
        formats.package(run, Tracker(run))
    assert not run.manifest_file("package").exists()


def test_an_adapter_that_was_not_applied_is_caught(
    packaged: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(packaged, tmp_path)
    write = formats._write_model

    def spoiling(run: Run, *given: Any) -> None:
        spoil(run.trained("lora") / "adapter_model.safetensors", zero_b)  # after the trained model was loaded
        write(run, *given)

    monkeypatch.setattr(formats, "_write_model", spoiling)
    with pytest.raises(StageError, match="no longer the same model"):
        formats.package(run, Tracker(run))


def test_another_base_is_caught(packaged: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = copied(packaged, tmp_path)
    load = models.load_model
    loaded = []

    def other(ref: ModelRef, **options: Any) -> Any:
        model = load(ref, **options)
        loaded.append(model)
        if len(loaded) == 2:
            model.get_input_embeddings().weight.data.add_(0.1)
        return model

    monkeypatch.setattr(models, "load_model", other)
    with pytest.raises(StageError, match="no longer the same model"):
        formats.package(run, Tracker(run))
