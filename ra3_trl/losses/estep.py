"""The E-step's loss: analytic gate gradient and policy gradient on the latents."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..records import PolicyLogProbs
from .returns import log1mexp


@dataclass(frozen=True)
class EStepTerms:
    """Holds what the E-step optimises at `T` boundaries, as constants computed from rollouts.

    Where boundaries are drawn, each field but the advantages has the inverse of their probability as a factor.
    """

    gate_gain_T: torch.Tensor  # slope of the gate's objective in P(think); 0 where the gate is held
    advantage_TG: torch.Tensor  # of the latents
    weight_T: torch.Tensor  # of the latents, and of their KL: how often the E-step thinks there ([`explored`])
    anchor_T: torch.Tensor  # of the gate's anchor to its start; 0 where it is free


def explored(log_think: torch.Tensor, exploration: float) -> torch.Tensor:
    """Computes how often an E-step thinks, and what annotation expects: `(1 - e) P(think) + e`.

    >>> explored(torch.tensor([0.5, 0.0]).log(), exploration=0.1)
    tensor([0.5500, 0.1000])
    """
    return (1 - exploration) * log_think.exp() + exploration


def log_mean_gain(gain_TG: torch.Tensor) -> torch.Tensor:
    """Computes `log mean_g exp(gain_g)` `[T]`: the rise of the lines' log-likelihood from thinking, the latent being
    summed over and not known.

    >>> log_mean_gain(torch.tensor([[1.5, -torch.inf]])).exp() / torch.tensor(1.5).exp()
    tensor([0.5000])
    """
    return torch.logsumexp(gain_TG, 1) - math.log(gain_TG.shape[1])


def gate_slope(gain_TG: torch.Tensor, log_think_T: torch.Tensor, penalty: float) -> torch.Tensor:
    """Computes the slope in `p = P(think)` of the multi-sample bound `log[(1-p) + p e^m]`, `[T]`, where
    `m = log mean_g exp(gain_g) - c` is what the best of several latents bring, less their cost.

    In the gate's log-odds the slope is `r - p`, `r` being the posterior probability of thinking with which annotation
    resamples: between -1 and 1 whatever the gains are. It vanishes where thinking pays as often as the gate says and
    not, as the slope of a mean gain does, where wrong latents cost as much as right ones bring.

    >>> gate_slope(torch.tensor([[1.5, -torch.inf]]), torch.tensor([0.5]).log(), penalty=0.0)  # e^m = 2.24
    tensor([0.7657])
    """
    m = (log_mean_gain(gain_TG) - penalty).clamp(max=30.0)  # a slope that P(think) = 0 can be multiplied with
    p = log_think_T.exp()
    return torch.expm1(m) / (1 - p + p * m.exp())


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
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sums the negative objective over boundaries; the caller divides by the boundaries of the whole window.

    Args:
        terms ([`EStepTerms`]):
            Constants of the boundaries.
        logps ([`~ra3_trl.records.PolicyLogProbs`]):
            Gates and sampled symbols under the live weights, differentiable.
        kl_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the latents' KL to `reference`, which counts as often as they are written (`weight_T`). The
            estimator is `r - 1 - log r` with `r = pi_ref / pi`, as in GRPO: never negative, unbiased.
        reference ([`~ra3_trl.records.PolicyLogProbs`], *optional*):
            The same under the weights at the start; the gate is anchored to its gates ([`gate_anchor`]).

    Returns:
        The loss and its parts, all summed over boundaries (policy and KL averaged over the latents of a boundary).
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
        parts["kl"] = (scale_n * (torch.exp(log_ratio) - 1 - log_ratio)).sum()
        loss = loss + kl_coef * parts["kl"]
    if reference is not None and bool(terms.anchor_T.any()):
        parts["gate_anchor"] = (terms.anchor_T * gate_anchor(logps.gate_T, reference.gate_T)).sum()
        loss = loss + parts["gate_anchor"]
    return loss, {name: part.detach() for name, part in parts.items()}
