"""What the verdict rests on: slices, leaked rows, the rows that errors come from, labels that look wrong."""

from __future__ import annotations

import json
import math
import random
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sample_reports
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from tunewright import api, chat, cli, life, models
from tunewright import recipe as recipes
from tunewright.chat import Example, Message
from tunewright.data import prepare
from tunewright.errors import DataError, RunError
from tunewright.evaluate import compare, influence, measure, metrics, report, slices, suspects
from tunewright.evaluate import earlier as earlier_runs
from tunewright.run import Run
from tunewright.testing import tiny_model
from tunewright.tracking import Tracker

WORDS = {"good": ("lovely", "great", "kind", "sweet"), "bad": ("awful", "poor", "rude", "sour")}


def row(text: str, label: str, number: int = 0, **columns: str) -> Example:
    said = (Message("user", text), Message("assistant", label))
    return Example(f"t:{number}", f"t:{number}", said, label, slices=columns or None)


# --- A/A and a planted gain ---


def verdicts(chance: np.random.Generator, runs: int, rows: int, tuned: float, other: float) -> list[str]:
    """What is said of two models that are right on these shares of the rows, some rows being hard for both."""
    found = []
    for number in range(runs):
        hard = chance.normal(size=rows)
        one, two = (hard + chance.normal(size=rows) < norm.ppf(share, scale=2**0.5) for share in (tuned, other))
        told = compare.compare(
            metric="accuracy",
            baseline="base",
            tuned=lambda chosen, one=one: float(one[chosen].mean()),
            other=lambda chosen, two=two: float(two[chosen].mean()),
            rows=rows,
            p_value=compare.mcnemar(one, two),
            test="McNemar exact",
            resamples=300,
            seed=number,
        )
        found.append(told["verdict"])
    return found


def test_of_two_hundred_runs_that_changed_nothing_few_are_called_better() -> None:
    said = verdicts(np.random.default_rng(1), 200, 250, 0.7, 0.7)
    assert said.count("better") <= 14
    assert said.count("not better") <= 14
    assert said.count("no evidence") >= 180


def test_a_planted_gain_is_found_and_a_planted_loss_too() -> None:
    chance = np.random.default_rng(2)
    assert verdicts(chance, 40, 600, 0.80, 0.66).count("better") >= 38
    assert verdicts(chance, 40, 600, 0.66, 0.80).count("not better") >= 38


def test_a_gain_of_the_smallest_detectable_size_is_found_four_times_in_five() -> None:
    chance = np.random.default_rng(3)
    sample = chance.random(400) < 0.3
    least = compare.compare(
        metric="accuracy",
        baseline="base",
        tuned=lambda chosen: float(sample[chosen].mean()),
        other=lambda chosen: 0.0,
        rows=400,
        p_value=1.0,
        test="t",
        resamples=2000,
        seed=1,
    )["smallest_detectable"]
    spread = sample.std() / 20
    drawn = chance.normal(least, spread, 20_000)  # what a test set would show of such a difference
    assert (drawn > 1.96 * spread).mean() == pytest.approx(0.8, abs=0.03)


def test_of_slices_without_a_difference_hardly_one_is_called_better_or_worse() -> None:
    chance = np.random.default_rng(4)
    wrong = 0
    for _ in range(100):
        one, two = chance.random(800) < 0.7, chance.random(800) < 0.7
        parts = [("column", str(value), np.arange(value * 40, value * 40 + 40)) for value in range(20)]
        told = slices.judge(parts, one, two, binary=True, resamples=50, seed=1)
        wrong += any(part["verdict"] != "no evidence" for part in told)
    assert wrong <= 7


# --- slices ---


def test_a_slice_that_got_worse_is_found_among_those_that_got_better() -> None:
    chance = np.random.default_rng(5)
    test = [row("word " * (1 + number % 7), "good", number, shop="abc"[number % 3]) for number in range(600)]
    other = chance.random(600) < 0.6
    tuned = other.copy()
    for number in range(600):
        tuned[number] = (number % 3 != 2) and chance.random() < 0.95
    parts = slices.slices(test, [len(example.prompt[0].content) for example in test])
    told = {
        (one["by"], one["value"]): one for one in slices.judge(parts, tuned, other, binary=True, resamples=200, seed=1)
    }
    assert told["shop", "c"]["verdict"] == "not better"
    assert told["shop", "c"]["difference"] < -0.4
    assert told["shop", "a"]["verdict"] == told["shop", "b"]["verdict"] == "better"
    assert sum(one["rows"] for (by, _), one in told.items() if by == "shop") == 600
    assert sum(one["rows"] for (by, _), one in told.items() if by == slices.LENGTH) == 600


