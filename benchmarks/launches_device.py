"""A pretended accelerator: counts, on a machine without one, what the host asks of a device and where it waits.

Tensors of the pretended device are computed by the CPU but are of another type and device, so a program takes the
paths that it takes on an accelerator, a mix of host and device tensors shows, and copies between the two are seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ra3_trl.rollout import ragged


DEVICE = torch.device("meta")  # of all devices a CPU-only torch knows, the one that nothing here has a use for
aten = torch.ops.aten
# The host waits: it needs a number, or a shape that follows from numbers.
_WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
    "is_nonzero", "bincount",
}  # fmt: skip
# Of a tensor of logits they move what an index picks, or nothing but its shape.
_PICKS = {
    "index", "index_select", "gather", "index_put_", "_index_put_impl_", "index_fill_", "index_copy_", "index_add_",
    "scatter_add_", "searchsorted",
}  # fmt: skip
_SHAPE_ONLY = {"new_empty", "new_full", "new_zeros", "zeros_like", "empty_like"}
_FLEX = ragged.flex
_NO_KERNEL = {"detach", "lift_fresh", "_unsafe_view", "alias", "empty", "empty_like", "new_empty", "empty_strided"}


class DeviceTensor(torch.Tensor):
    """Stands for a tensor of the pretended device; `held` has its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> DeviceTensor:
        made: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def to_device(model: nn.Module) -> None:
    """Moves a model to the pretended device, in place."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(DeviceTensor(parameter.data), parameter.requires_grad)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = DeviceTensor(buffer)


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Computes one operation on the CPU; its result is of the device asked for, or of the operands'."""
    made = any(isinstance(x, DeviceTensor) for x in tree_leaves((args, kwargs)))
    if kwargs.get("device") is not None:
        made = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    inner = tree_map_only(DeviceTensor, lambda x: x.held, (args, kwargs))
    summed = made and func is aten.cumsum.default and inner[0][0].is_floating_point()
    if summed and torch.are_deterministic_algorithms_enabled():  # in CUDA's words
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")
    out = _FUSED.get(func, func)(*inner[0], **inner[1])
    if func._schema.name.split("::")[1].endswith("_"):
        return args[0]  # what was changed is the same tensor
    return tree_map_only(torch.Tensor, DeviceTensor, out) if made else out


def _fused_forward(q, k, v, mask, compute_lse, dropout=0.0, is_causal=False, *, scale=None):
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, dropout, is_causal, attn_mask=mask, scale=scale
    )
    none = torch.zeros((), dtype=torch.long)
    return out, lse, none, none.clone()


def _fused_backward(grad, q, k, v, mask, out, lse, seed, offset, dropout, wanted, is_causal=False, *, scale=None):
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, dropout, is_causal, attn_mask=mask, scale=scale
    )
    return (*grads, None)


# Fused attention of accelerators, by the CPU's.
_FUSED: dict[Any, Callable] = {
    aten._scaled_dot_product_efficient_attention.default: _fused_forward,
    aten._scaled_dot_product_efficient_attention_backward.default: _fused_backward,
}


