"""Python text -> logical lines, by Python's own `tokenize`.

The action of the paper is "a line of code". The line here is the logical line: inside a string, a bracket or after a
backslash a comment line would change the program or not be a comment at all, so no boundary stands there.
"""

from __future__ import annotations

import io
import tokenize

from .lines import Line


_LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.ENCODING)


def _tokens(text: str) -> list[tokenize.TokenInfo] | None:
    """All tokens of `text`, or `None` when it does not tokenize."""
    if "\0" in text or "\r" in text.replace("\r\n", ""):
        return None
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text, newline="\n").readline))
    except (tokenize.TokenError, SyntaxError):
        return None
    return None if any(token.type == tokenize.ERRORTOKEN for token in tokens) else tokens


def segment_python(text: str) -> tuple[Line, ...] | None:
    r"""Cuts `text` into logical lines and own-line comments; `None` when it does not tokenize.

    >>> [(line.start, line.comment) for line in segment_python("if x:\n  # why\n  f(\n1)\n")]
    [(0, False), (6, True), (14, False)]
    """
    bom = 1 if text.startswith("\ufeff") else 0
    tokens = _tokens(text[bom:])
    if tokens is None:
        return None
    offsets = [bom]
    for row in text[bom:].split("\n"):
        offsets.append(offsets[-1] + len(row) + 1)
    lines: list[Line] = []
    indent, unit, opens_block = "", "    ", False
    new_line, last, rows = True, "", text[bom:].split("\n")
    for token in tokens:
        if token.type == tokenize.NEWLINE:
            opens_block, new_line = last == ":", True
        elif token.type in _LAYOUT:
            continue
        elif token.type == tokenize.COMMENT:
            if new_line:
                lines.append(_line(token, offsets, rows, bom, indent + unit * opens_block, comment=True))
        elif new_line:
            line = _line(token, offsets, rows, bom, indent + unit * opens_block, comment=False)
            own = text[line.start : line.text_start].lstrip("\ufeff\f")
            if opens_block and len(own) > len(indent) and own.startswith(indent):
                unit = own[len(indent) :]
            lines.append(line)
            indent, new_line, last = own, False, token.string
        else:
            last = token.string
    return tuple(lines)


def statements_end(text: str) -> int:
    r"""Finds the end of the whole statements that `text` begins with: its own, or before the first that is no Python.

    >>> statements_end("x = 1\ny = (2,\n")
    6
    """
    bom = 1 if text.startswith("\ufeff") else 0
    offsets = [bom]
    for row in text[bom:].split("\n"):
        offsets.append(offsets[-1] + len(row) + 1)
    depth, end = 0, 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(text[bom:], newline="\n").readline):
            if token.type == tokenize.ERRORTOKEN:
                return end
            if token.type == tokenize.OP:
                depth += (token.string in "([{") - (token.string in ")]}")
            elif token.type in (tokenize.NEWLINE, tokenize.NL) and depth <= 0:
                end = min(offsets[token.start[0]], len(text))
    except (tokenize.TokenError, SyntaxError):
        return end
    return len(text)


def _line(
    token: tokenize.TokenInfo, offsets: list[int], rows: list[str], bom: int, indent: str, comment: bool
) -> Line:
    row = token.start[0] - 1
    while row and _continues(rows[row - 1]):
        row -= 1
    start = offsets[row]
    return Line(
        start - bom * (row == 0), offsets[row] + len(rows[row]) - len(rows[row].lstrip(" \t\f")), indent, comment
    )


def _continues(row: str) -> bool:
    """Only white space and a backslash: the logical line has begun here, before its first token."""
    return row.strip() == "\\"


def strip_python_comments(text: str, after: int = 0) -> str:
    """`text` without the own-line comments that begin at or after character `after`; the AST stays.

    Text that does not tokenize is returned as it is.
    """
    bom = 1 if text.startswith("\ufeff") else 0
    tokens = _tokens(text[bom:])
    if tokens is None:
        return text
    rows = text[bom:].split("\n")
    offsets = [bom]
    for row in rows:
        offsets.append(offsets[-1] + len(row) + 1)
    own_line = {
        token.start[0] - 1
        for token in tokens
        if token.type == tokenize.COMMENT
        and not token.line[: token.start[1]].strip()
        and offsets[token.start[0] - 1] >= after
        and not (token.start[0] > 1 and rows[token.start[0] - 2].rstrip("\r").endswith("\\"))
    }
    return text[:bom] + "\n".join(row for i, row in enumerate(rows) if i not in own_line)
