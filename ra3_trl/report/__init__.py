"""Curves, tables and pages."""

from .curves import plot_run
from .latents import LatentLog, latent_rows, latent_table


__all__ = ["LatentLog", "latent_rows", "latent_table", "plot_run"]
