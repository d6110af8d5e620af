"""What the E-step, annotation and evaluation ask an engine for: it runs documents, then branches at their boundaries.

The order of things is the same for every engine and stands here: as many documents together as fit, then as many of
their boundaries together as fit (a *flight*), sampled and scored. How documents and a flight are run is what engines
differ in.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from ..records import Action, Document, Latent, PolicyLogProbs, RolloutGroup, TokenTable
from .backbone import Backbone
from .noise import NoiseKey
from .plan import BranchPlan, plan_boundary
from .sampler import (
    LatentDistribution,
    SamplingParams,
    Symbols,
    kept_sets,
    sampled_symbols,
    symbol_logps,
    token_and_symbol_logps,
)


Boundaries = Sequence[int] | Callable[[RolloutGroup], Sequence[int]]  # which to try, or how to tell from the trunk


class Flight(ABC):
    """Runs branches at some boundaries of documents, from their think prefixes to the scores."""

    def __init__(self, plans: list[BranchPlan], num_latents: int):
        self.num_latents = num_latents
        self.plans = [plan for plan in plans for _ in range(num_latents)]  # one a branch
        self.tokens: list[list[int]] = [[] for _ in self.plans]  # of each latent, sampled or given

    def uniform(self, noise: NoiseKey, step: int | np.ndarray, branches: np.ndarray) -> np.ndarray:
        """Noise for the symbol number `step` of some branches; for several, `step` is a column."""
        doc_id = np.array([plan.document.doc_id for plan in self.plans])
        index = np.array([plan.index for plan in self.plans])
        return noise.uniform(doc_id[branches], index[branches], branches % self.num_latents, step)

    @abstractmethod
    def sample(self, noise: NoiseKey) -> list[tuple[Latent, ...]]:
        """Draws `num_latents` latents a boundary."""

    @abstractmethod
    def score(self, horizon: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores the lines after the latents, and the gates before these lines, `[T, G, H]` each."""

    @abstractmethod
    def predictors(self, latents: list[Latent]) -> torch.Tensor:
        """Hidden states `[n, hidden_size]` that predict each symbol of given latents."""


# From plans, the numbers of their documents (ascending) and the number of latents at each.
MakeFlight = Callable[[list[BranchPlan], list[int], int], Flight]
Piece = tuple[RolloutGroup, slice]  # some boundaries of a group
_Place = tuple[int, int]  # number of a document, position in its boundaries


