"""Annotation: which latents are spliced into a document for the M-step.

By the policy itself (PAPER): think where the gate says so, write what the policy writes. By resampling: at each
boundary <act> and G latents compete with weights prior x likelihood of the next lines, which is the posterior's
importance-sampling estimate; no RL is needed for it to help, and it costs about G times as much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from ..config import RA3Config
from ..losses import compute_returns, resampling_logits
from ..records import AnnotatedExample, Document, Latent
from ..rollout import CHOICE, GATE, NoiseKey, RolloutEngine
from ..segmentation import splice


_WINDOW = 8  # boundaries proposed together where a latent placed changes what follows


def annotate(
    engine: RolloutEngine, document: Document, args: RA3Config, noise: NoiseKey, way: str | None = None
) -> AnnotatedExample:
    """Splices latents into `document`, left to right.

    With a horizon above 1 each decision sees the latents already placed, so that one that still serves is not
    repeated: proposals are made for a window of boundaries, used up to the first latent placed, and made anew behind
    it. With horizon 1 all boundaries are decided at once on the clean text. `way` overrides `args.annotation`.
    """
    by_policy = (way or args.annotation) == "policy"
    decide = _decide_by_policy if by_policy else _decide_by_resampling
    placed: dict[int, Latent] = {}
    sites = list(document.sites)
    while sites:
        window = sites if args.horizon == 1 or by_policy else sites[:_WINDOW]
        context = splice(document, placed).document
        found = decide(engine, context, window, args, noise)
        if args.horizon > 1:
            found = dict(list(found.items())[:1])
            last = next(iter(found), window[-1])
        else:
            last = window[-1]
        placed |= found
        sites = [site for site in sites if site > last]
    return splice(document, placed)


def _decide_by_policy(
    engine: RolloutEngine, context: Document, sites: Sequence[int], args: RA3Config, noise: NoiseKey
) -> dict[int, Latent]:
    """Latents at the boundaries where the gate, drawn by keyed noise, says think; in order."""
    gates = engine.trunk(context).gate_logps_A
    index = np.array([context.actions[s].index for s in sites])
    u = noise.uniform(context.doc_id, index, GATE, 0)
    thinks = [s for s, number in zip(sites, u, strict=True) if number < math.exp(gates[s])]
    if args.horizon > 1:
        thinks = thinks[:1]
    if not thinks:
        return {}
    group = engine.rollout(context, thinks, 1, args.horizon, noise, score=False)
    return {site: row[0] for site, row in zip(thinks, group.latents, strict=True)}


def _decide_by_resampling(
    engine: RolloutEngine, context: Document, sites: Sequence[int], args: RA3Config, noise: NoiseKey
) -> dict[int, Latent]:
    """At each boundary <act> or one of G latents, drawn by posterior weight; sums over lines, no penalty."""
    group = engine.rollout(context, sites, args.num_latents, args.horizon, noise)
    returns = compute_returns(group, args.horizon, args.discount)
    prob = args.annotation_think_prob
    if prob == -1:
        log_think = group.gate_logps_A[list(sites)]
    else:
        log_think = torch.full((len(sites),), math.log(1 - args.prior_alpha if prob is None else prob))
    weights = resampling_logits(returns.act_T, returns.latent_TG, log_think).double().softmax(-1)
    index = np.array([context.actions[s].index for s in sites])
    u = torch.as_tensor(noise.uniform(context.doc_id, index, CHOICE, 0))
    choice = (weights.cumsum(-1) < u[:, None]).sum(-1).clamp(max=weights.shape[1] - 1)
    return {s: group.latents[t][c - 1] for t, (s, c) in enumerate(zip(sites, choice.tolist(), strict=True)) if c > 0}
