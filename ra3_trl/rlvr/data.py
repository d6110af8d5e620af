"""Rows for RLVR: tasks of benchmarks as rows, and checks of rows before anything is trained on them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset, load_dataset

from ..evaluation import Task, load_benchmark, render_prompt, stop_strings
from ..evaluation.tasks import HUB
from ..sandbox import Problem
from .rewards import TESTS, problem_columns


Rows: TypeAlias = Dataset | IterableDataset
_MBPP_TRAIN, _MBPP_VALIDATION, _MBPP_TEST = range(601, 975), range(511, 601), range(11, 511)  # as published


@dataclass(frozen=True)
class RLVRData:
    """Rows with a `prompt` and the columns that the rewards read.

    Args:
        train (`Dataset` or `IterableDataset`):
            Rows to train on.
        evaluation (`Dataset` or `IterableDataset`, *optional*):
            Rows to evaluate on.
        stop (`tuple[str]`, *optional*):
            Texts that end a completion.
    """

    train: Rows
    evaluation: Rows | None = None
    stop: tuple[str, ...] = ()


def load_tasks(task: str, task_file: str | None = None, allow_test_tasks: bool = False) -> RLVRData:
    """Loads tasks with the prompts and stops of `ra3 evaluate` (form `complete`), and EvalPlus's tests where there are
    any.

    Args:
        task (`str`), task_file (`str`, *optional*):
            As in [`~ra3_trl.evaluation.load_benchmark`]; of `"mbpp"` the training split, tasks 601 to 974, with the
            validation split to evaluate on.
        allow_test_tasks (`bool`, *optional*, defaults to `False`):
            Take MBPP's test split for training too.

    Raises:
        `ValueError`: for files that can't be read, or without any of MBPP's training tasks.
        `OSError`: if the Hub is needed and can't be reached.
    """
    if task != "mbpp":
        benchmark = load_benchmark(task, task_file)
        return RLVRData(_as_rows(benchmark.tasks), stop=stop_strings(benchmark.kind, "complete"))
    with tempfile.TemporaryDirectory() as folder:
        benchmark = load_benchmark(task_file or _published_mbpp(folder))  # a file's rows are all taken
    by_id = {task.task_id: task for task in benchmark.tasks}
    wanted = [*_MBPP_TRAIN, *(_MBPP_TEST if allow_test_tasks else ())]
    train, validation = (
        [by_id[name] for n in numbers if (name := f"Mbpp/{n}") in by_id] for numbers in (wanted, _MBPP_VALIDATION)
    )
    if not train:
        raise ValueError(
            f"`task_file` {task_file!r} has none of MBPP's training tasks, 601 to 974; pass a file that has them, or "
            "pass it as `task` to train on all that it has."
        )
    stop = stop_strings(benchmark.kind, "complete")
    return RLVRData(_as_rows(train), _as_rows(validation) if validation else None, stop)


def _published_mbpp(folder: str) -> str:
    """A file with MBPP's rows to train and to validate on."""
    path = str(Path(folder, "mbpp.jsonl"))
    try:
        load_dataset(HUB["mbpp"], "full", split="train+validation").to_json(path)
    except OSError as error:
        raise OSError(f"{HUB['mbpp']} can't be had from the Hub; pass a file by `--task_file`. ({error})") from error
    return path


def _as_rows(tasks: Sequence[Task]) -> Dataset:
    prompts = [{"task_id": task.task_id, "prompt": render_prompt(task, task.kind, "complete")} for task in tasks]
    return Dataset.from_list(
        [row | problem_columns(task.plus or task.problem) for row, task in zip(prompts, tasks, strict=True)]
    )


def check_rows(rows: Rows, executed_by: str | None, allow_test_tasks: bool) -> Rows:
    """Refuses rows that can't be trained on, and returns them; a stream's are checked as they come.

    `executed_by` names a reward that runs programs and so needs tests; `allow_test_tasks` lets tasks of HumanEval and
    of MBPP's test split pass.

    Raises:
        `ValueError`: for no rows, a row without a prompt, or without tests that can be read, or one for testing.
    """
    columns = rows.column_names or ()
    if columns and "prompt" not in columns:
        raise ValueError(f"the data has the columns {sorted(columns)}; GRPO needs a `prompt`.")
    if columns and executed_by and not set(TESTS) & set(columns):
        raise ValueError(
            f"the data has the columns {sorted(columns)}; {executed_by!r} needs `test` and `entry_point`, "
            "`test_list`, or `inputs` and `outputs`."
        )
    options = {"needs_tests": executed_by is not None, "allow_test_tasks": allow_test_tasks}
    if isinstance(rows, IterableDataset):
        return rows.map(_check_row, with_indices=True, fn_kwargs=options, features=rows.features)
    if not len(rows):
        raise ValueError("the data has no rows; give it at least one.")
    for i, row in enumerate(rows):
        _check_row(row, i, **options)
    return rows


def _check_row(row: dict[str, Any], i: int, needs_tests: bool, allow_test_tasks: bool) -> dict[str, Any]:
    """Returns `row` as it is."""
    if not allow_test_tasks and is_test_task(row):
        raise ValueError(
            f"row {i} of the data is the task {row['task_id']!r}, which by its id is one of HumanEval or of MBPP's "
            "test split; leave it out, give tasks of your own other ids, or set `allow_test_tasks`."
        )
    if not row.get("prompt"):
        raise ValueError(f"row {i} of the data has no `prompt`; give it one, or leave the row out.")
    if needs_tests:
        try:
            Problem.from_row(row)
        except ValueError as error:
            raise ValueError(f"row {i} of the data: {error}") from error
    return row


def is_test_task(row: dict[str, Any]) -> bool:
    """Whether a row by its `task_id` is one of HumanEval, or of MBPP's test split; other copies are not known."""
    kind, _, number = str(row.get("task_id")).rpartition("/")
    mbpp = kind == "Mbpp" or (not kind and row.get("test_list") is not None)
    return kind == "HumanEval" or (mbpp and number.isdecimal() and int(number) in _MBPP_TEST)
