"""The branch engine: one forward of the documents, then all branches together on their cache."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import nn

from ..records import Document, Latent, PolicyLogProbs, RolloutGroup
from .attention import BranchState, BranchTokens, branch_attention
from .engine import Flight, MakeFlight, Piece, RolloutEngine, different_latents, gate_tokens, of_pieces
from .noise import NoiseKey
from .plan import BranchPlan, collect_scores, gate_targets
from .sampler import check_finite, draw_from_hidden, fed_tokens, ids_of_bits


class BranchEngine(RolloutEngine):
    """Lets the branches of documents share their prefixes, see `attention.py`."""

    name = "branch"

    def _forward(
        self,
        state: BranchState,
        documents: Sequence[Sequence[int]],
        tokens: BranchTokens | None,
        through: nn.Module | None = None,
    ) -> torch.Tensor:
        """Hidden states `[tokens, hidden_size]` of documents' tokens followed by branch tokens."""
        positions = state.begin(tokens, [*map(len, documents)])
        ids = self._long([token for document in documents for token in document])
        row = ids if tokens is None else torch.cat([ids, tokens.token_n])
        return self.backbone.hidden(through, input_ids=row[None], position_ids=positions[None], ra3=state)[0]

    def _run(self, documents: Sequence[Document]) -> tuple[list[RolloutGroup], MakeFlight]:
        trunk = BranchState(self._long([]), (), 1, cached=True)
        ids = [document.input_ids for document in documents]
        hidden = self._forward(trunk, ids, None)
        layers = self.backbone.causal_lm.config.get_text_config().num_hidden_layers
        if trunk.layers != layers:  # any other way of mixing tokens would mix branches
            raise ValueError(f"only {trunk.layers} of {layers} layers are plain attention")
        lines, gates = self._own_tokens(documents, hidden)
        counts, empty = [len(document.actions) for document in documents], torch.zeros(0, 0, 0)
        groups = []
        for document, states, line_A, gate_A in zip(
            documents, hidden.split([*map(len, ids)]), lines.split(counts), gates.split(counts), strict=True
        ):
            at = self._long([document.actions[i].start - 1 for i in document.boundaries])
            groups.append(RolloutGroup(document, (), (), line_A, gate_A, empty, empty, states[at].float().cpu()))
        self._side_runs(groups, trunk)
        return groups, partial(_Flight, self, trunk)

    def _own_tokens(self, documents: Sequence[Document], hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of all documents' lines, and of think tokens as far as the documents' own tokens lead to them, one
        number an action each."""
        wanted: list[tuple[int, int, int, bool]] = []  # row, token after it, action, whether a gate
        first = number = 0
        for document in documents:
            for i, action in enumerate(document.actions):
                # Line by line, and not all between the first and the last: what stands between two (a latent, in an
                # annotated document) is of neither. The first token of a row is predicted by nothing.
                line = range(max(action.start, 1), action.end)
                wanted += [(first + at - 1, document.input_ids[at], number, False) for at in line]
                if action.decides:
                    wanted += [(first + at, token, number, True) for at, token in _led_to(document, i)[0]]
                number += 1
            first += len(document.input_ids)
        lines = torch.zeros(number)
        gates = torch.full_like(lines, float("-inf"))
        if wanted:
            row, target, owner, is_gate = (np.array(column) for column in zip(*wanted, strict=True))
            logps = self.backbone.token_logps(hidden[self._long(row)], self._long(target)).cpu()
            lines.index_add_(0, torch.as_tensor(owner[~is_gate]), logps[~is_gate])
            gates[owner[is_gate]] = 0.0
            gates.index_add_(0, torch.as_tensor(owner[is_gate]), logps[is_gate])
        return lines, gates

    def _side_runs(self, groups: Sequence[RolloutGroup], trunk: BranchState) -> None:
        """Adds to `log P(think)` the think tokens that the documents' own tokens do not lead to: they run as
        branches."""
        branched = [
            (d, i, group.document.actions[i])
            for d, group in enumerate(groups)
            for i in group.document.boundaries
            if group.document.actions[i].decides and _led_to(group.document, i)[1]
        ]
        if not branched:
            return
        thinks = [action.think for _, _, action in branched]
        prefix = self._long([action.start for _, _, action in branched])
        state = BranchState(prefix, [d for d, _, _ in branched], max(map(len, thinks)), True, trunk)
        behind = self._forward(state, (), self._chains([think[:-1] for think in thinks]))
        logps = self.backbone.token_logps(behind, self._long(np.concatenate([think[1:] for think in thinks]))).cpu()
        for (d, i, _), of_one in zip(branched, logps.split([len(think) - 1 for think in thinks]), strict=True):
            groups[d].gate_logps_A[i] += of_one.sum()

    def _chains(
        self, chains: Sequence[Sequence[int]], branches: np.ndarray | None = None, offsets: np.ndarray | None = None
    ) -> BranchTokens:
        """Tokens of `chains`, one a branch (all of them, or `branches`), from slot 0 or `offsets` on; each sees all of
        its branch before it."""
        lengths = [len(chain) for chain in chains]
        branch = np.repeat(np.arange(len(chains)) if branches is None else branches, lengths)
        first = np.zeros(len(chains), dtype=np.int64) if offsets is None else offsets
        slot = np.concatenate([o + np.arange(n) for o, n in zip(first, lengths, strict=True)])
        token = np.concatenate([np.asarray(chain, dtype=np.int64) for chain in chains])
        return BranchTokens(*map(self._long, (token, branch, slot, slot + 1, slot)))

    # ---- gradients: one packed forward [documents | branches], no cache ----

    def gradients(self) -> AbstractContextManager[None]:
        return branch_attention(self.backbone.causal_lm)

    def packed_log_probs(self, pieces: Sequence[Piece], through: nn.Module | None = None) -> list[PolicyLogProbs]:
        # Half of a group's latents may be the same: each different one runs once, and its log-probs stand for all.
        different = [different_latents(piece) for piece in pieces]
        once = self._packed([piece for piece, _ in different], through)
        return [_repeat(logps, *each) for logps, each in zip(once, different, strict=True)]

    def _packed(self, pieces: Sequence[Piece], through: nn.Module | None) -> list[PolicyLogProbs]:
        """Log-probs of pieces whose boundaries may have different numbers of latents."""
        places = of_pieces(pieces)
        opened = [(p, action, z) for p, action, row in places for z in row]  # one a branch
        chains = [(*action.think, *fed_tokens(z)) for _, action, z in opened]
        prefixes = [
            group.document.input_ids[
                : max(group.document.actions[boundary].start for boundary in group.boundaries[part])
            ]
            for group, part in pieces
        ]
        sees = self._long([action.start for _, action, _ in opened])
        state = BranchState(sees, [p for p, _, _ in opened], max(map(len, chains)), cached=False)
        with branch_attention(self.backbone.causal_lm):
            hidden = self._forward(state, prefixes, self._chains(chains), through)
        # Where each document and each branch begins in the row. A gate is read off the first of a boundary's branches,
        # its first token off the document; a latent's symbols from the last think token on.
        *begins, first = np.cumsum([0, *map(len, prefixes)]).tolist()
        starts = (first + np.cumsum([0, *map(len, chains)])[:-1]).tolist()
        firsts = np.cumsum([0, *(len(row) for _, _, row in places)])[:-1]
        gate_rows: list[int] = []
        for (p, action, _), m in zip(places, firsts, strict=True):
            gate_rows += [begins[p] + action.start - 1, *range(starts[m], starts[m] + len(gate_tokens(action)) - 1)]
        rows = [
            start + len(action.think) - 1 + np.arange(len(z.logps))
            for start, (_, action, z) in zip(starts, opened, strict=True)
        ]
        return self._by_piece(pieces, hidden[self._long(gate_rows)], hidden[self._long(np.concatenate(rows))])


def _repeat(logps: PolicyLogProbs, piece: Piece, which: list[int]) -> PolicyLogProbs:
    """Log-probs of the piece's branches `which`, in this order, where one may come several times."""
    counts = [len(z.logps) for row in piece[0].latents[piece[1]] for z in row]
    begins = np.cumsum([0, *counts])
    index = torch.as_tensor(np.concatenate([np.arange(begins[m], begins[m + 1]) for m in which]))
    branch = torch.as_tensor(np.repeat(np.arange(len(which)), [counts[m] for m in which]))
    device = logps.token_n.device
    return replace(logps, token_n=logps.token_n[index.to(device)], branch_n=branch.to(device))


def _led_to(document: Document, boundary: int) -> tuple[list[tuple[int, int]], tuple[int, ...]]:
    """Pairs the positions that predict tokens of a think prefix with these, where a document's own tokens lead there;
    and gives the side run that the others need, see [`gate_targets`]."""
    action, ids = document.actions[boundary], document.input_ids
    pairs, side_run = gate_targets(action.think, action.start - 1, ids[action.start :], len(ids))
    return (pairs[:1] if side_run else pairs), side_run


class _Flight(Flight):
    """Runs branches on their documents' cache.

    Sampling opens them once a boundary and feeds them token by token; scoring goes on in the same cache, or begins
    with the think prefixes where nothing was sampled.
    """

    def __init__(
        self, engine: BranchEngine, trunk: BranchState, plans: list[BranchPlan], documents: list[int], num_latents: int
    ):
        super().__init__(plans, num_latents)
        self.engine = engine
        slots = max(len(p.think) + len(p.tokens) for p in plans) + engine.params.max_length
        self.opening = BranchState(engine._long([p.start for p in plans]), documents, slots, True, trunk)
        self.state = self.opening.spread(num_latents)
        self.fed = np.zeros(len(self.plans), dtype=np.int64)  # tokens that each branch has run

    def _open(self) -> torch.Tensor:
        """Runs the think prefixes, once a boundary; hidden state behind each branch's."""
        thinks = [p.think for p in self.plans[:: self.num_latents]]
        lengths = np.array([len(think) for think in thinks])
        hidden = self.engine._forward(self.opening, (), self.engine._chains(thinks))
        self.state = self.opening.spread(self.num_latents)
        self.opening.drop_room()  # the branches' state has its own
        self.fed = np.repeat(lengths, self.num_latents)
        return hidden[self.engine._long(np.cumsum(lengths) - 1)].repeat_interleave(self.num_latents, 0)

    def predictors(self, latents: list[Latent]) -> torch.Tensor:
        engine, behind = self.engine, self._open()
        fed = [fed_tokens(z) for z in latents]
        hidden = behind[:0]
        some = np.flatnonzero([len(f) > 0 for f in fed])
        if len(some):
            tokens = engine._chains([fed[m] for m in some], some, self.fed[some])
            hidden = engine._forward(self.state, (), tokens)
        # A branch's symbols are predicted behind the prefix and behind its own tokens.
        rows = [torch.cat([b, h]) for b, h in zip(behind.split(1), hidden.split([*map(len, fed)]), strict=True)]
        return torch.cat([row[: len(z.logps)] for row, z in zip(rows, latents, strict=True)])

    def sample(self, noise: NoiseKey) -> list[tuple[Latent, ...]]:
        engine, count = self.engine, len(self.plans)
        logps: list[list[float]] = [[] for _ in range(count)]
        kept: list[list[torch.Tensor]] = [[] for _ in range(count)]
        stopped = np.zeros(count, dtype=bool)
        active = np.arange(count)  # branches that go on; `hidden` and `state` hold a row for each of them
        hidden = self._open()
        state = torch.zeros(count, dtype=torch.long, device=hidden.device)
        for step in range(engine.params.max_length):
            uniform = torch.as_tensor(self.uniform(noise, step, active), device=hidden.device)
            draw = draw_from_hidden(engine.backbone, engine.distribution, hidden, state, step, uniform)
            check_finite(draw.logps_n)
            token = draw.tokens_n.cpu().numpy()
            sets = None if draw.kept is None else draw.kept.cpu().numpy()
            goes_on = token != engine.table.stop_id
            for i, (m, logp) in enumerate(zip(active, draw.logps_n.tolist(), strict=True)):
                logps[m].append(logp)
                if sets is not None:
                    kept[m].append(ids_of_bits(sets[i]))
                if goes_on[i]:
                    self.tokens[m].append(int(token[i]))
            stopped[active[~goes_on]] = True
            active, token = active[goes_on], token[goes_on]
            state = draw.state_n[torch.as_tensor(goes_on, device=hidden.device)]
            if not len(active) or step + 1 == engine.params.max_length:
                break
            chains = engine._chains(token[:, None], active, self.fed[active])
            hidden = engine._forward(self.state, (), chains)
            self.fed[active] += 1
        columns = zip(self.tokens, stopped.tolist(), logps, kept, strict=True)
        drawn = [
            Latent(tuple(z), s, tuple(p), tuple(k) if engine.params.truncated else None) for z, s, p, k in columns
        ]
        return [tuple(drawn[i : i + self.num_latents]) for i in range(0, count, self.num_latents)]

    def score(self, horizon: int) -> tuple[torch.Tensor, torch.Tensor]:
        engine, branches, at = self.engine, [], 0
        for m, plan in enumerate(self.plans):
            chain = [*plan.think, *self.tokens[m]]
            fed, base = int(self.fed[m]), len(chain)
            # Sampling does not feed the last token of a latent that is cut; of given ones nothing has been fed.
            left, slot = np.array(chain[fed:], dtype=np.int64), np.arange(fed, base)
            run = (
                np.concatenate([left, plan.tokens]),
                np.full(len(left) + len(plan.tokens), m),
                np.concatenate([slot, base + np.arange(len(plan.tokens))]),
                np.concatenate([slot + 1, base + plan.sees]),
                np.concatenate([slot, base + plan.run]),
            )
            wanted = (at + len(left) + plan.predictor, plan.target, m * horizon + plan.line, plan.is_gate)
            branches.append((*run, *wanted))
            at += len(left) + len(plan.tokens)
        *tokens, rows, target, line, is_gate = (np.concatenate(column) for column in zip(*branches, strict=True))
        hidden = engine._forward(self.state, (), BranchTokens(*map(engine._long, tokens)))[engine._long(rows)]
        logps = engine.backbone.token_logps(hidden, engine._long(target)).cpu()
        return collect_scores(self.plans, logps, line, is_gate, self.num_latents, horizon)
