"""A grader gives what its form promises, and where it cannot, it says which row and why instead of giving 0."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright import graders, recipe
from tunewright.errors import GraderError, RecipeError
from tunewright.graders import Answer, Grade
from tunewright.recipe import Section


def spec(**given: Any) -> Section:
    made = recipe.Recipe.model_validate(
        {"name": "a", "model": "m", "task": "reward", "data": {"train": "a.jsonl"}, "grader": given}
    ).grader
    assert made is not None
    return made


def grade(text: str, item: dict[str, Any] | None = None, **given: Any) -> Grade:
    with graders.opened(spec(**given)) as grading:
        (found,) = grading.score([Answer(text, item or {}, "rows.jsonl:7")])
        return found


def failure(text: str, item: dict[str, Any] | None = None, **given: Any) -> str:
    with pytest.raises(GraderError) as failed:
        grade(text, item, **given)
    return str(failed.value)


# --- text ---


@pytest.mark.parametrize(
    ("operation", "said", "reference", "score"),
    [
        ("eq", "yes", "yes", 1),
        ("eq", "Yes", "yes", 0),
        ("eq", "yes ", "yes", 0),
        ("ne", "no", "yes", 1),
        ("ne", "yes", "yes", 0),
        ("like", "oh yes!", "yes", 1),
        ("like", "oh Yes!", "yes", 0),
        ("like", "yes", "oh yes!", 0),
        ("ilike", "oh YES!", "yes", 1),
        ("ilike", "STRASSE", "stra\u00dfe", 1),
        ("ilike", "no", "yes", 0),
    ],
)
def test_a_string_check_compares_as_asked(operation: str, said: str, reference: str, score: float) -> None:
    check = {"type": "string_check", "reference": "{{ item.answer }}", "operation": operation}
    assert grade(said, {"answer": reference}, **check).score == score


@pytest.mark.parametrize("metric", ["fuzzy_match", "bleu", "gleu", "rouge_1", "rouge_2", "rouge_5", "rouge_l"])
@given(said=st.text(max_size=30), reference=st.text(max_size=30))
def test_similarity_is_a_share_and_1_for_the_same_words(metric: str, said: str, reference: str) -> None:
    similar = {"type": "text_similarity", "evaluation_metric": metric, "reference": "{{ item.r }}"}
    assert 0 <= grade(said, {"r": reference}, **similar).score <= 1 + 1e-9
    long = reference + " one two three four five"
    assert grade(long, {"r": long}, **similar).score == pytest.approx(1)


@pytest.mark.parametrize(
    ("metric", "score"),
    [("rouge_1", 0.75), ("rouge_2", 1 / 3), ("rouge_l", 0.75), ("gleu", 0.4), ("fuzzy_match", 2 * 15 / 36)],
)
def test_similarity_by_hand(metric: str, score: float) -> None:
    """the quick brown fox, the quick red fox: 3 of 4 words, 1 of 3 pairs, 4 of 10 n-grams up to 4."""
    similar = {"type": "text_similarity", "evaluation_metric": metric, "reference": "the quick brown fox"}
    assert grade("the quick red fox", **similar).score == pytest.approx(score, abs=0.02)


def test_similarity_knows_words_of_every_script() -> None:
    similar = {"type": "text_similarity", "evaluation_metric": "rouge_1", "reference": "\u043c\u043e\u0441\u0442"}
    assert grade("\u043c\u043e\u0441\u0442", **similar).score == 1


def test_a_field_that_the_row_lacks_is_named() -> None:
    said = failure("x", {"question": 1}, type="string_check", reference="{{ item.answer }}", operation="eq")
    assert said.startswith("rows.jsonl:7: the grader's template '{{ item.answer }}': there is no item.answer")
    assert "'question'" in said


# --- a function ---


def python(source: str, **more: Any) -> dict[str, Any]:
    return {"type": "python", "source": source, **more}


def test_a_function_sees_the_answer_and_the_row_and_may_print() -> None:
    source = (
        "import math\n"
        "calls = []\n"
        "print('read')\n"
        "def grade(sample, item):\n"
        "    print('called')\n"
        "    calls.append(1)\n"
        "    same = sample['choices'][0]['message']['content'] == sample['output_text']\n"
        "    return len(calls) * 100 + len(sample['output_text']) * item['factor'] + 0.5 * same\n"
    )
    with graders.opened(spec(**python(source))) as grading:
        answers = [Answer(text, {"factor": 2}, "f:1") for text in ("a", "b\u00fc\n", "")]
        assert [one.score for one in grading.score(answers)] == [102.5, 206.5, 300.5], "one process for all"


def test_a_truth_value_is_a_score() -> None:
    assert grade("x", **python("def grade(sample, item):\n    return True")) == Grade(1.0)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return item['nothing']", "raised KeyError: 'nothing' (line 2 of its source)"),
        ("return None", "grade gave None, which is no number"),
        ("return 'good'", "grade gave 'good', which is no number"),
        ("return float('nan')", "gives nan, which is no score"),
        ("import os; os._exit(3)", "process ended with 3"),
        ("raise SystemExit", "raised SystemExit"),
        ("return grade(sample, item)", "RecursionError"),
    ],
)
def test_a_function_that_fails_says_where_and_why(body: str, said: str) -> None:
    found = failure("the answer", **python(f"def grade(sample, item):\n    {body}"))
    assert found.startswith("rows.jsonl:7: ")
    assert said in found


def test_a_function_that_takes_too_long_is_ended() -> None:
    began = time.monotonic()
    found = failure("x", **python("def grade(sample, item):\n    while True: pass", timeout_s=0.3))
    assert "took more than 0.3 s for the answer 'x'" in found
    assert time.monotonic() - began < 20
    assert not _children()


def test_a_source_that_cannot_be_read_says_so_where_it_is_read() -> None:
    found = failure("x", **python("import nothing_of_that_name\ndef grade(sample, item):\n    return 1"))
    assert "fails where it is read: ModuleNotFoundError" in found
    assert "(line 1 of its source)" in found


def test_a_process_ends_with_its_grader() -> None:
    with graders.opened(spec(**python("def grade(sample, item):\n    return 1"))) as grading:
        grading.score([Answer("x", {}, "f:1")])
        assert len(_children()) == 1
    assert not _children()


def _children() -> list[psutil.Process]:
    mine = psutil.Process(os.getpid()).children()
    return [child for child in mine if "-c" in child.cmdline() and "<grader>" in " ".join(child.cmdline())]


# --- another model ---

Reply = Callable[[dict[str, Any]], str]


@pytest.fixture
def judge() -> Iterator[Any]:
    """An endpoint on loopback that says what `reply` says; keeps what it was asked."""

    class Judge:
        reply: Reply = staticmethod(lambda asked: "1")
        asked: list[dict[str, Any]] = []  # noqa: RUF012
        keys: list[str] = []  # noqa: RUF012
        url = ""

    state = Judge()
    state.asked, state.keys = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            state.asked.append(asked)
            state.keys.append(self.headers["authorization"])
            said = {"role": "assistant", "content": state.reply(asked)}
            body = json.dumps(
                {
                    "id": "1",
                    "object": "chat.completion",
                    "created": 0,
                    "model": asked["model"],
                    "choices": [{"index": 0, "message": said, "finish_reason": "stop"}],
                }
            ).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    return "JUDGE_KEY"


def scoring(judge: Any, key: str, **more: Any) -> dict[str, Any]:
    asks = [{"role": "user", "content": "{{ item.q }}: {{ sample.output_text }}"}]
    return {"model": "big", "input": asks, "base_url": judge.url, "api_key_env": key, **more}


def test_another_model_gives_its_number(judge: Any, key: str) -> None:
    judge.reply = lambda asked: str(len(asked["messages"][-1]["content"]))
    given = scoring(judge, key, type="score_model", range=[0, 50], sampling_params={"temperature": 0, "seed": 3})
    with graders.opened(spec(**given)) as grading:
        answers = [Answer("a" * length, {"q": "q"}, "f:1") for length in range(20)]
        assert [one.score for one in grading.score(answers)] == [3.0 + length for length in range(20)]
    asked = judge.asked[0]
    assert (asked["model"], asked["temperature"], asked["seed"]) == ("big", 0, 3)
    assert "one number from 0 to 50" in asked["messages"][0]["content"]
    assert set(judge.keys) == {"Bearer secret"}


@pytest.mark.parametrize(("said", "score"), [("0.5", 0.5), (" 1\n", 1.0), ('{"steps": [], "result": 0.25}', 0.25)])
def test_a_number_is_read_as_it_is_or_as_openais_result(judge: Any, key: str, said: str, score: float) -> None:
    judge.reply = lambda asked: said
    assert grade("a", {"q": "q"}, **scoring(judge, key, type="score_model")).score == score


@pytest.mark.parametrize("said", ["good", "", "2", "-0.1", "nan", "[1]", '{"score": 1}', "null"])
def test_a_model_that_says_no_score_is_asked_again_and_then_named(judge: Any, key: str, said: str) -> None:
    judge.reply = lambda asked: said
    found = failure("a", {"q": "q"}, **scoring(judge, key, type="score_model"))
    assert found.startswith("rows.jsonl:7: the judging model big was asked 3 times")
    assert "not one number from 0 to 1" in found
    assert len(judge.asked) == 3


def test_a_label_is_worth_1_where_it_passes(judge: Any, key: str) -> None:
    labels = {"type": "label_model", "labels": ["good", "fair", "bad"], "passing_labels": ["good", "fair"]}
    for said, score in (("good", 1.0), ('"fair".', 1.0), ("bad", 0.0)):
        judge.reply = lambda asked, said=said: said
        assert grade("a", {"q": "q"}, **scoring(judge, key, **labels)).score == score
    judge.reply = lambda asked: "excellent"
    assert "not one of good, fair, bad" in failure("a", {"q": "q"}, **scoring(judge, key, **labels))


def test_a_label_may_end_as_a_sentence_does(judge: Any, key: str) -> None:
    labels = {"type": "label_model", "labels": ["N.A.", "yes"], "passing_labels": ["N.A."]}
    for said, score in (("N.A.", 1.0), ('{"result": "N.A."}', 1.0), ("yes.", 0.0), ('{"result": "yes"}', 0.0)):
        judge.reply = lambda asked, said=said: said
        assert grade("a", {"q": "q"}, **scoring(judge, key, **labels)).score == score


def test_a_key_that_is_not_set_and_an_endpoint_that_is_not_there_are_named(key: str) -> None:
    class Nowhere:
        url = "http://127.0.0.1:9/v1"

    found = failure("a", {"q": "q"}, **scoring(Nowhere, key, type="score_model"))
    assert found.startswith("rows.jsonl:7: the judging model big at http://127.0.0.1:9/v1: ")
    given = scoring(Nowhere, "NO_SUCH_KEY", type="score_model")
    assert "environment variable NO_SUCH_KEY" in failure("a", {"q": "q"}, **given)


# --- several ---


def test_a_formula_weighs_several_and_keeps_their_scores() -> None:
    parts = {
        "right": {"type": "string_check", "reference": "{{ item.a }}", "operation": "eq"},
        "near": {"type": "text_similarity", "reference": "{{ item.a }}", "evaluation_metric": "rouge_l"},
    }
    many = {"type": "multi", "graders": parts, "calculate_output": "0.75 * right + 0.25 * near"}
    assert grade("a b", {"a": "a b"}, **many) == Grade(1.0, {"right": 1.0, "near": 1.0})
    assert grade("a c", {"a": "a b"}, **many) == Grade(0.125, {"right": 0.0, "near": 0.5})


def test_a_formula_without_a_value_names_the_row_and_the_scores() -> None:
    parts = {"same": {"type": "string_check", "reference": "x", "operation": "eq"}}
    found = failure("y", type="multi", graders=parts, calculate_output="1 / same")
    assert found.startswith("rows.jsonl:7: the grader's calculate_output (1 / same) has no value where same = 0")


# --- in a recipe ---

HEAD = "name: a\nmodel: m\ntask: reward\ndata: {train: a.jsonl}\n"


@pytest.mark.parametrize(
    ("grader", "said"),
    [
        ("", "grader is missing: task: reward needs one, of type string_check"),
        ("grader: {type: sring_check}", "recipe:5: `grader.type`: a grader is of type string_check"),
        ("grader: {reference: x}", "recipe:5: `grader.type`: a grader is of type"),
        ("grader: 5", "recipe:5: `grader`: Input should be a valid dictionary"),
        (
            "grader:\n  type: string_check\n  refrence: x\n  operation: eq",
            "recipe:7: unknown key `refrence` in `grader`; did you mean `reference`?",
        ),
        (
            "grader:\n  type: string_check\n  reference: '{{ itm.x }}'\n  operation: eq",
            "recipe:7: `grader.reference`: {{ itm.x }} is neither item.COLUMN",
        ),
        (
            "grader:\n  type: string_check\n  reference: x\n  operation: lke",
            "recipe:8: `grader.operation`: Input should be 'eq', 'ne', 'like' or 'ilike'; did you mean 'like'?",
        ),
        ("grader: {type: text_similarity, reference: x, evaluation_metric: cosine}", "cosine needs a model of embedd"),
        ("grader: {type: text_similarity, reference: x, evaluation_metric: meteor}", "meteor needs WordNet"),
        ("grader: {type: python, source: 'x = ('}", "source is not Python (its line 1)"),
        ("grader: {type: python, source: 'x = 1'}", "source defines no function grade(sample, item)"),
        ("grader: {type: python, source: 'def grade(a): return 1'}", "grade takes 1 arguments; it is called with two"),
        ("grader: {type: score_model, model: m, input: []}", "input is empty"),
        (
            "grader: {type: score_model, model: m, range: [1, 0], input: [{role: user, content: x}]}",
            "range goes from 1 to 0",
        ),
        (
            "grader: {type: label_model, model: m, labels: [a, b], passing_labels: [c], "
            "input: [{role: user, content: x}]}",
            "passing_labels: 'c' is not among labels",
        ),
        (
            "grader:\n  type: multi\n  calculate_output: a + b\n  graders:\n"
            "    a: {type: string_check, reference: x, operation: eq}",
            "recipe:7: `grader`: calculate_output: 'b' is none of the graders; there is a",
        ),
        (
            "grader:\n  type: multi\n  calculate_output: a\n  graders:\n"
            "    a: {type: string_check, reference: x, operation: eq}\n"
            "    b: {type: string_check, reference: x, operation: eq}",
            "does not use the grader b",
        ),
        (
            "grader:\n  type: multi\n  calculate_output: a\n  graders:\n"
            "    a: {type: multi, graders: {}, calculate_output: a}",
            "recipe:9: `grader.graders.a.type`: a grader is of type string_check, text_similarity, python",
        ),
        (
            "grader:\n  type: multi\n  calculate_output: min\n  graders:\n"
            "    min: {type: string_check, reference: x, operation: eq}",
            "min cannot be a grader's name",
        ),
    ],
)
def test_a_grader_that_cannot_work_is_refused_when_the_recipe_is_read(grader: str, said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        recipe.loads(HEAD + grader + "\n")
    assert said in str(refused.value)


def test_a_grader_round_trips() -> None:
    text = HEAD + (
        "grader:\n  type: multi\n  calculate_output: 0.5 * a + b\n  graders:\n"
        "    a: {type: string_check, reference: '{{ item.x }}', operation: eq}\n"
        "    b: {type: python, source: 'def grade(sample, item): return 1'}\n"
    )
    made = recipe.loads(text)
    assert recipe.loads(recipe.dump(made)) == made
    assert made.grader is not None
    assert recipe.item_places(made.grader) == [("x",)]
