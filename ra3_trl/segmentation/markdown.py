"""Markdown -> rows; a latent may stand before the lines of fenced code whose language is known, and nowhere else.

What a fence holds is read as a text by itself, by the format of its language. A row outside is a line without a
boundary, so that a latent in code is not credited with the prose behind it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

from .fences import PYTHON_NAMES, Fence, find_fences
from .lines import Line
from .python import segment_python, statements_end, strip_python_comments
from .slashes import segment_slashes, strip_slashes


class _Language(NamedTuple):
    segment: Callable[[str], tuple[Line, ...] | None]
    strip: Callable[[str], str]
    think: str | None  # what opens a latent, if not `#`


_PYTHON = _Language(segment_python, strip_python_comments, None)
_SLASHES = _Language(segment_slashes, strip_slashes, "//")
_SLASH_NAMES = (
    "c h cpp c++ cc cxx hpp hxx java js javascript mjs cjs ts typescript rust rs go golang cs c# csharp kotlin kt "
    "kts swift"
)
_LANGUAGES = dict.fromkeys(PYTHON_NAMES, _PYTHON) | dict.fromkeys(_SLASH_NAMES.split(), _SLASHES)


def _code_lines(fence: Fence) -> list[Line] | None:
    """The lines of a fence's code, by characters of the whole text; `None` where it is not read."""
    language, code = _LANGUAGES.get(fence.language), fence.code
    if language is None or code.lstrip().startswith(">>>"):  # a session
        return None
    read = language.segment(code)
    if read is None and language is _PYTHON and not fence.closed:
        read = segment_python(code[: statements_end(code)])
    if read is None:
        return None
    begins = list(accumulate((len(row) + 1 for row in code.split("\n")[:-1]), initial=0))
    lines = []
    for line in read:
        row, first = (bisect_right(begins, at) - 1 for at in (line.start, line.text_start))
        start, text_start = fence.starts[row], fence.rows[first] + line.text_start - begins[first]
        lines.append(Line(start, text_start, fence.prefix + line.indent, line.comment, line.latent, language.think))
    return lines


def segment_markdown(text: str) -> tuple[Line, ...]:
    r"""Cuts `text` into the rows of its prose, without boundaries, and the lines of its fenced code.

    >>> [(line.start, line.latent) for line in segment_markdown("So:\n```py\nx = (1,\n2)\ny = x\n```\n")]
    [(0, False), (4, False), (10, True), (21, True), (27, False)]
    """
    code: dict[int, Line | None] = {}
    for fence in find_fences(text):
        if (lines := _code_lines(fence)) is not None:
            code |= dict.fromkeys(fence.starts) | {line.start: line for line in lines}
    rows, start = [], 0
    for row in text.split("\n"):
        body = row.lstrip()
        if body and start not in code:
            rows.append(Line(start, start + len(row) - len(body), "", False, latent=False))
        elif (line := code.get(start)) is not None:
            rows.append(line)
        start += len(row) + 1
    return tuple(rows)


def strip_markdown(text: str, after: int = 0) -> str:
    """Strips the own-line comments of fenced code that begin at or after character `after`; prose stays.

    >>> strip_markdown("```js\\n// why\\nf();\\n```\\n# Title\\n")
    '```js\\nf();\\n```\\n# Title\\n'
    """
    gone: list[tuple[int, int]] = []
    for fence in find_fences(text):
        if _code_lines(fence) is None:
            continue
        kept = iter(_LANGUAGES[fence.language].strip(fence.code).split("\n"))
        following = next(kept)
        for start, row in zip(fence.starts, fence.code.split("\n"), strict=False):
            if row == following:
                following = next(kept, "")
            elif start >= after:
                gone.append((start, text.index("\n", start) + 1 if "\n" in text[start:] else len(text)))
    for start, end in reversed(gone):
        text = text[:start] + text[end:]
    return text
