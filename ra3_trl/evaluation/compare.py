"""Runs of `ra3 evaluate` side by side: what each reached, and how far each is from the first, problem by problem."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .passk import bootstrap_interval, paired_interval, pass_at_k
from .tasks import Benchmark


_COPIED = ("num_samples", "verdicts", "forgeable", "think_rate", "latents_per_sample", "tokens_per_sample", "finished")
_OF_THINKING = ("think", "threshold", "num_samples")  # what is compared may think otherwise or be drawn more often


@dataclass(frozen=True)
class Problems:
    """Which problems a run is of.

    Args:
        task (`str`):
            What they are called together.
        ids (`frozenset[str]`):
            Their ids.
        fingerprint (`str`, *optional*):
            [`Benchmark`]'s, of prompts and tests; `None` where the run does not say it.
    """

    task: str
    ids: frozenset[str]
    fingerprint: str | None

    @classmethod
    def of_run(cls, run: Mapping[str, Any]) -> Problems:
        """Those of what `ra3 evaluate` wrote."""
        return cls(run["task"], frozenset(run["problems"]), run["run"].get("tasks"))

    @classmethod
    def of_benchmark(cls, benchmark: Benchmark) -> Problems:
        """Those of a benchmark."""
        return cls(benchmark.name, frozenset(task.task_id for task in benchmark.tasks), benchmark.fingerprint)


def check_same_problems(runs: Mapping[str, Problems]) -> None:
    """Refuses runs that can't be compared.

    Args:
        runs (`Mapping[str, Problems]`):
            The problems of each.

    Raises:
        `ValueError`: for runs of different tasks or problems, or other prompts or tests of them, naming them.
    """
    first = next(iter(runs))
    wanted = runs[first]
    for name, has in runs.items():
        known = wanted.fingerprint is not None and has.fingerprint is not None
        if has.task != wanted.task and not (known and has.fingerprint == wanted.fingerprint):
            raise ValueError(
                f"{first!r} is of the task {wanted.task!r} and {name!r} of {has.task!r}; compare one task."
            )
        for here, there, missing in ((name, first, wanted.ids - has.ids), (first, name, has.ids - wanted.ids)):
            if missing:
                raise ValueError(
                    f"{here!r} has no results for {_some(missing)}, which {there!r} has; evaluate both on the same "
                    "problems (`max_tasks`)."
                )
        if known and has.fingerprint != wanted.fingerprint:
            raise ValueError(
                f"{first!r} and {name!r} are of problems of the same ids with other prompts or tests; evaluate both "
                "on the same `task_file`."
            )


def _some(ids: frozenset[str]) -> str:
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
    """What, besides thinking and the number of samples, makes a run's samples or verdicts others than the first's; a
    sentence each."""
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
    limits = {name: run["run"].get("limits") for name, run in runs.items()}
    for name, _ in others:
        if limits[name] != limits[first[0]]:
            here, there = (_told(limits[one]) for one in (first[0], name))
            notes.append(f"Programs of {first[0]} ran under {here}, those of {name} under {there}.")
    return notes


def _told(limits: Mapping[str, Any] | None) -> str:
    return "unknown limits" if limits is None else f"{limits['seconds']:g} s and {limits['memory_mb']} MiB"


def _sampling(run: Mapping[str, Any]) -> dict[str, Any] | None:
    about = run["run"]
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
        found[name]["think"] = run["run"].get("settings", {}).get("think")
        found[name] |= {key: run[key] for key in _COPIED if key in run}
    return found


def _of_problems(run: Mapping[str, Any], kind: str, k: int, order: Iterable[str]) -> np.ndarray:
    """pass@k of each problem, `[problems]`."""
    verdicts = [run["problems"][task_id][kind] for task_id in order]
    return np.array([pass_at_k(len(of_task), of_task.count("passed"), k) for of_task in verdicts])


def _with_interval(value: float, interval: tuple[float, float]) -> dict[str, float]:
    return {"value": float(value), "low": interval[0], "high": interval[1]}
