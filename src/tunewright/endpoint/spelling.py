"""What one token id says, as text and as bytes: what a reply's logprobs name.

Decoding a token alone loses the space before it in some tokenizers, and a token may be a part of a character. So each
is decoded behind another one, and where that gives no text its bytes are read from the vocabulary.
"""

from __future__ import annotations

import re
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Speller:
    """Spells the tokens of one tokenizer; remembers those it has spelled."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchor: list[int] = tokenizer("a", add_special_tokens=False).input_ids
        self._anchor_text = self._decode(self._anchor)
        self._known: dict[int, tuple[str, list[int] | None]] = {}

    def spell(self, token: int) -> tuple[str, list[int] | None]:
        """Text and UTF-8 bytes of a token. For a part of a character the text is `bytes:\\xe2\\x82`, as OpenAI has it;
        the bytes are None where the vocabulary does not tell them."""
        if token not in self._known:
            self._known[token] = self._spell(token)
        return self._known[token]

    def _spell(self, token: int) -> tuple[str, list[int] | None]:
        added = self._tokenizer.added_tokens_decoder.get(token)
        if added is not None:
            return str(added.content), list(str(added.content).encode())
        text = self._decode([*self._anchor, token])
        if text.startswith(self._anchor_text) and "\N{REPLACEMENT CHARACTER}" not in text:
            text = text[len(self._anchor_text) :]
            return text, list(text.encode())
        entry: str = self._tokenizer.convert_ids_to_tokens(token) or ""
        if found := _BYTE_TOKEN.fullmatch(entry):
            raw = [int(found[1], 16)]
        elif entry and all(character in _BYTES for character in entry):
            raw = [_BYTES[character] for character in entry]
        else:
            return entry, None
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def _byte_alphabet() -> dict[str, int]:
    """How byte-level vocabularies write bytes: printable ones as themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_alphabet()
