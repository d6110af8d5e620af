"""From hidden states to log-probs of symbols, without keeping logits: a chunk of rows at a time, each logit moved as
few times as can be.

Of a row only two numbers are wanted, the target's logit and the log of the sum over all that is allowed. What is
forbidden is an additive mask, which rides on the matrix product as a bias; the stop symbol is merged by not forbidding
any of its tokens. In the backward pass a chunk's logits are made once more and turned into their own gradient, so that
neither logits nor their gradient ever exist whole. Where the head's weight is frozen, the gradient in hidden states is
computed in the forward pass and nothing is made twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch


_LOGITS = 1 << 23  # of a chunk on the CPU: 32 MB, and as much again for what is made of them
_MOST_LOGITS = 1 << 27  # of a chunk on CUDA, where large matrix products are fast
_BYTES = 12  # a logit, at most, while a chunk is worked on: logits, probabilities and a copy for the matrix product
_SHARE = 8  # a chunk takes this part of what is free


def rows_at_once(device: torch.device, vocab_size: int) -> int:
    """Counts the rows of logits that are made together: on CUDA as many as an eighth of the free memory holds, up to
    2^27 logits; elsewhere 2^23, and so under deterministic algorithms, since a chunk's size decides rounding."""
    if device.type == "cpu":
        # Rounded up: of float32 that is 32 MiB or more, which glibc maps by itself and gives back. Of a little less it
        # makes holes in its heap, into which the next chunk does not fit: 1.9 GB for 4,000 rows of 49,152 logits.
        return -(-_LOGITS // vocab_size)
    logits = _LOGITS
    if device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + cached
        logits = min(_MOST_LOGITS, free // (_SHARE * _BYTES))
    return max(1, logits // vocab_size)


def logits_bytes(device: torch.device, vocab_size: int) -> int:
    """Bounds the bytes of logits, and of what is made of them, that there are at a time."""
    return rows_at_once(device, vocab_size) * vocab_size * _BYTES


def exact(logits: torch.Tensor) -> torch.dtype:
    """The type that gradients and what a loss is made of are computed in: float32, of float64 that."""
    return torch.promote_types(logits.dtype, torch.float32)


@dataclass(frozen=True)
class Part:
    """Marks rows that share what is forbidden, and what their logits are multiplied by."""

    rows: slice
    mask_V: torch.Tensor | None = None  # 0, or `-inf` where forbidden
    scale: float = 1.0


@dataclass(frozen=True)
class Targets:
    """Lists the symbol whose log-prob is wanted of each row, and what is forbidden there.

    `parts` tile the rows. At the rows `stops` the symbol is the stop: all of `stop_ids`.
    """

    token_n: torch.Tensor
    parts: Sequence[Part]
    stops: np.ndarray | None = None  # ascending
    stop_ids: torch.Tensor | None = None

    @classmethod
    def of_tokens(cls, token_n: torch.Tensor) -> Targets:
        """Tokens under the model's own distribution: nothing is forbidden."""
        return cls(token_n, [Part(slice(0, len(token_n)))])

    def behind(self, token_n: torch.Tensor) -> Targets:
        """These targets behind tokens under the model's own distribution."""
        first = len(token_n)
        parts = [replace(p, rows=slice(p.rows.start + first, p.rows.stop + first)) for p in self.parts]
        stops = None if self.stops is None else self.stops + first
        tokens = torch.cat([token_n, self.token_n])
        return Targets(tokens, [Part(slice(0, first)), *parts], stops, self.stop_ids)

    def cut(self, most: int) -> Iterator[tuple[slice, Targets]]:
        """Cuts them into chunks of `most` rows at most, whose parts and stops are counted from their first row on."""
        for begin in range(0, max(1, len(self.token_n)), most):
            end = min(begin + most, len(self.token_n))
            parts = [
                replace(part, rows=slice(max(part.rows.start, begin) - begin, min(part.rows.stop, end) - begin))
                for part in self.parts
                if part.rows.start < end and part.rows.stop > begin or begin == end
            ]
            inside = None if self.stops is None else self.stops[slice(*np.searchsorted(self.stops, (begin, end)))]
            stops = None if inside is None or not len(inside) else inside - begin
            yield slice(begin, end), Targets(self.token_n[begin:end], parts, stops, self.stop_ids)

    def logits(self, hidden_nD: torch.Tensor, weight_VD: torch.Tensor, scale: float) -> torch.Tensor:
        """Scaled logits `[n, V]`, `-inf` where forbidden: the mask rides on the matrix product as a bias."""
        logits = hidden_nD.new_empty(len(hidden_nD), len(weight_VD))
        for part in self.parts:
            if part.mask_V is None:
                torch.mm(hidden_nD[part.rows], weight_VD.T, out=logits[part.rows])
            else:
                mask = part.mask_V.to(logits.dtype)
                torch.addmm(mask, hidden_nD[part.rows], weight_VD.T, out=logits[part.rows])
        plain = all(part.scale * scale == 1.0 for part in self.parts)
        return logits if plain else self.scaled_(logits.to(exact(logits)), scale)

    def scaled_(self, x_nX: torch.Tensor, scale: float) -> torch.Tensor:
        """Multiplies rows, in place, by what their logits are multiplied by: `scale`, and that of their part."""
        for part in self.parts:
            if part.scale * scale != 1.0:
                x_nX[part.rows].mul_(part.scale * scale)
        return x_nX

    def logps(self, scaled_nV: torch.Tensor) -> torch.Tensor:
        """Log-probs `[n]` of the symbols."""
        logps_nV = torch.log_softmax(scaled_nV, -1, dtype=torch.float32)
        logps = logps_nV.gather(-1, self.token_n[:, None])[:, 0]
        if self.stops is not None:
            rows = torch.as_tensor(self.stops, device=logps.device)
            logps[rows] = logps_nV[rows[:, None], self.stop_ids].logsumexp(-1)
        return logps

    def excess(self, scaled_nV: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Probabilities less the symbol's own, which would be one: minus the log-prob's gradient in the scaled logits,
        in the type of the matrix products."""
        excess = torch.softmax(scaled_nV, -1, dtype=exact(scaled_nV))
        own = excess.new_full((len(excess), 1), -1.0)
        if self.stops is not None:
            rows = torch.as_tensor(self.stops, device=excess.device)
            own[rows] = 0.0
            stop = torch.softmax(scaled_nV[rows[:, None], self.stop_ids], -1, dtype=exact(scaled_nV))
            excess.index_put_((rows[:, None], self.stop_ids), -stop, accumulate=True)
        return excess.scatter_add_(1, self.token_n[:, None], own).to(dtype)


def token_numbers(scaled_nV: torch.Tensor, token_n: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Log-probs `[n]` of tokens, the entropies of their distributions in nats, and whether each token is the (first)
    likeliest; only the log-probs have gradients."""
    logps_nV = torch.log_softmax(scaled_nV, -1, dtype=exact(scaled_nV))
    logps_n = logps_nV.gather(-1, token_n[:, None])[:, 0]
    with torch.no_grad():
        likeliest_n = logps_nV.argmax(-1) == token_n
        probs_nV = logps_nV.exp()
        return logps_n, torch.special.entr(probs_nV, out=probs_nV).sum(-1), likeliest_n


class _LinearLogps(torch.autograd.Function):
    """Log-probs of targets under a head that is one matrix, with its gradients; and, if `watched`, what is for the log
    ([`token_numbers`])."""

    @staticmethod
    def forward(
        ctx: Any, hidden_nD: torch.Tensor, weight_VD: torch.Tensor, targets: Targets, most: int, scale: float,
        watched: bool,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        """`most` rows go together; `scale` is what all logits are multiplied by."""
        frozen = ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        columns, slopes = [], []
        for rows, chunk in targets.cut(most):
            scaled = chunk.logits(hidden_nD[rows], weight_VD, scale)
            columns.append(token_numbers(scaled, chunk.token_n) if watched else (chunk.logps(scaled),))
            if frozen:
                slopes.append(chunk.scaled_(chunk.excess(scaled, weight_VD.dtype) @ weight_VD, -scale))
        ctx.save_for_backward(hidden_nD, weight_VD, torch.cat(slopes) if frozen else None)
        ctx.targets, ctx.most, ctx.scale = targets, most, scale
        logps, *numbers = (torch.cat(column) for column in zip(*columns, strict=True))
        ctx.mark_non_differentiable(*numbers)
        return logps, *numbers

    @staticmethod
    def backward(ctx: Any, grad_n: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        hidden_nD, weight_VD, slope_nD = ctx.saved_tensors
        if slope_nD is not None:
            return (slope_nD * grad_n[:, None]).to(hidden_nD.dtype), None, None, None, None, None
        hidden_grad = torch.empty_like(hidden_nD) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight_VD)
        for rows, chunk in ctx.targets.cut(ctx.most):
            scaled = chunk.logits(hidden_nD[rows], weight_VD, ctx.scale)
            excess = chunk.excess(scaled, weight_VD.dtype)
            del scaled
            # Rows are scaled on the narrow side of the products, so that no pass over the logits is spent on it.
            factor = chunk.scaled_(-grad_n[rows, None], ctx.scale).to(weight_VD.dtype)
            weight_grad.addmm_(excess.T, hidden_nD[rows] * factor)
            if hidden_grad is not None:
                hidden_grad[rows] = excess @ weight_VD * factor
        return hidden_grad, weight_grad, None, None, None, None


def linear_logps(
    hidden_nD: torch.Tensor, weight_VD: torch.Tensor, targets: Targets, most: int, scale: float, watched: bool = False
) -> tuple[torch.Tensor, ...]:
    """Log-probs `[n]` of targets under a head that is one matrix, `most` rows at a time; in mixed precision in the
    type that its product is in. Of plain tokens also what is for the log ([`token_numbers`]), if `watched`."""
    device = hidden_nD.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        hidden_nD, weight_VD = (x.to(torch.get_autocast_dtype(device)) for x in (hidden_nD, weight_VD))
    return _LinearLogps.apply(hidden_nD, weight_VD, targets, most, scale, watched)
