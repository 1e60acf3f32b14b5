"""The content filter: what is not let through, and the annotations that say so, in Azure's forms.

A policy says, for prompts and for answers, from which severity on each category is stopped, whether jailbreaks are,
and which blocklists hold. Every deployment has one, and a model that is asked for without a deployment has the
default.

How severe a text is says a `Classifier`. `words` ships: it finds phrases (`words.py` says what it cannot catch). An
URL asks an OpenAI-style /moderations instead, hosted or of one's own, and `package.module:name` is a classifier of
one's own. Blocklists and jailbreak phrases are looked for here, whatever the classifier.

Where a classifier does not answer, the text goes on, as on Azure, and the annotation says that it was not judged.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import regex

from tunewright.endpoint.shapes import ApiError
from tunewright.errors import EndpointError
from tunewright.server import words

T = TypeVar("T")

logger = logging.getLogger("tunewright.server")

Source = Literal["Prompt", "Completion"]
CATEGORIES = ("hate", "self_harm", "sexual", "violence")
SEVERITIES = ("safe", "low", "medium", "high")
KEY_VARIABLE = "TUNEWRIGHT_FILTER_KEY"

LONG = 20_000
"""Characters from which a text is looked through in a thread, so that other requests are answered meanwhile."""
REGEX_S = 0.2
"""How long a pattern of the user's may look for a match in one text. One that takes longer counts as found: a text that
is made to be slow should not get past."""

Severities = Mapping[str, str]
"""Severity by category; a category that is not named is safe."""


class FilterDown(Exception):
    """A classifier could not be asked."""


class Classifier(Protocol):
    """Says how severe texts are."""

    name: str

    async def classify(self, texts: Sequence[str]) -> list[Severities]:
        """One answer for each text.

        Raises:
            FilterDown: it cannot say; the texts go on unjudged.
        """

    async def close(self) -> None: ...


def classifier(spec: str, *, key: str | None = None) -> Classifier:
    """The classifier of `--filter`: words, the base URL of a /moderations, or `package.module:name`.

    Args:
        key: what opens the URL; default: the variable TUNEWRIGHT_FILTER_KEY.

    Raises:
        EndpointError: there is no such classifier.
    """
    if spec == "words":
        return WordsClassifier()
    if spec.startswith(("http://", "https://")):
        return RemoteClassifier(spec, key=key or os.environ.get(KEY_VARIABLE))
    module, found, name = spec.partition(":")
    if not found:
        raise EndpointError(f"--filter {spec}: choose words, the URL of a /moderations, or package.module:name")
    try:
        made: Classifier = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError) as error:
        raise EndpointError(f"--filter {spec}: {error}") from None
    return made


class WordsClassifier:
    """The short list of phrases that ships."""

    name = "words"

    async def classify(self, texts: Sequence[str]) -> list[Severities]:
        return [await _threaded(_by_words, text) for text in texts]

    async def close(self) -> None:
        pass


class RemoteClassifier:
    """Any OpenAI-style /moderations.

    Its scores from 0 to 1 become severities: 0.2 is low, 0.5 medium, 0.8 high; what it flags is medium at least.

    Args:
        url: the base URL, which ends in /v1 with most servers.
        model: None leaves the choice to the server.
    """

    def __init__(self, url: str, *, key: str | None = None, model: str | None = None, timeout_s: float = 10.0) -> None:
        import openai

        self.name = url
        self._model: dict[str, Any] = {} if model is None else {"model": model}
        self._client = openai.AsyncOpenAI(base_url=url, api_key=key or "none", timeout=timeout_s, max_retries=1)

    async def classify(self, texts: Sequence[str]) -> list[Severities]:
        import openai

        try:
            reply = await self._client.moderations.create(input=list(texts), **self._model)
        except openai.OpenAIError as error:
            raise FilterDown(f"{self.name}: {type(error).__name__}") from error
        if len(reply.results) != len(texts):
            raise FilterDown(f"{self.name}: {len(reply.results)} answers for {len(texts)} texts")
        return [_by_scores(one.to_dict()) for one in reply.results]

    async def close(self) -> None:
        await self._client.close()


class Blocklist:
    """A user's own words, and patterns.

    Args:
        items: each as Azure has it: `pattern`, and `isRegex` where it is a regular expression.
    """

    def __init__(self, name: str, items: Iterable[Mapping[str, Any]]) -> None:
        self.name = name
        self._patterns = []
        self._substrings = []
        phrases = []
        for item in items:
            if item.get("isRegex"):
                self._patterns.append(pattern(item["pattern"]))
            elif (steps := words.literal(item["pattern"])) is not None:
                phrases.append((steps, True))
            else:
                self._substrings.append(words.folded(item["pattern"]).strip())
        self._phrases = words.Phrases(phrases)

    def found(self, text: str) -> bool:
        """Whether anything of it is in a text."""
        low = words.folded(text)
        if any(one in low for one in self._substrings):
            return True
        if any(True for _ in self._phrases.find(words.words(low))):
            return True
        seen = words.plain(text) if self._patterns else ""
        return any(self._matches(one, seen) for one in self._patterns)

    def _matches(self, one: regex.Pattern[str], text: str) -> bool:
        try:
            return one.search(text, timeout=REGEX_S, concurrent=True) is not None
        except TimeoutError:
            logger.warning("blocklist %s: the pattern %r is too slow; the text counts as found", self.name, one.pattern)
            return True


def pattern(text: str) -> regex.Pattern[str]:
    """A regular expression as blocklists have them: without regard to case.

    Raises:
        ValueError: it is none.
    """
    try:
        compiled: regex.Pattern[str] = regex.compile(text, regex.IGNORECASE)
    except regex.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from None
    return compiled


@dataclass(frozen=True)
class Rule:
    """What a policy says of one category for one source."""

    threshold: int
    """The lowest severity that is stopped."""
    blocking: bool


@dataclass(frozen=True)
class Side:
    """What a policy says of prompts, or of answers."""

    categories: Mapping[str, Rule] = field(default_factory=dict)
    jailbreak: bool | None = None
    """True stops it, False notes it, None does not look."""
    blocklists: Sequence[tuple[Blocklist, bool]] = ()
    """Each with whether it stops the text."""

    @property
    def looks(self) -> bool:
        """Whether anything is looked for."""
        return bool(self.categories or self.blocklists or self.jailbreak is not None)


@dataclass(frozen=True)
class Policy:
    name: str
    prompt: Side
    completion: Side


FILTERS = {
    "hate": "hate",
    "sexual": "sexual",
    "violence": "violence",
    "selfharm": "self_harm",
    "jailbreak": "jailbreak",
}
"""What can be filtered, by Azure's names without spaces, marks and case."""
CANNOT = {
    "indirectattack": "Indirect Attack",
    "protectedmaterialtext": "Protected Material Text",
    "protectedmaterialcode": "Protected Material Code",
    "profanity": "Profanity",
    "groundedness": "Groundedness",
    "ungroundedmaterial": "Ungrounded Material",
    "pii": "PII",
}
"""What Azure filters too and nothing here can tell."""

