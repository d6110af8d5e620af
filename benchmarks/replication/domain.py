"""`--domain traces`: the replication's arms on a pre-trained checkpoint, over bases of three qualities.

A base is SmolLM2-135M, prepared as in `real_gate` for 300, 500 or 800 updates; the last is `real_gate`'s own, and so
are the arms `ntp` and `ra3`: what that experiment has in the cache is not done again. Mid-training sees programs
without comments. For each base there is a table of the testbed's form. Everything of the method is at the package's
defaults.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ra3_trl.analysis import Estimate

from ..common import say
from .cold_measure import ColdMeasureRecipe
from .domain_measure import DomainRecipe, TraceBoundRecipe, measure_domain
from .experiments import of_known
from .real import on_base
from .real_gate import ABLATIONS, real_gate
from .real_measure import measure
from .records import KINDS, KindCorpus, PreparedRecipe, TraceCorpus, TraceMeasureRecipe, TraceMidRecipe
from .rlvr import TraceRlvrRecipe, curve
from .store import Store
from .table import ArmResult, last_row, level_rows, measure_rows


DOMAINS, CORPORA, PARTS = ("testbed", "traces"), ("integers", "kinds"), ("transfer", "mbpp", "rlvr")
UPDATES = {"weak": 300, "middling": 500, "strong": 800}  # of the bases' preparation
GATE = 0.1  # share of comments right from which a base counts: below there is nothing to choose among
LEVELS = (0.5, 0.8)  # of the best level that any arm gets to
TOKEN_UPDATES = 640  # RA3's 540 see a latent of 10 tokens behind one program of 51 in nearly all M-updates
COMPUTE_UPDATES = 2550  # 40 E-updates of 9.8 s and 500 M-updates of 10 s over 2.1 s, see LOG.md
MAIN = ("base", "ntp", "ntp_forced", "ra3", "resample")  # these also transfer, and learn by GRPO
FORCED = ("ntp_forced",)
ARMS = (*MAIN, "ntp_tokens", "ntp_compute")
UNSEEN = {"tasks": 24, "drawn": 24}  # programs of each kind that no training has seen
LONGER = {"comment_tokens": 48, "tokens": 80}  # of comments about strings and lists


@dataclass(frozen=True)
class DomainForm:
    """Settings of all stages; checkpoints to start from and seeds are filled in.

    Args:
        bases (`Mapping[str, PreparedRecipe]`):
            By name.
        ntp, ra3 (`TraceMidRecipe`):
            The arms of these names; all others follow from them.
        measures ([`DomainRecipe`]):
            What is measured.
        rlvr ([`TraceRlvrRecipe`] or `None`):
            GRPO from each of the arms `main`; `None` leaves it out.
        arms, main (`tuple[str, ...]`):
            Of [`ARMS`] and of `ABLATIONS`. Only `main` are asked about kinds that they have not seen.
        token_updates, compute_updates (`int`):
            Updates of `ntp_tokens` and `ntp_compute`: as many as see RA3's tokens, and as take its seconds.
        gate (`float`):
            Share of comments right from which a base counts.
    """

    bases: Mapping[str, PreparedRecipe]
    ntp: TraceMidRecipe
    ra3: TraceMidRecipe
    measures: DomainRecipe
    rlvr: TraceRlvrRecipe | None
    arms: tuple[str, ...] = ARMS
    main: tuple[str, ...] = MAIN
    token_updates: int = TOKEN_UPDATES
    compute_updates: int = COMPUTE_UPDATES
    gate: float = GATE


def traces_form(corpus: str = "integers", mbpp: str | None = None, model: str | None = None) -> DomainForm:
    """The whole domain: on `real_gate`'s programs, integers, or on half of all kinds; the kinds that a training does
    not see are for the transfer. `model`: the checkpoint that is prepared, in place of the demo's."""
    experiment = real_gate()
    base, ntp, ra3, asked = experiment.base, experiment.arms["ntp"], experiment.arms["ra3"], experiment.measure
    assert ntp is not None and ra3 is not None
    expert: TraceCorpus = TraceCorpus()
    rlvr, bound, unseen = TraceRlvrRecipe(base, 0), TraceBoundRecipe(base), KINDS[1:]
    if corpus == "kinds":
        expert, unseen = KindCorpus(), KINDS[2:]
        prepared = KindCorpus(**{entry.name: getattr(base.corpus, entry.name) for entry in fields(base.corpus)})
        base = replace(base, corpus=prepared)
        ntp, ra3 = (replace(arm, corpus=expert, max_latent_length=48) for arm in (ntp, ra3))
        asked = replace(asked, corpus=expert, **LONGER)
        bound = replace(bound, corpus=expert, max_latent_length=48)
        rlvr = replace(rlvr, corpus=expert, completion_tokens=80)
    transfer = tuple(TraceMeasureRecipe(base, corpus=KindCorpus(kinds=(kind,)), **UNSEEN, **LONGER) for kind in unseen)
    return DomainForm(
        {name: replace(base, steps=steps, model=model) for name, steps in UPDATES.items()},
        ntp,
        ra3,
        DomainRecipe(asked, bound, transfer, ColdMeasureRecipe(tasks=40, draws=8, bounds=1, mbpp=mbpp)),
        rlvr,
    )


