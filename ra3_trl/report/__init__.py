"""Curves, tables and pages."""

from .latents import LatentLog, latent_rows, latent_table


__all__ = ["LatentLog", "latent_rows", "latent_table"]
