"""Make the starter: the small base model and the demo data that ship inside the package.

    python scripts/make_starter.py                 # as shipped: data, tokenizer, model, card
    python scripts/make_starter.py --data-only     # the data files alone, in seconds

The text comes from the grammar in `starter_text.py`, the weights from nothing but that text. The same seed, number of
steps and machine give the same files. What is not covered: any use of the model but as a small base for trying things
out; it knows almost nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import starter_text
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

STARTER = Path(__file__).resolve().parent.parent / "src" / "tunewright" / "starter"
SEED = 7
STEPS = 1900
CONTEXT = 1024
VOCABULARY = 4096
END, PAD, SYSTEM, USER, ASSISTANT = SPECIAL_TOKENS = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]

# The {%- ... -%} marks swallow the line breaks of the template itself; the contents are left as they are.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception("this template knows the roles system, user and assistant, not " + message['role']) -}}
    {%- endif -%}
    {{- '<|' + message['role'] + '|>' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}
            {{- message['content'] + '<|end|>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + '<|end|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""


@dataclass(frozen=True)
class Size:
    """The shape of the model. The shipped one has 4.0 million parameters; a test takes a smaller one."""

    hidden: int = 256
    intermediate: int = 512
    layers: int = 5
    heads: int = 4
    key_value_heads: int = 2


@dataclass(frozen=True)
class Schedule:
    """How the model is trained."""

    steps: int = STEPS
    minutes: float | None = None
    """Stop after this time instead of after `steps`; the result then depends on the machine."""
    tokens_per_step: int = 2048
    lengths: tuple[int, ...] = (256, 256, 256, 512, 256, 256, 256, 1024)
    """Length of the rows, step by step, over and over: mostly short, some at the full context."""
    learning_rate: float = 2.5e-3
    warmup: float = 0.04
    """Share of the steps in which the learning rate rises."""
    floor: float = 0.03
    """Share of the learning rate that is left at the end."""
    weight_decay: float = 0.1
    bfloat16: bool = True


@dataclass(frozen=True)
class Trained:
    """A trained model with what it took."""

    model: LlamaForCausalLM
    steps: int
    tokens: int
    seconds: float
    losses: list[float]


def main() -> None:
    """Make the files and say what was made."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--minutes", type=float, help="stop after this time instead; not repeatable to the bit")
    parser.add_argument("--learning-rate", type=float, default=Schedule.learning_rate)
    parser.add_argument("--float32", action="store_true", help="slower, for CPUs without bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-only", action="store_true")
    parser.add_argument("--out", type=Path, default=STARTER)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    write_data(arguments.out / "data", arguments.seed)
    if arguments.data_only:
        return
    barred = barred_texts(arguments.seed)
    held_out = held_out_documents(arguments.seed, barred)
    tokenizer = make_tokenizer(arguments.seed, barred)
    schedule = Schedule(
        steps=arguments.steps,
        minutes=arguments.minutes,
        learning_rate=arguments.learning_rate,
        bfloat16=not arguments.float32,
    )
    barred |= {document.text.lower() for document in held_out}
    trained = train(tokenizer, Size(), schedule, arguments.seed, barred, progress=True)
    folder = arguments.out / "model"
    save(trained.model, tokenizer, folder)
    scores = measure(LlamaForCausalLM.from_pretrained(folder), tokenizer, held_out)
    minutes = time.process_time() / 60
    (folder / "README.md").write_text(card(trained, schedule, scores, tokenizer, arguments.seed, minutes))
    print(json.dumps({"minutes": round(minutes, 1), "tokens": trained.tokens, "held_out": scores}, indent=2))


# --------------------------------------------------------------------------------------------------------------------
# Data files
# --------------------------------------------------------------------------------------------------------------------


def data_files(seed: int = SEED) -> dict[str, str]:
    """The text of each data file, by name."""
    train_rows, test_rows = starter_text.demo_rows(seed)
    return {
        "train.jsonl": _jsonl(train_rows),
        "test.jsonl": _jsonl(test_rows),
        "chat.jsonl": _jsonl(starter_text.chat_rows(seed)),
        "completions.jsonl": _jsonl(starter_text.completion_rows(seed)),
        "notes.txt": starter_text.notes(seed),
        "README.md": data_card(seed, train_rows, test_rows),
    }


