"""Attention of decoding steps: one token of each branch, of all documents, in two calls a layer.

A token attends to its document in one call and to its branch's own tokens in another, and the two are merged by the
log of their normalisers. How many branches and documents there are changes sizes and not the number of operations; the
device is never asked for a number.
"""

from __future__ import annotations

import numpy as np
import torch

from .attention import BranchState, to_device


def attention_and_normaliser(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float | None, cap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention `[B, heads, Q, D]` with an additive mask, and the log of its normaliser `[B, heads, Q]`."""
    kind, same_size = q.device.type, q.shape[-1] == v.shape[-1]
    if cap is None and kind == "cpu" and same_size:
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    if cap is None and kind not in ("cpu", "mps"):
        shape = (*q.shape[:3], k.shape[2])
        out = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask.expand(shape), True, scale=scale)
        return out[0], out[1][..., : q.shape[2]]
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = (scores if cap is None else torch.tanh(scores / cap) * cap).float() + mask
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where a key is seen. Elsewhere the least number and not `-inf`, of which a row that sees nothing would become
    NaN; rows stand so far apart as accelerators' kernels want."""
    keys = seen.shape[-1]
    mask = torch.zeros((*seen.shape[:-1], -(-keys // 16) * 16), dtype=dtype, device=seen.device)[..., :keys]
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)


class Decoding:
    """Holds branches that are sampled: a row each, in the order of `branches`, and what the current step is.

    `opened` has the keys and values of the think prefixes, of which branch `m` has `think[m]`.
    """

    def __init__(self, opened: BranchState, think: np.ndarray, device: torch.device):
        self.opened = opened
        self.think = think
        self.device = device
        self.branches = np.arange(len(think))
        self.rows = len(think)  # the first ones, that go on
        self._longest_think = int(think.max())
        # In mixed precision keys may be wider than values; fused attention wants one type.
        opened.own = {layer: (k.to(v.dtype), v) for layer, (k, v) in opened.own.items()}
        self._documents, number = np.unique(opened.document_M, return_inverse=True)
        self._number = number  # of each branch's document among those
        self._shared: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._arrange()

    def _arrange(self) -> None:
        """Lays the rows out by document, as wide as the one with most: where each stands, and who stands there."""
        branches = self.branches[: self.rows]
        number = self._number[branches]
        counts = np.bincount(number, minlength=len(self._documents))
        order = np.argsort(number, kind="stable")
        rank = np.empty(self.rows, dtype=np.int64)
        rank[order] = np.arange(self.rows) - np.repeat(np.cumsum(counts) - counts, counts)
        self._width = int(counts.max())
        place = number * self._width + rank
        at = np.zeros(len(self._documents) * self._width, dtype=np.int64)
        at[place] = np.arange(self.rows)
        lengths = [self.opened.lengths[d] for d in self._documents]
        begins = np.cumsum([0, *self.opened.lengths])[self._documents]
        # Keys of the documents side by side: places beyond a document's end hold some other key, which is never seen.
        self._longest = max(lengths)
        keys = np.minimum(begins[:, None] + np.arange(self._longest), sum(self.opened.lengths) - 1)
        arrays = (at, place, keys, self.opened.prefix[branches], self.think[branches], np.arange(self.rows), branches)
        (copied,) = to_device(self.device, arrays)
        self._at, self._place, self._keys, self._prefix, self._think, self._row, self.branch = copied
        self._doc_masks: dict[int | None, torch.Tensor] = {}
        self._heads: tuple[int, torch.Tensor] | None = None

    def leave(self, going: np.ndarray) -> torch.Tensor:
        """Lets rows go that `going` leaves out; gives the rows that stay, in the new order. What the others have is
        kept behind these."""
        index = np.concatenate([np.flatnonzero(going), np.flatnonzero(~going)])
        where = to_device(self.device, [index])[0][0]
        for kept in self.opened.own.values():
            for x in kept:
                x[:, : self.rows] = x[:, where]
        self.branches[: self.rows] = self.branches[index]
        self.rows = int(going.sum())
        self._arrange()
        return where[: self.rows]

    def begin(self, step: int) -> torch.Tensor:
        """Announces the step that runs token number `step` of each row's latent; gives its position ids."""
        self._slot = self._think + step
        self._wide = self._longest_think + step + 1  # slots that there are by now
        self._own_masks: dict[int | None, torch.Tensor] = {}
        if any(window is not None for window in self._doc_masks):
            self._doc_masks = {}
        return self._prefix + self._slot

    def _own_mask(self, window: int | None, width: int, dtype: torch.dtype) -> torch.Tensor:
        if window not in self._own_masks:
            j = torch.arange(width, device=self.device)
            seen = j <= self._slot[:, None]
            if window is not None:
                seen &= self._slot[:, None] - j < window
            self._own_masks[window] = _additive(seen, dtype)[:, None, None]
        return self._own_masks[window]

    def _doc_mask(self, window: int | None, repeat: int, dtype: torch.dtype) -> torch.Tensor:
        if window not in self._doc_masks:
            prefix, slot = (x[self._at].view(-1, self._width, 1) for x in (self._prefix, self._slot))
            j = torch.arange(self._longest, device=self.device)
            seen = j < prefix
            if window is not None:
                seen &= prefix + slot - j < window
            self._doc_masks[window] = _additive(seen.repeat_interleave(repeat, 1), dtype)[:, None]
        return self._doc_masks[window]

    def _document(self, layer: int) -> tuple[torch.Tensor, ...]:
        """Keys and values `[documents, kv_heads, longest, D]`, gathered once."""
        if layer not in self._shared:
            k, v = (
                x.index_select(1, self._keys.flatten()).view(len(x), len(self._documents), self._longest, -1)
                for x in self.opened.documents[layer]
            )
            self._shared[layer] = (k.to(v.dtype).transpose(0, 1), v.transpose(0, 1))
        return self._shared[layer]

    def _query_index(self, heads: int, kv_heads: int) -> torch.Tensor:
        """Where each query of the documents' call stands among the rows' heads: `[documents, kv_heads, width, repeat]`
        flat."""
        if self._heads is None or self._heads[0] != heads * kv_heads:
            rows = self._at.view(-1, 1, self._width, 1) * heads
            head = torch.arange(heads, device=self.device).view(1, kv_heads, 1, -1)
            self._heads = (heads * kv_heads, (rows + head).flatten())
        return self._heads[1]

    def attend(
        self, layer: int, qkv: tuple[torch.Tensor, ...], scale: float | None, window: int | None, cap: float | None
    ) -> torch.Tensor:
        """Attention output `[1, rows, heads, D]` of one layer; arguments as the model hands them over."""
        q, k, v = (x[0] for x in qkv)
        own = self.opened.own[layer]
        for kept, new in zip(own, (k, v), strict=True):
            kept[:, self._row, self._slot] = new.to(kept.dtype)
        q, (heads, kv_heads) = q.to(own[0].dtype).transpose(0, 1), (len(q), len(k))  # [rows, heads, D]
        repeat, width = heads // kv_heads, self._wide
        grouped = q.reshape(self.rows, kv_heads, repeat, -1)
        own_k, own_v = (x[:, : self.rows, :width].transpose(0, 1) for x in own)
        own_mask = self._own_mask(window, width, q.dtype)
        out, lse = attention_and_normaliser(grouped, own_k, own_v, own_mask, scale, cap)
        queries = q.reshape(self.rows * heads, -1).index_select(0, self._query_index(heads, kv_heads))
        queries = queries.view(len(self._documents), kv_heads, self._width * repeat, -1)
        doc_k, doc_v = self._document(layer)
        mask = self._doc_mask(window, repeat, q.dtype)
        doc_out, doc_lse = attention_and_normaliser(queries, doc_k, doc_v, mask, scale, cap)
        # Both as [rows, repeat, kv_heads, D], the order in which fused attention writes.
        out, lse = out.transpose(1, 2), lse.transpose(1, 2)
        doc_out = doc_out.transpose(1, 2).reshape(len(self._at), -1).index_select(0, self._place).view(out.shape)
        doc_lse = doc_lse.transpose(1, 2).reshape(len(self._at), -1).index_select(0, self._place).view(lse.shape)
        weight = torch.sigmoid(doc_lse - lse)[..., None]
        merged = torch.lerp(out.float(), doc_out.float(), weight).to(out.dtype)
        return merged.transpose(1, 2).reshape(1, self.rows, heads, -1)
