"""What a run will take, said before it starts: tokens, steps, time, memory, disk, and everything that it will make.

Time is a guess from the arithmetic that training needs and a short measurement of this machine, so it is given as a
range; what it costs elsewhere is the backend's to say.
"""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from tunewright.backends.base import Backend, Bill, Bills, Elsewhere, Hosts
from tunewright.recipe import Recipe

SHARE_OF_PEAK = (0.15, 0.6)
"""Training reaches between these shares of the machine's matrix-product speed."""
UNKNOWN = Bill(("run folder",), None, None, "the backend does not say")
BYTES_OF_GGUF = {"gguf-f16": 2, "gguf-q8_0": 34 / 32}
"""Bytes of a weight in the package's one-file forms."""
START_S = 30
"""Starting the stages' processes and loading libraries, all together."""


def estimate(recipe: Recipe, resolved: dict[str, Any], backend: Backend) -> dict[str, Any]:
    """The plan, from what `check` resolved and what the backend says of its cost."""
    train = recipe.train
    splits = resolved["data"]
    parameters = resolved["model"]["parameters"]
    sequences = splits["train"]["sequences"]
    answers_drawn = train.grpo.num_generations if recipe.task == "reward" else 0
    sequences *= answers_drawn or 1
    together = train.batch_size * train.gradient_accumulation_steps
    per_epoch = max(1, sequences // together if train.dataloader_drop_last else math.ceil(sequences / together))
    if answers_drawn:
        per_epoch *= train.grpo.num_iterations
    steps = train.max_steps if train.max_steps > 0 else math.ceil(per_epoch * train.epochs)
    per_pass = splits["train"]["tokens"]["sum"]
    per_pass = per_pass * max(1, answers_drawn) + sequences * recipe.answer_room * bool(answers_drawn)
    train_tokens = round(per_pass * steps / per_epoch)
    test = splits.get("test")
    test_tokens = test["tokens"]["sum"] + test["used"] * recipe.answer_room if test else 0
    evaluated_tokens = _evaluated(recipe, resolved)
    settled = resolved["train"]
    each = 6 if settled["method"] == "full" else 4
    hosted = isinstance(backend, Hosts)
    training, evaluating = parameters * each * train_tokens, parameters * 2 * evaluated_tokens
    speed = matrix_speed()
    train_seconds, seconds = (
        [round(begun + flops / (speed * share)) for share in reversed(SHARE_OF_PEAK)]
        for begun, flops in ((0, training), (START_S, training + evaluating))
    )
    weights = 4 * parameters
    trained = weights if settled["method"] == "full" else weights // 50
    checkpoints = (train.save_total_limit or 3) * (3 * trained)
    makes = []
    if recipe.tracking.enabled:
        makes.append(f"MLflow run at {resolved['tracking']['uri']}")
        if "mlflow" in recipe.package.formats and not isinstance(backend, Hosts):
            makes.append(f"registered model {recipe.registered_name}")
    exported = sum(BYTES_OF_GGUF.get(name, 0) * parameters for name in recipe.package.formats)
    disk = round(exported) + 2 * weights + checkpoints + (2 * weights if recipe.tracking.enabled else 0)
    plan = {
        "format": 1,
        "backend": recipe.backend.kind,
        "rows": {split: facts["used"] for split, facts in splits.items()},
        "steps": None if hosted and "batch_size" not in train.model_fields_set else steps,
        "tokens": {
            "train": train_tokens,
            "train_per_epoch": per_pass,
            "test": test_tokens,
            "evaluate": evaluated_tokens,
            **(_billed(recipe, resolved) if hosted else {}),
        },
        "seconds": seconds,
        "train_seconds": train_seconds,
        "memory_bytes": settled["memory_bytes"],
        "method": settled["method"],
        "why": {"method": settled["method_why"], "bf16": settled["bf16_why"]},
        "disk_bytes": disk,
        "matrix_product_flops": round(speed),
        "here": not isinstance(backend, Elsewhere | Hosts),
        "warnings": resolved["warnings"],
    }
    bill = backend.bill(recipe, plan) if isinstance(backend, Bills) else UNKNOWN
    cost = {"currency": "USD", "low": bill.low, "high": bill.high, "note": bill.note, "asks": bill.asks}
    return plan | {"cost": cost, "makes": [*bill.makes, *makes]}


def _evaluated(recipe: Recipe, resolved: dict[str, Any]) -> int:
    """Tokens that evaluation computes, all models together.

    Classes: every prompt and, behind it, every node of the label tree that has children; what all prompts begin with is
    counted for each, though it is computed once. Chat: every row for its loss, and its prompt again with an answer of
    the greatest length. Text and pairs: every row. Reward: every prompt and an answer of the greatest length.
    """
    splits = resolved["data"]
    if "test" not in splits:
        return 0
    facts = splits["test"]
    rows, whole = int(facts["used"]), int(facts["tokens"]["sum"])
    models = 2 + ("few-shot" in recipe.baselines)
    if recipe.task in ("pretraining", "preference"):
        return whole * models
    if recipe.task == "reward":
        return (whole + rows * recipe.max_new_tokens) * models
    prompts = whole - round(facts["tokens"]["answer"]["mean"] * rows)
    if "label_nodes" in facts:
        return int((prompts + rows * facts["label_nodes"]) * models)
    told: float = (whole + prompts + rows * recipe.evaluate.max_new_tokens) * models
    if "few-shot" in recipe.baselines:
        context = resolved["model"]["context"] or resolved["max_length"]
        shown = min(recipe.evaluate.few_shot * splits["train"]["tokens"]["total"]["mean"], context)
        told += 2 * rows * shown  # before every row, for its loss and for its answer
    return round(told)


def _billed(recipe: Recipe, resolved: dict[str, Any]) -> dict[str, int]:
    """Tokens that are sent and answered in evaluation and test, where each is paid for; answers at their longest."""
    facts = resolved["data"].get("test")
    if facts is None:
        return {"input": 0, "output": 0}
    rows, whole = int(facts["used"]), int(facts["tokens"]["sum"])
    prompts = whole - round(facts["tokens"]["answer"]["mean"] * rows)
    asked = 2 * prompts
    if "few-shot" in recipe.baselines:
        shown = recipe.evaluate.few_shot * resolved["data"]["train"]["tokens"]["total"]["mean"]
        asked += prompts + round(rows * min(shown, resolved["max_length"]))
    again = min(1.0, recipe.deploy.test_rows / max(1, rows))
    models = 2 + ("few-shot" in recipe.baselines)
    return {
        "input": round(asked + again * prompts),
        "output": round((models + again) * rows * recipe.max_new_tokens),
    }


def free_disk(path: Path) -> int:
    """Bytes free where `path` is, or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def matrix_speed() -> float:
    """Floating-point operations a second in float32 matrix products on this machine, the best of a few."""
    size = 768
    one = np.ones((size, size), dtype=np.float32)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        one @ one
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best
