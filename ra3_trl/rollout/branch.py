"""The branch engine: one forward of the documents, then all branches together on their cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from ..records import Document, Latent, PolicyLogProbs, RolloutGroup
from .attention import BranchState, branch_attention
from .decode import Decoding
from .engine import Flight, MakeFlight, Piece, RolloutEngine, different_latents, gate_tokens, of_pieces
from .forward import BranchTokens, Plan, chained, to_device
from .noise import NoiseKey
from .plan import BranchPlan, collect_scores
from .sampler import Draw, check_finite, draw_from_hidden, fed_tokens, ids_of_bits
from .trunk import Begun, Scored, SideRuns, summed, wanted_logps


_REMEMBERED = 4  # so many forwards of scoring are kept at most, for what may be placed
_CACHED = 16  # so many tokens that are only kept, by their keys and values, count as one that runs: they take less


def _cached_room(slots: int) -> float:
    """What a sampled branch of so many kept tokens counts for; a decoding step runs one."""
    return max(1.0, slots / _CACHED)


def most_cached(max_branch_tokens: int, max_length: int) -> int:
    """Bounds the tokens whose keys and values sampling keeps, for latents of `max_length` behind one think token.

    >>> most_cached(8192, 12), most_cached(8192, 16)  # 8,192 branches of 13 tokens, 7,710 of 17
    (106496, 131070)
    """
    return int(max_branch_tokens / _cached_room(max_length + 1)) * (max_length + 1)


class BranchEngine(RolloutEngine):
    """Lets the branches of documents share their prefixes, see `attention.py`."""

    name = "branch"
    _memory: dict[tuple[int, int], Begun] | None = None  # by document and chunk

    @property
    def fixed_shapes(self) -> bool:
        """Whether decoding steps keep their shapes and ask the device for nothing, as accelerators want."""
        return self.backbone.device.type != "cpu"

    def _room(self, plan: BranchPlan, num_latents: int, sampling: bool) -> float:
        if not sampling:
            return super()._room(plan, num_latents, sampling)
        slots = len(plan.think) + self.params.max_length
        if self.params.truncated:  # sets are kept until all are drawn, a bit a symbol of the vocabulary
            return slots
        # A decoding step runs one token a branch and keeps keys and values only; think prefixes run once a boundary.
        return max(_cached_room(slots), len(plan.think) / max(num_latents, 1))

    def _forward(
        self,
        state: BranchState,
        plan: Plan,
        arrays: Sequence[torch.Tensor],
        through: nn.Module | None = None,
    ) -> torch.Tensor:
        """Hidden states `[tokens, hidden_size]` of a planned forward, whose arrays are on the device."""
        ids, positions = state.begin(plan, arrays)
        return self.backbone.hidden(through, input_ids=ids[None], position_ids=positions[None], ra3=state)[0]

    def _run(self, documents: Sequence[Document]) -> tuple[list[RolloutGroup], MakeFlight]:
        """Runs documents, and behind them the think tokens that their own tokens do not lead to, as branches; one copy
        to the device and one back. What they begin with is not run anew where it is remembered."""
        begun = [self._begun(document) for document in documents]
        trunk = BranchState(np.zeros(0), (), 1, cached=True)
        trunk.begun = [(b.trunk, b.number, b.tokens) for b in begun] if any(b.tokens for b in begun) else []
        rest = [document.input_ids[b.tokens :] for document, b in zip(documents, begun, strict=True)]
        plan, wanted = trunk.plan(None, rest, self.fixed_shapes), wanted_logps(documents, begun)
        side = SideRuns(documents, trunk, begun)
        at = [
            first - b.tokens + document.actions[i].start - 1
            for first, document, b in zip(np.cumsum([0, *map(len, rest)]), documents, begun, strict=False)
            for i in document.boundaries
            if i >= b.actions
        ]
        further = (wanted[:, 0], wanted[:, 1], np.array(at))
        groups = to_device(self.backbone.device, plan.arrays, further, side.arrays)
        hidden = self._forward(trunk, plan, groups[0])
        trunk.begun = []  # what was before is let go
        layers = self.backbone.causal_lm.config.get_text_config().num_hidden_layers
        if trunk.layers != layers:  # any other way of mixing tokens would mix branches
            raise ValueError(f"only {trunk.layers} of {layers} layers are plain attention")
        row, target, state_row = groups[1]
        found = [self.backbone.token_logps(hidden[row], target)] if len(wanted) else []
        if side.state is not None and side.plan is not None:
            *arrays, targets = groups[2]
            found.append(self.backbone.token_logps(self._forward(side.state, side.plan, arrays), targets))
        states_SD = hidden[state_row].float()
        read = torch.cat([*(logps.float() for logps in found), states_SD.flatten()]).cpu()
        logps, of_side, states = read.split([len(wanted), side.count, states_SD.numel()])
        lines, gates = summed(documents, wanted, logps)
        side.add(gates, of_side)
        made = self._groups(documents, begun, (lines, gates, states.view_as(states_SD)))
        if self._memory is not None:
            self._memory |= {(g.document.doc_id, g.document.chunk): Begun(g, trunk, d) for d, g in enumerate(made)}
        return made, partial(_Flight, self, trunk)

    def _begun(self, document: Document) -> Begun:
        """What is remembered of the document."""
        before = None if self._memory is None else self._memory.get((document.doc_id, document.chunk))
        return Begun() if before is None else before.of(document)

    @contextmanager
    def remembering(self) -> Iterator[None]:
        self._memory = {}
        try:
            yield
        finally:
            self._memory = None

    def forget(self, document: Document) -> None:
        if self._memory is not None:
            self._memory.pop((document.doc_id, document.chunk), None)

    def _groups(
        self, documents: Sequence[Document], begun: Sequence[Begun], scores: tuple[torch.Tensor, ...]
    ) -> list[RolloutGroup]:
        """Groups without boundaries, of all documents' lines, gates and states."""
        counts, empty = [len(document.actions) for document in documents], torch.zeros(0, 0, 0)
        fresh = [sum(i >= b.actions for i in doc.boundaries) for doc, b in zip(documents, begun, strict=True)]
        columns = (x.split(sizes) for x, sizes in zip(scores, (counts, counts, fresh), strict=True))
        return [
            b.completed(RolloutGroup(document, (), (), line_A, gate_A, empty, empty, of_one))
            for document, b, line_A, gate_A, of_one in zip(documents, begun, *columns, strict=True)
        ]

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
        sees = np.array([action.start for _, action, _ in opened])
        state = BranchState(sees, [p for p, _, _ in opened], max(map(len, chains)), cached=False)
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
        plan = state.plan(chained(chains), prefixes)
        arrays, wanted = to_device(self.backbone.device, plan.arrays, (np.array(gate_rows), np.concatenate(rows)))
        with branch_attention(self.backbone.causal_lm):
            hidden = self._forward(state, plan, arrays, through)
        return self._by_piece(pieces, hidden[wanted[0]], hidden[wanted[1]])


