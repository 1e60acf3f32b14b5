"""What an answer is worth: OpenAI's graders, for training by reward and for evaluation.

`opened(spec)` gives a `Grading`; `grading.score(answers)` a number for each answer. A grader that fails says where and
why (`GraderError`); it never gives 0 instead.

What is covered: string_check, text_similarity, python, score_model, label_model, multi.
What is not covered: a sandbox. The source of a python grader runs in a process of its own, so that it can be ended
when it takes too long or falls, but with the rights, the files and the network of whoever runs Tunewright.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import math
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tunewright import expressions
from tunewright.errors import GraderError
from tunewright.recipe import Judge, LabelModel, Multi, PythonGrader, ScoreModel, Section, StringCheck, TextSimilarity

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
"""A word for ROUGE, BLEU and GLEU: a run of letters and digits of any script; Chinese and Japanese characters one by
one. The rouge_score library's own words are those of a-z and 0-9 alone; these are the same there."""
START_S = 30.0
"""Seconds that a python grader's process has to start and read its source."""
AT_ONCE = 8
"""Questions to a judging model at the same time."""
TRIES = 3
"""How often a judging model is asked again where what it says is no score."""
SHOWN = 200
"""Characters of a text in an error."""


@dataclass(frozen=True)
class Answer:
    """What is graded."""

    text: str
    item: Mapping[str, Any]
    """The row: what templates call `item`."""
    where: str
    """file:line of the row, for errors."""

    @property
    def sample(self) -> dict[str, Any]:
        """As OpenAI hands it to a python grader."""
        said = {"role": "assistant", "content": self.text}
        return {"output_text": self.text, "choices": [{"index": 0, "message": said}]}


@dataclass(frozen=True)
class Grade:
    """The score of one answer; of `multi`, also those of its graders."""

    score: float
    parts: dict[str, float] = field(default_factory=dict)


class Grading:
    """A grader at work. Close it, or use `opened`."""

    def __init__(self, spec: Section) -> None:
        self.spec = spec
        self._open: list[Callable[[], None]] = []
        graders = spec.graders if isinstance(spec, Multi) else {"": spec}
        self._graders = {name: self._begin(each) for name, each in graders.items()}

    def score(self, answers: Sequence[Answer]) -> list[Grade]:
        """A finite number for each answer.

        Raises:
            GraderError: naming the row, the grader and what went wrong.
        """
        found = {name: _finite(name, grade(answers), answers) for name, grade in self._graders.items()}
        if not isinstance(self.spec, Multi):
            return [Grade(score) for score in found[""]]
        grades = []
        for row, answer in enumerate(answers):
            parts = {name: scores[row] for name, scores in found.items()}
            try:
                grades.append(Grade(expressions.compute(self.spec.calculate_output, parts), parts))
            except ArithmeticError as error:
                raise GraderError(
                    f"{answer.where}: the grader's calculate_output ({self.spec.calculate_output}) has no value where "
                    f"{', '.join(f'{name} = {value:g}' for name, value in parts.items())}: {error}"
                ) from None
        return grades

    def close(self) -> None:
        """End the processes and connections of the graders."""
        while self._open:
            self._open.pop()()

    def _begin(self, spec: Section) -> Callable[[Sequence[Answer]], list[float]]:
        match spec:
            case StringCheck():
                return lambda answers: [_string_check(spec, answer) for answer in answers]
            case TextSimilarity():
                return lambda answers: [_similarity(spec, answer) for answer in answers]
            case PythonGrader():
                function = _Function(spec)
                self._open.append(function.close)
                return lambda answers: [function(answer) for answer in answers]
            case ScoreModel() | LabelModel():
                judge = _Judge(spec)
                self._open.append(judge.close)
                return judge
        raise AssertionError(spec)


@contextlib.contextmanager
def opened(spec: Section) -> Iterator[Grading]:
    """A grader at work, closed at the end."""
    grading = Grading(spec)
    try:
        yield grading
    finally:
        grading.close()


def _finite(name: str, scores: list[float], answers: Sequence[Answer]) -> list[float]:
    for score, answer in zip(scores, answers, strict=True):
        if not math.isfinite(score):
            raise GraderError(f"{answer.where}: the grader {name} gives {score}, which is no score".replace("  ", " "))
    return scores


