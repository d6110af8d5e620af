"""Model card and push."""

from .card import all_evaluations, write_model_card


__all__ = ["all_evaluations", "write_model_card"]
