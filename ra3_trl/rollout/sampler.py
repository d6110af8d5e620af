"""The distribution that latents are drawn from, the same for sampling and for the loss.

The stop is ONE symbol: the log-sum-exp over all newline-bearing and end-of-text tokens, standing at `stop_ids[0]`.
Carriage return, NUL, special tokens and invalid UTF-8 are forbidden; so are a stop or white space as the first token,
hence no latent is empty. A latent cut at the maximum length has no stop term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..records import Latent, TokenTable
from .backbone import Backbone
from .inversion import block_size, invert, invert_by_blocks
from .logps import Part, Targets


@dataclass(frozen=True)
class SamplingParams:
    """Says how latents are drawn."""

    max_length: int  # most tokens of a latent
    temperature: float = 1.0
    top_k: int = 0  # symbols kept; 0 is all
    top_p: float = 1.0  # mass kept; 1 is all

    @property
    def truncated(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0


class LatentDistribution:
    """Turns logits at step `j` of a latent into the distribution over its next symbol."""

    def __init__(self, table: TokenTable, params: SamplingParams):
        self.table = table
        self.params = params
        self._allowed: dict[tuple[int, int], torch.Tensor] = {}
        self._masks: dict[tuple[int, ...], torch.Tensor] = {}
        self._columns: dict[tuple[int, ...], _Columns] = {}
        self._host = table.to("cpu")  # masks are made there and copied: to make them on a device would mean to wait
        self._longest = int(self._host.pending_S.max())  # bytes that a state may wait for

    def allowed(self, state: int, step: int) -> torch.Tensor:
        """Symbols `[V]` that may follow in UTF-8 state `state` as token number `step`."""
        if (state, step) not in self._allowed:
            self._allowed[state, step] = self._allows(state, step).to(self.table.blank_V.device)
        return self._allowed[state, step]

    def _allows(self, state: int, step: int) -> torch.Tensor:
        table, left = self._host, self.params.max_length - 1 - step
        following = table.next_state_SV[state].long()
        mask = (following >= 0) & (table.pending_S[following.clamp(min=0)] <= left)
        mask[table.stop_ids] = False
        if step == 0:
            mask &= ~table.blank_V
        elif state == 0:
            mask[table.stop_id] = True
        return mask

    def kind(self, step: int) -> tuple[int, int]:
        """What steps have in common whose symbols are the same: whether first, and how many are left as far as that
        matters."""
        return int(step == 0), min(self.params.max_length - 1 - step, self._longest)

    def mask(self, state: int, step: int) -> torch.Tensor:
        """0 for the symbols `[V]` that may follow, `-inf` for others; all tokens of the stop symbol are allowed as it
        is: the sum over them is the same, merged or not."""
        key = (state, *self.kind(step))
        if key not in self._masks:
            allowed = self._allows(state, step)
            allowed[self._host.stop_ids] = bool(allowed[self._host.stop_id])
            self._masks[key] = torch.where(allowed, 0.0, float("-inf")).to(self.table.blank_V.device)
        return self._masks[key]

    def columns(self, step: int) -> _Columns:
        """What is forbidden at a step, as lists of columns."""
        if (key := self.kind(step)) not in self._columns:
            allowed = [self._allows(state, step) for state in range(len(self._host.pending_S))]
            self._columns[key] = _Columns.of(allowed, self._host.stop_id, self.table.blank_V.device)
        return self._columns[key]

    def __call__(self, logits_nV: torch.Tensor, state_n: torch.Tensor, step_n: torch.Tensor) -> torch.Tensor:
        """Scaled logits with forbidden symbols at `-inf` and the stop symbol at `stop_ids[0]`."""
        scaled = logits_nV if self.params.temperature == 1.0 else logits_nV / self.params.temperature
        stop_n = torch.logsumexp(scaled[:, self.table.stop_ids], -1)
        pairs, which = torch.unique(torch.stack([state_n, step_n]), dim=1, return_inverse=True)
        masks = torch.stack([self.allowed(int(s), int(j)) for s, j in pairs.T.tolist()])
        mask_nV = masks if len(masks) == 1 else masks[which]
        is_stop = torch.zeros_like(self.table.blank_V)
        is_stop[self.table.stop_id] = True
        scaled = torch.where(is_stop, stop_n[:, None], scaled)
        return scaled.masked_fill(~mask_nV, float("-inf"))

    def kept(self, scaled_nV: torch.Tensor) -> torch.Tensor:
        """Mask `[n, V]` of the symbols that top-k and top-p leave."""
        keep = torch.isfinite(scaled_nV)
        if 0 < self.params.top_k < scaled_nV.shape[1]:
            keep &= scaled_nV >= scaled_nV.topk(self.params.top_k).values[:, -1:]
        if self.params.top_p < 1.0:
            masked = scaled_nV.masked_fill(~keep, float("-inf"))
            probs, order = masked.softmax(-1).sort(descending=True)
            nucleus = probs.cumsum(-1) - probs < self.params.top_p
            keep &= torch.zeros_like(keep).scatter(-1, order, nucleus)
        return keep


@dataclass(frozen=True)
class _Columns:
    """Lists what may follow at a step: between characters nearly all, inside one only what goes on with it."""

    stops: bool  # whether the stop may follow between characters
    forbidden: torch.Tensor  # columns that may not follow between characters
    first_K: torch.Tensor  # of each block of columns one that may, if `some_K`
    some_K: torch.Tensor
    inside: torch.Tensor  # columns that may follow inside some character
    allowed_SE: torch.Tensor  # which of them may in each state

    @classmethod
    def of(cls, allowed: Sequence[torch.Tensor], stop_id: int, device: torch.device) -> _Columns:
        between, inside_SV = allowed[0], torch.stack([torch.zeros_like(allowed[0]), *allowed[1:]])
        inside = inside_SV.any(0).nonzero()[:, 0]
        blocks = between.view(-1, block_size(len(between)))
        first = blocks.int().argmax(-1) + torch.arange(len(blocks)) * blocks.shape[1]
        lists = ((~between).nonzero()[:, 0], first, blocks.any(-1), inside, inside_SV[:, inside])
        return cls(bool(between[stop_id]), *(x.to(device) for x in lists))


@dataclass(frozen=True)
class Draw:
    """Holds one step of sampling for `n` branches."""

    tokens_n: torch.Tensor
    logps_n: torch.Tensor
    state_n: torch.Tensor  # UTF-8 state behind the token
    kept: tuple[torch.Tensor, ...] | None  # ids of each truncation set; `None` without truncation


def check_finite(logps: torch.Tensor) -> None:
    """Refuses a model whose numbers are not finite, before anything is made of them."""
    if not bool(torch.isfinite(logps).all()):
        raise ValueError(
            "the model's log-probs are not finite: its weights have diverged. Go on from an earlier checkpoint with a "
            "lower `e_learning_rate` or `learning_rate`."
        )


def draw(
    distribution: LatentDistribution,
    logits_nV: torch.Tensor,
    state_n: torch.Tensor,
    step: int,
    uniform_n: torch.Tensor,
) -> Draw:
    """Draws one symbol per row by inverting the cumulative distribution at `uniform_n`; the logits are used up."""
    kept = None
    if distribution.params.truncated:
        scaled = distribution(logits_nV, state_n, torch.full_like(state_n, step))
        keep = distribution.kept(scaled)
        kept = tuple(row.nonzero()[:, 0] for row in keep)
        tokens, logps, total = invert(scaled.masked_fill(~keep, float("-inf")), uniform_n)
    else:
        tokens, logps, total = _draw_in_place(distribution, logits_nV, state_n, step, uniform_n)
    check_finite(total)
    return Draw(tokens, logps, distribution.table.next_state_SV[state_n, tokens].long(), kept)


def _draw_in_place(
    distribution: LatentDistribution, scaled: torch.Tensor, state_n: torch.Tensor, step: int, uniform_n: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Symbols, log-probs and normalisers, with masks written into the logits where they differ from row to row least:
    between characters nearly all is allowed, and the few columns that go on with a character are looked at apart."""
    columns, table = distribution.columns(step), distribution.table
    if distribution.params.temperature != 1.0:
        scaled.div_(distribution.params.temperature)
    stop_n = torch.logsumexp(scaled.index_select(1, table.stop_ids), -1)
    inside = scaled.index_select(1, columns.inside)
    scaled.index_fill_(1, columns.forbidden, float("-inf"))
    if columns.stops:
        scaled.index_copy_(1, table.stop_ids[:1], stop_n[:, None])
    drawn = invert_by_blocks(scaled, uniform_n, columns.first_K, columns.some_K)
    if not len(columns.inside):
        return drawn
    tokens, logps, total = invert(inside.masked_fill_(~columns.allowed_SE[state_n], float("-inf")), uniform_n)
    between, goes_on = state_n == 0, columns.inside[tokens]
    return tuple(torch.where(between, a, b) for a, b in zip(drawn, (goes_on, logps, total), strict=True))


