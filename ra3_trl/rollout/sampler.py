"""The distribution that latents are drawn from, the same for sampling and for the loss.

The stop is ONE symbol: the log-sum-exp over all newline-bearing and end-of-text tokens, standing at `stop_ids[0]`.
Carriage return, NUL, special tokens, invalid UTF-8 and what the format forbids are ruled out; so are a stop or white
space as the first token, hence no latent is empty. A latent cut at the maximum length has no stop term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from ..records import Latent, TokenTable
from .backbone import Backbone
from .inversion import block_size, cumulative, invert, invert_by_blocks
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
        # Read once, here: each read of a number waits for the device.
        self._longest = int(table.pending_S.max())  # bytes that a state may wait for
        self._is_stop_V = torch.zeros_like(table.blank_V)
        self._is_stop_V[table.stop_id] = True
        self._allowed_XV: torch.Tensor | None = None
        self._masks: dict[int, torch.Tensor] = {}
        self._alike: list[int] = []  # of each row of the table of allowed symbols the first that is the same
        self._columns: list[_Columns] = []

    def _row(self, state: Any, step: Any) -> Any:
        """Row of the table of allowed symbols for a state and a step, numbers or tensors: whether the step is the
        first, how many are left as far as that matters, and the state."""
        left = self.params.max_length - step
        left = left.clamp(0, self._longest + 1) if isinstance(left, torch.Tensor) else self._clamped(left)
        return ((step == 0) * (self._longest + 2) + left) * len(self.table.pending_S) + state

    def _clamped(self, left: int) -> int:
        return min(max(left, 0), self._longest + 1)

    def _table(self) -> torch.Tensor:
        """Symbols that may follow, a row for each [`_row`]."""
        if self._allowed_XV is None:
            table = self.table
            following = table.next_state_SV.long()
            pending = table.pending_S[following.clamp(min=0)]
            rows = []
            for first in (False, True):
                for left in range(-1, self._longest + 1):  # of steps behind this one
                    mask = (following >= 0) & (pending <= left)
                    mask[:, table.stop_ids] = False
                    if first:
                        mask &= ~table.blank_V
                    else:
                        mask[table.pending_S == 0] |= self._is_stop_V
                    rows.append(mask)
            self._allowed_XV = torch.cat(rows)
        return self._allowed_XV

    def allowed(self, state: int, step: int) -> torch.Tensor:
        """Symbols `[V]` that may follow in UTF-8 state `state` as token number `step`."""
        return self._table()[self._row(state, step)]

    def kind(self, state: int, step: int) -> int:
        """Numbers the states and steps at which the same symbols may follow."""
        return (self if self._alike else self.prepare())._alike[int(self._row(state, step))]

    def mask(self, state: int, step: int) -> torch.Tensor:
        """0 for the symbols `[V]` that may follow, `-inf` for others; where the stop symbol may, all of its tokens do:
        the sum over them is the same, merged or not."""
        row = self.kind(state, step)
        if row not in self._masks:
            allowed = self._table()[row]
            stops = (
                torch.zeros_like(allowed).index_fill_(0, self.table.stop_ids, True) & allowed[self.table.stop_ids[:1]]
            )
            self._masks[row] = torch.where(allowed | stops, 0.0, float("-inf"))
        return self._masks[row]

    def prepare(self) -> LatentDistribution:
        """Makes the lists that draws need, now: to make them on a device means to wait for it."""
        table, pending_S = self._table(), self.table.pending_S.cpu()
        rows_XV = table.cpu()
        numbers: dict[bytes, int] = {}
        packed = np.packbits(rows_XV.numpy(), axis=1)
        self._alike = [numbers.setdefault(row.tobytes(), x) for x, row in enumerate(packed)]
        allowed_XSV = rows_XV.view(-1, len(pending_S), table.shape[1])
        self._columns = [_Columns.of(allowed, pending_S, self.table.stop_id, table.device) for allowed in allowed_XSV]
        return self

    def columns(self, step: int) -> _Columns:
        """What is forbidden at a step, as lists of columns."""
        at = int(self._row(0, step)) // len(self.table.pending_S)
        return (self if self._columns else self.prepare())._columns[at]

    def __call__(self, logits_nV: torch.Tensor, state_n: torch.Tensor, step_n: torch.Tensor) -> torch.Tensor:
        """Scaled logits with forbidden symbols at `-inf` and the stop symbol at `stop_ids[0]`."""
        scaled = logits_nV if self.params.temperature == 1.0 else logits_nV / self.params.temperature
        stop_n = torch.logsumexp(scaled[:, self.table.stop_ids], -1)
        mask_nV = self._table()[self._row(state_n, step_n)]
        scaled = torch.where(self._is_stop_V, stop_n[:, None], scaled)
        return scaled.masked_fill(~mask_nV, float("-inf"))

    def kept(self, scaled_nV: torch.Tensor) -> torch.Tensor:
        """Mask `[n, V]` of the symbols that top-k and top-p leave."""
        keep = torch.isfinite(scaled_nV)
        if 0 < self.params.top_k < scaled_nV.shape[1]:
            keep &= scaled_nV >= scaled_nV.topk(self.params.top_k).values[:, -1:]
        if self.params.top_p < 1.0:
            masked = scaled_nV.masked_fill(~keep, float("-inf"))
            probs, order = masked.softmax(-1).sort(descending=True)
            nucleus = cumulative(probs) - probs < self.params.top_p
            keep &= torch.zeros_like(keep).scatter(-1, order, nucleus)
        return keep


@dataclass(frozen=True)
class _Columns:
    """Lists what may follow at a step: between characters nearly all, inside one only what goes on with it."""

    stops: bool  # whether the stop may follow between characters
    between_S: torch.Tensor  # which states are between characters
    forbidden: torch.Tensor  # columns that may not follow between characters
    first_K: torch.Tensor  # of each block of columns one that may in all these states, if `some_K`
    some_K: torch.Tensor
    whole: bool  # whether there is one in each block in which any may
    odd: torch.Tensor  # columns that may follow in some of these states only, such as `:` not behind `coding`
    odd_SO: torch.Tensor  # which of them may in each state
    inside: torch.Tensor  # columns that may follow inside some character
    allowed_SE: torch.Tensor  # which of them may in each state

    @classmethod
    def of(cls, allowed_SV: torch.Tensor, pending_S: torch.Tensor, stop_id: int, device: torch.device) -> _Columns:
        between_S = pending_S == 0
        some_V, all_V = allowed_SV[between_S].any(0), allowed_SV[between_S].all(0)
        odd = (some_V & ~all_V).nonzero()[:, 0]
        inside = allowed_SV[~between_S].any(0).nonzero()[:, 0]
        some_KB, all_KB = (x.view(-1, block_size(len(x))) for x in (some_V, all_V))
        first = all_KB.int().argmax(-1) + torch.arange(len(all_KB)) * all_KB.shape[1]
        whole = bool((some_KB.any(-1) == all_KB.any(-1)).all())
        columns = {
            "between_S": between_S, "forbidden": (~some_V).nonzero()[:, 0], "first_K": first, "some_K": all_KB.any(-1),
            "odd": odd, "odd_SO": allowed_SV[:, odd], "inside": inside, "allowed_SE": allowed_SV[:, inside],
        }  # fmt: skip
        return cls(bool(some_V[stop_id]), whole=whole, **{name: x.to(device) for name, x in columns.items()})


@dataclass(frozen=True)
class Draw:
    """Holds one step of sampling for `n` branches."""

    tokens_n: torch.Tensor
    logps_n: torch.Tensor
    state_n: torch.Tensor  # UTF-8 state behind the token
    kept: torch.Tensor | None  # truncation sets, a bit a symbol, see `packed_bits`; `None` without truncation


def check_finite(logps: torch.Tensor) -> None:
    """Refuses a model whose log-probs (nats, of any shape) are not finite, before anything is made of them.

    Raises:
        `ValueError`: if one is not.
    """
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
    """Draws one symbol per row by inverting the cumulative distribution at `uniform_n`; the logits are used up.

    Nothing is read, so that the host does not wait; who reads the log-probs checks that they are finite.
    """
    kept = None
    if distribution.params.truncated:
        scaled = distribution(logits_nV, state_n, torch.full_like(state_n, step))
        keep = distribution.kept(scaled)
        kept = packed_bits(keep)
        tokens, logps = invert(scaled.masked_fill(~keep, float("-inf")), uniform_n)
    else:
        tokens, logps = _draw_in_place(distribution, logits_nV, state_n, step, uniform_n)
    return Draw(tokens, logps, distribution.table.next_state_SV[state_n, tokens].long(), kept)


def _draw_in_place(
    distribution: LatentDistribution, scaled: torch.Tensor, state_n: torch.Tensor, step: int, uniform_n: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symbols and log-probs, with masks written into the logits where they differ from row to row least:
    between characters nearly all is allowed, and the few columns that go on with a character are looked at apart."""
    columns, table = distribution.columns(step), distribution.table
    if not columns.whole:
        return invert(distribution(scaled, state_n, torch.full_like(state_n, step)), uniform_n)
    if distribution.params.temperature != 1.0:
        scaled.div_(distribution.params.temperature)
    stop_n = torch.logsumexp(scaled.index_select(1, table.stop_ids), -1)
    inside = scaled.index_select(1, columns.inside)
    scaled.index_fill_(1, columns.forbidden, float("-inf"))
    if columns.stops:
        scaled.index_copy_(1, table.stop_ids[:1], stop_n[:, None])
    if len(columns.odd):
        odd = scaled.index_select(1, columns.odd).masked_fill_(~columns.odd_SO[state_n], float("-inf"))
        scaled.index_copy_(1, columns.odd, odd)
    drawn = invert_by_blocks(scaled, uniform_n, columns.first_K, columns.some_K)
    if not len(columns.inside):
        return drawn
    tokens, logps = invert(inside.masked_fill_(~columns.allowed_SE[state_n], float("-inf")), uniform_n)
    between, goes_on = columns.between_S[state_n], columns.inside[tokens]
    return torch.where(between, drawn[0], goes_on), torch.where(between, drawn[1], logps)


