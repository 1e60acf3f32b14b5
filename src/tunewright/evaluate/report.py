"""Pages from an evaluation's report: one HTML file for people, and Markdown for a model card.

Here the report (schema 1) becomes words, rows and chart coordinates; the templates beside this file hold the markup.
Nothing is measured here, and nothing is fetched: the page carries its style and its pictures in itself.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from tunewright.errors import RunError

Report = dict[str, Any]

# What keeps the page under 2 MB whatever the user's data are. report.json has everything.
MOST_CHARACTERS = 3_000
MOST_CLASSES_LISTED = 300
MOST_CLASSES_IN_A_MATRIX = 100
MOST_CLASSES_AT_A_GLANCE = 12
MOST_CLASSES_SIDE_BY_SIDE = 6
MOST_EXAMPLES = 12
MOST_FINDINGS, MOST_FINDINGS_OF_A_KIND = 20, 4
MOST_SLICES, MOST_SLICES_DRAWN = 200, 12

# Controls and half surrogates: a file or a browser would choke on them.
_NOT_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

NAMES = {
    "accuracy": "accuracy",
    "precision_macro": "precision (macro)",
    "recall_macro": "recall (macro)",
    "f1_macro": "F1 (macro)",
    "precision_weighted": "precision (weighted)",
    "recall_weighted": "recall (weighted)",
    "f1_weighted": "F1 (weighted)",
    "exact_match": "exact match",
    "rouge_l": "ROUGE-L",
    "reward": "reward",
    "reward_margin": "reward margin",
    "reward_accuracy": "reward accuracy",
    "preference_accuracy": "preference accuracy",
    "loss": "loss",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "ece": "ECE",
    "tokens": "tokens",
}
LOWER_IS_BETTER = {"loss", "perplexity", "bits_per_byte", "ece"}
ORDER = ["tuned", "base", "tfidf", "majority", "zero-shot", "few-shot"]


def render_html(report: Report) -> str:
    """The whole report as one self-contained page."""
    return _render("report.html.j2", report)


def render_markdown(report: Report) -> str:
    """The report's verdict, tables and commands in Markdown, for a model card or a pull request."""
    return _render("report.md.j2", report)


def _render(template: str, report: Report) -> str:
    return _NOT_TEXT.sub("\ufffd", _template(template).render(_view(report))).strip() + "\n"


@cache
def _template(name: str) -> Template:
    escape: Any = {"finalize": _escape_markdown} if name.endswith(".md.j2") else {"autoescape": True}
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, **escape)
    filters = (_clamped, _cut, _fenced, _label, _minus, _number, _show, _signed)
    environment.filters |= {function.__name__[1:]: function for function in filters}
    return environment.get_template(name)


# The view: everything a template needs, as text and coordinates


def _view(report: Report) -> dict[str, Any]:
    if report.get("schema") != 1:
        raise RunError(f"the report has schema {report.get('schema')!r}; this version of Tunewright reads schema 1")
    metric, model = report["metric"], report["model"]
    order = sorted(report["models"], key=lambda name: [*ORDER, name].index(name))
    labels = list(report.get("labels") or report["models"]["tuned"].get("per_class") or [])
    revision = f" at {model['revision'][:12]}" if model.get("revision") else ""
    return {
        "name": _cut(report["name"], 200),
        "run_id": report["run_id"],
        "revision": model.get("revision"),
        "metric_name": NAMES.get(metric, metric),
        "verdict": _verdict(report),
        "facts": [
            ("Task", report["task"]),
            ("Base model", f"{model['name']}{revision}" + _size(model["parameters"])),
            ("Test rows", f"{report['rows']:,}"),
            *_cost(report.get("cost")),
            ("Made", _date(report["created"])),
            ("Run", report["run_id"]),
        ],
        "scores": _scores(report, order),
        "models_chart": _models_chart(report, order),
        "difference_chart": _difference_chart(report),
        "comparisons": [_comparison_row(comparison) for comparison in report["comparisons"]],
        "slices": _slices(report),
        "leaks": _leaks(report),
        "mattering": _mattering(report),
        "fidelity": _fidelity(report),
        "classes": _classes(report, labels),
        "confusion": _confusion(report, labels),
        "calibration": _calibration(report),
        "examples": _examples(report.get("examples") or []),
        "training": _training(report["training"]) if report.get("training") else None,
        "data": _data(report["data"]) if report.get("data") else None,
        "repeat": [_cut(command) for command in report.get("repeat") or []],
        "versions": list((report.get("versions") or {}).items()),
        "recipe": _cut(report.get("recipe") or "", 20_000),
    }


# The verdict


