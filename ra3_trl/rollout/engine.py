"""The engine protocol: what the E-step, annotation and evaluation ask for, whoever does it; and what engines share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import nn

from ..records import Action, Document, Latent, RolloutGroup, TokenTable
from .backbone import Backbone
from .noise import NoiseKey
from .sampler import LatentDistribution, SamplingParams, kept_sets, sampled_symbols, symbol_logps


@dataclass(frozen=True)
class PolicyLogProbs:
    """Holds differentiable log-probs of sampled latents at some boundaries."""

    gate_T: torch.Tensor  # log P(think | s_t)
    token_n: torch.Tensor  # log-prob of each sampled symbol under the distribution it was drawn from
    branch_n: torch.Tensor  # branch `t * G + g` of each symbol, counted from the first boundary
    entropy_n: torch.Tensor  # entropy of that distribution, zero unless asked for
    router: torch.Tensor | None = None  # weighted router loss of the forward, of a mixture of experts


Boundaries = Sequence[int] | Callable[[RolloutGroup], Sequence[int]]  # which to try, or how to tell from the trunk


class RolloutEngine(Protocol):
    """Samples latents at many boundaries of a document and scores expert lines under them."""

    name: str
    backbone: Backbone
    score_seconds: float  # spent on scoring so far, for the log

    def trunk(self, document: Document) -> RolloutGroup:
        """Scores a document as it stands, lines and gates: a group without boundaries."""

    def rollout(
        self,
        document: Document,
        boundaries: Boundaries,
        num_latents: int,
        horizon: int,
        noise: NoiseKey,
        score: bool = True,
    ) -> RolloutGroup:
        """Samples `num_latents` latents before each action in `boundaries` (a function is asked once the document has
        run); with `score`, scores the `horizon` lines under each."""

    def score(
        self, document: Document, boundaries: Sequence[int], latents: Sequence[Sequence[Latent]], horizon: int
    ) -> RolloutGroup:
        """Scores the same lines under given latents."""

    def latent_logps(
        self, document: Document, boundaries: Sequence[int], latents: Sequence[Sequence[Latent]], whole: bool = False
    ) -> torch.Tensor:
        """Scores latents `[T, G]`, whoever drew them, under the distribution that is drawn from there, or `whole`,
        without its truncation. A truncation set that a latent does not bring (`kept`) is found anew."""

    def split(self, group: RolloutGroup) -> list[slice]:
        """Cuts the group's boundaries into slices whose branches may be in flight together."""

    def gradients(self) -> AbstractContextManager[None]:
        """Encloses `log_probs` and the backward pass: activation checkpointing runs forwards anew in the latter, and
        they must attend as the first ones did."""

    def log_probs(
        self, group: RolloutGroup, chunk: slice, through: nn.Module | None = None, entropy: bool = False
    ) -> PolicyLogProbs:
        """Scores the group's latents at `boundaries[chunk]` under the present weights, differentiably."""


class EngineBase:
    """Holds what every engine is made of.

    Args:
        backbone ([`Backbone`]):
            The model.
        table ([`TokenTable`]):
            Facts of its vocabulary.
        params ([`SamplingParams`]):
            How latents are drawn.
        max_branch_tokens (`int`, *optional*, defaults to `8192`):
            Bound on branches in flight times their longest length. Any value gives the same result.
    """

    def __init__(self, backbone: Backbone, table: TokenTable, params: SamplingParams, max_branch_tokens: int = 8192):
        self.backbone = backbone
        self.table = table.to(backbone.device)
        self.distribution = LatentDistribution(self.table, params)
        self.params = params
        self.max_branch_tokens = max_branch_tokens
        self.score_seconds = 0.0

    def _long(self, values: Sequence[int] | np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64), device=self.backbone.device)

    def _gate_logps(self, actions: Sequence[Action], hidden_nD: torch.Tensor) -> torch.Tensor:
        """log P(think) `[T]` from the hidden states that predict the [`gate_tokens`] of all actions."""
        tokens = [gate_tokens(action) for action in actions]
        owner = np.repeat(np.arange(len(actions)), [len(t) for t in tokens])
        logps = self.backbone.token_logps(hidden_nD, self._long(np.concatenate(tokens)))
        return logps.new_zeros(len(actions)).index_add(0, self._long(owner), logps)

    def _symbol_logps(
        self, latents: Sequence[Latent], hidden_nD: torch.Tensor, whole: bool = False, entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-prob of each symbol from the hidden states that predict them, its branch, and the entropy there."""
        symbols, states, steps, branches = (self._long(column) for column in sampled_symbols(latents, self.table))
        kept = kept_sets(latents) if self.params.truncated and not whole else None
        logps_n, entropy_n = symbol_logps(
            self.backbone, self.distribution, hidden_nD, symbols, states, steps, kept, entropy
        )
        return logps_n, branches, entropy_n


def gate_tokens(action: Action) -> tuple[int, ...]:
    """Tokens whose log-probs add up to a gate's. Where none is asked for, the think prefix may be a whole prompt: its
    first token stands for it, so that each boundary has a number."""
    return action.think if action.decides else action.think[:1]


def unscored(trunk: RolloutGroup, boundaries: Sequence[int], num_latents: int, horizon: int) -> RolloutGroup:
    """Gives a trunk boundaries, and scores that say nothing yet."""
    lines = torch.zeros(len(boundaries), num_latents, horizon)
    gates = torch.full_like(lines, float("-inf"))
    return replace(trunk, boundaries=tuple(boundaries), latent_line_logps_TGH=lines, latent_gate_logps_TGH=gates)
