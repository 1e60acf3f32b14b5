"""Secrets and personal data in a text, by their forms. What is found is named by its kind and never repeated.

A form is no proof: a number that looks like a card's passes its check digit one time in ten by chance. Names, addresses
and whatever else has no form are not found here.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

HINTS = re.compile(
    r"@|\d\.\d{1,3}\.\d|\d[\d ().-]{6,}\d|[A-Z]{2}\d{2}|-----BEGIN|AKIA|ASIA"
    r"|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|sk-|AIza|eyJ|hf_"
    r"|dapi|://[^\s/]*:|(?i:passw|secret|api[ _-]?key|token)"
)
"""One of these stands in every text that any form is found in: most texts are done with here."""


@dataclass(frozen=True)
class Form:
    """Something that has a recognisable form."""

    code: str
    """secret or personal_data."""
    what: str
    pattern: re.Pattern[str]
    is_one: Callable[[str], bool] = lambda _: True


def found(text: str) -> Iterator[Form]:
    """The forms that a text holds, each once."""
    if HINTS.search(text) is None:
        return
    for form in FORMS:
        if any(form.is_one(one.group()) for one in form.pattern.finditer(text)):
            yield form


def _is_card(given: str) -> bool:
    """Whether digits end in the check digit of ISO/IEC 7812 (Luhn's)."""
    digits = [int(sign) for sign in given if sign.isdigit()]
    if not 13 <= len(digits) <= 19 or len(set(digits)) < 2:
        return False
    doubled = [2 * digit - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(digits[::-2]) + sum(doubled)) % 10 == 0


def _is_iban(given: str) -> bool:
    """Whether an account number has the check digits of ISO 13616."""
    plain = given.replace(" ", "")
    return 15 <= len(plain) <= 34 and int("".join(str(int(sign, 36)) for sign in plain[4:] + plain[:4])) % 97 == 1


def _is_public_address(given: str) -> bool:
    try:
        return ipaddress.ip_address(given).is_global
    except ValueError:
        return False


def _is_phone(given: str) -> bool:
    return 8 <= sum(sign.isdigit() for sign in given) <= 15


def _secret(what: str, pattern: str) -> Form:
    return Form("secret", what, re.compile(pattern))


def _personal(what: str, pattern: str, is_one: Callable[[str], bool] = lambda _: True) -> Form:
    return Form("personal_data", what, re.compile(pattern), is_one)


FORMS = (
    _secret("a private key", r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"),
    _secret("an AWS access key", r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    _secret("a GitHub token", r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{60,})"),
    _secret("a GitLab token", r"\bglpat-[A-Za-z0-9_-]{20}"),
    _secret("a Slack token", r"\bxox[abprs]-[A-Za-z0-9-]{10,}"),
    _secret("an OpenAI-style key", r"\bsk-(?:[a-z]+-)*[A-Za-z0-9_-]{20,}"),
    _secret("a Google API key", r"\bAIza[A-Za-z0-9_-]{35}"),
    _secret("a Hugging Face token", r"\bhf_[A-Za-z0-9]{30,}"),
    _secret("a Databricks token", r"\bdapi[a-f0-9]{32}\b"),
    _secret("a JSON web token", r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
    _secret("a URL with a password", r"\b[a-z][a-z0-9+.-]{0,30}://[^\s/:@]{1,200}:[^\s/@]{3,200}@"),
    _secret(
        "a password or key that is given a value",
        r"(?i)\b(?:password|passwd|secret|api[ _-]?key|access[ _-]?token)\b[\"']?\s*[:=]\s*[\"']?"
        r"(?=[^\s\"']{0,200}\d)(?=[^\s\"']{0,200}[a-z])[^\s\"',;]{8,200}",
    ),
    _personal("an e-mail address", r"\b[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,9}[A-Za-z]{2,24}\b"),
    _personal(
        "a payment card's number",
        r"(?<![\d-])(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{1,7}|\d{4}([ -])\d{6}\2\d{5})(?![\d-])",
        _is_card,
    ),
    _personal("an IBAN", r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b", _is_iban),
    _personal("a US social security number", r"(?<![\d-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])"),
    _personal(
        "a telephone number",
        r"(?<![\w.-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d(?:[ .-]?\d){6,12}|\(\d{3}\) ?\d{3}[ .-]\d{4}"
        r"|\d{3}[.-]\d{3}[.-]\d{4})(?![\w-])",
        _is_phone,
    ),
    _personal("a public IP address", r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\d)", _is_public_address),
)