def _verdict(report: Report) -> dict[str, Any]:
    """What to say first; `kind` is also the name of its colours and its icon."""
    comparison = report["comparison"]
    kind, the, rows = comparison["verdict"].replace(" ", "-"), _the(comparison["baseline"]), report["rows"]
    words = {"better": f"Better than {the}", "not-better": f"Not better than {the}"}
    meanings = {"better": _means_better, "not-better": _means_not_better}
    meaning, steps = meanings.get(kind, _means_no_evidence)(report, comparison, the)
    places, metric = _places(comparison), comparison["metric"]
    tuned, value = (_number(comparison[key], places) for key in ("tuned", "baseline_value"))
    gain = " (lower is better), improvement" if metric in LOWER_IS_BETTER else ","
    figures = f"{NAMES.get(metric, metric)} {tuned} vs {value}{gain} {_difference(comparison, places)}"
    figures += f", {rows:,} test {'row' if rows == 1 else 'rows'}"
    return {
        "kind": kind,
        "word": words.get(kind, f"No evidence that it is better than {the}"),
        "figures": figures,
        "meaning": meaning,
        "steps": steps,
        "cautions": _cautions(report),
        "gate": _gate(report),
    }


def _means_better(report: Report, comparison: Report, the: str) -> tuple[str, list[str]]:
    difference, models = comparison["difference"], report["models"]
    if comparison["metric"] == "accuracy":
        out_of = 100 if difference >= 0.01 else 1_000
        gain = f"it gives about {round(difference * out_of)} more right answers in every {out_of:,} than {the}"
    elif comparison["metric"] in LOWER_IS_BETTER:
        pair = [models.get(name, {}).get("perplexity") for name in ("tuned", comparison["baseline"])]
        both = f" (perplexity {_show(pair[0], 'perplexity')} vs {_show(pair[1], 'perplexity')})" if all(pair) else ""
        gain = f"it predicts the text better than {the}{both}"
    elif comparison["metric"] == "reward_margin":
        gain = "it has moved towards the better answers and away from the worse ones"
    elif comparison["metric"] == "preference_accuracy":
        gain = f"it finds the better of two answers more probable more often than {the}"
    elif comparison["metric"] == "reward":
        gain = f"the grader gives its answers more than those of {the}"
    elif comparison["metric"] == "f1_macro":
        gain = f"it tells the classes apart better than {the}, each class counting the same"
    else:
        gain = f"its answers are closer to the expected ones than those of {the}"
    meaning = f"On the same test rows {gain}."
    if comparison["interval"][0] > 0:
        meaning += " The whole interval lies above zero, so chance is an unlikely explanation."
    steps = ["Read the examples where it is wrong before you deploy it."] if report.get("examples") else []
    return meaning, [*steps, "The test rows speak for data like them: test again when your data change."]


def _means_not_better(report: Report, comparison: Report, the: str) -> tuple[str, list[str]]:
    if comparison["interval"][1] < 0:
        meaning = f"On the same test rows the tuned model does worse than {the}. The whole interval lies below zero, so"
        meaning += " chance is an unlikely explanation, and more test rows would not change it."
    else:
        meaning = f"On the same test rows the tuned model does no better than {the}."
    steps = [f"Keep {the} for now."]
    if (report.get("data") or {}).get("findings"):
        steps.append("Look at the findings in the data: wrong or cut rows teach wrong answers.")
    if (report.get("training") or {}).get("curve"):
        steps.append(
            "Look at the curve of the reward: if it does not rise, try a higher learning rate, or more generations."
            if report["training"].get("curve_of") == "reward"
            else "Look at the loss curve: if it does not fall, or jumps, try a lower learning rate."
        )
    return meaning, [*steps, "Then train on more rows, or on cleaner ones, and compare again."]


def _means_no_evidence(report: Report, comparison: Report, the: str) -> tuple[str, list[str]]:
    rows, difference, detectable = report["rows"], comparison["difference"], comparison.get("smallest_detectable")
    low, high = comparison["interval"]
    if not all(map(_finite, (difference, low, high))):
        meaning = "A metric is not a finite number, so the models cannot be compared. Training has probably diverged."
        return meaning, [f"Keep {the} for now.", "Look at the loss curve, and train again with a lower learning rate."]
    reason = "The interval includes zero: with" if low <= 0 <= high else "With"
    meaning = f"{reason} {rows:,} test rows, a difference like this one can be chance."
    meaning += f" It does not show that the tuned model and {the} are equal."
    if detectable:
        meaning += f" A true difference of {_number(detectable, 3)} would be seen on so many rows four times in five;"
        meaning += " a smaller one less often."
    more = "Test on more rows."
    if detectable and 0 < difference < detectable:
        needed = float(f"{rows * (detectable / difference) ** 2:.2g}")
        more = f"Test on more rows: about {needed:,.0f} would probably show a difference like this one."
    return meaning, [more, "Or train on more rows, or for longer, so that there is more to see."]


