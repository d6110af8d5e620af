"""The E-step: roll out, reward, and one policy-gradient update.

PAPER: with pi fixed, self-supervised RL finds latents that make the expert's next lines likelier than their cost. Our
choices where it is silent: return over H lines, the multi-sample bound, one update per rollout (so no importance
ratio), live or frozen reward model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch

from ..config import RA3Config
from ..losses import EStepTerms, Returns, advantages, compute_returns, estep_loss, explored, gate_slope
from ..models import BaseWeights, FrozenWeights
from ..policy import LatentSource, Policy, choose_to_try, gains_over_other
from ..records import Document, PolicyLogProbs, RolloutGroup
from ..rewards import Reward, RewardPlugIns
from ..rollout import NoiseKey, check_finite
from .gradients import Gradients


@dataclass(frozen=True)
class Chunk:
    """Boundaries of a rollout that go through the same forward with gradients; `reference` holds their log-probs under
    the weights at the start, where they are wanted."""

    boundaries: slice
    reference: PolicyLogProbs | None = None


@dataclass(frozen=True)
class Rollout:
    """A group with its returns.

    `weight_T`: inverse of each boundary's probability of being tried. `terms`: the reward's terms apart,
    `[T, G]` each, where there are several; `extra`: what reward functions logged of each latent. `scored_live`:
    whether lines under latents and returns are the policy's, or another reward model's; lines without latents and
    gates are the policy's in any case.
    """

    group: RolloutGroup
    returns: Returns
    weight_T: torch.Tensor
    chunks: tuple[Chunk, ...]
    terms: dict[str, torch.Tensor] = field(default_factory=dict)
    extra: dict[str, list] = field(default_factory=dict)
    scored_live: bool = True


class EStep:
    """
    One E-phase's step: `sample`, `score`, `reward_of`, `reference`, in this order in `roll_out`, and its loss.

    Args:
        policy ([`~ra3_trl.policy.Policy`]):
            What samples and learns. Its head says where the settings leave that to it.
        args ([`RA3Config`]):
            The settings; `policy.args` need not be the same object (`--dry_run` tries fewer boundaries).
        reward ([`FrozenWeights`] or [`BaseWeights`], *optional*):
            Weights that score the lines; `None` are the live ones, on the cache of the sampling.
        start ([`FrozenWeights`], *optional*):
            Weights at the phase's start, which the KL is measured to and the gate anchored at.
        plug_ins ([`RewardPlugIns`], *optional*):
            Further terms of the reward.
    """

    def __init__(
        self,
        policy: Policy,
        args: RA3Config,
        reward: FrozenWeights | BaseWeights | None = None,
        start: FrozenWeights | None = None,
        plug_ins: RewardPlugIns | None = None,
    ):
        self.policy = policy
        self.engine = policy.engine
        self.args = args
        self.reward = reward
        self.start = start
        self.plug_ins = plug_ins

    def roll_out(self, documents: Sequence[Document], noise: NoiseKey) -> list[Rollout]:
        """Makes rollouts of documents by each source of latents in turn: all of the first, then those of the next."""
        args, rollouts = self.args, []
        for j, source in enumerate(self.policy.proposer.sources(args.num_latents, args.horizon)):
            groups, weights = self.sample(documents, source, noise.of(j))
            groups, scored = self.score(groups, source)
            rewards = [self.reward_of(group) for group in scored]
            chunks = self.reference(groups)
            rollouts += [
                Rollout(group, value.returns, weight_T, pieces, value.terms, value.extra, self.reward is None)
                for group, value, weight_T, pieces in zip(groups, rewards, weights, chunks, strict=True)
            ]
        return rollouts

    def sample(
        self, documents: Sequence[Document], source: LatentSource, noise: NoiseKey
    ) -> tuple[list[RolloutGroup], list[torch.Tensor]]:
        """Draws latents under the live weights; the boundaries' weights `[T]` of each group."""
        weights: list[torch.Tensor] = []

        def choose(trunk: RolloutGroup) -> tuple[int, ...]:
            # Asked for each document in turn once it has run, since gates and the head's states are read there.
            boundaries, weight_T = choose_to_try(self.policy.head, self.policy.decide(trunk), self.args, noise)
            weights.append(weight_T)
            return boundaries

        with self.policy.backbone.gathered():
            live = self.reward is None
            groups = source.draw(self.engine, documents, [choose] * len(documents), noise, score=live)
            groups = [source.weigh(self.engine, group) for group in groups] if live else groups
        return [self.policy.decide(group) for group in groups], weights

    def score(self, groups: list[RolloutGroup], source: LatentSource) -> tuple[list[RolloutGroup], list[RolloutGroup]]:
        """Scores the latents under the reward model.

        Returns:
            The groups with the policy's lines and gates, and the groups that returns are computed of.
        """
        scored = groups
        if self.reward is not None:
            with self.reward.applied(), self.policy.backbone.gathered():
                documents, boundaries = [g.document for g in groups], [g.boundaries for g in groups]
                scored = self.engine.scores(documents, boundaries, [g.latents for g in groups], self.args.horizon)
                scored = [
                    source.weigh(self.engine, replace(s, view=g.view)) for s, g in zip(scored, groups, strict=True)
                ]
            taken = ("latent_line_logps_TGH", "latent_gate_logps_TGH", "log_ratio_TG")
            groups = [
                replace(g, **{name: getattr(s, name) for name in taken}) for g, s in zip(groups, scored, strict=True)
            ]
        for group in scored:
            check_finite(group.line_logps_A)
        return groups, [group.with_ratio(self.policy.proposer.kl_coef) for group in scored]

    def reward_of(self, group: RolloutGroup) -> Reward:
        """The reward of a scored group, with its terms where there are several."""
        returns = compute_returns(group, self.args.horizon, self.args.discount, self.args.line_reduction)
        return Reward(returns) if self.plug_ins is None else self.plug_ins(group, returns)

    def reference(self, groups: Sequence[RolloutGroup]) -> list[tuple[Chunk, ...]]:
        """Cuts groups into chunks, with log-probs under the weights at the start where these are wanted."""
        split = [tuple(Chunk(boundaries) for boundaries in self.engine.split(group.drawn)) for group in groups]
        if self.start is None:
            return split
        with torch.no_grad(), self.start.applied(), self.policy.backbone.gathered():
            pieces = [(group.drawn, c.boundaries) for group, own in zip(groups, split, strict=True) for c in own]
            parts = self.engine.join(pieces)
            reference = iter([logps for part in parts for logps in self.engine.packed_log_probs(pieces[part])])
            return [tuple(Chunk(c.boundaries, next(reference)) for c in own) for own in split]

    def forwards(self, rollouts: Sequence[Rollout]) -> list[list[tuple[Rollout, Chunk]]]:
        """Groups the chunks of rollouts by the forwards with gradients that they go through together."""
        chunks = [(rollout, chunk) for rollout in rollouts for chunk in rollout.chunks]
        parts = self.engine.join([(rollout.group.drawn, chunk.boundaries) for rollout, chunk in chunks])
        return [chunks[part] for part in parts]

    def over_other(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Nats that latents of the policy bring more than those of another document, see `policy/blandness.py`."""
        groups = [rollout.group for rollout in rollouts if rollout.group.view is None]
        with nullcontext() if self.reward is None else self.reward.applied(), self.policy.backbone.gathered():
            return gains_over_other(self.engine, groups, self.args.discount)

    # ---- loss ----

    def backward(
        self,
        rollouts: Sequence[Rollout],
        num_boundaries: float,
        hold: bool,
        gradients: Gradients,
        least: int = 0,
    ) -> tuple[float, dict[str, float]]:
        """Loss and gradients of a batch, forward by forward.

        Args:
            num_boundaries (`float`):
                Boundaries of the whole accumulation window and all processes, tried or not: the loss's denominator.
            hold (`bool`):
                Whether the gate is held at its value at the start.
            least (`int`, *optional*, defaults to `0`):
                Do at least so many forwards, with a loss of 0 where there is nothing left: as many as other processes.

        Returns:
            The loss and its parts, both divided by `num_boundaries`.
        """
        forwards = self.forwards(rollouts)
        total, parts, count = 0.0, dict[str, float](), max(least, len(forwards))
        for i in range(count):
            with gradients.syncing(i + 1 == count):
                if i >= len(forwards):
                    # Others apply the language-model head twice, to gates and to latents: so does an empty forward.
                    gradients.backward(self.policy.backbone.idle(gradients.through, heads=2))
                    continue
                with self.engine.gradients():
                    pieces = [(rollout.group.drawn, chunk.boundaries) for rollout, chunk in forwards[i]]
                    logps = self.engine.packed_log_probs(pieces, gradients.through)
                    losses = [self._chunk_loss(*both, lp, hold) for both, lp in zip(forwards[i], logps, strict=True)]
                    loss = torch.stack([of_chunk for of_chunk, _ in losses]).sum()
                    gradients.backward(loss / num_boundaries)
            total += float(loss.detach()) / num_boundaries
            for name, value in (item for _, named in losses for item in named.items()):
                parts[name] = parts.get(name, 0.0) + float(value) / num_boundaries
        return total, parts

    def _chunk_loss(
        self, rollout: Rollout, chunk: Chunk, logps: PolicyLogProbs, hold: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of some boundaries of a rollout, summed over them."""
        terms = self.terms(rollout, chunk.boundaries, hold, logps.gate_T.device)
        loss, named = estep_loss(terms, logps, self.args.kl_coef, chunk.reference)
        if logps.router is not None:
            boundaries = float(rollout.weight_T[chunk.boundaries].sum())  # that those tried stand for
            named["router"] = logps.router.detach() * boundaries
            loss = loss + logps.router * boundaries
        return loss, named

    def terms(self, rollout: Rollout, part: slice, hold: bool, device: torch.device | str = "cpu") -> EStepTerms:
        """Constants of the loss at some boundaries: the gate's slope or anchor, the latents' advantages, weights."""
        args, weight, none = self.args, rollout.weight_T[part], torch.zeros_like(rollout.weight_T[part])
        gain = rollout.returns.gain_TG[part]
        if rollout.group.view is not None:
            # Latents that were drawn from a view have no gate: whether to think is the policy's to say. What proposes
            # them raises its own ELBO wherever it is asked.
            advantage = weight[:, None] * advantages(gain, torch.ones_like(weight), args.penalty, "elbo")
            return EStepTerms(none.to(device), advantage.to(device), weight.to(device), none.to(device))
        log_think = rollout.group.decision_logps_A[list(rollout.group.boundaries[part])]
        slope = none if hold else weight * gate_slope(gain, log_think, args.penalty, args.objective)
        think = explored(log_think, args.exploration)
        advantage = weight[:, None] * advantages(gain, think, args.penalty, args.objective)
        anchor = weight if hold else none
        return EStepTerms(*(value.to(device) for value in (slope, advantage, weight * think, anchor)))
