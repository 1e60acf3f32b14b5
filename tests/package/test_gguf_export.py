"""The package as one GGUF file: read back by Transformers it is the same model, with the same ids, or it is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from tunewright import chat, gguf_header, models
from tunewright.chat import Equipment
from tunewright.errors import StageError
from tunewright.package import fidelity, formats, gguf_export
from tunewright.package.fidelity import Allowed
from tunewright.run import Run, read_json
from tunewright.testing import tiny_model
from tunewright.tracking import Tracker

Make = Callable[..., Run]

PROMPTS = [[40, 41, 42, 43, 44], [60], [70, 71, 72, 73, 74, 75, 76, 77]]
SIZES = {
    "vocab_size": 310,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    "llama, tied, wide heads": LlamaConfig(**SIZES, head_dim=32, tie_word_embeddings=True),
    "llama, scaled": LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "llama, linear": LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "gpt2": GPT2Config(vocab_size=310, n_positions=96, n_embd=64, n_layer=2, n_head=4),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return models.load_folder_tokenizer(tiny_model(tmp_path_factory.mktemp("words") / "model"))


@pytest.fixture(scope="module")
def equipment(tokenizer: Any) -> Equipment:
    return chat.equip(tokenizer)


def saved(config: Any, tokenizer: Any, folder: Path) -> Path:
    """A model whose every weight tells, biases and norms too; its embedding has more rows than there are tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0, 0.25)
            if "norm" in name or ".ln_" in name:
                weight.add_(1.0)
    with models.quiet():
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    return folder


def spoilt(folder: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    change(weights)
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("which", CONFIGS)
def test_in_f16_every_weight_comes_back_as_its_16_bits(
    which: str, tokenizer: Any, equipment: Equipment, tmp_path: Path
) -> None:
    folder = saved(CONFIGS[which], tokenizer, tmp_path / "model")
    path = tmp_path / "gguf" / "it.gguf"
    assert gguf_export.write(folder, path, "f16", equipment, name="it") == []
    one, other = models.load_folder(folder).state_dict(), gguf_export.read_model(path).state_dict()
    assert set(one) == set(other)
    for name, weight in one.items():
        in_float32 = weight.dim() == 1 or name == "transformer.wpe.weight"
        assert torch.equal(other[name], weight if in_float32 else weight.half().float()), name
    assert [file.name for file in path.parent.iterdir()] == ["it.gguf"]


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize("which", CONFIGS)
def test_it_is_the_same_model(which: str, kind: Any, tokenizer: Any, equipment: Equipment, tmp_path: Path) -> None:
    folder = saved(CONFIGS[which], tokenizer, tmp_path / "model")
    path = tmp_path / "it.gguf"
    assert gguf_export.write(folder, path, kind, equipment, name="it") == []
    read = gguf_export.read_model(path)
    found = fidelity.receipt(models.load_folder(folder), read, PROMPTS, allowed=gguf_export.ALLOWED[kind])
    assert found["largest_logit_difference"] > 0
    assert read.config.max_position_embeddings == CONFIGS[which].max_position_embeddings
    assert read.config.tie_word_embeddings == CONFIGS[which].tie_word_embeddings


def test_scaled_positions_come_from_the_file(tokenizer: Any, equipment: Equipment, tmp_path: Path) -> None:
    folder = saved(CONFIGS["llama, scaled"], tokenizer, tmp_path / "model")
    gguf_export.write(folder, tmp_path / "it.gguf", "f16", equipment, name="it")
    (factors,) = (t.data for t in GGUFReader(tmp_path / "it.gguf").tensors if t.name == "rope_freqs.weight")
    assert factors[0] == pytest.approx(1)
    assert factors[-1] == pytest.approx(8)
    one, other = (models.load_folder(folder), gguf_export.read_model(tmp_path / "it.gguf"))
    torch.testing.assert_close(other.model.rotary_emb.inv_freq, one.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["mistral", "t5", "llama", "qwen2moe"])
def test_a_name_is_not_read_as_an_architecture(name: str, tokenizer: Any, equipment: Equipment, tmp_path: Path) -> None:
    gguf_export.write(
        saved(CONFIGS["llama"], tokenizer, tmp_path / "m"), tmp_path / "it.gguf", "f16", equipment, name=name
    )
    assert type(gguf_export.read_model(tmp_path / "it.gguf")).__name__ == "LlamaForCausalLM"


def test_q8_0_is_off_by_half_a_step_at_most(tokenizer: Any, equipment: Equipment, tmp_path: Path) -> None:
    folder = saved(CONFIGS["llama"], tokenizer, tmp_path / "model")
    gguf_export.write(folder, tmp_path / "it.gguf", "q8_0", equipment, name="it")
    one, other = models.load_folder(folder).state_dict(), gguf_export.read_model(tmp_path / "it.gguf").state_dict()
    for name, weight in one.items():
        blocks = weight.reshape(-1, 32) if weight.dim() > 1 else weight.reshape(-1, 1)
        step = blocks.abs().amax(1, keepdim=True) / 127 if weight.dim() > 1 else torch.zeros_like(blocks)
        assert ((blocks - other[name].reshape(blocks.shape)).abs() <= step * 0.57).all(), (
            name
        )  # 127 steps and a f16 scale


def test_matrices_whose_rows_are_no_blocks_stay_in_f16(tokenizer: Any, equipment: Equipment, tmp_path: Path) -> None:
    folder = saved(LlamaConfig(**SIZES | {"intermediate_size": 72}), tokenizer, tmp_path / "model")
    kept = gguf_export.write(folder, tmp_path / "it.gguf", "q8_0", equipment, name="it")
    assert kept == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]
    held = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "it.gguf").tensors}
    assert held["blk.0.ffn_down.weight"] == "F16"
    assert held["blk.0.ffn_up.weight"] == held["token_embd.weight"] == "Q8_0"
    assert held["blk.0.attn_norm.weight"] == "F32"
    read = gguf_export.read_model(tmp_path / "it.gguf")
    fidelity.receipt(models.load_folder(folder), read, PROMPTS, allowed=gguf_export.ALLOWED["q8_0"])