def chosen(
    form: DomainForm, bases: list[str] | None = None, arms: list[str] | None = None, parts: list[str] | None = None
) -> DomainForm:
    """Some of the bases, arms and parts; `None` leaves all.

    Raises:
        `ValueError`: for a name that there is none of.
    """
    known = {"base": (bases, list(form.bases)), "arms": (arms, [*ARMS, *ABLATIONS]), "parts": (parts, list(PARTS))}
    for option, (names, there) in known.items():
        of_known(option, names or (), there)
    asked = form.measures
    if parts is not None:
        asked = replace(
            asked, transfer=asked.transfer if "transfer" in parts else (), mbpp=asked.mbpp if "mbpp" in parts else None
        )
        form = replace(form, rlvr=form.rlvr if "rlvr" in parts else None)
    return replace(
        form,
        bases={name: recipe for name, recipe in form.bases.items() if bases is None or name in bases},
        arms=form.arms if arms is None else tuple(arms),
        measures=asked,
    )


def of_arm(form: DomainForm, arm: str) -> DomainForm:
    """The form with what is asked of this arm alone."""
    asked = form.measures
    if arm not in form.main:
        form, asked = replace(form, rlvr=None), replace(asked, transfer=())
    if arm not in asked.mbpp_arms:
        asked = replace(asked, mbpp=None)
    return replace(form, arms=(arm,), measures=asked)


def starts(form: DomainForm, base: PreparedRecipe, seed: int) -> dict[str, PreparedRecipe | TraceMidRecipe]:
    """What each arm is a measure of; next-token prediction sees no program twice."""
    steps = form.ra3.e_steps + form.ra3.m_steps

    def ntp(updates: int) -> TraceMidRecipe:
        return replace(form.ntp, m_steps=updates, programs=max(form.ntp.programs, updates * form.ntp.batch_size))

    resample = {"e_steps": 0, "m_steps": steps, "settings": (("annotation", "resample"), *form.ra3.settings)}
    recipes = {
        "ntp": form.ntp, "ntp_forced": form.ntp, "ra3": form.ra3, "ntp_tokens": ntp(form.token_updates),
        "ntp_compute": ntp(form.compute_updates), "resample": replace(form.ra3, **resample),
    }  # fmt: skip
    recipes |= {arm: replace(form.ra3, **ABLATIONS[arm]) for arm in form.arms if arm in ABLATIONS}
    return {arm: base if arm == "base" else on_base(recipes[arm], base, seed) for arm in form.arms}


