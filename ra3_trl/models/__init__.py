"""What stands beside the language model: frozen weights; the abstraction head will live here."""

from .frozen import FrozenWeights


__all__ = ["FrozenWeights"]
