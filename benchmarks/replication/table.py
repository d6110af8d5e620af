"""The table: bases through the gate, arms for each seed, and rows of estimates."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ra3_trl.analysis import Estimate
from ra3_trl.testbed.corpus import boundaries

from ..common import say
from .base import GATE
from .measure import measure
from .records import SHARES, BaseRecipe, Curve, MeasureRecipe, Measures, MidRecipe, RlvrRecipe
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

    measures: Measures
    curve: Curve
    log: list[dict[str, float]]
    seconds: float = field(compare=False)

    def about(self) -> dict[str, Any]:
        """What the table does not say."""
        return {"seconds": self.seconds, "curve": list(self.curve.accuracy), "log": self.log}


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

    def samples_to(arm: ArmResult, name: str, level: float) -> int | None:
        steps = arm.curve.steps_to(level)
        return None if steps is None else steps * drawn["rlvr_update"] + before.get(name, 0)

    def row(read, share: bool = False) -> dict[str, Any]:
        values = {arm: tuple(read(arm, result[arm]) for result in results) for arm in results[0]}
        return {arm: asdict(Estimate.of(of_arm, share)) for arm, of_arm in values.items()}

    table = {
        f.name: row(lambda _, arm, name=f.name: getattr(arm.measures, name), f.name in SHARES)
        for f in fields(Measures)
    }
    for level in LEVELS:
        percent = f"{level:.0%}".rstrip("%")
        table[f"rlvr_steps_to_{percent}"] = row(lambda _, arm, level=level: arm.curve.steps_to(level))
        table[f"rlvr_samples_to_{percent}"] = row(lambda name, arm, level=level: samples_to(arm, name, level))
    return table | {"rlvr_last": row(lambda _, arm: arm.curve.last, share=True)}


def samples(form: Form) -> dict[str, int]:
    """What is sampled: completions of an RLVR update, and latents of RA3's phases (all boundaries of a program)."""
    latents = form.mid.batch_size * form.mid.num_latents * boundaries(form.mid.corpus)
    return {
        "rlvr_update": form.rlvr.prompts * form.rlvr.generations,
        "ra3_e_phase": form.e_steps * latents,
        "ra3_m_phase": form.mid.m_steps * latents,
        "resample_m_phase": (form.mid.m_steps + form.e_steps) * latents,
    }
