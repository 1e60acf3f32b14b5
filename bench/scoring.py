"""Label scores: ours against `Trainer.predict` on padded rows, and against one padded pass for each row and label.

Random weights and tokens of a GPT-2 shape, since speed does not depend on them. `python -m bench.scoring NAME` runs one
rival of the first table alone and prints its peak memory.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from bench.timing import race, table
from bench.train import padded
from tunewright.chat import Equipment
from tunewright.generate import LabelTree, LocalCompleter

ROWS, BATCH, SHARED, VOCABULARY, END = 16, 8, 200, 50257, 50256
LAYERS = 6
"""Half of GPT-2's, for time; the head is all of it."""
LABELS = [[3967, END], [4633, END]]
"""Two words of one token, each with its end of turn."""
PEER = "Trainer.predict"


def main() -> None:
    against_predict()
    against_row_by_label()


def against_predict() -> None:
    """A few-shot classifier's evaluation: two labels, 200 tokens that all prompts begin with, lengths as IMDB's."""
    rivals = make_rivals()
    theirs, ours = np.array(rivals[PEER]()), np.array(rivals["tunewright"]())
    apart = np.abs((theirs[:, 0] - theirs[:, 1]) - (ours[:, 0] - ours[:, 2])).max()
    memory = {name: peak_memory(name) for name in rivals}
    title = f"Scores of 2 labels behind {SHARED} shared tokens, largest difference {apart:.1e}"
    table(title, race(rivals), unit="rows", count=ROWS, peer=PEER)
    print("Peak memory of a process that does this alone (the imports and the model included):")
    print("; ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in memory.items()) + ".\n")


def make_rivals() -> dict[str, Callable[[], Any]]:
    generator = np.random.default_rng(0)
    many = np.clip(generator.lognormal(np.log(240), 0.68, 100_000), 16, 1024 - SHARED - 2)
    lengths = generator.permutation(np.quantile(many, (np.arange(ROWS) + 0.5) / ROWS).astype(int))
    shared = generator.integers(1, END, SHARED).tolist()
    prompts = [[*shared, *generator.integers(1, END, length).tolist()] for length in lengths]
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=LAYERS)).eval()
    completer = LocalCompleter(model, None, Equipment("own", "", END, [END], END))
    beginnings = [label[:size] for label in LABELS for size in (1, 2)]  # the first token's score, and the label's
    tree = LabelTree.plant([str(one) for one in beginnings], beginnings)
    return {
        PEER: lambda: predict(model, prompts, with_loss=True),
        f"{PEER} without a loss": lambda: predict(model, prompts, with_loss=False),
        "tunewright": lambda: completer.score(prompts, tree),
    }


def predict(model: Any, prompts: list[list[int]], *, with_loss: bool) -> list[list[float]]:
    """The logit of each label's first token where the answer begins: rows in the order of arrival, the logits of all
    places cut down to the labels' columns. With the answer in `labels`, as a metric needs it, the model computes a
    loss too."""
    first = [label[0] for label in LABELS]
    rows = [{"input_ids": [*prompt, *LABELS[0]], "labels": [-100] * len(prompt) + LABELS[0]} for prompt in prompts]

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        made = padded(batch)
        if not with_loss:
            del made["labels"]
        return made

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_eval_batch_size=BATCH, report_to="none", disable_tqdm=True, use_cpu=True,
            remove_unused_columns=False,
        )  # fmt: skip
        trainer = Trainer(
            model=model, args=arguments, data_collator=collate,
            preprocess_logits_for_metrics=lambda logits, _labels: logits[:, :, first],
        )  # fmt: skip
        found = trainer.predict(rows).predictions
    return [found[number, len(prompt) - 1].tolist() for number, prompt in enumerate(prompts)]


def peak_memory(name: str) -> int:
    """Bytes that a process of its own had in memory at most."""
    done = subprocess.run([sys.executable, "-m", "bench.scoring", name], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def against_row_by_label() -> None:
    rows, labels_count, label_tokens = 16, 8, 3
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(120), 0.68, rows), 16, 900).astype(int)
    prompts = [generator.integers(1, VOCABULARY, length).tolist() for length in lengths]
    labels = [[*generator.integers(1, VOCABULARY, label_tokens - 1).tolist(), END] for _ in range(labels_count)]
    model = GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=512, n_head=8)).eval()
    completer = LocalCompleter(model, None, Equipment("own", "", END, [END], END))
    tree = LabelTree.plant([str(number) for number in range(labels_count)], labels)
    ours = np.array(completer.score(prompts, tree))
    theirs = np.array(one_by_one(model, prompts, labels))
    assert np.allclose(ours, theirs, atol=1e-3), np.abs(ours - theirs).max()
    rivals: dict[str, Callable[[], object]] = {
        "row by label, padded": lambda: one_by_one(model, prompts, labels),
        "tunewright": lambda: completer.score(prompts, tree),
    }
    apart = np.abs(ours - theirs).max()
    title = f"Scores of {labels_count} labels ({label_tokens} tokens each), largest difference {apart:.1e}"
    table(title, race(rivals), unit="rows", count=rows, peer="row by label, padded")


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


if __name__ == "__main__":
    make_rivals()[sys.argv[1]]()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
