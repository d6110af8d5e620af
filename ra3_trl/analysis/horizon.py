"""How long latents last, and what that is worth to RL (PAPER, the theorem on convergence)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class EffectiveHorizon:
    """Says how long decisions last: latents, and lines without one in force, which last one line each."""

    # Mean duration tau of a latent, `None` without latents. Those that the text's end ended would have lasted longer:
    # it is too small, and `gbar` too large.
    lines_per_latent: float | None
    gbar: float  # mean of gamma^tau over all decisions; the theorem has the supremum, which no sample gives
    # Value iterations that the bound asks for. A line earns 1 at most, so R_max is (1 - gbar) / (1 - gamma): what
    # lasts longer earns more.
    iterations: float
    iterations_by_line: float  # at gamma, where each line is a decision
    latents: int  # how many there were
    cut: float  # share of these that the text's end ended


def durations(num_lines: int, starts: Sequence[int]) -> list[int]:
    """Counts the lines that each latent is in force: until the next one, or the end of the text's `num_lines` lines
    (latents not counted). They stand before the lines `starts`, counted from 0, in order.

    >>> durations(7, starts=[1, 4])
    [3, 3]
    """
    return [end - start for start, end in pairwise([*starts, num_lines])]


def iteration_bound(gbar: float, eps: float = 0.1, most: float = 1.0) -> float:
    """Bounds the iterations to an `eps`-optimal policy: N = log(R_max / (eps (1 - gbar))) / (1 - gbar) (PAPER,
    convergence), with `gbar` = E[gamma^tau] and `most` = R_max, the largest reward of a decision.

    >>> round(iteration_bound(0.9), 1)  # log(1 / 0.01) / 0.1
    46.1

    Raises:
        `ValueError`: for a `gbar` below 0, or of 1 and more.
    """
    if not 0 <= gbar < 1:
        raise ValueError(f"`gbar` is {gbar}; it must be at least 0 and below 1.")
    return max(0.0, math.log(most / (eps * (1 - gbar)))) / (1 - gbar)


def effective_horizon(texts: Sequence[tuple[int, Sequence[int]]], gamma: float) -> EffectiveHorizon:
    """Measures latents in several texts, each its lines and those before which latents stand (as [`durations`] takes
    them), at the discount `gamma` of a line.

    >>> horizon = effective_horizon([(7, [1, 4])], gamma=0.5)  # a line alone, and two latents of 3 lines
    >>> horizon.lines_per_latent, horizon.gbar == (0.5 + 2 * 0.5**3) / 3, horizon.cut
    (3.0, True, 0.5)

    Raises:
        `ValueError`: for a `gamma` that is not between 0 and 1, and where there is no line.
    """
    if not 0 < gamma < 1:
        raise ValueError(f"`gamma` is {gamma}; it must be above 0 and below 1.")
    lasting = [tau for lines, starts in texts for tau in durations(lines, starts)]
    alone = sum(starts[0] if starts else lines for lines, starts in texts)  # lines before the first latent
    if not lasting and not alone:
        raise ValueError("there is no line in the texts; give some that have.")
    gbar = (sum(gamma**tau for tau in lasting) + alone * gamma) / (len(lasting) + alone)
    return EffectiveHorizon(
        lines_per_latent=sum(lasting) / len(lasting) if lasting else None,
        gbar=gbar,
        iterations=iteration_bound(gbar, most=(1 - gbar) / (1 - gamma)),
        iterations_by_line=iteration_bound(gamma),
        latents=len(lasting),
        cut=sum(bool(starts) for _, starts in texts) / len(lasting) if lasting else 0.0,
    )
