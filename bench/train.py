"""Steps of training against what people use: examples a second and peak memory, like with like.

The lab's own job: a GPT-2 of 124M weights (random, since speed does not depend on them), texts of IMDB's lengths, two
tokens of label behind each. Every rival is timed on the same rows, after a step of others to warm up; they come in
pairs of like length, so that those that group by length have next to no padding. Each measurement is a process of its
own, so that its peak memory is its own; the rivals take turns, so that a busy moment of the machine hits all of them.

`python -m bench.train RIVAL` runs one measurement and prints it as JSON.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

REPEATS = 5
REPEATS_OF_STEPS = 3
"""Of the tables that leave out single steps."""
EXAMPLES = 4
"""For each optimizer step."""
POOL = 100
"""Rows that are sorted by length to make pairs: Trainer groups fifty batches at once."""


@dataclass(frozen=True)
class Rival:
    """One way to train."""

    engine: str
    """naive (every row padded to 1,024), hf (Trainer, rows of like length together), trl, or tunewright."""
    method: str = "full"
    loss: str = "label"
    """label: on the label's tokens; all: on every token."""
    precision: str = "bf16"
    dropout: float = 0.0
    model: str = "gpt2"
    layout: str = ""
    """trl: padded, free (padding-free) or packed."""
    compact: bool = True
    """trl: leave out places without a loss before the head, which it does by itself on a GPU alone."""
    batch: int = 2
    """Rows of one forward (hf and trl); accumulated to EXAMPLES, but for the lab's recipe."""
    steps: int = 2
    without: str = ""
    """tunewright: a step that is left out (see `_leave_out`)."""
    frozen: int = 0
    """tunewright: layers that stay as they are, from the second epoch on."""

    @property
    def name(self) -> str:
        return ",".join(str(value) for value in self.__dict__.values())

    @classmethod
    def named(cls, name: str) -> Rival:
        fields = cls.__dataclass_fields__.values()
        kinds = {"str": str, "float": float, "int": int, "bool": lambda value: value == "True"}
        return cls(*(kinds[field.type](value) for field, value in zip(fields, name.split(","), strict=True)))


STEPS = "What each step wins"
LAB = Rival("naive", loss="all", precision="fp32", dropout=0.1, steps=1)
TABLES: dict[str, dict[str, Rival]] = {
    "The lab's recipe as people run it, and ours": {
        "lab: padded to 1,024, batch 2, all tokens, dropout 0.1, float32": LAB,
        "tunewright: lora, label only, bf16": Rival("tunewright", "lora"),
        "tunewright: lora, label only, float32": Rival("tunewright", "lora", precision="fp32"),
    },
    "Label-only loss, all weights": {
        "HF Trainer, group_by_length": Rival("hf"),
        "TRL, its best": Rival("trl", layout="free"),
        "tunewright": Rival("tunewright"),
    },
    "Label-only loss, LoRA of rank 16": {
        "TRL, its best": Rival("trl", "lora", layout="free"),
        "tunewright": Rival("tunewright", "lora"),
    },
    "Loss on all tokens, all weights": {
        "HF Trainer, group_by_length": Rival("hf", loss="all"),
        "TRL, its best": Rival("trl", loss="all", layout="free"),
        "tunewright": Rival("tunewright", loss="all"),
    },
    f"{STEPS}: label-only loss, all weights": {
        "tunewright": Rival("tunewright"),
        "the last layer's work at all places": Rival("tunewright", without="narrow"),
        "rows padded, not end to end": Rival("tunewright", without="flat"),
        "one row a forward": Rival("tunewright", without="bins"),
        "GELU as Transformers has it": Rival("tunewright", without="slim"),
        "the head in the type of autocast": Rival("tunewright", without="few"),
        "pages of 4 KB": Rival("tunewright", without="pages"),
        "float32": Rival("tunewright", precision="fp32"),
        "and won: six of twelve layers frozen, from the second epoch on": Rival("tunewright", frozen=6),
    },
    f"{STEPS}: label-only loss, LoRA of rank 16": {
        "tunewright": Rival("tunewright", "lora"),
        "the last layer's work at all places": Rival("tunewright", "lora", without="narrow"),
        "rows padded, not end to end": Rival("tunewright", "lora", without="flat"),
        "GELU and LoRA as Transformers and PEFT have them": Rival("tunewright", "lora", without="slim"),
        "frozen weights in float32": Rival("tunewright", "lora", without="halves"),
        "and won: six of twelve layers frozen, from the second epoch on": Rival("tunewright", "lora", frozen=6),
    },
}