def _repeat(logps: PolicyLogProbs, piece: Piece, which: list[int]) -> PolicyLogProbs:
    """Log-probs of the piece's branches `which`, in this order, where one may come several times."""
    counts = [len(z.logps) for row in piece[0].latents[piece[1]] for z in row]
    begins = np.cumsum([0, *counts])
    index = torch.as_tensor(np.concatenate([np.arange(begins[m], begins[m + 1]) for m in which]))
    branch = torch.as_tensor(np.repeat(np.arange(len(which)), [counts[m] for m in which]))
    device = logps.token_n.device
    return replace(logps, token_n=logps.token_n[index.to(device)], branch_n=branch.to(device))


class _Flight(Flight):
    """Runs branches on their documents' cache.

    Sampling opens them once a boundary and feeds them token by token; scoring goes on with the keys and values that
    this leaves, or begins with the think prefixes where nothing was sampled.
    """

    def __init__(
        self, engine: BranchEngine, trunk: BranchState, plans: list[BranchPlan], documents: list[int], num_latents: int
    ):
        super().__init__(plans, num_latents)
        self.engine = engine
        self.trunk = trunk
        self.opened_plans, self.documents = plans, documents
        self.think = np.repeat([len(plan.think) for plan in plans], num_latents)
        self.fed = np.zeros(len(self.plans), dtype=np.int64)  # tokens that each branch has run
        self.kept: Decoding | None = None

    def _open(self, longest: int, count: int) -> tuple[BranchState, torch.Tensor]:
        """Runs the think prefixes, once a boundary; a state with `count` branches for each and room for `longest`
        latent tokens, and the hidden state behind each one's prefix."""
        thinks = [plan.think for plan in self.opened_plans]
        lengths = np.array([len(think) for think in thinks])
        prefix = np.array([plan.start for plan in self.opened_plans])
        opening = BranchState(prefix, self.documents, int(lengths.max()), True, self.trunk)
        plan = opening.plan(chained(thinks))
        last = np.repeat(np.cumsum(lengths) - 1, count)
        arrays, (rows,) = to_device(self.engine.backbone.device, plan.arrays, [last])
        hidden = self.engine._forward(opening, plan, arrays)[rows]
        self.fed = self.think.copy()
        return opening.spread(count, int(lengths.max()) + longest), hidden

    def predictors(self, latents: list[Latent]) -> torch.Tensor:
        engine, fed = self.engine, [fed_tokens(z) for z in latents]
        state, behind = self._open(max(map(len, fed), default=0), self.num_latents)
        hidden = behind[:0]
        some = np.flatnonzero([len(f) > 0 for f in fed])
        if len(some):
            plan = state.plan(chained([fed[m] for m in some], some, self.fed[some]))
            hidden = engine._forward(state, plan, to_device(engine.backbone.device, plan.arrays)[0])
        # A branch's symbols are predicted behind the prefix and behind its own tokens.
        rows = [torch.cat([b, h]) for b, h in zip(behind.split(1), hidden.split([*map(len, fed)]), strict=True)]
        return torch.cat([row[: len(z.logps)] for row, z in zip(rows, latents, strict=True)])

    def sample(self, noise: NoiseKey) -> list[tuple[Latent, ...]]:
        """Draws latents. Those of a boundary share a row as long as they are the same, and leave when they have
        stopped. With fixed shapes each has a row to the end, and what is drawn behind a stop is left out: to know who
        has stopped is to wait."""
        engine, count, most = self.engine, len(self.plans), self.engine.params.max_length
        device, fixed = engine.backbone.device, engine.fixed_shapes
        each = self.num_latents if fixed else 1  # rows that a boundary begins with
        branches = np.arange(count)
        uniform_KM = torch.as_tensor(self.uniform(noise, np.arange(most)[:, None], branches), device=device)
        opened, hidden = self._open(most - 1, each)
        think = self.think[:: self.num_latents // each]
        rows = self.kept = Decoding(opened, think, branches // (self.num_latents // each), fixed, device)
        state = torch.zeros(count, dtype=torch.long, device=device)
        drawn: list[tuple[np.ndarray, Draw]] = []  # branches, and what was drawn for each
        for step in range(most):
            uniform, row = uniform_KM[step], None
            if not fixed:
                uniform, row = uniform[torch.from_numpy(branches)], rows.row[branches]
            draw = draw_from_hidden(engine.backbone, engine.distribution, hidden, state, step, uniform, row)
            drawn.append((branches, draw))
            if step + 1 == most:
                break
            token, state = draw.tokens_n, draw.state_n.clamp(min=0)
            if not fixed:
                going = token.numpy() != engine.table.stop_id
                branches, state = branches[going], state[torch.from_numpy(going)]
                if not len(branches):
                    break
                token = torch.from_numpy(rows.follow(branches, token.numpy()[going]))
            positions = rows.begin(step)
            hidden = engine.backbone.hidden(input_ids=token[None], position_ids=positions[None], ra3=rows)[0]
        latents = _read(drawn, count, engine.table.stop_id, engine.params.truncated)
        self.tokens = [list(z.token_ids) for z in latents]
        self.fed = self.think + np.minimum([len(tokens) for tokens in self.tokens], most - 1)
        return [tuple(latents[i : i + self.num_latents]) for i in range(0, count, self.num_latents)]

    def score(self, horizon: int) -> tuple[torch.Tensor, torch.Tensor]:
        # Equal latents of a boundary run once: those of a policy that knows what to say are often equal.
        numbers: dict[tuple[int, ...], int] = {}
        same = np.array([numbers.setdefault((m // self.num_latents, *z), m) for m, z in enumerate(self.tokens)])
        different = np.flatnonzero(same == np.arange(len(same)))
        engine, device = self.engine, self.engine.backbone.device
        parts = [self._scoring(part, horizon) for part in self._scored_together(different)]
        arrays = to_device(device, *(part.arrays for part in parts))
        logps, sampled = [], None if self.kept is None else self.kept.opened
        ran: list[tuple[BranchState, torch.Tensor]] = []
        room = 0 if engine._memory is None else _REMEMBERED * engine.max_branch_tokens
        for part, (held, row, target, first, *planned) in zip(parts, arrays, strict=True):
            state = part.state.holding(sampled, held)
            hidden = engine._forward(state, part.plan, planned)
            logps.append(engine.backbone.token_logps(hidden[row], target))
            room -= len(part.branches) * state.slots
            if room >= 0:
                ran.append((state, hidden[first].float()))
        line, is_gate = (np.concatenate([vars(part)[name] for part in parts]) for name in ("line", "is_gate"))
        found = collect_scores(self.plans, torch.cat(logps).cpu(), line, is_gate, self.num_latents, horizon)
        lines, gates = (x.flatten(0, 1)[torch.from_numpy(same)].view(x.shape) for x in found)
        for part, (state, states) in zip(parts, ran, strict=False):
            self._remember(part.branches, state, states.cpu(), lines.flatten(0, 1), gates.flatten(0, 1))
        return lines, gates

    def _remember(
        self, branches: np.ndarray, state: BranchState, states: torch.Tensor, lines: torch.Tensor, gates: torch.Tensor
    ) -> None:
        """Keeps what scored branches have run, for texts in which one of their latents is placed."""
        assert self.engine._memory is not None
        plans = [self.plans[m] for m in branches]
        of_one = states.split([plan.lines for plan in plans])
        _, begins = np.unique([self.documents[m // self.num_latents] for m in branches], return_index=True)
        for a, b in pairwise([*begins.tolist(), len(plans)]):
            document = plans[a].document
            begun = self.engine._memory.get((document.doc_id, document.chunk))
            if begun is None or begun.group is None or begun.group.document is not document:
                continue  # what latents are drawn from need not be the text
            for i, m in enumerate(branches[a:b].tolist(), a):
                plan = self.plans[m]
                last = np.flatnonzero(~plan.is_gate)[-1]  # of what is wanted of lines, the last token's
                chain = plan.tokens[: plan.predictor[last] + 1].tolist()  # without side runs, which stand behind
                run = (plan.start, (*plan.think, *self.tokens[m], *chain), int(plan.target[last]), plan.lines)
                begun.branches.append(Scored(state.own, i, *run, lines[m], gates[m], of_one[i]))

    def _scored_together(self, branches: np.ndarray) -> list[np.ndarray]:
        """Cuts branches into parts whose forwards fit, those with most to run first, so that equals are together."""
        latent = np.array([len(tokens) for tokens in self.tokens])
        length = self.think + latent + np.array([len(plan.tokens) for plan in self.plans])
        order, parts = branches[np.argsort(-length[branches], kind="stable")], []
        while len(order):
            fit = max(1, self.engine.max_branch_tokens // int(length[order[0]]))
            parts.append(np.sort(order[:fit]))
            order = order[fit:]
        return parts

    def _scoring(self, branches: np.ndarray, horizon: int) -> _Scoring:
        """Plans the scoring forward of some branches."""
        columns, slots, at = [], 0, 0
        for i, m in enumerate(branches):
            plan, chain = self.plans[m], [*self.plans[m].think, *self.tokens[m]]
            fed, base = int(self.fed[m]), len(chain)
            # Sampling does not feed the last token of a latent that is cut; of given ones nothing has been fed.
            left, slot = np.array(chain[fed:], dtype=np.int64), np.arange(fed, base)
            run = (
                np.concatenate([left, plan.tokens]),
                np.full(len(left) + len(plan.tokens), i),
                np.concatenate([slot, base + np.arange(len(plan.tokens))]),
                np.concatenate([slot + 1, base + plan.sees]),
                np.concatenate([slot, base + plan.run]),
            )
            predictor = at + len(left) + plan.predictor
            of_lines = np.flatnonzero(~plan.is_gate)
            first = predictor[of_lines[np.unique(plan.line[of_lines], return_index=True)[1]]]
            columns.append((*run, predictor, plan.target, first, m * horizon + plan.line, plan.is_gate))
            at += len(left) + len(plan.tokens)
            slots = max(slots, base + len(plan.tokens))
        *tokens, row, target, first, line, is_gate = (np.concatenate(column) for column in zip(*columns, strict=True))
        document = [self.documents[m // self.num_latents] for m in branches]
        state = BranchState(np.array([self.plans[m].start for m in branches]), document, slots, True, self.trunk)
        held = np.arange(len(branches)) if self.kept is None else self.kept.row[branches]
        plan = state.plan(BranchTokens(*tokens))
        return _Scoring(branches, state, plan, [held, row, target, first, *plan.arrays], line, is_gate)


@dataclass
class _Scoring:
    """Plans one scoring forward; `arrays`: where its branches' cache is, the rows and targets wanted, the rows that
    predict lines' first tokens, its plan's."""

    branches: np.ndarray
    state: BranchState
    plan: Plan
    arrays: list[np.ndarray]
    line: np.ndarray
    is_gate: np.ndarray


def _read(drawn: Sequence[tuple[np.ndarray, Draw]], count: int, stop_id: int, truncated: bool) -> list[Latent]:
    """Reads latents of all steps' draws in one copy: symbols, and log-probs bit for bit. What was drawn for a branch
    behind its stop is left out."""
    symbols = torch.cat([draw.tokens_n.int() for _, draw in drawn])
    bits = torch.cat([draw.logps_n.float() for _, draw in drawn]).view(torch.int32)
    both = torch.cat([symbols, bits]).cpu().numpy()
    token_n, logps_n = both[: len(symbols)], both[len(symbols) :].view(np.float32)
    sets = torch.cat([draw.kept for _, draw in drawn if draw.kept is not None]).cpu().numpy() if truncated else None
    tokens: list[list[int]] = [[] for _ in range(count)]
    logps: list[list[float]] = [[] for _ in range(count)]
    kept: list[list[torch.Tensor]] = [[] for _ in range(count)]
    stopped, n = np.zeros(count, dtype=bool), 0
    for branches, _ in drawn:
        for m in branches:
            if not stopped[m]:
                logps[m].append(float(logps_n[n]))
                if sets is not None:
                    kept[m].append(ids_of_bits(sets[n]))
                if token_n[n] == stop_id:
                    stopped[m] = True
                else:
                    tokens[m].append(int(token_n[n]))
            n += 1
    check_finite(torch.tensor([logp for of_one in logps for logp in of_one]))
    columns = zip(tokens, stopped.tolist(), logps, kept, strict=True)
    return [Latent(tuple(z), s, tuple(p), tuple(k) if truncated else None) for z, s, p, k in columns]
