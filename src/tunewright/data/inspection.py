"""A long look at the rows that a run would use: what they say, how they stand to one another, and the whole of them.

`prepare` says which rows are used and why the others are not; what is found here leaves every row where it is. In
memory are some 200 bytes for each row; what is found, and the texts that are compared, are on disk.
"""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tunewright import chat
from tunewright.chat import Equipment, Example
from tunewright.data import patterns, sources
from tunewright.data.account import Places, hashed
from tunewright.data.findings import Finding, Findings
from tunewright.data.similar import Similar, plain
from tunewright.recipe import Recipe

SPLITS = ("train", "validation", "test")
LEAKS = ("seen_in_training", "near_training")
"""Kinds of findings that name a test row whose text is known from training."""
EXCERPT = 160
"""Characters of a row that a finding shows."""
WORDS_ROWS = 20_000
"""Training rows whose words are counted."""
TELLING = (20, 0.9, 0.99)
"""A word tells a label that has so many rows, where it stands in this share of them and this share of the rows with the
word has the label."""
FEW_ROWS, FEW_TEST_ROWS, RARE_ROWS = 50, 100, 5
IMBALANCE = 0.9
ONE_ANSWER = 0.5
LONGER = 2.0
"""Between the medians of the test rows' and the training rows' lengths."""
WRONG_ENCODING = re.compile("\ufffd|Ã[\x80-\xbf¡-¿]|Â[\x80-\xbf¡-¿]|â€[\x80-\xbf™œ\u009d“”˜¦]")
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u200e\u200f\u2060\ufeff]")
MARKUP = re.compile(r"</?(?:br|p|div|span|b|i|em|strong|a|ul|li|td|tr|table|h[1-6]|img|script)\b[^<>]*>", re.IGNORECASE)
LABEL_NAMES = "label|class|category|sentiment|intent|answer|target|topic"
API_TOKENS = 65_536
"""OpenAI's and Azure's limit of an example for gpt-4o and gpt-4.1 models."""
API_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
API_ROWS, API_TOOLS, API_BYTES = 10, 128, 512 * 2**20


class Inspector:
    """Takes the rows that are used, one by one, and says at the end what was found.

    Args:
        api: also hold the rows to the rules of OpenAI's and Azure OpenAI's fine-tuning API.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any, equipment: Equipment, *, api: bool = False) -> None:
        self.recipe = recipe
        self.equipment = equipment
        self.tokenizer = tokenizer
        self.api = api
        self.specials = _specials(tokenizer)
        self.findings = Findings([*((split, "rows") for split in SPLITS), "among", "near", "whole"])
        self.rows = _Rows()
        self.similar = Similar()
        self.known: dict[bool, dict[int, int]] = {False: {}, True: {}}
        """Held out or not -> the hash of a text -> its number among those that are compared."""
        self.lengths: dict[str, array[int]] = defaultdict(lambda: array("l"))
        self.labels: dict[str, Counter[str]] = defaultdict(Counter)
        self.words: dict[str, Counter[str]] = defaultdict(Counter)
        self.with_words: Counter[str] = Counter()
        """Rows of each label whose words were counted."""
        self.api_bytes: Counter[str] = Counter()

    def add(self, split: str, example: Example, rendering: chat.Rendering) -> None:
        """Look at a row that is used."""
        prompt = example.text if example.text is not None else "\n".join(one.content for one in example.prompt)
        asked = prompt if example.text is not None else _asked(example)
        answer = "" if example.text is not None else example.answer
        for code, severity, message, shown in self._of_row(example, prompt, answer, rendering):
            self._say((split, "rows"), code, severity, example.source, message, split, asked if shown else "")
        # A prompt that was cut down to nothing is compared with none.
        text = hashed(prompt if asked.strip() else example.source)
        said = hashed(f"{answer}\0{example.rejected or ''}{_besides(example)}")
        known = self.known[split == "test"]
        if text not in known:
            known[text] = self.similar.add(asked if asked.strip() else example.source, held_out=split == "test")
        self.rows.append(SPLITS.index(split), text, said, known[text], example.source)
        self.lengths[split].append(len(rendering.ids))
        if example.label is not None:
            self.labels[split][example.label] += 1
            if split == "train" and self.rows.count <= WORDS_ROWS:
                self.words[example.label].update(set(plain(asked).split()))
                self.with_words[example.label] += 1
        if self.api:
            self.api_bytes[split] += len(json.dumps([one.to_dict() for one in example.messages], ensure_ascii=False))

    def finish(self, splits: dict[str, dict[str, Any]]) -> Findings:
        """All that was found. `splits` is the account of `prepare.assemble`: for each split `source` and `used`."""
        self._among()
        self._near()
        for code, severity, where, message, split in self._of_whole(splits):
            self._say("whole", code, severity, where, message, split)
        return self.findings

    def trained_and_tested(self) -> list[str]:
        """Where the training rows stand whose text is a test row's."""
        tested = self.known[True]
        rows = zip(self.rows.split, self.rows.text, strict=True)
        train = SPLITS.index("train")
        return [self.rows.where[row] for row, (split, text) in enumerate(rows) if split == train and text in tested]

    def _say(
        self, section: Any, code: str, severity: str, where: str, message: str, split: str, text: str = ""
    ) -> None:
        shown = text[:EXCERPT] + ("..." if len(text) > EXCERPT else "")
        self.findings.add(section, Finding(code, severity, where, message, split, text=shown))

    def _of_row(
        self, example: Example, prompt: str, answer: str, rendering: chat.Rendering
    ) -> Iterator[tuple[str, str, str, bool]]:
        """Code, severity, a sentence, and whether the text may be shown."""
        whole = f"{prompt}\n{answer}\n{example.rejected or ''}"
        forms = list(patterns.found(whole))
        clean = not forms
        for form in forms:
            severity = "warning" if form.code == "secret" else "info"
            yield form.code, severity, f"holds what looks like {form.what}", False
        if (found := WRONG_ENCODING.search(whole)) is not None:
            lost = found.group() == "\ufffd"
            said = "replacement characters (U+FFFD)" if lost else f"text in a wrong encoding ({found.group()!r})"
            yield "lost_characters", "warning", said, clean
        if (found := CONTROL.search(whole)) is not None:
            yield "control_characters", "warning", f"an invisible character, U+{ord(found.group()):04X}", clean
        if (found := MARKUP.search(whole)) is not None:
            yield "markup", "info", f"HTML: {found.group()[:40]}", clean
        if self.specials is not None and (found := self.specials.search(whole)) is not None:
            yield "special_token", "warning", f"spells {found.group()!r}, which the model reads as a command", clean
        if example.label is not None and _tells(example.label, prompt):
            yield "label_in_text", "warning", f"its label, {example.label!r}, is written in the text", clean
        if len(example.messages) > 1 and len(answer) > 0 and answer.strip() == example.messages[-2].content.strip():
            yield "answer_repeats_prompt", "info", "the answer is the prompt, word for word", clean
        if example.text is None and example.item is None and not self._ends(rendering):
            yield "end_not_learnt", "warning", "an answer's end has no loss: the model would not learn to stop", clean
        if self.api:
            yield from ((*problem, clean) for problem in api_row(example, rendering))

    def _ends(self, rendering: chat.Rendering) -> bool:
        """Whether every stretch with a loss holds the token that ends a turn."""
        mask = np.concatenate(([False], np.asarray(rendering.mask, dtype=bool), [False]))
        begins, ends = np.flatnonzero(mask[1:] & ~mask[:-1]), np.flatnonzero(~mask[1:] & mask[:-1])
        stops = set(self.equipment.stop_ids)
        return all(
            not stops.isdisjoint(rendering.ids[begin:end])
            for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)
        )

    def _among(self) -> None:
        """The same row again; the same text with another label or answer."""
        rows = self.rows
        split, text, said = rows.arrays()
        order = np.lexsort((np.arange(rows.count), text))
        ends = np.flatnonzero(np.append(text[order][1:] != text[order][:-1], True)) + 1
        found: list[tuple[int, str, str, int]] = []
        for begin, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
            if end - begin > 1:
                found += self._of_group(order[begin:end].tolist(), split, said)
        for row, code, severity, other in sorted(found):
            name = SPLITS[split[row]]
            labelled = self.recipe.task == "classification"
            message = {
                "duplicate": f"the same row as {rows.where[other]}",
                "contradiction": f"the same text as {rows.where[other]}, with another label",
                "several_answers": f"the same prompt as {rows.where[other]}, with another answer",
            }[code if labelled or code == "duplicate" else "several_answers"]
            if self.recipe.task == "reward" and code != "duplicate":
                message = f"the same prompt as {rows.where[other]}, with other columns for the grader"
            self._say("among", code, severity, rows.where[row], message, name, self._text(row))

    def _of_group(self, group: list[int], split: Any, said: Any) -> Iterator[tuple[int, str, str, int]]:
        """Of rows with one text, each that repeats or contradicts an earlier one."""
        first: dict[tuple[int, int], int] = {}
        answered: dict[int, int] = {}
        other_code = "contradiction" if self.recipe.task == "classification" else "several_answers"
        for row in group:
            key = (int(split[row]), int(said[row]))
            if key in first:
                yield row, "duplicate", "warning", first[key]
                continue
            first[key] = row
            contradicted = next((other for answer, other in answered.items() if answer != key[1]), None)
            if contradicted is not None:
                yield row, other_code, "warning" if other_code == "contradiction" else "info", contradicted
            answered.setdefault(key[1], row)

    def _near(self) -> None:
        """Texts that nearly are others. Those of test rows that are training texts are `seen_in_training` already."""
        numbers = np.array(self.rows.number, dtype=np.int64)
        order = np.argsort(numbers, kind="stable")
        first = np.searchsorted(numbers[order], np.arange(len(self.similar) + 1))
        split_of, text_of, _ = self.rows.arrays()
        trained = np.isin(text_of, text_of[split_of == SPLITS.index("train")])
        for pair in self.similar.pairs():
            other = int(order[first[pair.near]])
            near = SPLITS[self.rows.split[other]]
            rows = order[first[pair.text] : first[pair.text + 1]].tolist()
            row, *again = rows
            split = SPLITS[self.rows.split[row]]
            if self.similar.held_out[pair.text]:
                if trained[row]:
                    continue
                code, severity = "near_training", "warning"
            else:
                code, severity, again = "near_duplicate", "info", []  # the others are duplicates already
            text = f"{self.similar.text(pair.text)[: EXCERPT // 2]} | {self.similar.text(pair.near)[: EXCERPT // 2]}"
            if any(patterns.found(text)):
                text = ""
            message = f"{pair.similarity:.0%} the text of {self.rows.where[other]} ({near})"
            for one in (row, *again):
                self._say("near", code, severity, self.rows.where[one], message, split, text)

    def _of_whole(self, splits: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, str, str, str]]:
        """Code, severity, where, a sentence, split."""
        where = {split: ", ".join(facts["source"]) for split, facts in splits.items()}
        for split, facts in splits.items():
            for name in getattr(self.recipe.data, split) or ():
                for path in sources.files(name, f"data.{split}") if sources.is_file(name) else ():
                    if _has_mark(path):
                        yield "byte_order_mark", "info", f"{sources.shown(path)}:1", "a byte-order mark, skipped", split
            if self.api:
                yield from self._api_split(split, where[split], facts)
        rows = splits["train"]["used"]
        if rows < FEW_ROWS:
            yield "few_rows", "warning", where["train"], f"{rows} rows are few to learn from", "train"
        if "test" in splits and (rows := splits["test"]["used"]) < FEW_TEST_ROWS:
            least = min(1.0, 1.96 * 0.5 * (2 / rows) ** 0.5)
            said = (
                f"with {rows} test rows a difference in accuracy of less than about {least:.0%} will mostly go unseen"
            )
            yield "few_test_rows", "info", where["test"], said, "test"
        if self.equipment.pad_id in self.equipment.stop_ids:
            said = f"the pad token is the end of turn ({self.equipment.end_of_turn}); masks here go by length"
            yield "pad_is_end", "info", self.recipe.model, said, "train"
        yield from self._of_labels(where)
        yield from self._of_answers(where)
        medians = {split: float(np.median(lengths)) for split, lengths in self.lengths.items()}
        if {"train", "test"} <= medians.keys():
            one, other = medians["train"], medians["test"]
            if max(one, other) > LONGER * min(one, other):
                said = f"the middle test row has {other:.0f} tokens, the middle training row {one:.0f}"
                yield "lengths_differ", "warning", where["test"], said, "test"

    def _of_labels(self, where: dict[str, str]) -> Iterator[tuple[str, str, str, str, str]]:
        counts = self.labels["train"]
        if not counts:
            return
        whole = sum(counts.values())
        (most, rows), *_ = counts.most_common()
        if len(counts) > 1 and rows / whole > IMBALANCE:
            yield "imbalance", "warning", where["train"], f"{most!r} has {rows} of {whole} rows", "train"
        for label, rows in sorted(counts.items()):
            if rows < RARE_ROWS and whole >= FEW_ROWS:
                yield "rare_label", "warning", where["train"], f"{label!r} has {rows} training rows", "train"
            if self.labels["test"] and not self.labels["test"][label]:
                yield "untested_label", "info", where["test"], f"{label!r} has no test row", "test"
        first: dict[int, list[str]] = defaultdict(list)
        for label in sorted(counts):
            first[chat.render_answer(self.tokenizer, self.equipment, label)[0]].append(label)
        for labels in first.values():
            if len(labels) > 1:
                shown = ", ".join(labels[:5]) + (f" and {len(labels) - 5} more" if len(labels) > 5 else "")
                said = f"{len(labels)} label words begin with the same token: {shown}"
                yield "labels_share_first_token", "info", where["train"], said, "train"
        yield from self._telling(where["train"])

    def _telling(self, where: str) -> Iterator[tuple[str, str, str, str, str]]:
        least_rows, least_share, least_told = TELLING
        everywhere: Counter[str] = Counter()
        for counts in self.words.values():
            everywhere.update(counts)
        for label, counts in sorted(self.words.items()):
            rows = self.with_words[label]
            if rows < least_rows or len(self.words) < 2:
                continue
            for word, count in counts.most_common(3):
                if count >= least_share * rows and count >= least_told * everywhere[word]:
                    rest = everywhere[word] - count
                    others = f"in {rest} of all others" if rest else "in no other label's"
                    said = f"{word!r} stands in {count} of {rows} rows of {label!r}, and {others}"
                    yield "telling_word", "warning", where, said, "train"

    def _of_answers(self, where: dict[str, str]) -> Iterator[tuple[str, str, str, str, str]]:
        split, _, said = self.rows.arrays()
        said = said[split == SPLITS.index("train")]
        if self.recipe.task != "chat" or len(said) < 2 * API_ROWS:
            return
        whole, rows = len(said), int(np.unique(said, return_counts=True)[1].max())
        if rows / whole > ONE_ANSWER:
            said = f"{rows} of {whole} rows have one and the same answer"
            yield "one_answer", "warning", where["train"], said, "train"

    def _api_split(self, split: str, where: str, facts: dict[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
        if split == "train" and facts["used"] < API_ROWS:
            yield "api_rows", "error", where, f"{facts['used']} rows; the API takes {API_ROWS} or more", split
        if self.api_bytes[split] > API_BYTES:
            yield "api_size", "error", where, f"about {self.api_bytes[split] / 2**20:.0f} MB; files end at 512", split
        if split == "train" and self.recipe.task == "pretraining":
            yield "api_task", "error", where, "the API trains on conversations, not on plain text", split

    def _text(self, row: int) -> str:
        text = self.similar.text(self.rows.number[row])
        return "" if any(patterns.found(text)) else text


class _Rows:
    """What is kept of each row: its split, what it asks and answers as hashes, its text's number, and its place."""

    def __init__(self) -> None:
        self.split, self.text, self.said, self.number = array("b"), array("Q"), array("Q"), array("q")
        self.where = Places()

    def append(self, split: int, text: int, said: int, number: int, where: str) -> None:
        self.split.append(split)
        self.text.append(text)
        self.said.append(said)
        self.number.append(number)
        self.where.append(where)

    @property
    def count(self) -> int:
        return len(self.split)

    def arrays(self) -> tuple[Any, Any, Any]:
        """Splits, texts and answers."""
        return (
            np.array(self.split, dtype=np.int8),
            np.array(self.text, dtype=np.uint64),
            np.array(self.said, dtype=np.uint64),
        )


def _asked(example: Example) -> str:
    """What is compared of a conversation: all before the answer but a system message, which many rows share."""
    asked = [one.content for one in example.prompt if one.role not in ("system", "developer")]
    return "\n".join(asked)


def _besides(example: Example) -> str:
    """What two rows of the same prompt and answer may still differ in, and a model learn from; mostly nothing."""
    earlier = [
        (place, message.weight, [(call.name, call.arguments) for call in message.tool_calls])
        for place, message in enumerate(example.prompt)
        if message.tool_calls or not message.weight
    ]
    told = [one for one in (earlier, example.tools, example.item) if one]
    return json.dumps(told, sort_keys=True, default=str) if told else ""


def _tells(label: str, text: str) -> bool:
    """Whether a text names its label as such: `label: good`, or `[good]`, `<good>`, `#good` at its beginning or end."""
    if label.casefold() not in text.casefold():
        return False
    word = re.escape(label)
    found = re.search(
        rf"\b(?:{LABEL_NAMES})\b[\"']?\s*[:=]\s*[\"'\[(]?{word}\b|^\s*[\[<#(]{word}[\]>)]?(?:\s|$)"
        rf"|(?:^|\s)[\[<#(]{word}[\]>)]?\s*$",
        text,
        re.IGNORECASE,
    )
    return found is not None


def _specials(tokenizer: Any) -> re.Pattern[str] | None:
    """The special tokens that a text could spell. Short ones such as `<s>` count too."""
    tokens = sorted(
        {str(token) for token in tokenizer.all_special_tokens if len(str(token)) > 2}, key=len, reverse=True
    )
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None


def _has_mark(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(sources.BOM)) == sources.BOM


def api_row(example: Example, rendering: chat.Rendering) -> Iterator[tuple[str, str, str]]:
    """What OpenAI's and Azure OpenAI's fine-tuning API would refuse in a row: code, severity, and a sentence."""
    if len(rendering.ids) > API_TOKENS:
        yield "api_tokens", "error", f"about {len(rendering.ids)} tokens; the API reads {API_TOKENS} of an example"
    if len(example.tools) > API_TOOLS:
        yield "api_tools", "error", f"{len(example.tools)} tools; the API takes {API_TOOLS}"
    for tool in example.tools:
        if not API_NAME.fullmatch(tool["function"]["name"]):
            yield "api_tools", "error", f"a tool's name is {tool['function']['name'][:80]!r}"
    for number, message in enumerate(example.messages, start=1):
        if message.name is not None and not API_NAME.fullmatch(message.name):
            yield "api_name", "error", f"message {number}: name {message.name[:80]!r}"
