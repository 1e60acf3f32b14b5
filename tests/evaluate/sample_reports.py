"""Sample evaluation reports for tests and screenshots: made from counts, so that their numbers agree."""

from __future__ import annotations

import math
import random
from typing import Any

from tunewright.evaluate import compare

Report = dict[str, Any]

SCRIPT = '<script>alert("x")</script>'
LONG_LABEL = "a_label_that_never_ends_" * 5
RIGHT_TO_LEFT = "\u0634\u0643\u0631\u0627 \u0644\u0643\u0645, \u05ea\u05d5\u05d3\u05d4"


def binary() -> Report:
    """Sentiment of film reviews, 500 test rows: clearly better than the base, and than TF-IDF."""
    labels = ["negative", "positive"]
    tuned = _classification(labels, [[227, 23], [22, 228]], loss=0.2412, over_confidence=0.04)
    base = _classification(labels, [[31, 219], [21, 229]], loss=0.9137, over_confidence=0.21)
    tfidf = _classification(labels, [[213, 37], [35, 215]], loss=None)
    few_shot = _classification(labels, [[118, 132], [59, 191]], loss=0.8021)
    majority = _classification(labels, [[250, 0], [250, 0]], loss=None)
    models = {"majority": majority, "few-shot": few_shot, "tuned": tuned, "base": base, "tfidf": tfidf}
    comparisons = [
        _comparison("base", 0.91, 0.52, [0.344, 0.436], 2.1e-39, "better"),
        _comparison("tfidf", 0.91, 0.856, [0.021, 0.087], 0.0017, "better"),
        _comparison("few-shot", 0.91, 0.618, [0.245, 0.339], 8.8e-27, "better"),
        _comparison("majority", 0.91, 0.50, [0.364, 0.456], 4.0e-41, "better"),
    ]
    return {
        **_frame("imdb-sentiment", "classification", 500, "accuracy", models, comparisons),
        "labels": labels,
        "must_beat": "base",
        "examples": _review_examples(),
        "training": _training(steps=1500, epochs=3.0, seconds=1634.2, tokens=742_118),
        "data": _data("imdb", train=1000, test=500),
        "repeat": ["tunewright run recipes/imdb-gpt2.yaml", "tunewright evaluate runs/imdb-sentiment-20261124-3f2a"],
        "versions": {"tunewright": "0.1.0", "torch": "2.9.1", "transformers": "4.57.1", "python": "3.11.9"},
        "recipe": _RECIPE,
        **_evidence("negative", "positive"),
    }


def not_better() -> Report:
    """The same task, where tuning did harm: the whole interval lies below zero."""
    report = binary()
    report["models"]["tuned"] = _classification(report["labels"], [[120, 130], [141, 109]], loss=0.8120)
    report["intervals"] = {name: {"accuracy": _wilson(m["accuracy"], 500)} for name, m in report["models"].items()}
    report["comparison"] = _comparison("base", 0.458, 0.52, [-0.118, -0.006], 0.031, "not better")
    report["comparisons"] = [report["comparison"]]
    return report


def no_evidence() -> Report:
    """Help-desk answers, 120 test rows: a small gain that chance can explain, and no gate."""
    models = {
        "tuned": {"exact_match": 0.158, "rouge_l": 0.4213, "loss": 1.8841, "perplexity": 6.5805, "tokens": 9_874},
        "base": {"exact_match": 0.142, "rouge_l": 0.4027, "loss": 1.9472, "perplexity": 7.0090, "tokens": 9_874},
    }
    comparison = _comparison(
        "base", 0.4213, 0.4027, [-0.0121, 0.0493], 0.236, "no evidence", "rouge_l", "paired permutation"
    )
    data = _data("helpdesk", train=800, test=120)
    return {
        **_frame("helpdesk-answers", "chat", 120, "rouge_l", models, [comparison]),
        "intervals": {"tuned": {"rouge_l": [0.389, 0.455]}, "base": {"rouge_l": [0.371, 0.436]}},
        "must_beat": None,
        "examples": _chat_examples(),
        "training": {
            **_training(steps=300, epochs=3.0, seconds=912.0, tokens=410_020, first=2.4, last=1.7),
            "validation_curve": [[50, 2.11], [100, 1.98], [150, 1.93], [200, 1.92], [250, 1.94], [300, 1.97]],
        },
        "data": data,
        "repeat": ["tunewright run helpdesk.yaml"],
    }


