"""Pure tensor functions: returns, advantages, gate, policy gradient, next-token loss, bounds."""

from .elbo import code_bounds, resampling_logits
from .estep import EStepTerms, advantages, estep_loss, explored, gate_slope, joint_gain
from .ntp import next_token_loss
from .returns import Returns, compute_returns, log1mexp, log_mean_gain, renormalise


__all__ = [
    "EStepTerms",
    "Returns",
    "advantages",
    "code_bounds",
    "compute_returns",
    "estep_loss",
    "explored",
    "gate_slope",
    "joint_gain",
    "log1mexp",
    "log_mean_gain",
    "next_token_loss",
    "renormalise",
    "resampling_logits",
]
