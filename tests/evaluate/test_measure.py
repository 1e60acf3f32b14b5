"""The report says what the models answered: every number in it can be had again from the rows beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from sklearn.metrics import f1_score

from tunewright import chat, life, models, work
from tunewright import recipe as recipes
from tunewright.chat import Message
from tunewright.data import prepare
from tunewright.evaluate import compare, measure, metrics
from tunewright.generate import LocalCompleter
from tunewright.models import ModelRef
from tunewright.run import Run
from tunewright.testing import tiny_data, tiny_model
from tunewright.tracking import Tracker
from tunewright.train import supervised

Evaluated = Callable[..., Run]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_model(tmp_path_factory.mktemp("measure") / "tiny", context=320)


def evaluated(folder: Path, base: Path, **sections: Any) -> Run:
    """A run of the tiny model up to `evaluate`, in this process."""
    given = {"name": "t", "model": str(base), "tracking": {"enabled": False}}
    sections["evaluate"] = {"bootstrap": 200} | sections.get("evaluate", {})
    run = life.start(recipes.loads(yaml.safe_dump(given | sections)), folder / "runs", resume=False)
    life.advance(run, until="check")
    work.prepare(run)
    supervised.fit(run, Tracker(run))
    measure.evaluate(run, Tracker(run))
    return run


@pytest.fixture(scope="module")
def classifier(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("classifier")
    return evaluated(
        folder,
        base,
        task="classification",
        data=tiny_data(folder, train=60, test=21),
        train={"method": "full", "learning_rate": 1e-2, "epochs": 4, "batch_size": 8},
        evaluate={"baselines": ["zero-shot", "few-shot", "tfidf", "majority"], "few_shot": 2, "batch_size": 4},
    )


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def talker(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("talker")
    talks = [
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": f"hello {number}"},
            {"role": "assistant", "content": "fine", "weight": 0},
            {"role": "user", "content": "and now?"},
            {"role": "assistant", "content": ("lovely day", "poor day")[number % 2]},
        ]
        for number in range(12)
    ]
    return evaluated(
        folder,
        base,
        task="chat",
        data={
            "train": jsonl(folder / "train.jsonl", [{"messages": talk} for talk in talks]),
            "test": jsonl(folder / "test.jsonl", [{"messages": talk} for talk in talks[:5]]),
        },
        train={"learning_rate": 1e-2, "epochs": 2, "batch_size": 4},
        evaluate={"baselines": ["few-shot"], "few_shot": 1, "max_new_tokens": 6},
    )


@pytest.fixture(scope="module")
def caller(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Learns to call a tool, and has seen calls that it is not to learn."""
    folder = tmp_path_factory.mktemp("caller")
    tools = [{"type": "function", "function": {"name": "sky", "parameters": {"type": "object", "properties": {}}}}]

    def calling(number: int, **more: Any) -> dict[str, Any]:
        function = {"name": "sky", "arguments": json.dumps({"day": number})}
        made = {"id": f"c{number}", "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [made], **more}

    rows = [
        {
            "tools": tools,
            "messages": [
                {"role": "user", "content": f"day {number}?"},
                calling(number, weight=0),
                {"role": "tool", "content": "lovely", "tool_call_id": f"c{number}"},
                *([{"role": "assistant", "content": "fine"}] if number % 2 else []),
                *([] if number % 2 else [{"role": "assistant", "content": "so"}, {"role": "user", "content": "now?"}]),
                *([] if number % 2 else [calling(9)]),
            ],
        }
        for number in range(8)
    ]
    return evaluated(
        folder,
        base,
        task="chat",
        data={
            "train": jsonl(folder / "train.jsonl", rows),
            "test": jsonl(folder / "test.jsonl", rows[:4]),
        },
        train={"learning_rate": 1e-2, "epochs": 1, "batch_size": 4},
        evaluate={"baselines": ["few-shot"], "few_shot": 1, "max_new_tokens": 6},
    )


def test_tools_and_weights_reach_training_and_evaluation(caller: Run) -> None:
    ref = ModelRef.from_dict(caller.resolved()["model"])
    tokenizer = models.load_tokenizer(ref)
    chat.equip(tokenizer)

    def learnt(example: chat.Example) -> str:
        rendering = prepare.render(tokenizer, example)
        return str(tokenizer.decode([token for token, flag in zip(rendering.ids, rendering.mask, strict=True) if flag]))

    end, call = tokenizer.eos_token, 'Call: {"name": "sky", "arguments": {"day": 9}}'
    test = prepare.examples(caller, "test")
    assert [learnt(one) for one in test] == [f"so{end}{call}{end}", f"fine{end}"] * 2
    assert '{"type": "function"' in tokenizer.decode(prepare.render(tokenizer, test[0]).ids)
    answers = caller.manifest("prepare")["splits"]["train"]["tokens"]["answer"]
    assert answers["max"] == len(tokenizer(f"so{end}{call}{end}").input_ids)
    rows = pd.read_parquet(caller.predictions_file).query("model == 'tuned'")
    assert list(rows["tokens"]) == [len(tokenizer(f"{said}{end}").input_ids) for said in (call, "fine")] * 2
    assert list(rows["label"]) == ['{"name": "sky", "arguments": {"day": 9}}', "fine"] * 2


@pytest.fixture(scope="module")
def reader(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("reader")
    texts = [f"lovely great fine superb kind {number} " * (1 + number % 4) for number in range(12)]
    return evaluated(
        folder,
        base,
        task="pretraining",
        data={
            "train": jsonl(folder / "train.jsonl", [{"text": text} for text in texts]),
            "test": jsonl(folder / "test.jsonl", [{"text": text} for text in [*texts[:6], "a\u00e9"]]),
        },
        train={"method": "full", "learning_rate": 1e-2, "epochs": 3, "batch_size": 4, "max_length": 32},
    )


def predictions(run: Run) -> dict[str, pd.DataFrame]:
    table = pd.read_parquet(run.predictions_file)
    return {str(name): rows.reset_index(drop=True) for name, rows in table.groupby("model", sort=False)}


def tuned(run: Run) -> LocalCompleter:
    ref = ModelRef.from_dict(run.resolved()["model"])
    tokenizer = models.load_tokenizer(ref)
    equipment = chat.equip(tokenizer)
    return LocalCompleter(measure.tuned_model(run, run.recipe(), ref, tokenizer), tokenizer, equipment)


# --- classification ---


def test_the_report_has_its_documented_shape(classifier: Run) -> None:
    report = classifier.manifest("evaluate")
    assert report["task"] == "classification"
    assert report["rows"] == 21
    assert list(report["models"]) == ["tuned", "base", "few-shot", "tfidf", "majority"]
    for values in report["models"].values():
        assert {"accuracy", "precision_macro", "recall_macro", "f1_macro", "confusion", "per_class"} <= set(values)
    assert "ece" in report["models"]["tuned"]
    assert "ece" not in report["models"]["majority"]
    for intervals in report["intervals"].values():
        assert set(intervals) == {"accuracy", "f1_macro"}
        assert all(low <= high for low, high in intervals.values())
    assert {"baseline", "difference", "interval", "p_value", "verdict"} <= set(report["comparison"])
    assert report["comparison"]["baseline"] == "base"
    assert [one["baseline"] for one in report["comparisons"]] == ["base", "few-shot", "tfidf", "majority"]
    assert report["labels"] == ["bad", "good"]
    assert len(report["training"]["curve"]) == 32
    assert classifier.report_page.is_file()
    assert classifier.report_text.is_file()


def test_every_number_can_be_had_again_from_the_predictions(classifier: Run) -> None:
    report, tables = classifier.manifest("evaluate"), predictions(classifier)
    assert list(tables) == list(report["models"])
    for name, table in tables.items():
        values = report["models"][name]
        distribution = None if table["probabilities"].isna().any() else np.stack(table["probabilities"].tolist())
        again = metrics.classification(list(table["label"]), list(table["prediction"]), report["labels"], distribution)
        assert json.loads(json.dumps(again)) == values
        assert values["accuracy"] == float((table["label"] == table["prediction"]).mean())
        assert values["f1_macro"] == pytest.approx(f1_score(table["label"], table["prediction"], average="macro"))
        if distribution is not None:
            best = [report["labels"][place] for place in distribution.argmax(axis=1)]
            assert best == list(table["prediction"])
            assert values["loss"] == pytest.approx(again["loss"])
    right = {name: table["label"] == table["prediction"] for name, table in tables.items()}
    for comparison in report["comparisons"]:
        one, other = right["tuned"], right[comparison["baseline"]]
        assert comparison["difference"] == pytest.approx(one.mean() - other.mean())
        assert comparison["p_value"] == pytest.approx(compare.mcnemar(list(one), list(other)))


def test_no_row_is_lost_and_each_stands_in_its_place(classifier: Run) -> None:
    test = prepare.examples(classifier, "test")
    for table in predictions(classifier).values():
        assert list(table["id"]) == [example.id for example in test]
        assert list(table["label"]) == [example.label for example in test]


def test_probabilities_are_the_models_own(classifier: Run) -> None:
    """The chance of each label's tokens and end of turn, among the labels."""
    completer, table = tuned(classifier), predictions(classifier)["tuned"]
    for row, example in enumerate(prepare.examples(classifier, "test")[:6]):
        chances = []
        for label in ("bad", "good"):
            whole = chat.render(completer.tokenizer, [*example.prompt, Message("assistant", label)])
            ((loss, _),) = completer.losses([whole])
            chances.append(math.exp(-loss))
        expected = np.asarray(chances) / sum(chances)
        assert table["probabilities"][row] == pytest.approx(expected, abs=1e-4)


def test_base_is_not_the_tuned_model(classifier: Run) -> None:
    tables = predictions(classifier)
    one, other = (np.stack(tables[name]["probabilities"].tolist()) for name in ("tuned", "base"))
    assert np.abs(one - other).max() > 1e-3
    assert classifier.manifest("evaluate")["models"]["tuned"]["accuracy"] > 0.9


def test_shots_are_shown_and_counted(classifier: Run, talker: Run) -> None:
    for run, asked in ((classifier, 2), (talker, 1)):
        (event,) = [event for event in run.events() if event["event"] == "few-shot"]
        assert event["asked"] == asked
        assert event["shown"] == asked
    one, other = (np.stack(predictions(classifier)[name]["probabilities"].tolist()) for name in ("few-shot", "base"))
    assert np.abs(one - other).max() > 1e-4


def test_progress_goes_on_to_the_end(classifier: Run, talker: Run, reader: Run) -> None:
    for run in (classifier, talker, reader):
        progress = run.progress("evaluate")
        assert progress is not None
        assert progress["done"] == progress["total"] > 0


# --- chat ---


def test_chat_answers_and_their_numbers(talker: Run) -> None:
    report, tables = talker.manifest("evaluate"), predictions(talker)
    assert list(report["models"]) == list(tables) == ["tuned", "base", "few-shot"]
    for name, table in tables.items():
        values = report["models"][name]
        truth, said = list(table["label"]), list(table["prediction"])
        assert truth == [example.answer for example in prepare.examples(talker, "test")]
        assert values["rouge_l"] == pytest.approx(np.mean(metrics.rouge_l(said, truth)))
        assert values["exact_match"] == pytest.approx(np.mean(metrics.exact_match(said, truth)))
        assert values["loss"] == pytest.approx(table["loss_sum"].sum() / table["tokens"].sum())
    assert report["comparison"]["metric"] == "rouge_l"
    assert set(report["intervals"]["tuned"]) == {"rouge_l", "exact_match", "loss"}


def test_chat_loss_is_on_the_last_answer_alone(talker: Run) -> None:
    completer, table = tuned(talker), predictions(talker)["tuned"]
    for row, example in enumerate(prepare.examples(talker, "test")):
        answer = chat.render_answer(completer.tokenizer, completer.equipment, example.answer)
        prompt = chat.render_prompt(completer.tokenizer, example.prompt)
        logits = completer.model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        loss = -sum(float(logits[len(prompt) + place - 1, token].detach()) for place, token in enumerate(answer))
        assert table["loss_sum"][row] == pytest.approx(loss, abs=1e-4)
        assert table["tokens"][row] == len(answer)


def test_chat_answers_are_those_that_the_model_gives_alone(talker: Run) -> None:
    completer, table = tuned(talker), predictions(talker)["tuned"]
    for row, example in enumerate(prepare.examples(talker, "test")):
        assert completer.answer(example.prompt, max_new_tokens=6) == table["prediction"][row]


# --- pretraining ---


def test_pretraining_loss_counts_each_token_but_the_first_once(reader: Run) -> None:
    """Also of texts longer than a piece, whose pieces are measured apart."""
    completer, table = tuned(reader), predictions(reader)["tuned"]
    test = prepare.examples(reader, "test")
    lengths = [len(prepare.render(completer.tokenizer, example).ids) for example in test]
    assert max(lengths) > 32
    assert list(table["tokens"]) == [length - 1 for length in lengths]
    for row, example in enumerate(test):
        pieces = prepare.pieces(prepare.render(completer.tokenizer, example), 32)
        assert table["loss_sum"][row] == pytest.approx(sum(loss for loss, _ in completer.losses(pieces)), abs=1e-4)
    values = reader.manifest("evaluate")["models"]["tuned"]
    num_bytes = sum(len(str(example.text).encode()) for example in test)
    assert values["loss"] == pytest.approx(table["loss_sum"].sum() / table["tokens"].sum())
    assert values["bits_per_byte"] == pytest.approx(table["loss_sum"].sum() / math.log(2) / num_bytes)


def test_pretraining_is_judged_by_loss_lower_is_better(reader: Run) -> None:
    report = reader.manifest("evaluate")
    comparison = report["comparison"]
    assert report["models"]["tuned"]["loss"] < report["models"]["base"]["loss"]
    assert comparison["metric"] == "loss"
    assert comparison["difference"] == pytest.approx(
        report["models"]["base"]["loss"] - report["models"]["tuned"]["loss"]
    )
    assert comparison["interval"][0] > 0
    assert report["examples"] == []


# --- the verdict's metric ---


def said(words: list[str]) -> dict[str, Any]:
    return {"prediction": words}


def test_f1_macro_equals_scikit_learns_on_any_rows() -> None:
    generator = np.random.default_rng(0)
    labels = ["a", "b", "c", "d"]
    truth = list(generator.choice(labels[:3], 50))
    answers = list(generator.choice(labels, 50))
    test = [chat.Example(str(row), "", label=word) for row, word in enumerate(truth)]
    statistic = measure._statistic("f1_macro", said(answers), test, labels)
    for _ in range(20):
        chosen = generator.integers(0, 50, 50)
        expected = f1_score(
            [truth[row] for row in chosen], [answers[row] for row in chosen], average="macro", zero_division=0
        )
        assert statistic(chosen) == pytest.approx(expected)


def test_a_gain_in_f1_is_tested_as_such() -> None:
    """One model says the frequent class always; the other finds the rare one at the cost of as many frequent rows, so
    accuracy is the same and McNemar's test sees nothing, but macro F1 is far better."""
    truth = ["common"] * 180 + ["rare"] * 20
    lazy = ["common"] * 200
    keen = ["rare"] * 20 + ["common"] * 160 + ["rare"] * 20
    test = [chat.Example(str(row), "", label=word) for row, word in enumerate(truth)]
    labels = ["common", "rare"]
    by_rows, _ = measure._test("accuracy", said(keen), said(lazy), test, labels, 0)
    by_f1, name = measure._test("f1_macro", said(keen), said(lazy), test, labels, 0)
    assert by_rows == 1.0
    assert by_f1 < 0.01
    assert name == "paired permutation"
    assert measure._test("f1_macro", said(lazy), said(lazy), test, labels, 0)[0] == 1.0


def test_another_baseline_can_be_the_one_to_beat(base: Path, tmp_path: Path) -> None:
    run = evaluated(
        tmp_path,
        base,
        task="classification",
        data=tiny_data(tmp_path, train=20, test=8),
        train={"max_steps": 1},
        evaluate={"must_beat": "majority", "metric": "f1_macro"},
    )
    report = run.manifest("evaluate")
    assert report["comparison"]["baseline"] == "majority"
    assert report["comparison"]["metric"] == "f1_macro"
    assert life.verdict(run) == report["comparison"]["verdict"] != "better"
