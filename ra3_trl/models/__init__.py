"""What stands beside the language model: loading, frozen weights; the abstraction head will live here."""

from .frozen import FrozenWeights
from .load import context_length, disable_dropout, load_model, load_tokenizer


__all__ = ["FrozenWeights", "context_length", "disable_dropout", "load_model", "load_tokenizer"]
