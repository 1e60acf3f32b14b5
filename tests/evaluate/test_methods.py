"""What evaluation says of preference and reward can be computed again from the rows that it wrote down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tunewright import chat, graders, life, models, work
from tunewright import recipe as recipes
from tunewright.data import prepare
from tunewright.evaluate import compare, measure, metrics, report
from tunewright.generate import LocalCompleter
from tunewright.models import ModelRef
from tunewright.run import Run
from tunewright.testing import tiny_model
from tunewright.tracking import Tracker

SOURCE = "def grade(sample, item):\n    return len(sample['output_text']) / 10\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_model(tmp_path_factory.mktemp("methods") / "tiny")


def evaluated(folder: Path, base: Path, rows: list[dict[str, Any]], **sections: Any) -> Run:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given: dict[str, Any] = {"name": "t", "model": str(base), "tracking": {"enabled": False}}
    given |= {"data": {"train": str(path), "split": {"test": 0.4}}, "evaluate": {"bootstrap": 200}}
    run = life.start(recipes.loads(yaml.safe_dump(given | sections)), folder / "runs", resume=False)
    life.advance(run, until="check")
    work.prepare(run)
    work.train(run)
    measure.evaluate(run, Tracker(run))
    return run


@pytest.fixture(scope="module")
def preferring(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    rows = [
        {"prompt": f"say {number}", "chosen": "lovely" + " great" * (number % 3), "rejected": "awful poor"}
        for number in range(24)
    ]
    train = {"method": "full", "learning_rate": 2e-3, "batch_size": 4, "epochs": 3, "dpo": {"beta": 0.3}}
    return evaluated(tmp_path_factory.mktemp("preferring"), base, rows, task="preference", train=train)


@pytest.fixture(scope="module")
def rewarded(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    rows = [{"prompt": f"say {number}", "want": "e"} for number in range(20)]
    parts = {
        "has": {"type": "string_check", "reference": "{{ item.want }}", "operation": "like"},
        "long": {"type": "python", "source": SOURCE},
    }
    train = {"method": "full", "learning_rate": 1e-2, "batch_size": 8, "max_steps": 6}
    train["grpo"] = {"num_generations": 4, "max_completion_length": 5}
    grader = {"type": "multi", "graders": parts, "calculate_output": "has + 0.5 * long"}
    return evaluated(tmp_path_factory.mktemp("rewarded"), base, rows, task="reward", train=train, grader=grader)


def answers(run: Run) -> dict[str, pd.DataFrame]:
    whole = pd.read_parquet(run.predictions_file)
    return {str(name): rows.reset_index(drop=True) for name, rows in whole.groupby("model")}


def test_every_number_about_pairs_can_be_had_from_the_rows(preferring: Run) -> None:
    body, rows = preferring.manifest("evaluate"), answers(preferring)
    tuned, base = rows["tuned"], rows["base"]
    margin = 0.3 * ((tuned["chosen_logp"] - base["chosen_logp"]) - (tuned["rejected_logp"] - base["rejected_logp"]))
    assert np.allclose(margin, tuned["reward_margin"])
    assert (base["reward_margin"] == 0).all()
    found = body["models"]["tuned"]
    assert found["reward_margin"] == pytest.approx(margin.mean())
    assert found["reward_accuracy"] == pytest.approx((margin > 0).mean())
    assert "reward_accuracy" not in body["models"]["base"]
    for name, frame in rows.items():
        ranked = (frame["chosen_logp"] > frame["rejected_logp"]).mean()
        assert body["models"][name]["preference_accuracy"] == pytest.approx(ranked)
        loss = -frame["chosen_logp"].sum() / frame["chosen_tokens"].sum()
        assert body["models"][name]["loss"] == pytest.approx(loss)
    comparison = body["comparison"]
    assert comparison["metric"] == "reward_margin"
    assert comparison["difference"] == pytest.approx(margin.mean())
    assert comparison["p_value"] == compare.permutation(margin, seed=42)
    statistic = lambda chosen: float(margin.to_numpy()[chosen].mean())  # noqa: E731
    assert comparison["interval"] == pytest.approx(compare.interval(statistic, len(margin), resamples=200, seed=42))
    assert comparison["verdict"] == "better"


def test_log_probabilities_are_those_of_the_models(preferring: Run, base: Path) -> None:
    tokenizer = models.load_tokenizer(ModelRef.from_dict(preferring.resolved()["model"]))
    equipment = chat.equip(tokenizer)
    for name, folder in (("tuned", preferring.trained("full")), ("base", base)):
        completer = LocalCompleter(models.load_folder(folder), tokenizer, equipment)
        frame = answers(preferring)[name]
        for example, row in zip(prepare.examples(preferring, "test"), frame.to_dict("records"), strict=True):
            assert (row["id"], row["label"], row["rejected"]) == (example.id, example.answer, example.rejected)
            one, other = chat.render_pair(tokenizer, example).renderings()
            ((loss, count),) = completer.losses([one])
            assert (row["chosen_logp"], row["chosen_tokens"]) == (pytest.approx(-loss, abs=1e-4), count)
            ((loss, count),) = completer.losses([other])
            assert (row["rejected_logp"], row["rejected_tokens"]) == (pytest.approx(-loss, abs=1e-4), count)


def test_every_number_about_rewards_can_be_had_from_the_rows(rewarded: Run) -> None:
    body, rows = rewarded.manifest("evaluate"), answers(rewarded)
    for name, frame in rows.items():
        for row in frame.to_dict("records"):
            assert row["reward.has"] == float("e" in row["prediction"])
            assert row["reward.long"] == len(row["prediction"]) / 10
            assert row["reward"] == row["reward.has"] + 0.5 * row["reward.long"]
        assert body["models"][name]["reward"] == pytest.approx(frame["reward"].mean())
        assert body["models"][name]["reward.has"] == pytest.approx(frame["reward.has"].mean())
    between = rows["tuned"]["reward"] - rows["base"]["reward"]
    assert body["comparison"]["difference"] == pytest.approx(between.mean())
    assert body["comparison"]["p_value"] == compare.permutation(between, seed=42)


def test_answers_are_greedy_and_as_long_as_in_training(rewarded: Run, base: Path) -> None:
    tokenizer = models.load_tokenizer(ModelRef.from_dict(rewarded.resolved()["model"]))
    completer = LocalCompleter(models.load_folder(base), tokenizer, chat.equip(tokenizer))
    prompts = [chat.render_prompt(tokenizer, one.prompt) for one in prepare.examples(rewarded, "test")]
    said = completer.generate(prompts, max_new_tokens=5)
    assert said == answers(rewarded)["base"]["prediction"].tolist()


def test_the_pages_say_what_was_learnt(preferring: Run, rewarded: Run) -> None:
    page = preferring.report_page.read_text()
    for words in ("Better than the base", "reward margin", "Preference accuracy", "Worse", "awful poor", "nats"):
        assert words in page
    page = rewarded.report_page.read_text()
    assert "training reward" in page
    assert "training loss" not in page
    assert report.render_markdown(rewarded.manifest("evaluate")).count("reward") > 3


def test_a_margin_that_grew_while_the_better_answers_sank_is_said(preferring: Run) -> None:
    body = preferring.manifest("evaluate")
    words = "became less probable"
    sunk = json.loads(json.dumps(body))
    sunk["models"]["tuned"]["loss"] = sunk["models"]["base"]["loss"] + 0.5
    assert words in report.render_html(sunk)
    risen = json.loads(json.dumps(body))
    risen["models"]["tuned"]["loss"] = risen["models"]["base"]["loss"] - 0.5
    assert words not in report.render_html(risen)


PAIRS = st.lists(st.tuples(st.floats(-500, 0), st.floats(-500, 0)), min_size=1, max_size=8)


@given(pairs=PAIRS, beta=st.floats(0.01, 2))
def test_the_bases_own_margins_are_0_and_a_shift_of_both_answers_changes_nothing(
    pairs: list[tuple[float, float]], beta: float
) -> None:
    assert metrics.margins(pairs, pairs, beta) == [0.0] * len(pairs)
    shifted = [(chosen - 3, rejected - 3) for chosen, rejected in pairs]
    assert metrics.margins(shifted, pairs, beta) == pytest.approx([0.0] * len(pairs), abs=1e-9)
    moved = [(chosen + 2, rejected - 1) for chosen, rejected in pairs]
    assert metrics.margins(moved, pairs, beta) == pytest.approx([3 * beta] * len(pairs))


def test_a_tie_counts_one_half() -> None:
    assert metrics.prefers([(-1.0, -2.0), (-2.0, -1.0), (-1.0, -1.0)]) == [1.0, 0.0, 0.5]


def test_graders_of_evaluation_are_those_of_training(rewarded: Run) -> None:
    spec = rewarded.recipe().grader
    assert spec is not None
    frame = answers(rewarded)["tuned"]
    examples = prepare.examples(rewarded, "test")
    with graders.opened(spec) as grading:
        given = [
            graders.Answer(text, one.item or {}, one.source)
            for text, one in zip(frame["prediction"], examples, strict=True)
        ]
        assert [one.score for one in grading.score(given)] == frame["reward"].tolist()