def main() -> None:
    """Print the tables; each row of one is compared with its first."""
    rivals = list(dict.fromkeys(rival for table in TABLES.values() for rival in table.values()))
    others = {rival for title, table in TABLES.items() if not title.startswith(STEPS) for rival in table.values()}
    measured: dict[Rival, list[dict[str, float]]] = {rival: [] for rival in rivals}
    for number in range(REPEATS):
        for rival in rivals if number < REPEATS_OF_STEPS else [rival for rival in rivals if rival in others]:
            measured[rival].append(measure(rival))
            print(f"{number + 1}/{REPEATS} {rival.name}: {measured[rival][-1]}", file=sys.stderr, flush=True)
    for title, table in TABLES.items():
        peer, *_ = table.values()
        print(f"### {title}\n\n| | examples/s (min to max) | times the first (min to max) | peak memory, GB |")
        print("| --- | ---: | ---: | ---: |")
        for name, rival in table.items():
            rates = [one["examples"] / one["seconds"] for one in measured[rival]]
            peers = [one["examples"] / one["seconds"] for one in measured[peer]]
            ratios = [ours / theirs for ours, theirs in zip(rates, peers, strict=False)]  # of the rounds that both had
            peak = statistics.median(one["peak_bytes"] for one in measured[rival]) / 1e9
            print(f"| {name} | {_spread(rates)} | {_spread(ratios)} | {peak:.1f} |")
        print()


def measure(rival: Rival) -> dict[str, float]:
    """Seconds and peak memory of one rival in a fresh process, in the environment that it would run in."""
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    environment["THP_MEM_ALLOC_ENABLE"] = "0" if rival.without == "pages" else "1"
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "bench.train", rival.name],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if said.returncode:
        raise RuntimeError(said.stderr[-3000:])
    measured: dict[str, float] = json.loads(said.stdout.splitlines()[-1])
    return measured