class _Flex(torch.autograd.Function):
    """Flex attention of an accelerator, by the CPU's fused attention: one launch, and in the backward pass two, of
    which one multiplies output and gradient."""

    @staticmethod
    def forward(ctx, q, k, v, watch, row, scale, window, cap):
        there = [int((row.queries[0] >= 0).sum()), row.seen, row.seen]
        leaves = [x.held[0, :, :n].detach().requires_grad_() for x, n in zip((q, k, v), there, strict=True)]
        on_host = watch.rows.get(row.queries.ctypes.data)
        if on_host is None:
            on_host = watch.rows[row.queries.ctypes.data] = ragged.Row(row.queries, row.keys, row.seen)
            on_host.begin(*(torch.as_tensor(x) for x in row.arrays))
        with torch.enable_grad():
            out = ragged.attend(on_host, *leaves, scale, window, cap)
        ctx.watch, ctx.leaves, ctx.out, ctx.shapes = watch, leaves, out, [x.shape for x in (q, k, v)]
        watch.counts.launches += 1
        return DeviceTensor(nn.functional.pad(out.detach(), (0, 0, 0, q.shape[2] - out.shape[1]))[None])

    @staticmethod
    def backward(ctx, grad):
        grads = torch.autograd.grad(ctx.out, ctx.leaves, grad.held[0, :, : ctx.out.shape[1]])
        wide = (
            nn.functional.pad(x, (0, 0, 0, s[2] - x.shape[1]))[None] for x, s in zip(grads, ctx.shapes, strict=True)
        )
        ctx.watch.counts.launches += 2
        return *(DeviceTensor(x) for x in wide), None, None, None, None, None


@dataclass
class Counts:
    """What one phase asked for. `waits` has the number of decoding steps begun before each wait."""

    launches: int = 0
    forwards: list[int] = field(default_factory=list)  # tokens of each
    launches_in_forwards: int = 0
    waits: list[tuple[str, int]] = field(default_factory=list)
    vocabulary_bytes: int = 0
    logits: int = 0

    def __iadd__(self, other: Counts) -> Counts:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


