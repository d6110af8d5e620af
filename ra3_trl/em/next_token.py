"""The next-token loss of M-updates and of held-out text, as a function of model inputs: what `compute_loss` gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..config import RA3Config
from ..records import Document
from ..rollout import Backbone
from ..segmentation import splice
from .learner import Observations
from .mstep import Rows, mstep_loss, pack, row_inputs


class NextToken:
    """
    Makes rows model inputs with labels, and takes their loss.

    Args:
        backbone ([`~ra3_trl.rollout.Backbone`]):
            The model.
        args ([`RA3Config`]):
            `max_length`, `loss_type`, and the number of processes.

    Attributes:
        seen (`list`):
            Of each loss that had gradients: sums and counts of [`~ra3_trl.losses.next_token_loss`], and what the
            annotation says about boundaries. Who reads them clears it.
    """

    def __init__(self, backbone: Backbone, args: RA3Config):
        self.backbone = backbone
        self.args = args
        self.seen: list[tuple[dict[str, torch.Tensor], Observations]] = []
        self._rows: Rows | None = None  # whose inputs were made last: inputs do not say which tokens are latents

    def inputs(self, rows: Rows) -> dict[str, Any]:
        """`input_ids`, `labels`, and what keeps the documents of a row apart."""
        self._rows, inputs = row_inputs(self.backbone, rows)
        return inputs | {"labels": self._rows.labels.to(self.backbone.device)}

    def inputs_of(self, documents: Sequence[Document]) -> dict[str, Any]:
        """Model inputs of documents as they are, a row each."""
        assert self.args.max_length is not None  # the policy has put the model's own in the place of `None`
        return self.inputs(pack([splice(document, {}) for document in documents], self.args.max_length, packing=False))

    def __call__(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | float | None = None
    ) -> torch.Tensor:
        """The loss of inputs, as `Trainer.compute_loss` gives it: divided by `num_items_in_batch`, those of a whole
        update, and times the number of processes, which average their gradients; without it the mean of the inputs."""
        rows, through = Rows.of(inputs, self._rows), None if model is self.backbone.model else model
        count = max(rows.num_tokens, 1) if num_items_in_batch is None else float(num_items_in_batch)
        loss, parts, seen = mstep_loss(self.backbone, rows, count, through, self.args.loss_type)
        if torch.is_grad_enabled():
            self.seen.append((parts, seen))
        return loss if num_items_in_batch is None else loss * self.args.world_size


def check_overridden(args: RA3Config, kind: type, base: type) -> None:
    """Refuses an E-phase in a trainer of a `kind` that overrides the `compute_loss` of `base`, of which that phase's
    loss is not made, unless it says by `compute_loss_in = "M"` that it knows.

    Raises:
        `ValueError`: naming the class.
    """
    names: Any = kind
    if names.compute_loss is not vars(base)["compute_loss"] and args.e_steps and names.compute_loss_in != "M":
        raise ValueError(
            f"`compute_loss` is overridden in {kind.__name__}, and the loss of an E-phase, of gates and latents, is "
            "not made by it. Set `e_steps=0` for next-token prediction alone, or `compute_loss_in = 'M'` in the class "
            "to have it in M-phases."
        )