def draw_from_hidden(
    backbone: Backbone,
    distribution: LatentDistribution,
    hidden_nD: torch.Tensor,
    state_n: torch.Tensor,
    step: int,
    uniform_n: torch.Tensor,
    row_n: np.ndarray | None = None,
) -> Draw:
    """Draws as [`draw`] does, over bounded chunks of logits. `row_n`: the row of hidden states that each symbol is
    drawn from, if not each from its own."""

    def reduce(logits: torch.Tensor, state: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, ...]:
        drawn = draw(distribution, logits, state, step, uniform)
        columns = (drawn.tokens_n, drawn.logps_n, drawn.state_n)
        return columns if drawn.kept is None else (*columns, drawn.kept)

    tokens, logps, states, *kept = backbone.chunked(hidden_nD, reduce, state_n, uniform_n, row_n=row_n)
    return Draw(tokens, logps, states, kept[0] if kept else None)


def packed_bits(mask_nV: torch.Tensor) -> torch.Tensor:
    """Packs a mask into `[n, V / 8]` bytes: truncation sets differ in size, which the host would have to wait for."""
    eights = pad(mask_nV, (0, -mask_nV.shape[1] % 8)).view(len(mask_nV), -1, 8)
    weights = 1 << torch.arange(8, device=mask_nV.device)
    return (eights * weights.to(torch.uint8)).sum(-1, dtype=torch.uint8)


