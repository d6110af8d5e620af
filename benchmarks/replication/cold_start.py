"""The experiment `cold_start`: does a model that was shown traces think better, and does RL go on from there?

Stages on MBPP's training functions, each an entry of the store: next-token prediction on raw or on annotated text, or
RA3 with the package's defaults. All arms have the same updates in all, of as many texts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

from datasets import Dataset

from ra3_trl import Policy
from ra3_trl.analysis import Estimate
from ra3_trl.experimental.hindsight import attach
from ra3_trl.policy import THINKING, Annotation, Tally
from ra3_trl.policy.traces import TraceAnnotator
from ra3_trl.rollout import NoiseKey

from ..common import default_model, load, say
from .cold_data import cold_tasks
from .cold_measure import ColdMeasureRecipe, ColdMeasures, measure
from .real import config, defaults, trained
from .store import Store


SAVE_STEPS = 20
_LENGTH = 448  # tokens of a row
_NUMBERS = tuple(entry.name for entry in fields(ColdMeasures) if entry.type == "float")


@dataclass(frozen=True)
class ColdRecipe:
    """A stage of training on the training functions.

    `start`: the stage before; `None` is the checkpoint `model`, by default the demo's SmolLM2-135M-Instruct.
    `annotator`: who proposed thoughts for the text, `"trace"`, `"policy"` (its own comments, resampled) or
    `"hindsight"` (its own, from a prompt that knows the next lines); `None` is raw text. `keep_all`: whether those
    stay that the student is not helped by. `prior`: probability of a thought where one is proposed, before its worth
    is known.
    """

    start: ColdRecipe | None = None
    seed: int = 0
    annotator: str | None = None
    keep_all: bool = False
    prior: float = 0.5
    e_steps: int = 0
    m_steps: int = 80
    learning_rate: float = 5e-5
    batch_size: int = 8
    warmup_steps: int = 5
    max_latent_length: int = 64
    functions: int | None = None
    model: str | None = None
    mbpp: str | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    defaults: tuple[tuple[str, Any], ...] = ()
    version: int = 1


@dataclass(frozen=True)
class ColdExperiment:
    """Arms, each the last of its stages (`None`: the checkpoint itself), and what is measured of them."""

    arms: dict[str, ColdRecipe | None]
    measure: ColdMeasureRecipe


COLD, THEN, E_SHARE = 80, 80, 30  # updates of the cold start, of what follows, and of the latter's E-phase


def cold_start(
    base: ColdRecipe | None = None, annotators: bool = False, measures: ColdMeasureRecipe | None = None
) -> ColdExperiment:
    """`base`, `ntp`, `cold` (all updates on annotated text), `cold_ntp` and `cold_ra3` (half of them, then raw text),
    `ra3`; with `annotators` half a cold start with each annotator in place of the last four."""
    base = base or ColdRecipe()
    both = COLD + THEN if base.m_steps == COLD else 2 * base.m_steps
    first, e_steps = both // 2, both // 2 * E_SHARE // THEN
    ntp = replace(base, m_steps=both)
    cold = replace(base, annotator="trace", m_steps=first)
    arms: dict[str, ColdRecipe | None] = {"base": None, "ntp": ntp}
    if annotators:
        arms |= {name: replace(cold, annotator=name) for name in ("trace", "policy", "hindsight")}
        arms["trace_all"] = replace(cold, keep_all=True)
    else:
        arms |= {
            "cold": replace(cold, m_steps=both),
            "cold_ntp": replace(base, start=cold, m_steps=both - first),
            "cold_ra3": replace(base, start=cold, e_steps=e_steps, m_steps=both - first - e_steps),
            "ra3": replace(base, e_steps=2 * e_steps, m_steps=both - 2 * e_steps),
        }
    measures = measures or ColdMeasureRecipe(
        model=base.model, mbpp=base.mbpp, max_latent_length=base.max_latent_length
    )
    return ColdExperiment(arms, measures)


COLD_EXPERIMENTS: dict[str, Callable[[], ColdExperiment]] = {
    "cold_start": cold_start,
    "cold_start_annotators": lambda: cold_start(annotators=True),
}


def with_seed(recipe: ColdRecipe, seed: int) -> ColdRecipe:
    """The recipe and those it starts from with this seed, by the defaults as they are now where latents are drawn."""
    start = None if recipe.start is None else with_seed(recipe.start, seed)
    latents = recipe.e_steps or recipe.annotator in ("policy", "hindsight")
    return replace(recipe, start=start, seed=seed, defaults=defaults() if latents else ())


def checkpoint(store: Store, recipe: ColdRecipe | None, model: str | None = None) -> str:
    """The folder of the checkpoint that a recipe gives, trained if it is not there; without one the `model`."""
    if recipe is None:
        return model or default_model()
    train(store, recipe)
    return str(store.folder(recipe) / "model")


def train(store: Store, recipe: ColdRecipe, save_steps: int = SAVE_STEPS) -> dict[str, Any]:
    """What [`real.trained`] tells of a stage, and of an annotated one the annotator's `report`."""

    def work(folder: Path) -> dict[str, Any]:
        start = checkpoint(store, recipe.start, recipe.model)
        texts, report = _texts(recipe, start, folder)
        args = config(
            recipe, folder / "run", save_steps=save_steps, max_latent_length=recipe.max_latent_length,
            e_steps=recipe.e_steps, m_steps=recipe.m_steps, max_length=_LENGTH, **dict(recipe.settings),
        )  # fmt: skip
        return trained(load(start), args, Dataset.from_dict({"text": texts}), folder) | {"report": report}

    return store.get(recipe, work)


