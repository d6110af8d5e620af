"""Whether a latent tells anything about its document: what it brings more than another document's does there.

A comment such as `# simple step` can harm less than any other, so that its gain rises while it says nothing. Put
before another document's line it does as well; one that calculates what the line needs does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..losses import compute_returns
from ..records import Document, Latent, RolloutGroup
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
        t, horizon = most_thinking(group), group.latent_line_logps_TGH.shape[2]
        latents = other.latents[most_thinking(other)]
        instead = _score(engine, group.document, group.boundaries[t], latents, horizon)
        own, others = (compute_returns(g, horizon, discount).latent_TG for g in (group, instead))
        differences.append(float(own[t].mean() - others[0].mean()))
    return differences


def _score(
    engine: RolloutEngine, document: Document, boundary: int, latents: Sequence[Latent], horizon: int
) -> RolloutGroup:
    with torch.no_grad():
        return engine.score(document, [boundary], [latents], horizon)
