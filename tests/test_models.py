"""A base model is found and described, or refused with what is wrong and where it was looked for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hub import Hub, write_tiny_gpt2
from tunewright import chat, models, starter
from tunewright.errors import ModelError
from tunewright.models import ModelRef
from tunewright.testing import tiny_model


@pytest.fixture
def copy(model_folder: Path, tmp_path: Path) -> Path:
    """A model that a test may spoil."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def spoil(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def refusal(name: str | Path, revision: str | None = None) -> str:
    with pytest.raises(ModelError) as refused:
        models.find(str(name), revision)
    return str(refused.value)


# Finding


def test_a_folder_is_described_by_its_config(model_folder: Path) -> None:
    ref = models.find(str(model_folder))
    assert (ref.kind, ref.source, ref.revision) == ("folder", str(model_folder), None)
    assert (ref.architecture, ref.context, ref.vocab_size) == ("LlamaForCausalLM", 256, 300)
    assert ref.parameters == sum(weight.numel() for weight in models.load_model(ref).parameters())
    assert ModelRef.from_dict(json.loads(json.dumps(ref.to_dict()))) == ref


def test_a_folder_is_found_by_a_relative_path_and_stays_found(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_folder.parent)
    ref = models.find("./" + model_folder.name)
    assert models.find(model_folder.name).source == ref.source
    monkeypatch.chdir(tmp_path)
    assert models.load_tokenizer(ref).eos_token == "<|eos|>"


def test_the_starter_is_found_where_it_ships() -> None:
    if not (starter.model_path() / "config.json").is_file():
        assert "it is not part of this installation" in refusal("starter")
        pytest.skip("the starter is not made yet")
    ref = models.find("starter")
    assert ref.kind == "starter"
    assert Path(ref.source) == starter.model_path()
    assert len(models.load_tokenizer(ref)) <= ref.vocab_size


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert refusal("/no/such/model") == "model /no/such/model: no such folder"
    assert refusal("./absent") == "model ./absent: no such folder"
    assert refusal("a/b/c") == "model a/b/c: no such folder"
    assert refusal(tmp_path) == f"model {tmp_path}: the folder holds no config.json, so it is not a model"
    assert refusal("a b").startswith(
        "model a b: no folder of that name here, and the hub at https://huggingface.co did"
    )


def test_a_revision_is_for_models_of_the_hub(model_folder: Path) -> None:
    assert refusal(model_folder, "main").endswith("revision 'main' is for models of the hub, and this is a folder")


