"""Prose -> sentences. A latent is an aside in brackets between two of them: `It rained. [ so wet roads] He slowed.`

The sentence splitter is a regular expression and a short list: where it is not sure there is no boundary. A wrong one
costs a poor place for a latent, nothing else, since the text always joins to itself.
"""

from __future__ import annotations

import re

from .lines import Line


_CLOSERS = "\"'”’»)\\]}*_"
_BREAK = r"[^\S\n]*(?:\n?[^\S\n]*\[[^\[\]\n]*\][^\S\n]*)?\n\s*\n"  # a blank line, with an aside before it or none
_END = re.compile(
    rf"(?P<stop>[.!?…؟।]+)[{_CLOSERS}]*(?=\s)"  # with white space behind it
    r"|(?P<wide>[。！？｡]+)[」』”’）》】]*"  # Chinese and Japanese have none
    rf"|(?P<paragraph>\S)(?={_BREAK})"
)
_ABBREVIATIONS = re.compile(
    "mrs?|ms|dr|prof|st|sr|jr|rev|gen|col|capt|lt|sgt|hon|messrs|vs|etc|al|cf|figs?|eqs?|nos?|vols?|pp|eds?|ch|sec|inc|"
    "ltd|co|corp|dept|univ|assn|approx|ca|est|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec",
    re.IGNORECASE,
)
_LETTERS = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")  # e.g, i.e, U.S, an initial
_OPENERS = "\"'“‘«([{¿¡*_#>-–—•"
_ASIDE = re.compile(r"\[[^\[\]\n]*\](?!\()")  # not the text of a link
_WIDE = re.compile(r"[。！？｡][」』”’）》】]*$")
_WORD, _PARAGRAPH = re.compile(r"\S"), re.compile(_BREAK)


def segment_prose(text: str) -> tuple[Line, ...]:
    """Cuts `text` into sentences, each from the end of the one before on; a blank line ends one too.

    The first has no line: nothing stands before it that an aside could follow. A sentence that begins with `[` is the
    expert's own aside, up to its `]`: a latent seen, not an action.

    >>> [(line.start, line.comment) for line in segment_prose("It is 2.5 wide. [ so] Dr. No left! Why?")]
    [(15, True), (21, False), (34, False)]
    """
    lines: list[Line] = []
    start = 0
    while (word := _WORD.search(text, start)) is not None:
        first, aside = word.start(), word[0] == "["
        if start or aside:
            # A space is expected, but not at the start or behind a stop that brings its own.
            bare = start == 0 or _WIDE.search(text, max(0, start - 4), start)
            lines.append(Line(start, first, "" if bare else " ", aside))
        whole = _ASIDE.match(text, first) if aside else None
        start = whole.end() if whole else _sentence_end(text, first)
    return tuple(lines)


def _sentence_end(text: str, start: int) -> int:
    for match in _END.finditer(text, start):
        if match["stop"] is None or _is_end(text, start, match):
            return match.end()
    return len(text)


def _is_end(text: str, start: int, match: re.Match[str]) -> bool:
    """Whether a stop with white space behind it ends the sentence."""
    if _PARAGRAPH.match(text, match.end()):
        return True
    following = _WORD.search(text, match.end())
    after = following[0] if following else ""
    same_row = following and "\n" not in text[match.end() : following.start()]
    if after.isdigit() and same_row:  # "No. 5", where the list of abbreviations does not know the word
        return False
    if after.islower() or not (after.isalnum() or after in tuple(_OPENERS)):
        return False
    stop = match["stop"]
    if set(stop) & set("!?؟।"):
        return True
    if stop != ".":  # an ellipsis
        return False
    word = text[start : match.start()].rpartition(" ")[2].rpartition("\n")[2].lstrip(_OPENERS)
    row = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
    numbered = word.isdigit() and row.strip() == word  # of a list
    return not (numbered or _ABBREVIATIONS.fullmatch(word) or _LETTERS.fullmatch(word))


def strip_asides(text: str, after: int = 0) -> str:
    """Strips the asides between sentences that begin at or after character `after`.

    >>> strip_asides("It rained. [ so wet roads] He slowed.")
    'It rained. He slowed.'
    """
    kept, at = [], 0
    for line in segment_prose(text):
        whole = _ASIDE.match(text, line.text_start) if line.comment and line.start >= after else None
        if whole:
            kept.append(text[at : line.start])
            at = whole.end()
    return "".join([*kept, text[at:]])
