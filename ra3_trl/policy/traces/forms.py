"""A trace as one comment."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


MOST, LONGEST = 12, 160  # changes that are told, characters of a comment
_FIRST, _LAST = 4, 7  # of more changes, as loops make them, these are told, and `...` between them
FORM = "changes"  # the others help SmolLM2-135M-Instruct as much, see benchmarks/LOG.md


class Change(NamedTuple):
    """A variable's new value as Python writes it; `line` is the one that made it, 0 for an argument."""

    line: int
    name: str
    value: str


@dataclass(frozen=True)
class Trace:
    """What changed in a program's functions while an assertion or a call ran: `count` changes, of which the first and
    the last are there."""

    changes: tuple[Change, ...]
    count: int

    @property
    def short(self) -> bool:
        """Whether all of it can be told: 1 to 12 changes in at most 160 characters."""
        return 1 <= self.count <= MOST and len(_in_order(self.changes, ())) <= LONGEST


def _in_order(changes: Sequence[Change], rows: Sequence[str]) -> str:
    return ", ".join(f"{change.name} = {change.value}" for change in changes)


def _last_values(changes: Sequence[Change], rows: Sequence[str]) -> str:
    last: dict[str, Change] = {}
    for change in changes:
        last.pop(change.name, None)
        last[change.name] = change
    return _in_order([*last.values()][-MOST:], rows)


def _line_by_line(changes: Sequence[Change], rows: Sequence[str]) -> str:
    """Statements with the value that they gave: `total += x -> 3`."""
    said = []
    for change in changes:
        row = rows[change.line - 1].strip() if 0 < change.line <= len(rows) else ""
        assigned = row.startswith(change.name) and not row[len(change.name) :].lstrip()[:1].isalnum()
        said.append(f"{row} -> {change.value}" if assigned else f"{change.name} = {change.value}")
    return "; ".join(said)


FORMS: dict[str, Callable[[Sequence[Change], Sequence[str]], str]] = {
    "changes": _in_order,
    "last": _last_values,
    "lines": _line_by_line,
}


def write_trace(trace: Trace, rows: Sequence[str] = (), form: str = FORM) -> str | None:
    """Writes a trace as a comment's text, `x = 0, total = 2`; `None` where it does not fit.

    Of more than 12 changes the first 4 and the last 7 are told, with `...` between them: loops begin and end.

    Args:
        trace ([`Trace`]):
            At least one change.
        rows (`Sequence[str]`):
            The program's lines, for the form `"lines"`.
        form (`str`, *optional*, defaults to `"changes"`):
            `"changes"` (all, in order), `"last"` (each variable's last value) or `"lines"` (statements with their
            values).
    """
    changes, write = trace.changes, FORMS[form]
    if form == "last" or trace.count <= MOST:
        text = write(changes, rows)
    else:
        between = "; " if form == "lines" else ", "
        text = between.join([write(changes[:_FIRST], rows), "...", write(changes[-_LAST:], rows)])
    return text if len(text) <= LONGEST else None


def only_says(trace: Trace, answer: str | None) -> bool:
    """Whether all that a trace tells is the value that the next line states: whoever writes that has written the
    answer."""
    return answer is not None and all(_value(change.value) == _value(answer) for change in trace.changes)


def _value(text: str) -> tuple[str, object]:
    """A value to compare with others by, `1` not being `True`."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return "text", text
    return type(value).__name__, value
