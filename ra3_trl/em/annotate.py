"""Annotation: which latents are spliced into a document for the M-step.

By the policy itself (PAPER): think where the gate says so, write what the policy writes. By resampling: at each
boundary <act> and G latents compete with weights prior x likelihood of the next lines, which is the posterior's
importance-sampling estimate; no RL is needed for it to help, and it costs about G times as much. Latents that were
proposed in hindsight (`proposals.py`) count with pi(z | s) / q(z | s, a) besides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from ..config import RA3Config
from ..losses import compute_returns, log1mexp, resampling_logits
from ..records import AnnotatedExample, Document, Latent, RolloutGroup
from ..rollout import CHOICE, GATE, NoiseKey, RolloutEngine
from ..segmentation import splice
from .head import HeadLearner, measured_gain
from .proposals import CAUSAL, Proposals, propose


MARKUP = 8  # tokens that stand around a latent, at most
_WINDOW = 8  # boundaries proposed together where a latent placed changes what follows


def annotate(
    engine: RolloutEngine,
    document: Document,
    args: RA3Config,
    noise: NoiseKey,
    way: str | None = None,
    learner: HeadLearner | None = None,
    proposals: Proposals = CAUSAL,
) -> AnnotatedExample:
    """Splices latents into `document`, left to right.

    With a horizon above 1 each decision sees the latents already placed, so that one that still serves is not
    repeated: proposals are made for a window of boundaries, used up to the first latent placed, and made anew behind
    it, until a row of `max_length` is full. With horizon 1 all boundaries are decided at once on the clean text. `way`
    overrides `args.annotation`. The `learner`'s head is the gate, or says which boundaries are hopeless, where the
    settings say so. Resampling chooses among what `proposals` draw.
    """
    by_policy = (way or args.annotation) == "policy"
    decide = _decide_by_policy if by_policy else partial(_decide_by_resampling, proposals=proposals)
    placed: dict[int, Latent] = {}
    gains: dict[int, float] = {}
    sizes: dict[int, float] = {}
    boundaries = list(document.boundaries)
    while boundaries:
        window = boundaries if args.horizon == 1 or by_policy else boundaries[:_WINDOW]
        context = splice(document, placed).document
        if placed and len(context.input_ids) + args.max_latent_length + MARKUP > args.max_length:
            break  # the row is full
        found, measured, effective = decide(engine, context, window, args, noise, learner)
        if args.horizon > 1:
            found = dict(list(found.items())[:1])
            last = next(iter(found), window[-1])
        else:
            last = window[-1]
        placed |= found
        gains |= {boundary: gain for boundary, gain in measured.items() if boundary <= last}
        sizes |= {boundary: size for boundary, size in effective.items() if boundary <= last}
        boundaries = [boundary for boundary in boundaries if boundary > last]
    return replace(splice(document, placed), gains=gains, sizes=sizes)


# By boundary: latents, the gains that were measured, the candidates' effective sample sizes.
_Decided = tuple[dict[int, Latent], dict[int, float], dict[int, float]]


def _decided_gates(trunk: RolloutGroup, learner: HeadLearner | None) -> torch.Tensor:
    """log P(think) `[A]` of the gate in use, at the M-phase's start."""
    return (trunk if learner is None else learner.decided(trunk, learner.annotator)).decision_logps_A


def _log_prior(
    group: RolloutGroup, boundaries: Sequence[int], args: RA3Config, learner: HeadLearner | None
) -> torch.Tensor:
    """Log prior probability of thinking at `boundaries`, `[len(boundaries)]`."""
    prob = args.annotation_think_prob
    if prob == -1:
        return _decided_gates(group, learner)[list(boundaries)]
    return torch.full((len(boundaries),), math.log(1 - args.prior_alpha if prob is None else prob))


def _decide_by_policy(
    engine: RolloutEngine,
    context: Document,
    boundaries: Sequence[int],
    args: RA3Config,
    noise: NoiseKey,
    learner: HeadLearner | None,
) -> _Decided:
    """Latents at the boundaries where the gate, drawn by keyed noise, says think; in order."""
    gates = _decided_gates(engine.trunk(context), learner)
    index = np.array([context.actions[s].index for s in boundaries])
    u = noise.uniform(context.doc_id, index, GATE, 0)
    thinks = [s for s, number in zip(boundaries, u, strict=True) if number < math.exp(gates[s])]
    if args.horizon > 1:
        thinks = thinks[:1]
    if not thinks:
        return {}, {}, {}
    group = engine.rollout(context, thinks, 1, args.horizon, noise, score=False)
    return {boundary: row[0] for boundary, row in zip(thinks, group.latents, strict=True)}, {}, {}


def _decide_by_resampling(
    engine: RolloutEngine,
    context: Document,
    boundaries: Sequence[int],
    args: RA3Config,
    noise: NoiseKey,
    learner: HeadLearner | None,
    proposals: Proposals,
) -> _Decided:
    """At each boundary <act> or one of G latents, drawn by posterior weight; sums over lines, no penalty."""

    def hopeful(trunk: RolloutGroup) -> Sequence[int]:
        if learner is None:
            return boundaries
        log_think = _log_prior(trunk, boundaries, args, learner)
        return learner.hopeful(trunk, boundaries, log_think - log1mexp(log_think))

    group = propose(engine, context, hopeful, args.num_latents, args.horizon, noise, proposals)
    boundaries = group.boundaries
    if not boundaries:
        return {}, {}, {}
    returns = compute_returns(group, args.horizon, args.discount)
    worth = compute_returns(group.with_ratio(args.proposal_kl_coef), args.horizon, args.discount)
    log_think = _log_prior(group, boundaries, args, learner)
    weights = resampling_logits(worth.act_T, worth.latent_TG, log_think).double().softmax(-1)
    index = np.array([context.actions[s].index for s in boundaries])
    u = torch.as_tensor(noise.uniform(context.doc_id, index, CHOICE, 0))
    choice = (weights.cumsum(-1) < u[:, None]).sum(-1).clamp(max=weights.shape[1] - 1)
    chosen = enumerate(zip(boundaries, choice.tolist(), strict=True))
    gains = dict(zip(boundaries, measured_gain(returns).tolist(), strict=True))
    sizes = dict(zip(boundaries, (1 / weights.square().sum(-1)).tolist(), strict=True))
    return {s: group.latents[t][c - 1] for t, (s, c) in chosen if c > 0}, gains, sizes
