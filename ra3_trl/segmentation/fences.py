"""Where fenced code stands in Markdown: for latents in chats and documentation, and for the programs in answers.

Lists and quotes are read by markdown-it. What opens and closes a fence is CommonMark's rule, but for what models
write: a fence may be indented as deep as it likes, and its rows less than their list; a mark inside an open
triple-quoted string of Python closes nothing; tags such as `<answer>` hide no fence, as a block of HTML would.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock


PYTHON_NAMES = frozenset(("python", "py", "python2", "py2", "python3", "py3", "ipython", "ipython3", "pyi", "sage"))
_MOST_MARKS = 32  # looked at behind the first: each is one reading of the code so far
_FILE = re.compile(r"[\w./-]+\.([^\W\d_]\w*)")
_LANGUAGE = re.compile(r"[^\W\d_][\w+#-]*")
_STRINGS = re.compile(
    r"""#[^\n]*|'''(?:\\.|[^\\])*?'''|\"\"\"(?:\\.|[^\\])*?\"\"\"|(?P<open>'''|\"\"\")"""
    r"""|'(?:\\.|[^\\\n'])*'|"(?:\\.|[^\\\n"])*\"""",
    re.DOTALL,
)


@dataclass(frozen=True)
class Fence:
    r"""Holds a fenced block of a text.

    >>> (fence,) = find_fences("1. Do\n   ```py\n   x = 1\n   ```\n")
    >>> fence.language, fence.code, fence.prefix, fence.starts, fence.rows
    ('py', 'x = 1\n', '   ', (15,), (18,))
    """

    language: str  # the first word behind the mark, in small letters; empty where there is none
    code: str  # the rows, without what stands before them for the sake of a list or quote
    prefix: str  # what is expected before a row of code, by the opening mark's
    starts: tuple[int, ...]  # the character at which each row begins
    rows: tuple[int, ...]  # and that at which its code does
    closed: bool


def find_fences(text: str) -> list[Fence]:
    """Finds the fenced blocks of a text, in order; one that is never closed goes on to the end."""
    if "```" not in text and "~~~" not in text:
        return []
    # As many characters, so that offsets are those of the text.
    source = text.replace("\r\n", " \n").replace("\r", "\n")
    return [token.meta["fence"](text) for token in _PARSER.parse(source) if token.type == "fence"]


def _language(info: str) -> str:
    """Reads `python`, `{.python .x}`, `python:main.py` and `main.py` alike."""
    word = info.partition(" ")[0]
    match = _FILE.fullmatch(word) or _LANGUAGE.search(word)
    return match[match.lastindex or 0].lower() if match else ""


def _is_open_string(code: str) -> bool:
    """Whether Python code ends inside a triple-quoted string."""
    return any(match["open"] for match in _STRINGS.finditer(code))


def _opening(state: StateBlock, row: int) -> tuple[str, str] | None:
    """The mark that a row begins with, and what stands behind it."""
    body = state.src[state.bMarks[row] + state.tShift[row] : state.eMarks[row]]
    mark = re.match(r"`{3,}(?=[^`]*$)|~{3,}", body)
    return None if mark is None else (mark[0], body[mark.end() :].strip())


def _code_start(state: StateBlock, row: int, columns: int) -> int:
    """The character behind a row's first `columns` columns of white space, or behind all that it has."""
    at, column = state.bMarks[row], 0
    while at < state.eMarks[row] and column < columns:
        width = 4 - (column + state.bsCount[row]) % 4 if state.src[at] == "\t" else 1
        if state.src[at] not in " \t" or column + width > columns:
            break
        at, column = at + 1, column + width
    return at


def _closing_rows(state: StateBlock, first: int, last: int) -> Iterator[int]:
    """Yields the rows that may close the fence of row `first`, and at last, negative, minus the one before which it
    ends if none does: the end of its list or quote, or of the text."""
    mark = _opening(state, first)[0]  # type: ignore[index]
    end = last
    for row in range(first + 1, last):
        start = state.bMarks[row] + state.tShift[row]
        body = state.src[start : state.eMarks[row]].rstrip()
        if state.sCount[row] < 0:  # behind a quote
            end = min(end, row)
            break
        if body and state.sCount[row] < state.blkIndent:  # models forget a list's indentation: a mark may yet come
            end = min(end, row)
            other = _opening(state, row)
            if other is not None and other[1]:  # the next block's
                break
        if len(body) >= len(mark) and not body.strip(mark[0]) and state.sCount[row] <= state.sCount[first] + 3:
            yield row
    yield -end


def _rule(state: StateBlock, first: int, last: int, silent: bool) -> bool:
    """The block rule of markdown-it for a fence that begins in row `first`."""
    opening = _opening(state, first)
    if opening is None or silent:
        return opening is not None
    language = _language(opening[1])
    filled = next((row for row in range(first + 1, last) if not state.isEmpty(row)), first)
    columns = min(state.sCount[first], max(0, state.sCount[filled]))

    def code_rows(end: int) -> list[tuple[int, int]]:
        starts = (_code_start(state, row, columns) for row in range(first + 1, end))
        return [(start, state.eMarks[row] + 1) for row, start in enumerate(starts, first + 1)]

    closing = list(islice(_closing_rows(state, first, last), _MOST_MARKS))
    close = closing[0]
    if language in PYTHON_NAMES or not language:  # a mark inside a string is none, if there is one behind it
        codes = ((row, code_rows(row)) for row in closing if row > 0)
        whole = (row for row, spans in codes if not _is_open_string("".join(state.src[a:b] for a, b in spans)))
        close = next(whole, close)
    spans = code_rows(abs(close))
    begin = state.bMarks[first] + state.tShift[first]
    before = state.src[state.src.rfind("\n", 0, begin) + 1 : begin]
    prefix = re.sub(r"[^>\s]", " ", before)  # a list's mark leaves its width
    if columns < state.sCount[first]:
        prefix = prefix.rstrip() + " " * columns
    token = state.push("fence", "code", 0)
    token.meta["fence"] = lambda text: Fence(
        language=language,
        code="".join(text[start:end] for start, end in spans),
        prefix=prefix,
        starts=tuple(state.src.rfind("\n", 0, start) + 1 for start, _ in spans),
        rows=tuple(start for start, _ in spans),
        closed=close > 0,
    )
    state.line = close + 1 if close > 0 else -close
    return True


def _paragraph(state: StateBlock, first: int, last: int, silent: bool) -> bool:
    """The rule for all else: a paragraph of one row, since in a longer one a fence could not be indented."""
    state.line = first + 1
    return True


def _make_parser() -> MarkdownIt:
    parser = MarkdownIt("zero").enable(["fence", "blockquote", "list"]).disable(["inline", "text_join"])
    parser.block.ruler.at("paragraph", _paragraph)
    parser.block.ruler.at("fence", _rule, {"alt": ["paragraph", "reference", "blockquote", "list"]})
    return parser


_PARSER = _make_parser()
