"""Weights as they were: the frozen reward model, the annotator, the start for the KL, without a second model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


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
        live = {name: p.data for name, p in self._parameters.items()}
        try:
            for name, p in self._parameters.items():
                p.data = self.values[name]
            yield
        finally:
            for name, p in self._parameters.items():
                p.data = live[name]

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
            self.values[name].copy_(value)
