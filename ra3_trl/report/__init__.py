"""Pictures, tables, pages and progress bars."""

from .charts import plot_run
from .latents import LatentLog, latent_rows, latent_table
from .progress import PhaseProgressCallback, evaluated_batch


__all__ = [
    "LatentLog",
    "PhaseProgressCallback",
    "evaluated_batch",
    "latent_rows",
    "latent_table",
    "plot_run",
]
