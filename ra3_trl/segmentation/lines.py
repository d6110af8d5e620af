"""`Line`, what every format cuts a text into, and text cut at its newlines."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Line:
    """Marks an action in a text, by characters."""

    start: int  # column 0 of a logical line; in prose the end of the sentence before
    text_start: int  # its first word, behind white space
    # White space expected in front of a latent, from what stands before alone: the line's own would tell what follows.
    indent: str
    comment: bool  # whether it is the expert's own latent
    latent: bool = True  # whether one may stand before it
    think: str | None = None  # what opens one there, if not the format's `think`

    def moved(self, by: int) -> Line:
        """The line in a longer text, in which `by` characters stand before."""
        return replace(self, start=self.start + by, text_start=self.text_start + by)


def segment_lines(text: str) -> tuple[Line, ...]:
    r"""Cuts `text` into the lines that are not blank; blank ones belong to the line before.

    >>> [line.start for line in segment_lines("a\n\n  b\n")]
    [0, 3]
    """
    lines, start = [], 0
    for row in text.split("\n"):
        body = row.lstrip()
        if body:
            lines.append(Line(start, start + len(row) - len(body), "", False))
        start += len(row) + 1
    return tuple(lines)


def keep_text(text: str, after: int = 0) -> str:
    """Strips nothing, for formats in which the expert has no comments."""
    return text
