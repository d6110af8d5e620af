"""Held-out numbers: cross-entropy without latents and with the policy's own, ELBO, multi-sample bound, think rate."""

from __future__ import annotations

from collections.abc import Iterable

from ..config import RA3Config
from ..losses import code_bounds, compute_returns, renormalise
from ..records import Document
from ..rollout import NoiseKey, RolloutEngine
from .annotate import annotate
from .estep import choose_boundaries
from .head import HeadLearner
from .proposals import CAUSAL, Proposals, propose


EVAL_NOISE = NoiseKey(seed=0x5EED, phase=-1, step=0)  # every evaluation tries the same boundaries with the same noise


def evaluate_documents(
    engine: RolloutEngine,
    documents: Iterable[Document],
    args: RA3Config,
    learner: HeadLearner | None = None,
    proposals: Proposals = CAUSAL,
) -> dict[str, float]:
    """Sums over documents; [`finish_metrics`] turns them (added over processes) into averages.

    `never` is the log-likelihood of the code where latents are banned, as `think="never"` writes; `policy` on a text
    that the policy has annotated left to right (a one-sample estimate of the temporal ELBO): their difference is the
    price of doing without. `elbo` and `multi_sample` put every latent before its own line on the clean text. With
    `proposals` in hindsight, `hindsight_elbo` and `hindsight_multi` are the same bounds with their latents, as many.
    """
    names = ("log_likelihood", "never", "elbo", "multi_sample", "policy", "tokens", "think", "boundaries", "gain")
    sums = dict.fromkeys((*names, "latents", "latent_tokens", "policy_latents"), 0.0)
    if not proposals.causal:
        sums |= {"hindsight_elbo": 0.0, "hindsight_multi": 0.0, "hindsight_gain": 0.0}
    for document in documents:
        boundaries = choose_boundaries(document, args.eval_max_boundaries, EVAL_NOISE)
        group = engine.rollout(document, boundaries, args.eval_num_latents, args.horizon, EVAL_NOISE)
        group = group if learner is None else learner.decided(group)
        bounds = code_bounds(group)
        gain = compute_returns(group, args.horizon, args.discount, args.line_reduction).gain_TG
        annotated = annotate(engine, document, args, EVAL_NOISE, "policy", learner and learner.live())
        trunk = engine.trunk(annotated.document)
        rewards = renormalise(trunk.line_logps_A, trunk.gate_logps_A)
        banned = renormalise(group.line_logps_A, group.gate_logps_A)
        sums["log_likelihood"] += bounds.log_likelihood
        sums["elbo"] += bounds.elbo
        sums["multi_sample"] += bounds.multi_sample
        sums["never"] += sum(float(r) for r, a in zip(banned, document.actions, strict=True) if not a.comment)
        sums["policy"] += sum(float(r) for r, a in zip(rewards, document.actions, strict=True) if not a.comment)
        sums["tokens"] += bounds.tokens
        sums["think"] += (
            float(group.decision_logps_A[list(document.boundaries)].double().exp().sum())
            if document.boundaries
            else 0.0
        )
        sums["boundaries"] += len(document.boundaries)
        sums["gain"] += float(gain.double().sum())
        sums["latents"] += gain.numel()
        sums["latent_tokens"] += sum(len(z.token_ids) for row in group.latents for z in row)
        sums["policy_latents"] += len(annotated.placed)
        if not proposals.causal:
            known = propose(engine, document, boundaries, args.eval_num_latents, args.horizon, EVAL_NOISE, proposals)
            bounds = code_bounds(known if learner is None else learner.decided(known))
            gain = compute_returns(known, args.horizon, args.discount).gain_TG
            sums["hindsight_elbo"] += bounds.elbo
            sums["hindsight_multi"] += bounds.multi_sample
            sums["hindsight_gain"] += float(gain.double().sum())
    return sums


def finish_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Averages: nats per code token (bounds negated, so that lower is better), rates, nats per latent."""
    tokens, boundaries, latents = (max(sums[name], 1) for name in ("tokens", "boundaries", "latents"))
    hindsight = {}
    if "hindsight_elbo" in sums:
        hindsight = {
            "elbo_hindsight": -sums["hindsight_elbo"] / tokens,
            "bound_hindsight": -sums["hindsight_multi"] / tokens,
            "gain_hindsight": sums["hindsight_gain"] / latents,
        }
    return hindsight | {
        "loss": -sums["log_likelihood"] / tokens,
        "ce": -sums["log_likelihood"] / tokens,
        "ce_never": -sums["never"] / tokens,
        "ce_policy": -sums["policy"] / tokens,
        "elbo": -sums["elbo"] / tokens,
        "bound_multi": -sums["multi_sample"] / tokens,
        "think_rate": sums["think"] / boundaries,
        "policy_latent_rate": sums["policy_latents"] / boundaries,
        "gain": sums["gain"] / latents,
        "latent_length": sums["latent_tokens"] / latents,
        "code_tokens": sums["tokens"],
    }
