"""What is wanted of documents as they stand: log-probs of their lines and gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ..records import Document, RolloutGroup
from .attention import BranchState, KeysValues
from .forward import Plan, chained
from .plan import gate_targets


def _led_to(document: Document, boundary: int) -> tuple[list[tuple[int, int]], tuple[int, ...]]:
    """Pairs the positions that predict tokens of a think prefix with these, where a document's own tokens lead there;
    and gives the side run that the others need, see [`gate_targets`]."""
    action, ids = document.actions[boundary], document.input_ids
    pairs, side_run = gate_targets(action.think, action.start - 1, ids[action.start :], len(ids))
    return (pairs[:1] if side_run else pairs), side_run


@dataclass(frozen=True)
class Scored:
    """Keeps what was run and found out behind a boundary: branch `number` of those whose keys and values these are has
    run `tokens` and scored `lines`."""

    own: dict[int, KeysValues]  # by layer
    number: int
    start: int  # tokens of the document that the branch sees
    tokens: tuple[int, ...]  # think prefix, latent, closure and lines, but for the last token
    target: int  # which that is
    lines: int
    line_logps_H: torch.Tensor
    gate_logps_H: torch.Tensor
    states_HD: torch.Tensor  # hidden states that predict the lines' first tokens

    def follows(self, document: Document, actions: int) -> bool:
        """Whether the document goes on as the branch does, whose first line is the one behind its first `actions`."""
        end = self.start + len(self.tokens)
        own = document.actions[actions : actions + self.lines]
        return (
            document.input_ids[self.start : end + 1] == (*self.tokens, self.target)
            and len(own) == self.lines
            and own[-1].end == end + 1
            and all(
                action.decides == bool(gate > -torch.inf) for action, gate in zip(own, self.gate_logps_H, strict=False)
            )
        )


class Joined:
    """Stands for a trunk whose document is another's up to a boundary and goes on as a branch there."""

    def __init__(self, trunk: BranchState, document: int, scored: Scored):
        self.trunk, self.document, self.scored = trunk, document, scored

    def keys_values(self, layer: int, number: int, tokens: int) -> list[KeysValues]:
        """As [`BranchState.keys_values`], of its one document."""
        at = self.scored
        past = self.trunk.keys_values(layer, self.document, min(tokens, at.start))
        k, v = (x[:, at.number, : max(tokens - at.start, 0)] for x in at.own[layer])
        return [*past, (k.to(past[0][0].dtype), v.to(past[0][1].dtype))]


@dataclass(frozen=True)
class Begun:
    """Says how a document begins as one that has been run: its first `actions` have their scores, its first `tokens`
    their keys and values. What was run behind its boundaries is kept: one of the latents may be placed."""

    group: RolloutGroup | None = None
    trunk: BranchState | Joined | None = None
    number: int = 0  # of the document in the trunk
    actions: int = 0
    tokens: int = 0
    branches: list[Scored] = field(default_factory=list)

    def of(self, document: Document) -> Begun:
        """What `document` has in common with that one. The token before what is scored anew is run once more, since
        that is predicted from it."""
        assert self.group is not None
        ids, before = document.input_ids, self.group.document
        same = next((i for i, (a, b) in enumerate(zip(ids, before.input_ids, strict=False)) if a != b), None)
        common = min(len(ids), len(before.input_ids)) if same is None else same
        actions = 0
        for one, other in zip(document.actions, before.actions, strict=False):
            if one != other or one.end > common:
                break
            actions += 1
        for scored in self.branches:
            placed = next((i for i, action in enumerate(before.actions) if action.start == scored.start), len(ids))
            if placed <= actions and scored.start <= common and scored.follows(document, placed):
                return self._behind(document, placed, scored)
        start = document.actions[actions].start if actions < len(document.actions) else len(ids)
        return replace(self, actions=actions, tokens=max(min(common, start) - 1, 0), branches=[])

    def _behind(self, document: Document, placed: int, scored: Scored) -> Begun:
        """The beginning of a document in which the latent of a scored branch is placed before action `placed`: the
        lines that were scored under it have been run too."""
        actions, group = placed + scored.lines, self.group
        assert group is not None and group.states_SD is not None and scored.states_HD is not None
        assert isinstance(self.trunk, BranchState)
        lines = document.actions[placed:actions]
        count = sum(action.boundary is not None for action in document.actions[:placed])
        states = scored.states_HD[[k for k, action in enumerate(lines) if action.boundary is not None]]
        known = replace(
            group,
            line_logps_A=torch.cat([group.line_logps_A[:placed], scored.line_logps_H[: scored.lines]]),
            gate_logps_A=torch.cat([group.gate_logps_A[:placed], scored.gate_logps_H[: scored.lines]]),
            states_SD=torch.cat([group.states_SD[:count], states]),
        )
        start = document.actions[actions].start if actions < len(document.actions) else len(document.input_ids)
        tokens = min(scored.start + len(scored.tokens), start - 1)
        return Begun(known, Joined(self.trunk, self.number, scored), 0, actions, tokens)

    def completed(self, group: RolloutGroup) -> RolloutGroup:
        """The group with the scores that were at hand."""
        if self.group is None or not self.actions:
            return group
        count = sum(action.boundary is not None for action in group.document.actions[: self.actions])
        assert self.group.states_SD is not None and group.states_SD is not None
        group.line_logps_A[: self.actions] = self.group.line_logps_A[: self.actions]
        group.gate_logps_A[: self.actions] = self.group.gate_logps_A[: self.actions]
        return replace(group, states_SD=torch.cat([self.group.states_SD[:count], group.states_SD]))