class RolloutEngine(ABC):
    """Samples latents at many boundaries of documents and scores expert lines under them.

    Documents go in lockstep, as many as fit; methods of one document are those of a list of one. `max_branch_tokens`
    bounds the branch tokens of a forward, and the tokens of documents that run together; of tokens whose keys and
    values are only kept, while latents are drawn, there may be more. Any value gives the same result.
    """

    name: str

    def __init__(self, backbone: Backbone, table: TokenTable, params: SamplingParams, max_branch_tokens: int = 8192):
        self.backbone = backbone
        self.table = table.to(backbone.device)
        self.distribution = LatentDistribution(self.table, params).prepare()
        self.params = params
        self.max_branch_tokens = max_branch_tokens
        self.score_seconds = 0.0  # spent on scoring so far, for the log

    def trunk(self, document: Document) -> RolloutGroup:
        """Scores a document as it stands, lines and gates: a group without boundaries."""
        return self.trunks([document])[0]

    def rollout(
        self,
        document: Document,
        boundaries: Boundaries,
        num_latents: int,
        horizon: int,
        noise: NoiseKey,
        score: bool = True,
    ) -> RolloutGroup:
        """Samples and scores latents of one document, see `rollouts`."""
        return self.rollouts([document], [boundaries], num_latents, horizon, noise, score)[0]

    def score(
        self, document: Document, boundaries: Sequence[int], latents: Sequence[Sequence[Latent]], horizon: int
    ) -> RolloutGroup:
        """Scores given latents of one document, see `scores`."""
        return self.scores([document], [boundaries], [latents], horizon)[0]

    @torch.no_grad()
    def trunks(self, documents: Sequence[Document]) -> list[RolloutGroup]:
        """Scores documents as they stand, lines and gates: groups without boundaries."""
        with self.gradients():
            return [group for part in self._together(documents) for group in self._run(documents[part])[0]]

    @torch.no_grad()
    def rollouts(
        self,
        documents: Sequence[Document],
        boundaries: Sequence[Boundaries],
        num_latents: int,
        horizon: int,
        noise: NoiseKey,
        score: bool = True,
    ) -> list[RolloutGroup]:
        """Samples `num_latents` latents before each action in a document's `boundaries` (a function is asked once the
        document has run; in the documents' order); with `score`, scores the `horizon` lines under each."""
        found: list[RolloutGroup] = []
        with self.gradients():
            for part in self._together(documents):
                trunks, make_flight = self._run(documents[part])
                chosen = [b(g) if callable(b) else b for b, g in zip(boundaries[part], trunks, strict=True)]
                groups = [_unscored(g, b, num_latents, horizon) for g, b in zip(trunks, chosen, strict=True)]
                drawn: dict[_Place, tuple[Latent, ...]] = {}
                for places, flight in self._flights(groups, make_flight, sampling=True):
                    drawn |= zip(places, flight.sample(noise), strict=True)
                    if score:  # at once, while the flight has its cache
                        self._score(groups, places, flight)
                found += [
                    replace(group, latents=tuple(drawn[d, t] for t in range(len(group.boundaries))))
                    for d, group in enumerate(groups)
                ]
        return found

    @torch.no_grad()
    def scores(
        self,
        documents: Sequence[Document],
        boundaries: Sequence[Sequence[int]],
        latents: Sequence[Sequence[Sequence[Latent]]],
        horizon: int,
    ) -> list[RolloutGroup]:
        """Scores the same lines under given latents, `[T, G]` of each document, with one `G` for all that have any."""
        found: list[RolloutGroup] = []
        count = _count(latents)
        with self.gradients():
            for part in self._together(documents):
                trunks, make_flight = self._run(documents[part])
                given = zip(trunks, boundaries[part], latents[part], strict=True)
                groups = [replace(_unscored(g, b, count, horizon), latents=tuple(map(tuple, z))) for g, b, z in given]
                for places, flight in self._flights(groups, make_flight):
                    flight.tokens = [list(latent.token_ids) for d, t in places for latent in groups[d].latents[t]]
                    self._score(groups, places, flight)
                found += groups
        return found

    @torch.no_grad()
    def latent_logps(
        self, document: Document, boundaries: Sequence[int], latents: Sequence[Sequence[Latent]], whole: bool = False
    ) -> torch.Tensor:
        """Scores latents `[T, G]`, whoever drew them, under the distribution that is drawn from there, or `whole`,
        without its truncation. A truncation set that a latent does not bring (`kept`) is found anew."""
        logps_TG = torch.zeros(len(boundaries), _count([latents]))
        with self.gradients():
            (group,), make_flight = self._run([document])
            for places, flight in self._flights([_unscored(group, boundaries, logps_TG.shape[1], 1)], make_flight):
                chunk = [t for _, t in places]
                flat = [latent for t in chunk for latent in latents[t]]
                symbols, kept = self._symbols(flat, whole)
                hidden = flight.predictors(flat)
                logps_n = symbol_logps(self.backbone, self.distribution, hidden, symbols, kept)
                total = logps_n.new_zeros(len(flat)).index_add(0, self._long(symbols.branch), logps_n)
                logps_TG[chunk] = total.view(len(chunk), -1).float().cpu()
        return logps_TG

    def split(self, group: RolloutGroup) -> list[slice]:
        """Cuts the group's boundaries into slices whose branches may run together with gradients."""
        slices, begin, widest = [], 0, 0
        for t, length in enumerate(self._lengths(group)):
            if t > begin and (t + 1 - begin) * group.num_latents * max(widest, length) > self.max_branch_tokens:
                slices.append(slice(begin, t))
                begin, widest = t, 0
            widest = max(widest, length)
        return [*slices, slice(begin, len(group.boundaries))] if group.boundaries else []

    def join(self, pieces: Sequence[Piece]) -> list[slice]:
        """Cuts pieces into slices that run together with gradients: documents and branches fit, or it is one piece."""
        sizes = []
        for group, part in pieces:
            lengths, starts = (
                self._lengths(group)[part],
                [group.document.actions[b].start for b in group.boundaries[part]],
            )
            sizes.append(max(starts) + len(lengths) * group.num_latents * max(lengths))
        return fill(sizes, self.max_branch_tokens)

    def _lengths(self, group: RolloutGroup) -> list[int]:
        """Tokens of the longest branch at each of the group's boundaries."""
        actions = [group.document.actions[boundary] for boundary in group.boundaries]
        longest = [max(len(z.token_ids) for z in row) for row in group.latents]
        return [self._repeated(a.start) + len(a.think) + most for a, most in zip(actions, longest, strict=True)]

    def remembering(self) -> AbstractContextManager[None]:
        """Lets documents inside that begin as the same chunk did before share what has been run of it, where the
        engine keeps anything; the weights must stay."""
        return nullcontext()

    def forget(self, document: Document) -> None:
        """Lets go of what is remembered of a chunk that will not be asked for again."""
        return

    @abstractmethod
    def gradients(self) -> AbstractContextManager[None]:
        """Encloses all forwards, and the backward pass: activation checkpointing runs forwards anew there, which must
        attend as the first ones did."""

    def log_probs(self, group: RolloutGroup, chunk: slice, through: nn.Module | None = None) -> PolicyLogProbs:
        """Scores the group's latents at `boundaries[chunk]` under the present weights, differentiably."""
        return self.packed_log_probs([(group, chunk)], through)[0]

    @abstractmethod
    def packed_log_probs(self, pieces: Sequence[Piece], through: nn.Module | None = None) -> list[PolicyLogProbs]:
        """Scores the latents of several pieces as `log_probs` does, in one forward."""

    @abstractmethod
    def _run(self, documents: Sequence[Document]) -> tuple[list[RolloutGroup], MakeFlight]:
        """Runs documents: their scores, and what makes branches at their boundaries."""

    def _repeated(self, start: int) -> int:
        """Tokens of the document that a branch from token `start` on runs once more."""
        return 0

    def _together(self, documents: Sequence[Document]) -> list[slice]:
        """Cuts documents into slices that run together."""
        return fill([len(document.input_ids) for document in documents], self.max_branch_tokens)

    def _room(self, plan: BranchPlan, num_latents: int, sampling: bool) -> float:
        """Tokens that a branch counts for where `max_branch_tokens` bounds those in flight."""
        return self._repeated(plan.start) + len(plan.think) + self.params.max_length + len(plan.tokens)

    def _flights(
        self, groups: Sequence[RolloutGroup], make_flight: MakeFlight, sampling: bool = False
    ) -> Iterator[tuple[list[_Place], Flight]]:
        """Boundaries of the groups, longest branches first, as many as fit, and their branches."""
        _, num_latents, horizon = groups[0].latent_line_logps_TGH.shape
        places = [(d, t) for d, group in enumerate(groups) for t in range(len(group.boundaries))]
        plans = {(d, t): plan_boundary(groups[d].document, groups[d].boundaries[t], horizon) for d, t in places}
        length = {at: self._room(plan, num_latents, sampling) for at, plan in plans.items()}
        order = sorted(places, key=lambda at: -length[at])
        while order:
            fit = max(1, int(self.max_branch_tokens / (length[order[0]] * max(num_latents, 1))))
            chunk, order = sorted(order[:fit]), order[fit:]
            yield chunk, make_flight([plans[at] for at in chunk], [d for d, _ in chunk], num_latents)

    def _score(self, groups: Sequence[RolloutGroup], places: list[_Place], flight: Flight) -> None:
        """Fills the groups' scores in at some of their boundaries."""
        begin = time.perf_counter()
        lines, gates = flight.score(groups[0].latent_line_logps_TGH.shape[2])
        for (d, t), line_GH, gate_GH in zip(places, lines, gates, strict=True):
            groups[d].latent_line_logps_TGH[t], groups[d].latent_gate_logps_TGH[t] = line_GH, gate_GH
        self.score_seconds += time.perf_counter() - begin

    def _long(self, values: Sequence[int] | np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64), device=self.backbone.device)

    def _by_piece(
        self, pieces: Sequence[Piece], gate_nD: torch.Tensor, symbol_nD: torch.Tensor
    ) -> list[PolicyLogProbs]:
        """Log-probs of each piece from the hidden states that predict all pieces' [`gate_tokens`] and symbols."""
        router = self.backbone.router_loss  # of their forward; the head's may be checkpointed
        opened = [[(a, row) for _, a, row in of_pieces([piece])] for piece in pieces]
        latents = [[z for _, row in own for z in row] for own in opened]
        tokens = [gate_tokens(a) for own in opened for a, _ in own]
        symbols, kept = self._symbols([z for own in latents for z in own])
        of_tokens, token_n = token_and_symbol_logps(
            self.backbone, self.distribution, (gate_nD, symbol_nD), self._long(np.concatenate(tokens)), symbols, kept
        )
        owner, branch_n = np.repeat(np.arange(len(tokens)), [*map(len, tokens)]), self._long(symbols.branch)
        gates = of_tokens.new_zeros(len(tokens)).index_add(0, self._long(owner), of_tokens)
        counts, found, first = [sum(len(z.logps) for z in own) for own in latents], [], 0
        columns = zip(
            gates.split([*map(len, opened)]), token_n.split(counts), branch_n.split(counts), latents, strict=True
        )
        for gate_T, of_piece, branches, own in columns:
            found.append(PolicyLogProbs(gate_T, of_piece, branches - first, router))
            first += len(own)
        return found

    def _symbols(
        self, latents: Sequence[Latent], whole: bool = False
    ) -> tuple[Symbols, list[torch.Tensor | None] | None]:
        """What was drawn, and with which truncation sets, if they count."""
        kept = kept_sets(latents) if self.params.truncated and not whole else None
        return sampled_symbols(latents, self.table), kept