def _cautions(report: Report) -> list[str]:
    """What a reader should know before believing the headline."""
    found, tuned, rows = [], report["models"]["tuned"], report["rows"]
    for other in report["comparisons"]:
        if other["baseline"] != report["comparison"]["baseline"] and other["verdict"] != "better":
            cheap = ", which costs far less to run" if other["baseline"] in {"tfidf", "majority"} else ""
            word = "Not better than" if other["verdict"] == "not better" else "No evidence that it is better than"
            found.append(f"{word} {_the(other['baseline'])}{cheap}: {_difference(other, _places(other))}.")
    if leaks := report.get("without_leaked"):
        rest = _comparison_row(leaks)
        found.append(
            f"{leaks['leaked']:,} test rows say, exactly or nearly, what a training row says. "
            f"Without them the difference is {rest['difference']} ({rest['interval']}): {leaks['verdict']}."
        )
    worse = [one for one in report.get("slices") or [] if one["verdict"] == "not better"]
    if worse:
        named = "; ".join(f"{one['by']} {_label(one['value'])} ({_signed(one['difference'], 2)})" for one in worse[:3])
        more = f" and {len(worse) - 3} more" if len(worse) > 3 else ""
        found.append(f"It got worse where: {named}{more}.")
    if rows < 100:
        found.append(f"Only {rows:,} test {'row' if rows == 1 else 'rows'}: other rows may give another result.")
    if not all(_finite(value) for value in tuned.values() if not isinstance(value, dict | list)):
        found.append("A metric of the tuned model is not a finite number.")
    training = report.get("training") or {}
    lost = [step for step, loss in training.get("curve") or [] if not _finite(loss)]
    if lost:
        of = training.get("curve_of", "loss")
        found.append(f"The training {of} was not a finite number at {len(lost):,} logged steps (first: {lost[0]:,}).")
    before = report["models"].get("base", {}).get("loss")
    if report["task"] == "preference" and _finite(tuned.get("loss")) and _finite(before) and tuned["loss"] > before:
        found.append(
            f"The better answers themselves became less probable (loss {_number(tuned['loss'], 3)}, base "
            f"{_number(before, 3)}): the margin grew because the worse ones fell further. Read what it says now."
        )
    checked = [(loss, step) for step, loss in training.get("validation_curve") or [] if _finite(loss)]
    if checked and checked[-1][0] > 1.01 * min(checked)[0]:
        found.append(f"The validation loss was lowest at step {min(checked)[1]:,} and rose after it: try fewer epochs.")
    if (tuned.get("ece") or 0.0) >= 0.1:
        found.append(f"Its confidence is {_number(tuned['ece'], 2)} away from its accuracy on average (ECE).")
    data = report.get("data") or {}
    test = data.get("test") or {}
    if test.get("truncated", 0) > 0.05 * max(1, test.get("used", 0)):
        found.append(f"{test['truncated']:,} of {test['used']:,} test rows were cut to the maximum length.")
    errors = _by_severity(data)["error"]
    if errors:
        found.append(f"The data checks report {errors:,} {'error' if errors == 1 else 'errors'}: see Data.")
    return found


def _gate(report: Report) -> tuple[bool, str] | None:
    name = report["must_beat"]
    if name is None:
        return None
    compared = [report["comparison"], *report["comparisons"]]
    verdict = next((c["verdict"] for c in compared if c["baseline"] == name), "not measured")
    word = {"better": "met", "not measured": "not met, for it was not measured"}.get(verdict, "not met")
    return verdict == "better", f"The recipe asks it to beat {_the(name)}: {word}."


def _the(baseline: str) -> str:
    return "the base" if baseline == "base" else f"the {_cut(baseline, 80)} baseline"


def _places(comparison: Report) -> int:
    """The fewest decimals with which the difference is not blurred, and where possible with which the sum adds up."""
    tuned, base, difference = (comparison[key] for key in ("tuned", "baseline_value", "difference"))
    if not all(map(_finite, (tuned, base, difference, *comparison["interval"]))):
        return 3
    shown = [value for value in (difference, *comparison["interval"]) if value]
    clear = [n for n in (2, 3) if abs(difference or 1) >= 5 * 10**-n and all(round(value, n) for value in shown)]
    exact = [n for n in clear if abs(abs(round(tuned, n) - round(base, n)) - abs(round(difference, n))) < 1e-9]
    return (exact or clear or [4])[0]


