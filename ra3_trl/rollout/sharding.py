"""Whole weights for a while: FSDP2 and DeepSpeed ZeRO-3 shard them between any two calls.

A rollout does as many forwards as its documents ask for, a number that differs among processes; were each forward to
gather weights from the others, processes would wait for each other for ever. So weights are gathered once for all
rollouts of an update.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..versions import forget_forwards


def is_fsdp2(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def is_zero3(model: nn.Module) -> bool:
    return any(hasattr(p, "ds_tensor") for p in model.parameters())


def gathered(model: nn.Module) -> AbstractContextManager[None]:
    """Gives every process the whole weights inside, so that a forward exchanges nothing. Every process must enter it;
    not while gradients are being added up. Nothing happens without sharding."""
    if is_fsdp2(model):
        return _gathered_fsdp2(model)
    return _gathered_zero3(model) if is_zero3(model) else nullcontext()


@contextmanager
def _gathered_fsdp2(model: nn.Module) -> Iterator[None]:
    assert isinstance(model, FSDPModule)
    for shard in _shards(model):
        shard.set_reshard_after_forward(False, recurse=False)
        shard.unshard()
    try:
        yield
    finally:
        reshard_layers_only(model)
        forget_forwards(model)  # or the backward pass would prefetch for them


def reshard_layers_only(model: nn.Module) -> None:
    """Makes layers give their weights back after a forward; embeddings and head keep them until the backward pass,
    since the head is applied behind the forward."""
    layers = {m for modules in model.modules() if isinstance(modules, nn.ModuleList) for m in modules}
    for shard in _shards(model):
        shard.set_reshard_after_forward(shard in layers, recurse=False)


def _shards(model: nn.Module) -> list[FSDPModule]:
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


@contextmanager
def _gathered_zero3(model: nn.Module) -> Iterator[None]:
    """Takes DeepSpeed's hooks off meanwhile, which gather and give back around each module."""
    import deepspeed

    hooks = [(m, m._forward_pre_hooks, m._forward_hooks) for m in model.modules()]
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        try:
            for module, _, _ in hooks:
                module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
            yield
        finally:
            for module, before, after in hooks:
                module._forward_pre_hooks, module._forward_hooks = before, after