def of_pieces(pieces: Sequence[Piece]) -> list[tuple[int, Action, tuple[Latent, ...]]]:
    """Lists the boundaries of pieces: number of the piece, action behind, latents."""
    return [
        (p, group.document.actions[boundary], row)
        for p, (group, part) in enumerate(pieces)
        for boundary, row in zip(group.boundaries[part], group.latents[part], strict=True)
    ]


def different_latents(piece: Piece) -> tuple[Piece, list[int]]:
    """The piece with each boundary's different latents, and which of these, counted from its first boundary on, each
    of its latents is."""
    group, part = piece
    rows, which, first = list(group.latents), list[int](), 0
    for t in range(len(rows))[part]:
        different = {(z.token_ids, len(z.logps)): z for z in rows[t]}
        number = {key: first + i for i, key in enumerate(different)}
        which += [number[z.token_ids, len(z.logps)] for z in rows[t]]
        rows[t], first = tuple(different.values()), first + len(different)
    return (replace(group, latents=tuple(rows)), part), which


def gate_tokens(action: Action) -> tuple[int, ...]:
    """Tokens whose log-probs add up to a gate's. Where none is asked for, the think prefix may be a whole prompt: its
    first token stands for it, so that each boundary has a number."""
    return action.think if action.decides else action.think[:1]


def fill(sizes: Sequence[int], most: int) -> list[slice]:
    """Cuts a list into slices whose sizes add up to `most` at most, or that hold one thing.

    >>> fill([2, 3, 4, 9, 1], most=5)
    [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None), slice(4, 5, None)]
    """
    slices, begin, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > begin and total + size > most:
            slices.append(slice(begin, i))
            begin, total = i, 0
        total += size
    return [*slices, slice(begin, len(sizes))] if sizes else []


def _count(latents: Sequence[Sequence[Sequence[Latent]]]) -> int:
    """Number of latents at each boundary of documents; 0 where there is no boundary."""
    return next((len(row) for rows in latents for row in rows), 0)


def _unscored(trunk: RolloutGroup, boundaries: Sequence[int], num_latents: int, horizon: int) -> RolloutGroup:
    """Gives a trunk boundaries, and scores that say nothing yet."""
    lines = torch.zeros(len(boundaries), num_latents, horizon)
    gates = torch.full_like(lines, float("-inf"))
    return replace(trunk, boundaries=tuple(boundaries), latent_line_logps_TGH=lines, latent_gate_logps_TGH=gates)
