"""What runs and policies say about the method: numbers only, no model is run here."""

from .estimates import Estimate, t_quantile


__all__ = ["Estimate", "t_quantile"]
