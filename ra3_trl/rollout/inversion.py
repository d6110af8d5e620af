"""Draws symbols by inverting cumulative distributions, block by block: each logit is moved as few times as can be.

A cumulative sum over the vocabulary would read and write every probability once more. Instead each block of
neighbouring symbols is normalised by itself; the uniform number picks a block by the blocks' masses, and a symbol
within it. That is the same symbol, since blocks are in the vocabulary's order.
"""

from __future__ import annotations

import math

import torch


def block_size(vocab_size: int) -> int:
    """Finds the divisor of the vocabulary nearest its root, by ratio: so many symbols are a block, none is left over.

    >>> block_size(49152), block_size(151936), block_size(7)
    (256, 128, 7)
    """
    divisors = [d for d in range(1, math.isqrt(vocab_size) + 1) if vocab_size % d == 0]
    small, large = divisors[-1], vocab_size // divisors[-1]
    return large if large <= 4 * small or small < 16 else small


def cumulative(probs_nB: torch.Tensor) -> torch.Tensor:
    """Cumulative sums of probabilities. On an accelerator floats are added in another order each time, which
    deterministic algorithms refuse; there they are added as whole numbers of 2^-52, whose sums have no order."""
    if probs_nB.device.type in ("cpu", "mps") or not torch.are_deterministic_algorithms_enabled():
        return probs_nB.cumsum(-1)
    whole = (probs_nB.double() * 2.0**52).long()
    return (whole.cumsum(-1).double() * 2.0**-52).to(probs_nB.dtype)


def _invert(probs_nB: torch.Tensor, share_n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the cumulative sum of a row passes the share of its total, and how far beyond the sum before that place. A
    row of NaN, which is drawn in vain, gets some place."""
    sums = cumulative(probs_nB)
    # Kept below the last sum, so that rounding cannot push the point past the end; `right` skips symbols of mass zero.
    last = sums[:, -1]
    point = torch.minimum(share_n.to(last.dtype) * last, torch.nextafter(last, torch.zeros_like(last)))
    at = torch.searchsorted(sums, point[:, None], right=True).clamp_(max=sums.shape[1] - 1)
    before = torch.where(at > 0, sums.gather(-1, (at - 1).clamp(min=0)), 0.0)
    return at[:, 0], point - before[:, 0]


def invert(scaled_nV: torch.Tensor, uniform_n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws from logits that may be `-inf`: symbols and their log-probs."""
    logps_nV = torch.log_softmax(scaled_nV, -1)
    tokens = _invert(logps_nV.exp(), uniform_n)[0]
    return tokens, logps_nV.gather(-1, tokens[:, None])[:, 0]


def invert_by_blocks(
    scaled_nV: torch.Tensor, uniform_n: torch.Tensor, first_K: torch.Tensor, some_K: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws the same in one pass over the logits.

    `first_K` are symbols, one in each of K blocks of equal size, whose logits are finite; where there is none,
    `some_K` is false.
    """
    rows, blocks = len(scaled_nV), len(first_K)
    logps_nKB = torch.log_softmax(scaled_nV.view(rows, blocks, -1), -1)  # each block by itself
    # A block's mass is told by any one of its symbols.
    firsts = scaled_nV.index_select(1, first_K) - logps_nKB.view(rows, -1).index_select(1, first_K)
    mass_nK = firsts.masked_fill_(~some_K, -math.inf)
    total_n = torch.logsumexp(mass_nK, -1)
    share_nK = (mass_nK - total_n[:, None]).exp()
    block, rest = _invert(share_nK, uniform_n)
    within_nB = logps_nKB[torch.arange(rows, device=block.device), block]
    share = rest / share_nK.gather(-1, block[:, None])[:, 0]
    place = _invert(within_nB.exp(), share)[0]
    logps = within_nB.gather(-1, place[:, None])[:, 0] + mass_nK.gather(-1, block[:, None])[:, 0] - total_n
    return block * within_nB.shape[1] + place, logps