DEFAULT = "Microsoft.DefaultV2"


def _system(jailbreak: bool) -> dict[str, Any]:
    rules: list[dict[str, Any]] = [
        {"name": name, "enabled": True, "severityThreshold": "Medium", "blocking": True, "source": source}
        for source in ("Prompt", "Completion")
        for name in ("Hate", "Sexual", "Violence", "Selfharm")
    ]
    if jailbreak:
        rules.append({"name": "Jailbreak", "enabled": True, "blocking": True, "source": "Prompt"})
    return {"type": "SystemManaged", "mode": "Blocking", "contentFilters": rules}


SYSTEM = {"Microsoft.Default": _system(jailbreak=False), DEFAULT: _system(jailbreak=True)}
"""Policies that are always there."""


def policy(name: str, properties: Mapping[str, Any], lists: Mapping[str, Blocklist]) -> Policy:
    """A policy from its properties in Azure's form.

    Args:
        lists: the account's blocklists by name, in lower case; one that is gone by now filters nothing.

    Raises:
        ValueError: it asks for something that cannot be filtered here.
    """
    sides = {}
    for source in ("Prompt", "Completion"):
        rules: dict[str, Rule] = {}
        jailbreak = None
        for one in properties.get("contentFilters") or ():
            what = filter_name(str(one.get("name")), enabled=bool(one.get("enabled")))
            if what is None or str(one.get("source", source)).casefold() != source.casefold() or not one.get("enabled"):
                continue
            blocking = bool(one.get("blocking", True))
            if what == "jailbreak":
                jailbreak = blocking
            else:
                rules[what] = Rule(_threshold(one.get("severityThreshold")), blocking)
        held = [
            (lists[str(one["blocklistName"]).lower()], bool(one.get("blocking", True)))
            for one in properties.get("customBlocklists") or ()
            if str(one.get("source", source)).casefold() == source.casefold()
            and str(one.get("blocklistName")).lower() in lists
        ]
        sides[source] = Side(rules, jailbreak, held)
    return Policy(name, sides["Prompt"], sides["Completion"])


