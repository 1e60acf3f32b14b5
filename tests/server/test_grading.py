"""Graders are tried out by OpenAI's client as a reinforcement job would use them."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from server_running import Running

CHECK = {
    "type": "string_check",
    "name": "same",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.answer }}",
    "operation": "eq",
}
LIKE = {
    "type": "text_similarity",
    "name": "near",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.answer }}",
    "evaluation_metric": "fuzzy_match",
}
BOTH = {
    "type": "multi",
    "name": "both",
    "graders": {"same": CHECK, "near": LIKE},
    "calculate_output": "0.5 * same + 0.5 * near",
}
PYTHON = {"type": "python", "name": "own", "source": "def grade(sample, item):\n    return 1 / item['by']\n"}


def run(served: Running, grader: Any, sample: str, item: dict[str, Any]) -> Any:
    return served.client().fine_tuning.alpha.graders.run(grader=grader, model_sample=sample, item=item)


def failed(found: Any) -> dict[str, Any]:
    return {name: said for name, said in found.metadata.errors.to_dict().items() if said}


def test_what_an_answer_is_given(served: Running) -> None:
    for sample, reward in (("lovely", 1.0), ("awful", 0.0)):
        found = run(served, CHECK, sample, {"answer": "lovely"})
        assert (found.reward, found.sub_rewards, failed(found)) == (reward, {}, {})
        assert (found.metadata.name, found.metadata.type) == ("same", "string_check")
        assert found.metadata.execution_time > 0
    both = run(served, BOTH, "lovelx", {"answer": "lovely"})
    assert both.sub_rewards["same"] == 0
    assert 0.5 < both.sub_rewards["near"] < 1  # type: ignore[operator]
    assert both.reward == pytest.approx(both.sub_rewards["near"] / 2)  # type: ignore[operator]
    assert both.metadata.scores == both.sub_rewards


def test_a_grader_that_fails_gives_nothing_and_says_why(served: Running) -> None:
    found = run(served, CHECK, "lovely", {"other": "lovely"})
    assert found.reward == 0
    assert set(failed(found)) == {"other_error", "other_error_details"}
    assert "answer" in failed(found)["other_error_details"]


def test_a_grader_in_python_runs_where_the_operator_lets_it(served: Running) -> None:
    graders = served.client().fine_tuning.alpha.graders
    for ask in (
        lambda: graders.validate(grader=PYTHON),  # type: ignore[arg-type]
        lambda: run(served, PYTHON, "x", {"by": 4}),
    ):
        with pytest.raises(openai.BadRequestError, match="--python-graders") as refused:
            ask()
        assert (refused.value.param, refused.value.code) == ("grader", "unsupported_grader")
    object.__setattr__(served.server.settings, "python_graders", True)
    assert run(served, PYTHON, "x", {"by": 4}).reward == 0.25
    found = run(served, PYTHON, "x", {"by": 0})
    assert found.reward == 0
    assert found.metadata.errors.python_grader_runtime_error
    assert "ZeroDivisionError" in found.metadata.errors.python_grader_runtime_error_details


def test_a_judge_that_cannot_be_asked_is_said(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    judge = {"type": "score_model", "name": "j", "model": "m", "input": [{"role": "user", "content": "good?"}]}
    found = run(served, judge, "x", {})
    assert found.metadata.errors.api_model_grader_server_error
    assert "OPENAI_API_KEY" in found.metadata.errors.api_model_grader_server_error_details


def test_what_is_no_grader(served: Running) -> None:
    graders = served.client().fine_tuning.alpha.graders
    assert graders.validate(grader=BOTH).grader.to_dict()["calculate_output"] == BOTH["calculate_output"]  # type: ignore[arg-type, union-attr]
    for broken in (CHECK | {"operation": "almost"}, BOTH | {"calculate_output": "same +"}, {"type": "guess"}, {}):
        with pytest.raises(openai.BadRequestError) as refused:
            graders.validate(grader=broken)  # type: ignore[arg-type]
        assert str(refused.value.param).startswith("grader"), broken
    with pytest.raises(openai.PermissionDeniedError):
        served.client(served.inference_key).fine_tuning.alpha.graders.validate(grader=CHECK)  # type: ignore[arg-type]