def _difference(comparison: Report, places: int) -> str:
    low, high = (_signed(end, places) for end in comparison["interval"])
    return f"{_signed(comparison['difference'], places)} (95% interval {low} to {high})"


# Tables and pictures of the models


def _scores(report: Report, order: list[str]) -> dict[str, Any]:
    models, intervals = report["models"], report["intervals"]
    keys = [key for key in NAMES if any(models[name].get(key) is not None for name in order)]
    rows = []
    for name in order:
        cells = []
        for key in keys:
            value, span = models[name].get(key), intervals.get(name, {}).get(key)
            shown = None if value is None else _show(value, key)
            cells.append({"value": shown, "span": f"{_show(span[0], key)} to {_show(span[1], key)}" if span else None})
        rows.append({"name": name, "cells": cells})
    columns = [{"name": NAMES[key], "hint": "lower is better" if key in LOWER_IS_BETTER else ""} for key in keys]
    return {"columns": columns, "rows": rows}


def _comparison_row(comparison: Report) -> dict[str, str]:
    places = max(3, _places(comparison))
    low, high = (_signed(end, places) for end in comparison["interval"])
    return {
        "baseline": _cut(comparison["baseline"], 80),
        "difference": _signed(comparison["difference"], places),
        "interval": f"{low} to {high}",
        "p": "< 0.001" if comparison["p_value"] < 0.001 else _number(comparison["p_value"], 3),
        "test": comparison["test"],
        "verdict": comparison["verdict"],
        "kind": comparison["verdict"].replace(" ", "-"),
    }


def _models_chart(report: Report, order: list[str]) -> dict[str, Any] | None:
    metric, intervals = report["metric"], report["intervals"]
    values = {name: report["models"][name].get(metric) for name in order}
    rows = [(name, value, intervals.get(name, {}).get(metric)) for name, value in values.items() if _finite(value)]
    direction = "lower is better" if metric in LOWER_IS_BETTER else "higher is better"
    title = f"{NAMES.get(metric, metric)} of each model, with its 95% interval; {direction}"
    return _dots(title, rows, lambda value: _show(value, metric))


def _difference_chart(report: Report) -> dict[str, Any] | None:
    comparisons = [comparison for comparison in report["comparisons"] if _finite(comparison["difference"])]
    places = max([3, *map(_places, comparisons)])
    rows = [(f"vs {c['baseline'][:24]}", c["difference"], c["interval"]) for c in comparisons]
    word = "improvement" if report["metric"] in LOWER_IS_BETTER else "difference"
    title = f"{word} in {NAMES.get(report['metric'], report['metric'])}, tuned against each, with its 95% interval"
    return _dots(title, rows, lambda value: _signed(value, places), zero=True)


def _dots(
    title: str, rows: list[tuple[str, Any, Any]], show: Callable[[float], str], zero: bool = False
) -> dict[str, Any] | None:
    """A dot and a whisker for each row; every x is a percentage of the width, so that it fits any screen."""
    if not rows:
        return None
    spans = [[end for end in interval or [] if _finite(end)] for _, _, interval in rows]
    values = [value for _, value, _ in rows] + [end for span in spans for end in span] + ([0.0] if zero else [])
    reach = 0.15 * max(map(abs, values)) or 0.1  # so that zero is never at the edge
    low, high, ticks = _axis([*values, reach, -reach] if zero else values)
    drawn, told = [], []
    for (name, value, _), span in zip(rows, spans, strict=True):
        text = f"{show(value)} ({show(span[0])} to {show(span[1])})" if len(span) == 2 else show(value)
        ends = [_percent(end, low, high) for end in span] if len(span) == 2 else None
        kind = name if name in {"tuned", "base"} else "difference" if zero else "other"
        drawn.append({"name": name, "x": _percent(value, low, high), "ends": ends, "text": text, "kind": kind})
        told.append(f"{name}: {text}")
    labels = [f"{tick:+g}" if zero and tick else f"{tick:g}" for tick in ticks]
    return {
        "title": title[0].upper() + title[1:],
        "description": _minus("; ".join(told) + "."),
        "rows": drawn,
        "ticks": [(_percent(tick, low, high), _minus(label)) for tick, label in zip(ticks, labels, strict=True)],
        "zero": _percent(0.0, low, high) if zero else None,
    }


