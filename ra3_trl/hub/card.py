"""The model card of a mid-trained checkpoint: what was measured, and how to use it.

`card_facts` gathers from a trainer what a card says, `render_model_card` lays it out; the facts are plain values, so
that a card can be rendered anew from a JSON file (`model_cards/`).
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel

from ..markdown import cell, code_cell
from ..segmentation import find_format
from .licenses import license_metadata, row_license
from .secrets import find_secrets


PAPER = "https://huggingface.co/papers/2509.25810"
TEMPLATE = Path(__file__).parent / "model_card.md.jinja"
_SHOWN = (
    "em_iterations", "e_steps", "m_steps", "max_steps", "learning_rate", "e_learning_rate",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "num_latents",
    "max_latent_length", "horizon", "discount", "penalty", "line_reduction", "baseline", "reward_model", "gate",
    "gate_hold", "boundary_selection", "kl_coef", "annotation", "prior_alpha", "action_format", "existing_comments",
    "temperature", "seed",
)  # fmt: skip
_MEASURED = {
    "ce": "cross-entropy (nats per code token)",
    "ce_policy": "cross-entropy with the model's own latents (nats per code token)",
    "elbo": "negative ELBO (nats per code token)",
    "bound_multi": "negative multi-sample bound (nats per code token)",
    "think_rate": "mean P(think) at a boundary",
    "gain": "gain of a latent (nats)",
}
_USED, _UNUSED = (
    {"license", "language", "tags", "finetuned_from", "dataset"},
    {"tasks", "dataset_tags", "dataset_args"},
)
_HELD_OUT = "held-out code"
_PROMPTS = {"slashes": "int fibonacci(int n) {\n", "prose": "The first of these"}
_LATENTS_SHOWN = 6


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
        row_licenses (`Mapping[str, int]`):
            Training documents by the licence that their row names.
        counts (`Mapping[str, Mapping[str, int]]`):
            Documents, boundaries and tokens of each split.
        tokens_seen (`int`):
            Tokens of the training data that the updates saw; 0 where nobody counted.
        settings (`Mapping[str, Any]`), versions (`Mapping[str, str]`):
            Settings of the run; versions of the packages.
        evaluations (`Sequence[Mapping[str, Any]]`):
            Rows of [`evaluation_rows`].
        latents (`Sequence[Mapping[str, Any]]`), latents_of (`int`):
            Rows of [`best_latents`], and the boundaries that they are of.
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
    found = [name.removesuffix("_elbo") for name in metrics if name.startswith("eval_") and name.endswith("_elbo")]
    return [prefix for prefix in found if f"{prefix}_ce" in metrics]


def all_evaluations(
    log_history: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Evaluations in the order of their steps, each once: those of the log, where a resumed run has the ones before,
    and those that the trainer noted, among them the ones before `train()`, which empties the log.

    Args:
        log_history (`list[dict]`):
            `trainer.state.log_history`.
        evaluations (`list[dict]`):
            `trainer.evaluations`.
    """
    found = {(entry["step"], *evaluated_sets(entry)): entry for entry in [*log_history, *evaluations]}
    return [found[key] for key in sorted(found) if key[1:]]


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
            by_set.setdefault(prefix, []).append({**values, "step": entry["step"]})
    rows = []
    for prefix, of_set in by_set.items():
        name = "" if prefix == "eval" else prefix.removeprefix("eval_")
        of = f" of {name}" if name else ""
        chosen = {"first": of_set[0], "last": of_set[-1]} if len(of_set) > 1 else {"last": of_set[-1]}
        rows += [
            {"label": f"{which} evaluation{of}", "set": name, "last": which == "last", **values}
            for which, values in chosen.items()
        ]
    return rows


def hub_ids(names: Sequence[str | None]) -> list[str]:
    """Those of `names` (each may be a list with commas) that can be repositories of the Hub: `org/name`, no path."""
    single = [part.strip() for name in names if name for part in name.split(",")]
    form = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
    return [name for name in dict.fromkeys(single) if re.fullmatch(form, name) and not Path(name).exists()]


def public_name(name: str) -> str:
    """`name`, or names with commas, and of each path its last part: where it lay on a machine is nobody's business.

    Example: `public_name("org/code, ../clients/acme") == "org/code, acme"`.
    """
    parts = [name] if os.path.exists(name) else name.split(",")
    return ", ".join(_last_part(part.strip()) for part in parts)


def _last_part(name: str) -> str:
    # `os.path`'s, since `Path.exists` raises where a name is too long for a file.
    if not (re.match(r"[/\\.~]|file:|[A-Za-z]:[/\\]", name) or os.path.exists(name)):
        return name
    last = re.split(r"[/\\]", name.removeprefix("file:").rstrip("/\\"))[-1]
    return "a folder" if last in ("", ".", "..") or last.startswith("~") else last


def card_facts(
    trainer, model_name: str | None = None, dataset_name: str | None = None, **extra: Any
) -> ModelCardFacts:
    """What the card of `trainer`'s model says.

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
        settings={name: vars(args)[name] for name in _SHOWN},
        versions={name: metadata.version(name) for name in packages},
        evaluations=evaluation_rows(all_evaluations(trainer.state.log_history, trainer.evaluations)),
        latents=latents[:_LATENTS_SHOWN],
        latents_of=len(latents),
        license=extra.get("license"),
        language=extra.get("language"),
        tags=tags,
    )


def best_latents(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of the latents at each boundary the one with the largest gain, largest gains first; none by what looks like a
    secret of the training text."""
    ordered = [
        row for row in sorted(rows, key=lambda row: row["gain"]) if not find_secrets(f"{row['latent']}\n{row['line']}")
    ]
    best = {(row["doc_id"], row["line_number"]): row for row in ordered}
    return sorted(best.values(), key=lambda row: -row["gain"])


def count_licenses(dataset: Any, column: str = "license") -> dict[str, int]:
    """Rows of a data set by licence, the most frequent first; empty for a stream or without such a column."""
    if not isinstance(dataset, Dataset) or column not in dataset.column_names:
        return {}
    return dict(Counter(row_license(value) or "unknown" for value in dataset.with_format(None)[column]).most_common())


def eval_results(facts: ModelCardFacts) -> list[EvalResult]:
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
        for name, words in _MEASURED.items()
        if math.isfinite(row[name])
    ]


def render_model_card(facts: ModelCardFacts) -> ModelCard:
    """The card, with metadata that the Hub takes.

    `base_model` and `datasets` name what is on the Hub only, and `license` is one of the Hub's identifiers; what these
    can't say stands in the text.
    """
    results = eval_results(facts)
    base = {"base_model": facts.base_id, "base_model_relation": "adapter" if facts.adapter else "finetune"}
    tags = {"ra3", "trl", "generated_from_trainer", *facts.tags}
    data = ModelCardData(
        **(base if facts.base_id else {}),
        library_name="peft" if facts.adapter else "transformers",
        pipeline_tag="text-generation",
        **license_metadata([facts.license] if facts.license else []),
        language=facts.language,
        datasets=list(facts.dataset_ids) or None,
        tags=sorted({str(tag) for tag in tags}),
        **({"eval_results": results, "model_name": facts.model_name} if results else {}),
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        facts=facts,
        paper=PAPER,
        prompt=_PROMPTS.get(facts.action_format, "def fibonacci(n):\n"),
        thinks=[(m["set"] or _HELD_OUT, m["think_rate"]) for m in facts.evaluations if m["last"]],
        cell=cell,
        code_cell=code_cell,
    )
