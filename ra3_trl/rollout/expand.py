"""The expand engine: every branch repeats its prefix. Slow, transparent, right for any model that can generate."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..records import Document, Latent, PolicyLogProbs, RolloutGroup, TokenTable
from .backbone import Backbone
from .engine import Boundaries
from .noise import NoiseKey
from .plan import BranchPlan, collect_scores, plan_boundary
from .sampler import LatentDistribution, SamplingParams, draw, fed_tokens, kept_sets, sampled_symbols, symbol_logps


class _KeyedDraw(LogitsProcessor):
    """Makes `generate` emit the symbols that keyed noise picks, and keeps their log-probs."""

    def __init__(
        self, distribution: LatentDistribution, noise: NoiseKey, doc_id: int, index: np.ndarray, latent: np.ndarray
    ):
        self.distribution, self.noise, self.doc_id = distribution, noise, doc_id
        self.index, self.latent = index, latent
        self.state = torch.zeros(len(index), dtype=torch.long)
        self.symbols: list[np.ndarray] = []
        self.logps: list[np.ndarray] = []
        self.kept: list[tuple[torch.Tensor, ...] | None] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = len(self.symbols)
        u = torch.as_tensor(self.noise.uniform(self.doc_id, self.index, self.latent, step), device=scores.device)
        self.state = self.state.to(scores.device)
        drawn = draw(self.distribution, scores.float(), self.state, step, u)
        self.state = drawn.state_n.clamp(min=0)
        self.symbols.append(drawn.tokens_n.cpu().numpy())
        self.logps.append(drawn.logps_n.cpu().numpy())
        self.kept.append(drawn.kept)
        return torch.full_like(scores, float("-inf")).scatter(1, drawn.tokens_n[:, None], 0.0)


class ExpandEngine:
    """Same arguments and results as [`BranchEngine`]."""

    name = "expand"

    def __init__(self, backbone: Backbone, table: TokenTable, params: SamplingParams, max_branch_tokens: int = 8192):
        self.backbone = backbone
        self.table = table.to(backbone.device)
        self.distribution = LatentDistribution(self.table, params)
        self.params = params
        self.max_branch_tokens = max_branch_tokens
        self.score_seconds = 0.0

    @torch.no_grad()
    def trunk(self, document: Document) -> RolloutGroup:
        ids = document.input_ids
        rows, wanted = [ids], []
        lines = torch.zeros(len(document.actions))
        gates = torch.full_like(lines, float("-inf"))
        for i, action in enumerate(document.actions):
            wanted += [(0, p - 1, ids[p], i, False) for p in range(max(action.start, 1), action.end)]
        for i in document.boundaries:
            action = document.actions[i]
            if not action.decides:
                continue
            think, gates[i] = action.boundary.think, 0.0
            rows.append((*ids[: action.start], *think[:-1]))
            wanted += [(len(rows) - 1, action.start - 1 + j, token, i, True) for j, token in enumerate(think)]
        if wanted:
            row, position, target, owner, gate = (np.array(c) for c in zip(*wanted, strict=True))
            logps = self._logps(rows, row, position, target).cpu()
            owner, gate = torch.as_tensor(owner), torch.as_tensor(gate)
            lines.index_add_(0, owner[~gate], logps[~gate])
            gates.index_add_(0, owner[gate], logps[gate])
        empty = torch.zeros(0, 0, 0)
        at = [document.actions[i].start - 1 for i in document.boundaries]
        states = self._hidden([ids])[0, at].float().cpu()
        return RolloutGroup(document, (), (), lines, gates, empty, empty, states)

    def _hidden(self, rows: Sequence[Sequence[int]], through: nn.Module | None = None) -> torch.Tensor:
        """Hidden states `[rows, longest, hidden_size]` of right-padded rows, each seen alone."""
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, r in enumerate(rows):
            ids[i, : len(r)] = torch.as_tensor(r)
            mask[i, : len(r)] = 1
        device = self.backbone.device
        return self.backbone.hidden(through, input_ids=ids.to(device), attention_mask=mask.to(device))

    def _batches(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        order = np.argsort([-len(r) for r in rows], kind="stable")
        batches, begin = [], 0
        while begin < len(order):
            fit = max(1, self.max_branch_tokens // len(rows[order[begin]]))
            batches.append(order[begin : begin + fit])
            begin += fit
        return batches

    def _logps(self, rows, row_n: np.ndarray, position_n: np.ndarray, target_n: np.ndarray) -> torch.Tensor:
        """Log-prob of `target` after `position` of `row`, for each of `n` wanted numbers."""
        out = torch.zeros(len(row_n), device=self.backbone.device)
        for batch in self._batches(rows):
            where = np.flatnonzero(np.isin(row_n, batch))
            local = {int(r): i for i, r in enumerate(batch)}
            hidden = self._hidden([rows[r] for r in batch])
            picked = hidden[[local[int(r)] for r in row_n[where]], position_n[where]]
            target = torch.as_tensor(target_n[where], device=out.device)
            out[torch.as_tensor(where, device=out.device)] = self.backbone.token_logps(picked, target)
        return out

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
        boundaries = boundaries(self.trunk(document)) if callable(boundaries) else boundaries
        actions = [document.actions[s] for s in boundaries for _ in range(num_latents)]
        rows = [(*document.input_ids[: a.start], *a.boundary.think) for a in actions]
        index = np.array([a.index for a in actions])
        latent = np.tile(np.arange(num_latents), len(boundaries))
        drawn: list[Latent | None] = [None] * len(rows)
        for batch in self._batches(rows):
            found = self._generate([rows[r] for r in batch], document.doc_id, index[batch], latent[batch], noise)
            for r, z in zip(batch, found, strict=True):
                drawn[r] = z
        latents = [drawn[i : i + num_latents] for i in range(0, len(drawn), num_latents)]
        if score:
            return self.score(document, boundaries, latents, horizon)
        empty = torch.zeros(len(latents), num_latents, horizon)
        group = self.trunk(document)
        return replace(
            group, boundaries=tuple(boundaries), latents=tuple(map(tuple, latents)),
            latent_line_logps_TGH=empty, latent_gate_logps_TGH=empty - torch.inf,
        )  # fmt: skip

    def _generate(self, rows, doc_id: int, index: np.ndarray, latent: np.ndarray, noise: NoiseKey) -> list[Latent]:
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, r in enumerate(rows):
            ids[i, width - len(r) :] = torch.as_tensor(r)
            mask[i, width - len(r) :] = 1
        keyed = _KeyedDraw(self.distribution, noise, doc_id, index, latent)
        stop = self.table.stop_id
        config = GenerationConfig(
            max_new_tokens=self.params.max_length, do_sample=False, eos_token_id=stop, pad_token_id=stop
        )
        # `generate` fills gaps of a config with the model's own: a repetition penalty there would bend the draw.
        causal_lm = self.backbone.causal_lm
        theirs, causal_lm.generation_config = causal_lm.generation_config, GenerationConfig()
        try:
            self.backbone.model.generate(
                input_ids=ids.to(self.backbone.device),
                attention_mask=mask.to(self.backbone.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([keyed]),
            )
        finally:
            causal_lm.generation_config = theirs
        latents = []
        for i in range(len(rows)):
            symbols = [int(s[i]) for s in keyed.symbols]
            length = symbols.index(stop) if stop in symbols else len(symbols)
            stopped = length < len(symbols)
            logps = tuple(float(s[i]) for s in keyed.logps[: length + stopped])
            kept = tuple(k[i].cpu() for k in keyed.kept[: len(logps)]) if self.params.truncated else None
            latents.append(Latent(tuple(symbols[:length]), stopped, logps, kept))
        return latents

    @torch.no_grad()
    def score(
        self, document: Document, boundaries: Sequence[int], latents: Sequence[Sequence[Latent]], horizon: int
    ) -> RolloutGroup:
        begin = time.perf_counter()
        group = self.trunk(document)
        num_latents = len(latents[0]) if latents else 0
        plans = [plan_boundary(document, boundary, horizon) for boundary in boundaries for _ in range(num_latents)]
        rows, wanted = [], []
        for m, (plan, latent) in enumerate(zip(plans, (z for row in latents for z in row), strict=True)):
            head = (*document.input_ids[: plan.start], *plan.think, *latent.token_ids)
            wanted += [(*w, m * horizon + k, gate) for w, k, gate in _branch_rows(rows, head, plan)]
        if wanted:
            row, position, target, line, gate = (np.array(c) for c in zip(*wanted, strict=True))
            logps = self._logps(rows, row, position, target).cpu()
            lines, gates = collect_scores(plans, logps, line, gate, num_latents, horizon)
        else:
            lines = gates = torch.zeros(len(boundaries), num_latents, horizon)
        self.score_seconds += time.perf_counter() - begin
        return replace(
            group, boundaries=tuple(boundaries), latents=tuple(map(tuple, latents)),
            latent_line_logps_TGH=lines, latent_gate_logps_TGH=gates,
        )  # fmt: skip

    @torch.no_grad()
    def latent_logps(
        self, document: Document, boundaries: Sequence[int], latents: Sequence[Sequence[Latent]], whole: bool = False
    ) -> torch.Tensor:
        none, empty = torch.zeros(len(document.actions)), torch.zeros(len(boundaries), len(latents[0]), 0)
        group = RolloutGroup(document, tuple(boundaries), tuple(map(tuple, latents)), none, none, empty, empty)
        rows = []
        for part in self.split(group):
            found = self._log_probs(group, part, whole=whole)
            total = found.token_n.new_zeros(len(latents[part]) * group.num_latents)
            rows.append(total.index_add(0, found.branch_n, found.token_n).view(-1, group.num_latents).float().cpu())
        return torch.cat(rows)

    def split(self, group: RolloutGroup) -> list[slice]:
        actions = [group.document.actions[boundary] for boundary in group.boundaries]
        longest = max((a.start + len(a.boundary.think) for a in actions), default=0) + self.params.max_length
        fit = max(1, self.max_branch_tokens // (longest * max(group.num_latents, 1)))
        return [slice(i, min(i + fit, len(group.boundaries))) for i in range(0, len(group.boundaries), fit)]

    def gradients(self) -> AbstractContextManager[None]:
        return nullcontext()

    def log_probs(
        self, group: RolloutGroup, part: slice, through: nn.Module | None = None, entropy: bool = False
    ) -> PolicyLogProbs:
        return self._log_probs(group, part, through, entropy)

    def _log_probs(
        self,
        group: RolloutGroup,
        part: slice,
        through: nn.Module | None = None,
        entropy: bool = False,
        whole: bool = False,
    ) -> PolicyLogProbs:
        ids = group.document.input_ids
        actions = [group.document.actions[boundary] for boundary in group.boundaries[part]]
        latents = [z for row in group.latents[part] for z in row]
        heads = [(*ids[: a.start], *a.boundary.think) for a in actions for _ in range(group.num_latents)]
        hidden = self._hidden([(*head, *fed_tokens(z)) for head, z in zip(heads, latents, strict=True)], through)
        rows, positions, targets, owner = [], [], [], []
        for t, action in enumerate(actions):
            think = action.boundary.think if action.decides else action.boundary.think[:1]  # nobody wants to know
            for j, token in enumerate(think):
                rows.append(t * group.num_latents)
                positions.append(action.start - 1 + j)
                targets.append(token)
                owner.append(t)
        router = self.backbone.router_loss
        owner, targets = (torch.as_tensor(x, device=hidden.device) for x in (owner, targets))
        logps = self.backbone.token_logps(hidden[rows, positions], targets)
        gate_T = logps.new_zeros(len(actions)).index_add(0, owner, logps)
        symbols, states, steps, branches = (
            torch.as_tensor(x, device=hidden.device) for x in sampled_symbols(latents, self.table)
        )
        at = torch.as_tensor([len(h) for h in heads], device=hidden.device)[branches] - 1 + steps
        kept = kept_sets(latents) if self.params.truncated and not whole else None
        token_n, entropy_n = symbol_logps(
            self.backbone, self.distribution, hidden[branches, at], symbols, states, steps, kept, entropy
        )
        return PolicyLogProbs(gate_T, token_n, branches, entropy_n, router)


def _branch_rows(rows: list, head: tuple[int, ...], plan: BranchPlan) -> list[tuple[tuple[int, int, int], int, bool]]:
    """Appends the full rows of one branch (main chain, then one row per side run) and lists what is wanted of them."""
    is_main = plan.sees == np.arange(1, len(plan.tokens) + 1)
    main = len(rows)
    rows.append((*head, *plan.tokens[is_main].tolist()))
    side_row: dict[int, int] = {}
    for slot in np.flatnonzero(~is_main):
        begin = int(plan.run[slot])
        if begin not in side_row:
            own = plan.tokens[(~is_main) & (plan.run == begin)]
            side_row[begin] = len(rows)
            rows.append((*head, *plan.tokens[: plan.sees[slot]].tolist(), *own.tolist()))
    wanted = []
    for p, target, k, gate in zip(plan.predictor, plan.target, plan.line, plan.is_gate, strict=True):
        if is_main[p]:
            wanted.append(((main, len(head) + int(p), int(target)), int(k), bool(gate)))
        else:
            position = len(head) + int(plan.sees[p]) + int(p - plan.run[p])
            wanted.append(((side_row[int(plan.run[p])], position, int(target)), int(k), bool(gate)))
    return wanted
