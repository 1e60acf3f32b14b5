"""Tiny packaged models and a server for them, for tests that need something to talk to over HTTP.

The models are random, so what they say means nothing; everything else about them is real: weights and a trained
tokenizer in a folder, golden ids beside them, keys, and a run folder around it all.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import uvicorn
from fastapi import FastAPI
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tunewright import chat, recipe
from tunewright.chat import Message
from tunewright.endpoint.connections import Connection
from tunewright.endpoint.process import listen
from tunewright.run import Run, create, write_json, write_text

CORPUS = [
    "a warm and quiet film that stays with you",
    "the plot is thin and the jokes are old, very old",
    "User:\nis it good?\nAssistant:\npositive\nnegative\nneutral",
]
KEY, TEST_KEY = "tw-client-key", "tw-test-key"
CONTEXT = 256


def make_tokenizer(corpus: Sequence[str] = CORPUS, vocab_size: int = 320) -> Any:
    """Byte-level BPE trained on a few lines, equipped as `prepare` would."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def make_model(vocab_size: int, kind: str = "llama", seed: int = 0) -> Any:
    """Two random layers. The weights are large, so that prompts and tokens are told apart."""
    torch.manual_seed(seed)
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab_size,
                n_embd=32,
                n_layer=2,
                n_head=2,
                n_positions=CONTEXT,
                initializer_range=0.4,
                bos_token_id=0,
                eos_token_id=0,
            )
        ).eval()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CONTEXT,
            initializer_range=0.4,
            bos_token_id=None,
            eos_token_id=0,
        )
    ).eval()


def package(
    folder: Path, *, labels: Sequence[str] | None = None, task: str = "chat", kind: str = "llama", deploy: str = "{}"
) -> Run:
    """A run folder that looks as if `package` had just finished, with keys for an endpoint."""
    asked = recipe.loads(
        f"name: tiny\nmodel: starter\ntask: {task}\ndata: {{train: rows.jsonl}}\ntrain: {{use_cpu: true}}\n"
        f"deploy: {deploy}\n"
    )
    run = create(folder, asked)
    tokenizer = make_tokenizer()
    equipment = chat.equip(tokenizer)
    make_model(len(tokenizer), kind).save_pretrained(run.packaged_model)
    tokenizer.save_pretrained(run.packaged_model)
    answers = labels or ["thin and old", "a warm film"]
    golden = chat.golden(
        tokenizer, equipment, [(Message("user", line), Message("assistant", answers[0])) for line in CORPUS]
    )
    rendering = {**golden, "task": task, "labels": list(labels) if labels else None, "max_length": CONTEXT}
    write_json(run.rendering_file, rendering)
    write_text(run.key_file, KEY + "\n", mode=0o600)
    write_text(run.test_key_file, TEST_KEY + "\n", mode=0o600)
    return run


@contextlib.contextmanager
def running(
    app: FastAPI, *, grace_s: float = 5, connection: type[Connection] = Connection, most: int | None = None
) -> Iterator[str]:
    """The app on a free port of loopback in a thread of its own, for `most` connections; gives its base URL."""
    with contextlib.closing(listen("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=connection,
                limit_concurrency=most,
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="on",
                ws="none",
                timeout_graceful_shutdown=grace_s,
            )
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join()
