"""The model card of a mid-trained checkpoint: what was measured, and how to use it.

`card_facts` gathers from a trainer what a card says, `render_model_card` lays it out; the facts are plain values, so
that a card can be rendered anew from a JSON file (`model_cards/`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any
from weakref import WeakKeyDictionary

from datasets import Dataset
from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader
from peft import PeftModel

from ..files import public_name
from ..markdown import cell, code_cell
from ..segmentation import find_format
from .licenses import license_metadata, row_license
from .secrets import find_secrets


PAPER = "https://huggingface.co/papers/2509.25810"
_TEMPLATES = Environment(loader=PackageLoader(__package__, ""))
_TEMPLATES.globals |= {"cell": cell, "code_cell": code_cell, "paper": PAPER}
_SHOWN = (
    "em_iterations", "e_steps", "m_steps", "max_steps", "learning_rate", "e_learning_rate",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "num_latents",
    "max_latent_length", "horizon", "discount", "penalty", "line_reduction", "objective", "reward_model", "gate",
    "gate_hold", "exploration", "boundary_selection", "boundary_budget", "kl_coef", "annotation", "prior_alpha",
    "same_latent_tolerance", "action_format", "existing_comments", "temperature", "seed",
)  # fmt: skip
_MEASURED = {
    "ce": "cross-entropy (nats per code token)",
    "ce_policy": "cross-entropy with the model's own latents (nats per code token)",
    "elbo": "negative ELBO (nats per code token)",
    "bound_multi": "negative multi-sample bound (nats per code token)",
    "think_rate": "mean P(think) at a boundary",
    "gain": "gain of a latent (nats)",
}
_SAMENESS = {  # absent where there was one document, or none with a boundary
    "gain_over_other": "nats that a latent brings more than another document's",
    "distinct_rate": "share of different latents, one a document",
    "most_frequent_rate": "share of the most frequent latent",
}
_USED = {"license", "language", "tags", "finetuned_from", "dataset"}
_UNUSED = {"tasks", "dataset_tags", "dataset_args"}  # arguments of `Trainer.create_model_card` that say nothing here
_HELD_OUT = "held-out code"
_PROMPTS = {"slashes": "int fibonacci(int n) {\n", "prose": "The first of these"}
_LATENTS_SHOWN = 6
_COUNTED: WeakKeyDictionary[Dataset, dict[str, int]] = WeakKeyDictionary()  # a card is written with each save


@dataclass(frozen=True)
class ModelCardFacts:
    """
    All that a model card says, as plain values.

    Args:
        model_name (`str`), model_id (`str`):
            Title of the card, and what loads the checkpoint: a Hub id or a folder.
        base (`str`), base_id (`str`, *optional*):
            Name of the base model, and its Hub id; a local base has none.
        adapter (`bool`, *optional*), abstraction_head (`bool`, *optional*):
            Whether the checkpoint is an adapter, and whether it comes with an abstraction head.
        action_format (`str`), think (`str`), tagged (`bool`):
            The format of the actions, what opens a latent there, and whether that is a special token.
        dataset_name (`str`, *optional*), dataset_ids (`Sequence[str]`), dataset_license (`str`, *optional*):
            The training data in words, those that are on the Hub, and their licence.
        row_licenses (`Mapping[str, int]`), counts (`Mapping[str, Mapping[str, int]]`), tokens_seen (`int`):
            Training documents by licence; documents, boundaries and tokens of each split; tokens that the updates saw.
        settings (`Mapping[str, Any]`), versions (`Mapping[str, str]`):
            Settings of the run; versions of the packages.
        annotated_rate (`float`, *optional*), placed_gain (`float`, *optional*):
            Share of the boundaries that got a latent in the M-phases, and what those bring in nats, where measured.
        evaluations (`Sequence[Mapping[str, Any]]`), latents (`Sequence[Mapping[str, Any]]`), latents_of (`int`):
            Rows of [`evaluation_rows`]; of [`best_latents`], and the boundaries that these are of.
        license (`str`, *optional*), language (`str` or `list[str]`, *optional*), tags (`Sequence[str]`):
            The model's licence, its language and further tags.
    """

    model_name: str
    model_id: str
    base: str
    base_id: str | None = None
    adapter: bool = False
    abstraction_head: bool = False
    action_format: str = "python"
    think: str = "#"
    tagged: bool = False
    dataset_name: str | None = None
    dataset_ids: Sequence[str] = ()
    dataset_license: str | None = None
    row_licenses: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    tokens_seen: int = 0
    annotated_rate: float | None = None
    placed_gain: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    evaluations: Sequence[Mapping[str, Any]] = ()
    latents: Sequence[Mapping[str, Any]] = ()
    latents_of: int = 0
    license: str | None = None
    language: str | list[str] | None = None
    tags: Sequence[str] = ()


def evaluated_sets(metrics: Mapping[str, Any]) -> list[str]:
    """Prefixes of the evaluations that `metrics` hold: `["eval"]`, `["eval_a", "eval_b"]` for a dict of sets.

    Example: `evaluated_sets({"eval_a_ce": 2.1, "eval_a_elbo": 2.0, "loss": 3.0}) == ["eval_a"]`.
    """
    prefixes = [name.removesuffix("_elbo") for name in metrics if re.fullmatch("eval_(.*_)?elbo", name)]
    return [prefix for prefix in prefixes if f"{prefix}_ce" in metrics]


def all_evaluations(
    log_history: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Evaluations of a trainer's `log_history` and of its `evaluations` in the order of their steps, each once."""
    # Neither has all: a resumed run finds those before it in the log alone, and `train()` empties the log of those
    # that came before it.
    by_step = {(entry["step"], *evaluated_sets(entry)): entry for entry in [*log_history, *evaluations]}
    return [by_step[key] for key in sorted(by_step) if key[1:]]


