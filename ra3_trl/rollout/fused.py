"""Calls of PyTorch's fused attention, and plain matrix products where that knows no way."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention


def fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float | None, cap: float | None
) -> torch.Tensor:
    """Attention `[B, heads, Q, D]` with an additive mask `[Q, keys]`; soft-capped by `cap`."""
    if cap is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None], scale=scale)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (torch.tanh(scores / cap) * cap + mask).softmax(-1).to(v.dtype) @ v


def causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, window: int | None, cap: float | None
) -> torch.Tensor:
    """Plain causal attention of a document, or of its last tokens: `q` `[heads, last, D]`, `k` and `v`
    `[kv_heads, N, D]`."""
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    length, rest = k.shape[1], q.shape[1]
    if cap is None and (window is None or length <= window) and rest == length:
        return scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scale)[0]
    i = torch.arange(length, device=q.device)
    query = i[length - rest :, None]
    seen = (query >= i) & (query - i < (window or length))
    mask = torch.zeros_like(seen, dtype=q.dtype).masked_fill_(~seen, float("-inf"))
    return fused(q[None], k[None], v[None], mask, scale, cap)[0]


def attention_and_normaliser(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    cap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention `[B, heads, Q, D]` with an additive mask, if any, and the log of its normaliser `[B, heads, Q]`."""
    kind, same_size = q.device.type, q.shape[-1] == v.shape[-1]
    if cap is None and kind == "cpu" and same_size:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    if cap is None and kind not in ("cpu", "mps"):
        wide = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
        out = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, wide, True, scale=scale)
        return out[0], out[1][..., : q.shape[2]]
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = (scores if cap is None else torch.tanh(scores / cap) * cap).float()
    scores = scores if mask is None else scores + mask
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse


def additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where a key is seen. Elsewhere the least number and not `-inf`, of which a row that sees nothing would become
    NaN; rows stand so far apart as accelerators' kernels want."""
    keys = seen.shape[-1]
    mask = torch.zeros((*seen.shape[:-1], -(-keys // 16) * 16), dtype=dtype, device=seen.device)[..., :keys]
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)


def merged(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> torch.Tensor:
    """Attention to the keys of two calls, of their outputs and the logs of their normalisers."""
    weight = torch.sigmoid(other_lse - lse)[..., None]
    return torch.lerp(out.to(weight.dtype), other.to(weight.dtype), weight).to(out.dtype)
