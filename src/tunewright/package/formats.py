"""The stage: merged model, adapter, tokenizer, golden ids, GGUF, card, MLflow; package/manifest.json is last."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunewright import chat, gguf_header, models, tracking
from tunewright.chat import Equipment, Example, Message, ToolCall
from tunewright.data import prepare, tokens
from tunewright.errors import DataError, StageError
from tunewright.generate import savable
from tunewright.models import ModelRef
from tunewright.package import fidelity, gguf_export
from tunewright.package.card import card
from tunewright.recipe import Recipe
from tunewright.run import Run, write_json, write_text
from tunewright.tracking import Tracker

FIDELITY_ROWS = 8
NO_TOKENIZERS = ("config.json", "generation_config.json", "model.safetensors.index.json", "README.md")
"""Files of a model beside its weights that are not its tokenizer's."""
GOLDEN_ROWS = 4
"""Test rows that golden ids are of, and prepared rows of each split that are rendered again."""
PLAIN_CONVERSATIONS: tuple[tuple[Message, ...], ...] = (
    (Message("user", "Hello."), Message("assistant", "Hello. How can I help?")),
    (Message("system", "Answer briefly."), Message("user", "2 + 2?"), Message("assistant", "4")),
    (
        Message("user", "First."),
        Message("assistant", "One.", weight=0),
        Message("user", "  Second,\n\twith odd   spaces\u00a0\u2009\u3000\u200b "),
        Message("assistant", "Two."),
    ),
    (Message("user", "na\u00efve caf\u00e9 \u2014 \u4f60\u597d \U0001f642"), Message("assistant", "\u00fcber \u2713")),
    (
        Message(
            "user", "e\u0301 x\u0323\u0307 \u0e01\u0e33 \u0639\u064e \U0001f469\u200d\U0001f4bb \U0001f1eb\U0001f1f7"
        ),
        Message("assistant", "A\u030a, \ufb01, \u1e9b\u0323 \U0001f44d\U0001f3fd"),
    ),
)
"""Golden conversations that every package has, besides the first test rows: several turns, one of them not learnt from,
odd spaces, characters that are composed and not."""
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city, now.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["\u00b0C", "\u00b0F"]}},
            "required": ["city"],
        },
    },
}
CALL = Message(
    "assistant", "", tool_calls=(ToolCall("weather", '{"city": "Z\\u00fcrich", "unit": "\u00b0C"}', "call00001"),)
)
"""Its id has the nine characters that Mistral's templates ask for."""
TOOL_CONVERSATIONS = (
    Example(
        "golden",
        "golden",
        (Message("system", "Be brief."), Message("user", "Warm in Z\u00fcrich?"), CALL),
        tools=(WEATHER,),
    ),
    Example(
        "golden",
        "golden",
        (
            Message("user", "Warm in Z\u00fcrich?"),
            CALL,
            Message("tool", '{"degrees": 21.5}', tool_call_id="call00001", name="weather"),
            Message("assistant", "Yes: 21.5 \u00b0C."),
            Message("user", "Thanks!"),
            Message("assistant", "Any time."),
        ),
        tools=(WEATHER,),
    ),
)
"""Golden conversations with tools, a call and what it answered, where the template knows of such."""