def evaluation_rows(evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first and the last evaluation of each evaluation set, as rows of the card's table.

    Args:
        evaluations (`list[dict]`):
            Metrics with their `step`; an entry may hold one evaluation set or several.

    Returns:
        `list[dict]`: `label`, `set` (empty where there is one set only), `last`, `step` and the metrics without their
        prefix.
    """
    by_set: dict[str, list[dict[str, Any]]] = {}
    for entry in evaluations:
        for prefix in evaluated_sets(entry):
            values = {name: entry[f"{prefix}_{name}"] for name in _MEASURED}
            values |= {name: entry[f"{prefix}_{name}"] for name in _SAMENESS if f"{prefix}_{name}" in entry}
            by_set.setdefault(prefix.removeprefix("eval").removeprefix("_"), []).append(
                {**values, "step": entry["step"]}
            )
    rows = []
    for name, of_set in by_set.items():
        of = f" of {name}" if name else ""
        if len(of_set) > 1:
            rows.append({"label": f"first evaluation{of}", "set": name, "last": False, **of_set[0]})
        rows.append({"label": f"last evaluation{of}", "set": name, "last": True, **of_set[-1]})
    return rows


def mean_logged(log_history: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Mean of a metric over the lines of a log that have it, if any has."""
    values = [entry[name] for entry in log_history if name in entry]
    return fmean(values) if values else None


def hub_ids(names: Sequence[str | None]) -> list[str]:
    """Those of `names` (each may be a list with commas) that can be repositories of the Hub: `org/name`, no path."""
    single = [name.strip() for listed in names if listed for name in listed.split(",")]
    form = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
    return [name for name in dict.fromkeys(single) if re.fullmatch(form, name) and not Path(name).exists()]


def card_facts(
    trainer, model_name: str | None = None, dataset_name: str | None = None, **extra: Any
) -> ModelCardFacts:
    """Gathers what the card of `trainer`'s model says.

    Args:
        trainer ([`RA3MidTrainer`]):
            The trainer, before or after training.
        model_name (`str`, *optional*), dataset_name (`str`, *optional*):
            Names on the card; the default of the first is the name of `output_dir`.
        **extra:
            Further arguments of `Trainer.create_model_card`; `license`, `language`, `tags`, `finetuned_from` and
            `dataset` are used.

    Raises:
        `ValueError`: for another argument.
    """
    if unknown := set(extra) - _USED - _UNUSED:
        raise ValueError(f"a model card has no {sorted(unknown)}; it takes {sorted(_USED)}.")
    # The base may be a path of this machine: its last part goes on the card, or an id that can be the Hub's.
    args, backbone = trainer.args, trainer.policy.backbone
    base = extra.get("finetuned_from") or backbone.causal_lm.config._name_or_path
    lists = (extra.get(name) or [] for name in ("tags", "dataset"))
    tags, named = ([value] if isinstance(value, str) else list(value) for value in lists)
    adapter = isinstance(backbone.model, PeftModel)
    packages = ("ra3-trl", "trl", "transformers", *(("peft",) if adapter else ()), "torch", "datasets")
    action_format = find_format(args.action_format)
    latents = best_latents(trainer.latent_log.latest(trainer.state.global_step))
    return ModelCardFacts(
        model_name=model_name or Path(args.output_dir).name,
        model_id=trainer.hub_model_id or args.hub_model_id or public_name(args.output_dir),
        base=Path(base).name if base else "a model without a name",
        base_id=next(iter(hub_ids([base])), None),
        adapter=adapter,
        abstraction_head=trainer.loop.learner is not None,
        action_format=args.action_format,
        think=action_format.think,
        tagged=bool(action_format.tags),
        dataset_name=dataset_name and public_name(dataset_name),
        dataset_ids=hub_ids([dataset_name, *named]),
        dataset_license=args.dataset_license,
        row_licenses=count_licenses(trainer.source_dataset),
        counts=trainer.cut.counts,
        tokens_seen=int(trainer.state.num_input_tokens_seen),
        annotated_rate=mean_logged(trainer.state.log_history, "mstep/annotated_rate"),
        placed_gain=mean_logged(trainer.state.log_history, "mstep/placed_gain"),
        settings={name: vars(args)[name] for name in _SHOWN} | {"annotation": args.annotation_way},
        versions={name: metadata.version(name) for name in packages},
        evaluations=evaluation_rows(all_evaluations(trainer.state.log_history, trainer.evaluations)),
        latents=latents[:_LATENTS_SHOWN],
        latents_of=len(latents),
        license=extra.get("license"),
        language=extra.get("language"),
        tags=tags,
    )


def best_latents(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of the latents at each boundary the one with the largest gain, largest gains first."""
    # A card is public: none by what looks like a secret of the training text.
    harmless = [row for row in rows if not find_secrets(f"{row['latent']}\n{row['line']}")]
    ordered = sorted(harmless, key=lambda row: row["gain"])
    best = {(row["doc_id"], row["line_number"]): row for row in ordered}
    return sorted(best.values(), key=lambda row: -row["gain"])


def count_licenses(dataset: Any) -> dict[str, int]:
    """Counts rows by their column `license`, the most frequent first; `{}` for a stream or without that column."""
    if not isinstance(dataset, Dataset) or "license" not in dataset.column_names:
        return {}
    if dataset not in _COUNTED:
        cells = dataset.with_format(None)["license"]
        _COUNTED[dataset] = dict(Counter(row_license(value) or "unknown" for value in cells).most_common())
    return _COUNTED[dataset]


def _eval_results(facts: ModelCardFacts) -> list[EvalResult]:
    """The last evaluation of each held-out set, as the card's metadata have it; numbers that are finite only."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=re.sub(r"[^a-z0-9]+", "-", (row["set"] or _HELD_OUT).lower()),
            dataset_name=row["set"] or _HELD_OUT,
            metric_type=name,
            metric_name=words,
            metric_value=round(float(row[name]), 4),
            verified=False,
        )
        for row in facts.evaluations
        if row["last"]
        for name, words in (_MEASURED | _SAMENESS).items()
        if math.isfinite(row.get(name, math.nan))
    ]


