"""One attention function for branches that share documents.

A branch sees its document's tokens before its boundary and its own. Several documents go through one forward, so that
the layers around read their weights once for all of them. Registered with `transformers.AttentionInterface`, it is
reached through an extra keyword argument of the model, so no model code is patched and no [tokens, tokens] mask ever
exists. Branches are handled in blocks of one document: the queries of a block attend to [own keys of the block |
document keys up to the block's last boundary] in one call of PyTorch's fused attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel


NAME = "ra3_branch"
_OWN_KEYS = 1024  # most own keys in a block, unless one branch alone has more
KeysValues = tuple[torch.Tensor, torch.Tensor]  # `[kv_heads, tokens, D]` each, or `[kv_heads, M, slots, D]`


@dataclass
class BranchTokens:
    """Lists the branch tokens of one forward; see `BranchPlan`."""

    token_n: torch.Tensor
    branch_n: torch.Tensor  # branch of each, ascending
    slot_n: torch.Tensor  # its place in the branch, think prefix and latent included
    sees_n: torch.Tensor  # it sees the branch's slots below this one,
    run_n: torch.Tensor  # and those from this one up to its own

    def __len__(self) -> int:
        return len(self.token_n)


@dataclass
class _Block:
    """Groups branches `first` to `last` (exclusive) of one forward for one call of fused attention."""

    first: int
    last: int
    document: int  # number of their document
    slots: int  # own keys of each branch
    shared: int  # document keys that the last of them sees
    row_MS: torch.Tensor  # row of each query among the branch tokens, -1 where a branch has fewer
    visible_MSL: torch.Tensor  # which own slots each query sees
    position_MS: torch.Tensor  # of the queries
    prefix_M: torch.Tensor  # document keys that each branch sees
    position_ML: torch.Tensor  # of the own keys
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)  # by window

    def mask(self, window: int | None, repeat: int, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask `[repeat*M*S, M*L + shared]`, made once for all layers of a kind."""
        if window not in self.masks:
            branches, queries = self.row_MS.shape
            device = self.row_MS.device
            own = self.visible_MSL
            keys = torch.arange(self.shared, device=device)
            shared = (keys < self.prefix_M[:, None, None]).expand(-1, queries, -1)
            if window is not None:
                own = own & (self.position_MS[:, :, None] - self.position_ML[:, None, :] < window)
                shared = shared & (self.position_MS[:, :, None] - keys < window)
            same = torch.eye(branches, dtype=torch.bool, device=device)[:, None, :, None]
            own = (own[:, :, None, :] & same).flatten(2)
            seen = torch.cat([own, shared], -1) | (self.row_MS < 0)[:, :, None]  # a padded query must see something
            mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))
            self.masks[window] = mask.flatten(0, 1).repeat(repeat, 1)
        return self.masks[window]


def _fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float | None, cap: float | None
) -> torch.Tensor:
    if cap is None:
        return scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask[None, None], scale=scale)[0]
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (torch.tanh(scores / cap) * cap + mask).softmax(-1).to(v.dtype) @ v


def _causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, window: int | None, cap: float | None
) -> torch.Tensor:
    """Plain causal attention of a document, `q` `[heads, N, D]`, `k` and `v` `[kv_heads, N, D]`."""
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    length = q.shape[1]
    if cap is None and (window is None or length <= window):
        return scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scale)[0]
    i = torch.arange(length, device=q.device)
    seen = (i[:, None] >= i) & (i[:, None] - i < (window or length))
    return _fused(q, k, v, torch.zeros_like(seen, dtype=q.dtype).masked_fill_(~seen, float("-inf")), scale, cap)


