"""The model card: what this is, how it was made, how good it is, how to use it. Every number comes from the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunewright.recipe import Recipe
from tunewright.run import Run


def card(
    run: Run,
    recipe: Recipe,
    exports: Mapping[str, Mapping[str, Any]] | None = None,
    hops: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """Markdown.

    Args:
        exports: the one-file forms of the package, as its manifest has them.
        hops: the receipts of fidelity, likewise.
    """
    report = run.manifest("evaluate")
    trained = run.manifest("train")
    checks = run.manifest("prepare")
    base = run.resolved()["model"]
    lines = [
        f"# {recipe.name}",
        "",
        f"`{base['name']}`"
        + (f" (revision `{base['revision']}`)" if base["revision"] else "")
        + f" fine-tuned for {recipe.task} with Tunewright, run `{run.id}`.",
        "",
        "## Result",
        "",
        *_result(report),
        "",
        "## Data",
        "",
        *(
            f"- {split}: {facts['used']} rows of {facts['read']} from {', '.join(facts['source'])}; "
            f"{facts['rejected']} left out, {facts['truncated']} cut; sha256 `{facts['sha256'][:16]}`"
            for split, facts in checks["splits"].items()
        ),
        "",
        "## Training",
        "",
        *(_hosted(trained) if trained["method"] == "hosted" else _trained_here(trained)),
        *([f"It was trained with this system message: {recipe.data.system!r}."] if recipe.data.system else []),
        *(
            [
                f"It answers with one of: {', '.join(report['labels'][:20])}"
                + (", ..." if len(report["labels"]) > 20 else ".")
            ]
            if report.get("labels")
            else []
        ),
        *(_exported(exports, hops or {}) if exports else []),
        "",
        "## Limits",
        "",
        ("Measured on the held-out rows above and nothing else. " if report["rows"] else "")
        + "What the base model gets wrong about the world, this "
        "model may get wrong too. The base model's licence applies.",
    ]
    return "\n".join(lines) + "\n"


def _trained_here(trained: dict[str, Any]) -> list[str]:
    return [
        f"{trained['method']}, {trained['steps']} steps, {trained['epochs']:.2f} epochs, {trained['tokens']:,} tokens, "
        f"{trained['seconds']} s on {trained['device']}; {trained['trainable_parameters']:,} of "
        f"{trained['parameters']:,} weights trained.",
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("model")',
        'tokenizer = AutoTokenizer.from_pretrained("model")',
        "```",
        "",
        "Prompts go through the tokenizer's chat template; `rendering.json` holds token ids as they were in training.",
    ]


def _exported(exports: Mapping[str, Mapping[str, Any]], hops: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["", "As one file, for llama.cpp and programs built on it:", ""]
    for name, facts in exports.items():
        hop = hops[f"packaged -> {name}"]
        kept = len(facts["kept_in_f16"])
        lines.append(
            f"- `{facts['file']}`: beside `model`, {hop['same_best_token']:.1%} of tokens have the same best one, the "
            f"largest KL divergence is {hop['largest_kl']:.2g} nats"
            + (f"; {kept} matrices are in f16, their rows being no multiple of 32 wide" if kept else "")
        )
    file = list(exports.values())[-1]["file"]
    return [
        *lines,
        "",
        "```sh",
        f"llama-cli -m {file} --jinja  # or llama-server; --jinja: the file's own chat template",
        f"echo 'FROM ./{file}' > Modelfile && ollama create my-model  # Ollama wants a TEMPLATE of its own for chat",
        "```",
    ]


def _hosted(trained: dict[str, Any]) -> list[str]:
    return [
        f"Trained by the API's job `{trained['job']}`: {trained['epochs']:g} epochs, {trained['tokens'] or 0:,} tokens "
        "billed. The weights stay there.",
        "",
        "## Use",
        "",
        f"Its name is `{trained['model']}`; `hosted.json` says at which endpoint. Azure asks it by its deployment.",
    ]


def _result(report: dict[str, Any]) -> list[str]:
    """The verdict and the table; or that there is none."""
    if not report["rows"]:
        return ["Not evaluated: no rows were held out, so nothing is known of how good it is."]
    comparison = report["comparison"]
    low, high = comparison["interval"]
    return [
        f"**{comparison['verdict'].capitalize()}** against {comparison['baseline']} on {report['rows']} held-out rows: "
        f"{comparison['metric']} {comparison['tuned']:.4f} against {comparison['baseline_value']:.4f} "
        f"(difference {comparison['difference']:+.4f}, 95% interval {low:+.4f} to {high:+.4f}, "
        f"p = {comparison['p_value']:.3g}, {comparison['test']}).",
        "",
        *_table(report),
    ]


COLUMNS = (
    "accuracy",
    "f1_macro",
    "exact_match",
    "rouge_l",
    "reward",
    "reward_margin",
    "reward_accuracy",
    "preference_accuracy",
    "loss",
    "perplexity",
)


def _table(report: dict[str, Any]) -> list[str]:
    columns = [key for key in COLUMNS if key in report["models"]["tuned"]]
    rows = [f"| model | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for name, values in report["models"].items():
        cells = (f"{values[key]:.4f}" if values.get(key) is not None else "" for key in columns)
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows
