"""Answers held to a grammar: which tokens may come next, for JSON of a schema and for calls of functions.

The masks are llguidance's. What it cannot compile is refused with its reason, before anything is generated.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from tunewright.chat import Equipment
from tunewright.errors import DataError

ANY_OBJECT = {"type": "object"}
LAYOUT: Any = {"whitespace_pattern": r"[ ]|\n[ ]{0,24}"}
"""Between the parts of a JSON value: nothing, a space, or a new line with its indent. More would let a model write
blanks for ever."""


class Guides:
    """Compiles grammars for one tokenizer. Threads may share it."""

    def __init__(self, tokenizer: Any, equipment: Equipment) -> None:
        self._tokenizer = tokenizer
        self._equipment = equipment
        self._vocabulary: Any = None
        self._lock = threading.Lock()

    def compile(self, grammar: str) -> Guide:
        """A grammar in llguidance's form (see `of_schema`, `tools.grammar`).

        Raises:
            DataError: it cannot be compiled; the message is the reason alone.
        """
        from llguidance import LLMatcher

        matcher = LLMatcher(self._known(), grammar, log_level=0)
        if matcher.is_error():
            raise DataError(_reason(matcher.get_error()))
        return Guide(matcher)

    def _known(self) -> Any:
        """The vocabulary as llguidance wants it; making it takes up to a second."""
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._vocabulary is None:
                ends = [self._equipment.end_of_turn_id, *self._equipment.stop_ids]
                try:
                    self._vocabulary = from_tokenizer(self._tokenizer, eos_token=list(dict.fromkeys(ends)))
                except ValueError:
                    raise DataError("the tokenizer is not of the tokenizers library, which this needs") from None
            return self._vocabulary


class Guide:
    """A compiled grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def fresh(self) -> Held:
        """For one answer from its beginning."""
        return Held(self._matcher.deep_copy())


class Held:
    """A `generate.Shape`: lets through the tokens that the grammar allows next."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self._heard = 0

    def __call__(self, logits_V: Any, said: Sequence[int]) -> Any:
        import numpy as np
        import torch

        for token in said[self._heard :]:
            self._matcher.consume_token(token)
        self._heard = len(said)
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        if self._matcher.is_error():
            raise RuntimeError(f"llguidance: {self._matcher.get_error()}")
        allowed_V = torch.zeros(len(logits_V), dtype=torch.bool)  # models may have more rows than there are tokens
        size = min(len(bits), len(logits_V))
        allowed_V[:size] = torch.from_numpy(bits[:size].astype(bool))
        return logits_V.masked_fill(~allowed_V, float("-inf"))


def of_schema(schema: Mapping[str, Any]) -> str:
    """The grammar of a JSON Schema.

    Raises:
        DataError: it is no JSON.
    """
    from llguidance import LLMatcher

    try:
        return str(LLMatcher.grammar_from_json_schema(dict(schema), overrides=LAYOUT))
    except ValueError as error:
        raise DataError(_reason(str(error))) from None


def _reason(said: str) -> str:
    """llguidance's message in one line."""
    return " ".join(said.split()).removeprefix("error: ")[:500].rstrip(".")
