"""RA3 (Reasoning as Action Abstractions) mid-training for causal language models, in the manner of TRL."""

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .config import RA3Config
    from .generation import AutoModelForCausalLMWithAbstractionHead, ThinkLogitsProcessor, strip_latents
    from .policy import Policy
    from .records import AnnotatedExample, Document, Latent, RolloutGroup
    from .segmentation import ACTION_FORMATS, ActionFormat, load_code_directory, tagged
    from .trainer import RA3MidTrainer

__version__ = metadata.version("ra3-trl")
# Loaded when first asked for, as in transformers and trl: `ra3 --help` must not wait for torch.
_HOMES = {
    "RA3Config": "config",
    "AutoModelForCausalLMWithAbstractionHead": "generation",
    "ThinkLogitsProcessor": "generation",
    "strip_latents": "generation",
    "AnnotatedExample": "records",
    "Document": "records",
    "Latent": "records",
    "RolloutGroup": "records",
    "ACTION_FORMATS": "segmentation",
    "ActionFormat": "segmentation",
    "load_code_directory": "segmentation",
    "tagged": "segmentation",
    "Policy": "policy",
    "RA3MidTrainer": "trainer",
}
__all__ = [
    "ACTION_FORMATS",
    "ActionFormat",
    "AnnotatedExample",
    "AutoModelForCausalLMWithAbstractionHead",
    "Document",
    "Latent",
    "Policy",
    "RA3Config",
    "RA3MidTrainer",
    "RolloutGroup",
    "ThinkLogitsProcessor",
    "__version__",
    "load_code_directory",
    "strip_latents",
    "tagged",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
