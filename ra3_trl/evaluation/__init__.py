"""Benchmarks of code, the prompts and samples for them, and pass@k."""

from pathlib import Path

from .card import add_to_card, card_results, push_results
from .draw import draw_samples, plan_batches
from .passk import bootstrap_interval, estimate, paired_interval, pass_at_k
from .prompts import PROMPT_FORMS, render_prompt, sample_of, stop_strings
from .results import Scorer, check_k, read_results, summarise, write_results
from .samples import Sample, read_samples
from .tasks import Benchmark, Task, load_benchmark


PASS_AT_K = str(Path(__file__).parent / "pass_at_k")  # for `evaluate.load`

__all__ = [
    "PASS_AT_K",
    "PROMPT_FORMS",
    "Benchmark",
    "Sample",
    "Scorer",
    "Task",
    "add_to_card",
    "bootstrap_interval",
    "card_results",
    "check_k",
    "draw_samples",
    "estimate",
    "load_benchmark",
    "paired_interval",
    "pass_at_k",
    "plan_batches",
    "push_results",
    "read_results",
    "read_samples",
    "render_prompt",
    "sample_of",
    "stop_strings",
    "summarise",
    "write_results",
]
