"""What a latent rules out (PAPER, the theorem on regret: pruning must keep what the expert does)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Pruning:
    """Says what latents do to the lines that could come next, all without the mass of thinking (again)."""

    removed: float  # mass of pi(. | s) on lines that a latent makes less likely by more than `factor`
    removed_by_others: float  # the same under latents of other boundaries: what any change of context does
    expert_kept: float  # share of latents under which the expert's own line is not removed
    expert_helped: float  # share of latents under which it is likelier
    # How much less likely is ruled out. The paper's pruning drops actions altogether, which no finite change does.
    factor: float
    boundaries: int  # what the means are over
    lines: int
    latents: int


@dataclass(frozen=True)
class Alternatives:
    """Holds log-probs of lines at a boundary, in nats; the K lines are draws of pi(. | s): a share of them is mass."""

    act_K: torch.Tensor  # without a latent
    latent_GK: torch.Tensor  # under each latent
    other_GK: torch.Tensor  # under those of another boundary
    expert: float  # of the expert's own line, without a latent
    expert_G: torch.Tensor  # and under each


def measure_pruning(boundaries: list[Alternatives], factor: float = 10.0) -> Pruning | None:
    """Averages over boundaries, each of which counts once; `None` if there is none.

    >>> act, latent, other = torch.zeros(2), torch.tensor([[-3.0, 0.0]]), torch.zeros(1, 2)
    >>> lines = Alternatives(act, latent, other, expert=-2.0, expert_G=torch.tensor([-1.0]))
    >>> measure_pruning([lines]).removed  # one of the two lines is 20 times less likely under the latent
    0.5

    Raises:
        `ValueError`: for a `factor` of 1 or less.
    """
    if not factor > 1:
        raise ValueError(f"`factor` is {factor}; it must be above 1.")
    boundaries = [lines for lines in boundaries if lines.latent_GK.numel()]
    if not boundaries:
        return None
    edge = math.log(factor)
    gains = [lines.expert_G - lines.expert for lines in boundaries]

    def mean(shares: list[torch.Tensor]) -> float:
        return float(torch.stack([share.double().mean() for share in shares]).mean())

    return Pruning(
        removed=mean([lines.latent_GK - lines.act_K < -edge for lines in boundaries]),
        removed_by_others=mean([lines.other_GK - lines.act_K < -edge for lines in boundaries]),
        expert_kept=mean([gain >= -edge for gain in gains]),
        expert_helped=mean([gain > 0 for gain in gains]),
        factor=factor,
        boundaries=len(boundaries),
        lines=sum(lines.latent_GK.shape[1] for lines in boundaries),
        latents=sum(lines.latent_GK.shape[0] for lines in boundaries),
    )
