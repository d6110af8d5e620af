"""Latents at many boundaries of a document: sampled, scored, and their log-probs with gradients."""

from .backbone import Backbone, evaluating
from .branch import BranchEngine, most_cached
from .engine import Boundaries, RolloutEngine
from .expand import ExpandEngine
from .judging import FORWARD_ERRORS, ROUNDINGS, in_a_line, rounding
from .logps import logits_bytes
from .noise import CHOICE, GATE, NoiseKey, keyed_uniform
from .plan import horizon_lines
from .sampler import SamplingParams, check_finite
from .select import EngineCheck, build_engine, largest


__all__ = [
    "CHOICE",
    "FORWARD_ERRORS",
    "GATE",
    "ROUNDINGS",
    "Backbone",
    "Boundaries",
    "BranchEngine",
    "EngineCheck",
    "ExpandEngine",
    "NoiseKey",
    "RolloutEngine",
    "SamplingParams",
    "build_engine",
    "check_finite",
    "evaluating",
    "horizon_lines",
    "in_a_line",
    "keyed_uniform",
    "largest",
    "logits_bytes",
    "most_cached",
    "rounding",
]