def pretraining() -> Report:
    """Continued pretraining on stories: the loss is the metric, and lower is better."""
    models = {
        "tuned": {"loss": 1.6218, "perplexity": 5.0622, "bits_per_byte": 0.6021, "tokens": 198_402},
        "base": {"loss": 2.1047, "perplexity": 8.2046, "bits_per_byte": 0.7814, "tokens": 198_402},
    }
    comparison = _comparison(
        "base", 1.6218, 2.1047, [0.4512, 0.5138], 0.0001, "better", "loss", "paired permutation", 0.4829
    )
    return {
        **_frame("stories-pretraining", "pretraining", 640, "loss", models, [comparison]),
        "intervals": {"tuned": {"loss": [1.594, 1.650]}, "base": {"loss": [2.071, 2.139]}},
        "must_beat": "base",
        "training": {**_training(steps=2000, epochs=1.0, seconds=7260.0, tokens=4_096_000), "method": "full"},
    }


def many_classes(count: int = 77) -> Report:
    """Bank questions with 77 intents, 40 test rows each: far better than the base, but not than TF-IDF."""
    things = ["card", "transfer", "top_up", "cash_withdrawal", "direct_debit", "refund", "exchange", "pin", "account"]
    issues = ["arrival", "not_working", "pending", "fee_charged", "declined", "limit", "cancelled", "wrong_amount"]
    labels = [f"{thing}_{issue}" for thing in things for issue in [*issues, "unrecognised"]][:count]
    labels += [f"other_{number}" for number in range(count - len(labels))]
    tuned = _classification(labels, _scattered(len(labels), 40, 0.89, seed=3), loss=0.4410, over_confidence=0.05)
    base = _classification(labels, _scattered(len(labels), 40, 0.04, seed=4), loss=5.9120)
    tfidf = _classification(labels, _scattered(len(labels), 40, 0.885, seed=5), loss=None)
    models = {"tuned": tuned, "base": base, "tfidf": tfidf}
    rows = 40 * len(labels)
    gain, edge = tuned["accuracy"] - base["accuracy"], tuned["accuracy"] - tfidf["accuracy"]
    comparisons = [
        _comparison("base", tuned["accuracy"], base["accuracy"], [gain - 0.013, gain + 0.013], 0.0, "better"),
        _comparison("tfidf", tuned["accuracy"], tfidf["accuracy"], [edge - 0.012, edge + 0.012], 0.37, "no evidence"),
    ]
    report = _frame("bank-intents", "classification", rows, "accuracy", models, comparisons)
    return {**report, "labels": labels, "must_beat": "base", "training": _training(3750, 3.0, 5402.0, 1_204_331)}


def hostile() -> Report:
    """A valid report whose texts, labels and numbers are as awkward as users' data can be."""
    labels = [SCRIPT, LONG_LABEL, RIGHT_TO_LEFT, "", "a|b`c*d"]
    matrix = [[9, 1, 0, 0, 0], [2, 8, 0, 0, 0], [0, 0, 10, 0, 0], [0, 0, 0, 0, 0], [3, 3, 2, 1, 1]]
    tuned = _classification(labels, matrix, loss=math.nan)
    base = _classification(labels, [row[::-1] for row in matrix[::-1]], loss=math.inf)
    comparison = _comparison("base", tuned["accuracy"], base["accuracy"], [0.0, 0.0], 1.0, "no evidence")
    texts = [SCRIPT, "</style></title>" + SCRIPT, RIGHT_TO_LEFT, "", "word " * 20_000, "\x00\x1b[31mred\ud800 |`*_#"]
    texts += ['" onmouseover="alert(1)', "javascript:alert(1) http://example.org/x.png", "{{ 7 * 7 }}{% raw %}"]
    return {
        **_frame(f"hostile {SCRIPT}", "classification", 40, "accuracy", {"tuned": tuned, "base": base}, [comparison]),
        "created": "yesterday",
        "labels": labels,
        "must_beat": "base",
        "examples": [_example(n, text, labels[0], labels[n % 5], labels[2]) for n, text in enumerate(texts)],
        "training": {**_training(10, 0.5, 3.0, 500), "curve": [[1, 2.0], [2, math.nan], [3, 1.5], [4, math.inf]]},
        "data": {
            **_data(SCRIPT, 40, 40),
            "findings": [{"code": SCRIPT, "severity": "error", "where": f"{SCRIPT}:1", "message": SCRIPT}] * 60,
        },
        "repeat": [f"echo '{SCRIPT}' ```"],
        "versions": {SCRIPT: SCRIPT},
        "recipe": f"name: {SCRIPT}\n```\n",
        **_evidence(SCRIPT, RIGHT_TO_LEFT * 40),
        "a key from a later version": {"anything": [1]},
    }


