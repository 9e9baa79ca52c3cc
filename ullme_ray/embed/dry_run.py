"""What `ullme-ray embed` would do, without doing it: the plan of a run, and an estimate from a sample of its units.

Costs the plan (a listing, and one read of new or changed text files) and reading up to eight units.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import ray

from ullme_ray.embed.flow import STAGE
from ullme_ray.embed.pipeline import open_run
from ullme_ray.embed.reading import read_unit
from ullme_ray.embed.report import last_rate
from ullme_ray.embed.steps import EmbedContext, tokenize
from ullme_ray.embed.units import Unit, num_files
from ullme_ray.progress import duration
from ullme_ray.ray_data import explained
from ullme_ray.spec.job import JobSpec

_UNITS_SAMPLED = 8
_TEXTS_SAMPLED = 512  # of a unit


@dataclass(frozen=True)
class DryRun:
    """Counts are exact, but those named estimates. Plain texts count with all of their group: see `listing.py`."""

    files: int
    files_new: int
    files_changed: int  # changed themselves, or to be embedded another way than before
    files_unchanged: int
    files_removed: int  # of plain texts, groups
    grouped: bool  # the files are plain texts
    units: int
    units_to_read: int
    rows: int
    rows_to_read: int
    rows_to_embed_estimate: int  # the others are known by their text, or unusable
    tokens_estimate: int
    seconds_estimate: float | None  # at the rate of the last run; None where there was none

    def to_text(self) -> str:
        lines = [
            f"{self.files:,} files: {self.files_new:,} new, {self.files_changed:,} changed, {self.files_unchanged:,} unchanged;"
            f" {self.files_removed:,} removed",
            f"{self.units:,} units of {self.rows:,} rows, of which {self.units_to_read:,} units of {self.rows_to_read:,} rows"
            f" are to be read",
        ]
        if self.grouped:
            lines.append("plain texts are read in groups: a text counts as new or changed with its whole group")
        if self.units_to_read:
            known = self.seconds_estimate is not None
            time = f"{duration(self.seconds_estimate or 0.0)} at the rate of the last run" if known else "time unknown"
            lines.append(f"about {self.rows_to_embed_estimate:,} rows to embed, {self.tokens_estimate:,} tokens, {time}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Sample:
    rows: int
    to_embed: int
    distinct: int
    tokens_per_text: float


def dry_run(job: JobSpec) -> DryRun:
    """Plans a run and samples it; the table's folder stays as it is. Ray must be initialised.

    Raises:
        EmbedError: as `run_embed` would.
    """
    context, plan = open_run(job, measure=False)
    chosen = random.Random(job.seed).sample(plan.missing, min(_UNITS_SAMPLED, len(plan.missing)))
    sample = ray.remote(_sample).options(num_cpus=1)
    try:
        samples: list[_Sample] = ray.get([sample.remote(unit, context) for unit in chosen])
    except ray.exceptions.RayError as error:
        raise explained(STAGE, error) from error
    finally:
        context.close()
    rows_to_read = sum(unit.num_rows for unit in plan.missing)
    scale = rows_to_read / max(1, sum(one.rows for one in samples))
    tokens = scale * sum(one.distinct * one.tokens_per_text for one in samples)
    rate = last_rate(job)
    return DryRun(
        files=num_files(plan.files),
        files_new=num_files(plan.new),
        files_changed=num_files(plan.changed),
        files_unchanged=num_files(plan.files) - num_files(plan.new) - num_files(plan.changed),
        files_removed=plan.num_removed,
        grouped=any(file.members for file in plan.files),
        units=len(plan.done) + len(plan.missing),
        units_to_read=len(plan.missing),
        rows=plan.num_rows,
        rows_to_read=rows_to_read,
        rows_to_embed_estimate=round(scale * sum(one.to_embed for one in samples)),
        tokens_estimate=round(tokens),
        seconds_estimate=tokens / rate if rate else None,
    )


def _sample(unit: Unit, context: EmbedContext) -> _Sample:
    rows = read_unit(unit, context.settings.input, context.settings.types)
    hashes = rows.good["content_hash"].to_pylist()
    is_new = np.ones(len(hashes), bool)
    if context.index is not None and hashes:
        is_new = context.index.find(hashes).entries["count"] == 0
    distinct = {hashes[document]: rows.texts[document] for document in np.flatnonzero(is_new)}
    tokens, _ = tokenize(list(distinct.values())[:_TEXTS_SAMPLED], context)
    per_text = tokens.num_tokens / min(len(distinct), _TEXTS_SAMPLED) if distinct else 0.0
    return _Sample(unit.num_rows, int(is_new.sum()), len(distinct), per_text)
