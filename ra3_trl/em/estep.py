"""The E-step: roll out, reward, and one policy-gradient update.

PAPER: with pi fixed, self-supervised RL finds latents that make the expert's next lines likelier than their cost. Our
choices where it is silent: return over H lines, leave-one-out baseline, one update per rollout (so no importance
ratio), live or frozen reward model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import nn

from ..config import RA3Config
from ..losses import EStepTerms, Returns, advantages, code_bounds, compute_returns, estep_loss, gate_slope
from ..models import BaseWeights, FrozenWeights
from ..records import Document, RolloutGroup
from ..rollout import NoiseKey, PolicyLogProbs, RolloutEngine, check_finite, keyed_uniform
from .head import HeadLearner
from .monitor import MetricSums, Sums
from .proposals import CAUSAL, Proposal, Proposals, own_logps, prior_logps
from .rewards import RewardPlugIns


_BOUNDARIES, _EXPLORED = -3, -4  # key the choice of boundaries, beside the latents' numbers of noise.py


@dataclass(frozen=True)
class Rollout:
    """A group with its returns; `terms` holds the reward's terms apart, `[T, G]` each, where there are several;
    `references` the log-probs under the weights at the start, where they are wanted, for each part of the boundaries;
    `weight_T` what share of the document's boundaries each tried one stands for, 1 on average.

    The group's lines without latents and its gates are the policy's; with `scored_live` false its lines under latents
    and the returns are another reward model's. `view` is the document as a proposal in hindsight saw it
    (`segmentation/hindsight.py`): its latents' reward is then the whole ELBO, and it is the proposal that learns.
    """

    group: RolloutGroup
    returns: Returns
    weight_T: torch.Tensor
    terms: dict[str, torch.Tensor] = field(default_factory=dict)
    references: tuple[PolicyLogProbs, ...] = ()
    scored_live: bool = True
    view: Document | None = None

    @property
    def drawn(self) -> RolloutGroup:
        """The group on the document that its latents were drawn from."""
        return self.group if self.view is None else replace(self.group, document=self.view)


def choose_boundaries(document: Document, limit: int, noise: NoiseKey) -> tuple[int, ...]:
    """The boundaries to try: all, or `limit` of them drawn without replacement by keyed noise."""
    boundaries = document.boundaries
    if not limit or len(boundaries) <= limit:
        return boundaries
    index = np.array([document.actions[s].index for s in boundaries])
    u = keyed_uniform(noise.seed, noise.phase, noise.step, document.doc_id, index, _BOUNDARIES)
    return tuple(sorted(boundaries[i] for i in u.argsort()[:limit]))


def choose_by_promise(
    document: Document, promise_S: torch.Tensor, args: RA3Config, noise: NoiseKey
) -> tuple[tuple[int, ...], torch.Tensor]:
    """The boundaries to try under a budget: those of the largest promise, and some of the others, drawn.

    A share `boundary_exploration` of them is drawn, so that no boundary is out of reach.

    Returns:
        The boundaries and their weights `[T]`: inverse probabilities of being tried, 1 on average, so that weighted
        averages over the tried ones are unbiased for all.
    """
    boundaries = document.boundaries
    count = math.ceil(args.boundary_budget * len(boundaries))
    count = min(count, args.max_boundaries) if args.max_boundaries else count
    if count >= len(boundaries):
        return boundaries, torch.ones(len(boundaries))
    index = np.array([document.actions[s].index for s in boundaries])
    tie, draw = (
        keyed_uniform(noise.seed, noise.phase, noise.step, document.doc_id, index, key)
        for key in (_BOUNDARIES, _EXPLORED)
    )
    drawn = max(1, round(args.boundary_exploration * count))
    order = np.lexsort((tie, -promise_S.numpy()))
    best, rest = order[: count - drawn], order[count - drawn :]
    rest = rest[draw[rest].argsort()]
    stands_for = np.ones(len(boundaries))
    stands_for[rest] = len(rest) / drawn
    tried = sorted([*best, *rest[:drawn]])
    return tuple(boundaries[i] for i in tried), torch.tensor(
        stands_for[tried] * count / len(boundaries), dtype=torch.float32
    )


def roll_out(
    engine: RolloutEngine,
    documents: Sequence[Document],
    args: RA3Config,
    noise: NoiseKey,
    reward: FrozenWeights | BaseWeights | None,
    plug_ins: RewardPlugIns | None = None,
    start: FrozenWeights | None = None,
    learner: HeadLearner | None = None,
    proposals: Proposals = CAUSAL,
) -> list[Rollout]:
    """Samples under the live weights and scores under `reward` (`None`: the live weights, on the same cache); what was
    sampled is also scored under `start`, which the KL term is measured to and the gate anchored at. With
    `boundary_selection="head"` the `learner` says where. Each of the `proposals` gets its share of the latents and its
    own rollouts, all of the first one before those of the next."""
    counts = proposals.counts(args.num_latents, 2 if args.baseline == "leave_one_out" else 1)
    found: list[Rollout] = []
    for j, (part, count) in enumerate(zip(proposals.parts, counts, strict=True)):
        draw = partial(_draw, engine, args, noise.of(j), part, proposals.lines, count)
        found += _roll_out(engine, documents, args, noise, draw, reward, plug_ins, start, learner)
    return found


Drawn = tuple[RolloutGroup, Document | None]
Choose = Callable[[RolloutGroup], tuple[int, ...]]


def _draw(
    engine: RolloutEngine,
    args: RA3Config,
    noise: NoiseKey,
    part: Proposal,
    lines: int,
    count: int,
    document: Document,
    choose: Choose,
    score: bool,
) -> Drawn:
    """Latents of one proposal at the boundaries that are chosen, and the view that it drew them from."""
    if part.prompt is None:
        return engine.rollout(document, choose, count, args.horizon, noise, score=score), None
    trunk = engine.trunk(document)
    boundaries = choose(trunk)
    if not boundaries:
        return engine.rollout(document, boundaries, count, args.horizon, noise, score=score), document
    ((view, _),) = part.views(document, boundaries, lines)  # it shares its prefix, or it would not be trained
    latents = engine.rollout(view, boundaries, count, 1, noise, score=False).latents
    if score:
        return engine.score(document, boundaries, latents, args.horizon), view
    empty = torch.zeros(len(boundaries), count, args.horizon)
    return replace(
        trunk,
        boundaries=boundaries,
        latents=latents,
        latent_line_logps_TGH=empty,
        latent_gate_logps_TGH=empty - torch.inf,
    ), view


def _weighed(engine: RolloutEngine, group: RolloutGroup, view: Document | None) -> RolloutGroup:
    """A group with its log-ratio of prior and proposal; the prior is that of the weights in use."""
    if view is None or not group.boundaries:
        return group
    prior_TG = prior_logps(engine, group.document, group.boundaries, group.latents)
    return replace(group, log_ratio_TG=prior_TG - own_logps(group.latents))


def _roll_out(
    engine: RolloutEngine,
    documents: Sequence[Document],
    args: RA3Config,
    noise: NoiseKey,
    draw: Callable[[Document, Choose, bool], Drawn],
    reward: FrozenWeights | BaseWeights | None,
    plug_ins: RewardPlugIns | None,
    start: FrozenWeights | None,
    learner: HeadLearner | None,
) -> list[Rollout]:
    """[`roll_out`] of one proposal."""
    weights: list[torch.Tensor] = []

    def choose(trunk: RolloutGroup) -> tuple[int, ...]:
        if args.boundary_selection == "head":
            boundaries, weight_T = choose_by_promise(trunk.document, learner.promise(trunk.states_SD), args, noise)
        else:
            boundaries = choose_boundaries(trunk.document, args.max_boundaries, noise)
            weight_T = torch.ones(len(boundaries))
        weights.append(weight_T)
        return boundaries

    with engine.backbone.gathered():
        drawn = [draw(document, choose, reward is None) for document in documents]
        views = [view for _, view in drawn]
        groups = [group for group, _ in drawn]
        if reward is None:
            groups = [_weighed(engine, group, view) for group, view in drawn]
    if learner is not None:
        groups = [learner.decided(group) for group in groups]
    scored = groups
    if reward is not None:
        with reward.applied(), engine.backbone.gathered():
            scored = [
                _weighed(engine, engine.score(g.document, g.boundaries, g.latents, args.horizon), view)
                for g, view in zip(groups, views, strict=True)
            ]
        taken = ("latent_line_logps_TGH", "latent_gate_logps_TGH", "log_ratio_TG")
        groups = [
            replace(g, **{name: getattr(s, name) for name in taken}) for s, g in zip(scored, groups, strict=True)
        ]
    for group in scored:
        check_finite(group.line_logps_A)
    scored = [group.with_ratio(args.proposal_kl_coef) for group in scored]
    returns = [compute_returns(group, args.horizon, args.discount, args.line_reduction) for group in scored]
    found = [(r, {}) if plug_ins is None else plug_ins(g, r) for g, r in zip(groups, returns, strict=True)]
    rollouts = [
        Rollout(g, returns, weight_T, terms, (), reward is None, view)
        for g, weight_T, (returns, terms), view in zip(groups, weights, found, views, strict=True)
    ]
    if start is None:
        return rollouts
    with torch.no_grad(), start.applied(), engine.backbone.gathered():
        return [
            replace(r, references=tuple(engine.log_probs(r.drawn, part) for part in engine.split(r.drawn)))
            for r in rollouts
        ]


def count_chunks(engine: RolloutEngine, rollouts: Sequence[Rollout]) -> int:
    """Forwards with gradients that [`estep_backward`] does for these rollouts."""
    return sum(len(engine.split(r.drawn)) for r in rollouts)


def estep_backward(
    engine: RolloutEngine,
    rollouts: Sequence[Rollout],
    args: RA3Config,
    num_boundaries: float,
    hold: bool,
    backward: Callable[[torch.Tensor], None],
    syncing: Callable[[bool], AbstractContextManager[None]] = lambda last: nullcontext(),
    through: nn.Module | None = None,
    chunks: int = 0,
) -> tuple[float, dict[str, float]]:
    """Loss and gradients of a batch, chunk by chunk.

    Args:
        num_boundaries (`float`):
            Boundaries of the whole accumulation window and all processes: the loss's denominator.
        hold (`bool`):
            Whether the gate is held at its value at the start.
        backward (`Callable`):
            Takes a chunk's loss.
        syncing (`Callable`, *optional*):
            Context of a chunk's forward and backward pass, told whether it is the last one.
        through (`nn.Module`, *optional*):
            The wrapped model whose forward must run.
        chunks (`int`, *optional*, defaults to `0`):
            Do at least so many forwards, with a loss of 0 where there is nothing left: as many as other processes.

    Returns:
        The loss and its parts, both divided by `num_boundaries`.
    """
    pieces = [
        (r, part, r.references[i] if r.references else None)
        for r in rollouts
        for i, part in enumerate(engine.split(r.drawn))
    ]
    total, parts, chunks = 0.0, {}, max(chunks, len(pieces))
    for i in range(chunks):
        if i >= len(pieces):
            with syncing(i + 1 == chunks):
                backward(engine.backbone.idle(through, heads=2))  # gates and latents
            continue
        with syncing(i + 1 == chunks), engine.gradients():
            loss, named = _chunk_loss(engine, *pieces[i], args, hold, through)
            backward(loss / num_boundaries)
        total += float(loss.detach()) / num_boundaries
        for name, value in named.items():
            parts[name] = parts.get(name, 0.0) + float(value) / num_boundaries
    return total, parts


def _chunk_loss(
    engine: RolloutEngine,
    rollout: Rollout,
    part: slice,
    reference: PolicyLogProbs | None,
    args: RA3Config,
    hold: bool,
    through: nn.Module | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of some boundaries of a rollout, summed over them."""
    logps = engine.log_probs(rollout.drawn, part, through, entropy=args.entropy_coef > 0)
    gated = rollout.view is None  # a proposal in hindsight has no gate: whether to think is the policy's to say
    loss, named = estep_loss(
        _terms(rollout, part, args, hold or not gated, logps.gate_T),
        logps.gate_T,
        logps.token_n,
        logps.branch_n,
        gate_coef=args.gate_coef,
        ref_token_logps_n=None if reference is None else reference.token_n,
        kl_coef=args.kl_coef,
        entropy_n=logps.entropy_n,
        entropy_coef=args.entropy_coef,
        prior_think=1 - args.prior_alpha,
        gate_kl_coef=args.gate_kl_coef if gated else 0.0,
        anchor_gate_logps_T=reference.gate_T if reference is not None and hold and gated else None,
    )
    if logps.router is not None:
        named["router"] = logps.router.detach() * len(logps.gate_T)
        loss = loss + logps.router * len(logps.gate_T)
    return loss, named


