"""What a base behind an API counts tokens by, as a tokenizer of Transformers, so that rows are counted, cut and
checked by the code that all rows go through.

tiktoken's encodings get the conversation's form that OpenAI's chat models count by (its cookbook, "How to count tokens
with tiktoken": three tokens and the role for each message). What is not covered: tools, whose form there is not public;
they are counted as their JSON.
"""

from __future__ import annotations

from typing import Any

from tunewright.errors import ModelError

START, SEPARATOR, END = "<|im_start|>", "<|im_sep|>", "<|im_end|>"
TEMPLATE = (
    "{%- if tools -%}{{- '" + START + "system" + SEPARATOR + "' -}}"
    "{%- for tool in tools -%}{{- tool | tojson -}}{%- endfor -%}{{- '" + END + "' -}}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '" + START + "' + message['role'] + '" + SEPARATOR + "' + message['content'] -}}"
    "{%- for call in message['tool_calls'] or [] -%}"
    "{{- {'name': call.function.name, 'arguments': call.function.arguments} | tojson -}}"
    "{%- endfor -%}"
    "{{- '" + END + "' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '" + START + "assistant" + SEPARATOR + "' -}}{%- endif -%}"
)


def encoding_for(base: str) -> str | None:
    """tiktoken's encoding for a base's name; None where it knows none."""
    from tiktoken.model import encoding_name_for_model

    try:
        return encoding_name_for_model(base)
    except KeyError:
        return None


def is_encoding(name: str) -> bool:
    """Whether it is one of tiktoken's encodings."""
    import tiktoken

    return name in tiktoken.list_encoding_names()


def tokenizer(encoding: str) -> Any:
    """A tokenizer for one of tiktoken's encodings.

    Raises:
        ModelError: its file is not here, and cannot be fetched from here.
    """
    import tiktoken

    try:
        return from_tiktoken(tiktoken.get_encoding(encoding))
    except Exception as error:  # requests' own, or a ValueError for a file that is another
        raise ModelError(
            f"backend.tokenizer: the encoding {encoding} cannot be fetched from here ({type(error).__name__}); put its "
            "file where TIKTOKEN_CACHE_DIR says, or name a tokenizer that is here"
        ) from error


def from_tiktoken(encoding: Any) -> Any:
    """An encoding of tiktoken as a fast tokenizer with the conversation's form."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            ranks: dict[bytes, int] = encoding._mergeable_ranks
            return ranks

    rust = Converter(pattern=encoding._pat_str, extra_special_tokens=[START, SEPARATOR, END]).converted()
    made = PreTrainedTokenizerFast(tokenizer_object=rust, eos_token=END)
    made.chat_template = TEMPLATE
    return made