class BranchState:
    """Holds keys and values of documents and of the branches in flight, and what the current forward is.

    `prefix_M` are the document tokens that each branch sees, `document_M` the numbers of their documents, ascending
    (and the prefixes within a document); `slots` the most tokens of a branch. `cached` keeps keys and values from
    forward to forward (no gradients); without, there is one packed forward [documents | branches] with gradients. The
    documents' are those of another state, if given.
    """

    def __init__(
        self,
        prefix_M: torch.Tensor,
        document_M: Sequence[int],
        slots: int,
        cached: bool,
        trunk: BranchState | None = None,
    ):
        self.prefix_M = prefix_M
        self.document_M = document_M
        self.slots = slots
        self.cached = cached
        self._documents: dict[int, list[KeysValues]] = trunk._documents if trunk else {}  # by layer
        self._own: dict[int, KeysValues] = {}
        self._roomy: dict[tuple[int, int], KeysValues] = {}  # by layer and document
        self._position_ML = torch.zeros(len(prefix_M), slots, dtype=torch.long, device=prefix_M.device)
        self.blocks: list[_Block] = []
        self._lengths: list[int] = []
        self._tokens: BranchTokens | None = None
        self._own_row: torch.Tensor | None = None
        self._query_row: torch.Tensor | None = None
        self._out_row: torch.Tensor | None = None
        self._sizes: list[int] = []

    @property
    def layers(self) -> int:
        """Number of layers that attended to the documents through this state."""
        return len(self._documents)

    def spread(self, count: int) -> BranchState:
        """Each branch `count` times, one after the other, with the keys and values that it has: what they have in
        common is run once."""
        documents = [number for number in self.document_M for _ in range(count)]
        state = BranchState(self.prefix_M.repeat_interleave(count), documents, self.slots, self.cached, self)
        state._own = {
            layer: (k.repeat_interleave(count, 1), v.repeat_interleave(count, 1))
            for layer, (k, v) in self._own.items()
        }
        state._position_ML = self._position_ML.repeat_interleave(count, 0)
        return state

    def begin(self, tokens: BranchTokens | None, lengths: Sequence[int] = ()) -> torch.Tensor:
        """Announces a forward of documents of so many tokens followed by `tokens`; returns its position ids."""
        self._tokens, self._lengths, self.blocks = tokens, list(lengths), []
        positions = [torch.arange(length, device=self.prefix_M.device) for length in lengths]
        if tokens is None:
            return torch.cat(positions)
        depth = torch.where(tokens.sees_n > tokens.slot_n, tokens.slot_n, tokens.sees_n + tokens.slot_n - tokens.run_n)
        position_n = self.prefix_M[tokens.branch_n] + depth
        self._position_ML[tokens.branch_n, tokens.slot_n] = position_n
        if not self.cached:
            self._own_row = torch.zeros_like(self._position_ML)
            self._own_row[tokens.branch_n, tokens.slot_n] = torch.arange(len(tokens), device=position_n.device)
        self._make_blocks(tokens, position_n)
        return torch.cat([*positions, position_n])

    def _make_blocks(self, tokens: BranchTokens, position_n: torch.Tensor) -> None:
        branches, counts = torch.unique_consecutive(tokens.branch_n, return_counts=True)
        ends = counts.cumsum(0)
        slots = int(tokens.slot_n.max()) + 1
        ids, bounds, prefix = branches.tolist(), [0, *ends.tolist()], self.prefix_M.tolist()
        i, rows = 0, []
        while i < len(ids):
            most = max(1, min(64, _OWN_KEYS // slots, max(8, prefix[ids[i]] // (2 * slots))))
            j = i + 1
            while j < len(ids) and ids[j] - ids[i] < most and self.document_M[ids[j]] == self.document_M[ids[i]]:
                j += 1
            self.blocks.append(self._block(tokens, position_n, ids[i:j], bounds[i : j + 1], slots))
            rows.append(self.blocks[-1].row_MS.flatten())
            i = j
        row = torch.cat(rows)
        self._query_row, self._sizes = row.clamp(min=0), [len(r) for r in rows]
        self._out_row = torch.empty_like(tokens.branch_n)
        self._out_row[row[row >= 0]] = (row >= 0).nonzero()[:, 0]

    def _block(
        self, tokens: BranchTokens, position_n: torch.Tensor, ids: list[int], bounds: list[int], slots: int
    ) -> _Block:
        device = position_n.device
        first, last = ids[0], ids[-1] + 1
        widest = max(b - a for a, b in zip(bounds, bounds[1:], strict=False))
        row = torch.full((last - first, widest), -1)
        for m, a, b in zip(ids, bounds, bounds[1:], strict=False):
            row[m - first, : b - a] = torch.arange(a, b)
        row = row.to(device)
        at = row.clamp(min=0)
        j = torch.arange(slots, device=device)
        sees, run, slot = (x[at][:, :, None] for x in (tokens.sees_n, tokens.run_n, tokens.slot_n))
        visible = (j < sees) | ((j >= run) & (j <= slot))
        document, prefix, own = (
            self.document_M[first],
            self.prefix_M[first:last],
            self._position_ML[first:last, :slots],
        )
        return _Block(first, last, document, slots, int(prefix.max()), row, visible, position_n[at], prefix, own)

    def attend(
        self, layer: int, qkv: tuple[torch.Tensor, ...], scale: float | None, window: int | None, cap: float | None
    ) -> torch.Tensor:
        """Attention output `[1, tokens, heads, D]` of one layer; arguments as the model hands them over."""
        # Split and not sliced: the backward of a slice fills a tensor of the whole's size, for every document.
        rest = qkv[0].shape[2] - sum(self._lengths)
        *documents, (q, k, v) = zip(*(x[0].split([*self._lengths, rest], 1) for x in qkv), strict=True)
        outputs = [_causal(dq, dk, dv, scale, window, cap) for dq, dk, dv in documents]
        if documents:
            self._documents[layer] = [(k, v) for _, k, v in documents]
        if self._tokens is not None:
            self._keep_own(self._tokens, layer, k, v)
            outputs.append(self._attend_blocks(layer, q, scale, window, cap))
        return torch.cat(outputs, 1).transpose(0, 1)[None]

    def _keep_own(self, tokens: BranchTokens, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        if not self.cached:
            self._own[layer] = (k[:, self._own_row], v[:, self._own_row])
            return
        if layer not in self._own:
            shape = (len(k), len(self.prefix_M), self.slots, k.shape[-1])
            self._own[layer] = (k.new_zeros(shape), v.new_zeros((*shape[:3], v.shape[-1])))
        for kept, new in zip(self._own[layer], (k, v), strict=True):
            kept[:, tokens.branch_n, tokens.slot_n] = new

    def _keys(self, layer: int, block: _Block, own: KeysValues) -> tuple[torch.Tensor, ...]:
        """Keys and values `[kv_heads, own | shared, D]` that a block attends to."""
        mine = [x[:, :, : block.slots].flatten(1, 2) for x in own]
        count = mine[0].shape[1]
        if not self.cached or count > _OWN_KEYS:
            documents = self._documents[layer][block.document]
            return tuple(torch.cat([x, d[:, : block.shared]], 1) for x, d in zip(mine, documents, strict=True))
        # A block's own keys are written in front of the document's: [own | document] is a view, no copy at each step.
        roomy = self._with_room(layer, block.document)
        room = roomy[0].shape[1] - self._documents[layer][block.document][0].shape[1]
        for x, kept in zip(mine, roomy, strict=True):
            kept[:, room - count : room] = x
        return tuple(kept[:, room - count : room + block.shared] for kept in roomy)

    def drop_room(self) -> None:
        """Lets go of the copies that forwards have made; the next one makes them anew."""
        self._roomy.clear()

    def _with_room(self, layer: int, document: int) -> KeysValues:
        """Keys and values of a document behind room for those of a block."""
        if (layer, document) not in self._roomy:
            room = min(_OWN_KEYS, self.slots * self.document_M.count(document))
            k, v = self._documents[layer][document]
            self._roomy[layer, document] = (pad(k, (0, 0, room, 0)), pad(v, (0, 0, room, 0)))
        return self._roomy[layer, document]

    def _attend_blocks(
        self, layer: int, q: torch.Tensor, scale: float | None, window: int | None, cap: float | None
    ) -> torch.Tensor:
        # Gathered once and split: the backward of a slice fills a tensor of the whole's size, for every block.
        queries = q[:, self._query_row].split(self._sizes, 1)
        own_k, own_v = self._own[layer]
        if self.cached:
            owns = [(own_k[:, b.first : b.last], own_v[:, b.first : b.last]) for b in self.blocks]
        else:
            counts = [b.last - b.first for b in self.blocks]
            owns = list(zip(own_k.split(counts, 1), own_v.split(counts, 1), strict=True))
        outputs = []
        for block, query, own in zip(self.blocks, queries, owns, strict=True):
            k, v = self._keys(layer, block, own)
            repeat = len(q) // len(k)
            mask = block.mask(window, repeat, q.dtype)
            grouped = query.reshape(len(k), repeat * query.shape[1], -1)
            outputs.append(_fused(grouped, k, v, mask, scale, cap).reshape(len(q), query.shape[1], -1))
        return torch.cat(outputs, 1)[:, self._out_row]


def _branch_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    ra3: BranchState | None = None,
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
