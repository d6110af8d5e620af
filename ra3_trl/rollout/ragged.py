"""Attention of ragged rows `[documents | branches]`: one function says who sees whom, whatever computes it.

A row is cut into blocks of queries and of keys. From what stands in them it follows, on the host, in which pairs of
blocks nobody sees anybody (nothing is computed), all see all (no mask), or some see some, where [`visible`] decides
token by token. On accelerators with Triton that is one call of `flex_attention`; on a CPU it is two calls of fused
attention for each block of queries, merged by their normalisers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from .fused import additive, attention_and_normaliser, fused, merged
from .judging import FORWARD_ERRORS, ROUNDINGS, in_a_line


logger = logging.getLogger(__name__)
BLOCK = 128  # of flex attention's kernels
_SMALL = 32  # of the CPU, which loses less by many calls than by pairs that are not seen
_LEAST_HEAD = 16  # of the matrix products of Triton's kernels
_NOBODY = -1  # a document or a branch that there is not
Columns = Sequence[torch.Tensor]


def bucket(length: int) -> int:
    """Rounds up to one of few lengths: multiples of a block, from 1,024 on four in each doubling.

    >>> [bucket(n) for n in (1, 128, 129, 1000, 1025, 8193)]
    [128, 128, 256, 1024, 1280, 10240]
    """
    step = max(BLOCK, 1 << max((length - 1).bit_length() - 3, 0))
    return -(-length // step) * step


def visible(query: Columns, key: Columns, window: int | None) -> torch.Tensor:
    """Whether queries see keys. A key is its owner's, a document or a branch, and has a slot there. A query sees the
    slots of its document below `prefix`, those of its branch below `sees`, and those from `run` up to its own."""
    document, prefix, branch, sees, run, slot, position = query
    owner, key_slot, key_position = key
    shared = (owner == document) & (key_slot < prefix)
    own = (owner == branch) & ((key_slot < sees) | ((key_slot >= run) & (key_slot <= slot)))
    seen = shared | own
    return seen if window is None else seen & (position - key_position < window)


def of_documents(lengths: Sequence[int], firsts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """What tokens of documents are as queries `[7, n]` and as keys `[3, n]`; each sees its document up to itself."""
    document = np.repeat(np.arange(len(lengths)), np.array(lengths, dtype=np.int64))
    slot = np.concatenate([document[:0], *(first + np.arange(n) for first, n in zip(firsts, lengths, strict=True))])
    zero = np.zeros_like(slot)
    return np.stack([document, slot + 1, zero + _NOBODY, zero, slot + 1, slot, slot]), np.stack([document, slot, slot])


@dataclass
class _Work:
    """Lists what the queries `rows` of a block see: tokens of keys that all of them see, and of keys that some do."""

    rows: slice
    whole: list[slice]
    some: list[slice]
    mask: torch.Tensor  # of the latter, `[queries, keys]`


@dataclass
class Row:
    """Says of the tokens of a forward who sees whom, see [`visible`].

    `queries` `[7, n]` and `keys` `[3, m]` are padded to a [`bucket`] with what sees nothing and is seen by nobody.
    """

    queries: np.ndarray
    keys: np.ndarray
    seen: int  # keys that there are
    columns: tuple[Columns, Columns] = ((), ())  # the same on the device
    lists: torch.Tensor | None = None  # there too: of [`Row.pairs`] without a window
    _work: dict[int | None, list[_Work]] = field(default_factory=dict)  # by window
    _listed: dict[int | None, list[np.ndarray]] = field(default_factory=dict)
    _masks: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, queries: np.ndarray, keys: np.ndarray) -> Row:
        wide, long = (bucket(x.shape[1]) - x.shape[1] for x in (queries, keys))
        padded = np.pad(queries, ((0, 0), (0, wide)), constant_values=-3)
        return cls(padded, np.pad(keys, ((0, 0), (0, long)), constant_values=-2), keys.shape[1])

    @property
    def arrays(self) -> list[np.ndarray]:
        """What the device must have."""
        return [self.queries, self.keys, np.concatenate([x.ravel() for x in self._lists(None)])]

    def begin(self, queries: torch.Tensor, keys: torch.Tensor, lists: torch.Tensor) -> None:
        """Takes the arrays, which are on the device."""
        self.columns, self.lists = (queries.unbind(), keys.unbind()), lists

    def pairs(self, window: int | None, size: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
        """Which blocks of keys `[queries, keys]` a block of queries may see something of, and which all of it sees."""

        def ends(x: np.ndarray, there: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            x, there = x.reshape(-1, size), there.reshape(-1, size)
            most = np.iinfo(np.int64).max
            return np.where(there, x, most).min(1), np.where(there, x, -1).max(1)

        document, prefix, branch, _, _, _, position = self.queries
        owner, slot, at = self.keys
        text, token = document >= 0, owner >= 0
        (doc, last_doc), (least, most), (place, last_place) = (
            (low[:, None], high[:, None]) for low, high in (ends(x, text) for x in (document, prefix, position))
        )
        mine, last_mine = (x[:, None] for x in ends(branch, branch >= 0))
        (first, last), (low, high), (begin, end) = (ends(x, token) for x in (owner, slot, at))
        some = (first <= last_doc) & (last >= doc) & (low < most) | (first <= last_mine) & (last >= mine)
        whole = (doc == last_doc) & (first == doc) & (last == doc) & (high < least)
        whole &= token.reshape(-1, size).all(1)
        if window is not None:
            some = some & (place - end < window)
            whole &= last_place - begin < window
        return some | whole, whole

    def work(self, window: int | None, dtype: torch.dtype) -> list[_Work]:
        """What each block of queries has to do, with masks that all layers share."""
        if window not in self._work:
            some, whole = self.pairs(window, _SMALL)
            found = self._work[window] = []
            for i in np.flatnonzero(some.any(1)).tolist():
                rows = slice(i * _SMALL, (i + 1) * _SMALL)
                all_see, some_see = (_runs(x, self.seen, _SMALL) for x in (whole[i], some[i] & ~whole[i]))
                found.append(_Work(rows, all_see, some_see, self.mask(rows, some_see, window, dtype)))
        return self._work[window]

    def mask(self, rows: slice, runs: Sequence[slice], window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask `[queries, keys]` of what there is of a block of queries, and of keys."""
        query, key = self.columns
        there = int((self.queries[0, rows] >= 0).sum())
        queries = [x[rows][:there, None] for x in query]
        keys = [torch.cat([x[run] for run in (*runs, slice(0))]) for x in key]
        return additive(visible(queries, keys, window), dtype)

    def whole_mask(self, block: int, some: np.ndarray, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """The mask of a block of queries and all that it may see, made once for all layers."""
        if (block, window) not in self._masks:
            rows = slice(block * BLOCK, (block + 1) * BLOCK)
            self._masks[block, window] = self.mask(rows, _runs(some, self.seen), window, dtype)
        return self._masks[block, window]

    def block_mask(self, window: int | None) -> BlockMask:
        """The same for `flex_attention`."""
        if window not in self._masks:
            query, key = self.columns

            def mask_mod(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
                return visible([x[i] for x in query], [x[j] for x in key], window)

            lists, flat = self._lists(window), self.lists
            if window is not None or flat is None:
                flat = torch.from_numpy(np.concatenate([x.ravel() for x in lists])).to(query[0].device)
            parts = flat.int().split([x.size for x in lists])
            tensors = [part.view(1, 1, *x.shape) for part, x in zip(parts, lists, strict=True)]
            options: dict[str, Any] = {"BLOCK_SIZE": (BLOCK, BLOCK), "mask_mod": mask_mod}
            lengths = (self.queries.shape[1], self.keys.shape[1])
            self._masks[window] = BlockMask(lengths, *tensors, **options)
        return self._masks[window]

    def _lists(self, window: int | None) -> list[np.ndarray]:
        """Of each block of queries and then of each block of keys, how many blocks it must look at and which: those of
        which some pairs see, then those of which all do."""
        if window not in self._listed:
            some, whole = self.pairs(window)
            kinds = (some & ~whole, whole)
            self._listed[window] = [x for kind in (*kinds, *(kind.T for kind in kinds)) for x in _ordered(kind)]
        return self._listed[window]


def _ordered(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many are true in each row, and the columns with these first."""
    return pairs.sum(1), np.argsort(~pairs, axis=1, kind="stable")


def _runs(blocks: np.ndarray, length: int, size: int = BLOCK) -> list[slice]:
    """Tokens of neighbouring blocks together, of as many tokens as there are.

    >>> _runs(np.array([True, True, False, True]), 400)
    [slice(0, 256, None), slice(384, 400, None)]
    """
    edges = np.flatnonzero(np.diff(blocks, prepend=False, append=False)) * size
    return [slice(a, min(b, length)) for a, b in edges.reshape(-1, 2).tolist() if a < length]


# ---- what computes it ----


def attend(
    row: Row, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, window: int | None,
    cap: float | None,
) -> torch.Tensor:  # fmt: skip
    """Attention `[heads, n, D]` of a row's queries to its keys; soft-capped by `cap`."""
    q, k = q.to(v.dtype), k.to(v.dtype)  # in mixed precision they may be wider than values
    if flexes(q, k, v, cap):
        return flex(row, q, k, v, scale, window, cap)
    if cap is None and q.device.type == "cpu" and q.shape[-1] == v.shape[-1]:
        return _ByBlocks.apply(q, k, v, row, window, scale)
    return _with_masks(row, q, k, v, scale, window, cap)


def flexes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cap: float | None) -> bool:
    """Whether `flex_attention` is one kernel here that knows heads of this size."""
    if q.device.type in ("cpu", "mps") or min(q.shape[-1], v.shape[-1]) < _LEAST_HEAD or find_spec("triton") is None:
        return False
    return works(q.device, q.dtype, (len(q), len(k)), (q.shape[-1], v.shape[-1]), cap)


@lru_cache
def works(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int], sizes: tuple[int, int], cap: float | None
) -> bool:
    """Tries `flex_attention` on made-up documents, with gradients: what its compiler can't do, or does wrong, is left
    to masks, with one warning."""
    row = Row.of(*of_documents((150, 90), (0, 0)))
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        row.begin(*(torch.as_tensor(x, device=device) for x in row.arrays))
        generator = torch.Generator().manual_seed(0)
        shapes = [(heads[0], sizes[0]), (heads[1], sizes[0]), (heads[1], sizes[1])]
        qkv = [torch.randn(count, 240, size, generator=generator).to(device, dtype) for count, size in shapes]
        found = []
        ways: tuple[Callable[..., torch.Tensor], ...] = (flex, _with_masks)
        for way in ways:
            leaves = [x.clone().requires_grad_() for x in qkv]
            try:
                out = way(row, *leaves, None, None, cap)
                out.square().sum().backward()
            except FORWARD_ERRORS as error:
                logger.warning("`flex_attention` is not used here, masks are: %s", in_a_line(error))
                return False
            found.append([out.detach(), *(x.grad for x in leaves)])
    eps = max(torch.finfo(dtype).eps, 2.0**-10 if device.type == "cuda" else 0.0)  # of matrix products in TF32
    for ours, other in zip(*found, strict=True):
        if not float((ours - other).abs().max()) <= 16 * ROUNDINGS * eps * float(other.abs().max()):
            logger.warning("`flex_attention` is not used here, masks are: its numbers are others")
            return False
    return True


@lru_cache
def compiled_flex() -> Any:
    """`flex_attention` of any length: PyTorch keeps few compiled forms of a function, and each window has its own."""
    return torch.compile(flex_attention, dynamic=True)


@lru_cache
def _capped(cap: float) -> Any:
    def score_mod(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return torch.tanh(score / cap) * cap

    return score_mod


def flex(
    row: Row, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, window: int | None,
    cap: float | None,
) -> torch.Tensor:  # fmt: skip
    """One call of `flex_attention`, over lengths that are few."""
    mask = row.block_mask(window)
    queries, keys = row.queries.shape[1], row.keys.shape[1]
    wide = (pad(x, (0, 0, 0, length - x.shape[1]))[None] for x, length in ((q, queries), (k, keys), (v, keys)))
    score_mod = None if cap is None else _capped(cap)
    gqa = len(q) != len(k)
    out = compiled_flex()(*wide, score_mod=score_mod, block_mask=mask, scale=scale, enable_gqa=gqa)
    return out[0, :, : q.shape[1]]


def _taken(x: torch.Tensor, runs: Sequence[slice]) -> torch.Tensor:
    return x[:, runs[0]] if len(runs) == 1 else torch.cat([x[:, run] for run in runs], 1)


class _ByBlocks(torch.autograd.Function):
    """Attends a block of queries at a time, to what all of them see without a mask and to the rest with one.

    The gradient of attention in parts is that of each part with the output and the normaliser of the whole; so the
    kernels' own backward does, and the gradients of keys are added in place.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row: Row, window: int | None, scale: float | None
    ) -> torch.Tensor:
        out, lse = torch.empty_like(q), []
        for work in row.work(window, q.dtype):
            parts = []
            for runs, mask in ((work.whole, None), (work.some, work.mask)):
                if runs:
                    query, key, value = _grouped(q[:, work.rows], _taken(k, runs), _taken(v, runs), mask)
                    of_part, its_lse = attention_and_normaliser(query, key, value, mask, scale, None)
                    parts.append((of_part.reshape(len(q), -1, q.shape[-1]), its_lse.reshape(len(q), -1)))
            of_block, its_lse = parts[0]
            if len(parts) == 2:
                of_block, its_lse = merged(*parts[0], *parts[1]), torch.logaddexp(parts[0][1], parts[1][1])
            out[:, work.rows] = of_block
            lse.append(its_lse)
        ctx.save_for_backward(q, k, v, out, torch.cat(lse, 1))
        ctx.row, ctx.window, ctx.scale = row, window, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)  # keys' gradients are sums over many blocks
        grads = [torch.zeros_like(x, dtype=wide) for x in (q, k, v)]
        for work in ctx.row.work(ctx.window, q.dtype):
            rows = work.rows
            for runs, mask in ((work.whole, None), (work.some, work.mask)):
                if not runs:
                    continue
                query, key, value = _grouped(q[:, rows], _taken(k, runs), _taken(v, runs), mask)
                of_block = (x[:, rows].reshape(query.shape) for x in (grad, out))
                slope, whole = (x.contiguous() for x in of_block)
                found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    slope, query, key, value, whole, lse[:, rows].reshape(query.shape[:3]), 0.0, False,
                    attn_mask=mask, scale=ctx.scale,
                )  # fmt: skip
                grads[0][:, rows] += found[0].reshape(len(q), -1, q.shape[-1])
                for total, part in zip(grads[1:], found[1:], strict=True):
                    # Of keys that several heads share a row each, or one for all of them.
                    part = part.view(len(k), -1, *part.shape[2:]).sum(1, dtype=wide)
                    for run, piece in zip(runs, part.split([run.stop - run.start for run in runs], 1), strict=True):
                        total[:, run] += piece
        return *(x.to(q.dtype) for x in grads), None, None, None


def _grouped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries `[B, heads, Q, D]` and their keys and values. Without a mask the heads that share keys stand behind each
    other as more queries; a mask serves all heads, so there keys are the same for several."""
    if mask is None:
        return q.reshape(1, len(k), -1, q.shape[-1]), k[None], v[None]
    repeat = len(q) // len(k)
    key, value = (x[:, None].expand(-1, repeat, -1, -1) for x in (k, v))
    return q.reshape(len(k), repeat, *q.shape[1:]), key, value


def _with_masks(
    row: Row, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, window: int | None,
    cap: float | None,
) -> torch.Tensor:  # fmt: skip
    """The slow way of odd cases (soft-capping, values of another size than keys, devices that have no kernel): a block
    of queries at a time, one mask for all that it may see."""
    # Split and joined, not sliced: the backward of a slice fills a tensor of the whole's size, for every block.
    keys, values, queries = (x.split(BLOCK, 1) for x in (k, v, q))
    some, _ = row.pairs(window)
    outputs = []
    for i, query in enumerate(queries):
        blocks = np.flatnonzero(some[i]).tolist()
        key, value = (torch.cat([x[j] for j in blocks], 1) for x in (keys, values))
        mask = row.whole_mask(i, some[i], window, q.dtype)
        grouped = _grouped(query, key, value, mask)
        outputs.append(fused(*grouped, mask, scale, cap).reshape(len(q), query.shape[1], -1))
    return torch.cat(outputs, 1)
