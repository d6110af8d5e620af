"""The E-step's loss: analytic gate gradient and policy gradient on the latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
    gate_logps_T: torch.Tensor,
    token_logps_n: torch.Tensor,
    branch_n: torch.Tensor,
    *,
    gate_coef: float = 1.0,
    ref_token_logps_n: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    entropy_n: torch.Tensor | None = None,
    entropy_coef: float = 0.0,
    prior_think: float = 0.3,
    gate_kl_coef: float = 0.0,
    anchor_gate_logps_T: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sums the negative objective over boundaries; the caller divides by the boundaries of the whole window.

    Args:
        terms ([`EStepTerms`]):
            Constants of the boundaries.
        gate_logps_T (`torch.Tensor`):
            log P(think), differentiable, `[T]`.
        token_logps_n (`torch.Tensor`), branch_n (`torch.Tensor`):
            Log-prob of each sampled symbol and its branch `t * G + g`, `[n]`.
        ref_token_logps_n (`torch.Tensor`, *optional*):
            The same symbols under the weights at the start, for the KL term. The estimator is
            `r - 1 - log r` with `r = pi_ref / pi`, as in GRPO: never negative, unbiased.
        entropy_n (`torch.Tensor`, *optional*):
            Entropy of the distribution each symbol was drawn from.
        anchor_gate_logps_T (`torch.Tensor`, *optional*):
            log P(think) under the weights at the start, given while the gate is held: [`gate_anchor`] is then added,
            with weight `gate_coef`.

    Returns:
        The loss and its parts, all summed over boundaries (KL and entropy averaged over the latents of a boundary).
    """
    boundaries, latents = terms.advantage_TG.shape
    # The gate's gradient is analytic, since its gain is known at both ends, thinking and not. Latents get a mean over
    # those of a boundary, whatever their lengths.
    gate = -(gate_logps_T.exp() * terms.gate_gain_T).sum()
    scale_n = (terms.weight_T[:, None] / latents).expand(boundaries, latents).reshape(-1)[branch_n]
    policy = -(scale_n * terms.advantage_TG.reshape(-1)[branch_n] * token_logps_n).sum()
    parts = {"gate": gate, "policy": policy}
    loss = gate_coef * gate + policy
    if kl_coef:
        assert ref_token_logps_n is not None
        log_ratio = ref_token_logps_n - token_logps_n
        parts["kl"] = ((torch.exp(log_ratio) - 1 - log_ratio) / latents).sum()
        loss = loss + kl_coef * parts["kl"]
    if entropy_coef:
        assert entropy_n is not None
        parts["entropy"] = (entropy_n / latents).sum()
        loss = loss - entropy_coef * parts["entropy"]
    if gate_kl_coef:
        parts["gate_kl"] = bernoulli_kl(gate_logps_T, prior_think).sum()
        loss = loss + gate_kl_coef * parts["gate_kl"]
    if anchor_gate_logps_T is not None:
        parts["gate_anchor"] = gate_anchor(gate_logps_T, anchor_gate_logps_T).sum()
        loss = loss + gate_coef * parts["gate_anchor"]
    return loss, {name: part.detach() for name, part in parts.items()}


def bernoulli_kl(gate_logps: torch.Tensor, prior_think: float) -> torch.Tensor:
    """Computes KL(Bernoulli(P(think)) || Bernoulli(prior_think)): the gate's part of the ELBO's KL (Prop. 5.1)."""
    log_p, log_q = gate_logps, log1mexp(gate_logps)
    prior = torch.tensor(prior_think, dtype=gate_logps.dtype, device=gate_logps.device)
    return log_p.exp() * (log_p - torch.log(prior)) + log_q.exp() * (log_q - torch.log1p(-prior))
