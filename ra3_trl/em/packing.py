"""Whether documents of one row see each other: found out on the very model, since no list of architectures holds."""

from __future__ import annotations

import logging

import numpy as np
import torch

from ..rollout import FORWARD_ERRORS, ROUNDINGS, Backbone, evaluating, in_a_line, keyed_uniform, rounding
from .mstep import Rows, run_rows


logger = logging.getLogger(__name__)
_TRIES = 3
_LONGEST = 8192  # tokens of a made-up row: with `max_length=None` a row may be as long as the context


def check_packing(backbone: Backbone, max_length: int, packing: bool) -> None:
    """Lets the M-step pack documents into rows where that is exact on this model. Where it is not, each document gets
    a row of its own, with one warning that says why.

    Args:
        backbone ([`~ra3_trl.rollout.Backbone`]):
            The model; `packs` is set.
        max_length (`int`):
            Longest row: what matters only far out, such as a window or a chunk of attention, must show.
        packing (`bool`):
            Whether rows are to be packed at all. Flash attention and router losses want them in one row even if not.
    """
    backbone.packs = packing or backbone.wants_flat_rows
    if not backbone.packs:
        return
    with torch.no_grad(), evaluating(backbone.model), backbone.gathered():
        reason = _leak(backbone, max_length)
    if reason is not None:
        backbone.packs = False
        logger.warning(
            "`packing` is not exact on %s, so each document has a row of its own: %s.",
            type(backbone.causal_lm).__name__, reason,
        )  # fmt: skip


def _leak(backbone: Backbone, max_length: int) -> str | None:
    """Says how documents in one row differ from the same alone; `None` where they do not.

    A router near a tie may choose otherwise for a rounding; a leak shows with any text.
    """
    reason = None
    for seed in range(_TRIES):
        try:
            reason = _Trial(backbone, min(max_length, _LONGEST), seed).reason()
        except FORWARD_ERRORS as error:
            return f"a packed row fails ({in_a_line(error)})"
        if reason is None:
            return None
    return reason


class _Trial:
    """Made-up documents, in two packed rows in another order each, and what becomes of their hidden states.

    Two things must hold. The third document's states stay as they are when the others change: the shapes are the same,
    so not even rounding may differ, but where experts see tokens of all rows; how much that does is seen in a row of
    a batch when the other row changes. And every document's states are those of the document alone, but for rounding:
    this finds positions that do not start anew.
    """

    def __init__(self, backbone: Backbone, max_length: int, seed: int):
        self.backbone = backbone
        lengths = [1, max_length // 8, max_length // 2, max_length - 1 - max_length // 8 - max_length // 2]
        ids, others = (
            torch.as_tensor((keyed_uniform(seed, i, np.arange(max_length)) * backbone.vocab_size).astype(np.int64))
            for i in range(2)
        )
        self.documents = [document for document in ids.split(lengths) if len(document)]
        self.others = [document for document in others.split(lengths) if len(document)]
        self.kept = len(self.documents) - 2 if len(self.documents) > 1 else 0
        self.eps = torch.finfo(backbone.causal_lm.dtype).eps
        # On a CPU the same shapes give the same sums, but for experts; elsewhere not always.
        self.repeatable = max(
            16 * torch.finfo(torch.float32).eps, 0 if backbone.device.type == "cpu" else self.eps / 2
        )

    def reason(self) -> str | None:
        alone = [self._alone(document) for document in self.documents]
        scale = max(float(states.abs().max()) for states in alone)
        packed = self._packed(self.documents)
        changed = self.others.copy()
        changed[self.kept] = self.documents[self.kept]
        pairs = zip(packed[self.kept], self._packed(changed)[self.kept], strict=True)
        moved = max(_difference(*pair) for pair in pairs)
        if moved > ROUNDINGS * self._of_other_rows() + self.repeatable * scale:
            return f"hidden states of a document change by {moved / scale:.2g} of their size with others in its row"
        with rounding(self.backbone):
            disturbed = [self._alone(document) for document in self.documents]
        noise = max(_difference(a, b) for a, b in zip(alone, disturbed, strict=True))
        bound = max(ROUNDINGS * noise, 16 * self.eps * scale)
        difference = max(_difference(p, a) for a, both in zip(alone, packed, strict=True) for p in both)
        if difference > bound:
            return f"hidden states in a row are {difference / scale:.2g} of their size off those of a document alone"
        return None

    def _alone(self, document: torch.Tensor) -> torch.Tensor:
        return self.backbone.hidden(input_ids=document[None].to(self.backbone.device))[0]

    def _packed(self, documents: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        """Hidden states of each document in both rows."""
        order = [*range(len(documents))]
        cut = [[documents[i] for i in order], [documents[i] for i in reversed(order)]]
        rows = Rows.empty(2, sum(map(len, documents)))
        rows.input_ids[:] = torch.stack([torch.cat(row) for row in cut])
        rows.position_ids[:] = torch.stack([torch.cat([torch.arange(len(d)) for d in row]) for row in cut])
        rows.labels[:] = rows.input_ids  # no padding
        hidden = run_rows(self.backbone, rows)[1].flatten(0, 1)
        states = hidden.split([len(document) for row in cut for document in row])
        return [[states[i], states[-1 - i]] for i in order]

    def _of_other_rows(self) -> float:
        """By how much a row changes with the other row of a batch, which it cannot see."""
        rows = [torch.cat(documents)[: 1 + len(self.documents[-1])] for documents in (self.documents, self.others)]
        device = self.backbone.device
        a, b = (self.backbone.hidden(input_ids=torch.stack([rows[0], x]).to(device))[0] for x in (rows[0], rows[1]))
        return _difference(a, b)


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference; infinite where one is no number, since nothing is known then."""
    return float((a - b).abs().max().nan_to_num(nan=torch.inf))