def test_the_header_says_what_llama_cpp_needs(tokenizer: Any, equipment: Equipment, tmp_path: Path) -> None:
    folder = saved(CONFIGS["llama"], tokenizer, tmp_path / "model")
    gguf_export.write(folder, tmp_path / "it.gguf", "q8_0", equipment, name="kindness")
    said = {key: field.contents() for key, field in GGUFReader(tmp_path / "it.gguf").fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.name": "kindness",
        "general.file_type": 7,
        "llama.context_length": 128,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 500000.0,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.eot_token_id": equipment.end_of_turn_id,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    assert {key: said[key] for key in expected} == expected
    assert len(said["tokenizer.ggml.tokens"]) == 310
    assert said["tokenizer.ggml.tokens"][309] == "[PAD309]"
    assert said["tokenizer.ggml.token_type"][tokenizer.eos_token_id] == 3
    assert said["tokenizer.ggml.token_type"][309] == 5


def test_whoever_loads_it_by_auto_classes_gets_the_same_ids(
    tokenizer: Any, equipment: Equipment, tmp_path: Path
) -> None:
    folder = saved(CONFIGS["llama"], tokenizer, tmp_path / "model")
    gguf_export.write(folder, tmp_path / "it.gguf", "f16", equipment, name="it")
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="it.gguf")
    golden = chat.golden(tokenizer, equipment, formats.PLAIN_CONVERSATIONS)
    for each in (read, gguf_header.read_tokenizer(tmp_path / "it.gguf")):
        assert chat.differences(each, golden) == []
        assert each.eos_token == tokenizer.eos_token


# --- an export that is not the package ---


def swap_two_rows(weights: dict[str, torch.Tensor]) -> None:
    query = weights["model.layers.0.self_attn.q_proj.weight"]
    query[[0, 1]] = query[[1, 0]]


def pair_neighbours(weights: dict[str, torch.Tensor]) -> None:
    """As a file whose keys nobody put in the order that llama.cpp turns them in would be read."""
    key = weights["model.layers.1.self_attn.k_proj.weight"]
    key.copy_(torch.from_numpy(gguf_export._interleaved(key.numpy(), 2)))


