"""The expand engine: every branch repeats its prefix. Slow, transparent, right for any model that can generate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..records import Document, Latent, PolicyLogProbs, RolloutGroup
from .engine import Flight, MakeFlight, Piece, RolloutEngine, gate_tokens, of_pieces
from .noise import NoiseKey
from .plan import BranchPlan, collect_scores
from .sampler import Draw, LatentDistribution, check_finite, draw, fed_tokens, ids_of_bits


@dataclass
class _KeyedDraw(LogitsProcessor):
    """Makes `generate` emit the symbols that keyed noise picks, and keeps the draws."""

    distribution: LatentDistribution
    uniform: Callable[[int], np.ndarray]  # noise of a step
    draws: list[Draw] = field(default_factory=list)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = len(self.draws)
        uniform = torch.as_tensor(self.uniform(step), device=scores.device)
        state = self.draws[-1].state_n.clamp(min=0) if self.draws else input_ids.new_zeros(len(input_ids))
        self.draws.append(draw(self.distribution, scores.float().clone(), state, step, uniform))
        return torch.full_like(scores, float("-inf")).scatter(1, self.draws[-1].tokens_n[:, None], 0.0)


class ExpandEngine(RolloutEngine):
    """Runs every branch by itself; results as of [`BranchEngine`]."""

    name = "expand"

    def _repeated(self, start: int) -> int:
        return start

    def _run(self, documents: Sequence[Document]) -> tuple[list[RolloutGroup], MakeFlight]:
        return [self._trunk(document) for document in documents], partial(_Flight, self)

    def _trunk(self, document: Document) -> RolloutGroup:
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

    def gradients(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _read(
        self, heads: Sequence[tuple[int, ...]], latents: Sequence[Latent], through: nn.Module | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states `[M, longest, hidden_size]` of latents behind their heads, and those that predict a symbol."""
        hidden = self._hidden([(*head, *fed_tokens(z)) for head, z in zip(heads, latents, strict=True)], through)
        rows = np.repeat(np.arange(len(latents)), [len(z.logps) for z in latents])
        at = [len(head) - 1 + np.arange(len(z.logps)) for head, z in zip(heads, latents, strict=True)]
        return hidden, hidden[rows, np.concatenate(at)]

    def packed_log_probs(self, pieces: Sequence[Piece], through: nn.Module | None = None) -> list[PolicyLogProbs]:
        places = of_pieces(pieces)
        heads = [
            (*pieces[p][0].document.input_ids[: action.start], *action.think) for p, action, row in places for _ in row
        ]
        hidden, predictors = self._read(heads, [z for _, _, row in places for z in row], through)
        # A gate is read off the first of a boundary's rows.
        firsts = np.cumsum([0, *(len(row) for _, _, row in places)])[:-1]
        gates = [action.start - 1 + np.arange(len(gate_tokens(action))) for _, action, _ in places]
        gate_nD = hidden[np.repeat(firsts, [*map(len, gates)]), np.concatenate(gates)]
        return self._by_piece(pieces, gate_nD, predictors)


class _Flight(Flight):
    """Runs each branch in rows of its own."""

    def __init__(self, engine: ExpandEngine, plans: list[BranchPlan], documents: list[int], num_latents: int):
        super().__init__(plans, num_latents)
        self.engine = engine
        self.heads = [(*plan.document.input_ids[: plan.start], *plan.think) for plan in self.plans]

    def sample(self, noise: NoiseKey) -> list[tuple[Latent, ...]]:
        drawn: dict[int, Latent] = {}
        for batch in self.engine._batches(self.heads):
            keyed = _KeyedDraw(self.engine.distribution, partial(self.uniform, noise, branches=batch))
            drawn |= zip(batch.tolist(), self._generate([self.heads[m] for m in batch], keyed), strict=True)
        self.tokens = [list(drawn[m].token_ids) for m in range(len(self.plans))]
        firsts = range(0, len(self.plans), self.num_latents)
        return [tuple(drawn[m] for m in range(first, first + self.num_latents)) for first in firsts]

    def _generate(self, rows: Sequence[Sequence[int]], keyed: _KeyedDraw) -> list[Latent]:
        engine, stop = self.engine, self.engine.table.stop_id
        length = engine.params.max_length
        config = GenerationConfig(max_new_tokens=length, do_sample=False, eos_token_id=stop, pad_token_id=stop)
        # `generate` fills gaps of a config with the model's own: a repetition penalty there would bend the draw.
        causal_lm = engine.backbone.causal_lm
        models_own, causal_lm.generation_config = causal_lm.generation_config, GenerationConfig()
        processors = LogitsProcessorList([keyed])
        model: Any = engine.backbone.model  # of a PeftModel, `generate` is that of the model below
        try:
            model.generate(**engine._padded(rows, left=True), generation_config=config, logits_processor=processors)
        finally:
            causal_lm.generation_config = models_own
        symbols = torch.stack([d.tokens_n for d in keyed.draws], 1).tolist()
        symbol_logps = torch.stack([d.logps_n for d in keyed.draws], 1).tolist()
        sets = [None if d.kept is None else d.kept.cpu().numpy() for d in keyed.draws]
        latents = []
        for i, (row, logps) in enumerate(zip(symbols, symbol_logps, strict=True)):
            # A row that has stopped is drawn for as long as others go on: what comes then is of no latent.
            length = row.index(stop) if stop in row else len(row)
            stopped = length < len(row)
            kept = tuple(ids_of_bits(s[i]) for s in sets[: length + stopped] if s is not None)
            drawn_logps = tuple(logps[: length + stopped])
            check_finite(torch.tensor(drawn_logps))
            latents.append(
                Latent(tuple(row[:length]), stopped, drawn_logps, kept if engine.params.truncated else None)
            )
        return latents

    def score(self, horizon: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows: list[tuple[int, ...]] = []
        wanted: list[tuple[int, int, int, int, bool]] = []  # row, position, target after it, branch and line, a gate
        for m, (plan, head, tokens) in enumerate(zip(self.plans, self.heads, self.tokens, strict=True)):
            wanted += _branch_rows(rows, (*head, *tokens), plan, m * horizon)
        row, position, target, line, is_gate = (np.array(column) for column in zip(*wanted, strict=True))
        logps = self.engine._logps(rows, row, position, target)
        return collect_scores(self.plans, logps, line, is_gate, self.num_latents, horizon)

    def predictors(self, latents: list[Latent]) -> torch.Tensor:
        return self.engine._read(self.heads, latents)[1]


def _branch_rows(
    rows: list[tuple[int, ...]], head: tuple[int, ...], plan: BranchPlan, first_line: int
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
        wanted.append((row, len(head) + int(at), int(target), first_line + int(k), bool(is_gate)))
    return wanted
