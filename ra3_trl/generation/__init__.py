"""Generation with latents: where a model thinks, as a knob; text without its thoughts."""

from .processor import ThinkLogitsProcessor
from .strip import strip_latents
from .wrapper import AutoModelForCausalLMWithAbstractionHead, CausalLMOutputWithAbstraction


__all__ = [
    "AutoModelForCausalLMWithAbstractionHead",
    "CausalLMOutputWithAbstraction",
    "ThinkLogitsProcessor",
    "strip_latents",
]
