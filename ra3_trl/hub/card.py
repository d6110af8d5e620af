"""The model card of a mid-trained checkpoint: what was measured, and how to use it."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..config import RA3Config
from ..rollout import Backbone


TEMPLATE = Path(__file__).parent / "model_card.md.jinja"
_SHOWN = (
    "em_iterations", "e_steps", "m_steps", "max_steps", "learning_rate", "e_learning_rate",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "num_latents",
    "max_latent_length", "horizon", "discount", "penalty",
    "line_reduction", "baseline", "reward_model", "gate_hold", "kl_coef", "annotation", "prior_alpha",
    "existing_comments", "temperature", "seed",
)  # fmt: skip


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
            Metrics of the evaluations with their `step`; the card reports the first and the last.
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
        datasets=[name for name in named if name and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)] or None,
        tags=sorted({"ra3", "trl", "generated_from_trainer", *([tags] if isinstance(tags, str) else tags)}),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=model_name or Path(args.output_dir).name,
        model_id=args.hub_model_id or args.output_dir,
        base_model_name=Path(base).name if base else "a model without a name",
        dataset_name=dataset_name,
        dataset_license=args.dataset_license,
        counts=counts,
        settings={name: vars(args)[name] for name in _SHOWN},
        first=evaluations[0] if len(evaluations) > 1 else None,
        last=evaluations[-1] if evaluations else None,
        versions={name: metadata.version(name) for name in ("ra3-trl", "trl", "transformers", "torch", "datasets")},
    )
    card.save(Path(args.output_dir) / "README.md")