def smallest() -> Report:
    """Only the keys that every report has."""
    models: dict[str, Any] = {
        "tuned": {"exact_match": 0.5, "rouge_l": 0.6, "loss": 1.0, "perplexity": 2.7, "tokens": 9}
    }
    models["base"] = dict(models["tuned"])
    comparison = _comparison("base", 0.6, 0.6, [0.0, 0.0], 1.0, "no evidence", "rouge_l", "paired permutation")
    return {**_frame("least", "completion", 3, "rouge_l", models, [comparison]), "intervals": {}}


def _frame(
    name: str, task: str, rows: int, metric: str, models: dict[str, Any], comparisons: list[dict[str, Any]]
) -> Report:
    return {
        "schema": 1,
        "name": name,
        "run_id": "imdb-sentiment-20261124-3f2a" if name.startswith("imdb") else f"{name}-20261124-77c0",
        "created": "2026-11-24T21:00:00Z",
        "task": task,
        "rows": rows,
        "metric": metric,
        "models": models,
        "intervals": {m: {"accuracy": _wilson(v["accuracy"], rows)} for m, v in models.items() if "accuracy" in v},
        "comparison": comparisons[0],
        "comparisons": comparisons,
        "must_beat": None,
        "model": {"name": "gpt2", "revision": "607a30d783dfa663caf39e06633721c8d4cfcd7e", "parameters": 124_439_808},
    }


def _comparison(
    baseline: str,
    tuned: float,
    value: float,
    interval: list[float],
    p_value: float,
    verdict: str,
    metric: str = "accuracy",
    test: str = "McNemar exact",
    difference: float | None = None,
) -> dict[str, Any]:
    found = {"baseline": baseline, "metric": metric, "tuned": tuned, "baseline_value": value, "interval": interval}
    found["difference"] = tuned - value if difference is None else difference
    found |= {"p_value": p_value, "test": test, "verdict": verdict}
    return {**found, "smallest_detectable": compare.PER_HALF_WIDTH * (interval[1] - interval[0]) / 2}


def _wilson(share: float, rows: int) -> list[float]:
    z = 1.96
    centre = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return [centre - half, centre + half]


def _scattered(count: int, rows: int, accuracy: float, seed: int) -> list[list[int]]:
    """A confusion matrix where each class errs towards two or three neighbours, some classes far more than others."""
    draw = random.Random(seed)
    matrix = []
    for truth in range(count):
        right = min(1.0, max(0.0, draw.gauss(accuracy, 0.08 if accuracy > 0.5 else 0.04)))
        others = [draw.randrange(count) for _ in range(3)]
        row = [0] * count
        for _ in range(rows):
            row[truth if draw.random() < right else draw.choice(others)] += 1
        matrix.append(row)
    return matrix


def _classification(
    labels: list[str], confusion: list[list[int]], loss: float | None, over_confidence: float | None = None
) -> dict[str, Any]:
    """Every classification metric that follows from a confusion matrix."""
    total = sum(map(sum, confusion))
    per_class = {}
    for index, label in enumerate(labels):
        hit, support = confusion[index][index], sum(confusion[index])
        predicted = sum(row[index] for row in confusion)
        precision, recall = hit / predicted if predicted else 0.0, hit / support if support else 0.0
        f1 = 2 * precision * recall / (precision + recall) if hit else 0.0
        per_class[label] = {"precision": precision, "recall": recall, "f1": f1, "support": support}
    metrics: dict[str, Any] = {"accuracy": sum(confusion[i][i] for i in range(len(labels))) / total}
    for key in ("precision", "recall", "f1"):
        metrics[f"{key}_macro"] = sum(value[key] for value in per_class.values()) / len(labels)
        metrics[f"{key}_weighted"] = sum(value[key] * value["support"] for value in per_class.values()) / total
    metrics |= {"per_class": per_class, "confusion": confusion}
    if loss is not None:
        metrics["loss"] = loss
    if over_confidence is not None:
        metrics["calibration"] = _calibration(total, metrics["accuracy"], over_confidence)
        metrics["ece"] = sum(abs(b["confidence"] - b["accuracy"]) * b["count"] for b in metrics["calibration"]) / total
    return metrics


