"""Secrets in text: what must be looked for before a corpus is published.

A short list of forms that are secrets whenever they occur, and one rule for values that are assigned to names such as
`password`. Our own, since detect-secrets (1.5.0, of May 2024) knows no Hugging Face, Google or Anthropic token and its
settings are global to the process.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


# Of each form: what may be shown, and what is secret.
_FORMS = {
    "private key": r"(-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----)"
    r"((?:(?!-----)[\s\S]){0,300}?[A-Za-z0-9+/]{40,100})",
    "AWS access key": r"\b((?:AKIA|ASIA|ABIA|ACCA))([A-Z2-7]{16})\b",
    "AWS secret key": r"(?i:(aws_?secret(?:_?access)?_?key[\"']?\s*[:=]\s*[\"']?))"
    r"([A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])",
    "GitHub token": r"\b(gh[pousr]_)([A-Za-z0-9]{36,255})\b",
    "GitHub fine-grained token": r"\b(github_pat_)([A-Za-z0-9_]{82})\b",
    "GitLab token": r"\b(glpat-)([\w-]{20,200})",
    "Hugging Face token": r"\b(hf_|api_org_)([A-Za-z0-9]{34})\b",
    "OpenAI key": r"\b(sk-(?:proj-|svcacct-|admin-)?)([\w-]{20,200}T3BlbkFJ[\w-]{20,200})",
    "OpenRouter key": r"\b(sk-or-v1-)([a-f0-9]{64})\b",
    "Anthropic key": r"\b(sk-ant-[a-z]{3,8}\d\d-)([\w-]{80,200})",
    "Slack token": r"\b(xox[abeoprs]-)((?:\d{1,16}-){1,4}[A-Za-z0-9-]{16,100})",
    "Slack webhook": r"(https://hooks\.slack\.com/(?:services|workflows)/)([\w+/]{40,200})",
    "Google API key": r"\b(AIza)([\w-]{35})(?![\w-])",
    "Google OAuth secret": r"\b(GOCSPX-)([\w-]{28})(?![\w-])",
    "Stripe key": r"\b((?:sk|rk)_(?:live|prod|test)_)([A-Za-z0-9]{20,250})\b",
    "JSON web token": r"\b(eyJ)([\w-]{10,1000}\.eyJ[\w-]{10,4000}\.[\w-]{20,1000})",
    "PyPI token": r"\b(pypi-)(AgE(?:IcHlwaS5vcmc|NdGVzdC5weXBpLm9yZw)[\w-]{50,500})",
    "npm token": r"\b(npm_)([A-Za-z0-9]{36})\b",
    "SendGrid key": r"\b(SG\.)([\w-]{22}\.[\w-]{43})(?![\w-])",
    "Telegram bot token": r"\b(\d{8,10}:)(AA[\w-]{33})(?![\w-])",
    "DigitalOcean token": r"\b(do[opr]_v1_)([a-f0-9]{64})\b",
    "Azure storage key": r"\b(AccountKey=)([A-Za-z0-9+/]{86}==)",
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
_PATTERNS = {kind: re.compile(form) for kind, form in (_FORMS | _ASSIGNED).items()}
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
    for kind, pattern in _PATTERNS.items():
        for match in pattern.finditer(text):
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


def scan_rows(rows: Iterable[dict[str, Any]]) -> list[Secret]:
    """Secrets in all text of all columns, lists and records in them too; one that a row repeats counts once."""
    secrets: list[Secret] = []
    for number, row in enumerate(rows):
        seen: set[str] = set()
        for column, value in row.items():
            for kind, public, secret in (hit for text in _texts(value) for hit in find_secrets(text)):
                if secret not in seen:
                    seen.add(secret)
                    shown = f"{' '.join(public.split())}… ({len(secret)} characters)"
                    secrets.append(Secret(number, column, kind, shown))
    return secrets


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, bytes):
        yield value.decode("utf-8", "replace")
    elif isinstance(value, (dict, list, tuple)):
        for inner in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _texts(inner)
