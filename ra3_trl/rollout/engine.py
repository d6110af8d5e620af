"""What the E-step, annotation and evaluation ask an engine for: it runs a document, then branches at its boundaries.

The order of things is the same for every engine and stands here: the document first, then as many boundaries together
as fit (a *flight*), sampled and scored. How a document and a flight are run is what engines differ in.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from ..records import Action, Document, Latent, PolicyLogProbs, RolloutGroup, TokenTable
from .backbone import Backbone
from .noise import NoiseKey
from .plan import BranchPlan, plan_boundary
from .sampler import LatentDistribution, SamplingParams, kept_sets, sampled_symbols, symbol_logps


Boundaries = Sequence[int] | Callable[[RolloutGroup], Sequence[int]]  # which to try, or how to tell from the trunk


class Flight(ABC):
    """Runs branches at some boundaries of a document, from their think prefixes to the scores."""

    def __init__(self, document: Document, plans: list[BranchPlan], num_latents: int):
        self.document = document
        self.num_latents = num_latents
        self.plans = [plan for plan in plans for _ in range(num_latents)]  # one a branch
        self.tokens: list[list[int]] = [[] for _ in self.plans]  # of each latent, sampled or given

    @abstractmethod
    def sample(self, noise: NoiseKey, index_T: np.ndarray) -> list[tuple[Latent, ...]]:
        """Draws `num_latents` latents a boundary; `index_T` are the ordinals of their lines, which key the noise."""

    @abstractmethod
    def score(self, horizon: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores the lines after the latents, and the gates before these lines, `[T, G, H]` each."""

    @abstractmethod
    def predictors(self, latents: list[Latent]) -> torch.Tensor:
        """Hidden states `[n, hidden_size]` that predict each symbol of given latents."""


MakeFlight = Callable[[list[BranchPlan], int], Flight]  # from plans and the number of latents at each


