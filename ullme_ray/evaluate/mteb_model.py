"""The job's embedder as mteb sees a model: prompts by task, metadata, and a place in mteb's registry."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from mteb.models.abs_encoder import AbsEncoder, get_prompt
from mteb.models.model_implementations import MODEL_REGISTRY
from mteb.models.model_meta import ModelMeta, ScoringFunction

from ullme_ray import storage
from ullme_ray.evaluate.contenders import newest, settings_of
from ullme_ray.model import encoder_fingerprint, encoder_folder, open_encoder
from ullme_ray.model.backbone import DTYPES, load_config
from ullme_ray.model.encoder import EncoderSettings, read_settings
from ullme_ray.model.family import backbone_class
from ullme_ray.model.latent_attention import LatentAttention
from ullme_ray.spec import JobSpec

Encode = Callable[[list[str], str], np.ndarray]  # texts and the prompt before each -> (N, D) float32 unit rows


class JobModel(AbsEncoder):
    """mteb calls `encode` with what it calls inputs; this gives texts and prompt to any function that encodes."""

    def __init__(self, meta: ModelMeta, prompts: dict[str, str], encode: Encode) -> None:
        self.mteb_model_meta = meta
        self.model_prompts = prompts
        self._encode = encode

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> np.ndarray:
        texts = [text for batch in inputs for text in batch["text"]]
        return self._encode(texts, get_prompt(self.model_prompts, task_metadata, prompt_type) or "")


def prompts_of(job: JobSpec) -> dict[str, str]:
    """Under mteb's names: those of the model for queries and documents, then `evaluate.mteb_prompts` by task.

    Texts that are neither, as in STS and clustering, have no prompt unless mteb_prompts gives one: so a sentence-transformers
    export behaves too.
    """
    settings = read_settings(job, encoder_folder(job, newest(job)))
    own = {"query": settings.query_prompt, "document": settings.passage_prompt}
    return {**own, **settings_of(job).mteb_prompts}


def model_meta(job: JobSpec) -> ModelMeta:
    """What mteb stores beside the results. Its revision names weights, tokenizer and prompts: another model has other files.

    What is None is not known here: a base's languages, licence and training data are not those of what was trained from it.
    """
    folder = encoder_folder(job, newest(job))
    settings = read_settings(job, folder)
    prompts = prompts_of(job)
    config = load_config(folder, trust_remote_code=job.model.trust_remote_code)
    parameters, embeddings = _parameters(job, config, settings)
    made_of = json.dumps([encoder_fingerprint(job, which=newest(job)), sorted(prompts.items())])
    return ModelMeta(
        loader=partial(load_model, job=job),
        name=f"ullme_ray/{job.name}",
        revision=hashlib.sha256(made_of.encode()).hexdigest()[:40],
        release_date=None,
        languages=None,
        n_parameters=parameters,
        n_embedding_parameters=embeddings,
        memory_usage_mb=round(parameters * DTYPES[settings.dtype].itemsize / 2**20, 1),
        max_tokens=settings.max_tokens,
        embed_dim=int(config.get_text_config().hidden_size),
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch", "Sentence Transformers"],
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=any(prompts.values()),
        training_datasets=None,
        adapted_from=_hub_name(job.model.base),
    )


def _parameters(job: JobSpec, config: Any, settings: EncoderSettings) -> tuple[int, int]:
    """How many numbers the model that encodes has, and how many of them are its table of tokens; needs no memory for them."""
    with torch.device("meta"):
        backbone = backbone_class(config).from_config(config, trust_remote_code=job.model.trust_remote_code)
        parts = [backbone]
        if settings.latent_attention is not None:
            parts.append(LatentAttention(config.get_text_config().hidden_size, *settings.latent_attention))
    total = sum(parameter.numel() for part in parts for parameter in part.parameters())
    return total, backbone.get_input_embeddings().weight.numel()


def _hub_name(base: str) -> str | None:
    """A base by the name that others know it by; a folder has none."""
    is_folder = base == "scratch" or storage.is_remote(base) or os.path.isdir(os.path.expanduser(base))
    return None if is_folder else base


def load_model(name: str, revision: str | None = None, device: str | None = None, *, job: JobSpec, **kwargs: Any) -> JobModel:
    """What mteb's `get_model` calls: the model in this process."""
    encoder = open_encoder(job, which=newest(job), device=device)
    return JobModel(model_meta(job), prompts_of(job), encoder.encode_prompted)


def register(job: JobSpec) -> ModelMeta:
    """Makes the job's model known to mteb in this process, under the name `ullme_ray/JOB`."""
    meta = model_meta(job)
    MODEL_REGISTRY[str(meta.name)] = meta
    return meta