def ids_of_bits(bits: np.ndarray) -> torch.Tensor:
    """Lists what a row of [`packed_bits`] holds, ascending."""
    return torch.from_numpy(np.flatnonzero(np.unpackbits(bits, bitorder="little")))


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
        return backbone.matrix_logps(hidden_nD[at], targets)[back]

    sets = None if kept is None else _KeptSets(distribution, kept, device)

    def reduce(logits: torch.Tensor, *per_row: torch.Tensor) -> tuple[torch.Tensor]:
        targets, state, step, row = per_row
        # Masks are applied to the scaled logits, so that the log-probs are of the distribution that was drawn from.
        scaled = distribution(logits, state, step)
        if sets is not None:
            scaled = scaled.masked_fill(~sets.mask(scaled, int(row[0]), int(row[-1]) + 1), float("-inf"))
        return (scaled.log_softmax(-1).gather(-1, targets[:, None])[:, 0],)

    columns = [torch.as_tensor(c, device=device) for c in (symbols.token, symbols.state, symbols.step)]
    rows = torch.arange(len(symbols.token))  # on the host, which need not wait to know which chunk it is
    return backbone.chunked(hidden_nD, reduce, *columns, rows)[0]


def token_and_symbol_logps(
    backbone: Backbone,
    distribution: LatentDistribution,
    states: tuple[torch.Tensor, torch.Tensor],
    token_n: torch.Tensor,
    symbols: Symbols,
    kept: list[torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores plain tokens and symbols, each from its hidden states, in one pass of the head where that is a matrix: a
    pass of its own would leave one more gradient as large as the head."""
    hidden_nD, symbol_nD = states
    if kept is not None or backbone.matrix is None:
        of_tokens = backbone.token_logps(hidden_nD, token_n)
        return of_tokens, symbol_logps(backbone, distribution, symbol_nD, symbols, kept)
    order, targets = _by_kind(distribution, symbols, token_n.device)
    at, back = (torch.as_tensor(x, device=token_n.device) for x in (order, np.argsort(order)))
    logps = backbone.matrix_logps(torch.cat([hidden_nD, symbol_nD[at]]), targets.behind(token_n))
    return logps[: len(token_n)], logps[len(token_n) :][back]


def _by_kind(distribution: LatentDistribution, symbols: Symbols, device: torch.device) -> tuple[np.ndarray, Targets]:
    """Puts symbols in an order in which those that share what is forbidden stand together."""
    pairs = zip(symbols.state.tolist(), symbols.step.tolist(), strict=True)
    kinds = np.array([distribution.kind(state, step) for state, step in pairs], dtype=np.int64)
    order, scale = np.argsort(kinds, kind="stable"), 1 / distribution.params.temperature
    begins = np.flatnonzero(np.diff(kinds[order], prepend=-1)).tolist()
    parts = []
    for begin, end in zip(begins, [*begins, len(order)][1:], strict=True):
        first = order[begin]
        mask_V = distribution.mask(int(symbols.state[first]), int(symbols.step[first]))
        parts.append(Part(slice(begin, end), mask_V, scale))
    token, table = symbols.token[order], distribution.table
    stops = np.flatnonzero(token == table.stop_id)
    return order, Targets(torch.as_tensor(token, device=device), parts, stops, table.stop_ids)


class _KeptSets:
    """Holds truncation sets, one a row, on a device as one list."""

    def __init__(self, distribution: LatentDistribution, kept: list[torch.Tensor | None], device: torch.device):
        self.distribution = distribution
        self.unknown = [k is None for k in kept]
        self.ends = np.cumsum([0, *(0 if k is None else len(k) for k in kept)])
        row = np.repeat(np.arange(len(kept)), np.diff(self.ends))
        ids = [row, *(k.numpy() for k in kept if k is not None)]
        self.rows, self.ids = torch.as_tensor(np.concatenate(ids), device=device).split([len(row), len(row)])
        self.unknown_n = torch.as_tensor(self.unknown, device=device)

    def mask(self, scaled_nV: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Mask `[n, V]` of the sets of rows `begin` to `end`; unknown ones are of the logits."""
        part = slice(int(self.ends[begin]), int(self.ends[end]))
        mask = torch.zeros_like(scaled_nV, dtype=torch.bool)
        mask[self.rows[part] - begin, self.ids[part]] = True
        if any(self.unknown[begin:end]):
            mask |= self.distribution.kept(scaled_nV) & self.unknown_n[begin:end, None]
        return mask


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
    symbols, states, steps, branches = [], [], [], []
    for m, latent in enumerate(latents):
        state = 0
        for step, token in enumerate((*latent.token_ids, table.stop_id)[: len(latent.logps)]):
            symbols.append(token)
            states.append(state)
            steps.append(step)
            branches.append(m)
            state = int(table.next_state[state, token])
    return Symbols(*(np.array(column, dtype=np.int64) for column in (symbols, states, steps, branches)))
