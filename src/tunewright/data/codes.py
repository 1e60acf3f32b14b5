"""Every kind of finding: what it means, and what to do about it. docs/checks.md is written from here."""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    means: str
    fix: str


CODES = {
    # --- a row that cannot be read ---
    "broken_json": Kind("the line (or the list) is not JSON", "mend the line; `--fix` leaves it out and says so"),
    "broken_csv": Kind(
        "the row has other columns than the header, or an open quote", "write a quote inside of quotes twice"
    ),
    "wrong_columns": Kind("more or fewer values than the header has columns", "put values with a separator in quotes"),
    "not_utf8": Kind("bytes that are not UTF-8", "save the file as UTF-8; `--fix` reads such a line as Windows-1252"),
    "not_an_object": Kind("the line is JSON, but no object with columns", "one JSON object in each line"),
    "half_character": Kind("one half of a character that takes two (`\\ud83d` alone)", "write the character whole"),
    "byte_order_mark": Kind(
        "the file begins with a byte-order mark; it is skipped here, and other tools read it as text",
        "save the file without; `--fix` does",
    ),
    # --- a row that is no example ---
    "missing_column": Kind("a column that the task needs is absent or null", "fill it, or name another in the recipe"),
    "wrong_type": Kind("a column holds another type than the others", "make it text"),
    "empty_text": Kind("the text is empty", "leave the row out"),
    "empty_label": Kind("the label is empty", "label the row or leave it out"),
    "empty_prompt": Kind("the prompt is empty", "leave the row out"),
    "empty_answer": Kind(
        "nothing to learn: the answer is empty, or every assistant message has weight 0", "leave the row out"
    ),
    "messages": Kind(
        "roles out of order, no assistant at the end, an unknown role, a call that is no call",
        "mend the conversation; `--fix` cuts off what stands behind the last assistant message",
    ),
    "tools": Kind("`tools` is not a list of functions with JSON schemas", "write them as OpenAI has them"),
    "unknown_label": Kind("a label that the training rows never show", "a typing error, or rows for it are missing"),
    "prompts_differ": Kind("the better and the worse answer answer different prompts", "pair answers to one prompt"),
    "same_answers": Kind("the better and the worse answer are the same", "leave the pair out"),
    # --- what becomes of it as tokens ---
    "over_length": Kind(
        "more tokens than `train.max_length`", "raise it, shorten the row, or choose with `data.over_length`"
    ),
    "answer_too_long": Kind("the answer alone has more tokens than `train.max_length`", "raise it or split the answer"),
    "template": Kind(
        "the model's chat template drops or changes a message", "use the roles that the template knows, or another base"
    ),
    "too_short": Kind("a text of one token: nothing to predict", "leave it out"),
    "nothing_to_learn": Kind("no token of the row has a loss", "see which turns the template writes"),
    "end_not_learnt": Kind(
        "the answer's end-of-turn token has no loss: the model would not learn to stop",
        "use a chat template that ends an assistant's turn with a token, or another base",
    ),
    "pad_is_end": Kind(
        "the pad token is the end of turn; here masks go by length, and other trainers mask the end away with it",
        "nothing here; elsewhere set another pad token",
    ),
    "special_token": Kind(
        "the text spells one of the tokenizer's special tokens, which is read as that token",
        "take it out, or write it differently",
    ),
    # --- what the row says ---
    "secret": Kind(
        "what looks like a key, a token or a password; a model repeats what it learnt", "revoke it and take it out"
    ),
    "personal_data": Kind(
        "what looks like an e-mail address, a telephone, card or account number", "take it out, or have a reason"
    ),
    "lost_characters": Kind(
        "replacement characters (U+FFFD) or text decoded with the wrong encoding (`Ã©`)",
        "export the data again as UTF-8",
    ),
    "control_characters": Kind("control or zero-width characters in the text", "take them out; `--fix` does"),
    "markup": Kind("HTML tags in the text", "strip them if users will not send any"),
    "label_in_text": Kind("the row's own label is written in its text", "take it out: users' texts will not have it"),
    "answer_repeats_prompt": Kind("the answer is the prompt", "leave the row out, unless copying is the task"),
    # --- rows among rows ---
    "duplicate": Kind("the same row again in the same split", "leave it out; `--fix` does"),
    "near_duplicate": Kind("nearly the text of an earlier training row", "fine if you meant to; else it weighs double"),
    "contradiction": Kind(
        "the same text with another label", "decide on one: the model cannot learn both, nor the test measure it"
    ),
    "several_answers": Kind("the same prompt with another answer", "fine if you meant to"),
    "seen_in_training": Kind(
        "a test row's prompt is a training row's: the test would measure memory",
        "take it out of training; `--fix` does",
    ),
    "near_training": Kind(
        "a test row's text is nearly a training row's", "look at both; take one out, or split by source"
    ),
    "asked_out": Kind("a row that `data.without` names", "nothing; it is left out"),
    "not_found": Kind(
        "`data.without` names rows that are not there (changed, or cut differently)",
        "see whether the list is of this data",
    ),
    # --- the whole ---
    "limit_not_reached": Kind("`data.limit` asks for more rows than there are", "nothing; all are used"),
    "few_rows": Kind("too few rows to learn from", "50 to 100 good ones are a beginning"),
    "few_test_rows": Kind(
        "the test set is so small that only a large difference can be shown", "hold out more rows, or gather some"
    ),
    "rare_label": Kind("a label with few training rows", "gather more, or join it to another"),
    "untested_label": Kind("a label without a test row", "hold out some, or the verdict says nothing about it"),
    "imbalance": Kind("one label has nearly all rows", "gather others; see F1 rather than accuracy"),
    "labels_share_first_token": Kind(
        "label words begin with the same token; whole labels are scored here, and tools that look at the first token "
        "alone cannot tell them apart",
        "nothing here; elsewhere choose other words",
    ),
    "telling_word": Kind(
        "a word stands in nearly all rows of one label and in no others: a leak, or an easy task",
        "see whether users' texts will have it",
    ),
    "one_answer": Kind("most rows have the same answer", "gather others: always saying it would score well"),
    "lengths_differ": Kind(
        "the test rows are much longer or shorter than the training rows", "hold out rows of the same kind"
    ),
    # --- with --for openai ---
    "api_rows": Kind("OpenAI and Azure OpenAI take no file with fewer than 10 rows", "gather more"),
    "api_tokens": Kind("more tokens than an example may have there", "shorten the row: the API would cut it"),
    "api_tools": Kind("more tools, or other names of tools, than the API takes", "names of letters, digits, _ and -"),
    "api_name": Kind("a `name` that the API refuses", "letters, digits, _ and -, at most 64"),
    "api_task": Kind("a task that the API has no method for", "train here, or write it as a chat"),
    "api_size": Kind("a file of more than 512 MB", "split the file, or use the API's uploads"),
}
