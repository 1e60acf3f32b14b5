"""Tuned, base and baselines on the same held-out rows; predictions.parquet and the report.

What is compared is written per row, so that every number in report.json can be recomputed from predictions.parquet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tunewright import chat, graders, models
from tunewright.chat import Equipment, Example, Rendering
from tunewright.data import prepare
from tunewright.data.inspection import LEAKS
from tunewright.data.tokens import TokenStore
from tunewright.errors import DataError
from tunewright.evaluate import baselines, compare, earlier, influence, metrics, report, slices, tracing
from tunewright.generate import LocalCompleter
from tunewright.graders import Answer
from tunewright.models import ModelRef
from tunewright.recipe import Recipe
from tunewright.run import Run, now, read_json, read_json_lines, write_json, write_text
from tunewright.tracking import Tracker

INTERVALS = {
    "classification": ("accuracy", "f1_macro"),
    "chat": ("rouge_l", "exact_match", "loss"),
    "pretraining": ("loss",),
    "preference": ("reward_margin", "preference_accuracy", "reward_accuracy", "loss"),
    "reward": ("reward",),
}
NUM_EXAMPLES = 12
MOST_FINDINGS = 100
TOKEN_BINS = 30
"""Bars of a picture of lengths."""
PER_ROW = ("prompt_tokens", "chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens")
"""What else is written for each row."""
Answers = dict[str, dict[str, Any]]
"""Model -> what it answered, column by column (one value for each row)."""
Progress = Callable[[int, int], None]
Ask = Callable[[str, Sequence[Example], Progress], dict[str, Any]]
"""Puts rows to a model (`tuned` or `base`); gives its answers, column by column."""


def evaluate(run: Run, tracker: Tracker, ask: Ask | None = None) -> None:
    """The stage: answers, metrics, comparison, report; evaluate/report.json is written last. The models are asked in
    this process unless `ask` is given. Where no rows were held out there is nothing to measure on, and report.json says
    no more than that."""
    recipe = run.recipe()
    checks = run.manifest("prepare")
    if not recipe.data.holds_out:
        nothing: dict[str, Any] = {"comparison": None, "comparisons": [], "must_beat": None, "metric": recipe.metric}
        write_json(run.manifest_file("evaluate"), {"format": 1, "rows": 0, "models": {}, **nothing})
        return
    test = prepare.examples(run, "test")
    labels: list[str] | None = checks["labels"]
    asked = Asked(run)
    answers = _answers(run, recipe, test, labels, ask or asked)
    if labels is not None and any(metrics.OTHER in said["prediction"] for said in answers.values()):
        labels = [*labels, metrics.OTHER]
    measured = _measure(recipe, test, answers, labels)
    measured |= _closer(run, recipe, test, answers, labels, asked.tokenizer)
    _write_predictions(run, recipe, test, answers, labels)
    body = _report(run, recipe, checks, test, answers, labels, measured)
    if recipe.task in ("classification", "chat"):
        run.set_progress("evaluate", 1, 1, "tracing errors")
        train = prepare.some_examples(run, "train", tracing.MOST_ROWS, recipe.evaluate.seed)
        sketch = asked.sketch if ask is None else None
        body["rows_that_matter"] = {
            "errors": tracing.trace_errors(run, recipe, train, test, answers["tuned"], checks["labels"], sketch),
            "suspects": tracing.find_suspects(run, recipe, train, checks["labels"]),
        }
    write_text(run.report_page, report.render_html(body))
    write_text(run.report_text, report.render_markdown(body))
    flat = {
        f"{model}_{name}": value
        for model, values in body["models"].items()
        for name, value in values.items()
        if isinstance(value, int | float)
    }
    tracker.metrics({f"test_{key}": value for key, value in flat.items()})
    tracker.metrics(
        {"test_difference": body["comparison"]["difference"], "test_p_value": body["comparison"]["p_value"]}
    )
    tracker.tags({"verdict": body["comparison"]["verdict"]})
    tracker.artifact(run.report_page, "report")
    write_json(run.manifest_file("evaluate"), body)
    tracker.artifact(run.manifest_file("evaluate"), "report")


def tuned_model(run: Run, recipe: Recipe, ref: ModelRef, tokenizer: Any) -> Any:
    """What training left, as one model; an adapter is merged just as packaging merges it."""
    device = run.resolved()["device"]
    trained = run.trained(run.method)
    if run.method == "full":
        return models.load_folder(trained, device=device)
    base = models.load_model(ref, device=device)
    models.grow(base, len(tokenizer))
    return models.merge(base, trained)


class Asked:
    """The models of a run in this process, one at a time: asking another lets go of the one before."""

    def __init__(self, run: Run) -> None:
        self.run, self.recipe = run, run.recipe()
        self.ref = ModelRef.from_dict(run.resolved()["model"])
        self.labels: list[str] | None = run.manifest("prepare")["labels"]
        self.max_length: int = run.resolved()["max_length"]
        self.tokenizer = models.load_tokenizer(self.ref)
        self.equipment = chat.equip(self.tokenizer)
        self.name = ""
        self.completer: LocalCompleter | None = None

    def __call__(self, name: str, rows: Sequence[Example], progress: Progress) -> dict[str, Any]:
        if self.name != name:
            self.completer = None  # else both models are in memory at once
            self.completer, self.name = self._load(name), name
        assert self.completer is not None
        return _ask(self.recipe, self.completer, rows, self.labels, self.max_length, progress)

    def sketch(self, examples: Sequence[Example]) -> Any:
        """The gradients of some rows, in short, before training: where each would move the base."""
        if self.name != "base":
            self.completer = None
            self.completer, self.name = self._load("base"), "base"
        assert self.completer is not None
        renderings = [_as_said(self.tokenizer, self.equipment, example) for example in examples]
        return influence.sketches(
            self.completer.model,
            [Rendering(one.ids[: self.max_length], one.mask[: self.max_length]) for one in renderings],
            self.equipment.pad_id,
            seed=self.recipe.evaluate.seed,
            progress=lambda done, total: self.run.set_progress("evaluate", done, total, "tracing errors"),
        )

    def _load(self, name: str) -> LocalCompleter:
        if name == "tuned":
            model = tuned_model(self.run, self.recipe, self.ref, self.tokenizer)
        else:
            model = models.load_model(self.ref, device=self.run.resolved()["device"])
            models.grow(model, len(self.tokenizer))
        return LocalCompleter(model, self.tokenizer, self.equipment, batch_rows=self.recipe.evaluate.batch_size)


def _answers(run: Run, recipe: Recipe, test: Sequence[Example], labels: list[str] | None, ask: Ask) -> Answers:
    against = Run.open(recipe.evaluate.against) if recipe.evaluate.against is not None else None
    before = earlier.answers(against, recipe, test, labels) if against is not None else {}  # refused before any asking
    train = prepare.examples(run, "train") if recipe.task == "classification" or "few-shot" in recipe.baselines else []
    asked = ["tuned", "base", *(["few-shot"] if "few-shot" in recipe.baselines else [])]
    answers: Answers = {}
    for number, name in enumerate(asked):

        def progress(done: int, total: int, name: str = name, number: int = number) -> None:
            run.set_progress("evaluate", number * total + done, len(asked) * total, name)

        rows = list(test) if name != "few-shot" else _with_shots(run, recipe, train, test, labels)
        answers[name] = ask("tuned" if name == "tuned" else "base", rows, progress)
    if recipe.task == "preference":
        _compare_with_base(answers, recipe.train.dpo.beta)
    if against is not None:
        answers[f"run {against.id}"] = earlier.comparable(before, answers["tuned"], recipe, against)
    if labels is not None:
        if "tfidf" in recipe.baselines:
            predicted, probabilities = baselines.tfidf(train, test, labels, recipe.evaluate.seed)
            answers["tfidf"] = {"prediction": predicted, "probabilities": probabilities}
        if "majority" in recipe.baselines:
            answers["majority"] = {"prediction": baselines.majority(train, test)}
    return answers


def _ask(
    recipe: Recipe,
    completer: LocalCompleter,
    test: Sequence[Example],
    labels: list[str] | None,
    max_length: int,
    progress: Progress,
) -> dict[str, Any]:
    """One model's answers to the test rows."""
    tokenizer = completer.tokenizer
    if labels is not None:
        prompts = [chat.render_prompt(tokenizer, example.prompt, example.tools) for example in test]
        scores = completer.score(prompts, completer.tree(labels), progress=progress)
        distribution = metrics.probabilities(scores)
        return {
            "prediction": [labels[place] for place in np.asarray(scores).argmax(axis=1)],
            "probabilities": distribution,
        }
    if recipe.task == "pretraining":
        return {"losses": _piecewise(completer, test, max_length, progress)}
    if recipe.task == "preference":
        return _weigh(completer, test, progress)
    if recipe.task == "reward":
        return _graded(recipe, completer, test, progress)
    steps = 2 * len(test)
    turns = [_last_turn(tokenizer, example) for example in test]
    losses = completer.losses(turns, progress=lambda done, _: progress(done, steps))
    prompts = [chat.render_prompt(tokenizer, example.prompt, example.tools) for example in test]
    said = completer.generate(
        prompts,
        max_new_tokens=recipe.max_new_tokens,
        progress=lambda done, _: progress(len(test) + done, steps),
    )
    truth = [_written(completer, example, turn) for example, turn in zip(test, turns, strict=True)]
    return {
        "prediction": said,
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "losses": losses,
        "exact_match": metrics.exact_match(said, truth),
        "rouge_l": metrics.rouge_l(said, truth),
    }