def test_small_slices_are_counted_together() -> None:
    test = [row("x", "good", number, shop="big" if number < 50 else f"s{number}") for number in range(70)]
    found = [(by, value, len(rows)) for by, value, rows in slices.slices(test, [1] * 70) if by == "shop"]
    assert found == [("shop", "big", 50), ("shop", slices.REST, 20)]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_corrected_values_keep_the_order_and_never_fall(p_values: list[float]) -> None:
    corrected = slices.holm(p_values)
    assert all(one <= other <= 1 for one, other in zip(p_values, corrected, strict=True))
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    assert [corrected[place] for place in order] == sorted(corrected)
    assert corrected[order[0]] == min(1.0, len(p_values) * p_values[order[0]])


def test_slices_of_a_loss_show_the_loss_itself() -> None:
    loss, before = np.full(20, 1.5), np.full(20, 2.5)
    parts = [("shop", "a", np.arange(20))]
    (told,) = slices.judge(parts, -loss, -before, binary=False, resamples=200, seed=1, sign=-1)
    assert (told["tuned"], told["baseline_value"], told["difference"]) == (1.5, 2.5, 1.0)


@pytest.mark.parametrize("lost", [math.nan, None])
def test_slices_of_a_model_that_diverged_do_not_stop_the_report(lost: float | None) -> None:
    parts = [("shop", "a", np.arange(20)), ("shop", "b", np.arange(20, 40))]
    scores = np.concatenate([np.full(20, np.nan), np.arange(20.0)])
    told = slices.judge(parts, scores, np.zeros(40), binary=False, resamples=200, seed=1)
    for value in told[0].keys() & {"tuned", "difference"}:
        told[0][value] = lost
    page = report.render_html(sample_reports.pretraining() | {"slices": told, "slices_of": "loss"})
    assert "not a number" in page
    for one in told:
        one |= {"tuned": lost, "difference": lost, "interval": [lost, lost]}
    report.render_html(sample_reports.pretraining() | {"slices": told, "slices_of": "loss"})


