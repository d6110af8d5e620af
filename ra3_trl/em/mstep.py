"""The M-step: next-token prediction on annotated text, several documents in a row without seeing each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from ..losses import next_token_loss
from ..records import AnnotatedExample
from ..rollout import Backbone
from .learner import Observations, boundary_keys


@dataclass(frozen=True)
class Rows:
    """Rows of packed examples, right-padded: `[R, L]` each. `position_ids` start anew with each example.

    `decision` is 1 behind a token where a latent begins, 0 where one might have, else -1; `gain` what was measured
    there in nats, NaN where nothing was, and `key` `[R, L, 3]` orders these places (see `em/learner.py`).

    Example: examples of 3 and 2 tokens in one row of length 6 give positions `0 1 2 0 1 0`, the last being padding.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    is_latent: torch.Tensor
    decision: torch.Tensor
    gain: torch.Tensor
    key: torch.Tensor

    @classmethod
    def empty(cls, rows: int, length: int) -> Rows:
        """Nothing but padding."""
        ids = torch.zeros(rows, length, dtype=torch.long)
        none = torch.full((rows, length), math.nan)
        no_label = torch.full_like(ids, -100)
        keys = torch.zeros(rows, length, 3, dtype=torch.long)
        return cls(ids, ids.clone(), no_label, ids.bool(), torch.full_like(ids, -1), none, keys)

    @property
    def num_tokens(self) -> int:
        """Tokens that are predicted: those with a label that are not the first of their row."""
        return int((self.labels[:, 1:] != -100).sum())

    @property
    def is_text(self) -> torch.Tensor:
        """Which tokens are not padding."""
        text = (self.position_ids > 0) | (self.labels != -100)
        text[:, :-1] |= self.position_ids[:, 1:] == 1  # the first token of an example of two or more
        return text

    def flat(self) -> Rows:
        """All rows behind each other as one, without padding. The first token of a row has no label, as before."""
        text, labels = self.is_text, self.labels.clone()
        labels[:, 0] = -100
        return Rows(*(column[text][None] for column in (vars(self) | {"labels": labels}).values()))

    def apart(self) -> Rows:
        """Each example in a row of its own, right-padded."""
        flat = self.flat()
        begins = (flat.position_ids[0] == 0).nonzero()[:, 0].tolist()
        lengths = [b - a for a, b in zip(begins, [*begins[1:], flat.input_ids.shape[1]], strict=True)]
        rows = Rows.empty(len(lengths), max(lengths, default=0))
        for name, column in vars(flat).items():
            for row, piece, length in zip(getattr(rows, name), column[0].split(lengths), lengths, strict=True):
                row[:length] = piece
        return rows


def _columns(example: AnnotatedExample) -> Rows:
    """The example as one row."""
    row = Rows.empty(1, len(example.input_ids))
    row.input_ids[0] = torch.tensor(example.input_ids)
    row.position_ids[0] = torch.arange(len(example.input_ids))
    row.labels[0] = torch.tensor(example.labels)
    row.is_latent[0] = torch.tensor(example.is_latent)
    at, boundaries = list(example.decisions), list(example.decisions.values())
    row.decision[0, at] = torch.tensor([int(boundary in example.placed) for boundary in boundaries], dtype=torch.long)
    row.gain[0, at] = torch.tensor([example.gains.get(boundary, math.nan) for boundary in boundaries])
    row.key[0, at] = boundary_keys(example.document, boundaries)
    return row


def split_example(example: AnnotatedExample, max_length: int) -> list[Rows]:
    """Pieces of at most `max_length` tokens; a later piece begins with the token before it as context, so that nothing
    is lost or trained twice. Chunks leave room for latents, so this is rare."""
    whole = _columns(example)
    pieces, begin, length = [], 0, len(example.input_ids)
    while True:
        end = begin + max_length
        piece = Rows(*(column[:, begin:end].clone() for column in vars(whole).values()))
        piece.position_ids[0] = torch.arange(piece.input_ids.shape[1])
        if begin:
            piece.labels[:, 0], piece.decision[:, 0] = -100, -1
        pieces.append(piece)
        if end >= length:
            return pieces
        begin = end - 1


def pack(examples: Sequence[AnnotatedExample], max_length: int, packing: bool) -> Rows:
    """Best-fit-decreasing packing of a batch; every token of every example is in exactly one row.

    TRL's `pack_dataset` works on whole data sets and its default drops overflow; a batch is packed here as it comes.
    """
    pieces = [piece for example in examples for piece in split_example(example, max_length)]
    rows: list[list[Rows]] = []
    room: list[int] = []
    for piece in sorted(pieces, key=lambda p: -p.input_ids.shape[1]) if packing else pieces:
        length = piece.input_ids.shape[1]
        fits = [i for i, left in enumerate(room) if left >= length] if packing else []
        if fits:
            best = min(fits, key=lambda i: room[i])
            rows[best].append(piece)
            room[best] -= length
        else:
            rows.append([piece])
            room.append(max_length - length)
    packed = Rows.empty(len(rows), max(sum(p.input_ids.shape[1] for p in row) for row in rows))
    for i, row in enumerate(rows):
        at = 0
        for piece in row:
            end = at + piece.input_ids.shape[1]
            for field in fields(Rows):
                getattr(packed, field.name)[i, at:end] = getattr(piece, field.name)[0]
            at = end
    return packed


