"""Latents proposed by who has seen the lines that they explain, see docs/hindsight.md.

Training: [`HindsightTrainer`] and [`HindsightConfig`] in the place of [`RA3MidTrainer`] and [`RA3Config`]; with
`proposal="causal"` the two are no different. A policy that is at hand: [`attach`].
"""

from .config import HindsightConfig
from .proposals import Proposal, Proposals, attach, make_proposals
from .trainer import HindsightTrainer


__all__ = ["HindsightConfig", "HindsightTrainer", "Proposal", "Proposals", "attach", "make_proposals"]
