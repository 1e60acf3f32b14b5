"""Label scores: one pass with the labels as a tree against one padded pass for each row and label, all logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from bench.timing import race, table
from tunewright.chat import Equipment
from tunewright.generate import LabelTree, LocalCompleter

ROWS, LABELS, LABEL_TOKENS, BATCH = 16, 8, 3, 8


def main() -> None:
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(120), 0.68, ROWS), 16, 900).astype(int)
    prompts = [generator.integers(1, 50257, length).tolist() for length in lengths]
    labels = [[*generator.integers(1, 50257, LABEL_TOKENS - 1).tolist(), 50256] for _ in range(LABELS)]
    model = GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=512, n_head=8)).eval()
    completer = LocalCompleter(model, None, Equipment("own", "", 50256, [50256], 50256))
    tree = LabelTree.plant([str(number) for number in range(LABELS)], labels)
    ours = np.array(completer.score(prompts, tree))
    theirs = np.array(one_by_one(model, prompts, labels))
    assert np.allclose(ours, theirs, atol=1e-3), np.abs(ours - theirs).max()
    rivals: dict[str, Callable[[], object]] = {
        "row by label, padded": lambda: one_by_one(model, prompts, labels),
        "tunewright": lambda: completer.score(prompts, tree),
    }
    title = (
        f"Scores of {LABELS} labels ({LABEL_TOKENS} tokens each), largest difference {np.abs(ours - theirs).max():.1e}"
    )
    table(title, race(rivals), unit="rows", count=ROWS, peer="row by label, padded")


def one_by_one(model: Any, prompts: list[list[int]], labels: list[list[int]]) -> list[list[float]]:
    pairs = [(prompt, label) for prompt in prompts for label in labels]
    scores = []
    with torch.inference_mode():
        for start in range(0, len(pairs), BATCH):
            batch = pairs[start : start + BATCH]
            longest = max(len(prompt) + len(label) for prompt, label in batch)
            ids = torch.zeros((len(batch), longest), dtype=torch.long)
            real = torch.zeros((len(batch), longest), dtype=torch.long)
            for number, (prompt, label) in enumerate(batch):
                ids[number, : len(prompt) + len(label)] = torch.tensor(prompt + label)
                real[number, : len(prompt) + len(label)] = 1
            logprobs = model(input_ids=ids, attention_mask=real).logits.log_softmax(-1)
            for number, (prompt, label) in enumerate(batch):
                places = range(len(prompt) - 1, len(prompt) - 1 + len(label))
                scores.append(sum(float(logprobs[number, at, token]) for at, token in zip(places, label, strict=True)))
    return [scores[start : start + len(labels)] for start in range(0, len(scores), len(labels))]