def write_data(folder: Path, seed: int) -> None:
    """Write the data files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in data_files(seed).items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def _jsonl(rows: Sequence[object]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# --------------------------------------------------------------------------------------------------------------------
# Pretraining text
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rendered:
    """A document as the model reads it, up to and with the token that ends it."""

    kind: str
    text: str


def render(document: starter_text.Document) -> str:
    """The text that a document's tokens are made from; the same form as the chat template gives."""
    if isinstance(document, str):
        return document + END
    return "".join(f"<|{message['role']}|>{message['content']}{END}" for message in document)


def documents(name: str, barred: set[str]) -> Iterator[Rendered]:
    """Documents without an end, all different from those of another name; none contains a barred text."""
    writer = starter_text.Writer(name)
    fragments = _Finder(barred)
    while True:
        kind, made = starter_text.document(writer)
        text = render(made)
        if not fragments.any_in(text.lower()):
            yield Rendered(kind, text)


class _Finder:
    """Looks for many texts in one at once, by the first words of each."""

    def __init__(self, texts: set[str]) -> None:
        self.by_start: dict[str, list[str]] = {}
        for text in texts:
            self.by_start.setdefault(text[:12], []).append(text)

    def any_in(self, text: str) -> bool:
        return any(
            whole in text
            for place in range(len(text))
            if (starts := self.by_start.get(text[place : place + 12])) is not None
            for whole in starts
        )


def barred_texts(seed: int) -> set[str]:
    """What the base model must not read: the demo's test rows."""
    return {row["text"].lower() for row in starter_text.demo_rows(seed)[1]}


def held_out_documents(seed: int, barred: set[str], count: int = 400) -> list[Rendered]:
    """Documents that training leaves out, each once."""
    found: dict[str, Rendered] = {}
    source = documents(f"held-out-{seed}", barred)
    while len(found) < count:
        document = next(source)
        found.setdefault(document.text, document)
    return list(found.values())


# --------------------------------------------------------------------------------------------------------------------
# Tokenizer
# --------------------------------------------------------------------------------------------------------------------


