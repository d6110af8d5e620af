"""A checkpoint that is ready to think: latents, annotation, held-out numbers, without a trainer."""

from .annotate import MARKUP, annotate, annotate_all
from .blandness import first_latent, gains_over_other, most_thinking
from .bounds import EVAL_NOISE, evaluate_documents, finish_metrics
from .decisions import HeadDecisions, choose_boundaries, choose_by_promise, choose_to_try
from .policy import THINKING, Policy, chunk_length, open_settings
from .propose import OWN_LATENTS, LatentSource, OwnLatents, Proposer
from .text import token_text


__all__ = [
    "EVAL_NOISE",
    "MARKUP",
    "OWN_LATENTS",
    "THINKING",
    "HeadDecisions",
    "LatentSource",
    "OwnLatents",
    "Policy",
    "Proposer",
    "annotate",
    "annotate_all",
    "choose_boundaries",
    "choose_by_promise",
    "choose_to_try",
    "chunk_length",
    "evaluate_documents",
    "finish_metrics",
    "first_latent",
    "gains_over_other",
    "most_thinking",
    "open_settings",
    "token_text",
]