def row_inputs(backbone: Backbone, rows: Rows) -> tuple[Rows, dict[str, Any]]:
    """Makes the rows what a forward takes; also gives the rows in the form in which they run.

    Documents of a row are told apart by what the model's attention reads: flash attention by their lengths, the others
    by position ids that start anew, of which transformers makes a mask (for flex attention a block mask). That needs
    `use_cache=False` and no attention mask. Where the model does not keep them apart, each has a row.
    """
    if not backbone.packs:
        rows = rows.apart()
        seen = rows.is_text
        seen[:, 0] = True
        told: dict[str, Any] = {"attention_mask": seen.long()}
    else:
        rows = rows.flat() if backbone.wants_flat_rows else rows
        told = {"position_ids": rows.position_ids}
        if backbone.reads_lengths:
            told |= _lengths(rows)
    device = backbone.device
    told |= {"input_ids": rows.input_ids}
    return rows, {n: value.to(device) if isinstance(value, torch.Tensor) else value for n, value in told.items()}


def run_rows(backbone: Backbone, rows: Rows, through: nn.Module | None = None) -> tuple[Rows, torch.Tensor]:
    """Runs rows through the decoder: the rows in the form in which they ran, and their hidden states `[R, L, D]`."""
    rows, inputs = row_inputs(backbone, rows)
    return rows, backbone.hidden(through, **inputs)


def _lengths(rows: Rows) -> dict[str, Any]:
    """The lengths of a flat row's documents as flash attention reads them; from position ids it would find them anew
    in every layer, and wait for the device each time."""
    begins = (rows.position_ids[0] == 0).nonzero()[:, 0]
    edges = torch.cat([begins, torch.tensor([rows.position_ids.shape[1]])]).int()
    longest = int(edges.diff().max())
    return {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": longest, "max_length_k": longest}


def mstep_loss(
    backbone: Backbone, rows: Rows, num_tokens: float, through: nn.Module | None = None, loss_type: str = "nll"
) -> tuple[torch.Tensor, dict[str, torch.Tensor], Observations]:
    """Next-token loss of a batch of rows, with the whole router loss of a mixture of experts, which is computed
    without padding.

    Returns:
        The loss, the numbers of [`loss_of_states`], and what the annotation says about the boundaries, for the
        abstraction head.
    """
    rows, hidden = run_rows(backbone, rows, through)
    labels, is_latent = rows.labels.to(backbone.device), rows.is_latent.to(backbone.device)
    loss, numbers = loss_of_states(backbone, hidden, labels, is_latent, num_tokens, loss_type)
    return loss if backbone.router_loss is None else loss + backbone.router_loss, numbers, decisions(rows, hidden)


def loss_of_states(
    backbone: Backbone,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    is_latent: torch.Tensor,
    num_tokens: torch.Tensor | float | None,
    loss_type: str = "nll",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Next-token loss of hidden states `[R, L, D]`; logits only where there is a label, a bounded chunk at a time.

    Args:
        labels (`torch.Tensor`), is_latent (`torch.Tensor`):
            `[R, L]` each; padding has no labels (-100).
        num_tokens (`torch.Tensor` or `float`, *optional*):
            What the sum is divided by; `None` is how many labels there are.

    Returns:
        The loss and the sums and counts of [`~ra3_trl.losses.next_token_loss`], with those that `SFTTrainer` logs:
        `entropy_sum` in nats, and `correct_sum`, how many labels are the likeliest token.
    """
    labels = labels[:, 1:]
    wanted = labels != -100
    if num_tokens is None:
        num_tokens = wanted.sum().clamp(min=1)
    logps, entropy, likeliest = backbone.token_numbers(hidden[:, :-1][wanted], labels[wanted])
    loss, parts = next_token_loss(logps, is_latent[:, 1:][wanted], num_tokens, loss_type)
    return loss, parts | {"entropy_sum": entropy.sum(), "correct_sum": likeliest.sum()}


def decisions(rows: Rows, hidden: torch.Tensor) -> Observations:
    """What the annotation says about boundaries, for the abstraction head."""
    at = rows.decision >= 0
    states, placed = hidden[at.to(hidden.device)].detach().float().cpu(), rows.decision[at].float()
    none = torch.full_like(placed, math.nan)
    return Observations(rows.key[at], states, none, placed, rows.gain[at], none, torch.ones_like(placed))