def _texts(recipe: ColdRecipe, start: str, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """The texts of a stage; annotated ones are kept beside the run, since that goes on from its checkpoints."""
    texts = [task.text for task in cold_tasks("train", recipe.mbpp)][: recipe.functions]
    if recipe.annotator is None:
        return texts, {}
    path = folder / "annotated.json"
    if not path.exists():
        annotated, report = annotate_texts(recipe, start, texts)
        path.write_text(json.dumps({"texts": annotated, "report": report}, indent=1), "utf-8")
    kept = json.loads(path.read_text("utf-8"))
    return kept["texts"], kept["report"]


def annotate_texts(recipe: ColdRecipe, student: str, texts: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Splices an annotator's thoughts into texts, and its report."""
    changes = {"max_latent_length": recipe.max_latent_length, "max_length": _LENGTH, "prior_alpha": 1 - recipe.prior}
    changes |= {name: value for name, value in recipe.settings if name in THINKING}
    policy = Policy.open(student, use_cpu=True, bf16=True, **changes)
    noise, annotated, tally = NoiseKey(recipe.seed, 1, 0), [], Tally()
    whole = [(text, {}, policy.segment(text, i)) for i, text in enumerate(texts)]
    with policy.inference():
        if recipe.annotator == "trace":
            annotator = TraceAnnotator()
            annotation = Annotation(annotator, recipe.keep_all, tally)
            try:
                found = list(annotation(policy, whole, noise))
            finally:
                annotator.close()
        else:
            policy = attach(policy, proposal="chat") if recipe.annotator == "hindsight" else policy
            found = [[policy.annotate(document, noise) for document in documents] for _, _, documents in whole]
        for text, examples in zip(texts, found, strict=True):
            annotated.append(policy.text(examples[0]) if len(examples) == 1 else text)
    placed = sum(len(example.placed) for examples in found for example in examples)
    return annotated, tally.report() | {"placed": placed}


def run_cold(store: Store, experiment: ColdExperiment, seeds: int) -> dict[str, Any]:
    """Each arm's measures, estimates over seeds, with a row for each seed in `runs`."""
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in experiment.arms}
    for seed in range(seeds):
        for arm, recipe in experiment.arms.items():
            stage = None if recipe is None else with_seed(recipe, seed)
            training: dict[str, Any] = {"seconds": 0.0} if stage is None else train(store, stage)
            folder, begin = checkpoint(store, stage, experiment.measure.model), perf_counter()
            name = None if stage is None else store.folder(stage).name
            found = measure(store, replace(experiment.measure, start=name), folder)
            row = {"seed": seed, **asdict(found), **training, "measure_seconds": perf_counter() - begin}
            runs[arm].append(row)
            say(f"seed {seed} {arm}: " + ", ".join(f"{name} {row[name]:.3f}" for name in (*_NUMBERS, "seconds")))
    return {"seeds": seeds, **{arm: summary(rows) for arm, rows in runs.items()}}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Estimates of the numbers over runs, and the runs."""
    numbers = {name: asdict(Estimate.of(tuple(row[name] for row in rows))) for name in _NUMBERS}
    return {**numbers, "seconds": fmean(row["seconds"] for row in rows), "runs": rows}
