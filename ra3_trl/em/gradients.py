"""How a process makes gradients, and when they are exchanged with the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn


@dataclass(frozen=True)
class Gradients:
    """`backward` takes a loss; `syncing` is the context of a forward and its backward pass, told whether it is the
    batch's last; `through` is the wrapped model whose forward must run."""

    backward: Callable[[torch.Tensor], None]
    syncing: Callable[[bool], AbstractContextManager[None]] = lambda last: nullcontext()
    through: nn.Module | None = None

    @classmethod
    def of(cls, accelerator: Accelerator, wrapped: nn.Module, model: nn.Module) -> Gradients:
        """Those of `model`, which accelerate has `wrapped` (or not: then they are the same)."""
        # Processes average their gradients, and the loss is divided by the count over all of them.
        scale = accelerator.num_processes
        options = {"scale_wrt_gas": False} if accelerator.distributed_type == DistributedType.DEEPSPEED else {}

        @contextmanager
        def syncing(last: bool) -> Iterator[None]:
            """Gradients of several backward passes add up; processes exchange them in the last one."""
            if last:
                yield
                return
            before = accelerator.sync_gradients
            accelerator.sync_gradients = False  # DeepSpeed would step after each backward pass
            try:
                with accelerator.no_sync(wrapped):
                    yield
            finally:
                accelerator.sync_gradients = before

        through = None if wrapped is model else wrapped
        return cls(lambda loss: accelerator.backward(loss * scale, **options), syncing, through)
