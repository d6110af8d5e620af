"""The engine protocol: what the E-step, annotation and evaluation ask for, whoever does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import nn

from ..records import Document, Latent, PolicyLogProbs, RolloutGroup
from .backbone import Backbone
from .noise import NoiseKey
from .sampler import SamplingParams


Boundaries = Sequence[int] | Callable[[RolloutGroup], Sequence[int]]  # which to try, or how to tell from the trunk


class RolloutEngine(Protocol):
    """Samples latents at many boundaries of a document and scores expert lines under them."""

    name: str
    backbone: Backbone
    params: SamplingParams
    score_seconds: float  # spent on scoring so far, for the log

    def trunk(self, document: Document) -> RolloutGroup:
        """Line and gate log-probs of a document as it stands: a group without boundaries."""

    def rollout(
        self,
        document: Document,
        boundaries: Boundaries,
        num_latents: int,
        horizon: int,
        noise: NoiseKey,
        score: bool = True,
    ) -> RolloutGroup:
        """`num_latents` latents before each action in `boundaries` (a function is asked once the document has run);
        with `score`, the `horizon` lines under each."""

    def score(
        self, document: Document, boundaries: Sequence[int], latents: Sequence[Sequence[Latent]], horizon: int
    ) -> RolloutGroup:
        """The same for given latents."""

    def latent_logps(
        self, document: Document, boundaries: Sequence[int], latents: Sequence[Sequence[Latent]], whole: bool = False
    ) -> torch.Tensor:
        """Log-probs `[T, G]` of latents, whoever drew them, under the distribution that is drawn from there, or
        `whole`, without its truncation. A truncation set that a latent does not bring (`kept`) is found anew."""

    def split(self, group: RolloutGroup) -> list[slice]:
        """Slices of the group's boundaries whose branches may be in flight together."""

    def gradients(self) -> AbstractContextManager[None]:
        """Where `log_probs` and the backward pass belong together: activation checkpointing runs forwards anew in the
        backward pass, which must attend as the first ones did."""

    def log_probs(
        self, group: RolloutGroup, part: slice, through: nn.Module | None = None, entropy: bool = False
    ) -> PolicyLogProbs:
        """Log-probs of the group's latents at `boundaries[part]` under the present weights, differentiable."""
