"""What a forward is made of, on the host: its tokens, how they go to the device, its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .ragged import Row


@dataclass
class BranchTokens:
    """Lists the branch tokens of one forward, on the host; see `BranchPlan`."""

    token: np.ndarray
    branch: np.ndarray  # branch of each, ascending
    slot: np.ndarray  # its place in the branch, think prefix and latent included
    sees: np.ndarray  # it sees the branch's slots below this one,
    run: np.ndarray  # and those from this one up to its own

    def __len__(self) -> int:
        return len(self.token)


def chained(
    chains: Sequence[Sequence[int] | np.ndarray],
    branches: np.ndarray | None = None,
    offsets: np.ndarray | None = None,
) -> BranchTokens:
    """Lists the tokens of `chains`, one a branch (all, or `branches`), from slot 0 or `offsets` on; each sees all
    of its branch before it."""
    lengths = [len(chain) for chain in chains]
    branch = np.repeat(np.arange(len(chains)) if branches is None else branches, lengths)
    first = np.zeros(len(chains), dtype=np.int64) if offsets is None else offsets
    slot = np.concatenate([o + np.arange(n) for o, n in zip(first, lengths, strict=True)])
    token = np.concatenate([np.asarray(chain, dtype=np.int64) for chain in chains])
    return BranchTokens(token, branch, slot, slot + 1, slot)


@dataclass
class Plan:
    """What a forward needs from the host: the lengths of its documents, its branch tokens, `arrays` that go to the
    device, in one copy with others', and who sees whom, if not just documents run."""

    lengths: list[int]
    tokens: BranchTokens | None
    arrays: list[np.ndarray]
    row: Row | None = None
    # Where boundaries may be attended to one by one: their tokens, and blocks of branches.
    blocks: Sequence[tuple[int, int, int]] = ()  # first and last branch, queries of each
    spans: Sequence[tuple[int, int, int, int]] = ()  # first and last token of a boundary, its document, tokens seen


def to_device(device: torch.device, *groups: Sequence[np.ndarray]) -> list[list[torch.Tensor]]:
    """Copies groups of integer arrays in one go: the host waits for each copy."""
    arrays = [np.asarray(array, dtype=np.int64) for group in groups for array in group]
    if not arrays:
        return [[] for _ in groups]
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays])).to(device)
    parts = iter(flat.split([array.size for array in arrays]))
    return [[next(parts).view(np.shape(array)) for array in group] for group in groups]
