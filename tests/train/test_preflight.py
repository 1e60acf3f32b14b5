"""A few rows are learnt by heart before training; what is broken is named before a long run has begun."""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from training import Prepare, fit
from transformers import AutoTokenizer

from tunewright import cli, errors, life
from tunewright import recipe as recipes
from tunewright.chat import Example, Message
from tunewright.errors import RecipeError
from tunewright.preflight import FAILURES, ROWS, Few, Preflight
from tunewright.run import Run, read_json, write_json, write_json_lines
from tunewright.testing import tiny_data, tiny_model
from tunewright.train import checkpoints, preflight, stage

RATE = {"learning_rate": 5e-3}
FULL = {"method": "full", **RATE}


def attempt(run: Run) -> Preflight:
    return preflight.attempt(run, preflight.prepared(run), lambda done, total, note: None)


def conversations(folder: Path, rows: list[list[tuple[str, str]]], **extra: Any) -> dict[str, Any]:
    """A recipe's sections for conversations, each a list of role and content."""
    folder.mkdir(exist_ok=True)
    path = folder / "chat.jsonl"
    turns = ([{"role": role, "content": content} | extra.get(role, {}) for role, content in row] for row in rows)
    write_json_lines(path, [{"messages": row} for row in turns])
    return {"task": "chat", "data": {"train": str(path), "test": str(path), "messages": "messages"}}


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], *, template: str | None = None) -> Path:
    """The tiny model with other numbers in its weights' file."""
    tiny_model(folder, template=template)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def spread(weights: dict[str, torch.Tensor]) -> None:
    """Embeddings as far from one another as a trained model's: an adapter has to tell tokens apart by them."""
    weights["model.embed_tokens.weight"] *= 20


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return changed(tmp_path_factory.mktemp("preflight") / "model", spread)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_sound_set_up_learns_its_rows_by_heart_and_says_them(prepare: Prepare, method: str) -> None:
    """And leaves the run's files and all random numbers as they are."""
    seen = []
    run = prepare(train={"method": method, **RATE})
    before = state(run)
    found = preflight.attempt(run, preflight.prepared(run), lambda *one: seen.append(one))
    assert state(run) == before
    assert found.outcome == "passed", found.sentence
    assert found.answers == len(found.rows) == ROWS
    assert found.loss_after is not None
    assert found.loss_before is not None
    assert found.loss_after < preflight.LOSS < found.loss_before
    assert found.sentence.startswith(f"8 rows learnt by heart in {found.steps} steps, ")
    assert found.sentence.endswith("all 8 answers said and ended")
    assert seen[0][2].startswith("the recipe's learning rate, loss ")
    assert seen[-1] == (8, 8, "answers said")


def state(run: Run) -> Any:
    """The random numbers' state, and the run's files."""
    files = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(), files


def test_frozen_layers_are_learnt_above(prepare: Prepare) -> None:
    assert attempt(prepare(train={**FULL, "frozen_layers": 1})).outcome == "passed"


def test_the_last_answer_of_a_conversation_is_said(prepare: Prepare, tmp_path: Path) -> None:
    hello = [("user", "hi"), ("assistant", "hello")]
    rows = [[*hello, ("user", f"say {word}"), ("assistant", f"{word}!")] for word in ("one", "two", "three", "four")]
    found = attempt(prepare(train=FULL, **conversations(tmp_path / "data", rows)))
    assert (found.outcome, found.answers) == ("passed", 4), found.sentence


def test_the_better_answer_of_a_pair_is_said(prepare: Prepare, tmp_path: Path) -> None:
    rows = [{"prompt": f"is {n} good?", "chosen": f"yes, {n}", "rejected": "no"} for n in ("it", "he", "she", "this")]
    (tmp_path / "data").mkdir()
    write_json_lines(tmp_path / "data" / "pairs.jsonl", rows)
    files = {split: str(tmp_path / "data" / "pairs.jsonl") for split in ("train", "test")}
    found = attempt(prepare(task="preference", train={"method": "full"}, data=files))
    assert (found.outcome, found.answers) == ("passed", 4), found.sentence


