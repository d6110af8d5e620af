"""The experiment `cold_start`: does a model that was shown traces think better, and does RL go on from there?

Stages on MBPP's training functions, each an entry of the store: next-token prediction on raw or on annotated text, or
RA3 with the package's defaults. All arms have the same updates in all, of as many texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

from datasets import Dataset

from ra3_trl import Policy
from ra3_trl.analysis import Estimate
from ra3_trl.experimental.hindsight import attach
from ra3_trl.policy import THINKING, Annotation, Tally
from ra3_trl.policy.prompted import LocalModel, ModelAnnotator
from ra3_trl.policy.traces import TraceAnnotator
from ra3_trl.policy.traces.forms import FORM
from ra3_trl.rollout import NoiseKey

from ..common import default_model, load, say
from .cold_data import cold_tasks
from .cold_measure import ColdMeasureRecipe, ColdMeasures, measure
from .real import config, defaults, trained
from .store import Store


SAVE_STEPS = 20
STAGE, E_STEPS = 48, 16  # updates of the cold start, as many of what follows, and of these the E-phase's
CHANGES: dict[str, dict[str, Any]] = {  # of `cold_start_variants`, one thing of the cold start at a time
    "all_traces": {"keep_all": True},
    "likelier": {"prior": 0.9},
    "no_penalty": {"settings": (("penalty", 0.0),)},
    "last_values": {"form": "last"},
    "line_by_line": {"form": "lines"},
    "short_traces": {"max_latent_length": 24},
    "slower": {"learning_rate": 3e-5},
    "faster": {"learning_rate": 3e-4},
}
_OWN = "policy", "hindsight"  # who draws as the trainer does
_LENGTH = 448  # tokens of a row
_NUMBERS = tuple(entry.name for entry in fields(ColdMeasures) if entry.type == "float")


@dataclass(frozen=True)
class ColdRecipe:
    """A stage of training on the training functions.

    `start`: the stage before; `None` is the checkpoint `model`, by default the demo's SmolLM2-135M-Instruct.
    `annotator`: who proposed thoughts for the text, `"trace"`, `"policy"` (its own comments, resampled), `"hindsight"`
    (its own, from a prompt that knows the next lines), or another model's folder or Hub id, which is asked; `None` is
    raw text. `keep_all`: whether those stay that the student is not helped by. `prior`: probability of a thought where
    one is proposed, before its worth is known. `form`: how a trace is written.
    """

    start: ColdRecipe | None = None
    seed: int = 0
    annotator: str | None = None
    keep_all: bool = False
    prior: float = 0.5
    form: str = FORM
    e_steps: int = 0
    m_steps: int = STAGE
    learning_rate: float = 1e-4
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
class AnnotatedRecipe:
    """What of a [`ColdRecipe`] shapes its annotated texts."""

    start: ColdRecipe | None
    seed: int
    annotator: str
    keep_all: bool
    prior: float
    max_latent_length: int
    functions: int | None
    model: str | None
    mbpp: str | None
    settings: tuple[tuple[str, Any], ...]
    form: str = FORM
    version: int = 1


@dataclass(frozen=True)
class ColdExperiment:
    """Arms, each the last of its stages (`None`: the checkpoint itself), and what is measured of them."""

    arms: dict[str, ColdRecipe | None]
    measure: ColdMeasureRecipe


def cold_start(
    base: ColdRecipe | None = None,
    others: str | None = None,
    measures: ColdMeasureRecipe | None = None,
    asked: str | None = None,
) -> ColdExperiment:
    """`base`, `ntp`, `cold` (all updates on annotated text), `cold_ntp` and `cold_ra3` (half of them, then raw text),
    `ra3`. With `others` in place of the last three: `"annotators"`, half a cold start with each and next-token
    prediction, on as many texts as they see, with that of the model `asked` if there is one; and `"variants"`, `cold`
    with one of `CHANGES` each, and four times as long."""
    base = base or ColdRecipe()
    half, e_steps = base.m_steps, base.m_steps * E_STEPS // STAGE
    ntp = replace(base, m_steps=2 * half)
    first = replace(base, annotator="trace")
    cold = replace(first, m_steps=2 * half)
    arms: dict[str, ColdRecipe | None] = {"base": None, "ntp": ntp}
    if others == "annotators":
        few = replace(base, functions=half * base.batch_size)
        arms["ntp"] = few
        arms |= {name: replace(few, annotator=name) for name in ("trace", *_OWN)}
        arms |= {"asked": replace(few, annotator=asked)} if asked else {}
    elif others == "variants":
        arms |= {"cold": cold, "longer": replace(cold, m_steps=4 * cold.m_steps)}
        arms |= {name: replace(cold, **changes) for name, changes in CHANGES.items()}
    else:
        arms |= {
            "cold": cold,
            "cold_ntp": replace(base, start=first),
            "cold_ra3": replace(base, start=first, e_steps=e_steps, m_steps=half - e_steps),
            "ra3": replace(base, e_steps=2 * e_steps, m_steps=2 * half - 2 * e_steps),
        }
    measures = measures or ColdMeasureRecipe(
        model=base.model, mbpp=base.mbpp, max_latent_length=base.max_latent_length
    )
    return ColdExperiment(arms, measures)


COLD_EXPERIMENTS: dict[str, Callable[..., ColdExperiment]] = {
    "cold_start": cold_start,
    "cold_start_annotators": partial(cold_start, others="annotators"),
    "cold_start_variants": partial(cold_start, others="variants"),
}


def with_seed(recipe: ColdRecipe, seed: int) -> ColdRecipe:
    """The recipe and those it starts from with this seed, by the defaults as they are now where latents are drawn."""
    start = None if recipe.start is None else with_seed(recipe.start, seed)
    latents = recipe.e_steps or recipe.annotator in _OWN
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
        found = texts_of(store, recipe, start)
        args = config(
            recipe, folder / "run", save_steps=save_steps, max_latent_length=recipe.max_latent_length,
            e_steps=recipe.e_steps, m_steps=recipe.m_steps, max_length=_LENGTH, **dict(recipe.settings),
        )  # fmt: skip
        data = Dataset.from_dict({"text": found["texts"]})
        return trained(load(start), args, data, folder) | {"report": found["report"]}

    return store.get(recipe, work)


def texts_of(store: Store, recipe: ColdRecipe, start: str) -> dict[str, Any]:
    """The `texts` of a stage, and the annotator's `report` on them; annotated ones are an entry of the store."""
    texts = [task.text for task in cold_tasks("train", recipe.mbpp)][: recipe.functions]
    if recipe.annotator is None:
        return {"texts": texts, "report": {}}
    shapes = {entry.name: getattr(recipe, entry.name) for entry in fields(AnnotatedRecipe) if entry.name != "version"}
    return store.get(AnnotatedRecipe(**shapes), lambda _: annotate_texts(recipe, start, texts))


def annotate_texts(recipe: ColdRecipe, student: str, texts: list[str]) -> dict[str, Any]:
    """Splices an annotator's thoughts into texts."""
    changes: dict[str, Any] = {
        "max_latent_length": recipe.max_latent_length,
        "max_length": _LENGTH,
        "prior_alpha": 1 - recipe.prior,
    }
    changes |= {name: value for name, value in recipe.settings if name in THINKING}
    policy = Policy.open(student, use_cpu=True, bf16=True, **changes)
    noise, annotated, tally = NoiseKey(recipe.seed, 1, 0), [], Tally()
    whole = [(text, dict[str, Any](), policy.segment(text, i)) for i, text in enumerate(texts)]
    with policy.inference():
        if recipe.annotator not in _OWN:
            annotator = annotator_of(recipe)
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
    return {"texts": annotated, "report": tally.report() | {"placed": placed}}


def annotator_of(recipe: ColdRecipe) -> TraceAnnotator | ModelAnnotator:
    """The annotator that is not the student itself."""
    if recipe.annotator == "trace":
        return TraceAnnotator(recipe.form)
    assert recipe.annotator is not None
    return ModelAnnotator(LocalModel(recipe.annotator))


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