def latents_drawn(recipe: PreparedRecipe | TraceMidRecipe, log: list[dict[str, float]]) -> int:
    """Latents that a run drew: in the E-phase as its log says; in the M-phase at most, as if all boundaries of a
    program were tried."""
    if not isinstance(recipe, TraceMidRecipe) or not recipe.defaults or not log:
        return 0
    settings = dict(recipe.defaults) | dict(recipe.settings)
    data = next((entry for entry in log if "data/boundaries" in entry), None)
    each = 0.0 if data is None else data["data/boundaries"] / data["data/documents"]
    of_update = recipe.batch_size * each * settings["num_latents"]
    return round(of_update * (sum(entry.get("estep/tried_rate", 0.0) for entry in log) + recipe.m_steps))


def run_arm(
    store: Store, form: DomainForm, base: PreparedRecipe, arm: str, seed: int
) -> tuple[ArmResult, dict[str, Any]]:
    """One arm on one seed, and what of it is to be read."""
    form, begin = of_arm(form, arm), time.perf_counter()
    start = starts(form, base, seed)[arm]
    forced = form.arms == FORCED
    measures, about = measure_domain(store, form.measures, start)
    measures = measures.told_to_think() if forced else measures
    learned = None
    if form.rlvr is not None:
        learned = curve(store, replace(form.rlvr, start=start, seed=seed, forced=forced))
    log = (store.find(start) or {}).get("log", [])
    about |= {"drawn": latents_drawn(start, log)}
    say(f"seed {seed} {arm}: {measures}" + ("" if learned is None else f", RLVR to {learned.last:.2f}"))
    return ArmResult(measures, learned, log, time.perf_counter() - begin), about


def best_level(result: Mapping[str, ArmResult]) -> float | None:
    """The highest accuracy of two neighbouring updates that GRPO got to from any arm; `None` without GRPO."""
    pairs = [
        sum(pair) / 2
        for arm in result.values()
        if arm.curve is not None
        for pair in zip(arm.curve.accuracy, arm.curve.accuracy[1:], strict=False)
    ]
    return max(pairs, default=None)


def table(form: DomainForm, runs: list[dict[str, tuple[ArmResult, dict[str, Any]]]]) -> dict[str, Any]:
    """Rows of estimates over seeds, as the testbed's; levels of GRPO are shares of the best."""
    results = [{arm: found for arm, (found, _) in run.items()} for run in runs]
    drawn = [{arm: about["drawn"] for arm, (_, about) in run.items()} for run in runs]
    found = measure_rows(results)
    best = [best_level(result) for result in results]
    if all(level is not None for level in best):
        for level in LEVELS:
            # Where no arm learned anything, none is at a share of it.
            found |= level_rows(results, level, [level * one if one else math.inf for one in best], drawn)
        found |= last_row(results) | {"rlvr_best": asdict(Estimate.of(best, share=True))}
    rows = [{arm: found.about() | about for arm, (found, about) in run.items()} for run in runs]
    return {**found, "wanted": wanted(found), "runs": rows}


# What issue O wants: the arm that RA3 is to be ahead of, by how much in `accuracy`.
_AHEAD = {"ntp": 0.5, "base": 0.08, "ntp_forced": 0.08}
_THERE, _ELSEWHERE, _SOONER = 0.8, 0.1, 0.5


def wanted(rows: Mapping[str, Any]) -> dict[str, Any]:
    """What RA3 is to reach, with what it did, of arms that were run; `apart`: whether the intervals of the two arms
    are."""
    found: dict[str, dict[str, Any]] = {}
    if "ra3" not in rows["accuracy"]:
        return found
    ours = {name: row["ra3"] for name, row in rows.items() if isinstance(row, dict) and "ra3" in row}
    for arm, ahead in _AHEAD.items():
        if theirs := rows["accuracy"].get(arm):
            less = [a - b for a, b in zip(ours["accuracy"]["values"], theirs["values"], strict=True)]
            found[f"accuracy_above_{arm}"] = _held(asdict(Estimate.of(less)), ahead, True) | {
                "apart": None if theirs["high"] is None else ours["accuracy"]["low"] > theirs["high"]
            }
    found["think_hard"] = _held(ours["think_hard"], _THERE, True)
    found["think_easy"] = _held(ours["think_easy"], _ELSEWHERE, False)
    steps = rows.get("rlvr_steps_to_80", {})
    if "base" in steps:
        pairs = list(zip(steps["ra3"]["values"], steps["base"]["values"], strict=True))
        # There is no ratio where the base is there at once or never, nor where RA3 never is, which is no success.
        ratios = [a / b if b and a is not None else None for a, b in pairs]
        found["rlvr_steps_ratio"] = _held(asdict(Estimate.of(ratios)), _SOONER, False)
        if any(a is None and b is not None for a, b in pairs):
            found["rlvr_steps_ratio"]["reached"] = False
    return found


