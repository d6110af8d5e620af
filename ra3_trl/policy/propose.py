"""Where latents come from: the seam behind which origins other than the policy itself stand.

Whatever drew a latent, it counts for what it is worth under the policy: its lines' log-likelihood plus
`log pi(z | s) - log q(z | s, a)`, which a group brings along as `log_ratio_TG`. Of the policy's own latents that is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ..records import Document, RolloutGroup
from ..rollout import Boundaries, NoiseKey, RolloutEngine


class LatentSource(Protocol):
    """One origin of latents in an E-phase: it draws its share, and learns from it."""

    def draw(
        self,
        engine: RolloutEngine,
        documents: Sequence[Document],
        boundaries: Sequence[Boundaries],
        noise: NoiseKey,
        score: bool,
    ) -> list[RolloutGroup]:
        """Draws latents at the `boundaries` of each document; a group's `view` is what they were drawn from, where not
        the document."""

    def weigh(self, engine: RolloutEngine, group: RolloutGroup) -> RolloutGroup:
        """Adds the latents' `log_ratio_TG` under the weights in use."""


@runtime_checkable
class Proposer(Protocol):
    """All origins of latents of a run.

    `causal`: all latents are the policy's own. `lines`: how many next lines an origin may know. `kl_coef`: weight of
    `log_ratio_TG` in what a latent is worth to annotation and E-phase (bounds take the whole). `settings`: what a
    resumed run must share.
    """

    causal: bool
    lines: int
    kl_coef: float
    settings: dict[str, Any]

    def propose(
        self,
        engine: RolloutEngine,
        documents: Sequence[Document],
        boundaries: Sequence[Boundaries],
        num_latents: int,
        horizon: int,
        noise: NoiseKey,
    ) -> list[RolloutGroup]:
        """Pools the latents of all origins at the `boundaries` of each document, scored, with their `log_ratio_TG`."""

    def sources(self, num_latents: int, horizon: int) -> Sequence[LatentSource]:
        """Shares `num_latents` out among the origins, each two or more, for an E-phase."""


@dataclass(frozen=True)
class _OwnSource:
    num_latents: int
    horizon: int

    def draw(
        self,
        engine: RolloutEngine,
        documents: Sequence[Document],
        boundaries: Sequence[Boundaries],
        noise: NoiseKey,
        score: bool,
    ) -> list[RolloutGroup]:
        return engine.rollouts(documents, boundaries, self.num_latents, self.horizon, noise, score)

    def weigh(self, engine: RolloutEngine, group: RolloutGroup) -> RolloutGroup:
        return group


class OwnLatents:
    """The default [`Proposer`]: the policy writes its latents itself, from the code so far."""

    causal = True
    lines = 1
    kl_coef = 1.0
    settings: dict[str, Any] = {}

    def propose(
        self,
        engine: RolloutEngine,
        documents: Sequence[Document],
        boundaries: Sequence[Boundaries],
        num_latents: int,
        horizon: int,
        noise: NoiseKey,
    ) -> list[RolloutGroup]:
        return engine.rollouts(documents, boundaries, num_latents, horizon, noise)

    def sources(self, num_latents: int, horizon: int) -> Sequence[LatentSource]:
        return (_OwnSource(num_latents, horizon),)


OWN_LATENTS = OwnLatents()
