"""Keyed noise: one uniform number per (seed, phase, pass, document, boundary, latent, token).

A number depends on its key alone, not on rank, batch, chunk or what was drawn before; that is what makes a resumed run
equal to one left alone, and four small batches equal to a large one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
GATE, CHOICE = -1, -2  # in place of the latent's number: the think decision, the choice among resampled latents


def keyed_uniform(*keys: int | np.ndarray) -> np.ndarray:
    """Uniform numbers in (0, 1), one for each combination of broadcast integer `keys` (splitmix64 over the keys)."""
    state = np.zeros(np.broadcast_shapes(*(np.shape(k) for k in keys)), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            state = (state ^ np.asarray(key, dtype=np.int64).astype(np.uint64)) + _GOLDEN
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return ((state >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


@dataclass(frozen=True)
class NoiseKey:
    """The part of the key that a whole phase or evaluation shares."""

    seed: int
    phase: int
    step: int
    proposal: int = 0  # which of several draws at the same boundary

    def of(self, proposal: int) -> NoiseKey:
        """Noise for another draw at the same boundaries; 0 is this one."""
        return replace(self, proposal=proposal)

    def uniform(
        self, doc_id: int | np.ndarray, index: int | np.ndarray, latent: int | np.ndarray, token: int | np.ndarray
    ) -> np.ndarray:
        """Uniform numbers for boundaries `index` (ordinal of the line in its text) of documents."""
        further = (self.proposal,) if self.proposal else ()
        return keyed_uniform(self.seed, self.phase, self.step, doc_id, index, latent, token, *further)
