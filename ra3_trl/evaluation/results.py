"""From samples to numbers: verdicts, pass@k with intervals, and what thinking cost."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from ..files import read_versioned
from ..sandbox import VERDICTS, Judge, Result
from ..segmentation import count_code_lines, own_line_comments
from .passk import bootstrap_interval, pass_at_k
from .samples import Sample
from .tasks import Benchmark


VERSION, RESULTS = 1, "results.json"
_MEANS = ("num_samples", "forgeable", "think_rate", "latents_per_sample", "tokens_per_sample", "finished")


class Scorer:
    """Judges samples while others are drawn, and sums up.

    Args:
        benchmark ([`Benchmark`]):
            The tasks.
        judge ([`~ra3_trl.sandbox.Judge`]):
            Where programs run.
    """

    def __init__(self, benchmark: Benchmark, judge: Judge):
        self.tasks = {task.task_id: task for task in benchmark.tasks}
        self.judge = judge
        self._line: list[tuple[dict[str, Any], Future[Result], Future[Result] | None]] = []

    def add(self, task_id: str, sample: Sample, **facts: Any) -> None:
        """Puts a sample in line; `facts` are what is known of it, such as its `tokens`."""
        task = self.tasks[task_id]
        program = sample.program(task)
        begin = 0 if sample.whole else len(task.prompt)
        facts = {"task_id": task_id, **facts, "latents": len(own_line_comments(program, begin))}
        facts["lines"] = count_code_lines(program, begin)
        plus = None if task.plus is None else self.judge.submit(task.plus, program)
        self._line.append((facts, self.judge.submit(task.problem, program), plus))

    def __len__(self) -> int:
        return len(self._line)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each sample, in the order they came in, as its verdict comes."""
        for facts, future, plus in self._line:
            result = future.result()
            found = {**facts, "verdict": result.verdict, "forgeable": result.forgeable}
            if plus is not None:  # what fails the base tests fails
                found["plus_verdict"] = plus.result().verdict if result.verdict == "passed" else result.verdict
            yield found


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


def summarise(rows: Sequence[dict[str, Any]], ks: Sequence[int]) -> dict[str, Any]:
    """Numbers of a run.

    Args:
        rows (`Sequence[dict]`):
            Rows of [`Scorer.rows`].
        ks (`Sequence[int]`):
            For which pass@k is estimated.

    Returns:
        `dict[str, Any]`: `pass@k` by k, each with `value`, `low` and `high` (95 % bootstrap interval over problems)
        and, where there are EvalPlus's tests, `plus_pass@k`; `num_samples`, the smallest number of samples of a
        problem; counts of verdicts; means over samples of tokens, latents
        and `think_rate` (latents for each line of code); `problems` with the numbers of each.
    """
    problems: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        problems[row["task_id"]].append(row)
    kinds = ["verdict", *(["plus_verdict"] if "plus_verdict" in rows[0] else [])]
    found: dict[str, Any] = {"num_tasks": len(problems), "num_samples": min(map(len, problems.values()))}
    for kind in kinds:
        name = kind.removesuffix("verdict")
        passed = {task: [row[kind] == "passed" for row in of_task] for task, of_task in problems.items()}
        found[f"{name}pass@k"] = {str(k): _estimate(list(passed.values()), k) for k in ks}
        found[f"{name}verdicts"] = dict(Counter(row[kind] for row in rows).most_common())
    lines = sum(row["lines"] for row in rows)
    found |= {
        "forgeable": sum(row["forgeable"] for row in rows),
        "think_rate": sum(row["latents"] for row in rows) / max(1, lines),
        "latents_per_sample": sum(row["latents"] for row in rows) / len(rows),
    }
    if all("tokens" in row for row in rows):
        found["tokens_per_sample"] = sum(row["tokens"] for row in rows) / len(rows)
        found["finished"] = sum(row["finished"] for row in rows) / len(rows)
    columns = [*kinds, "tokens", "latents", "lines"]
    found["problems"] = {
        task: {name: [row[name] for row in of_task] for name in columns if name in of_task[0]}
        for task, of_task in problems.items()
    }
    return found


def _estimate(passed: Sequence[Sequence[bool]], k: int) -> dict[str, float]:
    values = np.array([pass_at_k(len(of_task), sum(of_task), k) for of_task in passed])
    low, high = bootstrap_interval(values)
    return {"value": float(values.mean()), "low": low, "high": high}


def write_results(results: dict[str, Any], folder: Path) -> Path:
    """Writes `results.json`, whole or not at all."""
    path = folder / RESULTS
    aside = folder / f".{RESULTS}"
    aside.write_text(json.dumps({"version": VERSION, **results}, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)
    return path


def read_results(folder: str | Path) -> dict[str, Any]:
    """`results.json` of a folder.

    Raises:
        `ValueError`: if it is missing, damaged or of a newer version.
    """
    path = Path(folder) / RESULTS
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} holds no {RESULTS}; give a folder that `ra3 evaluate` wrote.")
    with read_versioned(path, str(folder), VERSION, "run `ra3 evaluate` again") as found:
        found.setdefault("run", {})
        _require_form(found)
    return found


def _require_form(found: dict[str, Any]) -> None:
    """
    Raises:
        `KeyError`, `TypeError`: for what `ra3 evaluate` does not write.
    """
    problems, run = found["problems"], found["run"]
    kinds = "verdict", "plus_verdict"
    verdicts = [of_task[kind] for of_task in problems.values() for kind in kinds if kind in of_task]
    numbers = [one["value"] for name in ("pass@k", "plus_pass@k") for one in found.get(name, {}).values()]
    numbers += [found[name] for name in _MEANS if name in found] + list(found["verdicts"].values())
    right = {
        "task": isinstance(found["task"], str),
        "run": all(isinstance(one, dict) for one in (run, run.get("settings", {}), run.get("limits") or {})),
        "problems": problems and all("verdict" in of_task for of_task in problems.values())
        and all(isinstance(one, list) and one and set(one) <= set(VERDICTS) for one in verdicts),
        "pass@k": found["pass@k"] and all(k.isdecimal() and int(k) > 0 for k in found["pass@k"]),
        "numbers": all(isinstance(one, int | float) for one in numbers),
    }  # fmt: skip
    if wrong := [name for name, holds in right.items() if not holds]:
        raise TypeError(f"`{wrong[0]}` is not what it was")
