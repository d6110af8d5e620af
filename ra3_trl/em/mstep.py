"""The M-step: next-token prediction on annotated text, several documents in a row without seeing each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..losses import next_token_loss
from ..records import AnnotatedExample
from ..rollout import Backbone


@dataclass(frozen=True)
class Rows:
    """Rows of packed examples, right-padded: `[R, L]` each. `position_ids` start anew with each example.

    Example: examples of 3 and 2 tokens in one row of length 6 give positions `0 1 2 0 1 0`, the last being padding.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    is_latent: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens that are predicted: those with a label that are not the first of their row."""
        return int((self.labels[:, 1:] != -100).sum())

    def flat(self) -> Rows:
        """All rows behind each other as one, without padding. The first token of a row has no label, as before."""
        real = (self.position_ids > 0) | (self.labels != -100)
        real[:, :-1] |= self.position_ids[:, 1:] == 1  # the first token of an example of two or more
        labels = self.labels.clone()
        labels[:, 0] = -100
        return Rows(*(x[real][None] for x in (self.input_ids, self.position_ids, labels, self.is_latent)))


def split_example(example: AnnotatedExample, max_length: int) -> list[tuple[tuple, tuple, tuple]]:
    """Pieces (ids, labels, is_latent) of at most `max_length` tokens; a later piece begins with the token before it
    as context, so that nothing is lost or trained twice. Chunks leave room for latents, so this is rare."""
    ids, labels, latent = example.input_ids, example.labels, example.is_latent
    pieces, begin = [], 0
    while True:
        end = begin + max_length
        row = (-100, *labels[begin + 1 : end]) if begin else labels[begin:end]
        pieces.append((ids[begin:end], tuple(row), latent[begin:end]))
        if end >= len(ids):
            return pieces
        begin = end - 1


def pack(examples: Sequence[AnnotatedExample], max_length: int, packing: bool) -> Rows:
    """Best-fit-decreasing packing of a batch; every token of every example is in exactly one row.

    TRL's `pack_dataset` works on whole data sets and its default drops overflow; a batch is packed here as it comes.
    """
    pieces = [piece for example in examples for piece in split_example(example, max_length)]
    rows: list[list[tuple]] = []
    room: list[int] = []
    for piece in sorted(pieces, key=lambda p: -len(p[0])) if packing else pieces:
        fits = [i for i, left in enumerate(room) if left >= len(piece[0])] if packing else []
        if fits:
            best = min(fits, key=lambda i: room[i])
            rows[best].append(piece)
            room[best] -= len(piece[0])
        else:
            rows.append([piece])
            room.append(max_length - len(piece[0]))
    length = max(sum(len(p[0]) for p in row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    latent = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = 0
        for piece_ids, piece_labels, piece_latent in row:
            end = at + len(piece_ids)
            ids[i, at:end] = torch.tensor(piece_ids)
            positions[i, at:end] = torch.arange(len(piece_ids))
            labels[i, at:end] = torch.tensor(piece_labels)
            latent[i, at:end] = torch.tensor(piece_latent)
            at = end
    return Rows(ids, positions, labels, latent)


def mstep_loss(
    backbone: Backbone, rows: Rows, num_tokens: float, through: nn.Module | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Next-token loss of a batch of rows; logits only where there is a label, a bounded chunk at a time.

    Documents of a row are kept apart by their position ids (which needs `use_cache=False` and no attention mask);
    padding starts its own "document" at each position 0 and has no labels. The router loss of a mixture of experts is
    added with the batch's share of `num_tokens`, and is computed without padding.
    """
    rows = rows.flat() if backbone.wants_flat_rows else rows
    device = backbone.device
    hidden = backbone.hidden(through, input_ids=rows.input_ids.to(device), position_ids=rows.position_ids.to(device))[
        :, :-1
    ]
    router = backbone.router_loss
    labels = rows.labels[:, 1:].to(device)
    wanted = labels != -100
    logps = backbone.token_logps(hidden[wanted], labels[wanted])
    loss, parts = next_token_loss(logps, rows.is_latent[:, 1:].to(device)[wanted], num_tokens)
    if router is not None:
        loss = loss + router * (rows.num_tokens / num_tokens)
    return loss, parts
