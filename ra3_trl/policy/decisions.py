"""What is decided without writing anything: which boundaries are tried, and what an abstraction head says of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from ..config import RA3Config
from ..models import AbstractionHead
from ..records import Document, RolloutGroup
from ..rollout import NoiseKey, keyed_uniform


_BOUNDARIES, _EXPLORED = -3, -4  # key the choice of boundaries, beside the latents' numbers of rollout/noise.py


class HeadDecisions:
    """
    An abstraction head and the settings that say what it decides.

    Args:
        head ([`~ra3_trl.models.AbstractionHead`]):
            The head.
        args ([`RA3Config`]):
            `gate`, `boundary_selection`, `annotation_skip`.
    """

    def __init__(self, head: AbstractionHead, args: RA3Config):
        self.head = head
        self.args = args

    @torch.no_grad()
    def predict(self, states_SD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Predicts log P(think), gain and spread, `[S]` each, on the CPU."""
        logits, gain, spread = self.head(states_SD.to(self.head.inner.weight.device))
        return nn.functional.logsigmoid(logits).cpu(), gain.cpu(), spread.cpu()

    def promise(self, states_SD: torch.Tensor) -> torch.Tensor:
        """Predicts the gain of a good latent, `[S]` in nats: two standard deviations above the expected one.

        The expected gain alone would send the rollouts where latents do no harm, such as an easy line, and away from
        where one in ten is right and nine are wrong, which is where there is something to learn.
        """
        _, gain, spread = self.predict(states_SD)
        return gain + 2 * spread

    def decide(self, group: RolloutGroup) -> RolloutGroup:
        """Puts the head's gate into the group, where that is the one in use."""
        if self.args.gate != "head":
            return group
        assert group.states_SD is not None  # engines give them with every trunk
        logps = torch.full_like(group.gate_logps_A, -torch.inf)
        logps[list(group.document.boundaries)] = self.predict(group.states_SD)[0]
        return replace(group, head_logps_A=logps)

    def hopeful(self, group: RolloutGroup, boundaries: Sequence[int], log_odds: torch.Tensor) -> list[int]:
        """Picks those of `boundaries` at which annotation may place a latent with a probability of `annotation_skip`
        or more: the prior's `log_odds` `[len(boundaries)]` plus the predicted gain. All of them for a head that has
        learned nothing."""
        if self.args.boundary_selection != "head" or not self.head.config.trained_on:
            return list(boundaries)
        gain = self.predict(group.states_at(boundaries))[1]
        chances = torch.sigmoid(log_odds + gain).tolist()
        return [b for b, chance in zip(boundaries, chances, strict=True) if chance >= self.args.annotation_skip]


def line_numbers(document: Document, boundaries: Sequence[int]) -> np.ndarray:
    """Ordinals of the boundaries' lines in the whole text, by which noise is keyed."""
    return np.array([document.actions[boundary].index for boundary in boundaries])


def choose_boundaries(document: Document, limit: int, noise: NoiseKey) -> tuple[int, ...]:
    """Chooses the boundaries to try: all, or `limit` of them drawn without replacement by keyed noise."""
    boundaries = document.boundaries
    if not limit or len(boundaries) <= limit:
        return boundaries
    index = line_numbers(document, boundaries)
    u = keyed_uniform(noise.seed, noise.phase, noise.step, document.doc_id, index, _BOUNDARIES)
    return tuple(sorted(boundaries[i] for i in u.argsort()[:limit]))


def choose_by_promise(
    document: Document, promise_S: torch.Tensor, args: RA3Config, noise: NoiseKey
) -> tuple[tuple[int, ...], torch.Tensor]:
    """Chooses the boundaries to try under a budget: those of the largest promise, and some of the others, drawn.

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
    key = (noise.seed, noise.phase, noise.step, document.doc_id, line_numbers(document, boundaries))
    tie, draw = keyed_uniform(*key, _BOUNDARIES), keyed_uniform(*key, _EXPLORED)
    drawn = max(1, round(args.boundary_exploration * count))
    order = np.lexsort((tie, -promise_S.numpy()))
    best, rest = order[: count - drawn], order[count - drawn :]
    rest = rest[draw[rest].argsort()]
    # The best are always tried and stand for themselves; each drawn one stands for its share of the rest.
    stands_for = np.ones(len(boundaries))
    stands_for[rest] = len(rest) / drawn
    tried = sorted([*best, *rest[:drawn]])
    weight_T = torch.tensor(stands_for[tried] * count / len(boundaries), dtype=torch.float32)
    return tuple(boundaries[i] for i in tried), weight_T
