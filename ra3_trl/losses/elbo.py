"""Bounds on the log-likelihood of code under the model with latents; no penalty in them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..records import RolloutGroup
from .returns import compute_returns, log1mexp, log_mean_gain


@dataclass(frozen=True)
class CodeBounds:
    """Holds sums over the code lines of one document, in nats.

    Latents that the policy has not drawn count with `pi(z|s) / q(z|s, a)`, with which both bounds stay bounds. Lines
    without rollouts count as they are, each line once.
    """

    log_likelihood: float  # without latents (raw)
    # E_q[log pi(a|s,z)] - KL(q || p) with q and p both the policy, so the KL is 0 and what stays is
    # `(1-p) R_act + p mean_g R_g` a line
    elbo: float
    multi_sample: float  # `log[(1-p) P(a|act) + p mean_g P(a|z_g)]`, at least as tight in expectation
    tokens: int  # code tokens that these are over


def code_bounds(group: RolloutGroup, weight_T: torch.Tensor | None = None) -> CodeBounds:
    """Bounds the log-likelihood of a group scored over at least one line. Kept comments and the EOS are not code.

    With the inverse probabilities `weight_T` of its boundaries being tried, what thinking changes there stands for all
    boundaries: in expectation the bounds are those of all of them.
    """
    document = group.document
    code = torch.tensor([not a.comment for a in document.actions], dtype=torch.bool)
    raw_A = torch.where(code, group.line_logps_A, torch.zeros(()))
    tokens = sum(a.end - max(a.start, 1) for a in document.actions if not a.comment)
    total = float(raw_A.double().sum())
    if not group.boundaries:
        return CodeBounds(total, total, total, tokens)
    boundaries = torch.tensor(group.boundaries)
    line = compute_returns(group, 1, 1.0)
    log_p = group.decision_logps_A[boundaries]
    log_q = log1mexp(log_p)
    elbo_T = log_q.exp() * line.act_T + log_p.exp() * line.latent_TG.mean(1)
    multi_T = line.act_T + torch.logaddexp(log_q, log_p + log_mean_gain(line.gain_TG))
    weight_T = torch.ones(len(boundaries)) if weight_T is None else weight_T
    elbo, multi = (
        total + float((weight_T * (bound_T - raw_A[boundaries])).double().sum()) for bound_T in (elbo_T, multi_T)
    )
    return CodeBounds(total, elbo, multi, tokens)


def resampling_logits(act_T: torch.Tensor, latent_TG: torch.Tensor, log_think_T: torch.Tensor) -> torch.Tensor:
    """Weighs <act> and each latent, in logs `[T, 1 + G]`: `log(1-rho) + G_act`, `log rho - log G + G_g`.

    No penalty: the prior `rho` is its place here. `log_think_T` is log rho.

    >>> half = torch.tensor([0.5]).log()
    >>> resampling_logits(torch.tensor([0.0]), torch.tensor([[0.0, 0.0]]), half).exp()
    tensor([[0.5000, 0.2500, 0.2500]])
    """
    latent = log_think_T[:, None] - math.log(latent_TG.shape[1]) + latent_TG
    return torch.cat([(log1mexp(log_think_T) + act_T)[:, None], latent], 1)
