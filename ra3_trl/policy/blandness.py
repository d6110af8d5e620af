"""Whether a latent tells anything about its document: what it brings more than another document's does there.

A comment such as `# simple step` can harm less than any other, so that its gain rises while it says nothing. Put
before another document's line it does as well; one that calculates what the line needs does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..losses import compute_returns
from ..records import Latent, RolloutGroup
from ..rollout import RolloutEngine


def most_thinking(group: RolloutGroup) -> int:
    """Finds the tried boundary, as its place among them, where P(think) is largest."""
    return int(group.decision_logps_A[list(group.boundaries)].argmax())


def gains_over_other(engine: RolloutEngine, groups: Sequence[RolloutGroup], discount: float) -> list[float]:
    """Measures, in each group, the mean return of the latents before the line where the model thinks most, less that
    of as many latents of another document, in nats.

    Args:
        engine ([`~ra3_trl.rollout.RolloutEngine`]):
            Scores the others' latents, under the weights that scored the groups.
        groups (`Sequence[RolloutGroup]`):
            Scored groups; the other document of each is the next one.
        discount (`float`):
            Discount of later lines.

    Returns:
        A number for each group with latents, where there is another document.
    """
    tried = [group for group in groups if group.boundaries]
    differences = []
    for i, group in enumerate(tried):
        later = [*tried[i + 1 :], *tried[:i]]
        other = next((o for o in later if o.document.doc_id != group.document.doc_id), None)
        if other is None:
            continue
        differences.append(gain_over_other(engine, group, other, discount))
    return differences


def gain_over_other(engine: RolloutEngine, group: RolloutGroup, other: RolloutGroup, discount: float) -> float:
    """Measures the same in one group, with the latents of `other` where the model thinks most there."""
    t = most_thinking(group)
    elsewhere = other.latents[most_thinking(other)]
    own, others = returns_elsewhere(engine, group, [group.boundaries[t]], [elsewhere], discount)
    return float(own[0].mean() - others[0].mean())


def returns_elsewhere(
    engine: RolloutEngine,
    group: RolloutGroup,
    boundaries: Sequence[int],
    latents: Sequence[Sequence[Latent]],
    discount: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes returns at some of a group's `boundaries`, `[len(boundaries), G]`: of its own latents there, and of
    those in `latents`, which were drawn elsewhere, in their place."""
    horizon = group.latent_line_logps_TGH.shape[2]
    with torch.no_grad():
        instead = engine.score(group.document, boundaries, latents, horizon)
    own, others = (compute_returns(g, horizon, discount).latent_TG for g in (group, instead))
    return own[[group.boundaries.index(boundary) for boundary in boundaries]], others