def _calibration(total: int, accuracy: float, over_confidence: float) -> list[dict[str, Any]]:
    """Ten bins; the lower half is empty, as it is for two classes: no answer has a confidence under a half."""
    weights = [0.0] * 5 + [(number + 1) ** (3 * accuracy) for number in range(5)]
    bins = []
    for number, weight in enumerate(weights):
        low, count = number / 10, round(total * weight / sum(weights))
        right = low + 0.05 - over_confidence * (1.2 if number > 6 else 0.6) + 0.015 * math.sin(number * 2.1)
        confidence, right = (low + 0.05, max(0.0, min(1.0, right))) if count else (0.0, 0.0)
        bins.append({"low": low, "high": low + 0.1, "count": count, "confidence": confidence, "accuracy": right})
    return bins


def _training(
    steps: int, epochs: float, seconds: float, tokens: int, first: float = 2.6, last: float = 0.27
) -> dict[str, Any]:
    draw = random.Random(steps)
    every = max(1, steps // 150)
    curve = [
        [step, max(0.02, last + (first - last) * math.exp(-5.0 * step / steps) + draw.gauss(0, 0.05 * first))]
        for step in range(every, steps + 1, every)
    ]
    return {
        "method": "lora",
        "steps": steps,
        "epochs": epochs,
        "seconds": seconds,
        "tokens": tokens,
        "trainable_parameters": 811_008,
        "parameters": 125_250_816,
        "device": "cpu",
        "final_loss": curve[-1][1],
        "curve": curve,
    }


def _data(source: str, train: int, test: int) -> dict[str, Any]:
    total = {"min": 28, "median": 219, "mean": 271.4, "p95": 702, "max": 1024}
    answer = {"min": 1, "median": 1, "mean": 1.0, "p95": 1, "max": 1}
    tokens = {"total": total, "answer": answer}
    split = {"source": [f"{source}/train.jsonl"], "read": train + 9, "used": train, "rejected": 9, "truncated": 31}
    held_out = {"source": [f"{source}/test.jsonl"], "read": test, "used": test, "rejected": 0, "truncated": 12}
    where = f"{source}/train.jsonl"
    return {
        "train": {**split, "tokens": tokens},
        "test": {**held_out, "tokens": tokens},
        "findings": [
            {
                "code": "duplicate_row",
                "severity": "info",
                "where": f"{where}:88",
                "message": "the same text as line 12",
            },
            {"code": "empty_text", "severity": "warning", "where": f"{where}:41", "message": "the text is empty"},
            {"code": "unknown_label", "severity": "error", "where": f"{where}:512", "message": "'postive' is no label"},
        ],
    }


def _evidence(one: str, other: str) -> Report:
    """What a report says beyond its numbers: slices, leaks, rows that matter, fidelity, cost."""
    slices = [
        {"by": "label", "value": one, "rows": 250, "tuned": 0.908, "baseline_value": 0.124, "difference": 0.784},
        {"by": "label", "value": other, "rows": 250, "tuned": 0.812, "baseline_value": 0.916, "difference": -0.104},
        {"by": one, "value": "", "rows": 11, "tuned": 0.5, "baseline_value": 0.5, "difference": 0.0},
    ]
    verdicts = [("better", 1e-50), ("not better", 0.004), ("no evidence", 1.0)]
    for part, (verdict, p_value) in zip(slices, verdicts, strict=True):
        difference = float(str(part["difference"]))
        part |= {"interval": [difference - 0.05, difference + 0.05], "verdict": verdict}
        part |= {"p_value": p_value / 3, "p_corrected": p_value}
    near = [{"source": f"{one}:7", "sha256": "0", "score": 0.93, "text": f"{other} text", "label": other}] * 3
    error = {"source": "test.jsonl:5", "text": f"{one} text", "label": one, "tuned": other, "confidence": 0.97}
    errors = {
        "wrong": 45,
        "traced": 45,
        "by": "gradients",
        "among": 800,
        "of": 1000,
        "rows": [error | {"nearest": near}],
    }
    suspect = near[0] | {"instead": one}
    hop = {"rows": 8, "tokens": 128, "largest_logit_difference": 1.4e-5, "largest_kl": 4e-7}
    hop |= {"same_best_token": 1.0, "greedy_agreement": 0.984, "allowed": {"largest_logit_difference": 1e-3}}
    return {
        "slices": slices,
        "slices_of": "accuracy",
        "without_leaked": {"leaked": 12, "rows": 488, **_comparison("base", 0.90, 0.53, [0.32, 0.42], 1e-30, "better")},
        "rows_that_matter": {
            "errors": errors,
            "suspects": {"found": 31, "looked_at": 900, "of": 1000, "accuracy": 0.82, "rows": [suspect] * 20},
        },
        "cost": {"seconds": 1634.2, "device": "cpu", "tokens": 742_118, "low": 3.1, "high": 4.6, "note": "n"},
        "fidelity": {"trained -> packaged": hop, "packaged -> gguf-q8_0": hop | {"largest_weight_error": 0.004}},
        "rendering": {"conversations": 8, "tokens": 312, "hops": ["trained", "packaged", "endpoint"]},
        "served": {"rows": 50, "compared": 50, "equal": 49, "ties": 1, "latency_s": {"median": 0.0201}},
    }


def _example(number: int, text: str, label: str, tuned: str, base: str, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"id": f"row-{number}", "source": f"test.jsonl:{number + 17}", "text": text}
    found |= {"label": label, "tuned": tuned, "base": base, "tuned_correct": tuned == label}
    return {**found, "base_correct": base == label, **more}


def _review_examples() -> list[dict[str, Any]]:
    long = (
        "I went in with low hopes, since the trailer gave away most of the jokes and the last film was a mess. "
        "For half an hour I thought I had been right. Then the two sisters meet at the station, and the whole "
        "thing turns into something else: slow, odd, generous, and very funny. The last scene is a single take "
        "of four minutes and nobody in the room moved. It is not for everyone, my neighbour left early, but I "
        "have thought about it all week."
    )
    rows = [
        (long, "positive", "positive", "negative", 0.93),
        (
            "A tired script, and actors who know it. I checked my watch six times.",
            "negative",
            "negative",
            "positive",
            0.98,
        ),
        ("Dull from the first scene to the last.", "negative", "negative", "positive", 0.99),
        ("The songs alone are worth the ticket; I left humming.", "positive", "positive", "positive", 0.97),
        ("Not bad at all, though I can see why some walked out.", "positive", "negative", "positive", 0.58),
        ("If this wins a prize I will eat my hat.", "negative", "positive", "positive", 0.71),
        ("Great cast, great music, great sets. What a waste of all three.", "negative", "positive", "positive", 0.88),
        ("Two hours that felt like twenty minutes.", "positive", "positive", "negative", 0.84),
        ("It has its moments. Three of them.", "negative", "positive", "negative", 0.55),
        ("My children loved it, and so, to my surprise, did I.", "positive", "positive", "positive", 0.96),
        ("Flat, loud, and far too long.", "negative", "negative", "positive", 0.99),
        ("The book deserved better than this.", "negative", "negative", "positive", 0.90),
        ("A quiet film that earns every one of its tears.", "positive", "positive", "negative", 0.91),
        ("I have seen worse, but not this year.", "negative", "negative", "positive", 0.66),
    ]
    return [_example(n, t, label, tuned, base, confidence=c) for n, (t, label, tuned, base, c) in enumerate(rows)]


def _chat_examples() -> list[dict[str, Any]]:
    ask = "My invoice for March shows two charges for the same seat. Can you fix it?"
    label = "Sorry about that. I have removed the second charge; the refund arrives within five working days."
    tuned = (
        "Sorry about this. I have removed the duplicate charge, and you will see the refund within five working days."
    )
    base = (
        "Invoices are documents that list goods or services. If you have been charged twice, contact the company. " * 4
    )
    rows = [_example(0, ask, label, tuned, base), _example(1, "How do I reset my password?", "Use the link.", "", "Hi")]
    for row in rows:
        del row["tuned_correct"], row["base_correct"]
    return rows


_RECIPE = """\
name: imdb-sentiment
model: gpt2
task: classification
data:
  train: imdb:train
  test: imdb:test
  text: text
  label: label
  limit: {train: 1000, test: 500, seed: 42}
train:
  method: lora
  epochs: 3
  learning_rate: 2.0e-4
  batch_size: 2
evaluate: {baselines: [zero-shot, few-shot, tfidf], must_beat: base}
"""
