"""Line rewards and returns over the horizon.

A reward is a renormalised line log-likelihood: the raw probability of an expert line contains the mass of not thinking
before it, so `log(1 - P(think))` is taken out, with a latent and without (docs/design.md, "The objective").
Without that a useless comment looks like a gain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..records import RolloutGroup


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """Computes `log(1 - exp(x))` for `x <= 0`, without cancellation. `x = -inf` gives 0; 0 counts as one ulp below."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -0.6931
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, torch.log(-torch.expm1(x)), far)


def renormalise(line_logps: torch.Tensor, gate_logps: torch.Tensor) -> torch.Tensor:
    """Takes the mass of thinking out of a line: `R = l(a | .) - log(1 - P(think | .))`. A gate of `-inf`, no decision,
    leaves the line as it is.

    >>> renormalise(torch.tensor([-1.0, -1.0]), torch.tensor([-0.6931472, -torch.inf]))
    tensor([-0.3069, -1.0000])
    """
    return line_logps - log1mexp(gate_logps)


@dataclass(frozen=True)
class Returns:
    """Holds the returns of a group in nats (nats per token when the lines are reduced by their mean)."""

    act_T: torch.Tensor  # of the lines without a latent
    # Of the same lines under each latent, the penalty not yet paid; with `log pi(z | s) - log q(z | s, a)` added where
    # the policy has not drawn it.
    latent_TG: torch.Tensor

    @property
    def gain_TG(self) -> torch.Tensor:
        return self.latent_TG - self.act_T[:, None]


def compute_returns(group: RolloutGroup, horizon: int, discount: float, reduction: str = "sum") -> Returns:
    """Sums discounted line rewards, `G(t) = sum_{k < H} discount^k R_{t+k}` (PAPER, E-step; H and the discount are our
    choice), cut at the document's end and at a kept comment. `horizon` is at most the lines that were scored;
    `reduction` is the `"sum"` over a line's tokens (a log-likelihood), or the `"mean"` (a surrogate).
    """
    actions = group.document.actions
    act_A = renormalise(group.line_logps_A, group.gate_logps_A)
    latent_TGH = renormalise(group.latent_line_logps_TGH[..., :horizon], group.latent_gate_logps_TGH[..., :horizon])
    weight_TH = torch.zeros(len(group.boundaries), horizon)
    act_TH = torch.zeros(len(group.boundaries), horizon)
    for t, boundary in enumerate(group.boundaries):
        for k, action in enumerate(actions[boundary : boundary + horizon]):
            if action.comment:
                break
            tokens = action.end - max(action.start, 1) if reduction == "mean" else 1
            weight_TH[t, k] = discount**k / max(tokens, 1)
            act_TH[t, k] = act_A[boundary + k]
    latent_TG = (weight_TH[:, None] * latent_TGH).sum(-1)
    if group.log_ratio_TG is not None:
        latent_TG = latent_TG + group.log_ratio_TG
    return Returns((weight_TH * act_TH).sum(-1), latent_TG)


def log_mean_gain(gain_TG: torch.Tensor) -> torch.Tensor:
    """Computes `log mean_g exp(gain_g)` `[T]`: the rise of the lines' log-likelihood from thinking, the latent being
    summed over and not known.

    >>> log_mean_gain(torch.tensor([[1.5, -torch.inf]])).exp() / torch.tensor(1.5).exp()
    tensor([0.5000])
    """
    return torch.logsumexp(gain_TG, 1) - math.log(gain_TG.shape[1])
