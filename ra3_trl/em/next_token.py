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
from .mstep import Rows, decisions, loss_of_states, pack, row_inputs


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
            Of each loss: the sums and counts of [`~ra3_trl.em.mstep.loss_of_states`], with the router loss, not
            weighted, as `aux_loss`; and, where a head learns, what the annotation says about boundaries.
        num_batches (`int`):
            Micro-batches of the update, over which a router loss is averaged.
        notes_boundaries (`bool`):
            Whether there is an abstraction head to learn from them.
    """

    def __init__(self, backbone: Backbone, args: RA3Config):
        self.backbone = backbone
        self.args = args
        self.seen: list[tuple[dict[str, torch.Tensor], Observations | None]] = []
        self.num_batches = 1
        self.notes_boundaries = False
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
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | float | None = None,
        return_outputs: bool = False,
    ) -> Any:
        """The loss of inputs, as `Trainer.compute_loss` gives it: divided by `num_items_in_batch`, those of a whole
        update, and times the number of processes, which average their gradients; without it the mean of the inputs.
        With `return_outputs` also what the model's forward returned, of which the loss was made."""
        labels, through = inputs["labels"], None if model is self.backbone.model else model
        rows = self._rows
        if rows is None or rows.labels.shape != labels.shape:  # somebody else's inputs
            rows = Rows.empty(*labels.shape)
        told = {name: value for name, value in inputs.items() if name != "labels"}
        hidden, outputs = self.backbone.run(told, through, whole=return_outputs)
        device = hidden.device
        is_latent, kind = rows.is_latent.to(device), self.args.loss_type
        loss, parts = loss_of_states(self.backbone, hidden, labels.to(device), is_latent, num_items_in_batch, kind)
        whole_update = num_items_in_batch is not None
        loss = loss * self.args.world_size if whole_update else loss
        if self.backbone.router_loss is not None:
            assert self.backbone.aux_loss is not None
            # As in `SFTTrainer`: a mean over micro-batches, which processes average with their gradients.
            loss = loss + self.backbone.router_loss / (self.num_batches if whole_update else 1)
            parts["aux_loss"] = self.backbone.aux_loss.detach()
        notes = self.notes_boundaries and torch.is_grad_enabled()
        self.seen.append((parts, decisions(rows, hidden) if notes else None))
        return (loss, outputs) if return_outputs else loss

    def read(self) -> list[tuple[dict[str, float], Observations | None]]:
        """What was seen since this was last asked, as numbers."""
        seen, self.seen = self.seen, []
        numbers = [torch.stack([value.double() for value in parts.values()]).tolist() for parts, _ in seen]  # one wait
        return [(dict(zip(parts, n, strict=True)), noted) for n, (parts, noted) in zip(numbers, seen, strict=True)]


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
