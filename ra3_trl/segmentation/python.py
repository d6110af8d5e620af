"""Python text -> logical lines and own-line comments.

The action of the paper is "a line of code". The line here is the logical line: inside a string, a bracket or after a
backslash a comment line would change the program or not be a comment at all, so no boundary stands there.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from .lines import Line
from .python_tokens import BOM, Token, read_tokens


class OwnLineComment(NamedTuple):
    """A comment with nothing before it on its row: the row's number from 0, the character of its `#`, what follows."""

    row: int
    start: int
    text: str


def _rows(text: str) -> tuple[list[str], list[int]]:
    """Physical lines of `text` without a byte-order mark, and the characters of `text` at which they start."""
    rows = text.removeprefix(BOM).split("\n")
    return rows, list(accumulate((len(row) + 1 for row in rows), initial=int(text.startswith(BOM))))


def _all_tokens(text: str) -> list[Token] | None:
    """All tokens of `text`, or `None` when it does not tokenize."""
    tokens = list(read_tokens(text))
    return None if any(token.kind == "error" for token in tokens) else tokens


def _on_own_rows(tokens: Iterable[Token], text: str) -> list[OwnLineComment]:
    """Picks the own-line comments among the tokens of `text`: the only rule for what counts as one."""
    rows, starts = _rows(text)
    comments, commented = [], -1
    for token in tokens:
        if token.kind != "comment":
            continue
        row, column = token.row, token.start - starts[token.row]
        # Behind a backslash it belongs to the row before, which would be joined to the next one without it. (A
        # backslash at the end of a comment joins nothing.)
        joined = row > 0 and rows[row - 1].rstrip("\r").endswith("\\") and commented != row - 1
        if not joined and not rows[row][:column].strip():
            comments.append(OwnLineComment(row, token.start, token.string[1:]))
        commented = row
    return comments


def own_line_comments(text: str, after: int = 0) -> list[OwnLineComment]:
    """Finds the own-line comments of `text` whose `#` stands at or after character `after`.

    It is read from its start, since only that tells a comment from a row of a string; a text that is cut or no Python
    is read as far as it goes.
    """
    return [comment for comment in _on_own_rows(read_tokens(text), text) if comment.start >= after]


def count_code_lines(text: str, after: int = 0) -> int:
    """Counts the physical lines of `text` from character `after` on that are neither blank nor an own-line comment.

    Example: `count_code_lines("# a\\nx = '''\\n# b\\n'''\\n") == 3`: the second `#` stands in a string.
    """
    rows, starts = _rows(text)
    comments = {comment.row for comment in own_line_comments(text)}
    return sum(bool(row[max(0, after - starts[i]) :].strip()) and i not in comments for i, row in enumerate(rows))


def strip_python_comments(text: str, after: int = 0) -> str:
    """Removes the own-line comments of `text` whose rows begin at or after character `after`; the AST stays.

    Text that does not tokenize is returned as it is.
    """
    tokens = _all_tokens(text)
    if tokens is None:
        return text
    rows, starts = _rows(text)
    gone = {comment.row for comment in _on_own_rows(tokens, text) if starts[comment.row] >= after}
    return text[: starts[0]] + "\n".join(row for i, row in enumerate(rows) if i not in gone)


def segment_python(text: str) -> tuple[Line, ...] | None:
    r"""Cuts `text` into logical lines and own-line comments; `None` when it does not tokenize.

    >>> [(line.start, line.comment) for line in segment_python("if x:\n  # why\n  f(\n1)\n")]
    [(0, False), (6, True), (14, False)]
    """
    tokens = _all_tokens(text)
    if tokens is None:
        return None
    rows, starts = _rows(text)
    comments = {comment.row for comment in _on_own_rows(tokens, text)}
    lines: list[Line] = []
    indent, unit, opens_block = "", "    ", False
    new_line, last = True, ""
    for token in tokens:
        if token.kind == "line":
            opens_block, new_line = last == ":", True
        elif token.kind in ("row", "blank"):
            continue
        elif token.kind == "comment":
            if new_line and token.row in comments:  # in a bracket it is no line of its own
                lines.append(_line(token, rows, starts, indent + unit * opens_block))
        elif new_line:
            line = _line(token, rows, starts, indent + unit * opens_block)
            own_indent = text[line.start : line.text_start].lstrip("\ufeff\f")
            # One unit is what a block was last indented by, as far as the text has shown.
            if opens_block and len(own_indent) > len(indent) and own_indent.startswith(indent):
                unit = own_indent[len(indent) :]
            lines.append(line)
            indent, new_line, last = own_indent, False, token.string
        else:
            last = token.string
    return tuple(lines)


def parses_as_python(text: str) -> bool:
    """Whether this Python's own parser takes `text`: it may where [`segment_python`] does not (old row ends)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that are none
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _line(token: Token, rows: Sequence[str], starts: Sequence[int], indent: str) -> Line:
    row = token.row
    while row and rows[row - 1].strip() == "\\":  # the logical line has begun there, before its first token
        row -= 1
    start = starts[row] if row else 0  # a byte-order mark is part of the first line: no latent may stand before it
    blank = len(rows[row]) - len(rows[row].lstrip(" \t\f"))
    return Line(start, starts[row] + blank, indent, comment=token.kind == "comment", latent=start == starts[row])


def statements_end(text: str) -> int:
    r"""Finds the end of the whole statements that `text` begins with: its own, or before the first that is no Python.

    >>> statements_end("x = 1\ny = (2,\n")
    6
    """
    end = 0
    for token in read_tokens(text):
        if token.kind == "error":
            return end
        if token.kind in ("line", "blank"):
            end = token.start + len(token.string)
    return len(text)