def run(rival: Rival) -> dict[str, float]:
    """One measurement in this process: a step to warm up, then `steps` timed ones."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(rival, folder)
        if rival.layout != "packed":
            trainer._get_train_sampler = lambda *_: range(len(trainer.train_dataset))
        trainer.add_callback(clock)
        trainer.train()
    per_step = 2 if rival.engine == "naive" else EXAMPLES
    examples = per_step * (rival.steps + 1) * (len(clock.ends) - 1) / len(clock.ends)  # packs are not whole steps
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": clock.ends[-1] - clock.ends[0], "examples": examples, "peak_bytes": peak}


def make_rows(steps: int, vocab_size: int) -> list[tuple[list[int], list[bool]]]:
    """Ids and loss masks of a step to warm up and `steps` to be timed, lengths as IMDB's under GPT-2's tokenizer."""
    generator = np.random.default_rng(0)
    pool = np.sort(np.clip(generator.lognormal(np.log(240), 0.68, POOL), 16, 1022).astype(int))
    pairs = steps * EXAMPLES // 2
    first = ((np.arange(pairs) + 0.5) / pairs * (POOL - 1)).astype(int)  # evenly over the distribution
    chosen = [POOL // 2, POOL * 3 // 4, *generator.permutation(first)]
    lengths = [length for place in chosen for length in pool[place : place + 2]]
    rows = [generator.integers(1, vocab_size, length + 2).tolist() for length in lengths]
    return [(ids, [False] * (len(ids) - 2) + [True] * 2) for ids in rows]


def make_model(rival: Rival) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    if rival.model == "starter":
        from tunewright import starter

        model = AutoModelForCausalLM.from_pretrained(str(starter.model_path()), dtype=torch.float32)
    else:
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), rival.dropout)
        model = GPT2LMHeadModel(GPT2Config(**dropouts))
    if rival.method == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
        model = get_peft_model(model, config)
    return model


def _trainer(rival: Rival, folder: str) -> Any:
    from transformers import Trainer, TrainingArguments

    model = make_model(rival)
    per_step = 2 if rival.engine == "naive" else EXAMPLES
    rows = make_rows(rival.steps, model.config.vocab_size)[: per_step * (rival.steps + 1)]
    if rival.loss == "all":
        rows = [(ids, [True] * len(ids)) for ids, _ in rows]
    accumulation = 1 if rival.layout == "packed" else max(1, per_step // rival.batch)
    options: dict[str, Any] = {
        "output_dir": folder, "num_train_epochs": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True,
        "logging_strategy": "no", "bf16": rival.precision == "bf16", "disable_tqdm": True, "learning_rate": 1e-5,
        "per_device_train_batch_size": rival.batch, "gradient_accumulation_steps": accumulation,
    }  # fmt: skip
    if rival.engine == "tunewright":
        return _ours(rival, model, rows, options)
    if rival.engine == "trl":
        return _trl(rival, model, rows, options)
    if rival.engine == "hf":
        options |= {"train_sampling_strategy": "group_by_length", "length_column_name": "length"}
    from datasets import Dataset

    data = Dataset.from_list(
        [
            {"input_ids": ids, "length": len(ids), "labels": [i if f else -100 for i, f in zip(ids, mask, strict=True)]}
            for ids, mask in rows
        ]
    )
    arguments = TrainingArguments(remove_unused_columns=True, **options)
    longest = 1024 if rival.engine == "naive" else None
    return Trainer(model=model, args=arguments, train_dataset=data, data_collator=lambda batch: padded(batch, longest))


def padded(rows: Sequence[dict[str, Any]], longest: int | None = None) -> dict[str, Any]:
    """What DataCollatorForSeq2Seq and the like make of a batch: labels for each place, -100 where there is no loss."""
    import torch

    size = longest or max(len(row["input_ids"]) for row in rows)
    batch = {
        "input_ids": torch.zeros((len(rows), size), dtype=torch.long),
        "attention_mask": torch.zeros((len(rows), size), dtype=torch.long),
        "labels": torch.full((len(rows), size), -100),
    }
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        batch["input_ids"][number, :length] = torch.tensor(row["input_ids"])
        batch["attention_mask"][number, :length] = 1
        batch["labels"][number, :length] = torch.tensor(row["labels"])
    return batch


def _trl(rival: Rival, model: Any, rows: Any, options: dict[str, Any]) -> Any:
    import trl.trainer.utils
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from tunewright import starter

    if rival.compact:
        trl.trainer.utils._use_triton = lambda device: True
    arguments = SFTConfig(
        max_length=1024 if rival.layout == "packed" else None, gradient_checkpointing=False,
        completion_only_loss=rival.loss == "label",
        packing=rival.layout == "packed", padding_free=rival.layout == "free", shuffle_dataset=False,
        **({} if rival.layout == "packed" else {"train_sampling_strategy": "group_by_length"}),
        **options,
    )  # fmt: skip
    columns: dict[str, Any] = {"input_ids": [ids for ids, _ in rows]}
    if rival.loss == "label":
        columns["completion_mask"] = [[int(flag) for flag in mask] for _, mask in rows]
    tokenizer = AutoTokenizer.from_pretrained(str(starter.model_path()))
    return SFTTrainer(model=model, args=arguments, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer)


def _ours(rival: Rival, model: Any, rows: Any, options: dict[str, Any]) -> Any:
    """The product's own step in a bare Trainer: what is timed is what `tunewright train` runs for each step."""
    from transformers import TrainingArguments

    from tunewright.chat import Rendering
    from tunewright.lean import halve_frozen
    from tunewright.memory import TOKENS_PER_FORWARD
    from tunewright.train.assembling import Rendered, Rows, collate
    from tunewright.train.frozen import Lower, freeze
    from tunewright.train.steps import Steps, settle

    _leave_out(rival.without)
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    if rival.frozen:
        freeze(inner, rival.frozen)
        for name, weight in model.named_parameters():
            if any(f".h.{layer}." in name for layer in range(rival.frozen)):
                weight.requires_grad_(False)  # the adapters there, which `tunewright train` does not make
    layout = settle(model, model.config.vocab_size, 1024)
    if options["bf16"] and hasattr(model, "peft_config") and rival.without != "halves":
        halve_frozen(model)
    arguments = TrainingArguments(
        remove_unused_columns=False,
        **options | {"per_device_train_batch_size": EXAMPLES, "gradient_accumulation_steps": 1},
    )
    data = Rows(Rendered([Rendering(ids, mask) for ids, mask in rows], [""] * len(rows)))
    budget = 1 if rival.without == "bins" else TOKENS_PER_FORWARD["cpu"]
    lower = None
    if rival.frozen:
        lower = Lower(inner, rival.frozen, Path(options["output_dir"]) / "lower.npy")
        lower.fill(data, layout, 0, budget, bf16=options["bf16"])
    return Steps(
        layout=layout, pad_id=0, budget=budget, lower=lower,
        model=model, args=arguments, train_dataset=data, data_collator=collate,
    )  # fmt: skip


def _leave_out(what: str) -> None:
    """Take the plain way for one step, in this process alone."""
    from tunewright import attention
    from tunewright.train import losses, steps

    if what == "narrow":
        losses.NARROW_BELOW = 0.0
    elif what == "few":
        losses.FEW = 0
    elif what == "flat":
        attention.fits = lambda *_: False
    elif what == "slim":
        steps.slim = lambda *_: []


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    print(json.dumps(run(Rival.named(sys.argv[1]))))
