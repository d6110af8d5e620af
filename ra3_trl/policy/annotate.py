"""Annotation: which latents are spliced into a document for the M-step.

By the policy itself (PAPER): think where the gate says so, write what the policy writes. By resampling: at each
boundary <act> and G latents compete with weights prior x likelihood of the next lines, which is the posterior's
importance-sampling estimate; no RL is needed for it to help, and it costs about G times as much. Latents that were
not the policy's own (`propose.py`) count with pi(z | s) / q(z | s, a) besides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from ..losses import compute_returns, explored, log1mexp, log_mean_gain, resampling_logits
from ..records import AnnotatedExample, Document, Latent, RolloutGroup
from ..rollout import CHOICE, GATE, NoiseKey
from ..segmentation import splice
from .decisions import line_numbers


if TYPE_CHECKING:
    from ..config import RA3Config
    from .policy import Policy


MARKUP = 8  # tokens that stand around a latent, at most
_WINDOW = 8  # boundaries proposed together where a latent placed changes what follows


@dataclass(frozen=True)
class _Choice:
    """What was chosen for some boundaries: the latents to place and what each brings in nats; what thinking brings,
    and the effective sample sizes of the candidates, where they were measured; each by boundary."""

    placed: dict[int, Latent] = field(default_factory=dict)
    worth: dict[int, float] = field(default_factory=dict)
    gains: dict[int, float] = field(default_factory=dict)
    sizes: dict[int, float] = field(default_factory=dict)

    def up_to(self, last: int) -> _Choice:
        """Leaves out what stands behind the boundary `last`."""
        return _Choice(*({b: value for b, value in part.items() if b <= last} for part in vars(self).values()))

    def __or__(self, other: _Choice) -> _Choice:
        return _Choice(*(mine | yours for mine, yours in zip(vars(self).values(), vars(other).values(), strict=True)))


def annotate(policy: Policy, document: Document, noise: NoiseKey, way: str | None = None) -> AnnotatedExample:
    """Splices latents into `document`, left to right.

    With a horizon above 1 each decision sees the latents already placed, so that one that still serves is not
    repeated: proposals are made for a window of boundaries, used up to the first latent placed, and made anew behind
    it, until a row of `max_length` is full. With horizon 1 all boundaries are decided at once on the clean text.

    Args:
        policy ([`Policy`]):
            Writes the latents and scores the lines; its head is the gate, or says which boundaries are hopeless, where
            the settings say so.
        document ([`Document`]):
            A chunk of expert text.
        noise ([`NoiseKey`]):
            Keys the draws.
        way (`str`, *optional*):
            `"policy"` or `"resample"`; the default is `policy.args.annotation`.
    """
    args = policy.args
    by_policy = (way or args.annotation) == "policy"
    done = _Choice()
    boundaries = list(document.boundaries)
    while boundaries:
        # The policy's way reads gates only, which one forward gives for all boundaries.
        window = boundaries if args.horizon == 1 or by_policy else boundaries[:_WINDOW]
        context = splice(document, done.placed).document
        if done.placed and len(context.input_ids) + args.max_latent_length + MARKUP > args.max_length:
            break  # the row is full
        choice = (_choose_by_policy if by_policy else _choose_by_resampling)(policy, context, window, noise)
        last = window[-1]
        if args.horizon > 1:  # a latent changes what its successors are worth: they are chosen anew
            last = next(iter(choice.placed), last)
        done |= choice.up_to(last)
        boundaries = [boundary for boundary in boundaries if boundary > last]
    return replace(splice(document, done.placed), worth=done.worth, gains=done.gains, sizes=done.sizes)


def _log_prior(policy: Policy, group: RolloutGroup, boundaries: Sequence[int]) -> torch.Tensor:
    """Log prior probability of thinking at `boundaries`, `[len(boundaries)]`."""
    if policy.args.prior_alpha is None:
        return explored(policy.decide(group).decision_logps_A[list(boundaries)], policy.args.exploration).log()
    return torch.full((len(boundaries),), math.log(1 - policy.args.prior_alpha))


def _choose_by_policy(policy: Policy, context: Document, boundaries: Sequence[int], noise: NoiseKey) -> _Choice:
    """Latents at the boundaries where the gate, drawn by keyed noise, says think; in order."""
    gates = policy.decide(policy.engine.trunk(context)).decision_logps_A
    u = noise.uniform(context.doc_id, line_numbers(context, boundaries), GATE, 0)
    thinks = [b for b, number in zip(boundaries, u, strict=True) if number < math.exp(gates[b])]
    if policy.args.horizon > 1:
        thinks = thinks[:1]
    if not thinks:
        return _Choice()
    group = policy.engine.rollout(context, thinks, 1, policy.args.horizon, noise, score=False)
    return _Choice({boundary: row[0] for boundary, row in zip(thinks, group.latents, strict=True)})


def _undecided(
    trunk: RolloutGroup, boundaries: Sequence[int], log_think: torch.Tensor, u: torch.Tensor, args: RA3Config
) -> list[int]:
    """Leaves out boundaries where the draw is <act> whatever the latents: at best these make the lines certain, a gain
    of `-G_act`, which may be less than a latent costs, or than the draw `u` asks for."""
    none = tuple((Latent((), False),) for _ in boundaries)
    lines = torch.zeros(len(boundaries), 1, args.horizon)
    group = replace(trunk, boundaries=tuple(boundaries), latents=none, latent_line_logps_TGH=lines,
                    latent_gate_logps_TGH=torch.full_like(lines, -torch.inf))  # fmt: skip
    best = compute_returns(group, args.horizon, args.discount)
    acts = resampling_logits(best.act_T, best.latent_TG, log_think).double().softmax(-1)[:, 0]
    chance = (best.gain_TG[:, 0] > args.penalty) & (u > acts)
    return [boundary for boundary, some in zip(boundaries, chance.tolist(), strict=True) if some]


def _choose_by_resampling(policy: Policy, context: Document, boundaries: Sequence[int], noise: NoiseKey) -> _Choice:
    """At each boundary <act> or one of G latents, drawn by posterior weight; sums over lines.

    The penalty is no part of the weights, whose prior says how often to think; but a latent that is drawn and does not
    bring what it costs is not placed: beside others that are no better it would be, by chance alone.
    """
    args = policy.args
    u = torch.as_tensor(noise.uniform(context.doc_id, line_numbers(context, boundaries), CHOICE, 0))
    number = dict(zip(boundaries, u.tolist(), strict=True))

    def hopeful(trunk: RolloutGroup) -> Sequence[int]:
        log_think = _log_prior(policy, trunk, boundaries)
        some = _undecided(trunk, boundaries, log_think, u, args) if policy.proposer.causal else boundaries
        if policy.head is None or not some:
            return some
        log_think = _log_prior(policy, trunk, some)
        return policy.head.hopeful(trunk, some, log_think - log1mexp(log_think))

    (group,) = policy.propose([context], [hopeful], args.num_latents, noise)
    if not group.boundaries:
        return _Choice()
    returns = compute_returns(group, args.horizon, args.discount)
    worth = compute_returns(group.with_ratio(policy.proposer.kl_coef), args.horizon, args.discount)
    log_think = _log_prior(policy, group, group.boundaries)
    weights = resampling_logits(worth.act_T, worth.latent_TG, log_think).double().softmax(-1)
    u = torch.tensor([number[boundary] for boundary in group.boundaries], dtype=torch.float64)
    # Inverse CDF; the clamp is for a cumulative sum that rounding left just below 1.
    drawn = (weights.cumsum(-1) < u[:, None]).sum(-1).clamp(max=weights.shape[1] - 1).tolist()
    pays = [(t, b, g - 1) for t, (b, g) in enumerate(zip(group.boundaries, drawn, strict=True)) if g > 0]
    pays = [(t, b, g) for t, b, g in pays if worth.gain_TG[t, g] > args.penalty]
    return _Choice(
        {b: group.latents[t][g] for t, b, g in pays},
        {b: float(worth.gain_TG[t, g]) for t, b, g in pays},
        dict(zip(group.boundaries, log_mean_gain(returns.gain_TG).tolist(), strict=True)),
        dict(zip(group.boundaries, (1 / weights.square().sum(-1)).tolist(), strict=True)),
    )
