"""Benchmarks of code, the prompts and samples for them, and pass@k."""

from pathlib import Path

from .card import add_to_card, push_results
from .draw import EvaluationSettings
from .evaluate import Checkpoint, evaluate_passk, evaluate_samples
from .passk import bootstrap_interval, estimate, paired_interval, pass_at_k, share_interval
from .prompts import PROMPT_FORMS, render_prompt, sample_of, stop_strings
from .results import check_k, read_results
from .samples import Sample, read_samples
from .tasks import Benchmark, Task, load_benchmark


PASS_AT_K = str(Path(__file__).parent / "pass_at_k")  # for `evaluate.load`

__all__ = [
    "PASS_AT_K",
    "PROMPT_FORMS",
    "Benchmark",
    "Checkpoint",
    "EvaluationSettings",
    "Sample",
    "Task",
    "add_to_card",
    "bootstrap_interval",
    "check_k",
    "estimate",
    "evaluate_passk",
    "evaluate_samples",
    "load_benchmark",
    "paired_interval",
    "pass_at_k",
    "push_results",
    "read_results",
    "read_samples",
    "render_prompt",
    "sample_of",
    "share_interval",
    "stop_strings",
]
