"""Latents proposed by who has seen the lines that they explain, see docs/hindsight.md.

Training: [`HindsightTrainer`] and [`HindsightConfig`] in the place of [`RA3MidTrainer`] and [`RA3Config`]; a command
takes the two as its own, since with `proposal="causal"` they are no different. A policy that is at hand: [`attach`].
"""

from .proposals import attach


__all__ = ["attach"]