def _axis(values: Sequence[float], parts: int = 4) -> tuple[float, float, list[float]]:
    """Round ends around the values, and round ticks between them; shares stay between 0 and 1."""
    low, high = min(values), max(values)
    rough = ((high - low) or abs(high) or 1.0) / parts
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    first, last = (first - 1, last + 1) if first == last else (first, last)
    ticks = [round(index * step, 12) for index in range(first, last + 1)]
    ticks = [tick for tick in ticks if 0 <= tick <= 1] if low >= 0 and high <= 1 else ticks
    return ticks[0], ticks[-1], ticks


def _percent(value: float, low: float, high: float) -> float:
    return round(100 * (value - low) / ((high - low) or 1.0), 2)


# Slices, leaks, rows that matter, fidelity


def _cost(cost: Report | None) -> list[tuple[str, str]]:
    """How long training took, and what it cost as far as that is known."""
    if cost is None:
        return []
    found = []
    if cost["seconds"] is not None:
        found.append(("Training time", f"{_duration(cost['seconds'])} on {cost['device']}"))
    low, high = cost.get("low"), cost.get("high")
    if low is None or high is None:
        return [*found, *([("Cost", cost["note"])] if cost.get("note") else [])]
    if not high:
        return [*found, ("Cost", f"nothing billed ({cost['note']})")]
    return [*found, ("Cost", f"planned ${low:,.2f}" + (f" to ${high:,.2f}" if high != low else ""))]


def _slices(report: Report) -> dict[str, Any] | None:
    """Every slice, the worst difference first, and a picture of those at both ends."""
    found = report.get("slices") or []
    if not found:
        return None
    known = [one for one in found if _finite(one["difference"])]
    known.sort(key=lambda one: (one["difference"], one["by"], one["value"]))
    ordered = [*known, *(one for one in found if not _finite(one["difference"]))]
    ends = known if len(known) <= MOST_SLICES_DRAWN else [*known[:8], *known[-4:]]
    of = NAMES.get(report["slices_of"], report["slices_of"])
    name = _the(report["comparison"]["baseline"])
    drawn = [(_short(f"{one['by']}: {_label(one['value'])}"), one["difference"], one["interval"]) for one in ends]
    rows = [
        {
            "by": _cut(one["by"], 80),
            "value": _label(one["value"]),
            "rows": one["rows"],
            "tuned": _number(one["tuned"], 3),
            "baseline_value": _number(one["baseline_value"], 3),
            "difference": _signed(one["difference"], 3),
            "interval": " to ".join(_signed(end, 3) for end in one["interval"]),
            "p": "< 0.001" if one["p_corrected"] < 0.001 else _number(one["p_corrected"], 3),
            "verdict": one["verdict"],
            "kind": one["verdict"].replace(" ", "-"),
        }
        for one in ordered[:MOST_SLICES]
    ]
    counted = Counter(one["verdict"] for one in found)
    told = ", ".join(f"{counted[word]} {word}" for word in ("better", "not better", "no evidence") if counted[word])
    some = f"; the {len(ends)} at both ends of {len(found)}" if len(ends) < len(found) else ""
    title = f"difference in {of}, tuned against {name}, on parts of the test rows{some}"
    chart = _dots(title, drawn, lambda value: _signed(value, 3), zero=True)
    return {"chart": chart, "rows": rows, "count": len(found), "told": told, "of": of, "against": name}


def _short(name: str, most: int = 26) -> str:
    """What fits beside a number on a narrow screen."""
    return name if len(name) <= most else f"{name[: most - 1]}\u2026"


def _leaks(report: Report) -> dict[str, Any] | None:
    leaks = report.get("without_leaked")
    return {"leaked": leaks["leaked"], "rows": leaks["rows"], **_comparison_row(leaks)} if leaks else None


def _mattering(report: Report) -> dict[str, Any] | None:
    """Errors with the training rows that they come from, and labels that look wrong; None where there is neither."""
    found = report.get("rows_that_matter") or {}
    errors, suspects = found.get("errors"), found.get("suspects")
    errors = errors if errors and errors["rows"] else None
    suspects = suspects if suspects and suspects["rows"] else None
    return {"errors": errors, "suspects": suspects} if errors or suspects else None


MEASURES = {
    "rows": "prompts",
    "tokens": "tokens",
    "largest_logit_difference": "largest logit difference",
    "largest_kl": "largest KL (nats)",
    "same_best_token": "same best token",
    "greedy_agreement": "greedy agreement",
    "largest_weight_error": "largest weight error",
}


def _fidelity(report: Report) -> dict[str, Any] | None:
    """What each copy of the model differs by from the one before it; None before it was packaged."""
    hops, served = report.get("fidelity") or {}, report.get("served")
    if not hops and not served:
        return None
    columns = [key for key in MEASURES if any(key in hop for hop in hops.values())]
    rows = []
    for name, hop in hops.items():
        allowed = hop.get("allowed") or {}
        cells = [{"value": _exact(key, hop.get(key)), "limit": _exact(key, allowed.get(key))} for key in columns]
        rows.append({"name": name.replace("->", "\u2192"), "cells": cells})
    return {
        "columns": [MEASURES[key] for key in columns],
        "rows": rows,
        "served": served,
        "rendering": report.get("rendering"),
    }


