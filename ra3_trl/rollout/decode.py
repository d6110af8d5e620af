"""Attention of decoding steps: one token of each branch, of all documents, in two calls a layer.

A token attends to its document in one call and to its branch's own tokens in another, and the two are merged by the
log of their normalisers. How many branches and documents there are changes sizes and not the number of operations; the
device is never asked for a number.
"""

from __future__ import annotations

import numpy as np
import torch

from .attention import BranchState
from .forward import to_device
from .fused import additive, attention_and_normaliser, merged


class Decoding:
    """Holds latents that are sampled, and what the current step is. A row is what stands so far of one or several.

    `opened` has the keys and values of the think prefixes, a row each, of which row `r` has `think[r]` tokens; branch
    `m` begins in row `row[m]`. With `fixed` shapes a step attends to all slots that there will be.
    """

    def __init__(self, opened: BranchState, think: np.ndarray, row: np.ndarray, fixed: bool, device: torch.device):
        self.opened = opened
        self.fixed = fixed
        self.device = device
        self.row = row  # of each branch
        self.rows = len(think)  # the first ones, that go on; those behind are kept for branches that have stopped
        self._longest_think = int(think.max())
        # In mixed precision keys may be wider than values; fused attention wants one type.
        opened.own = {layer: (k.to(v.dtype), v) for layer, (k, v) in opened.own.items()}
        self._documents, number = np.unique(opened.document_M, return_inverse=True)
        # Of each row: the document's number among those, its tokens seen, think tokens.
        self._of_rows = (number, opened.prefix, think)
        self._shared: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._arrange()

    def _arrange(self) -> None:
        """Lays the rows out by document, as wide as the one with most: where each stands, and who stands there."""
        number, prefix, think = (x[: self.rows] for x in self._of_rows)
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
        (copied,) = to_device(self.device, (at, place, keys, prefix, think, np.arange(self.rows)))
        self._at, self._place, self._keys, self._prefix, self._think, self._row = copied
        self._doc_masks: dict[int | None, torch.Tensor] = {}
        self._heads: tuple[int, torch.Tensor] | None = None

    def follow(self, branches: np.ndarray, token_n: np.ndarray) -> np.ndarray:
        """Lets `branches`, all that go on, be followed by a token each; those of one row that go on with the same one
        share a row. Gives the token of each row that goes on."""
        wide = int(token_n.max()) + 1
        keys, which = np.unique(self.row[branches] * wide + token_n, return_inverse=True)
        source, tokens = keys // wide, keys % wide
        if len(np.unique(source)) == len(source) > 7 / 8 * self.rows:  # to move the others costs more than it saves
            of_rows = np.zeros(self.rows, dtype=np.int64)
            of_rows[source] = tokens
            return of_rows
        index = np.concatenate([source, np.setdiff1d(np.arange(len(self._of_rows[0])), source)])
        # One that has stopped may share a row with others that go on: they leave the slots that it has alone.
        _, first = np.unique(index, return_index=True)
        self.row = first[self.row]
        self.row[branches] = which
        where = to_device(self.device, [index])[0][0]
        for layer, (k, v) in self.opened.own.items():
            self.opened.own[layer] = (k[:, where], v[:, where])
        self._of_rows = (self._of_rows[0][index], self._of_rows[1][index], self._of_rows[2][index])
        self.rows = len(source)
        self._arrange()
        return tokens

    def begin(self, step: int) -> torch.Tensor:
        """Announces the step that runs token number `step` of each row's latent; gives its position ids."""
        self._slot = self._think + step
        self._wide = self.opened.slots if self.fixed else self._longest_think + step + 1  # slots attended to
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
            self._own_masks[window] = additive(seen, dtype)[:, None, None]
        return self._own_masks[window]

    def _doc_mask(self, window: int | None, repeat: int, dtype: torch.dtype) -> torch.Tensor:
        if window not in self._doc_masks:
            prefix, slot = (x[self._at].view(-1, self._width, 1) for x in (self._prefix, self._slot))
            j = torch.arange(self._longest, device=self.device)
            seen = j < prefix
            if window is not None:
                seen &= prefix + slot - j < window
            self._doc_masks[window] = additive(seen.repeat_interleave(repeat, 1), dtype)[:, None]
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
        both = merged(out, lse, doc_out, doc_lse)
        return both.transpose(1, 2).reshape(1, self.rows, heads, -1)
