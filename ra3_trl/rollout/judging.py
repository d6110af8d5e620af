"""How a model is judged by its own numbers: what rounding alone does to them, and what its forwards may raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .backbone import Backbone


# Right engines differ by at most 1.2 times what one rounding of the embeddings does (13 architectures in bfloat16 and
# float16, logits up to 200, router flips included), engines that ignore a window or soft-capping by 9.6 and more.
ROUNDINGS = 4


# What the forward of somebody's model may raise; anything else is a fault of ours.
FORWARD_ERRORS = (
    ValueError, TypeError, LookupError, RuntimeError, AttributeError, AssertionError, ImportError, ArithmeticError,
    NameError, OSError, MemoryError,
)  # fmt: skip


def in_a_line(error: BaseException) -> str:
    """An error in a line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'...' if len(text) > 200 else ''}".rstrip(".: ")


def rounding_error(backbone: Backbone) -> float:
    """Relative size of a rounding in the model's matrix products."""
    tf32 = backbone.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return max(torch.finfo(backbone.causal_lm.dtype).eps, 2.0**-10 if tf32 else 0.0)


@contextmanager
def rounding(backbone: Backbone) -> Iterator[None]:
    """Puts every embedded number one unit in its last place off inside, to see what the model makes of rounding."""
    generator, eps = torch.Generator().manual_seed(0), rounding_error(backbone)

    def disturb(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        sign = 1 - 2 * torch.randint(0, 2, output.shape, generator=generator)
        return output * (1 + eps * sign).to(output)

    handle = backbone.causal_lm.get_input_embeddings().register_forward_hook(disturb)
    try:
        yield
    finally:
        handle.remove()