def test_of_texts_the_loss_alone_counts_and_not_where_they_part(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    texts = [f"there was a {word}, it was very {word}" for word in ("dog", "cat", "fox", "hen", "owl")]
    write_json_lines(tmp_path / "data" / "texts.jsonl", [{"text": text} for text in texts])
    files = {split: str(tmp_path / "data" / "texts.jsonl") for split in ("train", "test")}
    found = attempt(prepare(task="pretraining", train=FULL, data=files | {"text": "text"}))
    assert (found.outcome, found.answers) == ("passed", 0), found.sentence
    assert found.sentence.count(",") == 1


# --- broken, each in a way of its own ---


def nothing_in_loss(prepare: Prepare, folder: Path) -> Run:
    """The only answer that is learnt from has no question."""
    path = folder / "greetings.jsonl"
    turn = {"role": "assistant", "content": "ask me", "weight": 1}
    rest = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me", "weight": 0}]
    write_json_lines(path, [{"messages": [turn, *rest]}] * 8)
    data = {"train": str(path), "test": str(path), "messages": "messages"}
    return prepare(task="chat", data=data, train=FULL)


def token_out_of_range(prepare: Prepare, folder: Path) -> Run:
    """A vocabulary with a gap: fewer tokens than the last id says."""
    model = tiny_model(folder / "gap")
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["e"] = 5000
    path.write_text(json.dumps(tokenizer))
    return prepare(model=model, train=FULL)


def not_finite(prepare: Prepare, folder: Path) -> Run:
    def damage(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan

    return prepare(model=changed(folder / "nan", damage), train=RATE)


def no_gradient(prepare: Prepare, folder: Path) -> Run:
    """A last norm of zeros: what the adapters do is multiplied away."""
    return prepare(model=changed(folder / "zero", lambda weights: weights["model.norm.weight"].zero_()), train=RATE)


def explodes(prepare: Prepare, folder: Path) -> Run:
    return prepare(train={"method": "full", "learning_rate": 50.0})


def rate_too_low(prepare: Prepare, folder: Path) -> Run:
    return prepare(train={"method": "full", "learning_rate": 1e-12})


def cannot_memorise(prepare: Prepare, folder: Path) -> Run:
    return prepare(train={**RATE, "lora": {"lora_dropout": 0.999}})


def cannot_end(prepare: Prepare, folder: Path) -> Run:
    """A base that never learnt its end of turn: its row is that of tokens that never came, and an adapter leaves it."""

    def level(weights: dict[str, torch.Tensor]) -> None:
        spread(weights)
        weights["model.embed_tokens.weight"][:40] = weights["model.embed_tokens.weight"][0].clone()

    return prepare(model=changed(folder / "level", level), train=RATE)


def says_something_else(prepare: Prepare, folder: Path) -> Run:
    """Answers that spell the token which ends an answer."""
    rows = [[("user", word), ("assistant", f"{word}<|eos|>{word}")] for word in ("good", "poor")]
    return prepare(train=FULL, **conversations(folder / "data", rows))


def does_not_stop(prepare: Prepare, folder: Path) -> Run:
    """A template that ends a turn with another token where a system message stands first."""
    template = (
        "{%- for message in messages -%}{{- message['role'] + ':\\n' + message['content'] -}}"
        "{%- if message['role'] == 'assistant' -%}"
        "{{- '<|sep|>' if messages[0]['role'] == 'system' else '<|eos|>' -}}"
        "{%- endif -%}{{- '\\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- 'assistant:\\n' -}}{%- endif -%}"
    )
    model = changed(folder / "ends", spread, template=template)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|sep|>"]})
    tokenizer.save_pretrained(model)
    rows = [[("system", "copy"), ("user", word), ("assistant", word)] for word in ("good", "poor", "kind", "dull")]
    return prepare(model=model, train=FULL, **conversations(folder / "data", rows))


BROKEN: dict[str, tuple[Callable[[Prepare, Path], Run], str]] = {
    "nothing_in_loss": (nothing_in_loss, "none has an answer with a loss"),
    "token_out_of_range": (token_out_of_range, "holds token 5000 ('e'), and the embeddings have 300 rows"),
    "not_finite": (not_finite, "1 of the 2,048 numbers in base_model.model.model.layers.1.mlp.up_proj"),
    "no_gradient": (no_gradient, "weights that are trained is 0, at a loss of 5.70"),
    "explodes": (explodes, "at train.learning_rate 50 the loss went from 14.49 to "),
    "rate_too_low": (
        rate_too_low,
        "at train.learning_rate 1e-12 5 steps on the same 8 rows changed the loss of 14.4908 by 0, and",
    ),
    "cannot_memorise": (cannot_memorise, "(with train.lora.lora_dropout 0.999, train.lora.r 16)"),
    "cannot_end": (cannot_end, "39 other tokens have the same row in the output layer, which is not trained"),
    "says_something_else": (says_something_else, "holds a token that ends an answer, before its end"),
    "does_not_stop": (does_not_stop, "the last token that is learnt there is '<|sep|>', and '<|eos|>' ends an answer"),
}


def test_every_failure_has_a_set_up_that_ends_in_it() -> None:
    assert set(BROKEN) == set(FAILURES)


@pytest.mark.parametrize("code", BROKEN)
def test_what_is_broken_is_named(prepare: Prepare, tmp_path: Path, code: str) -> None:
    make, seen = BROKEN[code]
    found = attempt(make(prepare, tmp_path))
    assert (found.outcome, found.code) == ("failed", code), found.sentence
    assert seen in found.seen
    assert found.sentence.startswith(f"preflight: {code}: ")


# --- before a run ---


def test_classes_are_trained_all_the_same_where_only_the_end_cannot_be_said(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = cannot_end(prepare, tmp_path)
    monkeypatch.setattr(preflight, "_wanted", lambda run, asked: True)
    preflight.before(run)
    assert "going on all the same" in capfd.readouterr().err
    assert json.loads(run.preflight_file.read_text())["code"] == "cannot_end"


def test_a_broken_set_up_ends_a_run_before_its_first_step(prepare: Prepare) -> None:
    run = prepare(train={"method": "full", "learning_rate": 50.0, "preflight": "always"})
    with pytest.raises(RecipeError, match=r"^preflight: explodes: at train\.learning_rate 50 the loss went from"):
        stage.train(run)
    assert not run.metrics_file.exists()
    assert checkpoints.latest(run.checkpoints) is None
    assert read_json(run.preflight_file)["code"] == "explodes"
    assert [one["code"] for one in run.events() if one["event"] == "preflight"] == ["explodes"]


def test_a_long_run_is_tried_first_and_a_short_one_is_not(prepare: Prepare) -> None:
    run = prepare(train={"method": "full", "learning_rate": 50.0})
    for seconds, tried in (([5, 700], False), ([600, 2400], True)):
        write_json(run.manifest_file("plan"), {"train_seconds": seconds})
        if tried:
            with pytest.raises(RecipeError, match="preflight: explodes"):
                preflight.before(run)
        else:
            preflight.before(run)
        assert run.preflight_file.exists() is tried


def test_a_run_that_goes_on_and_one_of_several_processes_are_not_tried(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare(train={**FULL, "preflight": "always", "max_steps": 2, "save_strategy": "steps", "save_steps": 1})
    fit(run)
    preflight.before(run)
    assert not run.preflight_file.exists()
    monkeypatch.setenv("RANK", "0")
    fresh = prepare(train={"method": "full", "learning_rate": 50.0, "preflight": "always"})
    preflight.before(fresh)
    assert not fresh.preflight_file.exists()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_preflight_changes_neither_weights_nor_random_numbers(prepare: Prepare, method: str) -> None:
    weights = []
    lora = {"lora": {"lora_dropout": 0.1}} if method == "lora" else {}
    for asked in ("never", "always"):
        run = prepare(train={"method": method, **RATE, **lora, "max_steps": 3, "preflight": asked})
        stage.train(run)
        assert run.preflight_file.exists() is (asked == "always")
        weights.append((run.manifest("train")["sha256"], run.metrics_file.read_text()))
    assert weights[0] == weights[1]


# --- without a run ---


def test_check_tries_in_a_process_of_its_own_and_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_of(base, tmp_path, FULL)))
    words = ("check", recipe, "--try", "--json", "--set", "train.learning_rate=50")
    code, said, _ = tunewright(monkeypatch, capsys, *words)
    found = json.loads(said)
    assert (code, found["ok"], found["problems"]) == (errors.BAD_INPUT, False, [])
    assert (found["preflight"]["outcome"], found["preflight"]["code"]) == ("failed", "explodes")
    assert not list(temporary.iterdir())


def test_check_does_not_try_what_it_finds_errors_in(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_of(base, tmp_path, {"max_length": 100_000})))
    code, said, _ = tunewright(monkeypatch, capsys, "check", recipe, "--try")
    assert (code, said.splitlines()[-1]) == (errors.BAD_INPUT, "no preflight: mend the errors above first")


def tunewright(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str | Path
) -> tuple[int, str, str]:
    """A command in this process: exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["tunewright", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, said.out, said.err


def test_a_module_that_lora_does_not_find_is_said_as_training_says_it(prepare: Prepare) -> None:
    with pytest.raises(RecipeError, match=r"^train\.lora: Target modules"):
        attempt(prepare(train={**RATE, "lora": {"target_modules": ["c_attn"]}}))


def test_where_it_cannot_be_done_it_says_why(base: Path, tmp_path: Path) -> None:
    hosted = recipe_of(base, tmp_path, {}) | {"backend": {"kind": "openai"}, "model": "gpt-4.1-mini"}
    grader = {"type": "string_check", "name": "g", "operation": "eq", "input": "a", "reference": "a"}
    drawn = recipe_of(base, tmp_path, {}) | {"task": "reward", "grader": grader}
    for given, why in ((hosted, "backend.kind: openai trains behind an API"), (drawn, "task: reward has no answers")):
        found = life.preflight(recipes.loads(json.dumps(given)), life.Checked([]))
        assert (found.outcome, found.code) == ("skipped", None)
        assert found.sentence.startswith(f"no preflight: {why}")


def test_rows_that_ask_the_same_are_taken_once_and_answers_take_turns() -> None:
    def row(text: str, label: str) -> Example:
        return Example(text, text, (Message("user", text), Message("assistant", label)), label=label)

    few = Few()
    for number in range(30):
        few.add(row(f"good {number % 10}", "good"), 40 + number % 10)
    few.add(row("good 9", "bad"), 20)
    few.add(row("awful", "bad"), 500)
    chosen = few.chosen()
    assert [one.label for one in chosen] == ["good", "bad", *["good"] * 6]
    assert len({one.prompt for one in chosen}) == ROWS


def recipe_of(base: Path, folder: Path, train: dict[str, Any]) -> dict[str, Any]:
    given = {"name": "t", "model": str(base), "task": "classification", "tracking": {"enabled": False}}
    return given | {"data": tiny_data(folder / "data"), "train": train}
