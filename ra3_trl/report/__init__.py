"""Curves, tables, pages, trackers, metrics and progress bars."""

from .curves import plot_run
from .latents import LatentLog, latent_rows, latent_table
from .metrics import check_best_metric
from .progress import PhaseProgressCallback, evaluated_batch
from .trackers import check_trackers


__all__ = [
    "LatentLog",
    "PhaseProgressCallback",
    "check_best_metric",
    "check_trackers",
    "evaluated_batch",
    "latent_rows",
    "latent_table",
    "plot_run",
]
