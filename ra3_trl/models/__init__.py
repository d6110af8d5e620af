"""What stands beside the language model: loading, frozen weights; the abstraction head will live here."""

from .frozen import BaseWeights, FrozenWeights
from .load import (
    check_trainable,
    check_vocabulary,
    context_length,
    disable_dropout,
    load_model,
    load_tokenizer,
)
from .tags import add_tags


__all__ = [
    "BaseWeights",
    "FrozenWeights",
    "add_tags",
    "check_trainable",
    "check_vocabulary",
    "context_length",
    "disable_dropout",
    "load_model",
    "load_tokenizer",
]
