"""Cards, and what is pushed: the model's card, the annotated corpus with its own, and what must not leave."""

from .annotated import ANNOTATION, annotate_dataset, join_chunks, require_boundaries
from .card import ModelCardFacts, all_evaluations, card_facts, render_model_card
from .dataset_card import render_dataset_card
from .mixin import HubMixin
from .publish import DatasetPush
from .secrets import Secret, find_secrets, scan_rows


__all__ = [
    "ANNOTATION",
    "DatasetPush",
    "HubMixin",
    "ModelCardFacts",
    "Secret",
    "all_evaluations",
    "annotate_dataset",
    "card_facts",
    "find_secrets",
    "join_chunks",
    "render_dataset_card",
    "render_model_card",
    "require_boundaries",
    "scan_rows",
]
