"""Weights as they were: the frozen reward model, the annotator, the start for the KL, without a second model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def _put(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Gives a parameter other contents: another storage, or a copy where FSDP2 holds on to the storage it shards."""
    if isinstance(parameter, DTensor):
        with torch.no_grad():
            parameter.copy_(value)
    else:
        parameter.data = value


class FrozenWeights:
    """A snapshot of the trainable parameters of a model, to be put in its place for a while.

    Of an adapter only the adapter is kept; of full fine-tuning a second copy of the weights.

    Args:
        model (`nn.Module`):
            The model; its present trainable parameters are the snapshot.
    """

    def __init__(self, model: nn.Module):
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.values = {name: p.detach().clone() for name, p in self._parameters.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the snapshot's weights inside; for use without gradients."""
        live = {name: p.detach().clone() if isinstance(p, DTensor) else p.data for name, p in self._parameters.items()}
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
        """The snapshot on the CPU, put together where it is sharded; every process must call it."""
        return {name: (v.full_tensor() if isinstance(v, DTensor) else v).cpu() for name, v in self.values.items()}

    def load(self, values: dict[str, torch.Tensor]) -> None:
        """Puts saved `values` in place of the snapshot.

        Raises:
            `ValueError`: if they are not of this model.
        """
        if set(values) != set(self.values):
            odd = sorted(set(values) ^ set(self.values))[:3]
            raise ValueError(
                f"frozen weights of another model: {odd} differ; resume with the model the run began with."
            )
        for name, value in values.items():
            kept = self.values[name]
            if isinstance(kept, DTensor):
                value = distribute_tensor(value.to(kept.device), kept.device_mesh, kept.placements)
            kept.copy_(value)


class BaseWeights:
    """The model without its adapter, to be put in its place for a while; it holds no weights of its own.

    Args:
        model ([`~peft.PeftModel`]):
            The model.

    Raises:
        `ValueError`: if it has no adapter.
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
        """The adapter is off inside; for use without gradients."""
        # peft sets `requires_grad` anew on the way out, also of what the user had frozen (LoRA-FA, other adapters).
        trained = [(p, p.requires_grad) for p in self._model.parameters()]
        try:
            with self._model.disable_adapter():
                yield
        finally:
            for p, requires_grad in trained:
                p.requires_grad_(requires_grad)
