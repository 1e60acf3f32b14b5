"""Steps of training: our batches (logits at the targets alone) against Transformers' own collator (logits everywhere).

The same Trainer, optimizer, rows, padding and objective: the loss on the label's tokens. Random weights and tokens of a
GPT-2 shape with fewer layers, since speed does not depend on them; lengths as IMDB's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from bench.timing import race, table
from tunewright.chat import Rendering
from tunewright.train.assembling import Collator, Rows

ROWS, BATCH = 16, 2


def main() -> None:
    rows = make_rows()
    model = GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=512, n_head=8, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    rivals: dict[str, Callable[[], object]] = {
        "Transformers' collator": lambda: train(model, rows, padded),
        "tunewright": lambda: train(model, rows, Collator(0)),
    }
    table("Training, label-only loss", race(rivals), unit="examples", count=ROWS, peer="Transformers' collator")


def make_rows() -> list[Rendering]:
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(240), 0.68, ROWS), 16, 1024).astype(int)
    return [
        Rendering(generator.integers(1, 50257, length).tolist(), [False] * (length - 2) + [True] * 2)
        for length in lengths
    ]


def padded(rows: Sequence[Rendering]) -> dict[str, torch.Tensor]:
    """What DataCollatorForSeq2Seq and the like make of a batch: labels for each place, -100 where there is no loss."""
    longest = max(len(row.ids) for row in rows)
    batch = {
        "input_ids": torch.zeros((len(rows), longest), dtype=torch.long),
        "attention_mask": torch.zeros((len(rows), longest), dtype=torch.long),
        "labels": torch.full((len(rows), longest), -100),
    }
    for number, row in enumerate(rows):
        ids = torch.tensor(row.ids)
        batch["input_ids"][number, : len(ids)] = ids
        batch["attention_mask"][number, : len(ids)] = 1
        batch["labels"][number, : len(ids)] = torch.where(torch.tensor(row.mask), ids, -100)
    return batch


def train(model: Any, rows: list[Rendering], collate: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=BATCH, num_train_epochs=1, save_strategy="no",
            report_to="none", disable_tqdm=True, use_cpu=True, remove_unused_columns=False, logging_strategy="no",
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=Rows(rows), data_collator=collate).train()