def _filled(text: str, answer: Answer) -> str:
    try:
        return expressions.fill(text, answer.item, answer.sample)
    except LookupError as error:
        columns = ", ".join(map(repr, answer.item)) or "nothing"
        raise GraderError(
            f"{answer.where}: the grader's template {text[:SHOWN]!r}: {error}; the row has {columns}"
        ) from None


# --- text ---


def _string_check(spec: StringCheck, answer: Answer) -> float:
    said, reference = _filled(spec.input, answer), _filled(spec.reference, answer)
    match spec.operation:
        case "eq":
            return float(said == reference)
        case "ne":
            return float(said != reference)
        case "like":
            return float(reference in said)
        case "ilike":
            return float(reference.casefold() in said.casefold())


def _similarity(spec: TextSimilarity, answer: Answer) -> float:
    said, reference = _filled(spec.input, answer), _filled(spec.reference, answer)
    metric = spec.evaluation_metric
    if metric == "fuzzy_match":
        # Twice the matching characters over all characters (Ratcliff and Obershelp, 1988).
        return difflib.SequenceMatcher(None, reference, said, autojunk=False).ratio()
    if metric in ("bleu", "gleu"):
        return _ngrams(metric, said, reference)
    return rouge(said, reference, "rougeL" if metric == "rouge_l" else metric.replace("_", ""))


def rouge(said: str, reference: str, kind: str) -> float:
    """F-measure of one ROUGE (Lin, 2004; the rouge_score library), such as rouge2 or rougeL."""
    return float(_rouge_scorer(kind).score(reference, said)[kind].fmeasure)


@functools.cache
def _rouge_scorer(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], tokenizer=Words())


class Words:
    """What the rouge_score library takes as a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return WORD.findall(text.lower())


def _ngrams(metric: str, said: str, reference: str) -> float:
    """BLEU (Papineni et al., 2002; add-one for n-grams above 1, as Lin and Och, 2004) or GLEU (Wu et al., 2016)."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from nltk.translate.gleu_score import sentence_gleu

    words, expected = Words().tokenize(said), Words().tokenize(reference)
    if not words or not expected:
        return float(words == expected)
    if metric == "gleu":
        return float(sentence_gleu([expected], words))
    return float(sentence_bleu([expected], words, smoothing_function=SmoothingFunction().method2))


# --- a function ---

CHILD = """
import json, os, signal, sys, traceback
answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
os.dup2(2, 1)  # what the grader prints goes to the stage's log
questions = sys.stdin
def ask():
    line = questions.readline()
    if not line:
        sys.exit(0)
    return json.loads(line)
def say(**what):
    answers.write(json.dumps(what) + "\\n")
def said(error):
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<grader>"]
    return type(error).__name__ + ": " + str(error) + (f" (line {own[-1].lineno} of its source)" if own else "")
begun = ask()
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the stage, which ends this process
names = {"__name__": "grader"}
try:
    exec(compile(begun["source"], "<grader>", "exec"), names)
    say(ready=True)
except BaseException as error:
    say(error=said(error))
    sys.exit(0)
while True:
    asked = ask()
    signal.setitimer(signal.ITIMER_REAL, begun["seconds"])  # it ends itself, also where nobody waits any more
    try:
        score = names["grade"](asked["sample"], asked["item"])
        if not isinstance(score, (bool, int, float)) and hasattr(score, "item"):
            score = score.item()
        if not isinstance(score, (bool, int, float)):
            raise TypeError(f"grade gave {score!r}, which is no number")
        answer = {"score": repr(float(score))}
    except BaseException as error:
        answer = {"error": said(error)}
    signal.setitimer(signal.ITIMER_REAL, 0)
    say(**answer)
"""
"""What the process of a python grader runs: a line of JSON in, a line of JSON out."""


