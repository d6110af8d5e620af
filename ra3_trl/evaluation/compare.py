"""Runs of `ra3 evaluate` side by side: what each reached, and how far each is from the first, problem by problem."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .passk import bootstrap_interval, paired_interval, pass_at_k


_COPIED = ("num_samples", "verdicts", "forgeable", "think_rate", "latents_per_sample", "tokens_per_sample", "finished")
_OF_THINKING = ("think", "threshold", "num_samples")  # what is compared may think otherwise or be drawn more often


def check_same_problems(tasks: Mapping[str, str], problems: Mapping[str, Iterable[str]]) -> None:
    """Refuses runs that can't be compared.

    Args:
        tasks (`Mapping[str, str]`):
            Name of each run's task.
        problems (`Mapping[str, Iterable[str]]`):
            Ids of each run's problems.

    Raises:
        `ValueError`: for runs of different tasks or problems, naming them.
    """
    first = next(iter(tasks))
    wanted = set(problems[first])
    for name, task in tasks.items():
        if task != tasks[first]:
            raise ValueError(f"{first!r} is of the task {tasks[first]!r} and {name!r} of {task!r}; compare one task.")
        has = set(problems[name])
        for here, there, missing in ((name, first, wanted - has), (first, name, has - wanted)):
            if missing:
                raise ValueError(
                    f"{here!r} has no results for {_some(missing)}, which {there!r} has; evaluate both on the same "
                    "problems (`max_tasks`)."
                )


def _some(ids: set[str]) -> str:
    shown = ", ".join(map(repr, sorted(ids)[:3]))
    return f"{len(ids)} of the problems ({shown}{', ...' if len(ids) > 3 else ''})"


def common_ks(runs: Mapping[str, Mapping[str, Any]], ks: Sequence[int] | None = None) -> list[int]:
    """Those `k` for which pass@k can be told for all runs.

    Args:
        runs (`Mapping[str, Mapping]`):
            What `ra3 evaluate` wrote for each.
        ks (`Sequence[int]`, *optional*):
            Those that are wanted; `None` takes those that all runs have.

    Raises:
        `ValueError`: if a run has too few samples for one that is wanted, or the runs have none in common.
    """
    if ks is None:
        found = set.intersection(*({int(k) for k in run["pass@k"]} for run in runs.values()))
        if not found:
            have = ", ".join(f"{name!r} {'/'.join(run['pass@k'])}" for name, run in runs.items())
            raise ValueError(f"no k of pass@k is common to all ({have}); say which by `k`.")
        return sorted(found)
    for name, run in runs.items():
        few = min(len(problem["verdict"]) for problem in run["problems"].values())
        if max(ks) > few:
            raise ValueError(f"`k` is {max(ks)}, but {name!r} has {few} samples of a problem; lower `k`.")
    return sorted(set(ks))


def sampling_notes(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What, besides thinking and the number of samples, makes a run's samples others than the first's; a sentence
    each."""
    notes = []
    first, *others = ((name, _sampling(run)) for name, run in runs.items())
    for name, settings in (first, *others):
        if settings is None:
            notes.append(f"{name} was judged from a file of samples; how they were drawn is not known.")
    for name, settings in others:
        if first[1] is None or settings is None:
            continue
        names = sorted(key for key in {*first[1], *settings} if first[1].get(key) != settings.get(key))
        differ = [f"`{key}` is {first[1].get(key)!r} for {first[0]} and {settings.get(key)!r}" for key in names]
        if differ:
            notes.append(f"{name} was sampled with other settings: {', '.join(differ)} for {name}.")
    return notes


def _sampling(run: Mapping[str, Any]) -> dict[str, Any] | None:
    about = run.get("run", {})
    if "settings" not in about:
        return None
    drawn = {key: value for key, value in about["settings"].items() if key not in _OF_THINKING}
    return drawn | {key: about.get(key) for key in ("form", "dtype")}


def compare_runs(runs: Mapping[str, Mapping[str, Any]], ks: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Numbers of each run, and their distance from the first's.

    Args:
        runs (`Mapping[str, Mapping]`):
            What `ra3 evaluate` wrote for each, of the same problems; the others are compared with the first.
        ks (`Sequence[int]`):
            For which pass@k is estimated.

    Returns:
        `dict[str, dict[str, Any]]`: for each run `pass@k` by k with `value`, `low` and `high` (95 % bootstrap interval
        over problems) and, but for the first, `difference` with the same three (the interval is paired: both over the
        same drawn problems); `plus_pass@k` likewise if all have it; `think`, counts of verdicts, and means.
    """
    first = next(iter(runs))
    found: dict[str, dict[str, Any]] = {name: {} for name in runs}
    for kind in ("verdict", "plus_verdict"):
        if not all(kind in problem for run in runs.values() for problem in run["problems"].values()):
            continue
        for k in ks:
            values = {name: _of_problems(run, kind, k, runs[first]["problems"]) for name, run in runs.items()}
            for name, row in values.items():
                number = _with_interval(row.mean(), bootstrap_interval(row))
                if name != first:
                    paired = paired_interval(values[first], row)
                    number["difference"] = _with_interval(row.mean() - values[first].mean(), paired)
                found[name].setdefault(f"{kind.removesuffix('verdict')}pass@k", {})[str(k)] = number
    for name, run in runs.items():
        found[name]["think"] = run.get("run", {}).get("settings", {}).get("think")
        found[name] |= {key: run[key] for key in _COPIED if key in run}
    return found


def _of_problems(run: Mapping[str, Any], kind: str, k: int, order: Iterable[str]) -> np.ndarray:
    """pass@k of each problem, `[problems]`."""
    verdicts = [run["problems"][task_id][kind] for task_id in order]
    return np.array([pass_at_k(len(of_task), of_task.count("passed"), k) for of_task in verdicts])


def _with_interval(value: float, interval: tuple[float, float]) -> dict[str, float]:
    return {"value": float(value), "low": interval[0], "high": interval[1]}