def _terms(rollout: Rollout, part: slice, args: RA3Config, hold: bool, gate_logps_T: torch.Tensor) -> EStepTerms:
    device = gate_logps_T.device
    returns = Returns(rollout.returns.act_T[part], rollout.returns.latent_TG[part])
    decided_T = rollout.group.decision_logps_A[list(rollout.group.boundaries[part])].to(device)
    weight = decided_T.exp() if args.latent_weight == "gate" else torch.ones_like(gate_logps_T)
    advantage = advantages(returns, args.penalty, args.baseline)
    slope = rollout.weight_T[part] * gate_slope(returns.gain_TG, args.penalty, hold)
    return EStepTerms(slope.to(device), advantage.to(device), weight)


def rollout_sums(
    rollouts: Sequence[Rollout], token_text: Callable[[Sequence[int]], str], known_lines: int = 1
) -> Sums:
    """Numbers of a batch of rollouts (docs/logging.md): total and weight, so that batches and processes
    can be added up. A proposal in hindsight knows the next `known_lines`."""
    sums = MetricSums()
    for r in rollouts:
        origin = "" if r.view is None else "hindsight/"
        bounds = code_bounds(r.group)
        if r.scored_live and bool((r.weight_T == 1).all()):  # else it is of the lines that were picked
            sums.add_total(origin + "elbo", bounds.elbo, bounds.tokens)
        sums.add_total("code_loss", -bounds.log_likelihood, bounds.tokens)
        if not r.group.boundaries:
            continue
        if r.view is not None:
            sums.add_total("hindsight/log_ratio", float(r.group.log_ratio_TG.sum()), r.group.log_ratio_TG.numel())
        gate_A, gain, weight = r.group.decision_logps_A.exp(), r.returns.gain_TG.mean(1), r.weight_T
        gate = weight * gate_A[list(r.group.boundaries)]
        sums.add_total(origin + "reward", float((weight * r.returns.latent_TG.mean(1)).sum()), float(weight.sum()))
        sums.add_total(origin + "gain", float((weight * gain).sum()), float(weight.sum()))
        sums.add_total(origin + "gate_weighted_gain", float((gate * gain).sum()), float(gate.sum()))
        boundaries = (
            r.group.document.boundaries
        )  # think rate and duration are of all boundaries, not only of tried ones
        sums.add_total("think_rate", float(gate_A[list(boundaries)].sum()), len(boundaries))
        sums.add_total("tried_rate", len(r.group.boundaries), len(boundaries))
        lines = sum(not action.comment for action in r.group.document.actions)
        sums.add_total("duration", lines, float(gate_A.sum()))
        for name, term_TG in r.terms.items():
            sums.add_total(
                f"{origin}rewards/{name}/mean", float((weight * term_TG.mean(1)).sum()), float(weight.sum())
            )
            std_T = term_TG.std(1, correction=0)
            sums.add_total(f"{origin}rewards/{name}/std", float((weight * std_T).sum()), float(weight.sum()))
        horizon = r.group.latent_line_logps_TGH.shape[2]
        _add_latents(sums, r.group, token_text, origin, horizon if r.view is None else max(horizon, known_lines))
    return sums.sums


