"""What runs changed, in numbers: held-out measures of the base and now, time, memory; for pages and terminals."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerState

from .charts import Measure, held_out_measures, number
from .runs import MIDTRAINING, TrainingRun


_ALSO_HELD_OUT = (
    Measure("eval_think_rate", "P(think)", ""),
    Measure("eval_gain", "gain of a latent", "nats", "higher is better"),
)
_OF_RLVR = (
    Measure("reward", "reward", "", "higher is better"),
    Measure("pass_rate", "share that passes", "", "higher is better"),
)
_NO_BASE = "the base was not evaluated"
_HOW_BASE = "  (`eval_on_start=True` evaluates the base before the first update.)"


@dataclass(frozen=True)
class Change:
    """A number of the base (`None`: not measured) and now."""

    measure: Measure
    base: float | None
    now: float

    @property
    def values(self) -> str:
        """`2.266 → 2.139`."""
        return f"{number(self.base, None)} → {number(self.now, None)}"


def changes_of(run: TrainingRun, now: int | None = None) -> list[Change]:
    """The first and last of what a run measured: of mid-training held-out numbers, where the first is the base's if it
    was evaluated before the first update; of RLVR those of its completions. The weights are those after update `now`,
    where these are not the last."""
    if run.kind == MIDTRAINING:
        measures: Sequence[Measure] = [*held_out_measures([run]), *_ALSO_HELD_OUT]
    else:
        measures = _OF_RLVR
    changes = []
    for measure in measures:
        if points := run.points(measure.key):
            first, last = min(points), now if now in points else max(points)
            known = run.kind != MIDTRAINING or first == 0
            changes.append(Change(measure, points[first] if known else None, points[last]))
    return changes


def seconds_of(log: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds that training took, as the log's summary says."""
    return next((float(entry["train_runtime"]) for entry in reversed(log) if "train_runtime" in entry), None)


def updates_of(log: Sequence[Mapping[str, Any]]) -> int:
    """The number of the last update in the log."""
    return max((int(entry["step"]) for entry in log if "step" in entry), default=0)


def duration(seconds: float | None) -> str:
    """`4.4 min`; a dash for what is not known."""
    if seconds is None:
        return "–"
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def size(count: float | None) -> str:
    """Bytes as `2.1 GB`; a dash for what is not known."""
    if count is None:
        return "–"
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def summary_rows(runs: Sequence[TrainingRun]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Rows of a table with a column for each run: what it began with, what it took, and what it changed."""
    changes = [{change.measure: change.values for change in changes_of(run)} for run in runs]
    rows = {
        "base": [str(run.facts.get("base") or "–") for run in runs],
        "updates": [f"{updates_of(run.log):,}" for run in runs],
        "time": [duration(seconds_of(run.log)) for run in runs],
        "memory at most": [size(run.facts.get("peak")) for run in runs],
    }
    for measure in dict.fromkeys(measure for of_run in changes for measure in of_run):
        name = measure.title + (f" ({measure.y_label})" if measure.y_label else "")
        rows[name] = [of_run.get(measure, "–") for of_run in changes]
    return [(name, [(value, "") for value in values]) for name, values in rows.items()]


def setting_rows(runs: Sequence[TrainingRun]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Rows of settings, a column for each run; those that differ stand first."""
    settings = [run.facts.get("settings", {}) for run in runs]
    names = list(dict.fromkeys(name for of_run in settings for name in of_run))
    rows = [(name, [("–" if name not in of else str(of[name]), "") for of in settings]) for name in names]
    return sorted(rows, key=lambda row: len(set(row[1])) > 1, reverse=True)


def run_names(runs: Sequence[TrainingRun]) -> list[str]:
    """What runs are called in tables: their labels, with a number where there are several of one."""
    labels = [run.label for run in runs]
    return [
        label if labels.count(label) == 1 else f"{label} {labels[:i].count(label) + 1}"
        for i, label in enumerate(labels)
    ]


def measured_after(state: TrainerState, best: bool) -> int:
    """The update whose weights a run ends with: the last, or that of the `best` checkpoint where it was loaded."""
    if best and state.best_model_checkpoint is not None:
        return int(state.best_model_checkpoint.rpartition("-")[2])
    return state.global_step


def evaluation_after(state: TrainerState, step: int) -> dict[str, float]:
    """What was measured after the update `step`, `{}` if nothing was."""
    entries = [entry for entry in state.log_history if entry["step"] == step]
    return {key: value for entry in entries for key, value in entry.items() if key.startswith("eval_")}


def peak_memory() -> int:
    """The most bytes that this process has held: of its accelerator, else of the machine."""
    if torch.cuda.is_available() and (of_device := torch.cuda.max_memory_allocated()):
        return of_device
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def summary_text(run: TrainingRun, seconds: float | None, peak: float | None, now: int | None = None) -> str:
    """The end of a run in words: base -> now, time and memory."""
    changes = changes_of(run, now)
    if run.kind == MIDTRAINING:
        head = "Held out, base -> now:" if changes else "Nothing was held out, so nothing says what the run changed."
    else:
        head = "First -> last update:"
    lines = [head] if changes or run.kind == MIDTRAINING else []
    for change in changes:
        base = _NO_BASE if change.base is None else f"{change.base:.3f}"
        about = f" ({change.measure.y_label})" if change.measure.y_label else ""
        lines.append(f"  {change.measure.title.removeprefix('Held-out ')}: {base} -> {change.now:.3f}{about}")
    if any(change.base is None for change in changes):
        lines.append(_HOW_BASE)
    lines.append(f"Took {duration(seconds)}, {size(peak)} of memory at most.")
    return "\n".join(lines)