def render_model_card(facts: ModelCardFacts) -> ModelCard:
    """Lays out the card, with metadata that the Hub takes."""
    # `base_model` and `datasets` may name what is on the Hub only, and `license` one of its identifiers; what these
    # can't say stands in the text.
    results = _eval_results(facts)
    optional: dict[str, Any] = license_metadata([facts.license] if facts.license else [])
    if facts.base_id:
        relation = "adapter" if facts.adapter else "finetune"
        optional |= {"base_model": facts.base_id, "base_model_relation": relation}
    if results:
        optional |= {"eval_results": results, "model_name": facts.model_name}
    data = ModelCardData(
        library_name="peft" if facts.adapter else "transformers",
        pipeline_tag="text-generation",
        language=facts.language,
        datasets=list(facts.dataset_ids) or None,
        tags=sorted({"ra3", "trl", "generated_from_trainer", *map(str, facts.tags)}),
        **optional,
    )
    prompt = _PROMPTS.get(facts.action_format, "def fibonacci(n):\n")
    thinks = [(row["set"] or _HELD_OUT, row["think_rate"]) for row in facts.evaluations if row["last"]]
    return ModelCard(render("model_card.md.jinja", data, facts=facts, prompt=prompt, thinks=thinks))


def render(template: str, data: CardData, **values: Any) -> str:
    """A template of this folder with a card's metadata and values; its macros are in `shared.md.jinja`."""
    return _TEMPLATES.get_template(template).render(card_data=data.to_yaml(), **values)
