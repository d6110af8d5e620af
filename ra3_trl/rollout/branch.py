"""The branch engine: one forward of the document, then all branches together on its cache."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from ..records import Document, Latent, PolicyLogProbs, RolloutGroup, TokenTable
from .attention import BranchState, BranchTokens, branch_attention
from .backbone import Backbone
from .engine import Boundaries
from .noise import NoiseKey
from .plan import BranchPlan, collect_scores, gate_targets, plan_boundary
from .sampler import (
    LatentDistribution,
    SamplingParams,
    draw_from_hidden,
    fed_tokens,
    kept_sets,
    sampled_symbols,
    symbol_logps,
)


class BranchEngine:
    """Branches of a document share its prefix; see `attention.py`.

    Args:
        backbone ([`Backbone`]):
            The model.
        table ([`TokenTable`]):
            Facts of its vocabulary.
        params ([`SamplingParams`]):
            How latents are drawn.
        max_branch_tokens (`int`, *optional*, defaults to `8192`):
            Bound on branches in flight times their longest length. Any value gives the same result.
    """

    name = "branch"

    def __init__(self, backbone: Backbone, table: TokenTable, params: SamplingParams, max_branch_tokens: int = 8192):
        self.backbone = backbone
        self.table = table.to(backbone.device)
        self.distribution = LatentDistribution(self.table, params)
        self.params = params
        self.max_branch_tokens = max_branch_tokens
        self.score_seconds = 0.0

    # ---- no gradients: document, sampling, scoring ----

    @torch.no_grad()
    def trunk(self, document: Document) -> RolloutGroup:
        with branch_attention(self.backbone.causal_lm):
            return self._trunk(document)[0]

    @torch.no_grad()
    def rollout(
        self,
        document: Document,
        boundaries: Boundaries,
        num_latents: int,
        horizon: int,
        noise: NoiseKey,
        score: bool = True,
    ) -> RolloutGroup:
        with branch_attention(self.backbone.causal_lm):
            group, state = self._trunk(document)
            boundaries = boundaries(group) if callable(boundaries) else boundaries
            return self._in_flight(group, state, boundaries, None, num_latents, horizon, noise, score)

    @torch.no_grad()
    def score(
        self, document: Document, boundaries: Sequence[int], latents: Sequence[Sequence[Latent]], horizon: int
    ) -> RolloutGroup:
        with branch_attention(self.backbone.causal_lm):
            group, state = self._trunk(document)
            num_latents = len(latents[0]) if latents else 0
            return self._in_flight(group, state, boundaries, latents, num_latents, horizon, None, True)

    def _forward(self, state: BranchState, document: Sequence[int], tokens: BranchTokens | None) -> torch.Tensor:
        """Hidden states `[tokens, hidden_size]` of document tokens followed by branch tokens."""
        positions = state.begin(tokens, len(document))
        ids = self._long(document)
        row = ids if tokens is None else torch.cat([ids, tokens.token_n])
        return self.backbone.hidden(input_ids=row[None], position_ids=positions[None], ra3=state)[0]

    def _long(self, values: Sequence[int] | np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64), device=self.backbone.device)

    def _trunk(self, document: Document) -> tuple[RolloutGroup, BranchState]:
        state = BranchState(self._long([]), 1, cached=True)
        hidden = self._forward(state, document.input_ids, None)
        layers = self.backbone.causal_lm.config.get_text_config().num_hidden_layers
        if state.layers != layers:  # any other way of mixing tokens would mix branches
            raise ValueError(f"only {state.layers} of {layers} layers are plain attention")
        ids = document.input_ids
        lines = torch.zeros(len(document.actions), device=hidden.device)
        gates = torch.full_like(lines, float("-inf"))
        if document.actions:
            spans = [np.arange(max(a.start, 1), a.end) for a in document.actions]  # latents may stand in between
            at, owner = np.concatenate(spans), np.repeat(np.arange(len(spans)), [len(s) for s in spans])
            logps = self.backbone.token_logps(hidden[self._long(at - 1)], self._long(np.array(ids)[at]))
            lines.index_add_(0, self._long(owner), logps)
            self._gates(document, hidden, state, gates)
        empty = torch.zeros(0, 0, 0)
        states = hidden[self._long([document.actions[i].start - 1 for i in document.boundaries])].float().cpu()
        return RolloutGroup(document, (), (), lines.cpu(), gates.cpu(), empty, empty, states), state

    def _gates(self, document: Document, hidden: torch.Tensor, state: BranchState, gates_A: torch.Tensor) -> None:
        """Fills `log P(think)`; think tokens that the document's own tokens do not lead to run as branches."""
        rows, targets, owner, branches = [], [], [], []
        for i in document.boundaries:
            action = document.actions[i]
            if not action.decides:
                continue
            following = document.input_ids[action.start :]
            pairs, side = gate_targets(action.boundary, action.start - 1, following, len(document.input_ids))
            if side:
                pairs = pairs[:1]
                branches.append((i, action))
            rows += [row for row, _ in pairs]
            targets += [token for _, token in pairs]
            owner += [i] * len(pairs)
        if not rows:
            return
        gates_A[self._long(sorted(set(owner)))] = 0.0
        gates_A.index_add_(
            0, self._long(owner), self.backbone.token_logps(hidden[self._long(rows)], self._long(targets))
        )
        if branches:
            thinks = [a.boundary.think for _, a in branches]
            side = BranchState(self._long([a.start for _, a in branches]), max(map(len, thinks)), True, state)
            out = self._forward(side, (), _chains(self, [think[:-1] for think in thinks]))
            targets = self._long(np.concatenate([think[1:] for think in thinks]))
            owner = np.concatenate([[i] * (len(think) - 1) for (i, _), think in zip(branches, thinks, strict=True)])
            gates_A.index_add_(0, self._long(owner), self.backbone.token_logps(out, targets))

    @torch.no_grad()
    def latent_logps(
        self, document: Document, boundaries: Sequence[int], latents: Sequence[Sequence[Latent]], whole: bool = False
    ) -> torch.Tensor:
        found = torch.zeros(len(boundaries), len(latents[0]) if latents else 0)
        with branch_attention(self.backbone.causal_lm):
            _, state = self._trunk(document)
            plans = [plan_boundary(document, boundary, 1) for boundary in boundaries]
            for part in self._parts(plans, found.shape[1]):
                flight = _Flight(self, document, [plans[i] for i in part], found.shape[1], state)
                found[part] = flight.latent_logps([latents[i] for i in part], whole)
        return found

    def _parts(self, plans: Sequence[BranchPlan], num_latents: int) -> Iterator[list[int]]:
        """The boundaries in groups that fit `max_branch_tokens`, longest first."""
        length = [len(p.think) + self.params.max_length + len(p.tokens) for p in plans]
        order = sorted(range(len(plans)), key=lambda i: -length[i])
        while order:
            fit = max(1, self.max_branch_tokens // (length[order[0]] * max(num_latents, 1)))
            part, order = sorted(order[:fit]), order[fit:]
            yield part

    def _in_flight(self, group, state, boundaries, latents, num_latents, horizon, noise, score) -> RolloutGroup:
        """Handles the boundaries part by part and puts the parts together."""
        boundaries = tuple(boundaries)
        plans = [plan_boundary(group.document, boundary, horizon) for boundary in boundaries]
        drawn: list[list[Latent] | None] = [None] * len(boundaries)
        lines = torch.zeros(len(boundaries), num_latents, horizon)
        gates = torch.full_like(lines, float("-inf"))
        for part in self._parts(plans, num_latents):
            flight = _Flight(self, group.document, [plans[i] for i in part], num_latents, state)
            if latents is None:
                index = np.array([group.document.actions[boundaries[i]].index for i in part])
                found = flight.sample(noise, index)
            else:
                found = flight.take([latents[i] for i in part])
            for i, row in zip(part, found, strict=True):
                drawn[i] = row
            if score:
                begin = time.perf_counter()
                lines[part], gates[part] = flight.score(horizon)
                self.score_seconds += time.perf_counter() - begin
        return replace(
            group,
            boundaries=boundaries,
            latents=tuple(tuple(row) for row in drawn),
            latent_line_logps_TGH=lines,
            latent_gate_logps_TGH=gates,
        )

    # ---- gradients: one packed forward [document | branches], no cache ----

    def split(self, group: RolloutGroup) -> list[slice]:
        slices, begin, widest = [], 0, 0
        for t, (boundary, row) in enumerate(zip(group.boundaries, group.latents, strict=True)):
            length = len(group.document.actions[boundary].boundary.think) + max(len(z.token_ids) for z in row)
            if t > begin and (t + 1 - begin) * len(row) * max(widest, length) > self.max_branch_tokens:
                slices.append(slice(begin, t))
                begin, widest = t, 0
            widest = max(widest, length)
        return [*slices, slice(begin, len(group.boundaries))] if group.boundaries else []

    def gradients(self) -> AbstractContextManager[None]:
        return branch_attention(self.backbone.causal_lm)

    def log_probs(
        self, group: RolloutGroup, part: slice, through: nn.Module | None = None, entropy: bool = False
    ) -> PolicyLogProbs:
        document = group.document
        actions = [document.actions[boundary] for boundary in group.boundaries[part]]
        latents = [z for row in group.latents[part] for z in row]
        thinks = [a.boundary.think for a in actions for _ in range(group.num_latents)]
        chains = [(*think, *fed_tokens(z)) for think, z in zip(thinks, latents, strict=True)]
        tokens = _chains(self, chains)
        starts = [a.start for a in actions for _ in range(group.num_latents)]
        prefix = document.input_ids[: max(starts)]
        state = BranchState(self._long(starts), max(map(len, chains)), cached=False)
        row = torch.cat([self._long(prefix), tokens.token_n])
        with branch_attention(self.backbone.causal_lm):
            positions = state.begin(tokens, len(prefix))
            inputs = {"input_ids": row[None], "position_ids": positions[None], "ra3": state}
            hidden, router = self.backbone.hidden(through, **inputs)[0], self.backbone.router_loss
        first = len(prefix) + np.cumsum([0, *map(len, chains)])[:-1]
        gate_T = self._packed_gates(hidden, actions, first[:: max(group.num_latents, 1)])
        rows = np.concatenate(
            [f + len(think) - 1 + np.arange(len(z.logps)) for f, think, z in zip(first, thinks, latents, strict=True)]
        )
        targets, state_n, step_n, branch_n = (self._long(x) for x in sampled_symbols(latents, self.table))
        kept = kept_sets(latents) if self.params.truncated else None
        token_n, entropy_n = symbol_logps(
            self.backbone, self.distribution, hidden[self._long(rows)], targets, state_n, step_n, kept, entropy
        )
        return PolicyLogProbs(gate_T, token_n, branch_n, entropy_n, router)

    def _packed_gates(self, hidden: torch.Tensor, actions, first: np.ndarray) -> torch.Tensor:
        rows, targets, owner = [], [], []
        for t, (action, start) in enumerate(zip(actions, first, strict=True)):
            think = action.boundary.think if action.decides else action.boundary.think[:1]  # nobody wants to know
            rows += [action.start - 1, *range(start, start + len(think) - 1)]
            targets += think
            owner += [t] * len(think)
        logps = self.backbone.token_logps(hidden[self._long(rows)], self._long(targets))
        return logps.new_zeros(len(actions)).index_add(0, self._long(owner), logps)


def _chains(engine: BranchEngine, chains: Sequence[Sequence[int]], offset: np.ndarray | None = None) -> BranchTokens:
    """Branch `m` goes on with the tokens `chains[m]`, each seeing all before it, from slot `offset[m]` on."""
    lengths = np.array([len(c) for c in chains])
    offset = np.zeros(len(chains), dtype=np.int64) if offset is None else offset
    branch = np.repeat(np.arange(len(chains)), lengths)
    slot = np.concatenate([o + np.arange(n) for o, n in zip(offset, lengths, strict=True)])
    token = np.concatenate([np.asarray(c, dtype=np.int64) for c in chains])
    long = engine._long
    return BranchTokens(long(token), long(branch), long(slot), long(slot + 1), long(slot))


class _Flight:
    """Branches at some boundaries, from their think prefix to the scores, on one document's cache."""

    def __init__(
        self, engine: BranchEngine, document: Document, plans: list[BranchPlan], num_latents: int, trunk: BranchState
    ):
        self.engine = engine
        self.document = document
        self.num_latents = num_latents
        self.plans = [p for p in plans for _ in range(num_latents)]
        slots = max(len(p.think) + len(p.tokens) for p in plans) + engine.params.max_length
        self.opening = BranchState(engine._long([p.start for p in plans]), slots, True, trunk)
        self.state = BranchState(engine._long([p.start for p in self.plans]), slots, True, trunk)
        self.fed = np.zeros(len(self.plans), dtype=np.int64)
        self.tokens: list[list[int]] = [[] for _ in self.plans]

    def _feed(self, branches: np.ndarray, chains: Sequence[Sequence[int]]) -> torch.Tensor:
        """Runs more tokens of some branches; hidden state of the last token of each."""
        tokens = _chains(self.engine, chains, self.fed[branches])
        tokens.branch_n = self.engine._long(np.repeat(branches, [len(c) for c in chains]))
        hidden = self.engine._forward(self.state, (), tokens)
        self.fed[branches] += [len(c) for c in chains]
        return hidden[self.engine._long(np.cumsum([len(c) for c in chains]) - 1)]

    def _open(self) -> torch.Tensor:
        """Runs the think prefixes, once a boundary; hidden state behind each branch's."""
        thinks = [p.think for p in self.plans[:: self.num_latents]]
        hidden = self.engine._forward(self.opening, (), _chains(self.engine, thinks))
        self.state = self.opening.spread(self.num_latents)
        self.fed = np.repeat([len(think) for think in thinks], self.num_latents)
        last = self.engine._long(np.cumsum([len(think) for think in thinks]) - 1)
        return hidden[last].repeat_interleave(self.num_latents, 0)

    def latent_logps(self, latents: list[Sequence[Latent]], whole: bool) -> torch.Tensor:
        """Log-probs `[T, G]` of given latents, as this document's boundaries would draw them."""
        engine, flat = self.engine, [z for row in latents for z in row]
        behind = self._open()
        fed = [fed_tokens(z) for z in flat]
        some = np.flatnonzero([len(f) > 0 for f in fed])
        hidden = behind[:0]
        if len(some):
            tokens = _chains(engine, [fed[m] for m in some], self.fed[some])
            tokens.branch_n = engine._long(np.repeat(some, [len(fed[m]) for m in some]))
            hidden = engine._forward(self.state, (), tokens)
        begin = np.cumsum([0, *map(len, fed)])  # branch m's symbols are predicted behind the prefix and its own tokens
        rows = torch.cat(
            [
                torch.cat([behind[m : m + 1], hidden[begin[m] : begin[m + 1]]])[: len(z.logps)]
                for m, z in enumerate(flat)
            ]
        )
        symbols, states, steps, branches = (engine._long(x) for x in sampled_symbols(flat, engine.table))
        kept = kept_sets(flat) if engine.params.truncated and not whole else None
        logps, _ = symbol_logps(engine.backbone, engine.distribution, rows, symbols, states, steps, kept)
        total = logps.new_zeros(len(flat)).index_add(0, branches, logps)
        return total.view(-1, self.num_latents).float().cpu()

    def sample(self, noise: NoiseKey, index_T: np.ndarray) -> list[list[Latent]]:
        """`num_latents` latents a boundary; `index_T` are the ordinals of their lines, which key the noise."""
        engine, count = self.engine, len(self.plans)
        logps: list[list[float]] = [[] for _ in range(count)]
        kept: list[list[torch.Tensor]] = [[] for _ in range(count)]
        stopped = np.zeros(count, dtype=bool)
        active = np.arange(count)
        index, latent = np.repeat(index_T, self.num_latents), np.tile(np.arange(self.num_latents), len(index_T))
        hidden = self._open()
        state = torch.zeros(count, dtype=torch.long, device=hidden.device)
        for step in range(engine.params.max_length):
            u = noise.uniform(self.document.doc_id, index[active], latent[active], step)
            uniform = torch.as_tensor(u, device=hidden.device)
            drawn = draw_from_hidden(engine.backbone, engine.distribution, hidden, state, step, uniform)
            token = drawn.tokens_n.cpu().numpy()
            for i, (m, logp) in enumerate(zip(active, drawn.logps_n.tolist(), strict=True)):
                logps[m].append(logp)
                if drawn.kept is not None:
                    kept[m].append(drawn.kept[i].cpu())
            goes_on = token != engine.table.stop_id
            stopped[active[~goes_on]] = True
            active, token = active[goes_on], token[goes_on]
            state = drawn.state_n[torch.as_tensor(goes_on, device=hidden.device)]
            for m, t in zip(active, token, strict=True):
                self.tokens[m].append(int(t))
            if not len(active):
                break
            if step + 1 < engine.params.max_length:
                hidden = self._feed(active, token[:, None])
        truncated = engine.params.truncated
        found = [
            Latent(tuple(self.tokens[m]), bool(stopped[m]), tuple(logps[m]), tuple(kept[m]) if truncated else None)
            for m in range(count)
        ]
        return [found[i : i + self.num_latents] for i in range(0, count, self.num_latents)]

    def take(self, latents: list[Sequence[Latent]]) -> list[list[Latent]]:
        """Given latents instead of sampled ones; nothing is run yet."""
        self.tokens = [list(z.token_ids) for row in latents for z in row]
        return [list(row) for row in latents]

    def score(self, horizon: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Line and gate log-probs `[T, G, H]` of the lines after the latents, on the cache that sampling left."""
        parts: list[tuple[np.ndarray, ...]] = []
        rows, target, line, gate, at = [], [], [], [], 0
        for m, plan in enumerate(self.plans):
            chain = [*plan.think, *self.tokens[m]]
            fed, base = int(self.fed[m]), len(chain)
            left = np.array(chain[fed:], dtype=np.int64)
            slot = np.arange(fed, base)
            parts.append(
                (
                    np.concatenate([left, plan.tokens]),
                    np.full(len(left) + len(plan.tokens), m),
                    np.concatenate([slot, base + np.arange(len(plan.tokens))]),
                    np.concatenate([slot + 1, base + plan.sees]),
                    np.concatenate([slot, base + plan.run]),
                )
            )
            rows.append(at + len(left) + plan.predictor)
            target.append(plan.target)
            line.append(m * horizon + plan.line)
            gate.append(plan.is_gate)
            at += len(left) + len(plan.tokens)
        long = self.engine._long
        tokens = BranchTokens(*(long(np.concatenate(column)) for column in zip(*parts, strict=True)))
        hidden = self.engine._forward(self.state, (), tokens)
        logps = self.engine.backbone.token_logps(hidden[long(np.concatenate(rows))], long(np.concatenate(target)))
        return collect_scores(
            self.plans, logps.cpu(), np.concatenate(line), np.concatenate(gate), self.num_latents, horizon
        )
