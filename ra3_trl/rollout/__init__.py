"""Latents at many boundaries of a document: sampled, scored, and their log-probs with gradients."""

from .backbone import Backbone, evaluating
from .branch import BranchEngine
from .engine import Boundaries, RolloutEngine
from .expand import ExpandEngine
from .noise import CHOICE, GATE, NoiseKey, keyed_uniform
from .plan import horizon_lines
from .sampler import SamplingParams, check_finite
from .select import build_engine


__all__ = [
    "CHOICE",
    "GATE",
    "Backbone",
    "Boundaries",
    "BranchEngine",
    "ExpandEngine",
    "NoiseKey",
    "RolloutEngine",
    "SamplingParams",
    "build_engine",
    "check_finite",
    "evaluating",
    "horizon_lines",
    "keyed_uniform",
]
