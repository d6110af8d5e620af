"""Weights as they were: the frozen reward model, the annotator, the start for the KL, without a second model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def _stored(parameter: nn.Parameter) -> torch.Tensor:
    """Finds what this process stores of a parameter: all of it, FSDP2's or ZeRO-3's part."""
    return getattr(parameter, "ds_tensor", parameter).detach()


def _put(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Gives a parameter other contents: another storage, or a copy where shards are held on to by their storage."""
    if _is_shard(parameter):
        _stored(parameter).copy_(value)
    else:
        parameter.data = value


def _is_shard(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_tensor")


class FrozenWeights:
    """Keeps a snapshot of the trainable parameters of a model as they are now, to be put in their place for a while.

    Of an adapter only the adapter is kept; of full fine-tuning a second copy of the weights.
    """

    def __init__(self, model: nn.Module):
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.values = {name: _stored(p).clone() for name, p in self._parameters.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Gives the model the snapshot's weights inside; for use without gradients."""
        live = {name: _stored(p).clone() if _is_shard(p) else p.data for name, p in self._parameters.items()}
        try:
            for name, p in self._parameters.items():
                _put(p, self.values[name])
            torch.clear_autocast_cache()  # it holds casts by parameter, not by contents
            yield
        finally:
            for name, p in self._parameters.items():
                _put(p, live[name])
            torch.clear_autocast_cache()

    def whole_values(self) -> dict[str, torch.Tensor]:
        """Copies the snapshot to the CPU, put together where it is sharded; every process must call it."""
        with self.applied(), self._gathered(None):
            whole = ((n, p.full_tensor() if isinstance(p, DTensor) else p) for n, p in self._parameters.items())
            as_written = {"memory_format": torch.contiguous_format}  # safetensors takes no strides
            return {name: p.detach().cpu().clone(**as_written) for name, p in whole}  # one at a time

    def load(self, values: dict[str, torch.Tensor]) -> None:
        """Puts saved `values` in place of the snapshot; refuses those of another model."""
        if set(values) != set(self.values):
            names = sorted(set(values) ^ set(self.values))[:3]
            raise ValueError(
                f"frozen weights of another model: {names} differ; resume with the model the run began with."
            )
        with self.applied():
            with torch.no_grad(), self._gathered(0):
                for name, p in self._parameters.items():
                    value = values[name].to(p.device)
                    p.copy_(distribute_tensor(value, p.device_mesh, p.placements) if isinstance(p, DTensor) else value)
            self.values = {name: _stored(p).clone() for name, p in self._parameters.items()}

    def _gathered(self, modifier: int | None) -> AbstractContextManager:
        """Makes ZeRO-3's parameters whole inside; those of process `modifier` hold afterwards."""
        shards = [p for p in self._parameters.values() if hasattr(p, "ds_tensor")]
        if not shards:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(shards, modifier_rank=modifier)


class BaseWeights:
    """Stands for the model without its adapter, to be put in its place for a while; it holds no weights of its own.

    Raises:
        `ValueError`: for a model that is no `PeftModel`.
    """

    def __init__(self, model: nn.Module):
        if not isinstance(model, PeftModel):
            raise ValueError(
                f"`reward_model` is 'base', the model without its adapter, but `model` is a {type(model).__name__}; "
                "pass a `peft_config`, or use 'frozen'."
            )
        self._model = model

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Takes the adapter off inside; for use without gradients."""
        # peft sets `requires_grad` anew on the way out, also of what the user had frozen (LoRA-FA, other adapters).
        trained = [(p, p.requires_grad) for p in self._model.parameters()]
        try:
            with self._model.disable_adapter():
                yield
        finally:
            for p, requires_grad in trained:
                p.requires_grad_(requires_grad)