class _Function:
    """The `grade` of a python grader, in a process of its own. It is started when first asked, and lives on."""

    def __init__(self, spec: PythonGrader) -> None:
        self.spec = spec
        self.process: subprocess.Popen[bytes] | None = None
        self.waiting = b""

    def __call__(self, answer: Answer) -> float:
        if self.process is None:
            self._start(answer)
        reply = self._ask({"sample": answer.sample, "item": answer.item}, self.spec.timeout_s, answer)
        if "error" in reply:
            raise GraderError(
                f"{answer.where}: the python grader raised {reply['error']}; it was given the answer "
                f"{answer.text[:SHOWN]!r}"
            )
        return float(reply["score"])

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):  # what was not sent has nobody to read it
                        pipe.close()
            self.process, self.waiting = None, b""

    def _start(self, answer: Answer) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        # The child's own alarm comes a little later than ours, so that it is us who say what happened.
        begun = {"source": self.spec.source, "seconds": self.spec.timeout_s + 1}
        reply = self._ask(begun, START_S, answer)
        if "error" in reply:
            self.close()
            raise GraderError(f"the python grader's source fails where it is read: {reply['error']}")

    def _ask(self, what: dict[str, Any], seconds: float, answer: Answer) -> dict[str, Any]:
        assert self.process is not None
        try:
            self._send((json.dumps(what) + "\n").encode())
            line = self._line(seconds)
        except TimeoutError:
            self.close()
            raise GraderError(
                f"{answer.where}: the python grader took more than {seconds:g} s for the answer "
                f"{answer.text[:SHOWN]!r}; make it faster, or set the grader's timeout_s"
            ) from None
        except OSError:
            line = None
        if line is None:
            code = self.process.wait()
            self.close()
            raise GraderError(
                f"{answer.where}: the python grader's process ended with {code}; it was given {answer.text[:SHOWN]!r}"
            )
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _send(self, line: bytes) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        rest = memoryview(line)
        while rest:
            rest = rest[self.process.stdin.write(rest) or 0 :]

    def _line(self, seconds: float) -> bytes | None:
        """The next line that the process writes; None where it ended.

        Raises:
            TimeoutError: none came in time.
        """
        assert self.process is not None
        assert self.process.stdout is not None
        until = time.monotonic() + seconds
        while b"\n" not in self.waiting:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError
            more = os.read(self.process.stdout.fileno(), 65536)
            if not more:
                return None
            self.waiting += more
        line, _, self.waiting = self.waiting.partition(b"\n")
        return line


# --- another model ---


class _Judge:
    """Another model, asked by the openai SDK; several questions at once."""

    def __init__(self, spec: ScoreModel | LabelModel) -> None:
        import openai

        self.spec = spec
        key = os.environ.get(spec.api_key_env)
        if key is None:
            raise GraderError(
                f"grader: the environment variable {spec.api_key_env} with the key for {spec.model} is not set; set "
                "it, or name another one in api_key_env"
            )
        self.client = openai.OpenAI(base_url=spec.base_url, api_key=key, timeout=spec.timeout_s)

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
            return list(pool.map(self._judge, answers))

    def close(self) -> None:
        self.client.close()

    def _judge(self, answer: Answer) -> float:
        import openai

        spec: Judge = self.spec
        messages: Any = [{"role": "system", "content": self._instruction()}]
        messages += [{"role": one.role, "content": _filled(one.content, answer)} for one in spec.input]
        said = ""
        for _ in range(TRIES):
            try:
                reply = self.client.chat.completions.create(
                    model=spec.model, messages=messages, **spec.sampling_params.model_dump(exclude_none=True)
                )
            except openai.OpenAIError as error:
                where = spec.base_url or "OpenAI"
                raise GraderError(f"{answer.where}: the judging model {spec.model} at {where}: {error}") from error
            said = reply.choices[0].message.content or ""
            score = self._read(said)
            if score is not None:
                return score
        raise GraderError(
            f"{answer.where}: the judging model {spec.model} was asked {TRIES} times and said {said[:SHOWN]!r}, which "
            f"is not {self._wanted()}"
        )

    def _instruction(self) -> str:
        return f"Answer with {self._wanted()} and nothing else."

    def _wanted(self) -> str:
        if isinstance(self.spec, LabelModel):
            return f"one of {', '.join(self.spec.labels)}"
        low, high = self.spec.range
        return f"one number from {low:g} to {high:g}"

    def _read(self, said: str) -> float | None:
        """The score in what the model says; None where there is none."""
        if isinstance(self.spec, LabelModel):
            plain = str(_result(said)).strip()
            label = next((one for one in (plain, plain.strip("\"'.")) if one in self.spec.labels), None)
            return None if label is None else float(label in self.spec.passing_labels)
        value = _result(said)
        try:
            score = float(value)
        except (TypeError, ValueError):
            return None
        low, high = self.spec.range
        return score if low <= score <= high else None


def _result(said: str) -> Any:
    """What a judge answers; OpenAI's own answer with an object that has it as `result`."""
    try:
        value = json.loads(said)
    except ValueError:
        value = None
    return value.get("result") if isinstance(value, dict) else said.strip()