def _exact(key: str, value: Any) -> str | None:
    if value is None:
        return None
    if key in ("rows", "tokens"):
        return f"{value:,}"
    return f"{value:.1%}" if key in ("same_best_token", "greedy_agreement") else f"{value:.2g}"


# Classes, confusions and confidence


def _classes(report: Report, labels: list[str]) -> dict[str, Any] | None:
    tuned = report["models"]["tuned"].get("per_class")
    if not tuned:
        return None
    base = report["models"].get("base", {}).get("per_class") or {}
    found = [name for name in labels if name in tuned]
    rows = [{"label": name, **tuned[name], "base_f1": base.get(name, {}).get("f1")} for name in found]
    many = len(rows) > MOST_CLASSES_AT_A_GLANCE
    if many:
        rows.sort(key=lambda row: (row["f1"], row["label"]))
    worse = sum(row["base_f1"] is not None and row["f1"] < row["base_f1"] for row in rows)
    return {"rows": rows[:MOST_CLASSES_LISTED], "many": many, "count": len(rows), "worse": worse}


def _confusion(report: Report, labels: list[str]) -> dict[str, Any] | None:
    """The most frequent confusions of the tuned model, and matrices to draw: the base's too where they are small."""
    counts = report["models"]["tuned"].get("confusion")
    if not counts:
        return None
    wrong = [
        {"truth": labels[truth], "predicted": labels[predicted], "count": count, "share": f"{count / sum(row):.0%}"}
        for truth, row in enumerate(counts)
        for predicted, count in enumerate(row)
        if truth != predicted and count
    ]
    wrong.sort(key=lambda found: (-found["count"], found["truth"], found["predicted"]))
    drawn = {"tuned": counts, "base": report["models"].get("base", {}).get("confusion")}
    matrices = [
        {"model": name, "rows": _shaded(matrix, labels)}
        for name, matrix in drawn.items()
        if matrix and len(labels) <= (MOST_CLASSES_IN_A_MATRIX if name == "tuned" else MOST_CLASSES_SIDE_BY_SIDE)
    ]
    facts = {"few": len(labels) <= MOST_CLASSES_AT_A_GLANCE, "wrong": sum(found["count"] for found in wrong)}
    return {**facts, "labels": labels, "top": wrong[:15], "matrices": matrices}


def _shaded(counts: list[list[int]], labels: list[str]) -> list[dict[str, Any]]:
    """Rows of cells: the count, a shade from 0 to 6 for its share of the row, and that share."""
    totals = [sum(row) or 1 for row in counts]
    return [
        {"label": label, "cells": [(count, math.ceil(6 * count / total), f"{count / total:.0%}") for count in row]}
        for label, row, total in zip(labels, counts, totals, strict=True)
    ]


def _calibration(report: Report) -> dict[str, Any] | None:
    series = []
    for name in ("tuned", "base"):
        metrics = report["models"].get(name, {})
        bins = [found for found in metrics.get("calibration") or [] if found["count"]]
        if bins:
            most = max(found["count"] for found in bins)
            series.append({"name": name, "bins": bins, "most": most, "ece": metrics.get("ece")})
    if not series or series[0]["name"] != "tuned":
        return None
    bins = series[0]["bins"]
    gap = sum(b["count"] * (b["confidence"] - b["accuracy"]) for b in bins) / sum(b["count"] for b in bins)
    lean = "is right less often than it claims" if gap > 0 else "is right more often than it claims"
    told = [f"confidence {b['confidence']:.3f}: accuracy {b['accuracy']:.3f}, {b['count']:,} rows" for b in bins]
    return {
        "series": series,
        "lean": lean if abs(gap) >= 0.02 else "is right about as often as it claims",
        "description": f"Tuned model, by confidence. {'; '.join(told)}.",
    }


# Examples, training and data