def make_tokenizer(
    seed: int, barred: set[str], num_documents: int = 15_000, size: int = VOCABULARY
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer for the grammar's words; any other text falls back to its bytes."""
    source = documents(f"tokenizer-{seed}", barred)
    special = re.compile("|".join(re.escape(token) for token in SPECIAL_TOKENS))
    texts = (special.sub("\n", next(source).text) for _ in range(num_documents))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


# --------------------------------------------------------------------------------------------------------------------
# Training. B rows, T tokens in a row, V words in the vocabulary.
# --------------------------------------------------------------------------------------------------------------------


def make_model(size: Size, vocabulary: int, seed: int) -> LlamaForCausalLM:
    """A new model with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        max_position_embeddings=CONTEXT,
        initializer_range=0.05,  # at this width it learns faster at first than with the usual 0.02
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL_TOKENS.index(END),
        pad_token_id=SPECIAL_TOKENS.index(PAD),
    )
    return LlamaForCausalLM(config)


def batches(
    tokenizer: PreTrainedTokenizerFast, schedule: Schedule, seed: int, barred: set[str]
) -> Iterator[torch.Tensor]:
    """Rows of token ids. Each row begins with a new document and is filled with others until it is full."""
    source = documents(f"train-{seed}", barred)
    step = 0
    while True:
        length = schedule.lengths[step % len(schedule.lengths)]
        rows = []
        for _ in range(schedule.tokens_per_step // length):
            row: list[int] = []
            while len(row) < length:
                row += tokenizer.encode(next(source).text)
            rows.append(row[:length])
        yield torch.tensor(rows)
        step += 1


def train(
    tokenizer: PreTrainedTokenizerFast,
    size: Size,
    schedule: Schedule,
    seed: int,
    barred: set[str],
    progress: bool = False,
) -> Trained:
    """Train a model from scratch: AdamW, a warm-up and a cosine."""
    random.seed(seed)
    model = make_model(size, len(tokenizer), seed)
    model.train()
    matrices = [weight for weight in model.parameters() if weight.ndim >= 2]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=schedule.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    start = time.monotonic()
    losses: list[float] = []
    tokens = 0
    bar = tqdm(total=schedule.steps if schedule.minutes is None else None, unit="step", disable=not progress)
    for step, ids_BT in enumerate(batches(tokenizer, schedule, seed, barred)):
        elapsed = time.monotonic() - start
        done = step / schedule.steps if schedule.minutes is None else elapsed / (60 * schedule.minutes)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * _rate(done, schedule)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=schedule.bfloat16):
            logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), ids_BT[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += ids_BT[:, 1:].numel()
        losses.append(loss.item())
        bar.update()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}", refresh=False)
    bar.close()
    return Trained(model.eval(), len(losses), tokens, time.monotonic() - start, losses)


def _rate(done: float, schedule: Schedule) -> float:
    """The share of the learning rate when this share of the training is done."""
    if done < schedule.warmup:
        return (done + 0.1 * schedule.warmup) / (1.1 * schedule.warmup)
    through = (done - schedule.warmup) / (1 - schedule.warmup)
    return schedule.floor + (1 - schedule.floor) * 0.5 * (1 + math.cos(math.pi * through))


@torch.no_grad()
def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, held_out: Sequence[Rendered]
) -> dict[str, dict[str, float]]:
    """Held-out loss for each kind of document and over all: nats per token, perplexity and bits per byte of text.

    Each document is scored alone, after the token that ends the one before it.
    """
    nats: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    num_bytes: Counter[str] = Counter()
    end = tokenizer.convert_tokens_to_ids(END)
    special = re.compile("|".join(re.escape(token) for token in SPECIAL_TOKENS))
    for document in held_out:
        ids_T = torch.tensor([end, *tokenizer.encode(document.text)][:CONTEXT])
        logits_TV = model(input_ids=ids_T[None, :-1]).logits[0].float()
        loss = torch.nn.functional.cross_entropy(logits_TV, ids_T[1:], reduction="sum").item()
        for key in (document.kind, "all"):
            nats[key] += loss
            tokens[key] += len(ids_T) - 1
            num_bytes[key] += len(special.sub("", document.text).encode())
    return {
        key: {
            "loss": round(nats[key] / tokens[key], 4),
            "perplexity": round(math.exp(nats[key] / tokens[key]), 3),
            "bits_per_byte": round(nats[key] / math.log(2) / num_bytes[key], 4),
        }
        for key in sorted(nats)
    }


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in half precision, with a configuration that loads it in single precision."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config.eos_token_id = model.config.eos_token_id
    model.generation_config.pad_token_id = model.config.pad_token_id
    model.half().save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(folder)


# --------------------------------------------------------------------------------------------------------------------
# Cards
# --------------------------------------------------------------------------------------------------------------------


def data_card(seed: int, train_rows: Sequence[starter_text.Row], test_rows: Sequence[starter_text.Row]) -> str:
    """The README of the data files."""
    tested = starter_text.demo_messages(seed)[1]
    untaught = sum(not all(map(starter_text.is_taught, message.used)) for message in tested)
    unread = sum(not all(map(starter_text.is_known, message.used)) for message in tested)
    counts = [Counter(row["label"] for row in rows) for rows in (train_rows, test_rows)]
    table = "\n".join(f"| {label} | {counts[0][label]} | {counts[1][label]} |" for label in sorted(counts[0]))
    return f"""\
# Demo data

**All of it is synthetic.** A grammar written for this project (`scripts/starter_text.py`) made every sentence; no
customer wrote any of them, and the names, towns and order numbers are invented. Seed {seed}. Licence: Apache-2.0.

| file | rows | what |
| --- | --- | --- |
| train.jsonl | {len(train_rows)} | `text`, `label`: messages to a shop, and the desk that has to act |
| test.jsonl | {len(test_rows)} | the same, for testing |
| chat.jsonl | 40 | `messages`: conversations in the OpenAI form, some of several turns |
| completions.jsonl | 40 | `prompt`, `completion` |
| notes.txt | | plain text: stories, facts, how-to's, reviews |

## The task

A shop sells household things and a membership with a monthly box. The label is the desk for what the writer wants now:

| label | train | test |
| --- | --- | --- |
{table}
| all | {len(train_rows)} | {len(test_rows)} |

About two thirds of the messages also mention a matter of another desk: one that is denied ("I do not want to send it
back, I want to know where it is"), settled ("the invoice was corrected, but the app crashes"), or wished for before
the writer's mind changed. So single words say little, and their order, negation and contrast say much.

The test rows are harder than the training rows: {untaught} of the {len(test_rows)} have a sentence frame or a phrase
that is in no training row, and a third of the things that people buy in them are not in training rows either. No text
occurs twice, not even with other capitals or punctuation. The labels have no noise.

## What the base model knows of it

The base model in `../model` was pretrained on text of the same grammar. About half of that are messages like these,
many with a help desk's answer or with questions that say what the customer wants ("Is it about the bill or about a late
parcel?"). So it has read much about the task, in other words, but never a message with its label. No test row's
text is part of what it has read, and {unread} of the {len(test_rows)} test rows have a frame or a phrase that is
nowhere in it. Still, that is friendlier than real life, where customers do not share a grammar with the pretraining
text. Read the demo's result as a check that training works, not as a promise for your data.

Remake these files: `python scripts/make_starter.py --data-only --seed {seed}`.
"""


def card(
    trained: Trained,
    schedule: Schedule,
    scores: dict[str, dict[str, float]],
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    minutes: float,
) -> str:
    """The README of the model."""
    config = trained.model.config
    parameters = sum(weight.numel() for weight in trained.model.parameters())
    table = "\n".join(
        f"| {kind} | {score['loss']:.3f} | {score['perplexity']:.2f} | {score['bits_per_byte']:.3f} |"
        for kind, score in scores.items()
    )
    command = f"python scripts/make_starter.py --seed {seed}" + (
        f" --steps {trained.steps}" if schedule.minutes is None else f" --minutes {schedule.minutes}"
    )
    return f"""\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [synthetic, demo]
---

# Tunewright starter

A very small language model that ships with Tunewright, so that its demo, its tests and its tutorials run offline on any
machine. It has read nothing but synthetic text from a grammar written for this project: reviews, messages to shops,
little stories, a few facts. **It knows almost nothing, makes things up, and is not for any real use.**

| | |
| --- | --- |
| parameters | {parameters:,} (embeddings tied), stored in half precision |
| shape | Llama: {config.num_hidden_layers} layers, width {config.hidden_size}, {config.num_attention_heads} heads over
 {config.num_key_value_heads} key-value heads |
| context | {config.max_position_embeddings:,} tokens |
| tokenizer | byte-level BPE, {len(tokenizer):,} tokens, all 256 bytes; ends documents and turns with `{END}`; no bos |
| chat | `{USER}...{END}{ASSISTANT}...{END}`, with `{SYSTEM}...{END}` in front if there is a system message |
| seen | {trained.tokens:,} tokens in {trained.steps:,} steps, made anew for each step |
| seed | {seed} |
| made in | {minutes:.0f} minutes of one CPU thread ({"bfloat16" if schedule.bfloat16 else "float32"} arithmetic) |
| licence | Apache-2.0 |

## Held-out text

400 documents of the same grammar that training left out, each scored alone. The text is far more regular than real
English, so these numbers say nothing about real English.

| kind | loss (nats per token) | perplexity | bits per byte |
| --- | --- | --- | --- |
{table}

## What it has not read

The rows of `../data/test.jsonl`, and the phrases that only they use. It has read other messages of the same kind, with
a help desk's answers and with questions about them that are answered; see `../data/README.md`.

## What it has not learnt

To look back. It knows well which words follow which, and little of what a text said before: people change their names
within a story, and questions about a text are answered hardly better than by chance.

## Remake it

    {command}

The same seed, steps, library versions and kind of CPU give the same weights. No data were downloaded.
""".replace("heads over\n ", "heads over ")


if __name__ == "__main__":
    main()