def package(run: Run, tracker: Tracker) -> None:
    """Write the package and log it.

    Raises:
        StageError: the merged model is not the trained one, an export not the merged one, or one of them renders
            otherwise than the data was prepared.
    """
    recipe = run.recipe()
    ref = ModelRef.from_dict(run.resolved()["model"])
    tokenizer = models.load_tokenizer(ref)
    equipment = chat.equip(tokenizer)
    prepared_rows = _refuse_another_rendering(run, tokenizer)
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
    rendering["tokenizer_files"] = _tokenizer_files(run.packaged_model)
    if lost := chat.differences(models.load_folder_tokenizer(run.packaged_model), rendering, run.packaged_model):
        raise _renders_otherwise("trained -> packaged", "package/model", lost)
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
        hops[f"packaged -> {name}"] = _read_back(path, packaged, tokenizer, rendering, prompts, name, kind)
    del packaged
    text = card(run, recipe, exports, hops)
    write_text(run.card_file, text)
    write_text(run.packaged_model / "README.md", text)
    run.set_progress("package", 4, 6, "logging to MLflow")
    logged = _log(run, recipe, tracker, labels) if "mlflow" in recipe.package.formats and tracker.on else None
    if logged is not None and (lost := tracking.rendering_differences(run, logged)):
        raise _renders_otherwise("packaged -> mlflow", logged, lost)
    run.set_progress("package", 5, 6, "hashing")
    manifest = {
        "format": 1,
        "name": recipe.name,
        "run": run.id,
        "base": ref.to_dict(),
        "task": recipe.task,
        "fidelity": hops,
        "rendering": {
            "conversations": len(rendering["golden"]),
            "with_tools": sum("tools" in row for row in rendering["golden"]),
            "tokens": sum(len(row["ids"]) for row in rendering["golden"]),
            "prepared_rows": prepared_rows,
            "hops": ["trained", "packaged", *exports, *(["mlflow"] if logged is not None else [])],
        },
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


def _refuse_another_rendering(run: Run, tokenizer: Any) -> int:
    """Stop where rows come out otherwise now than preparation wrote them and training read them; gives how many were
    compared."""
    checks, compared = run.manifest("prepare"), 0
    for split in ("train", "test"):
        if split not in checks["splits"]:
            continue
        store = tokens.TokenStore.open(run, split)
        with run.data_file(split).open(encoding="utf-8") as file:
            rows = [Example.from_dict(json.loads(line)) for line in itertools.islice(file, GOLDEN_ROWS)]
        stored = itertools.groupby(range(len(store)), key=lambda place: int(store.sequences["row"][place]))
        for example, (_, places) in zip(rows, stored, strict=False):
            then = [store[place] for place in places]
            if lost := prepare.difference(tokenizer, example, then, checks["max_length"]):
                raise _renders_otherwise("prepared -> trained", example.source, [lost], "start a new run with --fresh")
            compared += 1
    changed = [name for name, made in tokens.made_by(tokenizer).items() if checks["rendering"].get(name) != made]
    if changed:
        lost = f"its {changed[0].removesuffix('_sha256')} is another one now, though the first rows come out the same"
        raise _renders_otherwise("prepared -> trained", "the base", [lost], "start a new run with --fresh")
    return compared


def _renders_otherwise(hop: str, what: str, lost: Sequence[str], advice: str = "nothing was deployed") -> StageError:
    return StageError(f"{hop}: {what} does not render as in training: {lost[0]}; {advice}")


def _tokenizer_files(folder: Path) -> dict[str, str]:
    """sha256 of what the tokenizer consists of: all that is in the folder but the model."""
    return {
        path.name: _sha256(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix != ".safetensors" and path.name not in NO_TOKENIZERS
    }


def _composed(tokenizer: Any, rendering: dict[str, Any]) -> dict[str, Any]:
    """The golden conversations that GGUF's readers can give: where the tokenizer composes characters (NFC), which they
    do not, those that are composed already."""
    if tokenizer.backend_tokenizer.normalizer is None:
        return rendering
    rows = [
        row
        for row in rendering["golden"]
        if unicodedata.is_normalized("NFC", json.dumps([row["messages"], row.get("tools")], ensure_ascii=False))
    ]
    return rendering | {"golden": rows}


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
    path: Path,
    packaged: Any,
    tokenizer: Any,
    rendering: dict[str, Any],
    prompts: Sequence[list[int]],
    name: str,
    kind: str,
) -> dict[str, Any]:
    """The receipt of an exported file, which Transformers reads: first its tokenizer, then its weights."""
    if lost := chat.differences(gguf_header.read_tokenizer(path), _composed(tokenizer, rendering)):
        raise _renders_otherwise(f"packaged -> {name}", path.name, lost)
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
    """What the golden ids are of: the first test rows (a prompt without an answer with one), and our own that the
    template takes."""
    rows = [
        replace(example, messages=(*example.messages, Message("assistant", "4")), item=None)
        if example.item
        else example
        for example in test[:GOLDEN_ROWS]
        if example.messages
    ]
    return [*rows, *_plain(tokenizer), *(one for one in TOOL_CONVERSATIONS if _takes(tokenizer, one))]


def _plain(tokenizer: Any) -> list[tuple[Message, ...]]:
    """The plain conversations that the template takes. One that it does not take nobody can send either."""
    return [one for one in PLAIN_CONVERSATIONS if _takes(tokenizer, Example("golden", "golden", one))]


def _takes(tokenizer: Any, one: Example) -> bool:
    try:
        chat.render(tokenizer, one.messages, one.tools)
        chat.render_prompt(tokenizer, one.messages[:-1], one.tools)
    except DataError:  # this template has no such role, or knows no tools
        return False
    return True


def _log(run: Run, recipe: Recipe, tracker: Tracker, labels: list[str] | None) -> str:
    """The packaged model to MLflow's registry; gives its URI."""
    import pandas as pd

    from tunewright import __version__

    messages = [{"role": "user", "content": "a text"}]
    tools: list[Any] = [None, []]
    given = pd.DataFrame({"text": ["a text", None], "messages": [None, messages], "tools": tools})  # either one will do
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