def test_a_folder_without_weights_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "adapter_model.safetensors")
    assert refusal(copy) == f"model {copy}: the folder {copy} holds no *.safetensors weights"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "vit"}, "vit is not a causal language model that can be tuned"),
        ({"model_type": "nope"}, "The checkpoint you are trying to load has model type `nope`"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}, "contains custom code"),
        ({"hidden_size": "large"}, "Field 'hidden_size' expected int, got str"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(copy: Path, changes: dict[str, Any], said: str) -> None:
    spoil(copy, **changes)
    assert said in refusal(copy)


def test_a_config_that_is_no_config_is_refused(copy: Path) -> None:
    for content in ("{", "{}"):
        (copy / "config.json").write_text(content)
        assert refusal(copy).startswith(f"model {copy}: cannot be read from {copy}: ")


def test_a_folder_without_a_tokenizer_is_refused(copy: Path) -> None:
    for path in copy.glob("tok*"):
        path.unlink()
    with pytest.raises(ModelError, match="cannot be read from"):
        models.load_tokenizer(models.find(str(copy)))


# Weights


def test_weights_are_loaded_in_float32_ready_to_be_used(model_folder: Path) -> None:
    ref = models.find(str(model_folder))
    for model in (models.load_model(ref), models.load_folder(model_folder)):
        assert not model.training
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
        assert str(model.device) == "cpu"


def test_weights_that_are_cut_short_are_refused(copy: Path) -> None:
    ref = models.find(str(copy))
    whole = (copy / "model.safetensors").read_bytes()
    for size in (0, 4, 1000, len(whole) - 1):
        (copy / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(ModelError, match="cannot be read from"):
            models.load_model(ref)


def test_weights_that_are_not_those_of_the_config_are_refused(copy: Path) -> None:
    spoil(copy, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"the weights lack model.layers.2.* and \d+ more; they are not those of the"):
        models.load_model(models.find(str(copy)))
    spoil(copy, num_hidden_layers=2, hidden_size=48)
    with pytest.raises(ModelError, match="its weights do not have the sizes that its config says"):
        models.load_model(models.find(str(copy)))


def test_room_is_made_for_new_tokens_and_never_taken_away(model_folder: Path) -> None:
    model = models.load_folder(model_folder)
    before = model.get_input_embeddings().weight.detach().clone()
    for size, rows in ((0, 300), (299, 300), (300, 300), (303, 303), (300, 303)):
        models.grow(model, size)
        assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == rows
        assert model.config.vocab_size == rows
    assert torch.equal(model.get_input_embeddings().weight[:300], before)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_a_model_without_an_end_gets_room_for_ours(tmp_path: Path) -> None:
    ref = models.find(str(tiny_model(tmp_path / "model", eos=False)))
    tokenizer = models.load_tokenizer(ref)
    equipment = chat.equip(tokenizer)
    model = models.load_model(ref)
    models.grow(model, len(tokenizer))
    assert model(torch.tensor([[equipment.end_of_turn_id]])).logits.shape[-1] == ref.vocab_size + 1


# Length


@pytest.mark.parametrize(
    ("context", "asked", "length"),
    [
        (256, None, 256),
        (256, 256, 256),
        (256, 8, 8),
        (4096, None, 1024),
        (4096, 4096, 4096),
        (None, None, 1024),
        (None, 9999, 9999),
    ],
)
def test_rows_are_as_long_as_asked_or_as_fits(
    model_folder: Path, context: int | None, asked: int | None, length: int
) -> None:
    ref = ModelRef.from_dict(models.find(str(model_folder)).to_dict() | {"context": context})
    assert ref.max_length(asked) == length


def test_more_than_the_context_is_refused(model_folder: Path) -> None:
    ref = models.find(str(model_folder))
    with pytest.raises(ModelError, match=r"train.max_length is 257, but .* holds 256 tokens; set .* to 256 or less"):
        ref.max_length(257)


def test_the_cpu_is_used_where_the_recipe_says_so() -> None:
    assert models.best_device(use_cpu=True) == "cpu"
    assert models.best_device() in ("cpu", "cuda", "mps")


# The hub


SCRIPT = """
import json, sys
from tunewright import models
from tunewright.errors import ModelError
answers = []
for name, revision in json.loads(sys.argv[1]):
    try:
        ref = models.find(name, revision)
        model = models.load_model(ref)
        answers.append([ref.to_dict(), len(models.load_tokenizer(ref)), sum(one.numel() for one in model.parameters())])
    except ModelError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, shared: Path, model_folder: Path) -> Iterator[tuple[Hub, str]]:
    folder = tmp_path_factory.mktemp("hub")
    write_tiny_gpt2(folder / "gpt2", shared / "models" / "gpt2-tokenizer")
    with Hub() as hub:
        commit = hub.add_model("openai-community/gpt2", folder / "gpt2", aliases=["gpt2"])
        hub.add_model("team/tiny", model_folder)
        yield hub, commit


def ask(hub: Hub, home: Path, *names: tuple[str, str | None], **environment: str) -> list[Any]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(names)],
        env=hub.environment(home / "home", **environment),
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers: list[Any] = json.loads(done.stdout)
    return answers


def test_a_hub_model_is_found_by_its_short_name_and_pinned_to_its_commit(hub: tuple[Hub, str], tmp_path: Path) -> None:
    server, commit = hub
    ((ref, tokens, parameters),) = ask(server, tmp_path, ("gpt2", None))
    assert (ref["source"], ref["kind"], ref["revision"]) == ("gpt2", "hub", commit)
    assert (ref["architecture"], ref["context"], ref["vocab_size"]) == ("GPT2LMHeadModel", 1024, 50257)
    assert tokens == 50257
    assert parameters == ref["parameters"]


def test_a_hub_model_that_cannot_be_had_is_named(hub: tuple[Hub, str], tmp_path: Path) -> None:
    server, _ = hub
    absent, nobody, revision = ask(server, tmp_path, ("team/absent", None), ("nothing", None), ("team/tiny", "no-such"))
    said = (
        f"no folder of that name here, and the hub at {server.url} has no such model; check the name, or give a folder"
    )
    assert absent == f"model team/absent: {said}"
    assert nobody == f"model nothing: {said}"
    assert revision == "model team/tiny: the hub has no revision 'no-such' of it"


def test_without_a_hub_a_model_that_was_used_before_is_still_there(hub: tuple[Hub, str], tmp_path: Path) -> None:
    server, _ = hub
    before = ask(server, tmp_path, ("team/tiny", None))
    after, absent = ask(server, tmp_path, ("team/tiny", None), ("team/other", None), HF_HUB_OFFLINE="1")
    assert after == before[0]
    assert absent.startswith(
        f"model team/other: no folder of that name here, and the hub at {server.url} did not give it"
    )


def test_a_pinned_model_stays_what_it_was(hub: tuple[Hub, str], copy: Path, tmp_path: Path) -> None:
    server, _ = hub
    first = server.add_model("team/moving", copy)
    spoil(copy, max_position_embeddings=128)
    second = server.add_model("team/moving", copy)
    answers = ask(server, tmp_path, ("team/moving", None), ("team/moving", first), ("team/moving", "main"))
    assert [ref["revision"] for ref, *_ in answers] == [second, first, second]
    assert [ref["context"] for ref, *_ in answers] == [128, 256, 128]
