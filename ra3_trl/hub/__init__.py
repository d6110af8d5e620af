"""Cards, and what is pushed: the model's card, the annotated corpus with its own, and what must not leave."""

from .annotated import (
    ANNOTATION,
    AnnotatedRow,
    RowAnnotator,
    annotate_dataset,
    join_chunks,
    refuse_annotated,
    require_boundaries,
)
from .card import ModelCardFacts, all_evaluations, card_facts, render_model_card
from .dataset_card import CorpusFacts, render_dataset_card
from .manifest import MANIFEST, Manifest, Origin, ShardEntry, checkpoint_hash, shard_file, weights_hash
from .mixin import HubMixin
from .publish import DatasetPush
from .push import PushMixin
from .secrets import Secret, find_secrets, scan_rows
from .shards import Corpus, ShardedAnnotation, Share, cut_into_shards, refuse_without_boundaries, rows_of_a_shard


__all__ = [
    "ANNOTATION",
    "MANIFEST",
    "AnnotatedRow",
    "Corpus",
    "CorpusFacts",
    "DatasetPush",
    "HubMixin",
    "Manifest",
    "ModelCardFacts",
    "Origin",
    "PushMixin",
    "RowAnnotator",
    "Secret",
    "ShardEntry",
    "ShardedAnnotation",
    "Share",
    "all_evaluations",
    "annotate_dataset",
    "card_facts",
    "checkpoint_hash",
    "cut_into_shards",
    "find_secrets",
    "join_chunks",
    "refuse_annotated",
    "refuse_without_boundaries",
    "render_dataset_card",
    "render_model_card",
    "require_boundaries",
    "rows_of_a_shard",
    "scan_rows",
    "shard_file",
    "weights_hash",
]
