r"""Python text -> tokens, alike on every Python: where a line ends must not depend on the interpreter that reads it.

The standard library's `tokenize` changed with 3.12: it stops at the first error, takes `$`, `?`, `!` and backticks for
operators, refuses brackets that do not match, reads f-strings by PEP 701, and raises `UnicodeDecodeError` or
`SystemError` on what a model may write. Here it is as 3.11's, which reads on behind what is no Python, with PEP 701's
f-strings, each of them one token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple


BOM = "\ufeff"
# Letters and digits beyond the first plane change with the interpreter's Unicode; mathematical letters and the old
# Chinese signs do not.
_WORD = r"[^\W\U00010000-\U0001d3ff\U0001d800-\U0001ffff\U0002a6e0-\U0010ffff]"
_TOKEN = re.compile(
    rf"""
    (?P<space>[ \t\f]+) | (?P<comment>\#[^\r\n]*) | (?P<newline>\r?\n) | (?P<joined>\\\r?\n)
    | (?P<f_string>(?i:fr?|rf)(?P<f_quote>'''|\"\"\"|'|"))
    | (?P<string>(?i:br?|rb?|u)?(?P<quote>'''|\"\"\"|'|"))
    | (?P<text>\d+|{_WORD}+|!=|[-+*/%&|^~<>=,:;.@]) | (?P<open>[(\[{{]) | (?P<close>[)\]}}])
    """,
    re.VERBOSE,
)
_NOT_PYTHON = re.compile(r"\0|\r(?!\n)")
_PAIRS = {"(": ")", "[": "]", "{": "}"}


def _until(quote: str, stops: str = "", doubled: str = "") -> re.Pattern[str]:
    """Text within a string of this quote, up to one of `stops` or the quote: the group `stop`."""
    mark = quote[0]
    braces = stops.replace(r"\n", "")  # a backslash before one of them is nothing but itself
    escape = rf"\\(?=[{braces}])|\\(?:\r\n|[^{braces}])" if braces else r"\\(?:\r\n|.)"
    within = rf"|{mark}(?!{mark}{mark})|\n" if len(quote) == 3 else ""
    stop = rf"[{stops}]|{quote}" if stops else quote
    return re.compile(rf"(?:[^\\{braces}{mark}\n]|{escape}{doubled}{within})*+(?P<stop>{stop})", re.DOTALL)


_QUOTES = ("'", '"', "'''", '"""')
_STRING = {quote: _until(quote) for quote in _QUOTES}
_F_TEXT = {quote: _until(quote, "{}", r"|\{\{|\}\}") for quote in _QUOTES}
_F_FORMAT = {quote: _until(quote, "{}" if len(quote) == 3 else r"{}\n") for quote in _QUOTES}


class Token(NamedTuple):
    r"""A token of Python text.

    `kind` is `"line"` for the end of a logical line, `"row"` for that of a row within one, `"blank"` for that of a row
    with nothing or a comment alone; `"comment"`; `"error"` for what is no Python; else `"text"`. `start` is its
    character, `row` the number of its row, from 0.
    """

    kind: str
    start: int
    row: int
    string: str


def read_tokens(text: str) -> Iterator[Token]:
    """Reads the tokens of `text`; an `"error"` where it is no Python, and as far as that can be read, what follows."""
    odd = _NOT_PYTHON.search(text)
    end = text.rfind("\n", 0, odd.start()) + 1 if odd else len(text)
    yield from _tokens(text[:end])
    if odd:
        yield Token("error", end, text.count("\n", 0, end), "")


def _tokens(text: str) -> Iterator[Token]:
    """Tokens of a text without bare carriage returns and NULs."""
    begin = at = int(text.startswith(BOM))
    row, depth, indents = 0, 0, [0]
    new_line, joined = True, False  # no logical line has begun; a backslash joins this row to the one before
    while at < len(text):
        token, start = _TOKEN.match(text, at), at
        kind = str(token.lastgroup) if token else "error"
        at = token.end() if token else at + 1
        if kind == "space":
            joined = False
            continue
        if new_line and kind not in ("newline", "comment"):
            new_line = False
            if not _fits(text[begin:start], indents):
                yield Token("error", start, row, "")
                return
        if token and kind.endswith("string"):
            whole, at = _read_string(text, token)
            kind = "text" if whole else "error"
            if not whole and len(token["f_quote"] or token["quote"]) == 3:  # all that follows may be within
                yield Token("error", start, row, "")
                return
        if kind == "newline":
            kind = "row" if depth > 0 else "blank" if new_line else "line"
            new_line, begin = depth == 0, at
        joined = kind == "joined"
        if kind in ("open", "close"):
            depth += 1 if kind == "open" else -1
            kind = "text"
        if not joined:
            yield Token(kind, start, row, text[start:at])
        row += text.count("\n", start, at)
    if depth or joined:
        yield Token("error", at, row, "")


def _fits(blank: str, indents: list[int]) -> bool:
    """Whether a line with `blank` before it is in a block that is open, or opens one; others are closed."""
    width = 0
    for character in blank:
        width = 0 if character == "\f" else width + 1 if character == " " else (width // 8 + 1) * 8
    if width > indents[-1]:
        indents.append(width)
    while width < indents[-1]:
        indents.pop()
    return width == indents[-1]


def _read_string(text: str, token: re.Match[str]) -> tuple[bool, int]:
    """Reads the string that `token` opens: whether it is whole, and where it ends or reading may go on."""
    if token["f_quote"]:
        return _read_f_string(text, token.end(), token["f_quote"])
    rest = _STRING[token["quote"]].match(text, token.end())
    return rest is not None, (rest or token).end()


def _read_f_string(text: str, at: int, quote: str) -> tuple[bool, int]:
    """As [`_read_string`], from `at`, where the text of an f-string begins, past what stands in its fields."""
    # What is open: quotes, in an f-string's text; brackets, in code, which a field begins; ":", in a field's format.
    # There is no recursion, which what a model writes could exhaust.
    inside, quotes = [quote], [quote]
    while inside:
        top = inside[-1]
        if top in _PAIRS:
            in_field = top == "{" and inside[-2] not in _PAIRS
            token = _TOKEN.match(text, at)
            at = token.end() if token else at + 1
            if token is None:
                if not in_field or text[at - 1 : at] != "!":  # of a conversion
                    return False, at
            elif token["f_quote"]:
                inside.append(token["f_quote"])
                quotes.append(token["f_quote"])
            elif token["quote"]:
                whole, at = _read_string(text, token)
                if not whole:
                    return False, at
            elif token["open"]:
                inside.append(token["open"])
            elif token["close"]:
                if token["close"] != _PAIRS[inside.pop()]:
                    return False, at
            elif in_field and token["text"] == ":":
                inside.append(":")
            continue
        part = (_F_FORMAT if top == ":" else _F_TEXT)[quotes[-1]].match(text, at)
        if part is None:
            return False, at
        at = part.end()
        if part["stop"] == "{":
            inside.append("{")
        elif part["stop"] == "}" and top == ":":
            del inside[-2:]  # with the field's own bracket
        elif part["stop"] == "\n":  # code again, up to the field's bracket
            inside.pop()
        elif part["stop"] == top:
            inside.pop()
            quotes.pop()
        else:
            return False, at
    return True, at
