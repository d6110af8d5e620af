"""Checkpoints side by side: what each reached, and how far each is from the first, problem by problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import fingerprint
from .passk import paired_interval, share_interval
from .results import RESULTS, check_k, problem_values, read_results, with_interval
from .tasks import HUB, Benchmark


_COPIED = ("num_samples", "verdicts", "forgeable", "think_rate", "latents_per_sample", "tokens_per_sample", "finished")
_OF_THINKING = ("think", "threshold", "num_samples")  # what is compared may think otherwise or be drawn more often
_WEIGHTS = ("config.json", "adapter_config.json")


# ---- what is compared ----


@dataclass(frozen=True)
class Entrant:
    """One of those compared: `results` of a folder that was given, or else a checkpoint at `place`."""

    name: str
    place: str
    results: dict[str, Any] | None
    weights: str | None  # the checkpoint's folder or id; `None` where what was evaluated is not at hand


def read_entrants(places: Sequence[str], names: Sequence[str] | None = None) -> list[Entrant]:
    """Finds out what stands at each place, a checkpoint or a folder that `ra3 evaluate` wrote; nothing big is loaded.

    Raises:
        `ValueError`: for fewer than two, names that do not fit, and folders that hold neither weights nor results.
    """
    if len(places) < 2:
        raise ValueError(f"{places[0]!r} is all there is to compare; give two or more.")
    if names is not None and len(names) != len(places):
        raise ValueError(f"`names` has {len(names)} names for {len(places)} checkpoints; give each one.")
    entrants: dict[str, Entrant] = {}
    for i, place in enumerate(places):
        entrant = _entrant(place, names[i] if names else None)
        if entrant.name in ("", ".", "..") or set(entrant.name) & set("/\\\0"):  # it becomes a folder's
            raise ValueError(
                f"`names` has {entrant.name!r}, which is no folder's name; use letters, digits and dashes."
            )
        if entrant.name in entrants:
            raise ValueError(f"two are called {entrant.name!r}; tell them apart by `--names`.")
        entrants[entrant.name] = entrant
    return list(entrants.values())


def _entrant(place: str, name: str | None) -> Entrant:
    folder = Path(place)
    if folder.is_file():
        raise ValueError(f"{place!r} is a file; give a checkpoint, or a folder that `ra3 evaluate` wrote.")
    base = folder.resolve().name if folder.is_dir() else place.rstrip("/").split("/")[-1]
    if not folder.is_dir() or any((folder / filename).is_file() for filename in _WEIGHTS):
        return Entrant(name or base, place, None, place)
    if not (folder / RESULTS).is_file():
        raise ValueError(
            f"{place!r} is a folder with neither config.json (a checkpoint) nor {RESULTS} (of `ra3 evaluate`)."
        )
    results = read_results(folder)
    checkpoint = results["run"].get("checkpoint")  # of a path its last part: it may be another one of that name
    here = isinstance(checkpoint, str) and _holds(Path(checkpoint), results["run"].get("weights"))
    name = name or base.removesuffix(f"-{results['task']}")
    return Entrant(name, place, results, checkpoint if here else None)


def _holds(folder: Path, weights: str | None) -> bool:
    """Whether a folder has the weights of this fingerprint."""
    try:
        return folder.is_dir() and fingerprint(folder) == weights
    except (ValueError, OSError):  # it has none, or what was read is no folder's name
        return False


def task_of(entrants: Sequence[Entrant], task: str | None) -> str | None:
    """The task to load: the one asked for, else that of the results, else `"humaneval"`; `None` where a file would be
    needed and nothing is to be evaluated (`ValueError` if something is)."""
    if task is not None:
        return task
    of_results = next((entrant.results["task"] for entrant in entrants if entrant.results is not None), "humaneval")
    if of_results in HUB:
        return of_results
    if any(entrant.results is None for entrant in entrants):
        raise ValueError(f"`task` is missing; the results are of {of_results!r}, so give the file of its problems.")
    return None


def choose_ks(
    runs: Mapping[str, Mapping[str, Any]], ks: Sequence[int] | None = None, num_samples: int | None = None
) -> list[int]:
    """The k of pass@k that can be estimated for all: those asked for, else those that all results have, else 1.

    `num_samples` are those of each task that checkpoints will have, `None` where none is to be evaluated.

    Raises:
        `ValueError`: if one of them has too few samples, or the results have no k in common.
    """
    if ks is None and runs:
        common = sorted(set.intersection(*({int(k) for k in run["pass@k"]} for run in runs.values())))
        if not common:
            have = ", ".join(f"{name!r} {'/'.join(run['pass@k'])}" for name, run in runs.items())
            raise ValueError(f"no k of pass@k is common to all ({have}); say which by `k`.")
        ks = [k for k in common if num_samples is None or k <= num_samples] or common
    ks = [1] if ks is None else sorted(set(ks))
    check_k(ks, max(ks) if num_samples is None else num_samples)
    for name, run in runs.items():
        few = min(len(problem["verdict"]) for problem in run["problems"].values())
        if max(ks) > few:
            raise ValueError(f"`k` is {max(ks)}, but {name!r} has {few} samples of a problem; lower `k`.")
    return ks


def match_problems(entrants: Sequence[Entrant], benchmark: Benchmark | None = None) -> Benchmark | None:
    """Refuses entrants that can't be compared; returns the benchmark, of the problems that are compared.

    Raises:
        `ValueError`: for different tasks or problems, or other prompts or tests of them, naming them.
    """
    problems = {
        entrant.name: (run["task"], frozenset(run["problems"]), run["run"].get("tasks"))
        for entrant in entrants
        if (run := entrant.results) is not None
    }
    if benchmark is not None:
        drawn = [entrant.name for entrant in entrants if entrant.results is None]
        if not drawn:  # it is loaded for its solutions alone, and may have more problems than were evaluated
            benchmark = benchmark.only(next(iter(problems.values()))[1])
        to_draw = benchmark.name, frozenset(task.task_id for task in benchmark.tasks), benchmark.fingerprint
        problems |= dict.fromkeys(drawn or [f"`task` {benchmark.name}"], to_draw)
    (first, (task, ids, tests)), *others = problems.items()
    for name, (other_task, other_ids, other_tests) in others:
        comparable = None not in (tests, other_tests)  # results of before do not say it
        same = comparable and tests == other_tests
        if task != other_task and not same:  # the same file may have had another name
            raise ValueError(f"{first!r} is of the task {task!r} and {name!r} of {other_task!r}; compare one task.")
        for here, there, missing in ((name, first, ids - other_ids), (first, name, other_ids - ids)):
            if missing:
                shown = ", ".join(map(repr, sorted(missing)[:3])) + (", ..." if len(missing) > 3 else "")
                raise ValueError(
                    f"{here!r} has no results for {len(missing)} of the problems ({shown}), which {there!r} has; "
                    "evaluate both on the same problems (`max_tasks`)."
                )
        if comparable and not same:
            raise ValueError(
                f"{first!r} and {name!r} are of problems of the same ids with other prompts or tests; evaluate both "
                "on the same `task_file`."
            )
    return benchmark


# ---- numbers ----


def compare_runs(runs: Mapping[str, Mapping[str, Any]], ks: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Measures each run, and its distance from the first, which is of the same problems.

    Returns:
        `dict[str, dict[str, Any]]`: for each run `pass@k` by k with `value`, `low` and `high` (95 % interval by Wilson
        over problems) and, but for the first, `difference` with the same three (the interval is paired: both over the
        same drawn problems); `plus_pass@k` likewise if all have it; `think`, counts of verdicts, and means.
    """
    first = next(iter(runs))
    models: dict[str, dict[str, Any]] = {name: {} for name in runs}
    for kind in ("verdict", "plus_verdict"):
        if not all(kind in problem for run in runs.values() for problem in run["problems"].values()):
            continue
        for k in ks:
            # By the first's order of problems: pairs must be of one problem.
            order = runs[first]["problems"]
            values = {name: problem_values(run["problems"], kind, k, order) for name, run in runs.items()}
            for name, row in values.items():
                number: dict[str, Any] = with_interval(row.mean(), share_interval(row))
                if name != first:
                    paired = paired_interval(values[first], row)
                    number["difference"] = with_interval(row.mean() - values[first].mean(), paired)
                models[name].setdefault(f"{kind.removesuffix('verdict')}pass@k", {})[str(k)] = number
    for name, run in runs.items():
        models[name]["think"] = run["run"].get("settings", {}).get("think")
        models[name] |= {key: run[key] for key in _COPIED if key in run}
    return models