def _examples(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Up to twelve rows in groups by outcome, a few of each, so that gains and errors are both seen."""
    titles = {
        (True, False): ("Gained", "right after tuning, wrong before"),
        (False, True): ("Lost", "wrong after tuning, right before"),
        (False, False): ("Wrong before and after", ""),
        (True, True): ("Right before and after", ""),
        None: ("Answers side by side", ""),
    }
    groups: dict[Any, list[dict[str, Any]]] = {key: [] for key in titles}
    for example in examples:
        key = (example.get("tuned_correct"), example.get("base_correct"))
        groups[key if key in titles else None].append(example)
    turns = sorted((turn, place) for place, group in enumerate(groups.values()) for turn in range(len(group)))
    shares = [sum(place == mine for _, place in turns[:MOST_EXAMPLES]) for mine in range(len(groups))]
    return [
        {"title": titles[key][0], "note": titles[key][1], "rows": group[:share]}
        for (key, group), share in zip(groups.items(), shares, strict=True)
        if share
    ]


def _clamped(text: str, most: int = 320) -> dict[str, Any]:
    """A text and, where it is long, its start, to show in its place."""
    return {"all": _cut(text), "start": text[:most] if len(text) > most * 1.2 else None, "characters": len(text)}


def _training(training: dict[str, Any]) -> dict[str, Any]:
    tokens, seconds = training["tokens"], training["seconds"]
    speed = f" ({tokens / seconds:,.0f} a second)" if seconds and tokens else ""
    facts = [
        ("Method", training["method"]),
        ("Trained parameters", _trainable(training)),
        ("Steps", None if training["steps"] is None else f"{training['steps']:,}"),
        ("Epochs", f"{training['epochs']:g}"),
        ("Time", None if seconds is None else _duration(seconds)),
        ("Tokens", None if tokens is None else f"{tokens:,}{speed}"),
        ("Device", training["device"]),
        ("Final loss", _final(training)),
    ]
    return {
        "facts": [(name, value) for name, value in facts if value is not None],
        "curve": _curve(training["curve"], training.get("validation_curve") or [], training.get("curve_of", "loss")),
    }


def _final(training: dict[str, Any]) -> str | None:
    """The last loss; None where an API trained, which told none."""
    told = training["final_loss"] is not None or training["curve"]
    return _show(training["final_loss"], "loss") if told else None


def _trainable(training: dict[str, Any]) -> str | None:
    """How many weights were trained; None where an API trained, which does not say."""
    trainable, whole = training["trainable_parameters"], training["parameters"]
    return None if trainable is None else f"{trainable:,} of {whole:,} ({trainable / max(1, whole):.2%})"


def _size(parameters: int | None) -> str:
    return f", {parameters:,} parameters" if parameters else ""


def _curve(training: list[list[float]], validation: list[list[float]], of: str) -> dict[str, Any] | None:
    known = [(step, loss) for step, loss in training if _finite(loss)]
    checked = [(step, loss) for step, loss in validation if _finite(loss)]
    if len(known) < 2:
        return None
    steps, losses = zip(*known, *checked, strict=True)
    left, right, across = min(steps), max(steps), _axis(steps)[2]
    bottom, top, up = _axis(losses)

    def path(points: Sequence[Sequence[float]]) -> str:
        pen, drawn = "M", []
        for step, loss in _thinned(points):
            if _finite(loss):
                dot = "h0" if pen == "M" else ""  # so that a point between two gaps is seen
                drawn.append(f"{pen}{_percent(step, left, right)} {round(100 - _percent(loss, bottom, top), 2)}{dot}")
            pen = "L" if _finite(loss) else "M"
        return "".join(drawn)

    window = len(known) // 20
    sums = [0.0, *accumulate(loss for _, loss in known)]
    spans = [(max(0, index - window), min(len(known), index + window + 1)) for index in range(len(known))]
    means = [(sums[end] - sums[start]) / (end - start) for start, end in spans]
    (first, start), (last, end) = known[0], known[-1]
    told = f"Training {of} from {start:.3f} at step {first:,} to {end:.3f} at step {last:,}"
    told += f"; lowest validation loss {min(loss for _, loss in checked):.3f}." if checked else "."
    return {
        "of": of,
        "raw": path(training),
        "smooth": path([(step, mean) for (step, _), mean in zip(known, means, strict=True)]) if window else None,
        "window": 2 * window + 1,
        "validation": path(checked) if checked else None,
        "marks": [(_percent(s, left, right), round(100 - _percent(v, bottom, top), 2)) for s, v in checked[:60]],
        "x_ticks": [(_percent(t, left, right), f"{t:,.0f}") for t in across if left <= t <= right and t == int(t)],
        "y_ticks": [(round(100 - _percent(tick, bottom, top), 2), f"{tick:g}") for tick in up],
        "description": told,
    }


def _thinned(points: Sequence[Sequence[float]], most: int = 800) -> list[Sequence[float]]:
    """All points, or where there are too many the lowest and the highest of each stretch: spikes stay visible."""
    size, kept = max(1, math.ceil(2 * len(points) / most)), []
    for start in range(0, len(points), size):
        stretch = sorted(points[start : start + size], key=lambda point: point[1] if _finite(point[1]) else math.inf)
        kept += sorted([stretch[0], stretch[-1]], key=lambda point: point[0])
    return kept if size > 2 else list(points)


def _data(data: dict[str, Any]) -> dict[str, Any]:
    splits = [{"name": name, **data[name]} for name in ("train", "validation", "test") if data.get(name)]
    order, findings = {"error": "errors", "warning": "warnings", "info": "notes"}, data.get("findings") or []
    by_severity = _by_severity(data)
    counts = [(by_severity[one], one, many) for one, many in order.items()]
    return {
        "splits": splits,
        "lengths": _lengths(splits),
        "findings": _some(sorted(findings, key=lambda finding: list(order).index(finding["severity"]))),
        "found": by_severity.total(),
        "told": ", ".join(f"{n:,} {many if n > 1 else one}" for n, one, many in counts if n),
    }


def _some(findings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few of each kind, so that many of one do not hide another."""
    seen: Counter[str] = Counter()
    kept = []
    for finding in findings:
        seen[finding["code"]] += 1
        if seen[finding["code"]] <= MOST_FINDINGS_OF_A_KIND:
            kept.append(finding)
    return kept[:MOST_FINDINGS]


def _lengths(splits: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bars of how many rows have how many tokens, for each split and part; heights and places in percent."""
    drawn = []
    for split in splits:
        for part, title in (("total", "tokens in a row"), ("answer", "tokens that are learnt in a row")):
            found = (split.get("histograms") or {}).get(part)
            if not found or not sum(found["counts"]):
                continue
            edges, counts = found["edges"], found["counts"]
            low, high, most = edges[0], edges[-1], max(counts)
            bars = [
                (_percent(start, low, high), round(100 * (end - start) / (high - low), 2), round(100 * count / most, 2))
                for start, end, count in zip(edges, edges[1:], counts, strict=False)
                if count
            ]
            middle = (low + high - 1) // 2
            tallest = edges[counts.index(most)]
            drawn.append(
                {
                    "title": f"{split['name']}: {title}",
                    "bars": bars,
                    "ticks": [(0, f"{low:,}"), (50, f"{middle:,}"), (100, f"{high - 1:,}")],
                    "most": f"{most:,}",
                    "description": f"From {low:,} to {high - 1:,}; most, {most:,}, have about {tallest:,}.",
                }
            )
    return drawn


def _by_severity(data: dict[str, Any]) -> Counter[str]:
    """How many findings there are of each severity; the report holds only the first of each kind."""
    counted: Counter[str] = Counter()
    for one in data.get("counts") or [{**finding, "count": 1} for finding in data.get("findings") or []]:
        counted[one["severity"]] += one["count"]
    return counted


# Numbers and texts


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _number(value: float | None, places: int) -> str:
    if value is None or not math.isfinite(value):  # JSON has null for both
        return "infinite" if value in {math.inf, -math.inf} else "not a number"
    return f"{value:,.{places}f}"


def _show(value: float, metric: str) -> str:
    if metric == "perplexity" and _finite(value):
        return f"{value:,.2f}" if value < 1e3 else f"{value:,.0f}" if value < 1e7 else f"{value:.2e}"
    return _number(value, 0 if metric == "tokens" else 3)


def _signed(value: float, places: int) -> str:
    shown = _number(value, places)
    changed = _finite(value) and re.search(r"[1-9]", shown)  # neither +0.00 nor -0.00
    return f"+{shown}" if changed and value > 0 else shown if changed else shown.lstrip("-")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _date(text: str) -> str:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{moment.day} {moment:%B %Y, %H:%M} {moment.tzname() or ''}".strip()


def _cut(text: str, most: int = MOST_CHARACTERS) -> str:
    return text if len(text) <= most else f"{text[:most]} [cut here: {len(text):,} characters in all]"


def _label(text: str) -> str:
    return _cut(text, 200) if text.strip() else "(empty)"


def _minus(text: str) -> str:
    return re.sub(r"(?<![\w.)-])-(?=[\d.])", "\u2212", text)


# Markdown


class _Markdown(str):
    """Text that is Markdown already."""


def _escape_markdown(value: Any) -> str:
    """Any value as Markdown that shows it: one line, no markup, no HTML."""
    if value is None or isinstance(value, _Markdown):
        return value or ""
    flat = _cut(" ".join(str(value).split())) or "(empty)"
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~!])", r"\\\1", flat)


def _fenced(text: str) -> _Markdown:
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`+", text))])
    return _Markdown(f"{fence}sh\n{text}\n{fence}")
