"""Batch embedding of a corpus into a Delta table on Ray Data. Importing it loads Ray but not torch."""

from ullme_ray.embed.pipeline import EmbedReport, preflight, run_embed
from ullme_ray.embed.planning import plan_units
from ullme_ray.embed.units import Unit

__all__ = ["EmbedReport", "Unit", "plan_units", "preflight", "run_embed"]
