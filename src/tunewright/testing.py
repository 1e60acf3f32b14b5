"""Fakes and small things for tests, ours and plug-ins' alike. Public.

FakeBackend   keeps the backend contract without doing any work
EchoEngines   answers a server's completions at once, in its own process, with what was asked
tiny_model    a random model of a few thousand weights, with its tokenizer, in a folder
tiny_data     a small labelled data set that a tiny model can learn
"""

from __future__ import annotations

import json
import random
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunewright import models
from tunewright.backends.base import Job, Problem, Resource, Status
from tunewright.errors import RecipeError
from tunewright.recipe import Recipe
from tunewright.run import Run, write_json

if TYPE_CHECKING:
    from tunewright.server.models import Target

WORDS = {
    "good": ("lovely", "great", "fine", "superb", "kind"),
    "bad": ("awful", "poor", "broken", "rude", "dull"),
}

COMPARISON = {
    "baseline": "base", "metric": "accuracy", "tuned": 1.0, "baseline_value": 0.5, "difference": 0.5,
    "interval": [0.4, 0.6], "p_value": 0.01, "test": "none", "verdict": "better",
}  # fmt: skip
MANIFESTS: dict[str, dict[str, Any]] = {
    "prepare": {"splits": {}, "labels": None, "findings": [], "counts": []},
    "train": {"steps": 0, "final_loss": None, "trainable_parameters": 0, "sha256": {}},
    "evaluate": {"rows": 0, "models": {"tuned": {}}, "comparison": COMPARISON, "comparisons": [], "must_beat": "base"},
    "package": {"files": {}, "mlflow": None},
}
"""What the fake leaves behind for each stage: the keys that others read, and nothing that was computed."""


class FakeBackend:
    """A backend that hands back each stage after a number of polls, and can be told to fail or to forget.

    Args:
        settings: `polls` (how many polls a job takes), `fail` (a stage that fails), `forget` (a stage whose job is
            lost). Anything else is refused, as a real backend refuses it.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        unknown = set(settings) - {"polls", "fail", "forget"}
        if unknown:
            raise RecipeError(f"backend.{sorted(unknown)[0]}: unknown key; known: polls, fail, forget")
        self.polls: int = settings.get("polls", 2)
        self.fail: str | None = settings.get("fail")
        self.forget: str | None = settings.get("forget")
        self.jobs: dict[tuple[str, str], Job] = {}
        self.asked: dict[str, int] = {}
        self.standing: dict[str, list[Resource]] = {}

    def check(self, recipe: Recipe, stages: tuple[str, ...]) -> list[Problem]:
        return []

    def submit(self, stage: str, run: Run) -> Job:
        key = (run.id, stage)
        if key not in self.jobs:
            job = Job(stage, f"{run.id}/{stage}/{len(self.jobs)}")
            self.jobs[key] = job
            self.asked[job.id] = 0
            self.standing.setdefault(run.id, []).append(Resource("job", job.id))
        return self.jobs[key]

    def poll(self, job: Job, run: Run) -> Status:
        if job.id not in self.asked or job.stage == self.forget:
            return Status("lost")
        self.asked[job.id] += 1
        if self.asked[job.id] <= self.polls:
            return Status("running")
        self.jobs.pop((run.id, job.stage), None)
        if job.stage == self.fail:
            return Status("failed", "StageError", f"{job.stage} failed, as it was told to")
        return Status("done")

    def collect(self, job: Job, run: Run) -> None:
        write_json(run.manifest_file(job.stage), MANIFESTS[job.stage])

    def cancel(self, job: Job, run: Run) -> None:
        self.jobs.pop((run.id, job.stage), None)
        self.asked.pop(job.id, None)

    def find(self, run: Run) -> list[Resource]:
        return list(self.standing.get(run.id, []))

    def remove(self, resource: Resource, run: Run) -> Literal["gone", "going"]:
        kept = [one for one in self.standing.get(run.id, []) if one.name != resource.name]
        self.standing[run.id] = kept
        return "gone"


class EchoEngines:
    """Engines that need no weights: the reply is the last message, or the prompt, and a token is a word."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        """Model and path of each request."""

    async def ask(self, target: Target, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        self.asked.append((target.name, path))
        said = _last_said(body)
        chat = path == "/chat/completions"
        common = {"id": "chatcmpl-echo" if chat else "cmpl-echo", "created": 0, "model": body["model"]}
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": "stop"}
        choice |= {"message": {"role": "assistant", "content": said, "refusal": None}} if chat else {"text": said}
        kind = "chat.completion" if chat else "text_completion"
        return {**common, "object": kind, "choices": [choice], "usage": _words(said)}

    async def stream(self, target: Target, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        self.asked.append((target.name, path))
        said = _last_said(body)
        chat = path == "/chat/completions"
        common = {"id": "chatcmpl-echo" if chat else "cmpl-echo", "created": 0, "model": body["model"]}
        common |= {"object": "chat.completion.chunk" if chat else "text_completion", "usage": None}
        if chat:
            first = {"role": "assistant", "content": "", "refusal": None}
            yield {**common, "choices": [{"index": 0, "delta": first, "logprobs": None, "finish_reason": None}]}
        for number, word in enumerate(said.split(" ")):
            text = f" {word}" if number else word
            delta = {"delta": {"content": text}} if chat else {"text": text}
            yield {**common, "choices": [{"index": 0, **delta, "logprobs": None, "finish_reason": None}]}
        end: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
        yield {**common, "choices": [{"index": 0, **end, "logprobs": None, "finish_reason": "stop"}]}
        yield {**common, "choices": [], "usage": _words(said)}

    async def aclose(self) -> None:
        return


def _last_said(body: Mapping[str, Any]) -> str:
    if "messages" in body:
        return str(body["messages"][-1].get("content") or "")
    return str((body.get("prompt") or [""])[0])


def _words(said: str) -> dict[str, int]:
    count = len(said.split())
    return {"prompt_tokens": count, "completion_tokens": count, "total_tokens": 2 * count}


def tiny_model(folder: Path, *, context: int = 256, template: str | None = None, eos: bool = True) -> Path:
    """A random Llama of about 28,000 weights and a byte-level tokenizer with 300 tokens, in `folder`.

    Args:
        folder: made if it is not there.
        context: longest sequence in tokens.
        template: chat template of the tokenizer; none by default, as with many base models.
        eos: whether the tokenizer has an end-of-sequence token.
    """
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|eos|>"] if eos else []
    trainer = BpeTrainer(
        vocab_size=300,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(words) for words in WORDS.values()], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eos|>" if eos else None)
    if template is not None:
        wrapped.chat_template = template
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=wrapped.eos_token_id,
        pad_token_id=None,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with models.quiet():
        LlamaForCausalLM(config).save_pretrained(str(folder))
        wrapped.save_pretrained(str(folder))
    return folder


def tiny_data(folder: Path, *, train: int = 60, test: int = 20, seed: int = 0) -> dict[str, str]:
    """train.jsonl and test.jsonl with `text` and `label` (good or bad); gives the recipe's `data` for them."""
    generator = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("test", test)):
        lines = []
        for number in range(count):
            label = ("good", "bad")[number % 2]
            words = generator.choices(WORDS[label], k=3)
            lines.append(json.dumps({"text": f"{' '.join(words)} {split[0]}{number}", "label": label}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")}
