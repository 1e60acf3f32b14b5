"""The stage: merged model, adapter, tokenizer, golden ids, GGUF, card, MLflow; package/manifest.json is last."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunewright import chat, gguf_header, models
from tunewright.chat import Equipment, Example, Message
from tunewright.data import prepare
from tunewright.errors import DataError, StageError
from tunewright.generate import savable
from tunewright.models import ModelRef
from tunewright.package import fidelity, gguf_export
from tunewright.package.card import card
from tunewright.recipe import Recipe
from tunewright.run import Run, write_json, write_text
from tunewright.tracking import Tracker

FIDELITY_ROWS = 8
PLAIN_CONVERSATIONS: tuple[tuple[Message, ...], ...] = (
    (Message("user", "Hello."), Message("assistant", "Hello. How can I help?")),
    (Message("system", "Answer briefly."), Message("user", "2 + 2?"), Message("assistant", "4")),
    (
        Message("user", "First."),
        Message("assistant", "One."),
        Message("user", "  Second,\n\twith odd   spaces "),
        Message("assistant", "Two."),
    ),
    (Message("user", "na\u00efve caf\u00e9 \u2014 \u4f60\u597d \U0001f642"), Message("assistant", "\u00fcber \u2713")),
)
"""Golden conversations that every package has, besides the first test rows."""


def package(run: Run, tracker: Tracker) -> None:
    """Write the package and log it.

    Raises:
        StageError: the merged model is not the trained one, or an export not the merged one.
    """
    recipe = run.recipe()
    ref = ModelRef.from_dict(run.resolved()["model"])
    tokenizer = models.load_tokenizer(ref)
    equipment = chat.equip(tokenizer)
    test = prepare.examples(run, "test")
    prompts = _prompts(tokenizer, test)
    run.set_progress("package", 1, 6, "merging")
    trained = _trained(run, recipe, ref, tokenizer)
    _write_model(run, recipe, ref, tokenizer, equipment)
    run.set_progress("package", 2, 6, "comparing with the trained model")
    packaged = models.load_folder(run.packaged_model)
    hops = {"trained -> packaged": fidelity.receipt(trained, packaged, prompts)}
    del trained
    labels = run.manifest("prepare")["labels"]
    rendering = chat.golden(tokenizer, equipment, _conversations(tokenizer, test))
    write_json(
        run.rendering_file,
        rendering
        | {
            "task": recipe.task,
            "labels": labels,
            "system": recipe.data.system,
            "max_length": run.resolved()["max_length"],
            "max_new_tokens": recipe.max_new_tokens,
        },
    )
    shutil.rmtree(run.gguf, ignore_errors=True)
    exports = {}
    for name, kind in gguf_header.formats(recipe).items():
        run.set_progress("package", 3, 6, f"writing {name}, and reading it back")
        path = run.gguf / f"{recipe.name}-{kind}.gguf"
        exports[name] = {
            "file": str(path.relative_to(run.package)),
            "kept_in_f16": gguf_export.write(run.packaged_model, path, kind, equipment, name=recipe.name),
        }
        hops[f"packaged -> {name}"] = _read_back(path, packaged, rendering, prompts, name, kind)
    del packaged
    text = card(run, recipe, exports, hops)
    write_text(run.card_file, text)
    write_text(run.packaged_model / "README.md", text)
    run.set_progress("package", 4, 6, "logging to MLflow")
    logged = _log(run, recipe, tracker, labels) if "mlflow" in recipe.package.formats and tracker.on else None
    run.set_progress("package", 5, 6, "hashing")
    manifest = {
        "format": 1,
        "name": recipe.name,
        "run": run.id,
        "base": ref.to_dict(),
        "task": recipe.task,
        "fidelity": hops,
        "gguf": exports,
        "mlflow": logged,
        "files": {
            str(path.relative_to(run.package)): {"sha256": _sha256(path), "bytes": path.stat().st_size}
            for path in sorted(run.package.rglob("*"))
            if path.is_file() and path != run.log_file("package")
        },
    }
    write_json(run.manifest_file("package"), manifest)
    tracker.artifact(run.manifest_file("package"), "package")


def _trained(run: Run, recipe: Recipe, ref: ModelRef, tokenizer: Any) -> Any:
    """The model as training left it: for LoRA, the adapter beside its base, not merged."""
    trained = run.trained(run.method)
    if run.method == "full":
        return models.load_folder(trained)
    from peft import PeftModel

    base = models.load_model(ref)
    models.grow(base, len(tokenizer))
    with models.quiet():
        return PeftModel.from_pretrained(base, str(trained)).eval()


def _write_model(run: Run, recipe: Recipe, ref: ModelRef, tokenizer: Any, equipment: Equipment) -> None:
    """package/model: one model that plain `from_pretrained` loads, its tokenizer and chat template beside it."""
    trained = run.trained(run.method)
    if run.method == "full":
        model = models.load_folder(trained)
    else:
        base = models.load_model(ref)
        models.grow(base, len(tokenizer))
        model = models.merge(base, trained)
        shutil.rmtree(run.packaged_adapter, ignore_errors=True)
        shutil.copytree(trained, run.packaged_adapter)
    fresh = run.package / ".model.new"
    shutil.rmtree(fresh, ignore_errors=True)
    model.config.pad_token_id = equipment.pad_id
    model.generation_config = savable(model.generation_config)
    model.generation_config.eos_token_id = equipment.stop_ids
    model.generation_config.pad_token_id = equipment.pad_id
    with models.quiet():
        model.save_pretrained(str(fresh))
        tokenizer.save_pretrained(str(fresh))
    shutil.rmtree(run.packaged_model, ignore_errors=True)
    os.replace(fresh, run.packaged_model)


def _read_back(
    path: Path, packaged: Any, rendering: dict[str, Any], prompts: Sequence[list[int]], name: str, kind: str
) -> dict[str, Any]:
    """The receipt of an exported file, which Transformers reads: first its tokenizer, then its weights."""
    if lost := chat.differences(gguf_header.read_tokenizer(path), rendering):
        raise StageError(
            f"packaged -> {name}: {path.name} does not render as in training: {lost[0]}; nothing was deployed"
        )
    return fidelity.receipt(
        packaged, gguf_export.read_model(path), prompts, hop=f"packaged -> {name}", allowed=gguf_export.ALLOWED[kind]
    )


def _prompts(tokenizer: Any, test: Sequence[Example]) -> list[list[int]]:
    """Real prompts, in ids, for the comparison."""
    rows = test[:FIDELITY_ROWS]
    if not rows:
        return [chat.render_prompt(tokenizer, said[:-1]) for said in _plain(tokenizer)]
    if rows[0].text is not None:
        return [prepare.render(tokenizer, example).ids[:256] for example in rows]
    return [chat.render_prompt(tokenizer, example.prompt, example.tools) for example in rows]


def _conversations(tokenizer: Any, test: Sequence[Example]) -> list[Sequence[Message] | Example]:
    """What the golden ids are of: the first test rows, and plain ones that the template takes."""
    kept: list[Sequence[Message] | Example] = [
        example for example in test[:4] if example.messages and example.item is None
    ]
    return [*kept, *_plain(tokenizer)]


def _plain(tokenizer: Any) -> list[tuple[Message, ...]]:
    """The plain conversations that the template takes. One that it does not take nobody can send either."""
    kept = []
    for conversation in PLAIN_CONVERSATIONS:
        try:
            chat.render(tokenizer, conversation)
        except DataError:  # this template has no such role
            continue
        kept.append(conversation)
    return kept


def _log(run: Run, recipe: Recipe, tracker: Tracker, labels: list[str] | None) -> str:
    """The packaged model to MLflow's registry; gives its URI."""
    import pandas as pd

    from tunewright import __version__

    messages = [{"role": "user", "content": "a text"}]
    given = pd.DataFrame({"text": ["a text", None], "messages": [None, messages]})  # either column will do
    gives = pd.DataFrame({"prediction": ["an answer"]} | ({"probability": [0.5]} if labels else {}))
    params = None if labels else {"max_new_tokens": recipe.max_new_tokens}
    return tracker.model(
        Path(__file__).with_name("mlflow_model.py"),
        {"model": run.packaged_model, "rendering": run.rendering_file},
        name=recipe.registered_name,
        requirements=[f"tunewright=={__version__}"],
        example=(given, gives, params),
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