def sampling_notes(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Says what, besides thinking and the number of samples, makes a run's samples or verdicts others than the
    first's; a sentence each."""
    sampled, notes = {}, []
    for name, run in runs.items():
        about = run["run"]
        if "settings" in about:
            settings = {key: value for key, value in about["settings"].items() if key not in _OF_THINKING}
            sampled[name] = settings | {key: about.get(key) for key in ("form", "dtype")}
            sampled[name]["backend"] = about.get("backend", "transformers")
        else:
            notes.append(f"{name} was judged from a file of samples; how they were drawn is not known.")
    first, *others = runs
    for name in others:
        if first in sampled and name in sampled:
            here, there = sampled[first], sampled[name]
            keys = sorted(key for key in {*here, *there} if here.get(key) != there.get(key))
            differ = [f"`{key}` is {here.get(key)!r} for {first} and {there.get(key)!r}" for key in keys]
            notes += [f"{name} was sampled with other settings: {', '.join(differ)} for {name}."] if differ else []
    for name in others:
        limits = [runs[run]["run"].get("limits") for run in (first, name)]
        if limits[0] != limits[1]:
            words = [f"{of['seconds']:g} s and {of['memory_mb']} MiB" if of else "unknown limits" for of in limits]
            notes.append(f"Programs of {first} ran under {words[0]}, those of {name} under {words[1]}.")
    return notes
