"""Pictures, tables, pages and progress bars."""

from .charts import plot_run
from .latents import LatentLog, latent_rows, latent_table
from .progress import PhaseProgressCallback, evaluated_batch, evaluation_bar
from .table import show_table


__all__ = [
    "LatentLog",
    "PhaseProgressCallback",
    "evaluated_batch",
    "evaluation_bar",
    "latent_rows",
    "latent_table",
    "plot_run",
    "show_table",
]
