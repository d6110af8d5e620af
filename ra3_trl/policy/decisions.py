"""What is decided without writing anything: which boundaries are tried, and what an abstraction head says of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from ..config import RA3Config
from ..losses import explored
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
    """Chooses all boundaries, or `limit` of them drawn without replacement by keyed noise."""
    boundaries = document.boundaries
    if not limit or len(boundaries) <= limit:
        return boundaries
    index = line_numbers(document, boundaries)
    u = keyed_uniform(noise.seed, noise.phase, noise.step, document.doc_id, index, _BOUNDARIES)
    return tuple(sorted(boundaries[i] for i in u.argsort()[:limit]))


Tried = tuple[tuple[int, ...], torch.Tensor]  # boundaries to try, and `[T]` inverse probabilities of being tried


def choose_to_try(head: HeadDecisions | None, trunk: RolloutGroup, args: RA3Config, noise: NoiseKey) -> Tried:
    """Chooses where an E-step tries latents, by `boundary_selection`.

    Returns:
        The boundaries and their weights, with which sums over the tried ones are unbiased for sums over all.
    """
    document = trunk.document
    total, most = len(document.boundaries), args.max_boundaries
    if args.boundary_selection == "random":
        boundaries = choose_boundaries(document, most, noise)
        return boundaries, torch.full((len(boundaries),), total / max(len(boundaries), 1))
    count = math.ceil(args.boundary_budget * total)
    count = min(count, most) if most else count
    if count >= total:
        return document.boundaries, torch.ones(total)
    if args.boundary_selection == "head" and head is not None and trunk.states_SD is not None:
        return choose_by_promise(document, head.promise(trunk.states_SD), count, args, noise)
    log_think_S = trunk.decision_logps_A[list(document.boundaries)]
    return choose_by_gate(document, explored(log_think_S, args.exploration), count, noise)


def inclusion_probs(size_S: np.ndarray, count: int) -> np.ndarray:
    """Computes probabilities in proportion to `size_S`, none above 1, that add up to `count`; all alike where every
    size is 0.

    >>> inclusion_probs(np.array([0.6, 0.1, 0.1]), count=2)  # the first alone would have 1.5
    array([1. , 0.5, 0.5])
    """
    sizes = size_S if size_S.max() > 0 else np.ones_like(size_S)
    sizes = np.maximum(sizes, sizes.max() * 1e-9)  # each has some chance
    certain = np.zeros(len(sizes), dtype=bool)
    while True:
        probs = np.where(certain, 1.0, sizes * (count - certain.sum()) / max(sizes[~certain].sum(), 1e-300))
        above = probs > 1.0
        if not above.any():
            return probs
        certain |= above


def choose_by_gate(document: Document, think_S: torch.Tensor, count: int, noise: NoiseKey) -> Tried:
    """Chooses `count` boundaries in proportion to how often the E-step thinks there, `think_S`.

    Systematic sampling: points one apart, from one keyed number on, are laid over the summed probabilities. So each
    boundary has exactly its probability, and the count is fixed.
    """
    boundaries = document.boundaries
    probs = inclusion_probs(think_S.double().numpy(), count)
    start = line_numbers(document, boundaries[:1])
    u = keyed_uniform(noise.seed, noise.phase, noise.step, document.doc_id, start, _BOUNDARIES)
    ends = probs.cumsum()
    ends[-1] = count  # whatever the sum was rounded to
    tried = np.searchsorted(ends, np.minimum(u, 1 - 2.0**-32) + np.arange(count), side="right")
    return tuple(boundaries[i] for i in tried), torch.tensor(1 / probs[tried], dtype=torch.float32)


def choose_by_promise(
    document: Document, promise_S: torch.Tensor, count: int, args: RA3Config, noise: NoiseKey
) -> Tried:
    """Chooses `count` boundaries: those of the largest promise, and some of the others, drawn.

    A share `boundary_exploration` of them is drawn, so that no boundary is out of reach.
    """
    boundaries = document.boundaries
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
    return tuple(boundaries[i] for i in tried), torch.tensor(stands_for[tried], dtype=torch.float32)
