"""From samples to numbers: verdicts, pass@k with intervals, and what thinking cost."""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from ..files import read_versioned, require_form
from ..sandbox import VERDICTS, Judge, Result
from ..segmentation import count_code_lines, own_line_comments
from .passk import pass_at_k, share_interval
from .samples import Sample
from .tasks import Task


VERSION, RESULTS = 1, "results.json"
Row = dict[str, Any]
Judged = tuple[
    Row, Future[Result], Future[Result] | None
]  # of a sample: its row, verdicts of the tests, of EvalPlus's
_KINDS = ("verdict", "plus_verdict")
_MEANS = {"num_samples": int} | dict.fromkeys(
    ("forgeable", "think_rate", "latents_per_sample", "tokens_per_sample", "finished"), float
)
_FORM = {
    "task": str, "run": dict[str, Any], "problems": dict[str, dict[str, Any]], "pass@k": dict[str, dict[str, Any]],
    "verdicts": dict[str, int],
}  # fmt: skip
_RUN = {"settings": dict[str, Any], "limits": dict[str, Any] | None, "tasks": str | None, "weights": str | None}
_SETTINGS = {"think": str | None}
_LIMITS = {"seconds": float, "memory_mb": float}


def submit(judge: Judge, task: Task, sample: Sample, **facts: Any) -> Judged:
    """Has a sample judged, while others are drawn; `facts`, such as its `tokens`, stand in its row."""
    program = sample.program(task)
    begin = 0 if sample.whole else len(task.prompt)
    row = {"task_id": task.task_id, **facts, "latents": len(own_line_comments(program, begin))}
    row["lines"] = count_code_lines(program, begin)
    plus = None if task.plus is None else judge.submit(task.plus, program)
    return row, judge.submit(task.problem, program), plus


def wait_for(judged: Judged) -> Row:
    """The row of a sample, with its verdict as it comes."""
    row, base, plus = judged
    result = base.result()
    row |= {"verdict": result.verdict, "forgeable": result.forgeable}
    if plus is not None:  # what fails the base tests fails
        row["plus_verdict"] = plus.result().verdict if result.verdict == "passed" else result.verdict
    return row


def check_k(ks: Sequence[int], num_samples: int) -> None:
    """Refuses a k for which there are too few samples.

    Raises:
        `ValueError`: for no k, one below 1, or one above `num_samples`.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"`k` is {list(ks)}; give numbers from 1.")
    if max(ks) > num_samples:
        raise ValueError(
            f"`k` is {max(ks)} and `num_samples` {num_samples}; pass@k needs at least k samples of each task."
        )


def summarise(rows: Sequence[Row], ks: Sequence[int]) -> dict[str, Any]:
    """Sums up the rows of [`wait_for`]: what [`evaluate_passk`] returns but for `run`. `num_samples` is the smallest
    number of samples of a problem."""
    by_task: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_task[row["task_id"]].append(row)
    columns: list[str] = [
        name for name in ("verdict", "plus_verdict", "tokens", "latents", "lines") if name in rows[0]
    ]
    problems = {task: {name: [row[name] for row in of_task] for name in columns} for task, of_task in by_task.items()}
    results: dict[str, Any] = {"num_tasks": len(problems), "num_samples": min(map(len, by_task.values()))}
    for kind in columns[: 2 if "plus_verdict" in columns else 1]:
        name = kind.removesuffix("verdict")
        values = {k: problem_values(problems, kind, k) for k in ks}
        results[f"{name}pass@k"] = {
            str(k): with_interval(row.mean(), share_interval(row)) for k, row in values.items()
        }
        results[f"{name}verdicts"] = dict(Counter(row[kind] for row in rows).most_common())
    total = {name: sum(row.get(name, 0) for row in rows) for name in ("forgeable", "latents", "lines")}
    results |= {
        "forgeable": total["forgeable"],
        "think_rate": total["latents"] / max(1, total["lines"]),
        "latents_per_sample": total["latents"] / len(rows),
    }
    if "tokens" in columns:  # samples from elsewhere do not say how many they took
        results["tokens_per_sample"] = sum(row["tokens"] for row in rows) / len(rows)
        results["finished"] = sum(row["finished"] for row in rows) / len(rows)
    return results | {"problems": problems}


def problem_values(
    problems: Mapping[str, Mapping[str, Any]], kind: str, k: int, order: Iterable[str] | None = None
) -> np.ndarray:
    """pass@k of each problem by its verdicts of a kind, `[problems]`, in the order of ids that is given."""
    verdicts = [problems[task_id][kind] for task_id in (problems if order is None else order)]
    return np.array([pass_at_k(len(of_task), of_task.count("passed"), k) for of_task in verdicts])


def with_interval(value: float, interval: tuple[float, float]) -> dict[str, float]:
    """An estimate as results.json and compare.json hold it."""
    return {"value": float(value), "low": interval[0], "high": interval[1]}


def write_results(results: Mapping[str, Any], folder: Path) -> None:
    """Writes `results.json`, whole or not at all."""
    aside = folder / f".{RESULTS}"
    aside.write_text(json.dumps({"version": VERSION, **results}, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, folder / RESULTS)


def read_results(folder: str | Path) -> dict[str, Any]:
    """Reads `results.json` of a folder.

    Raises:
        `ValueError`: if it is missing, damaged or of a newer version.
    """
    path = Path(folder) / RESULTS
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} holds no {RESULTS}; give a folder that `ra3 evaluate` wrote.")
    with read_versioned(path, str(folder), VERSION, "run `ra3 evaluate` again") as results:
        results.setdefault("run", {})
        _require_form(results)
    return results


def _require_form(results: dict[str, Any]) -> None:
    """
    Raises:
        `KeyError`, `TypeError`: for what `ra3 evaluate` does not write.
    """
    require_form(results, _FORM)
    require_form(results, {name: hint for name, hint in _MEANS.items() if name in results})
    run, problems = results["run"], results["problems"]
    for place, form in ((run, _RUN), (run.get("settings", {}), _SETTINGS), (run.get("limits") or {}, _LIMITS)):
        require_form(place, {name: hint for name, hint in form.items() if name in place or form is _LIMITS and place})
    verdicts = []  # of each problem, by the kinds of tests that it has
    for of_task in problems.values():
        require_form(of_task, {kind: list[str] for kind in _KINDS if kind == "verdict" or kind in of_task})
        verdicts.append([of_task[kind] for kind in _KINDS if kind in of_task])
    numbers = [row["value"] for name in ("pass@k", "plus_pass@k") for row in results.get(name, {}).values()]
    numbers += [results[name] for name in _MEANS if name in results]
    right = {
        "task": re.fullmatch(r"[^/\\\0-\x1f]{1,200}", results["task"]),  # a folder is called by it
        "think": run.get("settings", {}).get("think") in (None, "auto", "always", "never"),
        "problems": problems
        and all(rows[0] and len({*map(len, rows)}) == 1 and {*sum(rows, [])} <= {*VERDICTS} for rows in verdicts),
        "verdicts": set(results["verdicts"]) <= set(VERDICTS),
        "pass@k": results["pass@k"] and all(re.fullmatch("[1-9][0-9]{0,8}", k) for k in results["pass@k"]),
        "numbers": all(abs(value) < 1e30 for value in numbers),
    }  # fmt: skip
    if wrong := [name for name, holds in right.items() if not holds]:
        raise TypeError(f"`{wrong[0]}` is not what it was")
