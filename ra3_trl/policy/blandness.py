"""Whether a latent tells anything about its document: what it brings more than another document's does there.

A comment such as `# simple step` can harm less than any other, so that its gain rises while it says nothing. Put
before another document's line it does as well; one that calculates what the line needs does not.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..losses import compute_returns
from ..records import RolloutGroup
from ..rollout import RolloutEngine


def most_thinking(group: RolloutGroup) -> int:
    """Finds the tried boundary, as its place among them, where P(think) is largest."""
    return int(group.decision_logps_A[list(group.boundaries)].argmax())


def first_latent(group: RolloutGroup) -> tuple[int, ...]:
    """Reads the tokens of the first latent there: what a document is counted by where latents are compared."""
    return group.latents[most_thinking(group)][0].token_ids


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
    pairs = [(group, other) for i, group in enumerate(tried) if (other := _another(tried, i)) is not None]
    return over_others(engine, pairs, discount)


def over_others(
    engine: RolloutEngine, pairs: Sequence[tuple[RolloutGroup, RolloutGroup]], discount: float
) -> list[float]:
    """Measures the same of given pairs: a group, and the one whose latents are put in place of its own."""
    if not pairs:
        return []
    horizon = pairs[0][0].latent_line_logps_TGH.shape[2]
    where = [most_thinking(group) for group, _ in pairs]
    instead = engine.scores(
        [group.document for group, _ in pairs],
        [[group.boundaries[t]] for (group, _), t in zip(pairs, where, strict=True)],
        [[other.latents[most_thinking(other)]] for _, other in pairs],
        horizon,
    )
    differences = []
    for (group, _), t, others in zip(pairs, where, instead, strict=True):
        own_G, other_G = (compute_returns(g, horizon, discount).latent_TG[i] for g, i in ((group, t), (others, 0)))
        differences.append(float(own_G.mean() - other_G.mean()))
    return differences


def _another(groups: Sequence[RolloutGroup], i: int) -> RolloutGroup | None:
    """The next group, going round, that is of another document."""
    later = (*groups[i + 1 :], *groups[:i])
    return next((group for group in later if group.document.doc_id != groups[i].document.doc_id), None)
