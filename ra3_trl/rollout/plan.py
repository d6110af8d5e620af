"""What has to be run and scored after a latent: the same plan for every engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..records import Boundary, Document


@dataclass(frozen=True)
class BranchPlan:
    """The forced tokens after a latent at one boundary and the log-probs wanted from them.

    Slots count from the first token after the latent. The main chain is closure and expert lines; where the think
    prefix of a later boundary parts from the expert's tokens, its first tokens hang on the chain as a side run, seen
    by nobody else: token `i` sees the main slots below `sees[i]` and its own run from `run[i]` on.

    Example: closure `[c]`, line `[a, b]`, prefix `[x, y]` gives tokens `[c, a, x]`, with `x` seeing `c` only, and four
    wanted log-probs: `a` and `x` after `c`, `b` after `a`, `y` after `x`.
    """

    start: int
    think: tuple[int, ...]
    tokens: np.ndarray
    sees: np.ndarray
    run: np.ndarray
    predictor: np.ndarray
    target: np.ndarray
    line: np.ndarray
    is_gate: np.ndarray
    lines: int
    undecided: tuple[int, ...]


def horizon_lines(document: Document, boundary: int, horizon: int) -> int:
    """Number of lines that count for a latent at `boundary`: at most `horizon`, up to the end or a kept comment.

    A kept comment is a new latent, so the one before it serves no longer.
    """
    lines = 0
    while (
        lines < horizon and boundary + lines < len(document.actions) and not document.actions[boundary + lines].comment
    ):
        lines += 1
    return lines


def gate_targets(
    boundary: Boundary, slot: int, following: tuple[int, ...], free: int
) -> tuple[list[tuple[int, int]], tuple[int, ...]]:
    """(predictor slot, target) of each think token at a boundary predicted from `slot`, and the side run it needs.

    `following` are the expert's tokens from slot `slot + 1` on; `free` is the slot a side run would start at.
    """
    think = boundary.think
    if following[: len(think) - 1] == think[:-1]:
        return [(slot + i, token) for i, token in enumerate(think)], ()
    return [(slot, think[0])] + [(free + i, token) for i, token in enumerate(think[1:])], think[:-1]


def plan_boundary(document: Document, boundary: int, horizon: int) -> BranchPlan:
    """The [`BranchPlan`] of a latent before action `boundary`, scored over `horizon` lines."""
    action = document.actions[boundary]
    count = horizon_lines(document, boundary, horizon)
    chain = [*action.boundary.close]
    for later in document.actions[boundary : boundary + count]:
        chain += document.input_ids[later.start : later.end]
    fed = chain[:-1]  # nothing is predicted from the last token
    tokens, sees, run = list(fed), list(range(1, len(fed) + 1)), list(range(len(fed)))
    wanted: list[tuple[int, int, int, bool]] = []
    slot, undecided = len(action.boundary.close) - 1, []
    for k, later in enumerate(document.actions[boundary : boundary + count]):
        length = later.end - later.start
        wanted += [(slot + i, chain[slot + 1 + i], k, False) for i in range(length)]
        if not later.decides:
            undecided.append(k)
        else:
            following = tuple(fed[slot + 1 :])
            pairs, side = gate_targets(later.boundary, slot, following, len(tokens))
            wanted += [(predictor, target, k, True) for predictor, target in pairs]
            run += [len(tokens)] * len(side)
            sees += [slot + 1] * len(side)
            tokens += side
        slot += length
    predictor, target, line, is_gate = (np.array(column) for column in zip(*wanted, strict=True))
    arrays = (np.array(tokens), np.array(sees), np.array(run), predictor, target, line, is_gate)
    return BranchPlan(action.start, action.boundary.think, *arrays, lines=count, undecided=tuple(undecided))


def collect_scores(
    plans: Sequence[BranchPlan],
    logps_n: torch.Tensor,
    line_n: np.ndarray,
    gate_n: np.ndarray,
    num_latents: int,
    horizon: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums log-probs into `[T, G, H]`: of lines, and of think prefixes (`-inf` where no decision is taken)."""
    shape = (len(plans) // num_latents, num_latents, horizon)
    lines, gates = torch.zeros(len(plans) * horizon), torch.zeros(len(plans) * horizon)
    index, is_gate = torch.as_tensor(line_n), torch.as_tensor(gate_n)
    lines.index_add_(0, index[~is_gate], logps_n[~is_gate].float())
    gates.index_add_(0, index[is_gate], logps_n[is_gate].float())
    for m, plan in enumerate(plans):
        for k in (*plan.undecided, *range(plan.lines, horizon)):
            gates[m * horizon + k] = float("-inf")
    return lines.view(shape), gates.view(shape)
