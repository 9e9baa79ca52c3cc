"""The ranges of int8 and uint8 vectors: measured on a sample of the corpus before the first run, and kept by all later ones.

The first run of such a table loads the model once more for it, and embeds up to 10,000 texts.
"""

from __future__ import annotations

import random

import ray

from ullme_ray.embed.flow import STAGE
from ullme_ray.embed.planning import split_file
from ullme_ray.embed.steps import EmbedContext, sample_vectors
from ullme_ray.embed.units import InputFile, Unit, embed_section
from ullme_ray.errors import EmbedError
from ullme_ray.ray_data import explained
from ullme_ray.vectors import SAMPLE_ROWS, VectorFormat, keep_ranges

_FILES_SAMPLED = 16
_UNITS_SAMPLED = 32


def measure_ranges(context: EmbedContext, files: list[InputFile]) -> VectorFormat:
    """The table's vector format with ranges, which this measures and keeps.

    Raises:
        EmbedError: no row of the sample can be embedded.
    """
    wanted, fingerprint = context.settings.vectors, context.settings.fingerprint
    choice = random.Random(context.job.seed)
    chosen = choice.sample(files, min(_FILES_SAMPLED, len(files)))
    embed = embed_section(context.job)
    split = ray.remote(split_file).options(num_cpus=1)
    measure = ray.remote(sample_vectors).options(num_cpus=embed.actors.cpus_per_actor, num_gpus=embed.actors.gpus_per_actor)
    try:
        units: list[Unit] = [unit for some in ray.get([split.remote(f, embed.rows_per_unit) for f in chosen]) for unit in some]
        sampled = choice.sample(units, min(_UNITS_SAMPLED, len(units)))
        vectors = ray.get(measure.remote(sampled, SAMPLE_ROWS, context))  # (N, D)
    except ray.exceptions.RayError as error:
        raise explained(STAGE, error) from error
    if not len(vectors):
        raise EmbedError(
            f"embed.output.dtype = {wanted.dtype} needs a sample of the corpus to measure ranges on, and no row of "
            f"{chosen[0].path} and {len(chosen) - 1} other files can be embedded; check embed.input.text and embed.input.id"
        )
    return keep_ranges(context.folder, fingerprint, wanted.calibrated(vectors))