def zero_one_row(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.mlp.down_proj.weight"][3] = 0


def no_number(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"][3] = float("nan")


@pytest.mark.parametrize("change", [swap_two_rows, pair_neighbours, zero_one_row, no_number])
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_changed_weights_are_caught(
    change: Any, kind: Any, tokenizer: Any, equipment: Equipment, tmp_path: Path
) -> None:
    folder = saved(CONFIGS["llama"], tokenizer, tmp_path / "model")
    gguf_export.write(spoilt(folder, tmp_path / "other", change), tmp_path / "it.gguf", kind, equipment, name="it")
    read = gguf_export.read_model(tmp_path / "it.gguf")
    with pytest.raises(
        StageError, match=f"packaged -> gguf-{kind}: it is no longer the same model: .* nothing was dep"
    ):
        fidelity.receipt(
            models.load_folder(folder),
            read,
            PROMPTS,
            hop=f"packaged -> gguf-{kind}",
            allowed=gguf_export.ALLOWED[kind],
        )


@pytest.mark.parametrize("value", [1e5, float("nan"), float("inf")])
def test_a_weight_that_16_bits_do_not_hold_is_an_error(
    value: float, tokenizer: Any, equipment: Equipment, tmp_path: Path
) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.mlp.up_proj.weight"][1, 2] = value

    folder = spoilt(saved(CONFIGS["llama"], tokenizer, tmp_path / "model"), tmp_path / "other", change)
    with pytest.raises(StageError, match=r"up_proj.weight holds (1e.05|nan|inf), and 16 bits hold no more than 65504"):
        gguf_export.write(folder, tmp_path / "it.gguf", "f16", equipment, name="it")
    assert not (tmp_path / "it.gguf").exists()


# --- the stage ---


@pytest.fixture(scope="module")
def exported(make: Make) -> Run:
    run = make(package={"formats": ["safetensors", "gguf-f16", "gguf-q8_0"]})
    formats.package(run, Tracker(run))
    return run


def test_each_hop_has_its_receipt(exported: Run) -> None:
    manifest = exported.manifest("package")
    assert list(manifest["fidelity"]) == ["trained -> packaged", "packaged -> gguf-f16", "packaged -> gguf-q8_0"]
    for hop in manifest["fidelity"].values():
        assert (hop["rows"], hop["tokens"]) == (8, 16)
        assert hop["greedy_agreement"] > 0.8
    assert manifest["fidelity"]["trained -> packaged"]["allowed"] == {"largest_logit_difference": 1e-3}
    assert manifest["fidelity"]["packaged -> gguf-f16"]["largest_kl"] < 1e-4
    assert manifest["gguf"] == {
        f"gguf-{kind}": {"file": f"gguf/kindness-{kind}.gguf", "kept_in_f16": []} for kind in ("f16", "q8_0")
    }
    assert {"gguf/kindness-f16.gguf", "gguf/kindness-q8_0.gguf"} <= set(manifest["files"])


def test_golden_ids_are_those_of_the_package(exported: Run) -> None:
    rendering = read_json(exported.rendering_file)
    for path in exported.gguf.iterdir():
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        assert chat.differences(tokenizer, rendering) == []


def test_the_card_says_how_to_use_them(exported: Run) -> None:
    card = exported.card_file.read_text()
    assert "- `gguf/kindness-f16.gguf`: beside `model`, 100.0% of tokens" in card
    assert "llama-cli -m gguf/kindness-q8_0.gguf --jinja" in card
    assert "ollama create" in card


def copied(run: Run, folder: Path) -> Run:
    shutil.copytree(run.path, folder / run.id, ignore=shutil.ignore_patterns("package"))
    return Run.open(folder / run.id)


def test_a_hop_beyond_its_limit_stops_the_stage(exported: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = copied(exported, tmp_path)
    monkeypatch.setitem(gguf_export.ALLOWED, "q8_0", Allowed(largest_kl=1e-12))
    with pytest.raises(
        StageError, match=r"packaged -> gguf-q8_0: .* \(nats\) at a token is .* \(allowed: at most 1e-12\); nothing was"
    ):
        formats.package(run, Tracker(run))
    assert not run.manifest_file("package").exists()


@pytest.mark.parametrize(
    ("owner", "step", "hop"),
    [
        (formats, "_write_model", "trained -> packaged: package/model"),
        (gguf_export, "write", "packaged -> gguf-f16: kindness-f16.gguf"),
    ],
)
def test_a_tokenizer_that_renders_otherwise_stops_the_stage(
    exported: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, step: str, hop: str
) -> None:
    """Spoilt as the model is written, or between that and the file."""
    run = copied(exported, tmp_path)
    write = getattr(owner, step)

    def lose_merges() -> None:
        path = run.packaged_model / "tokenizer.json"
        tokenizer = read_json(path)
        del tokenizer["model"]["merges"][10:]
        path.write_text(json.dumps(tokenizer))

    def spoiling(*given: Any, **more: Any) -> Any:
        if step == "write":
            lose_merges()
        written = write(*given, **more)
        if step == "_write_model":
            lose_merges()
        return written

    monkeypatch.setattr(owner, step, spoiling)
    with pytest.raises(StageError, match=rf"{hop} does not render as in training: golden conv.* token \d+ is"):
        formats.package(run, Tracker(run))
    assert not run.manifest_file("package").exists()


def test_a_format_that_is_asked_for_no_more_is_there_no_more(exported: Run, tmp_path: Path) -> None:
    run = copied(exported, tmp_path)
    (run.gguf).mkdir(parents=True)
    (run.gguf / "old.gguf").write_bytes(b"old")
    formats.package(run, Tracker(run))
    assert sorted(path.name for path in run.gguf.iterdir()) == ["kindness-f16.gguf", "kindness-q8_0.gguf"]


def test_the_starter_is_read_back_as_it_was(tmp_path: Path) -> None:
    ref = models.find("starter")
    tokenizer = models.load_tokenizer(ref)
    equipment = chat.equip(tokenizer)
    golden = chat.golden(tokenizer, equipment, formats.PLAIN_CONVERSATIONS)
    prompts = [row["prompt_ids"] for row in golden["golden"]]
    for kind in ("f16", "q8_0"):
        path = tmp_path / f"{kind}.gguf"
        gguf_export.write(Path(ref.source), path, kind, equipment, name="starter")  # type: ignore[arg-type]
        assert chat.differences(gguf_header.read_tokenizer(path), golden) == []
        found = fidelity.receipt(
            models.load_model(ref), gguf_export.read_model(path), prompts, allowed=gguf_export.ALLOWED[kind]
        )
        assert found["largest_kl"] < {"f16": 1e-5, "q8_0": 0.02}[kind]
