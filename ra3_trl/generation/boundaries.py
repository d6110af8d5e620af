"""Where rows of tokens that are being written stand: what line they are in, and whether a latent may begin it.

A row is read from its end backwards, and nothing is kept but the lines of the last call. So beam search may reorder
rows, and one row of a batch knows nothing of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..records import Boundary
from .vocabulary import PROBE, Vocabulary


@dataclass
class LineStart:
    """The last line of a row, which begins behind the row's first `end` tokens.

    `carry` is what the token before holds of the line. `opens` says that the line is code, so that a marker would
    begin a comment; `boundary` is `None` where no latent may stand. `closure` must follow if the token before ended a
    latent. The rest is remembered for the line: log-probs of the think tokens passed, and whether to think.
    """

    end: int
    carry: bytes
    opens: bool
    boundary: Boundary | None
    closure: tuple[int, ...] = ()
    logps: dict[int, float] = field(default_factory=dict)
    thinks: bool | None = None


class LineReader:
    """Finds the last line of each row of a batch.

    Args:
        vocabulary ([`Vocabulary`]):
            Of the tokenizer that the rows are of, and the format of their text.
        prompt_is_code (`bool`):
            Whether the text begins with the prompt; otherwise with what is generated.
    """

    def __init__(self, vocabulary: Vocabulary, prompt_is_code: bool):
        self._vocabulary, self._format = vocabulary, vocabulary.format
        self._prompt_is_code = prompt_is_code
        self._prompt_width, self._width = 0, -2
        self._rows: set[tuple[int, ...]] = set()  # of the last call
        self._lines: dict[tuple[int, ...], LineStart] = {}  # those rows' last lines, by the tokens before the line

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[LineStart]:
        """The last line of each row; all rows are of one length, padded on the left."""
        self._follow(rows)
        keys = [tuple(row[: self._line_end(row)]) for row in rows]
        lines: dict[tuple[int, ...], LineStart] = {}
        for key in keys:
            if key not in lines:
                lines[key] = self._lines.get(key) or self._with_closure(key)
        self._lines = lines
        return [lines[key] for key in keys]

    def last(self, row: Sequence[int], prompt_width: int) -> LineStart:
        """The last line of a single row, whose prompt are its first `prompt_width` tokens."""
        self._prompt_width = prompt_width
        key = tuple(row[: self._line_end(row)])
        line = self._lines.get(key) or self._with_closure(key)
        self._lines = {key: line}
        return line

    def _follow(self, rows: Sequence[Sequence[int]]) -> None:
        """Notices a new call of `generate` and how long its prompts are (assisted decoding may step back)."""
        width, now = len(rows[0]), {tuple(row) for row in rows}
        before = {row[: width - 1] for row in self._rows}
        if width > self._width + 1 or not {row[: width - 1] for row in now} <= before:
            self._prompt_width, self._lines = width, {}
        self._width, self._rows = width, now

    @property
    def _first(self) -> int:
        """The first token of a row that is read."""
        return 0 if self._prompt_is_code else self._prompt_width

    def _line_end(self, row: Sequence[int]) -> int:
        """Number of tokens before the last line: up to the last newline or special token."""
        end = len(row)
        while end > self._first and row[end - 1] in self._vocabulary.inside:
            end -= 1
        return end

    def _with_closure(self, key: tuple[int, ...]) -> LineStart:
        line = self._read(key)
        if self._vocabulary.tags or len(key) <= self._first:
            return line
        before = key[: self._line_end(key[:-1])]
        boundary = (self._lines.get(before) or self._read(before)).boundary
        latent = key[len(before) : -1]
        if boundary and len(latent) > len(boundary.think) and latent[: len(boundary.think)] == boundary.think:
            line.closure = boundary.close[1:] if key[-1] == boundary.close[0] else ()
        return line

    def _read(self, key: tuple[int, ...]) -> LineStart:
        last = self._vocabulary.text_of(key[-1:])
        carry = last.rpartition(b"\n")[2] if b"\n" in last else b""
        code = self._code(key).removesuffix(carry)
        expected = self._expected(code)
        line = LineStart(len(key), carry, expected is not None, None)
        # At the start too, as in training, if a token predicts the first one and no dummy space stands before it.
        at_start = not code and len(key) <= self._prompt_width and key[-1:] == (self._vocabulary.bos_id,)
        begins = (b"\n" in last and not carry.strip()) or (at_start and not self._vocabulary.dummy_space)
        if expected is None or not begins or expected[1] or self._behind_tagged(key):
            return line
        think = self._vocabulary.fragment(self._format.think_text(expected[0], carry.decode()))
        close = self._vocabulary.fragment(self._format.close_text(carry.decode()))
        if think is not None and close is not None:
            line.boundary = Boundary(think, close)
        return line

    def _expected(self, code: bytes) -> tuple[str, bool] | None:
        """Indentation expected behind `code` and whether a comment stands before; `None` if no line begins here."""
        text = code.decode("utf-8", "replace")  # as a reader sees it: bytes that are no character end nothing
        lines = self._format.segment(text + PROBE)
        if not lines or lines[-1].start != len(text) or lines[-1].comment:
            return None
        if not lines[-1].latent or lines[-1].think is not None:  # prose, or another marker than the vocabulary's
            return None
        return lines[-1].indent, len(lines) > 1 and lines[-2].comment

    def _code(self, key: tuple[int, ...]) -> bytes:
        """The text behind the last special token, without tagged latents."""
        start = len(key)
        while (
            start > self._first
            and key[start - 1] < len(self._vocabulary.table.token_bytes)
            and key[start - 1] not in self._vocabulary.textless
        ):
            start -= 1
        ids = key[start:]
        if self._vocabulary.tags:
            think, end = (self._vocabulary.tags[tag] for tag in (self._format.think, self._format.end))
            kept, latent = [], False
            for i in ids:
                latent = i == think or (latent and i != end)
                if not latent:
                    kept.append(i)
            ids = kept
        code = self._vocabulary.text_of(ids)
        at_start = start == 0 or start > self._first or key[start - 1] in self._vocabulary.textless
        return code.removeprefix(b" ") if self._vocabulary.dummy_space and at_start else code

    def _behind_tagged(self, key: tuple[int, ...]) -> bool:
        """Nothing but white space since a tagged latent: it stands before the line to come, blank rows or not."""
        for i in reversed(key if self._vocabulary.tags else ()):
            if i in self._vocabulary.tags.values():
                return True
            if i in self._vocabulary.textless or self._vocabulary.text_of((i,)).strip():
                return False
        return False
