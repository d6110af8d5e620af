"""What a latent rules out (PAPER, the theorem on regret: pruning must keep what the expert does)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Pruning:
    """What latents do to the lines that could come next, all without the mass of thinking (again).

    Args:
        removed (`float`):
            Mass of pi(. | s) on lines that a latent makes less likely by more than `factor`.
        removed_by_others (`float`):
            The same under latents of other boundaries: what any change of context does.
        expert_kept (`float`):
            Share of latents under which the expert's own line is not removed.
        expert_helped (`float`):
            Share of latents under which it is likelier.
        factor (`float`):
            How much less likely is ruled out. The paper's pruning drops actions altogether, which no finite change of
            probabilities does.
        boundaries, lines, latents (`int`):
            What the means are over.
    """

    removed: float
    removed_by_others: float
    expert_kept: float
    expert_helped: float
    factor: float
    boundaries: int
    lines: int
    latents: int


@dataclass(frozen=True)
class Alternatives:
    """Lines at one boundary, in nats: `act_K` and `expert` without a latent, `latent_GK` and `expert_G` under each
    latent, `other_GK` under those of another boundary. The K lines are draws of pi(. | s), so that a share of them is
    mass."""

    act_K: torch.Tensor
    latent_GK: torch.Tensor
    other_GK: torch.Tensor
    expert: float
    expert_G: torch.Tensor


def measure_pruning(found: list[Alternatives], factor: float = 10.0) -> Pruning | None:
    """Means over boundaries, each of which counts once; `None` if there is none.

    Args:
        found (`list[Alternatives]`):
            Lines at each boundary.
        factor (`float`, *optional*, defaults to `10.0`):
            See [`Pruning`].

    Raises:
        `ValueError`: for a factor that is not above 1.
    """
    if not factor > 1:
        raise ValueError(f"`factor` is {factor}; it must be above 1.")
    found = [one for one in found if one.latent_GK.numel()]
    if not found:
        return None
    edge = float(torch.tensor(factor).log())
    own = [one.expert_G - one.expert for one in found]

    def mean(shares: list[torch.Tensor]) -> float:
        return float(torch.stack([share.double().mean() for share in shares]).mean())

    return Pruning(
        mean([one.latent_GK - one.act_K < -edge for one in found]),
        mean([one.other_GK - one.act_K < -edge for one in found]),
        mean([ratio >= -edge for ratio in own]), mean([ratio > 0 for ratio in own]), factor, len(found),
        sum(one.latent_GK.shape[1] for one in found), sum(one.latent_GK.shape[0] for one in found),
    )  # fmt: skip
