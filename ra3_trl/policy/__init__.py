"""A checkpoint that is ready to think: latents, annotation, held-out numbers, without a trainer."""

from .annotate import MARKUP, WINDOW, annotate, annotate_all, annotate_proposed
from .annotators import Annotation, Annotator, Comment, Proposed, Source, source_of
from .blandness import first_latent, gains_over_other, most_thinking
from .bounds import EVAL_NOISE, HELD_OUT, HELD_OUT_HINDSIGHT, evaluate_documents, finish_metrics
from .decisions import HeadDecisions, choose_boundaries, choose_by_promise, choose_to_try
from .policy import THINKING, Policy, chunk_length, open_settings
from .propose import OWN_LATENTS, LatentSource, OwnLatents, Proposer
from .tally import Tally
from .text import token_text


__all__ = [
    "EVAL_NOISE",
    "HELD_OUT",
    "HELD_OUT_HINDSIGHT",
    "MARKUP",
    "WINDOW",
    "OWN_LATENTS",
    "THINKING",
    "Annotation",
    "Annotator",
    "Comment",
    "HeadDecisions",
    "LatentSource",
    "OwnLatents",
    "Policy",
    "Proposed",
    "Proposer",
    "Source",
    "Tally",
    "annotate",
    "annotate_all",
    "annotate_proposed",
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
    "source_of",
    "token_text",
]