def _weigh(completer: LocalCompleter, test: Sequence[Example], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Log-probabilities (nats) of the better and of the worse answer, summed over the answer and its end of turn."""
    renderings = [both for example in test for both in chat.render_pair(completer.tokenizer, example).renderings()]
    losses = completer.losses(renderings, progress=lambda done, total: progress(done * len(test) // total, len(test)))
    logps = [-loss for loss, _ in losses]
    both = list(zip(logps[::2], logps[1::2], strict=True))
    return {
        "losses": losses[::2],
        "chosen_logp": logps[::2],
        "rejected_logp": logps[1::2],
        "chosen_tokens": [count for _, count in losses[::2]],
        "rejected_tokens": [count for _, count in losses[1::2]],
        "preference_accuracy": metrics.prefers(both),
    }


def _compare_with_base(answers: Answers, beta: float) -> None:
    """Add the implicit rewards, which are measured against the base: its own are 0, so it ranks no pair by them."""
    pairs = {name: list(zip(said["chosen_logp"], said["rejected_logp"], strict=True)) for name, said in answers.items()}
    for name, said in answers.items():
        said["reward_margin"] = metrics.margins(pairs[name], pairs["base"], beta)
        if name != "base":
            said["reward_accuracy"] = metrics.prefers([(margin, 0.0) for margin in said["reward_margin"]])


def _graded(
    recipe: Recipe, completer: LocalCompleter, test: Sequence[Example], progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Greedy answers, and what the recipe's grader says they are worth."""
    prompts = [chat.render_prompt(completer.tokenizer, example.prompt) for example in test]
    said = completer.generate(prompts, max_new_tokens=recipe.max_new_tokens, progress=progress)
    assert recipe.grader is not None
    with graders.opened(recipe.grader) as grading:
        grades = grading.score(
            [Answer(text, example.item or {}, example.source) for text, example in zip(said, test, strict=True)]
        )
    return {
        "prediction": said,
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "reward": [grade.score for grade in grades],
        **{f"reward.{name}": [grade.parts[name] for grade in grades] for name in grades[0].parts},
    }


def _piecewise(
    completer: LocalCompleter, test: Sequence[Example], max_length: int, progress: Callable[[int, int], None]
) -> list[tuple[float, int]]:
    """Each text's loss, a long one's piece by piece, each token but the first counted once."""
    cut = [prepare.pieces(prepare.render(completer.tokenizer, example), max_length) for example in test]
    pieces = iter(
        completer.losses(
            [piece for text in cut for piece in text],
            progress=lambda done, total: progress(done * len(test) // total, len(test)),
        )
    )
    losses = []
    for text in cut:
        of_text = [next(pieces) for _ in text]
        losses.append((sum(loss for loss, _ in of_text), sum(count for _, count in of_text)))
    return losses


def _last_turn(tokenizer: Any, example: Example) -> Rendering:
    """The loss on the answer alone, so that every model is asked the same."""
    whole = chat.render(tokenizer, example.messages, example.tools)
    prompt = len(chat.render_prompt(tokenizer, example.prompt, example.tools))
    return Rendering(whole.ids, [flag and place >= prompt for place, flag in enumerate(whole.mask)])


def _as_said(tokenizer: Any, equipment: Equipment, example: Example) -> Rendering:
    """`_last_turn`, also of an answer that the template would not write as it stands: a model says what it likes, and
    some templates leave out reasoning, say."""
    try:
        return _last_turn(tokenizer, example)
    except DataError:
        prompt = chat.render_prompt(tokenizer, example.prompt, example.tools)
        answer = [*chat.encode(tokenizer, example.answer), equipment.end_of_turn_id]
        return Rendering(prompt + answer, [False] * len(prompt) + [True] * len(answer))


def _written(completer: LocalCompleter, example: Example, turn: Rendering) -> str:
    """The answer as the model would have to write it: what it says, or a call of a tool in the template's own form."""
    if not example.messages[-1].tool_calls:
        return example.answer
    return completer.text([token for token, flag in zip(turn.ids, turn.mask, strict=True) if flag])


def _with_shots(
    run: Run, recipe: Recipe, train: Sequence[Example], test: Sequence[Example], labels: Any
) -> list[Example]:
    tokenizer = models.load_tokenizer(ModelRef.from_dict(run.resolved()["model"]))
    chat.equip(tokenizer)
    longest = max(len(chat.render(tokenizer, example.messages, example.tools).ids) for example in test)
    context = run.resolved()["model"]["context"] or models.DEFAULT_MAX_LENGTH
    answer = (
        sum(len(chat.encode(tokenizer, label)) + 2 for label in labels) if labels else recipe.evaluate.max_new_tokens
    )
    shots = baselines.few_shot(
        train, recipe.evaluate.few_shot, recipe.evaluate.seed, tokenizer=tokenizer, room=context - longest - answer
    )
    run.event("evaluate", "few-shot", asked=recipe.evaluate.few_shot, shown=len(shots))
    before = [message for shot in shots for message in shot]

    def shown(example: Example) -> Example:
        system = [message for message in example.messages[:1] if message.role == "system"]
        return replace(example, messages=(*system, *before, *example.messages[len(system) :]))

    return [shown(example) for example in test]


def _measure(recipe: Recipe, test: Sequence[Example], answers: Answers, labels: list[str] | None) -> dict[str, Any]:
    """Metrics, intervals and comparisons, for every model."""
    rows = len(test)
    options = {"resamples": recipe.evaluate.bootstrap, "seed": recipe.evaluate.seed}
    measured: dict[str, Any] = {"models": {}, "intervals": {}, "comparisons": []}
    for name, said in answers.items():
        if labels is not None:
            truth = [str(example.label) for example in test]
            values = metrics.classification(truth, said["prediction"], labels, said.get("probabilities"))
        elif recipe.task == "pretraining":
            values = metrics.text(said["losses"], sum(len(str(example.text).encode()) for example in test))
        else:
            values = {key: float(np.mean(said[key])) for key in metrics.MEANS if key in said}
            values |= {key: float(np.mean(said[key])) for key in said if key.startswith("reward.")}
            if "losses" in said:
                values |= metrics.text(said["losses"])
        measured["models"][name] = values
        measured["intervals"][name] = {
            metric: compare.interval(_statistic(metric, said, test, labels), rows, **options)
            for metric in INTERVALS[recipe.task]
            if metric in values
        }
    for name in answers:
        if name == "tuned":
            continue
        p_value, test_name = _test(recipe.metric, answers["tuned"], answers[name], test, labels, recipe.evaluate.seed)
        measured["comparisons"].append(
            compare.compare(
                metric=recipe.metric,
                baseline=name,
                tuned=_statistic(recipe.metric, answers["tuned"], test, labels),
                other=_statistic(recipe.metric, answers[name], test, labels),
                rows=rows,
                p_value=p_value,
                test=test_name,
                **options,
            )
        )
    return measured


def _closer(
    run: Run, recipe: Recipe, test: Sequence[Example], answers: Answers, labels: list[str] | None, tokenizer: Any
) -> dict[str, Any]:
    """The comparison that counts on slices of the rows, and without rows that training has seen."""
    wanted = recipe.evaluate.must_beat or "base"
    tuned, other = answers["tuned"], answers[wanted]
    metric, options = recipe.metric, {"resamples": recipe.evaluate.bootstrap, "seed": recipe.evaluate.seed}
    scores = [_per_row(metric, said, test) for said in (tuned, other)]
    lengths = [
        len(chat.encode(tokenizer, example.text or "\n".join(message.content for message in example.prompt)))
        for example in test
    ]
    binary = all(set(np.unique(one)) <= {0.0, 1.0} for one in scores)
    parts = slices.slices(test, lengths)
    found: dict[str, Any] = {
        "slices": slices.judge(
            parts, *scores, binary=binary, sign=1 if compare.LARGER_IS_BETTER[metric] else -1, **options
        ),
        "slices_of": "accuracy" if metric == "f1_macro" else metric,
    }
    looked = read_json(run.inspection_file) if run.inspection_file.is_file() else {}
    leaked = set(looked.get("leaked") or ())  # an earlier version did not write them down
    # Where the rows are prepared elsewhere, `check` did not see them, or saw them under other names.
    leaked |= {one["where"] for one in read_json_lines(run.findings_file) if one["code"] in LEAKS}
    kept = [row for row, example in enumerate(test) if example.source not in leaked]
    if not 0 < len(kept) < len(test):
        return found
    rest = [test[row] for row in kept]
    ours, theirs = (_of_rows(said, kept) for said in (tuned, other))
    p_value, test_name = _test(metric, ours, theirs, rest, labels, recipe.evaluate.seed)
    found["without_leaked"] = {"leaked": len(test) - len(kept), "rows": len(kept)} | compare.compare(
        metric=metric,
        baseline=wanted,
        tuned=_statistic(metric, ours, rest, labels),
        other=_statistic(metric, theirs, rest, labels),
        rows=len(kept),
        p_value=p_value,
        test=test_name,
        **options,
    )
    return found


def _of_rows(said: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """A model's answers to some of the rows."""
    return {key: [values[row] for row in rows] for key, values in said.items()}


def _per_row(metric: str, said: dict[str, Any], test: Sequence[Example]) -> Any:
    """Each row's score, the higher the better; a metric that no single row has is judged by being right."""
    if metric in ("accuracy", "f1_macro"):
        return _right(said, test).astype(float)
    if metric == "loss":
        return -np.array([loss / max(1, count) for loss, count in said["losses"]])
    return np.asarray(said[metric], dtype=float)


def _statistic(
    metric: str, said: dict[str, Any], test: Sequence[Example], labels: list[str] | None
) -> compare.Statistic:
    """The metric as a function of row numbers."""
    if metric == "accuracy":
        right = _right(said, test)
        return lambda chosen: float(right[chosen].mean())
    if metric == "f1_macro":
        assert labels is not None
        return _f1_macro(said, test, labels)
    if metric == "loss":
        totals = np.array([loss for loss, _ in said["losses"]])
        counts = np.array([count for _, count in said["losses"]])
        return lambda chosen: float(totals[chosen].sum() / max(1, counts[chosen].sum()))
    values = np.asarray(said[metric])
    return lambda chosen: float(values[chosen].mean())


def _f1_macro(said: dict[str, Any], test: Sequence[Example], labels: list[str]) -> compare.Statistic:
    truth = _places([str(example.label) for example in test], labels)
    predicted = _places(said["prediction"], labels)
    return lambda chosen: _f1_of(truth[chosen], predicted[chosen], len(labels))


def _f1_of(truth: Any, predicted: Any, size: int) -> float:
    """As scikit-learn's, from counts, since it is asked thousands of times."""
    hits = np.bincount(truth[truth == predicted], minlength=size)
    both = np.bincount(truth, minlength=size) + np.bincount(predicted, minlength=size)
    return float((2 * hits[both > 0] / both[both > 0]).mean())


def _places(words: Sequence[str], labels: Sequence[str]) -> Any:
    place = {label: number for number, label in enumerate(labels)}
    return np.array([place[word] for word in words])


def _test(
    metric: str, tuned: dict[str, Any], other: dict[str, Any], test: Sequence[Example], labels: Any, seed: int
) -> tuple[float, str]:
    if metric == "accuracy":
        return compare.mcnemar(_right(tuned, test), _right(other, test)), "McNemar exact"
    if metric == "preference_accuracy" and not any(0.5 in said[metric] for said in (tuned, other)):
        return compare.mcnemar(np.asarray(tuned[metric]) == 1, np.asarray(other[metric]) == 1), "McNemar exact"
    if metric == "f1_macro":
        truth = _places([str(example.label) for example in test], labels)
        said, instead = (_places(answers["prediction"], labels) for answers in (tuned, other))

        def difference(exchanged: Any) -> float:
            mine, theirs = np.where(exchanged, instead, said), np.where(exchanged, said, instead)
            return _f1_of(truth, mine, len(labels)) - _f1_of(truth, theirs, len(labels))

        return compare.exchange(difference, len(test), seed=seed), "paired permutation"
    if metric == "loss":
        one, two = ([loss for loss, _ in said["losses"]] for said in (tuned, other))
    else:
        one, two = tuned[metric], other[metric]
    return compare.permutation(np.asarray(one) - np.asarray(two), seed=seed), "paired permutation"


def _right(said: dict[str, Any], test: Sequence[Example]) -> Any:
    return np.array([word == example.label for word, example in zip(said["prediction"], test, strict=True)])


def _expected(example: Example, labels: list[str] | None) -> str | None:
    """What a row says is right: its class, its text, its (better) answer; None where a grader decides."""
    if labels is not None:
        return example.label
    return None if example.item is not None else example.text or example.answer


def _write_predictions(
    run: Run, recipe: Recipe, test: Sequence[Example], answers: Answers, labels: list[str] | None
) -> None:
    """One row for each test row and model: model, id, label, prediction, probabilities (in the labels' order), and
    what else the task's metrics are computed from."""
    import pandas as pd

    frames = []
    for name, said in answers.items():
        columns: dict[str, Any] = {
            "model": name,
            "id": [example.id for example in test],
            "label": [_expected(example, labels) for example in test],
        }
        if "prediction" in said:
            columns["prediction"] = said["prediction"]
        if labels is not None:
            distribution = said.get("probabilities")
            columns["probabilities"] = (
                [None] * len(test) if distribution is None else [list(row) for row in distribution]
            )
        if "said" in said:
            columns["said"] = said["said"]
        if "losses" in said:
            columns["loss_sum"] = [loss for loss, _ in said["losses"]]
            columns["tokens"] = [count for _, count in said["losses"]]
        for key in said:
            if key in (*PER_ROW, *metrics.MEANS) or key.startswith("reward."):
                columns[key] = said[key]
        if recipe.task == "preference":
            columns["rejected"] = [example.rejected for example in test]
        frames.append(pd.DataFrame(columns))
    run.predictions_file.parent.mkdir(parents=True, exist_ok=True)
    whole = pd.concat(frames, ignore_index=True)
    fresh = run.predictions_file.with_suffix(".new")
    whole.to_parquet(fresh, index=False)
    fresh.replace(run.predictions_file)


def _report(
    run: Run,
    recipe: Recipe,
    checks: dict[str, Any],
    test: Sequence[Example],
    answers: Answers,
    labels: list[str] | None,
    measured: dict[str, Any],
) -> dict[str, Any]:
    resolved = run.resolved()
    trained = run.manifest("train")
    wanted = recipe.evaluate.must_beat or "base"
    comparison = next(one for one in measured["comparisons"] if one["baseline"] == wanted)
    log = run.metrics()
    drawn = "reward" if recipe.task == "reward" else "loss"  # GRPO's loss is about 0 however well it goes
    where = f"{run.path.parent.name}/{run.id}"
    body: dict[str, Any] = {
        "schema": 1,
        "name": recipe.name,
        "run_id": run.id,
        "created": now(),
        "task": recipe.task,
        "rows": len(test),
        "metric": recipe.metric,
        "models": measured["models"],
        "intervals": measured["intervals"],
        "comparison": comparison,
        "comparisons": measured["comparisons"],
        "slices": measured["slices"],
        "slices_of": measured["slices_of"],
        "without_leaked": measured.get("without_leaked"),
        "must_beat": recipe.evaluate.must_beat,
        "examples": _examples(recipe, test, answers, labels) if recipe.task != "pretraining" else [],
        "cost": _cost(run, trained),
        "training": {
            key: trained[key]
            for key in (
                "method",
                "steps",
                "epochs",
                "seconds",
                "tokens",
                "trainable_parameters",
                "parameters",
                "device",
                "final_loss",
            )
        }
        | {
            "curve": [[entry["step"], entry[drawn]] for entry in log if drawn in entry],
            "curve_of": drawn,
            "validation_curve": [[entry["step"], entry["eval_loss"]] for entry in log if "eval_loss" in entry],
        },
        "data": {split: checks["splits"][split] | _histograms(run, split) for split in ("train", "test")}
        | _found(run, checks),
        "model": {key: resolved["model"][key] for key in ("name", "revision", "parameters")},
        "repeat": [
            f"tunewright run {where}/recipe.yaml --fresh",
            f"tunewright show {where}",
            f"tunewright destroy {where}",
        ],
        "versions": resolved["versions"],
        "recipe": run.recipe_file.read_text(),
    }
    if labels is not None:
        body["labels"] = labels
    return body


def _cost(run: Run, trained: dict[str, Any]) -> dict[str, Any]:
    """What training took, and what was planned to be billed."""
    planned = run.manifest("plan") if run.manifest_file("plan").is_file() else {}
    took = {"seconds": trained["seconds"], "device": trained["device"], "tokens": trained["tokens"]}
    return took | {key: (planned.get("cost") or {}).get(key) for key in ("low", "high", "note")}


def _found(run: Run, checks: dict[str, Any]) -> dict[str, Any]:
    """Findings of the preparation and of the long look: the first of each kind, and how many there are."""
    looked = read_json(run.inspection_file) if run.inspection_file.is_file() else {"findings": [], "counts": []}
    findings = _gravest([*checks["findings"], *looked["findings"]])
    return {"findings": findings[:MOST_FINDINGS], "counts": [*checks["counts"], *looked["counts"]]}


def _histograms(run: Run, split: str) -> dict[str, Any]:
    """How many sequences have how many tokens, and how many of those are learnt."""
    store = TokenStore.open(run, split)
    found = {}
    for part, lengths in (("total", store.lengths), ("answer", store.targets)):
        counts, edges = np.histogram(lengths, bins=_edges(lengths))
        found[part] = {"edges": edges.tolist(), "counts": counts.tolist()}
    return {"histograms": found}


def _edges(lengths: Any) -> Any:
    """Whole numbers, at most `TOKEN_BINS` steps of the same width from the shortest to the longest."""
    low, high = int(lengths.min()), int(lengths.max()) + 1
    width = max(1, -(-(high - low) // TOKEN_BINS))
    return np.arange(low, high + width, width)


def _gravest(findings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Errors first, then warnings, each in their order."""
    return sorted(findings, key=lambda finding: ("error", "warning", "info").index(finding["severity"]))


def _examples(
    recipe: Recipe, test: Sequence[Example], answers: Answers, labels: list[str] | None
) -> list[dict[str, Any]]:
    """A few rows for a person: where tuned is right and base wrong, where tuned is wrong, and both right."""
    tuned, base = answers["tuned"], answers["base"]
    if labels is not None:
        good, was_good = _right(tuned, test), _right(base, test)
    elif recipe.task == "preference":
        good, was_good = (np.asarray(said["preference_accuracy"]) == 1 for said in (tuned, base))
    elif recipe.task == "reward":
        good = np.asarray(tuned["reward"]) >= np.asarray(base["reward"])
        was_good = ~(np.asarray(tuned["reward"]) > np.asarray(base["reward"]))
    else:
        good = np.asarray(tuned["rouge_l"]) >= np.asarray(base["rouge_l"])
        was_good = ~good
    won, lost = np.flatnonzero(good & ~was_good), np.flatnonzero(~good)
    same = np.flatnonzero(good & was_good)
    chosen = [*won[:5], *lost[:5], *same[:2]]
    chosen += [row for row in range(len(test)) if row not in chosen][: NUM_EXAMPLES - len(chosen)]
    rows = []
    for row in map(int, chosen[:NUM_EXAMPLES]):
        example = test[row]
        shown: dict[str, Any] = {
            "id": example.id,
            "source": example.source,
            "text": "\n\n".join(message.content for message in example.prompt),
            "label": _expected(example, labels),
        }
        if recipe.task == "preference":
            shown |= {
                "rejected": example.rejected,
                "tuned_correct": bool(good[row]),
                "base_correct": bool(was_good[row]),
            }
            shown |= {name: _leaning(said, row) for name, said in (("tuned", tuned), ("base", base))}
        else:
            shown |= {"tuned": tuned["prediction"][row], "base": base["prediction"][row]}
        if recipe.task == "reward":
            shown |= {"tuned_reward": tuned["reward"][row], "base_reward": base["reward"][row]}
        if labels is not None:
            shown |= {"tuned_correct": bool(good[row]), "base_correct": bool(was_good[row])}
            if "probabilities" in tuned:
                shown["confidence"] = float(np.max(tuned["probabilities"][row]))
        rows.append(shown)
    return rows


def _leaning(said: dict[str, Any], row: int) -> str:
    """Which of two answers a model finds the more probable, in words."""
    difference = said["chosen_logp"][row] - said["rejected_logp"][row]
    which = "better" if difference > 0 else "worse"
    return f"the {which} answer is the more probable one, by {abs(difference):.2f} nats"