def wanted_logps(documents: Sequence[Document], begun: Sequence[Begun]) -> np.ndarray:
    """Lists the log-probs of all documents' lines, and of think tokens as far as the documents' own tokens lead to
    them, `[n, 4]`: row, token after it, number of the action, whether of a gate. What documents have `begun` with is
    left out, of rows too."""
    wanted: list[tuple[int, int, int, bool]] = []
    first = number = 0
    for document, done in zip(documents, begun, strict=True):
        first -= done.tokens
        number += done.actions
        for i, action in enumerate(document.actions[done.actions :], done.actions):
            # Line by line, and not all between the first and the last: what stands between two (a latent, in an
            # annotated document) is of neither. The first token of a row is predicted by nothing.
            line = range(max(action.start, 1), action.end)
            wanted += [(first + at - 1, document.input_ids[at], number, False) for at in line]
            if action.decides:
                wanted += [(first + at, token, number, True) for at, token in _led_to(document, i)[0]]
            number += 1
        first += len(document.input_ids)
    return np.array(wanted, dtype=np.int64).reshape(-1, 4)


def summed(
    documents: Sequence[Document], wanted: np.ndarray, logps_n: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums wanted log-probs by action, lines and gates."""
    lines = torch.zeros(sum(len(document.actions) for document in documents))
    gates = torch.full_like(lines, float("-inf"))
    owner, is_gate = torch.from_numpy(wanted[:, 2]), torch.from_numpy(wanted[:, 3] == 1)
    lines.index_add_(0, owner[~is_gate], logps_n[~is_gate])
    gates[owner[is_gate]] = 0.0
    gates.index_add_(0, owner[is_gate], logps_n[is_gate])
    return lines, gates


class SideRuns:
    """Think tokens that the documents' own tokens do not lead to: they run as branches, and add to `log P(think)`."""

    def __init__(self, documents: Sequence[Document], trunk: BranchState, begun: Sequence[Begun]):
        firsts = np.cumsum([0, *(len(document.actions) for document in documents)])
        branched = [
            (d, int(firsts[d]) + i, document.actions[i])
            for d, document in enumerate(documents)
            for i in document.boundaries
            if i >= begun[d].actions and document.actions[i].decides and _led_to(document, i)[1]
        ]
        thinks = [action.think for _, _, action in branched]
        self.numbers, self.counts = [number for _, number, _ in branched], [len(think) - 1 for think in thinks]
        self.state: BranchState | None = None
        self.plan: Plan | None = None
        self.arrays: list[np.ndarray] = []
        if branched:
            prefix = np.array([action.start for _, _, action in branched])
            self.state = BranchState(prefix, [d for d, _, _ in branched], max(map(len, thinks)), True, trunk)
            self.plan = self.state.plan(chained([think[:-1] for think in thinks]))
            self.arrays = [*self.plan.arrays, np.concatenate([think[1:] for think in thinks])]

    @property
    def count(self) -> int:
        return sum(self.counts)

    def add(self, gates: torch.Tensor, logps_n: torch.Tensor) -> None:
        """Adds the log-probs of these tokens to all documents' gates."""
        for number, of_one in zip(self.numbers, logps_n.split(self.counts), strict=True):
            gates[number] += of_one.sum()