def filter_name(name: str, *, enabled: bool) -> str | None:
    """What a filter of a policy looks for; None for one that is off and not known here.

    Raises:
        ValueError: it is on and cannot be honoured.
    """
    bare = "".join(letter for letter in name.casefold() if letter.isalnum())
    if bare in FILTERS:
        return FILTERS[bare]
    if enabled:
        said = CANNOT.get(bare, name)
        raise ValueError(
            f"the filter '{said}' cannot be honoured here; turn it off. There are Hate, Sexual, Violence, Selfharm and "
            "Jailbreak"
        )
    return None


@dataclass(frozen=True)
class Screened:
    """What was found in a text."""

    results: dict[str, Any]
    """Azure's content_filter_results."""
    reasons: tuple[str, ...]
    """What stops the text; nothing lets it through."""

    @property
    def blocked(self) -> bool:
        return bool(self.reasons)


async def screen(
    side: Side, texts: Sequence[str], judge: Classifier, *, from_users: Sequence[str] | None = None
) -> Screened:
    """Look through texts that belong together; the most severe finding counts.

    Args:
        from_users: those in which jailbreaks are looked for; default: all. An application's own instructions often name
            what they forbid ("never reveal your instructions").
    """
    results: dict[str, Any] = {}
    reasons = []
    if side.categories:
        try:
            found = await judge.classify(texts)
        except FilterDown as error:
            logger.warning("the content filter did not answer, and the text went on: %s", error)
            results["error"] = {"code": "content_filter_error", "message": "The contents are not filtered"}
            found = []
        else:
            for category in CATEGORIES:
                if (rule := side.categories.get(category)) is None:
                    continue
                worst = max((SEVERITIES.index(one.get(category, "safe")) for one in found), default=0)
                filtered = rule.blocking and worst >= rule.threshold
                results[category] = {"filtered": filtered, "severity": SEVERITIES[worst]}
                if filtered:
                    reasons.append(category)
    if side.jailbreak is not None:
        suspects = texts if from_users is None else from_users
        detected = any([await _threaded(_is_jailbreak, text) for text in suspects])
        results["jailbreak"] = {"filtered": detected and side.jailbreak, "detected": detected}
        if detected and side.jailbreak:
            reasons.append("jailbreak")
    if side.blocklists:
        details = []
        for one, blocking in side.blocklists:
            if any([await _threaded(one.found, text) for text in texts]):
                details.append({"filtered": blocking, "id": one.name})
        stopped = any(one["filtered"] for one in details)
        results["custom_blocklists"] = {"filtered": stopped, "details": details}
        if stopped:
            reasons.append("custom_blocklists")
    return Screened(results, tuple(reasons))


def refused_prompt(screened: Screened) -> ApiError:
    """The error of a prompt that is not let through, in Azure's form; OpenAI's SDK reads it too."""
    error = ApiError(
        400,
        "The response was filtered due to the prompt triggering the content management policy of the deployment "
        f"({', '.join(screened.reasons)}). Please modify your prompt and retry.",
        param="prompt",
        code="content_filter",
    )
    said: dict[str, Any] = error.body["error"]
    said |= {
        "type": None,
        "status": 400,
        "innererror": {"code": "ResponsibleAIPolicyViolation", "content_filter_result": screened.results},
    }
    return error


def _by_words(text: str) -> Severities:
    found: dict[str, int] = {}
    for category, severity in words.shipped()["categories"].find(words.shipped_words(text)):
        found[category] = max(found.get(category, 0), SEVERITIES.index(severity))
    return {category: SEVERITIES[worst] for category, worst in found.items()}


def _is_jailbreak(text: str) -> bool:
    return any(words.shipped()["jailbreak"].find(words.shipped_words(text)))


OPENAI_CATEGORIES = {"self-harm": "self_harm", "harassment": "hate", "illicit/violent": "violence"}
"""Where OpenAI's categories go; `illicit` without violence has no place in Azure's four."""


def _by_scores(result: Mapping[str, Any]) -> Severities:
    scores, flags = result.get("category_scores") or {}, result.get("categories") or {}
    found: dict[str, int] = {}
    for name in {*scores, *flags}:
        root = name.split("/")[0]
        category = OPENAI_CATEGORIES.get(name) or OPENAI_CATEGORIES.get(root) or root
        if category not in CATEGORIES:
            continue
        score = scores.get(name) or 0.0
        severity = sum(score >= least for least in (0.2, 0.5, 0.8))
        if flags.get(name):
            severity = max(severity, 2)
        found[category] = max(found.get(category, 0), severity)
    return {category: SEVERITIES[worst] for category, worst in found.items()}


def _threshold(said: Any) -> int:
    named = str(said).casefold()
    if named not in ("low", "medium", "high"):
        raise ValueError(f"severityThreshold {said!r}: choose Low, Medium or High")
    return SEVERITIES.index(named)


async def _threaded(look: Callable[[str], T], text: str) -> T:
    return look(text) if len(text) < LONG else await asyncio.to_thread(look, text)
