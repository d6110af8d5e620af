"""MBPP's functions as output prediction: a call, and the assertion about its result.

def f(n):
    ...
result = f(3)
# a = 4, b = 8          (the trace, in annotated text)
assert result == 7
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ra3_trl.policy import Source
from ra3_trl.policy.traces import TraceAnnotator
from ra3_trl.sandbox import Judge, Problem

from ..traces import ASSERTION, mbpp_rows, stated


# The published splits, by `task_id`; 1 to 10 are for prompts.
SPLITS = {"train": range(601, 975), "validation": range(511, 601), "test": range(11, 511)}
LONGEST = 900  # characters of a program, so that it is one chunk with its thought


@dataclass(frozen=True)
class ColdTask:
    """A program up to its assertion, the value that is right there, and the true trace as a comment, if it has one."""

    prompt: str
    answer: str
    trace: str = ""

    @property
    def text(self) -> str:
        """The whole program."""
        return f"{self.prompt}{ASSERTION} {self.answer}\n"


def cold_tasks(split: str, path: str | None = None, traced: bool = False, checked: bool = False) -> list[ColdTask]:
    """One task for each assertion of a split's functions, in their order; with their traces if asked for. With
    `checked` only those whose value is what running the function gives."""
    tasks = [
        ColdTask(f"{code}\n\nresult = {said[0]}\n", said[1])
        for row in mbpp_rows(path)
        if row["task_id"] in SPLITS[split]
        for code in [_code(row)]
        for said in map(stated, row["test_list"])
        if said is not None and len(code) + len(said[0]) + len(said[1]) < LONGEST
    ]
    tasks = [task for task, holds in zip(tasks, hold(tasks), strict=True) if holds] if checked else tasks
    return with_traces(tasks) if traced else tasks


def hold(tasks: Sequence[ColdTask]) -> list[bool]:
    """Whether each task's assertion holds, by the sandbox's verdict."""
    with Judge() as judge:
        found = [judge.submit(Problem(tests=(f"{ASSERTION} {task.answer}",)), task.prompt) for task in tasks]
        return [result.result().verdict == "passed" for result in found]


def _code(row: dict[str, Any]) -> str:
    setup = row["test_setup_code"].strip()
    code = f"{row['code'].rstrip()}\n\n{setup}" if setup else row["code"].rstrip()
    return "\n".join(line.rstrip() for line in code.splitlines())


def with_traces(tasks: Sequence[ColdTask]) -> list[ColdTask]:
    """The tasks, each with the comment that the annotator would write before its assertion."""
    annotator = TraceAnnotator()
    try:
        proposed = annotator.propose([Source(task.text) for task in tasks])
    finally:
        annotator.close()
    said = [next((comment.text for comment in one.comments), "") for one in proposed]
    return [ColdTask(t.prompt, t.answer, f"#{text}" if text else "") for t, text in zip(tasks, said, strict=True)]