def _held(estimate: dict[str, Any], bound: float, least: bool) -> dict[str, Any]:
    mean = estimate["mean"]
    reached = None if mean is None else (mean >= bound if least else mean <= bound)
    return {**estimate, "at_least" if least else "at_most": bound, "reached": reached}


@dataclass(frozen=True)
class Stage:
    """A part of the work that is kept by itself: its entry in the cache, and about how long it takes two cores."""

    name: str
    entry: str
    minutes: float
    done: bool


def plan(store: Store, form: DomainForm, seeds: int) -> list[Stage]:
    """All stages in the order in which they are done. Minutes are for SmolLM2-135M on two cores with AVX-512 and
    without AMX; with AMX half to a third."""
    found: dict[str, Stage] = {}

    def add(name: str, recipe: Any, minutes: float) -> None:
        entry = store.folder(recipe).name
        found.setdefault(entry, Stage(name, entry, round(minutes, 1), store.find(recipe) is not None))

    for name, base in form.bases.items():
        add(f"{name}: preparation", base, 0.05 * base.steps)
        for seed in range(seeds):
            for arm, start in starts(form, base, seed).items():
                for step, recipe, minutes in _arm_stages(store, of_arm(form, arm), start, seed):
                    add(f"{name}, seed {seed}, {arm}: {step}", recipe, minutes)
    return list(found.values())


def _arm_stages(
    store: Store, form: DomainForm, start: PreparedRecipe | TraceMidRecipe, seed: int
) -> Iterator[tuple[str, Any, float]]:
    asked = form.measures
    if isinstance(start, TraceMidRecipe):
        latents = start.e_steps or dict(start.settings).get("annotation")
        yield "training", start, 0.17 * start.e_steps + (0.17 if latents else 0.035) * start.m_steps
    yield "measures", replace(asked.measure, start=start), 0.03 * asked.measure.tasks + 0.02 * asked.measure.drawn
    for one in asked.transfer:
        yield f"transfer, {', '.join(one.kinds)}", replace(one, start=start), 0.05 * one.tasks + 0.04 * one.drawn
    if asked.mbpp is not None:
        yield "MBPP", replace(asked.mbpp, start=store.folder(start).name), 0.2 * asked.mbpp.tasks
    yield "bounds", replace(asked.bound, start=start), 0.1 * asked.bound.programs
    if form.rlvr is not None:
        recipe = replace(form.rlvr, start=start, seed=seed, forced=form.arms == FORCED)
        yield "GRPO", recipe, 0.012 * recipe.prompts * recipe.generations * recipe.steps


def run_domain(store: Store, form: DomainForm, seeds: int) -> dict[str, Any]:
    """A table for each base; a base that does not count is told of, and has none."""
    tables: dict[str, Any] = {}
    for name, base in form.bases.items():
        say(f"base {name}")
        right = measure(store, replace(form.measures.measure, start=base)).drawn_right
        told = {"seed": base.seed, "passed": right >= form.gate, "comment_right": right, "updates": base.steps}
        tables[name] = {"bases": [told], "seeds": seeds, "domain": "traces", "base": name}
        if told["passed"]:
            runs = [{arm: run_arm(store, form, base, arm, seed) for arm in form.arms} for seed in range(seeds)]
            tables[name] |= table(form, runs)
    return {"domain": "traces", "seeds": seeds, "form": asdict(form), "tables": tables}
