"""The starter: what ships, and that our scripts really make it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunewright import starter

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
SPECIAL = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
DATA_FILES = ["README.md", "chat.jsonl", "completions.jsonl", "notes.txt", "test.jsonl", "train.jsonl"]


@pytest.fixture(scope="module")
def make_starter() -> Any:
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module("make_starter")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(starter.model_path())


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in starter.data_path(name).read_text(encoding="utf-8").splitlines()]


# What ships


def test_the_whole_starter_is_at_most_12_mb() -> None:
    folder = starter.model_path().parent
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 12_000_000


def test_a_data_file_that_is_not_there_is_an_error_that_names_those_that_are() -> None:
    with pytest.raises(FileNotFoundError, match=r"'mails.jsonl'; it has chat.jsonl, .*train.jsonl"):
        starter.data_path("mails.jsonl")


def test_the_model_loads_plainly_in_float32_with_its_context(tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(starter.model_path())
    parameters = list(model.parameters())
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert 3e6 <= sum(parameter.numel() for parameter in parameters) <= 4.5e6
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 1024
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.bos_token_id is None


def test_the_model_has_learnt_english_better_than_the_same_words_in_disorder(tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(starter.model_path())

    def loss(text: str) -> float:
        ids = torch.tensor([tokenizer.encode("<|end|>" + text)])
        return float(model(input_ids=ids, labels=ids).loss.detach())

    assert loss("The screen is lovely, but the battery died in a week.") + 1 < loss(
        "Week but in lovely a, the screen battery the died is."
    )


def test_the_last_position_of_the_context_works(tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(starter.model_path())
    text = "".join(
        f"{part}<|end|>" for part in starter.data_path("notes.txt").read_text(encoding="utf-8").split("\n\n")
    )
    ids = torch.tensor([tokenizer.encode(text)[:1024]])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
    assert loss[-200:].mean() < loss[:200].mean() + 0.7


# Tokenizer and chat template


@settings(deadline=None, max_examples=200)
@given(text=st.text().filter(lambda text: not any(token in text for token in SPECIAL)))
def test_any_text_comes_back_from_its_tokens(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_special_tokens_are_one_token_each(tokenizer: Any) -> None:
    assert [tokenizer.encode(token) for token in SPECIAL] == [[0], [1], [2], [3], [4]]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|pad|>")


def test_the_chat_template_adds_nothing_but_the_role_tokens_and_the_end(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be kind. "},
        {"role": "user", "content": "Where is\nmy box?"},
        {"role": "assistant", "content": " On its way."},
        {"role": "user", "content": "Thanks"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|system|>Be kind. <|end|><|user|>Where is\nmy box?<|end|><|assistant|> On its way.<|end|>"
        "<|user|>Thanks<|end|><|assistant|>"
    )


def test_the_assistant_mask_covers_what_the_assistant_says_and_its_end(tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "Good or bad?"},
        {"role": "assistant", "content": "good"},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "The lid closed tight."},
    ]
    made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    learnt = [token for token, flag in zip(made["input_ids"], made["assistant_masks"], strict=True) if flag]
    assert tokenizer.decode(learnt) == "good<|end|>The lid closed tight.<|end|>"


def test_the_chat_template_refuses_an_unknown_role(tokenizer: Any) -> None:
    from jinja2 import TemplateError

    with pytest.raises(TemplateError, match="tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "4"}], tokenize=False)


# Data


def test_train_and_test_have_the_same_labels_and_no_text_in_common() -> None:
    train, test = rows("train.jsonl"), rows("test.jsonl")
    assert {row["label"] for row in train} == {row["label"] for row in test}
    assert all(set(row) == {"text", "label"} and row["text"].strip() for row in train + test)
    texts = [row["text"].lower() for row in train + test]
    assert len(set(texts)) == len(texts)
    assert 600 <= len(train) <= 900
    assert 250 <= len(test) <= 300


def test_no_test_row_is_in_the_other_data_files() -> None:
    others = "".join(starter.data_path(name).read_text(encoding="utf-8").lower() for name in DATA_FILES[1:4])
    assert not [row["text"] for row in rows("test.jsonl") if row["text"].lower() in others]


def test_the_chat_and_completion_samples_have_the_usual_forms() -> None:
    chats, completions = rows("chat.jsonl"), rows("completions.jsonl")
    assert len(chats) == len(completions) == 40
    for row in chats:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["system", *["user", "assistant"] * (len(roles) // 2)]
    assert any(len(row["messages"]) > 3 for row in chats)
    assert all(set(row) == {"prompt", "completion"} for row in completions)


# The scripts that make it


def test_the_script_makes_the_shipped_data_to_the_byte(make_starter: Any) -> None:
    made = make_starter.data_files(make_starter.SEED)
    assert sorted(made) == DATA_FILES
    for name, text in made.items():
        assert starter.data_path(name).read_bytes() == text.encode(), name


def test_the_pretraining_text_has_no_test_row_in_it(make_starter: Any) -> None:
    barred = make_starter.barred_texts(make_starter.SEED)
    source = make_starter.documents(f"train-{make_starter.SEED}", barred)
    text = "\n".join(next(source).text.lower() for _ in range(3000))
    assert not [row for row in barred if row in text]


def test_training_twice_gives_the_same_weights(make_starter: Any) -> None:
    barred = make_starter.barred_texts(3)
    tokenizer = make_starter.make_tokenizer(3, barred, num_documents=200, size=400)
    size = make_starter.Size(hidden=32, intermediate=64, layers=2, heads=2, key_value_heads=1)
    schedule = make_starter.Schedule(steps=3, tokens_per_step=128, lengths=(64, 128))
    first, second = (make_starter.train(tokenizer, size, schedule, 3, barred) for _ in range(2))
    assert first.steps == 3
    assert first.losses == second.losses
    for one, other in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_every_template_can_be_read(make_starter: Any) -> None:
    text = make_starter.starter_text
    writer = text.Writer(0)
    for name, templates in text.LEXICON.items():
        for template in templates:
            writer.begin(thing="lamp", his="her")
            assert writer.say(template) or not template, name  # some words may be left out
    for _ in range(500):
        made = make_starter.render(text.document(writer)[1])
        assert "{" not in made
        assert "|)" not in made