def test_a_column_with_one_long_text_takes_no_more_memory_than_it_has() -> None:
    test = [row("x", "good", number, page="y" * 40_000 if number == 0 else "z") for number in range(2000)]
    tracemalloc.start()
    found = slices.slices(test, [1] * 2000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [len(rows) for by, _, rows in found if by == "page"] == [1999, 1]
    assert peak < 10_000_000


# --- labels that look wrong ---


@pytest.mark.parametrize("seed", [0, 1])
def test_flipped_labels_of_real_rows_are_recovered(shared: Path, seed: int) -> None:
    lines = (shared / "data/sentiment-sentences/train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    flipped = set(np.random.default_rng(seed).choice(len(rows), len(rows) // 20, replace=False).tolist())
    other = {"positive": "negative", "negative": "positive"}
    texts = [one["text"] for one in rows]
    given = [other[one["label"]] if number in flipped else one["label"] for number, one in enumerate(rows)]
    known, probabilities = suspects.self_confidence(
        texts, np.array([sorted(other).index(label) for label in given]), seed=1
    )
    own = probabilities[np.arange(len(rows)), np.searchsorted(known, [sorted(other).index(label) for label in given])]
    assert roc_auc_score([number in flipped for number in range(len(rows))], -own) > 0.85  # asked for: 0.75


def test_the_likeliest_come_first_with_the_label_that_they_should_have() -> None:
    chance = random.Random(1)
    train = []
    for number in range(200):
        label = ("good", "bad")[number % 2]
        wrong = number in (20, 31)
        text = " ".join(chance.choices(WORDS[label], k=4))
        train.append(row(text, ("bad", "good")[label == "bad"] if wrong else label, number))
    found = suspects.suspects(train, ["bad", "good"], seed=1)
    assert found is not None
    assert {one.row for one in found.rows} == {20, 31}
    assert {one.row: one.instead for one in found.rows} == {20: "good", 31: "bad"}
    assert found.accuracy == pytest.approx(0.99)


def test_too_few_rows_of_each_label_are_not_judged() -> None:
    assert suspects.suspects([row("a", "x"), row("b", "y"), row("c", "x")], ["x", "y"], seed=1) is None


# --- gradients ---


def test_a_rows_own_gradient_is_nearest_to_it_and_the_other_answers_points_away(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    ref = models.find(str(tiny_model(tmp_path / "model")))
    tokenizer = models.load_tokenizer(ref)
    equipment = chat.equip(tokenizer)
    model = models.load_model(ref)
    rows = [row(f"a {word} day", label, 1) for label, words in WORDS.items() for word in words]
    opposite = [replace(one, messages=(*one.messages[:-1], Message("assistant", "bad"))) for one in rows[:4]]
    renderings = [prepare.render(tokenizer, one) for one in [*rows, *opposite]]
    found = influence.sketches(model, renderings, equipment.pad_id)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-5)
    assert [near[0][0] for near in influence.nearest(found, found, 1)] == list(range(12))
    for place in range(4):
        assert found[place] @ found[place + 1 if place < 3 else 0] > found[place] @ found[8 + place]
    alone = influence.sketches(model, renderings[3:4], equipment.pad_id)
    assert alone[0] == pytest.approx(found[3], abs=1e-4)  # the rows of a batch do not touch one another


def test_what_a_template_would_not_write_is_traced_all_the_same(tmp_path: Path) -> None:
    tokenizer = models.load_tokenizer(models.find(str(tiny_model(tmp_path / "model"))))
    tokenizer.chat_template = (
        "{% for one in messages %}{{ one.role + ':\\n' + one.content.split('</think>')[-1] + eos_token + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
    )
    equipment = chat.equip(tokenizer)
    thought = Example("t:1", "t:1", (Message("user", "so?"), Message("assistant", "hm</think>yes")))
    with pytest.raises(DataError, match="drops or changes"):
        chat.render(tokenizer, thought.messages)
    made = measure._as_said(tokenizer, equipment, thought)
    assert tokenizer.decode([one for one, flag in zip(made.ids, made.mask, strict=True) if flag]).startswith(
        "hm</think>"
    )
    assert made.ids[-1] == equipment.end_of_turn_id


def test_of_a_long_row_the_answers_logits_alone_are_made(tmp_path: Path) -> None:
    ref = models.find(str(tiny_model(tmp_path / "model")))
    tokenizer = models.load_tokenizer(ref)
    equipment = chat.equip(tokenizer)
    model = models.load_model(ref)
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, given, made: seen.append(made.numel()))
    rendering = prepare.render(tokenizer, row("a lovely day " * 20, "good"))
    influence.sketches(model, [rendering], equipment.pad_id)
    assert seen == [sum(rendering.mask) * model.get_output_embeddings().weight.shape[0]]


# --- a whole run ---


@pytest.fixture(scope="module")
def given_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe over rows with two wrong labels, a leak and a column; and the folder of its evaluated run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("evidence")
    chance = random.Random(2)

    def made(number: int, label: str, say: str | None = None) -> dict[str, str]:
        other = " ".join("".join(chance.choices("bcdfgk", k=6)) for _ in range(6))
        text = f"{' '.join(chance.choices(WORDS[label], k=2))} {other} {number}"
        return {"text": text, "label": say or label, "shop": ("north", "south")[number % 3 == 0]}

    train = [made(number, ("good", "bad")[number % 2]) for number in range(60)]
    train += [made(60, "good", "bad"), made(61, "bad", "good")]
    test = [made(number, ("good", "bad")[number % 2]) for number in range(100, 140)]
    test += [{**train[5], "shop": "north"}]
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    given = {
        "name": "days",
        "model": str(tiny_model(folder / "model")),
        "task": "classification",
        "data": {name: str(folder / f"{name}.jsonl") for name in ("train", "test")},
        "train": {"method": "full", "epochs": 2, "learning_rate": 3e-3, "batch_size": 8},
        "evaluate": {"bootstrap": 200, "slices": ["shop"], "must_beat": None},
        "tracking": {"enabled": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(given))
    run = api.open(folder / "recipe.yaml", runs=folder / "runs")
    run.run(until="evaluate")
    return folder / "recipe.yaml", run.folder.path


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "evaluate/report.json").read_text())
    return found


