"""Secrets in text: what must be looked for before a corpus is published.

A short list of forms that are secrets whenever they occur, and one rule for values that are assigned to names such as
`password`. Our own, since detect-secrets (1.5.0, of May 2024) knows no Hugging Face, Google or Anthropic token and its
settings are global to the process.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..outgoing import token_in


# Of each form: what may be shown, and what is secret.
_FORMS = {
    "private key": r"(-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----)"
    r"((?:(?!-----)[\s\S]){0,300}?[A-Za-z0-9+/]{40,100})",
    "AWS access key": r"\b((?:AKIA|ASIA|ABIA|ACCA))([A-Z2-7]{16})\b",
    "AWS secret key": r"(?i:(aws_?secret(?:_?access)?_?key[\"']?\s*[:=]\s*[\"']?))"
    r"([A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])",
    "GitHub token": r"(gh[pousr]_)([A-Za-z0-9]{36,255})(?![A-Za-z0-9])",
    "GitHub fine-grained token": r"(github_pat_)([A-Za-z0-9_]{82})",
    "GitLab token": r"(glpat-)([\w-]{20,200})",
    "Hugging Face token": r"(hf_|api_org_)([A-Za-z0-9]{34})(?![A-Za-z0-9])",
    "OpenAI key": r"(sk-(?:proj-|svcacct-|admin-)?)([\w-]{20,200}T3BlbkFJ[\w-]{20,200})",
    "OpenRouter key": r"(sk-or-v1-)([a-f0-9]{64})(?![A-Za-z0-9])",
    "Anthropic key": r"(sk-ant-[a-z]{3,8}\d\d-)([\w-]{80,200})",
    "Slack token": r"\b(xox[abeoprs]-)((?:\d{1,16}-){1,4}[A-Za-z0-9-]{16,100})",
    "Slack webhook": r"(https://hooks\.slack\.com/(?:services|workflows)/)([\w+/]{40,200})",
    "Google API key": r"\b(AIza)([\w-]{35})(?![\w-])",
    "Google OAuth secret": r"(GOCSPX-)([\w-]{28})(?![\w-])",
    "Stripe key": r"\b((?:sk|rk)_(?:live|prod|test)_)([A-Za-z0-9]{20,250})",
    "JSON web token": r"\b(eyJ)([\w-]{10,1000}\.eyJ[\w-]{10,4000}\.[\w-]{20,1000})",
    "PyPI token": r"\b(pypi-)(AgE(?:IcHlwaS5vcmc|NdGVzdC5weXBpLm9yZw)[\w-]{50,500})",
    "npm token": r"(npm_)([A-Za-z0-9]{36})(?![A-Za-z0-9])",
    "SendGrid key": r"\b(SG\.)([\w-]{22}\.[\w-]{43})(?![\w-])",
    "Telegram bot token": r"\b(\d{8,10}:)(AA[\w-]{33})(?![\w-])",
    "DigitalOcean token": r"(do[opr]_v1_)([a-f0-9]{64})(?![A-Za-z0-9])",
    "Azure storage key": r"(AccountKey=)([A-Za-z0-9+/]{86}==)",
}
# A token, and what has no quotes, has a digit before a letter, unlike `cache_v2`. A `PublicKeyToken` is no secret.
_ASSIGNED = {
    "password or key": r"(?i:((?:password|passwd|secret|api_?key|access_?key|(?:access|auth|bot)_?token|private_?key)"
    r"\w{0,16}[\"']?\]?\s*(?::\s*str\s*)?(?:=|:|=>)\s*[rbf]?[\"']))([^\s\"'\\]{12,200})(?=[\"'])",
    "token or password": r"(?i:((?:(?<!key)token|pwd)[\"']?\]?\s*(?::\s*str\s*)?(?:=|:|=>)\s*[rbf]?[\"']))"
    r"((?=\S*\d[A-Za-z])[\w+/=.!@#%^&*~-]{16,200})(?=[\"'])",
    "password in a settings file": r"(?m:^[ \t]*((?:export[ \t]+)?[A-Z0-9_]{0,40}"
    r"(?:PASSWORD|PASSWD|PWD|SECRET|KEY|TOKEN)=)((?=\S*\d[A-Za-z])[\w+/=!@#%^&*~-]{12,200})(?=[ \t]*\r?$))",
    "bearer token": r"\b([Bb]earer[ \t]+)([\w.~+/=-]{24,1000})(?![\w.~+/=-])",
    "password in an address": r"\b([a-z][a-z0-9+.-]{1,20}://[^\s/:@\"'<>]{0,64}:)([^\s/:@\"'<>]{8,100})(?=@[\w.-]+)",
}
# A form that begins with a word's beginning also begins behind an escape or a percent-encoded character.
_BEGIN = r"(?:\b|(?<=\\[abfnrtv0])|(?<=%[0-9A-Fa-f]{2}))"
_PATTERNS = {kind: re.compile(re.sub(r"^\\b", lambda _: _BEGIN, form)) for kind, form in (_FORMS | _ASSIGNED).items()}
_ENCODED = re.compile(r"%([0-9A-Fa-f]{2})|\\x([0-9A-Fa-f]{2})|\\u00([0-9A-Fa-f]{2})")
_PLACEHOLDER = re.compile(
    r"(?i)example|placeholder|your|change_?me|dummy|secret|passw|x{4,}|\*{3,}|\.{3}|1234|[<>{}$]"
)
_LEAST_BITS = 3.0  # a character; words and names have less than random letters and digits of the same length


@dataclass(frozen=True)
class Secret:
    """Where a secret stands (`row` from 0) and what it looks like: `shown` is the part that all of its `kind` share,
    and the number of characters that are kept back."""

    row: int
    column: str
    kind: str
    shown: str

    def __str__(self) -> str:
        return f"row {self.row}, `{self.column}`: {self.kind} {self.shown}"


def find_secrets(text: str) -> list[tuple[str, str, str]]:
    """Kind, public part and secret part of every secret in `text`.

    Example: a line `HF = "hf_<34 letters>"` gives `[("Hugging Face token", "hf_", "<34 letters>")]`.
    """
    secrets: list[tuple[str, str, str]] = []
    # `hf%5F...` and `hf\\x5f...` too.
    decoded = _ENCODED.sub(lambda match: chr(int(match[match.lastindex or 1], 16)), text)
    texts = [text] if decoded == text else [text, decoded]
    for kind, pattern in _PATTERNS.items():
        for match in (match for form in texts for match in pattern.finditer(form)):
            public, secret = match.groups()
            repeats = any(secret in other or other in secret for _, _, other in secrets)
            if not repeats and (_looks_random(secret) if kind in _ASSIGNED else "EXAMPLE" not in secret):
                secrets.append((kind, public, secret))
    return secrets


def _looks_random(value: str) -> bool:
    """Letters and digits, no placeholder, hardly any character twice."""
    if _PLACEHOLDER.search(value) or not (re.search(r"\d", value) and re.search(r"[A-Za-z]", value)):
        return False
    shares = [count / len(value) for count in Counter(value).values()]
    return -sum(share * math.log2(share) for share in shares) >= _LEAST_BITS


def scan_rows(
    rows: Iterable[dict[str, Any]], tokens: Mapping[str, str] | None = None, numbers: Sequence[int] | None = None
) -> list[Secret]:
    """Secrets in all text of all columns, lists and records in them too, and in the columns' names; one that a row
    repeats counts once.

    Args:
        rows (`Iterable[dict]`):
            Rows by column.
        tokens (`Mapping[str, str]`, *optional*):
            Secrets that are known, each with the place where it is from.
        numbers (`Sequence[int]`, *optional*):
            The rows' numbers in the corpus that they are a part of.
    """
    secrets: list[Secret] = []
    for position, row in enumerate(rows):
        number = position if numbers is None else numbers[position]
        seen: set[str] = set()
        for place, (column, value) in enumerate(row.items()):
            texts = [*_texts(value), *([column] if position == 0 else [])]
            column = f"column {place}" if find_secrets(column) else column  # a name that is a secret is not shown
            for kind, public, secret in (hit for text in texts for hit in find_secrets(text)):
                if secret not in seen:
                    seen.add(secret)
                    shown = f"{' '.join(public.split())}… ({len(secret)} characters)"
                    secrets.append(Secret(number, column, kind, shown))
            if source := token_in("\n".join(texts).encode(errors="replace"), tokens or {}):
                secrets.append(Secret(number, column, source, "word by word"))
    return secrets


def check_card(card: str, tokens: Mapping[str, str]) -> None:
    """Refuses to publish a card that seems to hold a secret, such as a data set's address with a password.

    Raises:
        `ValueError`: which names the kind, not the secret.
    """
    kinds = [kind for kind, _, _ in find_secrets(card)]
    if place := token_in(card.encode(), tokens):
        kinds.append(place)
    if kinds:
        raise ValueError(
            f"The card seems to hold secrets ({', '.join(kinds)}); look at the names of model and data set and at "
            "what was logged, and take them out. Nothing was uploaded."
        )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, bytes):
        yield value.decode("utf-8", "replace")
    elif isinstance(value, (dict, list, tuple)):
        for inner in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _texts(inner)
