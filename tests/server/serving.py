"""A server with tiny models behind it, for tests that ask it for completions."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import torch
from openai import AzureOpenAI, OpenAI

from endpoint_fixtures import running
from tunewright import chat, models
from tunewright.chat import Message
from tunewright.run import write_json
from tunewright.server import keys
from tunewright.server import models as named
from tunewright.server.app import create_app
from tunewright.server.models import Target
from tunewright.server.state import Server, Settings
from tunewright.testing import tiny_model

LABELS = ("good", "bad")
CONTEXT = 1024


def make_base(folder: Path) -> Path:
    """A tiny model whose weights are large, so that prompts and tokens are told apart."""
    tiny_model(folder, context=CONTEXT)
    model = models.load_folder(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.4)
    model.save_pretrained(str(folder))
    return folder


def make_adapter(base: Path, folder: Path, *, seed: int, labels: Sequence[str] | None = None) -> Path:
    """A random adapter, with what training writes down of its rendering."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    with models.quiet():
        model = get_peft_model(
            models.load_folder(base), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
        )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.5)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    write_rendering(base, folder, labels)
    return folder


def write_rendering(base: Path, folder: Path, labels: Sequence[str] | None) -> None:
    tokenizer = models.load_folder_tokenizer(base)
    equipment = chat.equip(tokenizer)
    golden = chat.golden(tokenizer, equipment, [(Message("user", "is it?"), Message("assistant", "good"))])
    task = "classification" if labels else "chat"
    write_json(folder / "rendering.json", {**golden, "task": task, "labels": list(labels) if labels else None})


def make_full(base: Path, folder: Path, *, seed: int) -> Path:
    """A whole tuned model."""
    shutil.copytree(base, folder)
    model = models.load_folder(base)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.4)
    model.save_pretrained(str(folder))
    return folder


@dataclass
class Models:
    """What a test server knows: a base, its adapters, a whole model."""

    base: Path
    folders: dict[str, Path] = field(default_factory=dict)


def make_models(folder: Path) -> Models:
    base = make_base(folder / "base")
    return Models(
        base,
        {
            "ft:one": make_adapter(base, folder / "one", seed=1),
            "ft:two": make_adapter(base, folder / "two", seed=2),
            "ft:sorter": make_adapter(base, folder / "sorter", seed=3, labels=LABELS),
            "ft:full": make_full(base, folder / "full", seed=4),
        },
    )


def fill(server: Server, known: Models) -> str:
    """Name the models on a server; gives an inference key."""
    named.add_base(server.store, "base", str(known.base))
    start = named.find(server, "base")
    with server.store.begin() as connection:
        for name, folder in known.folders.items():
            kind = "full" if name == "ft:full" else "adapter"
            named.record(connection, name, job_id="ftjob-x", start=start, folder=str(folder), kind=kind)
    return keys.create(server.store, "test", scope="training")


@dataclass
class Serving:
    """A server that runs, and clients of it."""

    url: str
    server: Server
    key: str

    def client(self, **options: Any) -> OpenAI:
        return OpenAI(
            **{"base_url": f"{self.url}/v1", "api_key": self.key, "max_retries": 0, "timeout": 120, **options}
        )

    def azure(self, **options: Any) -> AzureOpenAI:
        given = {"azure_endpoint": self.url, "api_key": self.key, "api_version": "2024-10-21", "max_retries": 0}
        return AzureOpenAI(**{**given, "timeout": 120, **options})

    def target(self, name: str) -> Target:
        return named.find(self.server, name)


@contextlib.contextmanager
def serving(
    data: Path, known: Models, *, echo: Any = None, fill_again: bool = True, **settings: Any
) -> Iterator[Serving]:
    server = Server.open(Settings(data, **settings))
    key_file = data / "key"
    if fill_again:
        key_file.write_text(fill(server, known))
    key = key_file.read_text()
    if echo is not None:
        server.engines = echo
    with running(create_app(server)) as url:
        yield Serving(url, server, key)


__all__ = ["LABELS", "Models", "Serving", "make_models", "openai", "serving"]
