"""One attention function for branches that share documents.

A branch sees its document's tokens before its boundary and its own. Several documents go through one forward, so that
the layers around read their weights once for all of them. Registered with `transformers.AttentionInterface`, it is
reached through an extra keyword argument of the model, so no model code is patched and no [tokens, tokens] mask ever
exists: who sees whom is said by `ragged.py`, over the keys `[documents | branches]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import nn
from torch.nn.functional import pad
from transformers import AttentionInterface, PreTrainedModel

from . import ragged
from .forward import BranchTokens, Plan
from .fused import additive, attention_and_normaliser, causal, merged
from .ragged import Row, of_documents


NAME = "ra3_branch"
_OWN_KEYS = 1024  # most own keys in a block, unless one branch alone has more
_OF_A_BOUNDARY = 16  # tokens that a boundary must have, on average, for calls of its own on a CPU
KeysValues = tuple[torch.Tensor, torch.Tensor]  # `[kv_heads, tokens, D]` each, or `[kv_heads, M, slots, D]`


class Trunk(Protocol):
    """Keeps keys and values of documents."""

    def keys_values(self, layer: int, number: int, tokens: int) -> list[KeysValues]:
        """Of a document's first tokens, in pieces `[kv_heads, n, D]`: to join them all at once is one operation."""
        ...


