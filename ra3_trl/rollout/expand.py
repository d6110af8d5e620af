"""The expand engine: every branch repeats its prefix. Slow, transparent, right for any model that can generate."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..records import Document, Latent, RolloutGroup
from .engine import Boundaries, EngineBase, PolicyLogProbs, gate_tokens, unscored
from .noise import NoiseKey
from .plan import BranchPlan, collect_scores, plan_boundary
from .sampler import Draw, LatentDistribution, draw, fed_tokens


class _KeyedDraw(LogitsProcessor):
    """Makes `generate` emit the symbols that keyed noise picks, and keeps the draws."""

    def __init__(
        self, distribution: LatentDistribution, noise: NoiseKey, doc_id: int, index: np.ndarray, latent: np.ndarray
    ):
        self.distribution, self.noise, self.doc_id = distribution, noise, doc_id
        self.index, self.latent = index, latent
        self.draws: list[Draw] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = len(self.draws)
        uniform = torch.as_tensor(self.noise.uniform(self.doc_id, self.index, self.latent, step), device=scores.device)
        state = self.draws[-1].state_n.clamp(min=0) if self.draws else input_ids.new_zeros(len(input_ids))
        self.draws.append(draw(self.distribution, scores.float(), state, step, uniform))
        return torch.full_like(scores, float("-inf")).scatter(1, self.draws[-1].tokens_n[:, None], 0.0)


class ExpandEngine(EngineBase):
    """Runs every branch by itself; arguments as of [`EngineBase`], results as of [`BranchEngine`]."""

    name = "expand"

    @torch.no_grad()
    def trunk(self, document: Document) -> RolloutGroup:
        ids = document.input_ids
        rows: list[tuple[int, ...]] = [ids]
        wanted: list[tuple[int, int, int, int, bool]] = []  # row, position, target after it, action, whether a gate
        lines = torch.zeros(len(document.actions))
        gates = torch.full_like(lines, float("-inf"))
        for i, action in enumerate(document.actions):
            wanted += [(0, p - 1, ids[p], i, False) for p in range(max(action.start, 1), action.end)]
        for i in document.boundaries:
            action = document.actions[i]
            if action.decides:
                gates[i] = 0.0
                rows.append((*ids[: action.start], *action.think[:-1]))
                wanted += [
                    (len(rows) - 1, action.start - 1 + j, token, i, True) for j, token in enumerate(action.think)
                ]
        if wanted:
            row, position, target, owner, is_gate = (np.array(column) for column in zip(*wanted, strict=True))
            logps = self._logps(rows, row, position, target)
            lines.index_add_(0, torch.as_tensor(owner[~is_gate]), logps[~is_gate])
            gates.index_add_(0, torch.as_tensor(owner[is_gate]), logps[is_gate])
        empty = torch.zeros(0, 0, 0)
        at = [document.actions[i].start - 1 for i in document.boundaries]
        states = self._hidden([ids])[0, at].float().cpu()
        return RolloutGroup(document, (), (), lines, gates, empty, empty, states)

    def _padded(self, rows: Sequence[Sequence[int]], left: bool = False) -> dict[str, torch.Tensor]:
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            at = slice(width - len(row), width) if left else slice(len(row))
            ids[i, at], mask[i, at] = torch.as_tensor(row), 1
        return {"input_ids": ids.to(self.backbone.device), "attention_mask": mask.to(self.backbone.device)}

    def _hidden(self, rows: Sequence[Sequence[int]], through: nn.Module | None = None) -> torch.Tensor:
        """Hidden states `[rows, longest, hidden_size]` of right-padded rows, each seen alone."""
        return self.backbone.hidden(through, **self._padded(rows))

    def _batches(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Numbers of rows, longest first, as many as fit."""
        order = np.argsort([-len(row) for row in rows], kind="stable")
        batches, begin = [], 0
        while begin < len(order):
            fit = max(1, self.max_branch_tokens // len(rows[order[begin]]))
            batches.append(order[begin : begin + fit])
            begin += fit
        return batches

    def _logps(
        self, rows: Sequence[Sequence[int]], row_n: np.ndarray, position_n: np.ndarray, target_n: np.ndarray
    ) -> torch.Tensor:
        """Log-prob of `target` after `position` of `row`, for each of `n` wanted numbers."""
        logps_n = torch.zeros(len(row_n))
        for batch in self._batches(rows):
            where = np.flatnonzero(np.isin(row_n, batch))
            place = {int(row): i for i, row in enumerate(batch)}
            hidden = self._hidden([rows[row] for row in batch])
            picked = hidden[[place[int(row)] for row in row_n[where]], position_n[where]]
            logps_n[torch.as_tensor(where)] = self.backbone.token_logps(picked, self._long(target_n[where])).cpu()
        return logps_n

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
        trunk = self.trunk(document)
        boundaries = boundaries(trunk) if callable(boundaries) else boundaries
        actions = [document.actions[boundary] for boundary in boundaries for _ in range(num_latents)]
        rows = [(*document.input_ids[: action.start], *action.think) for action in actions]
        index = np.array([action.index for action in actions])
        latent = np.tile(np.arange(num_latents), len(boundaries))
        drawn: dict[int, Latent] = {}
        for batch in self._batches(rows):
            keyed = _KeyedDraw(self.distribution, noise, document.doc_id, index[batch], latent[batch])
            drawn |= zip(batch.tolist(), self._generate([rows[row] for row in batch], keyed), strict=True)
        latents = [
            tuple(drawn[m] for m in range(t * num_latents, (t + 1) * num_latents)) for t in range(len(boundaries))
        ]
        group = replace(unscored(trunk, boundaries, num_latents, horizon), latents=tuple(latents))
        return self._scored(group) if score else group

    def _generate(self, rows: Sequence[Sequence[int]], keyed: _KeyedDraw) -> list[Latent]:
        stop = self.table.stop_id
        config = GenerationConfig(
            max_new_tokens=self.params.max_length, do_sample=False, eos_token_id=stop, pad_token_id=stop
        )
        # `generate` fills gaps of a config with the model's own: a repetition penalty there would bend the draw.
        causal_lm = self.backbone.causal_lm
        models_own, causal_lm.generation_config = causal_lm.generation_config, GenerationConfig()
        processors = LogitsProcessorList([keyed])
        model: Any = self.backbone.model  # of a PeftModel, `generate` is that of the model below
        try:
            model.generate(**self._padded(rows, left=True), generation_config=config, logits_processor=processors)
        finally:
            causal_lm.generation_config = models_own
        symbols = torch.stack([d.tokens_n for d in keyed.draws], 1).tolist()
        symbol_logps = torch.stack([d.logps_n for d in keyed.draws], 1).tolist()
        latents = []
        for i, (row, logps) in enumerate(zip(symbols, symbol_logps, strict=True)):
            # A row that has stopped goes on to be drawn for while others do not: that is of no latent.
            length = row.index(stop) if stop in row else len(row)
            stopped = length < len(row)
            kept = [d.kept[i].cpu() for d in keyed.draws[: length + stopped] if d.kept is not None]
            logps = tuple(logps[: length + stopped])
            latents.append(Latent(tuple(row[:length]), stopped, logps, tuple(kept) if self.params.truncated else None))
        return latents

    @torch.no_grad()
    def score(
        self, document: Document, boundaries: Sequence[int], latents: Sequence[Sequence[Latent]], horizon: int
    ) -> RolloutGroup:
        group = unscored(self.trunk(document), boundaries, len(latents[0]) if latents else 0, horizon)
        return self._scored(replace(group, latents=tuple(map(tuple, latents))))

    def _scored(self, group: RolloutGroup) -> RolloutGroup:
        begin, ids = time.perf_counter(), group.document.input_ids
        _, num_latents, horizon = group.latent_line_logps_TGH.shape
        plans = [plan_boundary(group.document, at, horizon) for at in group.boundaries for _ in range(num_latents)]
        rows: list[tuple[int, ...]] = []
        wanted: list[tuple[int, int, int, int, bool]] = []  # row, position, target after it, branch and line, a gate
        for m, (plan, latent) in enumerate(zip(plans, (z for row in group.latents for z in row), strict=True)):
            head = (*ids[: plan.start], *plan.think, *latent.token_ids)
            wanted += [(r, p, t, m * horizon + k, gate) for r, p, t, k, gate in _branch_rows(rows, head, plan)]
        if wanted:
            row, position, target, line, is_gate = (np.array(column) for column in zip(*wanted, strict=True))
            logps = self._logps(rows, row, position, target)
            lines, gates = collect_scores(plans, logps, line, is_gate, num_latents, horizon)
            group = replace(group, latent_line_logps_TGH=lines, latent_gate_logps_TGH=gates)
        self.score_seconds += time.perf_counter() - begin
        return group

    @torch.no_grad()
    def latent_logps(
        self, document: Document, boundaries: Sequence[int], latents: Sequence[Sequence[Latent]], whole: bool = False
    ) -> torch.Tensor:
        none, empty = torch.zeros(len(document.actions)), torch.zeros(len(boundaries), len(latents[0]), 0)
        group = RolloutGroup(document, tuple(boundaries), tuple(map(tuple, latents)), none, none, empty, empty)
        rows = []
        for chunk in self.split(group):
            policy = self.log_probs(group, chunk, whole=whole)
            total = policy.token_n.new_zeros(len(latents[chunk]) * group.num_latents)
            rows.append(total.index_add(0, policy.branch_n, policy.token_n).view(-1, group.num_latents).float().cpu())
        return torch.cat(rows)

    def split(self, group: RolloutGroup) -> list[slice]:
        actions = [group.document.actions[boundary] for boundary in group.boundaries]
        longest = max((a.start + len(a.think) for a in actions), default=0) + self.params.max_length
        fit = max(1, self.max_branch_tokens // (longest * max(group.num_latents, 1)))
        return [slice(i, min(i + fit, len(actions))) for i in range(0, len(actions), fit)]

    def gradients(self) -> AbstractContextManager[None]:
        return nullcontext()

    def log_probs(
        self,
        group: RolloutGroup,
        chunk: slice,
        through: nn.Module | None = None,
        entropy: bool = False,
        whole: bool = False,
    ) -> PolicyLogProbs:
        """As of [`RolloutEngine`]; `whole` as of its `latent_logps`."""
        actions = [group.document.actions[boundary] for boundary in group.boundaries[chunk]]
        latents = [z for row in group.latents[chunk] for z in row]
        opened = [action for action in actions for _ in range(group.num_latents)]  # one a branch
        heads = [(*group.document.input_ids[: action.start], *action.think) for action in opened]
        hidden = self._hidden([(*head, *fed_tokens(z)) for head, z in zip(heads, latents, strict=True)], through)
        router = self.backbone.router_loss
        # A gate is read off the first of a boundary's rows.
        gate_rows = np.repeat(np.arange(len(actions)) * group.num_latents, [len(gate_tokens(a)) for a in actions])
        gate_at = np.concatenate([a.start - 1 + np.arange(len(gate_tokens(a))) for a in actions])
        symbol_rows = np.repeat(np.arange(len(latents)), [len(z.logps) for z in latents])
        symbol_at = [len(head) - 1 + np.arange(len(z.logps)) for head, z in zip(heads, latents, strict=True)]
        gate_T = self._gate_logps(actions, hidden[gate_rows, gate_at])
        predictors = hidden[symbol_rows, np.concatenate(symbol_at)]
        token_n, branch_n, entropy_n = self._symbol_logps(latents, predictors, whole, entropy)
        return PolicyLogProbs(gate_T, token_n, branch_n, entropy_n, router)


def _branch_rows(
    rows: list[tuple[int, ...]], head: tuple[int, ...], plan: BranchPlan
) -> list[tuple[int, int, int, int, bool]]:
    """Appends the full rows of one branch, main chain then side runs. Of each wanted log-prob: row, position,
    target after it, line, whether a gate."""
    is_main = plan.sees == np.arange(1, len(plan.tokens) + 1)
    main, side_rows = len(rows), dict[int, int]()
    rows.append((*head, *plan.tokens[is_main].tolist()))
    for slot in np.flatnonzero(~is_main):
        if (run := int(plan.run[slot])) not in side_rows:
            side_rows[run] = len(rows)
            side_run = plan.tokens[~is_main & (plan.run == run)]
            rows.append((*head, *plan.tokens[: plan.sees[slot]].tolist(), *side_run.tolist()))
    wanted = []
    for p, target, k, is_gate in zip(plan.predictor, plan.target, plan.line, plan.is_gate, strict=True):
        row, at = (main, p) if is_main[p] else (side_rows[int(plan.run[p])], plan.sees[p] + p - plan.run[p])
        wanted.append((row, len(head) + int(at), int(target), int(k), bool(is_gate)))
    return wanted
