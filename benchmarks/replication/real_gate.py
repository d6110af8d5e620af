"""The experiments on a real checkpoint: does RA3 with the package's defaults get its comments right, and think there?

`real_gate`: the prepared checkpoint, next-token prediction and RA3 on the expert's programs without comments.

`real_gate_ablations`: these, and RA3 with one thing changed at a time. An arm more is a line of `ABLATIONS`: fields of
[`TraceMidRecipe`], with those of [`RA3Config`] under `settings`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from statistics import fmean
from time import perf_counter
from typing import Any

from ..common import say
from .real import midtrain, on_base, prepare
from .real_measure import measure
from .records import PreparedRecipe, TraceMeasureRecipe, TraceMeasures, TraceMidRecipe
from .store import Store


NTP_STEPS, E_STEPS, M_STEPS = 100, 40, 500
ABLATIONS: dict[str, dict[str, Any]] = {
    "elbo": {"settings": (("objective", "elbo"),)},
    "latents_4": {"settings": (("num_latents", 4),)},
    "everywhere": {"settings": (("boundary_selection", "random"),)},
    "no_exploration": {"settings": (("exploration", 0.0),)},
    "gate_head": {"settings": (("gate", "head"),)},
    "horizon_1": {"settings": (("horizon", 1),)},
    "shorter_latents": {"max_latent_length": 12},
    "no_penalty": {"settings": (("penalty", 0.0),)},
    "penalty_1": {"settings": (("penalty", 1.0),)},
    "shorter_m_phase": {"m_steps": 120},
    "hotter": {"settings": (("temperature", 1.3),)},
    "slower": {"settings": (("e_learning_rate", 1e-5),)},
    "ntp_as_long": {"e_steps": 0, "m_steps": E_STEPS + M_STEPS},
    "no_e_phase": {"e_steps": 0, "m_steps": E_STEPS + M_STEPS, "settings": (("annotation", "resample"),)},
}
_NUMBERS = tuple(entry.name for entry in fields(TraceMeasures) if entry.type == "float")


@dataclass(frozen=True)
class RealExperiment:
    """Arms on one prepared checkpoint.

    Args:
        base ([`PreparedRecipe`]):
            The checkpoint, the same for all seeds.
        arms (`dict[str, TraceMidRecipe | None]`):
            Mid-training of each arm, but for base, seed and defaults; `None` is the base itself.
        measure ([`TraceMeasureRecipe`]):
            What is measured of each arm, but for the checkpoint.
    """

    base: PreparedRecipe
    arms: dict[str, TraceMidRecipe | None]
    measure: TraceMeasureRecipe


def real_gate(ablations: bool = False, base: PreparedRecipe | None = None) -> RealExperiment:
    """The arms `base`, `ntp` and `ra3`, and with `ablations` also theirs."""
    base = base or PreparedRecipe()
    ntp = TraceMidRecipe(base, 0, m_steps=NTP_STEPS)
    ra3 = replace(ntp, e_steps=E_STEPS, m_steps=M_STEPS)
    changed = {name: replace(ra3, **changes) for name, changes in ABLATIONS.items()} if ablations else {}
    return RealExperiment(base, {"base": None, "ntp": ntp, "ra3": ra3, **changed}, TraceMeasureRecipe(base))


REAL_EXPERIMENTS: dict[str, Callable[[], RealExperiment]] = {
    "real_gate": real_gate,
    "real_gate_ablations": lambda: real_gate(ablations=True),
}


def run_real(store: Store, experiment: RealExperiment, seeds: int) -> dict[str, Any]:
    """Each arm's measures, means over seeds, with a row for each seed in `runs`."""
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in experiment.arms}
    for seed in range(seeds):
        for arm, recipe in experiment.arms.items():
            row = run_arm(store, experiment, recipe, seed)
            runs[arm].append(row)
            say(f"seed {seed} {arm}: " + ", ".join(f"{name} {row[name]:.3f}" for name in (*_NUMBERS, "seconds")))
    return {"seeds": seeds, **{arm: summary(rows) for arm, rows in runs.items()}}


def run_arm(store: Store, experiment: RealExperiment, recipe: TraceMidRecipe | None, seed: int) -> dict[str, Any]:
    """One arm on one seed: its measures, `seconds` of training and of measuring, and the training's `log`."""
    start = experiment.base if recipe is None else on_base(recipe, experiment.base, seed)
    training = prepare(store, start) if isinstance(start, PreparedRecipe) else midtrain(store, start)
    begin = perf_counter()
    measures = measure(store, replace(experiment.measure, start=start))
    return {"seed": seed, **asdict(measures), **training, "measure_seconds": perf_counter() - begin}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of the numbers over runs; the comment that stands out most is that of the run where it does most."""
    most = max((row["most_frequent"] for row in rows), key=lambda found: found["share"])
    means = {name: fmean(row[name] for row in rows) for name in (*_NUMBERS, "seconds")}
    return {**means, "most_frequent": most, "runs": rows}
