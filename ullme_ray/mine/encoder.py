"""The model that mines: the job's own base or trained model, or any other embedding model that can be loaded here."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from ullme_ray.errors import ModelError
from ullme_ray.model import Encoder, EncoderSettings, base_folder, check_base, encoder_folder, open_encoder
from ullme_ray.model.encoder import Which, load_encoder, read_settings
from ullme_ray.spec.job import EncoderSpec, JobSpec, ModelSpec


def check_encoder(job: JobSpec, spec: EncoderSpec) -> None:
    """Before long work: the model is there and can embed.

    Raises:
        ModelError: with the reason.
    """
    try:
        if spec.base == "trained":
            encoder_folder(job)
        elif spec.base == "base":
            check_base(job)
        else:
            other = _job_of(job, spec)
            check_base(other)
            _settings(other, spec)
    except ModelError as error:
        raise ModelError(f"mine.encoder = {spec.base}: {error}") from error


def open_miner(job: JobSpec, spec: EncoderSpec, *, device: str) -> Encoder:
    """Loads the model.

    Raises:
        ModelError: it cannot be loaded.
    """
    if spec.is_own:
        return open_encoder(job, which=cast(Which, spec.base), device=device)
    other = _job_of(job, spec)
    return load_encoder(base_folder(other), _settings(other, spec), other.model, device=device)


def _job_of(job: JobSpec, spec: EncoderSpec) -> JobSpec:
    """A job whose base is that model. It never runs code that comes with it: the job trusts its own base alone."""
    model = ModelSpec(base=spec.base, revision=spec.revision, dtype=job.model.dtype, hub_token=job.model.hub_token)
    return job.model_copy(update={"model": model, "train": None, "embed": None})


def _settings(other: JobSpec, spec: EncoderSpec) -> EncoderSettings:
    """Those of the model's folder, with what the job sets over them."""
    settings = read_settings(other, base_folder(other))
    if spec.prompts is not None:
        settings = replace(settings, query_prompt=spec.prompts.query, passage_prompt=spec.prompts.passage)
    if spec.pooling is not None:
        settings = replace(settings, pooling=spec.pooling, latent_attention=None)
    return replace(settings, max_tokens=spec.max_tokens or settings.max_tokens)
