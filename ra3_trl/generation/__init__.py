"""Generation with latents: where a model thinks, as a knob; text without its thoughts."""

from .processor import ThinkLogitsProcessor
from .sampling import Completion, CompletionSettings, cut_at_stop, draw_completions
from .strip import readable_end, strip_latents
from .vllm_engine import VLLMEngine
from .wrapper import AutoModelForCausalLMWithAbstractionHead, CausalLMOutputWithAbstraction


__all__ = [
    "AutoModelForCausalLMWithAbstractionHead",
    "CausalLMOutputWithAbstraction",
    "Completion",
    "CompletionSettings",
    "ThinkLogitsProcessor",
    "VLLMEngine",
    "cut_at_stop",
    "draw_completions",
    "readable_end",
    "strip_latents",
]
