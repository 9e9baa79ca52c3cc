"""Batch embedding of a corpus into a Delta table on Ray Data. Importing it loads Ray but not torch."""

from ullme_ray.embed.dry_run import dry_run
from ullme_ray.embed.overview import describe_table, verify_table
from ullme_ray.embed.pipeline import preflight, run_embed
from ullme_ray.embed.planning import plan_units
from ullme_ray.embed.report import EmbedReport
from ullme_ray.embed.units import Unit, num_files
from ullme_ray.embed.vacuum import remove_old_files

__all__ = [
    "EmbedReport",
    "Unit",
    "describe_table",
    "dry_run",
    "num_files",
    "plan_units",
    "preflight",
    "remove_old_files",
    "run_embed",
    "verify_table",
]
