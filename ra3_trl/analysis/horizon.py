"""How long latents last, and what that is worth to RL (PAPER, the theorem on convergence)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class EffectiveHorizon:
    """How long decisions last.

    Args:
        lines_per_latent (`float` or `None`):
            Mean duration tau of a latent in lines; `None` without latents. Those that the text's end ended would have
            lasted longer, so it is too small, and `gbar` too large.
        gbar (`float`):
            Mean of gamma^tau over all decisions: latents, and lines without one in force, which last one line each.
            The theorem has the supremum over states and actions, which no sample gives.
        iterations, iterations_by_line (`float`):
            Value iterations that the bound asks for at `gbar`, and at gamma, where each line is a decision. A line
            earns 1 at most, so R_max is (1 - gbar) / (1 - gamma): what lasts longer earns more.
        latents (`int`):
            How many there were.
        cut (`float`):
            Share of these that the text's end ended.
    """

    lines_per_latent: float | None
    gbar: float
    iterations: float
    iterations_by_line: float
    latents: int
    cut: float


def durations(num_lines: int, starts: Sequence[int]) -> list[int]:
    """Lines that each latent is in force: until the next one, or the text's end.

    Args:
        num_lines (`int`):
            Lines of the text, latents not counted.
        starts (`Sequence[int]`):
            Lines, counted from 0, before which latents stand, in order.

    Example: with 7 lines, latents before lines 1 and 4 last 3 lines each.
    """
    return [end - start for start, end in pairwise([*starts, num_lines])]


def iteration_bound(gbar: float, eps: float = 0.1, most: float = 1.0) -> float:
    """N = log(R_max / (eps (1 - gbar))) / (1 - gbar) iterations to an eps-optimal policy (PAPER, convergence).

    Args:
        gbar (`float`):
            E[gamma^tau], at least 0 and below 1.
        eps (`float`, *optional*, defaults to `0.1`):
            How far from the optimum.
        most (`float`, *optional*, defaults to `1.0`):
            R_max, the largest reward of a decision.

    Raises:
        `ValueError`: for a `gbar` out of its range.
    """
    if not 0 <= gbar < 1:
        raise ValueError(f"`gbar` is {gbar}; it must be at least 0 and below 1.")
    return max(0.0, math.log(most / (eps * (1 - gbar)))) / (1 - gbar)


def effective_horizon(texts: Sequence[tuple[int, Sequence[int]]], gamma: float) -> EffectiveHorizon:
    """Of latents in several texts.

    Args:
        texts (`Sequence[tuple[int, Sequence[int]]]`):
            Of each its lines, and those before which latents stand, as [`durations`] takes them.
        gamma (`float`):
            Discount of a line; above 0 and below 1.

    Raises:
        `ValueError`: for a `gamma` out of its range, or texts without any line.
    """
    if not 0 < gamma < 1:
        raise ValueError(f"`gamma` is {gamma}; it must be above 0 and below 1.")
    lasting = [tau for lines, starts in texts for tau in durations(lines, starts)]
    alone = sum(starts[0] if starts else lines for lines, starts in texts)  # lines before the first latent
    if not lasting and not alone:
        raise ValueError("there is no line in the texts; give some that have.")
    gbar = (sum(gamma**tau for tau in lasting) + alone * gamma) / (len(lasting) + alone)
    cut = sum(bool(starts) for _, starts in texts)
    return EffectiveHorizon(
        sum(lasting) / len(lasting) if lasting else None, gbar,
        iteration_bound(gbar, most=(1 - gbar) / (1 - gamma)), iteration_bound(gamma),
        len(lasting), cut / len(lasting) if lasting else 0.0,
    )  # fmt: skip