class RolloutEngine(ABC):
    """Samples latents at many boundaries of a document and scores expert lines under them.

    `max_branch_tokens` bounds branches in flight times their longest length; any value gives the same result.
    """

    name: str

    def __init__(self, backbone: Backbone, table: TokenTable, params: SamplingParams, max_branch_tokens: int = 8192):
        self.backbone = backbone
        self.table = table.to(backbone.device)
        self.distribution = LatentDistribution(self.table, params)
        self.params = params
        self.max_branch_tokens = max_branch_tokens
        self.score_seconds = 0.0  # spent on scoring so far, for the log

    @torch.no_grad()
    def trunk(self, document: Document) -> RolloutGroup:
        """Scores a document as it stands, lines and gates: a group without boundaries."""
        with self.gradients():
            return self._run(document)[0]

    @torch.no_grad()
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
        with self.gradients():
            group, make_flight = self._run(document)
            group = _unscored(group, boundaries(group) if callable(boundaries) else boundaries, num_latents, horizon)
            latents: dict[int, tuple[Latent, ...]] = {}
            for chunk, flight in self._flights(group, make_flight):
                index = np.array([document.actions[group.boundaries[t]].index for t in chunk])
                latents |= zip(chunk, flight.sample(noise, index), strict=True)
                if score:  # at once, while the flight has its cache
                    self._score(group, chunk, flight)
        return replace(group, latents=tuple(latents[t] for t in range(len(group.boundaries))))

    @torch.no_grad()
    def score(
        self, document: Document, boundaries: Sequence[int], latents: Sequence[Sequence[Latent]], horizon: int
    ) -> RolloutGroup:
        """Scores the same lines under given latents."""
        with self.gradients():
            group, make_flight = self._run(document)
            group = _unscored(group, boundaries, len(latents[0]) if latents else 0, horizon)
            for chunk, flight in self._flights(group, make_flight):
                flight.tokens = [list(latent.token_ids) for t in chunk for latent in latents[t]]
                self._score(group, chunk, flight)
        return replace(group, latents=tuple(map(tuple, latents)))

    @torch.no_grad()
    def latent_logps(
        self, document: Document, boundaries: Sequence[int], latents: Sequence[Sequence[Latent]], whole: bool = False
    ) -> torch.Tensor:
        """Scores latents `[T, G]`, whoever drew them, under the distribution that is drawn from there, or `whole`,
        without its truncation. A truncation set that a latent does not bring (`kept`) is found anew."""
        logps_TG = torch.zeros(len(boundaries), len(latents[0]) if latents else 0)
        with self.gradients():
            group, make_flight = self._run(document)
            for chunk, flight in self._flights(_unscored(group, boundaries, logps_TG.shape[1], 1), make_flight):
                flat = [latent for t in chunk for latent in latents[t]]
                logps_n, branch_n = self._symbol_logps(flat, flight.predictors(flat), whole)
                total = logps_n.new_zeros(len(flat)).index_add(0, branch_n, logps_n)
                logps_TG[chunk] = total.view(len(chunk), -1).float().cpu()
        return logps_TG

    def split(self, group: RolloutGroup) -> list[slice]:
        """Cuts the group's boundaries into slices whose branches may run together with gradients."""
        slices, begin, widest = [], 0, 0
        for t, (boundary, row) in enumerate(zip(group.boundaries, group.latents, strict=True)):
            action = group.document.actions[boundary]
            length = self._repeated(action.start) + len(action.think) + max(len(z.token_ids) for z in row)
            if t > begin and (t + 1 - begin) * len(row) * max(widest, length) > self.max_branch_tokens:
                slices.append(slice(begin, t))
                begin, widest = t, 0
            widest = max(widest, length)
        return [*slices, slice(begin, len(group.boundaries))] if group.boundaries else []

    @abstractmethod
    def gradients(self) -> AbstractContextManager[None]:
        """Encloses all forwards, and the backward pass: activation checkpointing runs forwards anew there, which must
        attend as the first ones did."""

    @abstractmethod
    def log_probs(self, group: RolloutGroup, chunk: slice, through: nn.Module | None = None) -> PolicyLogProbs:
        """Scores the group's latents at `boundaries[chunk]` under the present weights, differentiably."""

    @abstractmethod
    def _run(self, document: Document) -> tuple[RolloutGroup, MakeFlight]:
        """Runs the document: its scores, and what makes branches at its boundaries."""

    def _repeated(self, start: int) -> int:
        """Tokens of the document that a branch from token `start` on runs once more."""
        return 0

    def _flights(self, group: RolloutGroup, make_flight: MakeFlight) -> Iterator[tuple[list[int], Flight]]:
        """Positions in the group's boundaries, longest branches first, as many as fit, and their branches."""
        _, num_latents, horizon = group.latent_line_logps_TGH.shape
        plans = [plan_boundary(group.document, boundary, horizon) for boundary in group.boundaries]
        most = self.params.max_length
        length = [self._repeated(p.start) + len(p.think) + most + len(p.tokens) for p in plans]
        order = sorted(range(len(plans)), key=lambda t: -length[t])
        while order:
            fit = max(1, self.max_branch_tokens // (length[order[0]] * max(num_latents, 1)))
            chunk, order = sorted(order[:fit]), order[fit:]
            yield chunk, make_flight([plans[t] for t in chunk], num_latents)

    def _score(self, group: RolloutGroup, chunk: list[int], flight: Flight) -> None:
        """Fills the group's scores in at some of its boundaries."""
        begin = time.perf_counter()
        lines, gates = flight.score(group.latent_line_logps_TGH.shape[2])
        group.latent_line_logps_TGH[chunk], group.latent_gate_logps_TGH[chunk] = lines, gates
        self.score_seconds += time.perf_counter() - begin

    def _long(self, values: Sequence[int] | np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64), device=self.backbone.device)

    def _gate_logps(self, actions: Sequence[Action], hidden_nD: torch.Tensor) -> torch.Tensor:
        """log P(think) `[T]` from the hidden states that predict the [`gate_tokens`] of all actions."""
        tokens = [gate_tokens(action) for action in actions]
        owner = np.repeat(np.arange(len(actions)), [len(t) for t in tokens])
        logps = self.backbone.token_logps(hidden_nD, self._long(np.concatenate(tokens)))
        return logps.new_zeros(len(actions)).index_add(0, self._long(owner), logps)

    def _symbol_logps(
        self, latents: Sequence[Latent], hidden_nD: torch.Tensor, whole: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-prob of each symbol from the hidden states that predict them, and its branch."""
        symbols, states, steps, branches = (self._long(column) for column in sampled_symbols(latents, self.table))
        kept = kept_sets(latents) if self.params.truncated and not whole else None
        return symbol_logps(self.backbone, self.distribution, hidden_nD, symbols, states, steps, kept), branches


def gate_tokens(action: Action) -> tuple[int, ...]:
    """Tokens whose log-probs add up to a gate's. Where none is asked for, the think prefix may be a whole prompt: its
    first token stands for it, so that each boundary has a number."""
    return action.think if action.decides else action.think[:1]


def _unscored(trunk: RolloutGroup, boundaries: Sequence[int], num_latents: int, horizon: int) -> RolloutGroup:
    """Gives a trunk boundaries, and scores that say nothing yet."""
    lines = torch.zeros(len(boundaries), num_latents, horizon)
    gates = torch.full_like(lines, float("-inf"))
    return replace(trunk, boundaries=tuple(boundaries), latent_line_logps_TGH=lines, latent_gate_logps_TGH=gates)