def draw_from_hidden(
    backbone: Backbone,
    distribution: LatentDistribution,
    hidden_nD: torch.Tensor,
    state_n: torch.Tensor,
    step: int,
    uniform_n: torch.Tensor,
) -> Draw:
    """Draws as [`draw`] does, over bounded chunks of logits."""
    kept: list[torch.Tensor] = []

    def reduce(logits: torch.Tensor, state: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, ...]:
        drawn = draw(distribution, logits, state, step, uniform)
        kept.extend(drawn.kept or ())
        return drawn.tokens_n, drawn.logps_n, drawn.state_n

    tokens, logps, states = backbone.chunked(hidden_nD, reduce, state_n, uniform_n)
    return Draw(tokens, logps, states, tuple(kept) if distribution.params.truncated else None)


def symbol_logps(
    backbone: Backbone,
    distribution: LatentDistribution,
    hidden_nD: torch.Tensor,
    symbols: Symbols,
    kept: list[torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """Scores symbols `[n]` as they were sampled, differentiably.

    `kept` are the stored truncation sets: a recomputed nucleus could leave out the very symbol that was drawn. Where
    one is `None` (drawn from elsewhere) it is found anew, and what it leaves out has log-prob `-inf`.
    """
    device = hidden_nD.device
    if kept is None and backbone.matrix is not None:
        order, targets = _by_kind(distribution, symbols, device)
        at, back = (torch.as_tensor(x, device=device) for x in (order, np.argsort(order)))
        return backbone.matrix_logps(hidden_nD[at], targets, distribution.params.temperature)[back]

    def reduce(logits: torch.Tensor, *per_row: torch.Tensor) -> tuple[torch.Tensor]:
        targets, state, step, row = per_row
        # Masks are applied to the scaled logits, so that the log-probs are of the distribution that was drawn from.
        scaled = distribution(logits, state, step)
        if kept is not None:
            mask = torch.zeros_like(scaled, dtype=torch.bool)
            unknown = [i for i, r in enumerate(row.tolist()) if kept[r] is None]
            mask[unknown] = distribution.kept(scaled[unknown])
            for i, r in enumerate(row.tolist()):
                if kept[r] is not None:
                    mask[i, kept[r]] = True
            scaled = scaled.masked_fill(~mask, float("-inf"))
        return (scaled.log_softmax(-1).gather(-1, targets[:, None])[:, 0],)

    columns = (symbols.token, symbols.state, symbols.step, np.arange(len(symbols.token)))
    return backbone.chunked(hidden_nD, reduce, *(torch.as_tensor(c, device=device) for c in columns))[0]


def _by_kind(distribution: LatentDistribution, symbols: Symbols, device: torch.device) -> tuple[np.ndarray, Targets]:
    """Puts symbols in an order in which those that share what is forbidden stand together."""
    kinds = np.array([distribution.kind(step) for step in symbols.step.tolist()], dtype=np.int64).reshape(-1, 2)
    keys = np.array([symbols.state, *kinds.T])
    order = np.lexsort(keys)
    begins = np.flatnonzero(np.diff(keys[:, order], prepend=-2).any(0))
    parts = []
    for begin, end in zip(begins.tolist(), [*begins.tolist(), len(order)][1:], strict=True):
        first = order[begin]
        parts.append(Part(slice(begin, end), distribution.mask(int(symbols.state[first]), int(symbols.step[first]))))
    token, table = symbols.token[order], distribution.table
    stops = np.flatnonzero(token == table.stop_id)
    return order, Targets(torch.as_tensor(token, device=device), parts, stops, table.stop_ids)


def kept_sets(latents: Sequence[Latent]) -> list[torch.Tensor | None]:
    """Lists the truncation set of everything that was drawn, in order; `None` where it is not known."""
    return [k for z in latents for k in (z.kept or [None] * len(z.logps))]


def fed_tokens(latent: Latent) -> tuple[int, ...]:
    """Tokens that must be run to get all of a latent's log-probs: the last one of a cut latent predicts nothing."""
    return latent.token_ids if latent.stopped else latent.token_ids[:-1]


@dataclass(frozen=True)
class Symbols:
    """Lists everything that was drawn, in order, one number each."""

    token: np.ndarray
    state: np.ndarray  # UTF-8 state before it
    step: np.ndarray
    branch: np.ndarray


def sampled_symbols(latents: Sequence[Latent], table: TokenTable) -> Symbols:
    """Lists symbol, UTF-8 state, step and branch number of everything that was drawn, in order."""
    next_state = table.next_state_SV.cpu()
    symbols, states, steps, branches = [], [], [], []
    for m, latent in enumerate(latents):
        state = 0
        for step, token in enumerate((*latent.token_ids, table.stop_id)[: len(latent.logps)]):
            symbols.append(token)
            states.append(state)
            steps.append(step)
            branches.append(m)
            state = int(next_state[state, token])
    return Symbols(*(np.array(column, dtype=np.int64) for column in (symbols, states, steps, branches)))
