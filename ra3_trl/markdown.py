"""Text that others wrote, as it may stand in a table of a card: a latent may hold anything that one line can."""

from __future__ import annotations

import re


# All ASCII punctuation that Markdown or HTML could read within a table's cell. An underscore within a word, a dot and
# a colon stay, unless they would make a link.
_MARKUP = re.compile(r"(?a:[^\w\s,;()=+\-/'\"%?.:#])|(?<![^\W_])_|_(?![^\W_])|(?<=www)\.|:(?=//)", re.I)


def cell(text: str, width: int = 80) -> str:
    """`text` for a cell of a Markdown table: shown letter for letter, on one line, cut behind `width` characters.

    Characters that Markdown or HTML reads are written as character references, which neither takes for markup;
    characters that are not printable (controls, marks that turn the direction of a line) as Python writes them.

    Example: `cell("a|b") == "a&#124;b"`.
    """
    line = re.sub(r"[ \t\r\n]+", " ", text).strip()
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
    text = text if len(text) <= width else text[: width - 1] + "…"
    return _MARKUP.sub(lambda mark: f"&#{ord(mark[0])};" if mark[0].isascii() else mark[0], text)


def code_cell(text: str, width: int = 80) -> str:
    """As [`cell`], set as code."""
    return f"<code>{cell(text, width)}</code>"
