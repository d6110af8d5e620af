"""The model card of a mid-trained checkpoint: what was measured, and how to use it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..config import RA3Config
from ..rollout import Backbone
from ..segmentation import find_format


TEMPLATE = Path(__file__).parent / "model_card.md.jinja"
_SHOWN = (
    "em_iterations", "e_steps", "m_steps", "max_steps", "learning_rate", "e_learning_rate",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "num_latents",
    "max_latent_length", "horizon", "discount", "penalty",
    "line_reduction", "baseline", "reward_model", "gate_hold", "kl_coef", "annotation", "prior_alpha",
    "action_format", "existing_comments", "temperature", "seed",
)  # fmt: skip
_MEASURED = ("ce", "ce_policy", "elbo", "bound_multi", "think_rate", "gain")


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
        `list[dict]`: `label`, `step` and the metrics without their prefix.
    """
    by_set: dict[str, list[dict[str, Any]]] = {}
    for entry in evaluations:
        for prefix in evaluated_sets(entry):
            values = {name: entry[f"{prefix}_{name}"] for name in _MEASURED}
            by_set.setdefault(prefix, []).append({**values, "step": entry["step"]})
    rows = []
    for prefix, of_set in by_set.items():
        of = "" if prefix == "eval" else f" of {prefix.removeprefix('eval_')}"
        chosen = {"first": of_set[0], "last": of_set[-1]} if len(of_set) > 1 else {"last": of_set[-1]}
        rows += [{"label": f"{which} evaluation{of}", **values} for which, values in chosen.items()]
    return rows


def _hub_ids(names: Sequence[str | None]) -> list[str] | None:
    """Those of `names` (each may be a list with commas) that can be data sets of the Hub: `org/name`, not a path."""
    single = [part.strip() for name in names if name for part in name.split(",")]
    return [name for name in single if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()] or None


def write_model_card(
    args: RA3Config,
    evaluations: list[dict[str, float]],
    backbone: Backbone,
    counts: dict[str, dict[str, int]],
    model_name: str | None = None,
    dataset_name: str | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Renders `README.md` in `args.output_dir`.

    Args:
        args ([`RA3Config`]):
            Settings of the run.
        evaluations (`list[dict]`):
            Metrics of the evaluations with their `step`; the card reports the first and the last of each set.
        backbone ([`Backbone`]):
            The model, for the name of its base.
        counts (`dict`):
            Documents, boundaries and tokens of each split.
        model_name (`str`, *optional*), dataset_name (`str`, *optional*):
            Names on the card.
        extra (`dict`, *optional*):
            Further arguments of `Trainer.create_model_card`; `license`, `language`, `tags`, `finetuned_from` and
            `dataset` are used.
    """
    extra = extra or {}
    base = extra.get("finetuned_from") or backbone.causal_lm.config._name_or_path
    is_hub_id = bool(base) and not Path(base).exists() and base.count("/") == 1 and " " not in base
    tags = extra.get("tags") or []
    named = extra.get("dataset") or []
    named = [dataset_name, *([named] if isinstance(named, str) else named)]
    data = ModelCardData(
        base_model=base if is_hub_id else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        license=extra.get("license"),
        language=extra.get("language"),
        datasets=_hub_ids(named),
        tags=sorted({"ra3", "trl", "generated_from_trainer", *([tags] if isinstance(tags, str) else tags)}),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=model_name or Path(args.output_dir).name,
        model_id=args.hub_model_id or args.output_dir,
        base_model_name=Path(base).name if base else "a model without a name",
        think=find_format(args.action_format).think,
        dataset_name=dataset_name,
        dataset_license=args.dataset_license,
        counts=counts,
        settings={name: vars(args)[name] for name in _SHOWN},
        evaluations=evaluation_rows(evaluations),
        versions={name: metadata.version(name) for name in ("ra3-trl", "trl", "transformers", "torch", "datasets")},
    )
    card.save(Path(args.output_dir) / "README.md")
