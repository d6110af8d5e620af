"""The E-step's loss: analytic gate gradient and policy gradient on the latents."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..records import PolicyLogProbs
from .returns import log1mexp, log_mean_gain


@dataclass(frozen=True)
class EStepTerms:
    """Holds what the E-step optimises at `T` boundaries, as constants computed from rollouts.

    Where boundaries are drawn, each has the inverse of their probability as a factor.
    """

    gate_gain_T: torch.Tensor  # slope of the objective in P(think); 0 where the gate is held
    advantage_TG: torch.Tensor  # slope of the objective in a latent's log-prob, times G
    weight_T: torch.Tensor  # of the latents' KL: how often the E-step thinks there ([`explored`])
    anchor_T: torch.Tensor  # of the gate's anchor to its start; 0 where it is free


def explored(log_think: torch.Tensor, exploration: float) -> torch.Tensor:
    """Computes how often an E-step thinks, and what annotation expects: `(1 - e) P(think) + e`.

    >>> explored(torch.tensor([0.5, 0.0]).log(), exploration=0.1)
    tensor([0.5500, 0.1000])
    """
    return (1 - exploration) * log_think.exp() + exploration


def joint_gain(gain_TG: torch.Tensor, objective: str) -> torch.Tensor:
    """Computes what the latents of a boundary bring together, `[T]` in nats: their mean gain (`"elbo"`), or the log of
    the mean likelihood ([`log_mean_gain`])."""
    return gain_TG.mean(1) if objective == "elbo" else log_mean_gain(gain_TG)


def gate_slope(
    gain_TG: torch.Tensor, log_think_T: torch.Tensor, penalty: float, objective: str = "multi_sample"
) -> torch.Tensor:
    """Computes the objective's slope in `p = P(think)`, `[T]`.

    Of the ELBO, `p (mean_g gain_g - c)`, it is that mean gain. Of the multi-sample bound, `log[(1-p) + p e^m]` with
    `m = log mean_g exp(gain_g) - c`, it is `r - p` in the gate's log-odds, `r` being the posterior probability of
    thinking with which annotation resamples: between -1 and 1 whatever the gains are. It vanishes where the gate
    thinks as often as that pays, and does not close it where wrong latents cost as much as right ones bring.

    >>> gate_slope(torch.tensor([[1.5, -torch.inf]]), torch.tensor([0.5]).log(), penalty=0.0)  # e^m = 2.24
    tensor([0.7658])
    """
    m = joint_gain(gain_TG, objective) - penalty
    if objective == "elbo":
        return m
    # `1 - p` from the log, and not 0 where p rounds to 1: else a gate that is shut against harm gets no finite slope.
    # Nor is m without bound, since P(think) = 0 is multiplied with the slope.
    p, q, m = log_think_T.exp(), (-torch.expm1(log_think_T)).clamp(min=2.0**-24), m.clamp(max=30.0)
    return torch.expm1(m) / (q + p * m.exp())


def advantages(
    gain_TG: torch.Tensor, think_T: torch.Tensor, penalty: float, objective: str = "multi_sample"
) -> torch.Tensor:
    """Computes the objective's slope in each latent's log-prob, times G, less a baseline that does not depend on the
    latent, `[T, G]`; `think_T` is how often one thinks.

    Of the ELBO it is `p (gain_g - mean of the others')`, in which the penalty cancels. Of the multi-sample bound it is
    G times the posterior probability `r_g` of the latent, with which annotation resamples, less the posterior
    probability of thinking that the others alone give. So a latent counts where its lines are likelier than without
    it, and hardly where all of them do harm: the least harmful phrase wins nothing there.

    >>> gain = torch.tensor([[1.0, -1.0]])
    >>> advantages(gain, torch.tensor([0.5]), penalty=0.0, objective="elbo")
    tensor([[ 1., -1.]])
    >>> advantages(gain, torch.tensor([0.5]), penalty=0.0)  # 2 * 0.534 - 0.269, 2 * 0.072 - 0.731
    tensor([[ 0.8000, -0.5864]])
    """
    others = gain_TG.shape[1] - 1
    if objective == "elbo":
        return think_T[:, None] * (gain_TG - (gain_TG.sum(1, keepdim=True) - gain_TG) / others)
    # In logs: <act> and each latent, as in `resampling_logits`.
    log_act = log1mexp(think_T.log())[:, None]
    log_latent = think_T.log()[:, None] + gain_TG - penalty
    own = log_latent - torch.logaddexp(log_act, log_latent.logsumexp(1, keepdim=True) - math.log(others + 1))
    alone = torch.eye(others + 1, dtype=torch.bool, device=gain_TG.device)
    rest = log_latent[:, None].masked_fill(alone, -torch.inf).logsumexp(2) - math.log(others)
    return own.exp() - torch.sigmoid(rest - log_act)


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
    policy = -(terms.advantage_TG.reshape(-1)[logps.branch_n] * logps.token_n).sum() / latents
    parts = {"gate": gate, "policy": policy}
    loss = gate + policy
    if reference is not None and kl_coef:
        log_ratio = reference.token_n - logps.token_n
        weight_n = terms.weight_T[:, None].expand(boundaries, latents).reshape(-1)[logps.branch_n]
        parts["kl"] = (weight_n * (torch.exp(log_ratio) - 1 - log_ratio)).sum() / latents
        loss = loss + kl_coef * parts["kl"]
    if reference is not None and bool(terms.anchor_T.any()):
        parts["gate_anchor"] = (terms.anchor_T * gate_anchor(logps.gate_T, reference.gate_T)).sum()
        loss = loss + parts["gate_anchor"]
    return loss, {name: part.detach() for name, part in parts.items()}
