"""What runs and policies say about the method: numbers only, no model is run here."""

from .compactness import effective_numbers, entropy, shares
from .estimates import Estimate, t_quantile
from .horizon import durations, effective_horizon, iteration_bound
from .pruning import Alternatives, Pruning, measure_pruning


__all__ = [
    "Alternatives",
    "Estimate",
    "Pruning",
    "durations",
    "effective_horizon",
    "effective_numbers",
    "entropy",
    "iteration_bound",
    "measure_pruning",
    "shares",
    "t_quantile",
]