@dataclass
class _Block:
    """Groups branches `first` to `last` (exclusive) for one call of fused attention to their own keys."""

    first: int
    last: int
    row_MS: torch.Tensor  # row of each query among the branch tokens, 0 where a branch has fewer
    visible_MSL: torch.Tensor  # which own slots each query sees
    masks: list[torch.Tensor] = field(default_factory=list)

    def mask(self, repeat: int, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask `[M, 1, repeat*S, L]` of each branch's own keys, made once for all layers."""
        if not self.masks:
            self.masks.append(additive(self.visible_MSL, dtype).repeat(1, repeat, 1)[:, None])
        return self.masks[0]


class BranchState:
    """Holds keys and values of documents and of the branches in flight, and what the current forward is.

    `prefix` are the document tokens that each branch sees, `document_M` the numbers of their documents, ascending
    (and the prefixes within a document); `slots` the most tokens of a branch. `cached` keeps keys and values from
    forward to forward (no gradients); without, there is one packed forward [documents | branches] with gradients. The
    documents' are those of another state, if given.
    """

    def __init__(
        self,
        prefix: np.ndarray,
        document_M: Sequence[int],
        slots: int,
        cached: bool,
        trunk: BranchState | None = None,
    ):
        self.prefix = np.asarray(prefix, dtype=np.int64)
        self.document_M = list(document_M)
        self.slots = slots
        self.cached = cached
        self.documents: dict[int, KeysValues] = trunk.documents if trunk else {}  # by layer, one after the other
        self.lengths: list[int] = trunk.lengths if trunk else []  # tokens of each document
        # Of each document of a forward: which has been run, in which state, and how many of its tokens stand for this
        # one's first.
        self.begun: list[tuple[Trunk | None, int, int]] = []
        self.own: dict[int, KeysValues] = {}  # by layer
        # Of each slot; think prefixes and latents follow the document, other tokens say where they stand.
        self._position = self.prefix[:, None] + np.arange(slots)
        # Of the present forward.
        self._plan: Plan | None = None
        self._tokens: tuple[torch.Tensor, ...] = ()  # branch and slot
        self._blocks: list[_Block] = []
        self._query_row: torch.Tensor | None = None
        self._out_row: torch.Tensor | None = None

    @property
    def layers(self) -> int:
        """Number of layers that attended to the documents through this state."""
        return len(self.documents)

    def spread(self, count: int, slots: int) -> BranchState:
        """Each branch `count` times, one after the other, with `slots` for its tokens and the keys and values that it
        has: what they have in common is run once."""
        branches = np.repeat(np.arange(len(self.prefix)), count)
        documents = [self.document_M[m] for m in branches]
        state = BranchState(self.prefix[branches], documents, slots, self.cached, self)
        for layer, (k, v) in self.own.items():
            state.own[layer] = (self._wide(k, slots).repeat_interleave(count, 1),
                                self._wide(v, slots).repeat_interleave(count, 1))  # fmt: skip
        return state

    def holding(self, other: BranchState | None, rows: torch.Tensor) -> BranchState:
        """This state with keys and values of another's branches; `rows` says on the device where they are."""
        state = copy(self)
        state.own = {
            layer: (self._wide(k[:, rows], self.slots), self._wide(v[:, rows], self.slots))
            for layer, (k, v) in (other.own if other else {}).items()
        }
        return state

    def _wide(self, x: torch.Tensor, slots: int) -> torch.Tensor:
        return pad(x, (0, 0, 0, slots - x.shape[2]))  # or narrow, where slots are fewer

    def plan(
        self, tokens: BranchTokens | None, documents: Sequence[Sequence[int]] = (), one_call: bool = False
    ) -> Plan:
        """Plans a forward of documents' tokens, those that they have not `begun` with, followed by `tokens`.
        `one_call`: documents alone may be attended to in one call, as accelerators want, and not one by one."""
        lengths = [len(document) for document in documents]
        firsts = [tokens for _, _, tokens in self.begun] or [0] * len(lengths)
        if lengths:
            self.lengths = [first + length for first, length in zip(firsts, lengths, strict=True)]
        ids = [token for document in documents for token in document]
        positions = [first + np.arange(length) for first, length in zip(firsts, lengths, strict=True)]
        arrays = [np.array(ids, dtype=np.int64), np.concatenate([*positions, np.zeros(0, dtype=np.int64)])]
        queries, keys = of_documents(lengths, firsts)
        if tokens is None:
            if self.cached:
                keys = of_documents(self.lengths, [0] * len(self.lengths))[1]
            row = Row.of(queries, keys) if one_call or not self.cached else None
            return Plan(lengths, None, arrays + (row.arrays if row else []), row)
        depth = np.where(tokens.sees > tokens.slot, tokens.slot, tokens.sees + tokens.slot - tokens.run)
        position = self.prefix[tokens.branch] + depth
        self._position[tokens.branch, tokens.slot] = position
        arrays = [np.concatenate(both) for both in zip(arrays, (tokens.token, position), strict=True)]
        document, owner = np.array(self.document_M)[tokens.branch], len(self.lengths) + tokens.branch
        of_tokens = (document, self.prefix[tokens.branch], owner, tokens.sees, tokens.run, tokens.slot, position)
        mine = np.stack([owner, tokens.slot, position])
        if self.cached:
            keys = of_documents(self.lengths, [0] * len(self.lengths))[1]
            owners = len(self.lengths) + np.arange(len(self.prefix))
            slot = np.broadcast_to(np.arange(self.slots), self._position.shape)
            mine = np.stack([np.repeat(owners, self.slots), slot.ravel(), self._position.ravel()])
        row = Row.of(np.hstack([queries, np.stack(of_tokens)]), np.hstack([keys, mine]))
        arrays += [*row.arrays, tokens.branch, tokens.slot]
        spans = self._boundaries(tokens) if self.cached else []
        if not spans:
            return Plan(lengths, tokens, arrays, row)
        blocks, rows = self._cut(tokens, int(tokens.slot.max()) + 1)
        at = np.concatenate([r.ravel() for r in rows])
        out_row = np.empty(len(tokens), dtype=np.int64)
        out_row[at[at >= 0]] = np.flatnonzero(at >= 0)
        return Plan(lengths, tokens, [*arrays, at.clip(0), out_row], row, blocks, spans)

    def _boundaries(self, tokens: BranchTokens) -> list[tuple[int, int, int, int]]:
        """Cuts tokens where the next boundary's begin; none where these are too few for calls of their own."""
        seen, document = self.prefix[tokens.branch], np.array(self.document_M)[tokens.branch]
        begins = np.flatnonzero((np.diff(seen, prepend=-1) != 0) | (np.diff(document, prepend=-1) != 0))
        if len(tokens) < _OF_A_BOUNDARY * len(begins) or not seen.all():
            return []
        ends = [*begins[1:].tolist(), len(tokens)]
        return list(zip(begins.tolist(), ends, document[begins].tolist(), seen[begins].tolist(), strict=True))

    def _cut(self, tokens: BranchTokens, slots: int) -> tuple[list[tuple[int, int, int]], list[np.ndarray]]:
        """Cuts the branches of a forward into blocks; of each the row of each query, -1 where a branch has fewer."""
        branches, begins = np.unique(tokens.branch, return_index=True)
        ids, bounds = branches.tolist(), [*begins.tolist(), len(tokens)]
        i, blocks, rows = 0, [], []
        while i < len(ids):
            most = max(1, min(64, _OWN_KEYS // slots, max(8, int(self.prefix[ids[i]]) // (2 * slots))))
            j = i + 1
            while j < len(ids) and ids[j] - ids[i] < most and self.document_M[ids[j]] == self.document_M[ids[i]]:
                j += 1
            first, last = ids[i], ids[j - 1] + 1
            row = np.full((last - first, max(b - a for a, b in pairwise(bounds[i : j + 1]))), -1)
            for m, a, b in zip(ids[i:j], bounds[i:j], bounds[i + 1 : j + 1], strict=True):
                row[m - first, : b - a] = np.arange(a, b)
            blocks.append((first, last, row.shape[1]))
            rows.append(row)
            i = j
        return blocks, rows

    def begin(self, plan: Plan, arrays: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Announces a planned forward, whose arrays are on the device; gives its tokens and their positions."""
        self._plan, self._blocks, self._tokens = plan, [], ()
        ids, positions, *others = arrays
        if plan.row is not None:
            queries, keys, lists, *others = others
            plan.row.begin(queries, keys, lists)
        if plan.tokens is not None:
            self._tokens, others = (others[0], others[1]), others[2:]
        if plan.row is not None and plan.spans:
            self._query_row, self._out_row = others
        return ids, positions

    def _make_blocks(self, plan: Plan) -> list[_Block]:
        """Blocks of a forward that attends to boundaries one by one, for all layers."""
        assert plan.row is not None and self._query_row is not None
        _, _, _, sees, run, slot, _ = plan.row.columns[0]
        j, blocks = torch.arange(int(plan.row.queries[5].max()) + 1, device=slot.device), []
        of_blocks = self._query_row.split([(last - first) * queries for first, last, queries in plan.blocks])
        for (first, last, width), flat in zip(plan.blocks, of_blocks, strict=True):
            at = flat.view(last - first, width)
            sees_MS, run_MS, slot_MS = (x[at][:, :, None] for x in (sees, run, slot))
            visible = (j < sees_MS) | ((j >= run_MS) & (j <= slot_MS))
            blocks.append(_Block(first, last, at, visible))
        return blocks

    def attend(
        self, layer: int, qkv: tuple[torch.Tensor, ...], scale: float | None, window: int | None, cap: float | None
    ) -> torch.Tensor:
        """Attention output `[1, tokens, heads, D]` of one layer; arguments as the model hands them over."""
        assert self._plan is not None
        plan, (q, k, v) = self._plan, (x[0] for x in qkv)
        if not self.cached:
            assert plan.row is not None
            out = ragged.attend(plan.row, q, k, v, scale, window, cap)
        elif plan.tokens is None:
            out = self._attend_documents(layer, (q, k, v), plan, scale, window, cap)
        else:
            assert plan.row is not None
            self._keep_own(layer, k, v)
            # An accelerator is asked for few calls, a CPU for few pairs of tokens. Normalisers have no gradients.
            if plan.spans and q.device.type == "cpu" and window is None and cap is None:
                out = self._attend_apart(layer, q, scale)
            else:
                # In mixed precision what was kept is as wide as the values.
                own = (x.flatten(1, 2) for x in self.own[layer])
                k, v = (torch.cat([d.to(x.dtype), x], 1) for d, x in zip(self.documents[layer], own, strict=True))
                out = ragged.attend(plan.row, q, k, v, scale, window, cap)
        return out.transpose(0, 1)[None]

    def _attend_documents(
        self,
        layer: int,
        qkv: tuple[torch.Tensor, ...],
        plan: Plan,
        scale: float | None,
        window: int | None,
        cap: float | None,
    ) -> torch.Tensor:
        """Causal attention of each document, whose keys and values are kept."""
        q, k, v = qkv
        if self.begun:
            pieces: list[KeysValues] = []
            own = zip(k.split(plan.lengths, 1), v.split(plan.lengths, 1), strict=True)
            for (state, number, tokens), new in zip(self.begun, own, strict=True):
                pieces += [*(state.keys_values(layer, number, tokens) if state and tokens else []), new]
            k, v = (torch.cat(column, 1) for column in zip(*pieces, strict=True))
        self.documents[layer] = k, v
        if plan.row is not None and ragged.flexes(q.to(v.dtype), k.to(v.dtype), v, cap):
            return ragged.attend(plan.row, q, k, v, scale, window, cap)
        documents = zip(q.split(plan.lengths, 1), *(x.split(self.lengths, 1) for x in (k, v)), strict=True)
        return torch.cat([causal(dq, dk, dv, scale, window, cap) for dq, dk, dv in documents], 1)

    def _keep_own(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        branch, slot = self._tokens
        if layer not in self.own:
            shape = (len(k), len(self.prefix), self.slots, k.shape[-1])
            self.own[layer] = (k.new_zeros(shape), v.new_zeros((*shape[:3], v.shape[-1])))
        for kept, new in zip(self.own[layer], (k, v), strict=True):
            kept[:, branch, slot] = new.to(kept.dtype)

    def keys_values(self, layer: int, number: int, tokens: int) -> list[KeysValues]:
        begin = sum(self.lengths[:number])
        k, v = self.documents[layer]
        return [(k[:, begin : begin + tokens], v[:, begin : begin + tokens])]

    def _attend_apart(self, layer: int, q: torch.Tensor, scale: float | None) -> torch.Tensor:
        """Attention to the document, a boundary at a time and without a mask, and to each branch's own keys, a block
        at a time, merged by the log of their normalisers."""
        assert self._plan is not None
        self._blocks = self._blocks or self._make_blocks(self._plan)
        own = self.own[layer]
        q = q.to(own[1].dtype)  # in mixed precision queries and keys may be wider than values
        kv_heads, repeat = len(own[0]), len(q) // len(own[0])
        queries = q.view(kv_heads, repeat, *q.shape[1:])
        of_documents, of_own = [], []
        for first, last, document, seen in self._plan.spans:
            ((k, v),) = self.keys_values(layer, document, seen)
            k, v = k[None].to(q.dtype), v[None].to(q.dtype)
            query = queries[:, :, first:last]
            out, lse = attention_and_normaliser(query.flatten(1, 2)[None], k, v, None, scale, None)
            of_documents.append((out.view(*query.shape[:3], -1), lse.view(query.shape[:3])))
        by_block = queries[:, :, self._query_row].split([b.row_MS.numel() for b in self._blocks], 2)
        for block, query in zip(self._blocks, by_block, strict=True):
            branches, width, slots = block.visible_MSL.shape
            query = query.unflatten(2, (branches, width)).permute(2, 0, 1, 3, 4)  # [M, kv_heads, repeat, S, D]
            k, v = (x[:, block.first : block.last, :slots].transpose(0, 1).to(q.dtype) for x in own)
            mask = block.mask(repeat, q.dtype)
            out, lse = attention_and_normaliser(query.flatten(2, 3), k, v, mask, scale, None)
            out = out.view(branches, kv_heads, repeat, width, -1).permute(1, 2, 0, 3, 4).flatten(2, 3)
            of_own.append((out, lse.view(branches, kv_heads, repeat, width).permute(1, 2, 0, 3).flatten(2, 3)))
        shared, shared_lse = (torch.cat(column, 2) for column in zip(*of_documents, strict=True))
        mine, mine_lse = (torch.cat(column, 2)[:, :, self._out_row] for column in zip(*of_own, strict=True))
        return merged(mine, mine_lse, shared, shared_lse).flatten(0, 1)


def _branch_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    ra3: Attention | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attends, registered with transformers. Sinks and biases it does not know are refused, never ignored."""
    if ra3 is None:
        raise ValueError(
            "the `ra3_branch` attention is used by RA3's rollout engine only; pass `ra3=BranchState(...)`."
        )
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"this model's attention uses `{name}`, which the branch engine does not compute.")
    window, cap = kwargs.get("sliding_window"), kwargs.get("softcap")
    return ra3.attend(cast(int, module.layer_idx), (query, key, value), scaling, window, cap), None


class Attention(Protocol):
    """Says how the tokens of the current forward attend."""

    def attend(
        self, layer: int, qkv: tuple[torch.Tensor, ...], scale: float | None, window: int | None, cap: float | None
    ) -> torch.Tensor: ...


AttentionInterface.register(NAME, _branch_attention)


@contextmanager
def branch_attention(model: PreTrainedModel) -> Iterator[None]:
    """Makes the model attend by branches inside, and as before outside, whatever is raised."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:  # transformers only logs a warning
        raise ValueError(f"{type(model).__name__} does not follow transformers' attention interface")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
