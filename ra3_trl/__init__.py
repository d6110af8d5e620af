"""RA3 (Reasoning as Action Abstractions) mid-training for causal language models, in the manner of TRL."""

from importlib import metadata

from .config import RA3Config
from .records import AnnotatedExample, Document, Latent, RolloutGroup
from .segmentation import ACTION_FORMATS, ActionFormat, load_code_directory
from .trainer import RA3MidTrainer


__version__ = metadata.version("ra3-trl")
__all__ = [
    "ACTION_FORMATS",
    "ActionFormat",
    "AnnotatedExample",
    "Document",
    "Latent",
    "RA3Config",
    "RA3MidTrainer",
    "RolloutGroup",
    "__version__",
    "load_code_directory",
]
