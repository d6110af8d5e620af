"""What has to be run and scored after a latent: the same plan for every engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..records import Document


@dataclass(frozen=True)
class BranchPlan:
    """Lists the forced tokens after a latent at one boundary and the log-probs wanted from them.

    Slots count from the first token after the latent. The main chain is closure and expert lines; where the think
    prefix of a later boundary parts from the expert's tokens, its first tokens hang on the chain as a side run, seen
    by nobody else.

    Closure `[4]`, line `[5, 6]` and think prefix `[7, 8]` give tokens `[4, 5, 7]`, of which 7 sees 4 only, and four
    wanted log-probs: 5 and 7 after 4, 6 after 5, 8 after 7.

    >>> from ra3_trl.records import Action, Boundary
    >>> line = Action(0, start=1, end=3, boundary=Boundary(think=(7, 8), close=(4,)))
    >>> plan = plan_boundary(Document(0, 0, (1, 5, 6, 2), (line,), context=1), boundary=0, horizon=1)
    >>> plan.tokens.tolist(), plan.sees.tolist(), plan.run.tolist()
    ([4, 5, 7], [1, 2, 1], [0, 1, 2])
    >>> list(zip(plan.predictor.tolist(), plan.target.tolist(), plan.is_gate.tolist()))
    [(0, 5, False), (1, 6, False), (0, 7, True), (2, 8, True)]
    """

    document: Document
    index: int  # ordinal of the boundary's line in its text, by which noise is keyed
    start: int  # tokens of the document that the branch sees
    think: tuple[int, ...]  # think prefix, before the latent
    tokens: np.ndarray  # token ids to run, main chain first; the last token of the horizon predicts nothing wanted
    sees: np.ndarray  # each token sees the main slots below this one,
    run: np.ndarray  # and of its own run the slots from this one up to itself
    predictor: np.ndarray  # slot that each wanted log-prob is predicted from
    target: np.ndarray  # token id whose log-prob is wanted
    line: np.ndarray  # line of the horizon it belongs to
    is_gate: np.ndarray  # whether it is of that line's think prefix, or of the line itself
    lines: int  # lines of the horizon that there are
    undecided: tuple[int, ...]  # those of them that no gate stands before


def horizon_lines(document: Document, boundary: int, horizon: int) -> int:
    """Counts the lines that a latent at `boundary` is scored by: at most `horizon`, up to the end or a kept comment.

    A kept comment is a new latent, so the one before it serves no longer.
    """
    lines = 0
    while (
        lines < horizon and boundary + lines < len(document.actions) and not document.actions[boundary + lines].comment
    ):
        lines += 1
    return lines


def gate_targets(
    think: tuple[int, ...], slot: int, following: tuple[int, ...], free: int
) -> tuple[list[tuple[int, int]], tuple[int, ...]]:
    """Pairs each token of a think prefix that is predicted from `slot` with its predictor's slot; and gives the side
    run that this needs.

    `following` are the expert's tokens from slot `slot + 1` on; `free` is the slot a side run would start at.

    >>> gate_targets((7, 8), slot=0, following=(7, 5), free=9)  # the expert's tokens begin as the prefix does
    ([(0, 7), (1, 8)], ())
    >>> gate_targets((7, 8), slot=0, following=(5, 6), free=9)
    ([(0, 7), (9, 8)], (7,))
    """
    if following[: len(think) - 1] == think[:-1]:
        return [(slot + i, token) for i, token in enumerate(think)], ()
    return [(slot, think[0])] + [(free + i, token) for i, token in enumerate(think[1:])], think[:-1]


def plan_boundary(document: Document, boundary: int, horizon: int) -> BranchPlan:
    """Plans a latent before action `boundary`, scored over `horizon` lines."""
    action = document.actions[boundary]
    count = horizon_lines(document, boundary, horizon)
    chain = [*action.close]
    for later in document.actions[boundary : boundary + count]:
        chain += document.input_ids[later.start : later.end]
    fed = chain[:-1]  # nothing is predicted from the last token
    tokens, sees, run = list(fed), list(range(1, len(fed) + 1)), list(range(len(fed)))
    wanted: list[tuple[int, int, int, bool]] = []
    slot, undecided = len(action.close) - 1, []  # `slot` predicts the first token of the line at hand, and its gate
    for k, later in enumerate(document.actions[boundary : boundary + count]):
        length = later.end - later.start
        wanted += [(slot + i, chain[slot + 1 + i], k, False) for i in range(length)]
        if not later.decides:
            undecided.append(k)
        else:
            following = tuple(fed[slot + 1 :])
            pairs, side = gate_targets(later.think, slot, following, len(tokens))
            wanted += [(predictor, target, k, True) for predictor, target in pairs]
            run += [len(tokens)] * len(side)
            sees += [slot + 1] * len(side)
            tokens += side
        slot += length
    predictor, target, line, is_gate = (np.array(column) for column in zip(*wanted, strict=True))
    arrays = (np.array(tokens), np.array(sees), np.array(run), predictor, target, line, is_gate)
    opening = (document, action.index, action.start, action.think)
    return BranchPlan(*opening, *arrays, lines=count, undecided=tuple(undecided))


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
