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

    def allowed(self, state: int, step: int) -> torch.Tensor:
        """Symbols `[V]` that may follow in UTF-8 state `state` as token number `step`."""
        if (state, step) not in self._allowed:
            table, left = self.table, self.params.max_length - 1 - step
            following = table.next_state_SV[state].long()
            mask = (following >= 0) & (table.pending_S[following.clamp(min=0)] <= left)
            mask[table.stop_ids] = False
            if step == 0:
                mask &= ~table.blank_V
            elif state == 0:
                mask[table.stop_id] = True
            self._allowed[state, step] = mask
        return self._allowed[state, step]

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
    """Draws one symbol per row by inverting the cumulative distribution at `uniform_n`."""
    scaled = distribution(logits_nV, state_n, torch.full_like(state_n, step))
    kept = None
    if distribution.params.truncated:
        keep = distribution.kept(scaled)
        kept = tuple(row.nonzero()[:, 0] for row in keep)
        scaled = scaled.masked_fill(~keep, float("-inf"))
    total_n = torch.logsumexp(scaled, -1)
    check_finite(total_n)
    cumulative = (scaled - total_n[:, None]).exp_().cumsum(-1)
    # Kept below the last sum, so that rounding cannot push the point past the end; `right` skips symbols of mass zero.
    last = cumulative[:, -1]
    point = torch.minimum(uniform_n.to(last.dtype) * last, torch.nextafter(last, torch.zeros_like(last)))
    tokens = torch.searchsorted(cumulative, point[:, None], right=True)[:, 0]
    logps = scaled.gather(-1, tokens[:, None])[:, 0] - total_n
    state = distribution.table.next_state_SV[state_n, tokens].long()
    return Draw(tokens, logps, state, kept)


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
    targets_n: torch.Tensor,
    state_n: torch.Tensor,
    step_n: torch.Tensor,
    kept: list[torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """Scores symbols `[n]` as they were sampled, differentiably.

    `kept` are the stored truncation sets: a recomputed nucleus could leave out the very symbol that was drawn. Where
    one is `None` (drawn from elsewhere) it is found anew, and what it leaves out has log-prob `-inf`.
    """

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

    rows = torch.arange(len(targets_n), device=targets_n.device)
    return backbone.chunked(hidden_nD, reduce, targets_n, state_n, step_n, rows)[0]


def kept_sets(latents: Sequence[Latent]) -> list[torch.Tensor | None]:
    """Lists the truncation set of everything that was drawn, in order; `None` where it is not known."""
    return [k for z in latents for k in (z.kept or [None] * len(z.logps))]


def fed_tokens(latent: Latent) -> tuple[int, ...]:
    """Tokens that must be run to get all of a latent's log-probs: the last one of a cut latent predicts nothing."""
    return latent.token_ids if latent.stopped else latent.token_ids[:-1]


def sampled_symbols(latents: Sequence[Latent], table: TokenTable) -> tuple[np.ndarray, ...]:
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
    return tuple(np.array(column, dtype=np.int64) for column in (symbols, states, steps, branches))
