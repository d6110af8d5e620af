"""`Line`, what every format cuts a text into, and text cut at its newlines."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """An action that begins at character `start`, with white space up to its first word at `text_start`.

    In code `start` is column 0 of a logical line; in prose it is the end of the sentence before. `indent` is the white
    space that what stands before leads one to expect in front of a latent; the line's own is not looked at, or a
    latent would tell what follows. `comment` marks the expert's own latents.
    """

    start: int
    text_start: int
    indent: str
    comment: bool


def segment_lines(text: str) -> tuple[Line, ...]:
    """The lines of `text` that are not blank; blank ones belong to the line before.

    Example: `"a\\n\\n  b\\n"` has lines at characters 0 and 3.
    """
    lines, start = [], 0
    for row in text.split("\n"):
        body = row.lstrip()
        if body:
            lines.append(Line(start, start + len(row) - len(body), "", False))
        start += len(row) + 1
    return tuple(lines)


def keep_text(text: str, after: int = 0) -> str:
    """`text` as it is, for formats in which the expert has no comments to strip."""
    return text
