"""The table: bases through the gate, arms for each seed, and rows of estimates."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ra3_trl.analysis import Estimate
from ra3_trl.testbed.corpus import boundaries

from ..common import say
from .base import GATE
from .measure import measure
from .records import SHARES, BaseRecipe, Curve, MeasureRecipe, MidRecipe, RlvrRecipe
from .rlvr import curve
from .store import Store


LEVELS = (0.5, 0.8, 0.9)
TOKEN_UPDATES = 120  # measured, see LOG.md
COMPUTE_UPDATES = 1800  # 226 CPU seconds of RA3 over 0.125 of an update of next-token prediction
_SEED0 = BaseRecipe(0)


@dataclass(frozen=True)
class Form:
    """Settings of all stages; the seeds and the checkpoints to start from are filled in.

    Args:
        e_steps (`int`):
            Updates of RA3's E-phase; next-token prediction gets as many more of its own (equal updates).
        token_updates, compute_updates (`int`):
            Updates of the arms `ntp_tokens` and `ntp_compute`: as many of next-token prediction as see RA3's tokens,
            and as take its CPU seconds.
        full (`bool`):
            Whether these arms are run, and `resample`: RA3 without its E-phase.
    """

    base: BaseRecipe = _SEED0
    mid: MidRecipe = MidRecipe(_SEED0, 0)
    rlvr: RlvrRecipe = RlvrRecipe(_SEED0, 0)
    measure: MeasureRecipe = MeasureRecipe(_SEED0)
    e_steps: int = 15
    token_updates: int = TOKEN_UPDATES
    compute_updates: int = COMPUTE_UPDATES
    full: bool = False
    gate: float = GATE


@dataclass(frozen=True)
class ArmResult:
    """One arm on one seed; `log` is that of mid-training, empty for a base."""

    measures: Any  # a record of numbers
    curve: Curve | None  # `None` where GRPO was left out
    log: list[dict[str, float]]
    seconds: float = field(compare=False)

    def about(self) -> dict[str, Any]:
        """What the table does not say."""
        return {"seconds": self.seconds, "curve": list(self.curve.accuracy) if self.curve else [], "log": self.log}


def starts(form: Form, base: BaseRecipe, seed: int) -> dict[str, BaseRecipe | MidRecipe]:
    """What each arm starts from: next-token prediction has as many updates as both of RA3's phases."""
    mid = replace(form.mid, base=base, seed=seed)

    def ntp(updates: int) -> MidRecipe:  # on programs it has not seen before, as all arms
        return replace(mid, m_steps=updates, programs=max(mid.programs, updates * mid.batch_size))

    same = ntp(mid.m_steps + form.e_steps)
    ours = replace(mid, e_steps=form.e_steps, annotation_think_prob=-1.0)
    found = {"base": base, "ntp": same, "ntp_forced": same, "ra3": ours}
    if form.full:
        found |= {"ntp_tokens": ntp(form.token_updates), "ntp_compute": ntp(form.compute_updates)}
        found["resample"] = replace(ours, e_steps=0, m_steps=mid.m_steps + form.e_steps)
    return found


def run_seed(store: Store, form: Form, base: BaseRecipe, seed: int) -> dict[str, ArmResult]:
    """All arms."""
    found = {}
    for arm, start in starts(form, base, seed).items():
        begin = time.perf_counter()
        forced = arm == "ntp_forced"
        measures = measure(store, replace(form.measure, start=start))
        if forced:  # the same weights; a comment stands before every hard line
            measures = replace(measures, think_hard=1.0, accuracy=measures.accuracy_forced)
        learned = curve(store, replace(form.rlvr, start=start, seed=seed, forced=forced))
        log = (store.find(start) or {}).get("log", [])
        found[arm] = ArmResult(measures, learned, log, time.perf_counter() - begin)
        say(f"seed {seed} {arm}: {measures}, RLVR {learned.accuracy[0]:.2f} to {learned.last:.2f}")
    return found


def rows(results: list[dict[str, ArmResult]], form: Form) -> dict[str, dict[str, Any]]:
    """Estimates over seeds: a row of the table for each measure, over arms. Samples to a level are completions of GRPO
    and, of RA3, the latents that its own phases drew before."""
    drawn = samples(form)
    before = {"ra3": drawn["ra3_e_phase"] + drawn["ra3_m_phase"], "resample": drawn["resample_m_phase"]}
    table = measure_rows(results)
    for level in LEVELS:
        table |= level_rows(results, level, [level] * len(results), [before] * len(results))
    return table | last_row(results)


def _row(results: list[dict[str, ArmResult]], read: Callable[[str, int], Any], share: bool = False) -> dict[str, Any]:
    """Estimates over seeds for each arm; `read` gets the arm's name and the number of the result."""
    seeds = range(len(results))
    return {arm: asdict(Estimate.of(tuple(read(arm, i) for i in seeds), share)) for arm in results[0]}


def measure_rows(results: list[dict[str, ArmResult]]) -> dict[str, dict[str, Any]]:
    """A row for each measure."""
    names = [entry.name for entry in fields(next(iter(results[0].values())).measures)]
    return {
        name: _row(results, lambda arm, i, name=name: getattr(results[i][arm].measures, name), name in SHARES)
        for name in names
    }


def level_rows(
    results: list[dict[str, ArmResult]], level: float, levels: list[float], before: list[dict[str, int]]
) -> dict[str, dict[str, Any]]:
    """Updates and samples of GRPO to a level, of each result one of its own; `level` names it. `before`: samples that
    mid-training drew."""

    def updates(arm: str, i: int) -> int | None:
        found = results[i][arm].curve
        return None if found is None else found.steps_to(levels[i])

    def drawn(arm: str, i: int) -> int | None:
        steps, found = updates(arm, i), results[i][arm].curve
        return None if steps is None or found is None else steps * found.samples + before[i].get(arm, 0)

    percent = f"{level:.0%}".rstrip("%")
    return {f"rlvr_steps_to_{percent}": _row(results, updates), f"rlvr_samples_to_{percent}": _row(results, drawn)}


def last_row(results: list[dict[str, ArmResult]]) -> dict[str, dict[str, Any]]:
    """The last level of GRPO."""
    return {"rlvr_last": _row(results, lambda arm, i: (found := results[i][arm].curve) and found.last, share=True)}


def samples(form: Form) -> dict[str, int]:
    """What is sampled: completions of an RLVR update, and latents of RA3's phases (all boundaries of a program)."""
    latents = form.mid.batch_size * form.mid.num_latents * boundaries(form.mid.corpus)
    return {
        "rlvr_update": form.rlvr.prompts * form.rlvr.generations,
        "ra3_e_phase": form.e_steps * latents,
        "ra3_m_phase": form.mid.m_steps * latents,
        "resample_m_phase": (form.mid.m_steps + form.e_steps) * latents,
    }
