"""The assertion that a model wrote: what it states, whether that is right, and what the sandbox says of it."""

from __future__ import annotations

import ast
import asyncio
import os
from collections.abc import Sequence
from typing import Any

from ra3_trl.sandbox import Judge, Problem

from ..traces import ASSERTION


_NOT_LITERAL = (SyntaxError, ValueError, TypeError, MemoryError, RecursionError)
_judges: dict[int, Judge] = {}  # by process


def stated_value(written: str) -> str | None:
    """The text behind `assert result ==` in the first line that begins so; `None` where none does."""
    lines = (line for line in written.split("\n") if line.startswith(f"{ASSERTION} "))
    return next((line.removeprefix(f"{ASSERTION} ").strip() for line in lines), None)


def literal(text: str | None) -> tuple[bool, Any]:
    """Whether the text is a plain value, and that value."""
    try:
        return (False, None) if text is None else (True, ast.literal_eval(text))
    except _NOT_LITERAL:
        return False, None


def is_right(written: str, answer: str) -> bool:
    """Whether the first assertion that was written states this value."""
    (there, value), (_, right) = literal(stated_value(written)), literal(answer)
    return there and type(value) is type(right) and value == right


def judge() -> Judge:
    """The judge of this process, begun when it is first asked for: a forked one must not share its parent's."""
    if os.getpid() not in _judges:
        _judges[os.getpid()] = Judge()
    return _judges[os.getpid()]


async def assertion_reward(
    completions: Sequence[str], program: Sequence[str], opening: Sequence[str], **kwargs: Any
) -> list[float]:
    """Gives 1.0 where the program passes the first assertion that a completion states, by the sandbox's verdict.

    Only an assertion of a plain value counts: `assert result == result` holds and says nothing. `program` and
    `opening` are columns: what stands before, and what of the assertion or comment was put there.
    """
    futures = []
    for text, before, said in zip(completions, program, opening, strict=True):
        value = stated_value(said + text)
        problem = Problem(tests=(f"{ASSERTION} {value}",)) if literal(value)[0] else None
        futures.append(None if problem is None else asyncio.wrap_future(judge().submit(problem, before)))
    return [0.0 if future is None else float((await future).verdict == "passed") for future in futures]
