"""Reads what a language model answered. It is data: a line of it is a comment with its place, or is counted with the
reason why not. Nothing of it is run, and no line of it can do more than be dropped."""

from __future__ import annotations

import ast
import re
import warnings
from collections import Counter
from collections.abc import Collection

from ..annotators import Comment, Proposed


# Why a piece of an answer is no proposal.
MALFORMED, NO_LINE = "not of the form NUMBER: # COMMENT", "no such line"
CODE, SEVERAL_LINES, CUT = "code in place of a comment", "goes over several lines", "cut off by the longest answer"
LENGTHY, COPIED = "longer than 1000 characters", "copied from the prompt's example"
NOTHING = "the annotator says nothing"

_LONGEST = 1000  # characters; what is said in a line has fewer
_ROW = re.compile(r"\s*(?:[-*]\s+)?(?:line\s+)?([0-9]{1,9})\s*(?:[:|)]|[.](?=\s))(.*)", re.IGNORECASE)
_SIGN = re.compile(r"\s*(?:#+|//+)")
_FENCE = re.compile(r"\s*(?:```|~~~)")
_UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)


def examples_in(prompt: str) -> frozenset[str]:
    """The comments that a prompt has as rows of an answer, `NUMBER: # COMMENT`: small models say them of any text.

    Example:
        >>> examples_in("1 | x = 1\\n\\n1: # x is 1")
        frozenset({'x is 1'})
    """
    rows = filter(None, map(_ROW.fullmatch, prompt.splitlines()))
    return frozenset(_said(row[2]) for row in rows if _SIGN.match(row[2]))


def read_answer(answer: str, text: str, cut: bool = False, examples: Collection[str] = ()) -> Proposed:
    """Reads the comments in an answer about `text`.

    A comment is a row `NUMBER: # COMMENT`; the sign may be missing where what follows is no code, and rows may stand
    in a fence or a list. A row without a number right behind it makes it one of several lines, which is none. What a
    model thought aloud, up to `</think>`, is not read.

    Args:
        cut (`bool`, *optional*, defaults to `False`):
            Whether the answer ended by its length, so that its last row may be half of one.
        examples (`Collection[str]`, *optional*):
            Comments of the prompt's own, which are none on this text.

    Example:
        >>> read_answer("2: # x is 1\\n\\nHope it helps", "x = 1\\nprint(x)").comments
        (Comment(line=2, text=' x is 1'),)
    """
    *_, said = answer.split("</think>")
    if "<think>" in said:  # never ended
        return Proposed(dropped={CUT: 1})
    last = len(text.split("\n")) - text.endswith("\n")
    comments: list[Comment] = []
    dropped: Counter[str] = Counter()
    begun = False  # whether the row before was a comment
    swallows = False  # whether this row belongs to one that was dropped
    rows = said.splitlines()
    for number, row in enumerate(rows):
        match = _ROW.fullmatch(row)
        if match:
            comment = Comment(int(match[1]), match[2])
            reason = CUT if cut and number == len(rows) - 1 else _reason(comment, last, examples)
            begun, swallows = reason is None, False
            if reason:
                dropped[reason] += 1
            else:
                comments.append(Comment(comment.line, f" {_said(comment.text)}"))
        elif not row.strip() or _FENCE.match(row):
            begun = swallows = False
        elif begun:
            comments.pop()
            dropped[SEVERAL_LINES] += 1
            begun, swallows = False, True
        elif not swallows:
            dropped[MALFORMED] += 1
    return Proposed(tuple(comments), {} if comments or dropped else {NOTHING: 1}, dropped)


def _said(text: str) -> str:
    """A row without its number and sign."""
    return _SIGN.sub("", text, count=1).strip()


def _reason(comment: Comment, last: int, examples: Collection[str]) -> str | None:
    """Why a row of an answer is no comment on a text of `last` lines, `None` if it is one."""
    sign, said = _SIGN.match(comment.text), _said(comment.text)
    if not 1 <= comment.line <= last:
        return NO_LINE
    if not said:
        return MALFORMED
    if len(said) > _LONGEST:
        return LENGTHY
    if said in examples:
        return COPIED
    return None if sign or not _is_code(said) else CODE


def _is_code(text: str) -> bool:
    """Whether a row is a statement, and not words that happen to parse (`not empty`, `a or b`, `Note: short`)."""
    if text.endswith((";", "{", "}")):
        return True
    source = f"{text} pass" if text.endswith(":") else text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            tree = ast.parse(source)
    except _UNREADABLE:
        return text.endswith(":") and bool(re.match(r"(?:elif|else|except|finally|case)\b", text))
    for statement in tree.body:
        if isinstance(statement, ast.Expr):
            words = not any(isinstance(node, ast.Call) for node in ast.walk(statement))
        else:
            words = isinstance(statement, ast.AnnAssign) and statement.value is None
        if not words:
            return True
    return False