class Watch:
    """Counts by phase what is asked of the pretended device inside `watching()`.

    Args:
        vocab_size (`int`):
            Tensors whose rows are so long are counted as vocabulary bytes, each time that an operation reads or
            writes them.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.by_phase: dict[str, Counts] = {}
        self.mixes: Counter[str] = Counter()  # operations that a real device would refuse
        self.shapes: set[tuple[str, int, int]] = set()  # phase, tokens and, in decoding, own slots attended to
        self.masks: dict[str, dict[int, int]] = {}  # bytes of attention masks by phase and address
        self.rows: dict[int, ragged.Row] = {}  # on the host, by the address of their arrays
        self.step = 0
        self._phases = ["other"]

    @property
    def current(self) -> str:
        return self._phases[-1]

    @property
    def counts(self) -> Counts:
        return self.by_phase.setdefault(self._phases[-1], Counts())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._phases.append(name)
        try:
            yield
        finally:
            self._phases.pop()

    @contextmanager
    def forward(self, tokens: int, slots: int = 0) -> Iterator[None]:
        """Counts a forward of the model."""
        counts, before = self.counts, self.counts.launches
        counts.forwards.append(tokens)
        self.shapes.add((self._phases[-1], tokens, slots))
        yield
        counts.launches_in_forwards += counts.launches - before

    @contextmanager
    def watching(self) -> Iterator[Watch]:
        flexes = patch.object(ragged, "flexes", lambda q, *_: q.device.type == DEVICE.type)
        with _Functions(), _Operations(self), flexes, patch.object(ragged, "flex", self._flex):
            yield self

    def _flex(self, row: ragged.Row, q, k, v, scale: float | None, window: int | None, cap: float | None):
        """Flex attention up to its kernel, which the pretended device has a stand-in for."""

        def kernel(*qkv, block_mask, **kwargs):
            lists = [x for x in tree_leaves(block_mask.as_tuple()) if isinstance(x, torch.Tensor)]
            masks = self.masks.setdefault(self.current, {})
            masks[id(block_mask)] = sum(
                x.numel() * x.element_size() for x in (*lists, *row.columns[0], *row.columns[1])
            )
            return _Flex.apply(*qkv, self, row, scale, window, cap)

        with patch.object(ragged, "compiled_flex", lambda: kernel):
            return _FLEX(row, q, k, v, scale, window, cap)

    def waited(self, why: str) -> None:
        self.counts.waits.append((why, self.step))

    def saw(self, func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """Counts one operation."""
        name = func._schema.name.split("::")[1]
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = [x for x in operands if isinstance(x, DeviceTensor)]
        hosts = [x for x in operands if not isinstance(x, DeviceTensor) and x.dim() > 0]
        results = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        made = any(isinstance(x, DeviceTensor) for x in results)
        if not ours and not made:
            return
        if name in ("_to_copy", "copy_") and (hosts or not made):
            if not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])):
                self.waited("to device" if made else "to host")
            return
        if name in _WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.waited(name)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            index = [x for x in args[1] if x is not None]
            if any(not isinstance(x, DeviceTensor) for x in index):
                self.waited("host index")
            if any(isinstance(x, DeviceTensor) and x.dtype is torch.bool for x in index):
                self.waited("boolean index")
            hosts = [x for x in hosts if not any(x is i for i in index)]
        if hosts:
            self.mixes[name] += 1
        alias = func._schema.returns[0].alias_info if func._schema.returns else None
        if name in _NO_KERNEL or (alias is not None and not alias.is_write):
            return
        self.counts.launches += 1
        if name == "_scaled_dot_product_efficient_attention" and args[3] is not None:
            storage = args[3].held.untyped_storage()
            self.masks.setdefault(self.current, {})[storage.data_ptr()] = storage.nbytes()
        self.counts.vocabulary_bytes += self._moved(name, args, kwargs, results)
        if name in ("mm", "addmm", "linear"):
            self.counts.logits += sum(x.numel() for x in results if self._has_logits(x))

    def _moved(self, name: str, args: tuple, kwargs: dict[str, Any], results: Sequence[torch.Tensor]) -> int:
        """Bytes of logits that an operation reads and writes. One that picks rows or columns by an index moves what it
        picks, and an operand that only gives a shape, or room for the result, is not read."""
        if name in _PICKS:
            # Of a change in place: what is put there, or as many numbers as the index has (in each row of a column).
            put = [x for x in tree_leaves(args[1:]) if isinstance(x, torch.Tensor)] if name.endswith("_") else results
            rows = args[0].numel() // args[0].shape[args[1]] if name == "index_fill_" else 1
            return 2 * max((x.numel() * rows for x in put), default=0) * args[0].element_size()
        read = () if name in _SHAPE_ONLY else tree_leaves((args, {**kwargs, "out": None}))
        moved = [x for x in (*read, *results) if isinstance(x, torch.Tensor) and self._has_logits(x)]
        return sum(x.numel() * x.element_size() for x in moved)

    def _has_logits(self, x: torch.Tensor) -> bool:
        """Tells rows of the vocabulary, in blocks or transposed too, from a transposed weight: its rows are as long,
        but do not have one symbol behind the other."""
        if x.dim() == 2 and x.shape[0] == self.vocab_size and x.stride(0) == 1 < x.shape[1]:
            return True
        return (
            x.dim() > 1
            and x.stride(-1) == 1
            and self.vocab_size in (x.shape[-1], x.shape[-1] * x.shape[-2] * (x.dim() > 2))
        )


class _Operations(TorchDispatchMode):
    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = _run(func, args, kwargs or {})
        self.watch.saw(func, args, kwargs or {}, out)
        return out


class _Functions(TorchFunctionMode):
    """Does what never reaches an operator of the pretended device as it would on a real one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        asked = torch.device(kwargs.get("device") or "cpu").type == DEVICE.type
        if func in (torch.tensor, torch.as_tensor) and asked and not isinstance(args[0], DeviceTensor):
            return func(*args, **{**kwargs, "device": None}).to(DEVICE)
        if func is nn.functional.scaled_dot_product_attention and isinstance(args[0], DeviceTensor):
            q, k, v, *_ = args
            mask, causal = kwargs.get("attn_mask"), kwargs.get("is_causal", False)
            efficient = aten._scaled_dot_product_efficient_attention
            return efficient(q, k, v, mask, torch.is_grad_enabled(), 0.0, causal, scale=kwargs.get("scale"))[0]
        return func(*args, **kwargs)
