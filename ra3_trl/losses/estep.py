"""The E-step's loss: analytic gate gradient and policy gradient on the latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..records import PolicyLogProbs
from .returns import log1mexp


@dataclass(frozen=True)
class EStepTerms:
    """Holds what the E-step optimises at `T` boundaries, as constants computed from rollouts."""

    gate_gain_T: torch.Tensor  # slope of `J = (1-p) G_act + p (mean_g G_g - c)` in p; zero where the gate is held
    advantage_TG: torch.Tensor  # of the latents
    weight_T: torch.Tensor  # of the latents: 1, or P(think)


def gate_slope(gain_TG: torch.Tensor, penalty: float, hold: bool) -> torch.Tensor:
    """Computes the slope of the gate's objective in P(think), `[T]`; zero while the gate is held ([`gate_anchor`]).

    >>> gate_slope(torch.tensor([[2.0, 0.0]]), penalty=0.25, hold=False)
    tensor([0.7500])
    """
    slope = gain_TG.mean(1) - penalty
    return torch.zeros_like(slope) if hold else slope


def gate_anchor(gate_logps_T: torch.Tensor, start_gate_logps_T: torch.Tensor) -> torch.Tensor:
    """Computes KL(Bernoulli(P(think) at the start) || Bernoulli(P(think))), `[T]`: what holds a held gate still.

    Its slope in the gate's log-odds is `p - p_start`: at most 1, and not vanishing where p has collapsed.
    """
    log_p, log_q = start_gate_logps_T, log1mexp(start_gate_logps_T)
    return log_p.exp() * (log_p - gate_logps_T) + log_q.exp() * (log_q - log1mexp(gate_logps_T))


def estep_loss(
    terms: EStepTerms,
    logps: PolicyLogProbs,
    kl_coef: float = 0.0,
    reference: PolicyLogProbs | None = None,
    anchored: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sums the negative objective over boundaries; the caller divides by the boundaries of the whole window.

    Args:
        terms ([`EStepTerms`]):
            Constants of the boundaries.
        logps ([`~ra3_trl.records.PolicyLogProbs`]):
            Gates and sampled symbols under the live weights, differentiable.
        kl_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the latents' KL to `reference`. The estimator is `r - 1 - log r` with `r = pi_ref / pi`, as in
            GRPO: never negative, unbiased.
        reference ([`~ra3_trl.records.PolicyLogProbs`], *optional*):
            The same under the weights at the start.
        anchored (`bool`, *optional*, defaults to `False`):
            Adds [`gate_anchor`] to the start's gates: what holds a held gate still.

    Returns:
        The loss and its parts, all summed over boundaries (the KL averaged over the latents of a boundary).
    """
    boundaries, latents = terms.advantage_TG.shape
    # The gate's gradient is analytic, since its gain is known at both ends, thinking and not. Latents get a mean over
    # those of a boundary, whatever their lengths.
    gate = -(logps.gate_T.exp() * terms.gate_gain_T).sum()
    scale_n = (terms.weight_T[:, None] / latents).expand(boundaries, latents).reshape(-1)[logps.branch_n]
    policy = -(scale_n * terms.advantage_TG.reshape(-1)[logps.branch_n] * logps.token_n).sum()
    parts = {"gate": gate, "policy": policy}
    loss = gate + policy
    if reference is not None and kl_coef:
        log_ratio = reference.token_n - logps.token_n
        parts["kl"] = ((torch.exp(log_ratio) - 1 - log_ratio) / latents).sum()
        loss = loss + kl_coef * parts["kl"]
    if reference is not None and anchored:
        parts["gate_anchor"] = gate_anchor(logps.gate_T, reference.gate_T).sum()
        loss = loss + parts["gate_anchor"]
    return loss, {name: part.detach() for name, part in parts.items()}