def test_the_report_has_slices_leaks_errors_and_suspects(given_run: tuple[Path, Path]) -> None:
    report = report_of(given_run[1])
    assert {(one["by"], one["value"]) for one in report["slices"] if one["by"] == "shop"} == {
        ("shop", "north"),
        ("shop", "south"),
    }
    assert report["without_leaked"]["leaked"] == 1
    assert report["without_leaked"]["rows"] == report["rows"] - 1 == 40
    found = report["rows_that_matter"]
    assert {one["source"].rpartition(":")[2] for one in found["suspects"]["rows"][:2]} == {"61", "62"}
    predictions = [one for one in found["errors"]["rows"] if one["label"] == one["tuned"]]
    assert not predictions
    assert found["errors"]["by"] == "gradients"
    assert all(len(one["nearest"]) == 3 for one in found["errors"]["rows"])
    lines = (given_run[1] / "evaluate/nearest.jsonl").read_text().splitlines()
    assert len(lines) == 5 * found["errors"]["traced"]


def test_rows_are_dropped_and_the_run_trained_again_in_one_command(
    given_run: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = given_run[1].parent
    monkeypatch.setattr("sys.argv", ["tunewright", "retrain", str(given_run[1]), "--drop", "2", "--runs", str(runs)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr()
    assert left.value.code == 0
    folder = Path(said.out.strip().splitlines()[-1])
    assert folder != given_run[1]
    checks = json.loads((folder / "data/checks.json").read_text())
    assert checks["splits"]["train"]["used"] == 60
    findings = [json.loads(line) for line in (folder / "data/findings.jsonl").read_text().splitlines()]
    assert {one["where"].rpartition(":")[2] for one in findings if one["code"] == "asked_out"} == {"61", "62"}
    assert f"run {given_run[1].name}" in said.err  # the two are compared


def test_of_very_many_rows_some_are_drawn_in_their_order(given_run: tuple[Path, Path]) -> None:
    run = Run.open(given_run[1])
    whole = prepare.examples(run, "train")
    some = prepare.some_examples(run, "train", 20, seed=1)
    assert len(some) == 20
    assert [one for one in whole if one in some] == some
    assert some != prepare.some_examples(run, "train", 20, seed=2)
    assert prepare.some_examples(run, "train", 62, seed=1) == whole


def test_more_than_there_are_cannot_be_dropped(given_run: tuple[Path, Path]) -> None:
    run = api.open(given_run[1])
    with pytest.raises(RunError, match="drop that many or fewer"):
        run.without(5000)
    with pytest.raises(RunError, match="--drop N"):
        run.without()


@pytest.mark.parametrize("line", ["{}", '{"sha256": 3}', "[]", "no"])
def test_a_list_without_rows_is_refused_at_its_line(given_run: tuple[Path, Path], tmp_path: Path, line: str) -> None:
    (tmp_path / "list.jsonl").write_text('{"sha256": "a"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"list.jsonl:2: data.without"):
        prepare.unwanted(str(tmp_path / "list.jsonl"))
    with pytest.raises(DataError, match="no file"):
        prepare.unwanted(str(tmp_path / "none.jsonl"))


def test_rows_of_the_list_that_are_not_there_are_said(given_run: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text('{"sha256": "a"}')
    recipe = recipes.load(given_run[0], [f"data.without={tmp_path / 'list.jsonl'}"])
    checked = life.check(life.located(recipe, tmp_path))
    assert checked.data is not None
    assert any(one.code == "not_found" for one in checked.data.findings)


def test_a_column_that_the_test_rows_lack_is_refused(given_run: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipes.load(given_run[0], ["evaluate.slices=[shops]"])
    problems = life.check(life.located(recipe, tmp_path)).errors
    assert "evaluate.slices: no column 'shops' in the test rows; did you mean 'shop'?" in problems[0].message


def test_a_column_that_only_some_test_rows_have_is_known(given_run: tuple[Path, Path], tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (given_run[0].parent / "test.jsonl").read_text().splitlines()]
    del rows[0]["shop"]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    recipe = recipes.load(given_run[0], [f"data.test={tmp_path / 'test.jsonl'}"])
    assert not life.check(life.located(recipe, tmp_path)).errors


def test_a_list_may_hold_what_ends_a_line_elsewhere(tmp_path: Path) -> None:
    line = json.dumps({"sha256": "a", "text": "one\u2028two\x85three"}, ensure_ascii=False)
    (tmp_path / "list.jsonl").write_text(line + "\r\n" + line.replace('"a"', '"b"'), encoding="utf-8")
    assert prepare.unwanted(str(tmp_path / "list.jsonl")) == {"a", "b"}


def test_rows_that_are_there_twice_do_not_hide_those_that_are_not(given_run: tuple[Path, Path], tmp_path: Path) -> None:
    lines = (given_run[0].parent / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join([*lines, lines[0], lines[0]]) + "\n")
    first = prepare.examples(Run.open(given_run[1]), "train")[0].sha256()
    (tmp_path / "list.jsonl").write_text("".join(json.dumps({"sha256": one}) + "\n" for one in (first, "b", "c")))
    sets = [f"data.train={tmp_path / 'train.jsonl'}", f"data.without={tmp_path / 'list.jsonl'}"]
    data = life.check(life.located(recipes.load(given_run[0], sets), tmp_path)).data
    assert data is not None
    assert sum(one.code == "asked_out" for one in data.findings) == 3
    assert [one.message for one in data.findings if one.code == "not_found"] == [
        "data.without names 3 rows, and 1 of them are here"
    ]


def test_a_loss_that_an_api_does_not_tell_is_left_out() -> None:
    told = sample_reports.binary()
    assert "Final loss" in report.render_html(told)
    untold = told["training"] | {"final_loss": None, "curve": [], "seconds": None, "tokens": None}
    assert "Final loss" not in report.render_html(told | {"training": untold})


# --- an earlier run ---


def test_an_earlier_runs_rows_are_known_by_what_they_say(given_run: tuple[Path, Path]) -> None:
    earlier = Run.open(given_run[1])
    recipe, test = earlier.recipe(), prepare.examples(earlier, "test")
    labels = ["bad", "good"]
    there = earlier_runs.answers(earlier, recipe, test, labels)
    elsewhere = [replace(one, id=f"../{one.id}", source=f"../{one.source}") for one in test]
    assert earlier_runs.answers(earlier, recipe, elsewhere, labels)["prediction"] == there["prediction"]
    edited = [replace(test[0], messages=(Message("user", "other words"), test[0].messages[-1])), *test[1:]]
    with pytest.raises(DataError, match="other rows"):
        earlier_runs.answers(earlier, recipe, edited, labels)


def test_an_earlier_runs_probabilities_and_classes_are_put_in_our_order(given_run: tuple[Path, Path]) -> None:
    earlier = Run.open(given_run[1])
    recipe, test = earlier.recipe(), prepare.examples(earlier, "test")
    there = earlier_runs.answers(earlier, recipe, test, ["bad", "good"])
    turned = earlier_runs.answers(earlier, recipe, test, ["good", "bad"])
    assert turned["probabilities"] == pytest.approx(there["probabilities"][:, ::-1])
    without = earlier_runs.answers(earlier, recipe, test, ["good", "awful"])
    assert set(without["prediction"]) <= {"good", metrics.OTHER}
    assert "probabilities" not in without


def test_an_earlier_run_of_another_task_or_that_diverged(given_run: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(given_run[1], tmp_path / "run")
    earlier = Run.open(tmp_path / "run")
    recipe, test = earlier.recipe(), prepare.examples(earlier, "test")
    frame = pd.read_parquet(earlier.predictions_file)
    frame["loss_sum"], frame["tokens"] = math.nan, 3
    frame.to_parquet(earlier.predictions_file)
    said = earlier_runs.answers(earlier, recipe, test, ["bad", "good"])
    assert [count for _, count in said["losses"]] == [3] * len(test)
    by_loss = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"metric": "loss"})})
    same, other = ({"losses": [(1.0, count)] * len(test)} for count in (3, 4))
    assert earlier_runs.comparable(said, same, by_loss, earlier) == said
    assert "losses" not in earlier_runs.comparable(said, other, recipe, earlier)
    with pytest.raises(DataError, match="another tokenizer"):
        earlier_runs.comparable(said, other, by_loss, earlier)
    with pytest.raises(DataError, match="has task: classification"):
        earlier_runs.answers(earlier, recipe.model_copy(update={"task": "chat"}), test, None)


def test_a_run_that_an_earlier_version_checked_is_evaluated(given_run: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(given_run[1], tmp_path / "run")
    run = Run.open(tmp_path / "run")
    looked = json.loads(run.inspection_file.read_text())
    del looked["leaked"]
    run.inspection_file.write_text(json.dumps(looked))
    measure.evaluate(run, Tracker(run))
    assert report_of(run.path)["without_leaked"]["leaked"] == 1  # preparation saw it too
