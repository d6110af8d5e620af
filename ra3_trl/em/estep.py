"""The E-step: roll out, reward, and one policy-gradient update.

PAPER: with pi fixed, self-supervised RL finds latents that make the expert's next lines likelier than their cost. Our
choices where it is silent: return over H lines, leave-one-out baseline, one update per rollout (so no importance
ratio), live or frozen reward model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..config import RA3Config
from ..losses import EStepTerms, Returns, advantages, code_bounds, compute_returns, estep_loss, gate_slope
from ..models import FrozenWeights
from ..records import Document, RolloutGroup
from ..rollout import NoiseKey, RolloutEngine, keyed_uniform


_SITES = -3  # keys the choice of sites, beside the latents' numbers of noise.py


@dataclass(frozen=True)
class Rollout:
    """A group with its returns."""

    group: RolloutGroup
    returns: Returns


def choose_sites(document: Document, limit: int, noise: NoiseKey) -> tuple[int, ...]:
    """The sites to try: all, or `limit` of them drawn without replacement by keyed noise."""
    sites = document.sites
    if not limit or len(sites) <= limit:
        return sites
    index = np.array([document.actions[s].index for s in sites])
    u = keyed_uniform(noise.seed, noise.phase, noise.step, document.doc_id, index, _SITES)
    return tuple(sorted(sites[i] for i in u.argsort()[:limit]))


def roll_out(
    engine: RolloutEngine,
    documents: Sequence[Document],
    args: RA3Config,
    noise: NoiseKey,
    reward: FrozenWeights | None,
) -> list[Rollout]:
    """Samples under the live weights and scores under `reward` (`None`: the live weights, on the same cache)."""
    rollouts = []
    for document in documents:
        sites = choose_sites(document, args.max_sites, noise)
        live = reward is None
        group = engine.rollout(document, sites, args.num_latents, args.horizon, noise, score=live)
        if not live:
            with reward.applied():
                group = engine.score(document, sites, group.latents, args.horizon)
        returns = compute_returns(group, args.horizon, args.discount, args.line_reduction)
        rollouts.append(Rollout(group, returns))
    return rollouts


def estep_backward(
    engine: RolloutEngine,
    rollouts: Sequence[Rollout],
    args: RA3Config,
    num_sites: float,
    hold: bool,
    start: FrozenWeights | None,
    backward: Callable[[torch.Tensor, bool], None],
    through: nn.Module | None = None,
) -> tuple[float, dict[str, float]]:
    """Loss and gradients of a batch, chunk by chunk.

    Args:
        num_sites (`float`):
            Sites of the whole accumulation window and all processes: the loss's denominator.
        hold (`bool`):
            Whether the gate is held at its value under `start`.
        start ([`FrozenWeights`], *optional*):
            Weights that the KL term is measured to, and the gate while it is held.
        backward (`Callable`):
            Takes a chunk's loss and whether it is the last one.

    Returns:
        The loss and its parts, both divided by `num_sites`.
    """
    chunks = [(r, part) for r in rollouts for part in engine.split(r.group)]
    total, parts = 0.0, {}
    for i, (rollout, part) in enumerate(chunks):
        wants_start = start is not None and (args.kl_coef or hold)
        with torch.no_grad(), start.applied() if wants_start else nullcontext():
            ref = engine.log_probs(rollout.group, part) if wants_start else None
        logps = engine.log_probs(rollout.group, part, through, entropy=args.entropy_coef > 0)
        terms = _terms(rollout, part, args, hold, logps.gate_T)
        loss, named = estep_loss(
            terms,
            logps.gate_T,
            logps.token_n,
            logps.branch_n,
            gate_coef=args.gate_coef,
            ref_token_logps_n=ref.token_n if wants_start else None,
            kl_coef=args.kl_coef,
            entropy_n=logps.entropy_n,
            entropy_coef=args.entropy_coef,
            prior_think=1 - args.prior_alpha,
            gate_kl_coef=args.gate_kl_coef,
            anchor_gate_logps_T=ref.gate_T if wants_start and hold else None,
        )
        loss = loss / num_sites
        backward(loss, i + 1 == len(chunks))
        total += float(loss.detach())
        for name, value in named.items():
            parts[name] = parts.get(name, 0.0) + float(value) / num_sites
    return total, parts


def _terms(rollout: Rollout, part: slice, args: RA3Config, hold: bool, gate_logps_T: torch.Tensor) -> EStepTerms:
    device = gate_logps_T.device
    returns = Returns(rollout.returns.act_T[part], rollout.returns.latent_TG[part])
    weight = gate_logps_T.detach().exp() if args.latent_weight == "gate" else torch.ones_like(gate_logps_T)
    advantage = advantages(returns, args.penalty, args.baseline)
    return EStepTerms(gate_slope(returns.gain_TG, args.penalty, hold).to(device), advantage.to(device), weight)


def rollout_metrics(rollouts: Sequence[Rollout], token_text: Callable[[Sequence[int]], str]) -> dict[str, float]:
    """Numbers of a batch of rollouts, each an average over sites or latents (see README, "What is logged")."""
    p, gain, reward, gates_gain, copied, alike, wordless, lengths, logps, symbols = ([] for _ in range(10))
    elbo = code = thinks = 0.0
    tokens = lines = 0
    for r in rollouts:
        bounds = code_bounds(r.group)
        elbo, code, tokens = elbo + bounds.elbo, code + bounds.log_likelihood, tokens + bounds.tokens
        if not r.group.sites:
            continue
        gate = r.group.gate_logps_A[list(r.group.sites)].exp()
        mean_gain = r.returns.gain_TG.mean(1)
        p += gate.tolist()
        gain += mean_gain.tolist()
        gates_gain += (gate * mean_gain).tolist()
        reward += r.returns.latent_TG.mean(1).tolist()
        lines += sum(not action.comment for action in r.group.document.actions)
        thinks += float(r.group.gate_logps_A.exp().sum())  # all boundaries, not only those tried (`max_sites`)
        for site, row in zip(r.group.sites, r.group.latents, strict=True):
            action = r.group.document.actions[site]
            line = token_text(r.group.document.input_ids[action.start : action.end])
            texts = [token_text(z.token_ids) for z in row]
            copied += [copy_rate(text, line) for text in texts]
            wordless += [not any(c.isalnum() for c in text) for text in texts]
            alike.append(1 - (len(set(texts)) - 1) / max(len(texts) - 1, 1))
            lengths += [len(z.token_ids) for z in row]
            logps.append(-sum(sum(z.logps) for z in row))
            symbols.append(sum(len(z.logps) for z in row))
    if not p:
        return {}
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return {
        "reward": mean(reward),
        "gain": mean(gain),
        "gate_weighted_gain": sum(gates_gain) / max(sum(p), 1e-12),
        "think_rate": mean(p),
        "latent_length": mean(lengths),
        "duration": lines / max(thinks, 1e-12),
        "entropy": sum(logps) / sum(symbols),
        "copy_rate": mean(copied),
        "same_rate": mean(alike),
        "wordless_rate": mean(wordless),
        "elbo": elbo / max(tokens, 1),
        "code_loss": -code / max(tokens, 1),
    }


def copy_rate(latent: str, line: str) -> float:
    """Share of the latent's words that stand in the line."""
    words = latent.split()
    return sum(word in line for word in words) / len(words) if words else 0.0
