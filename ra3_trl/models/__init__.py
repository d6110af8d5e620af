"""What stands beside the language model: loading, frozen weights, tags, the abstraction head."""

from .frozen import BaseWeights, FrozenWeights
from .head import HEAD_WEIGHTS, AbstractionConfig, AbstractionHead, load_head, save_head
from .load import (
    Dropout,
    cast_to,
    check_trainable,
    check_vocabulary,
    context_length,
    disable_dropout,
    end_ids,
    load_model,
    load_tokenizer,
    place_of,
    state_width,
)
from .prepare import prepare_model
from .tags import add_tags


__all__ = [
    "HEAD_WEIGHTS",
    "AbstractionConfig",
    "AbstractionHead",
    "BaseWeights",
    "Dropout",
    "FrozenWeights",
    "add_tags",
    "cast_to",
    "check_trainable",
    "check_vocabulary",
    "context_length",
    "disable_dropout",
    "end_ids",
    "load_head",
    "load_model",
    "load_tokenizer",
    "prepare_model",
    "place_of",
    "save_head",
    "state_width",
]