def _add_latents(
    sums: MetricSums, group: RolloutGroup, token_text: Callable[[Sequence[int]], str], origin: str, lines: int
) -> None:
    """Numbers of what the latents say, beside the next `lines`: those they are credited with, or knew."""
    for boundary, row in zip(group.boundaries, group.latents, strict=True):
        line = token_text(group.document.lines_from(boundary, lines))
        texts = [token_text(z.token_ids) for z in row]
        if len(texts) > 1:
            sums.add_total(origin + "same_rate", 1 - (len(set(texts)) - 1) / (len(texts) - 1), 1)
        for z, text in zip(row, texts, strict=True):
            sums.add_total(origin + "latent_length", len(z.token_ids), 1)
            sums.add_total(origin + "entropy", -sum(z.logps), len(z.logps))
            sums.add_total(origin + "copy_rate", copy_rate(text, line), 1)
            sums.add_total(origin + "wordless_rate", not any(c.isalnum() for c in text), 1)
            sums.add_total(origin + "foreign_rate", is_foreign(text, line), 1)


def is_foreign(latent: str, line: str) -> bool:
    """Whether most of the latent's letters are of an alphabet other than ASCII's, and the line has none such."""
    letters = [c for c in latent if c.isalpha()]
    return sum(not c.isascii() for c in letters) * 2 > len(letters) and line.isascii()


def copy_rate(latent: str, line: str) -> float:
    """Share of the latent's words that stand in the next lines."""
    words = latent.split()
    return sum(word in line for word in words) / len(words) if words else 0.0
