"""The shape of a job's model, as far as a plan needs it: parameters and widths, counted without loading weights."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ullme_ray import storage
from ullme_ray.errors import ModelError, UllmeError
from ullme_ray.spec import JobSpec

if TYPE_CHECKING:
    from torch import nn


@dataclass
class Shape:
    """What the estimate needs of a model."""

    parameters: int
    trainable: int
    linear: int  # weights of linear layers but the head: those that QLoRA quantizes
    hidden_size: int
    width: int  # of the states in a layer: hidden_size, or all heads together where they are wider, as in Qwen3
    intermediate_size: int
    layers: int
    vocab_size: int
    notes: list[str] = field(default_factory=list)


def shape_of(job: JobSpec) -> Shape:
    """Counts parameters by building the model, and its LoRA adapters, without memory for them.

    Raises:
        ModelError: the model's config cannot be had.
    """
    import torch

    from ullme_ray.model.family import training_class

    notes = []
    config = _config(job)
    with torch.device("meta"):
        model = training_class(config).from_config(config, trust_remote_code=job.model.trust_remote_code)
    if job.model.base == "scratch":
        notes.append(f"the vocabulary has at most {job.model.scratch.vocab_size:,} tokens; fewer if the texts are few")
    parameters = trainable = _count(model)
    head = model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    if job.model.lora is not None:
        from ullme_ray.model.adapters import add_lora
        from ullme_ray.model.dropout import RowSeeds

        with torch.device("meta"):
            trainable = _count(add_lora(model, job.model.lora, RowSeeds()), trained_only=True)
        parameters += trainable
    if job.model.pooling == "latent_attention":
        from ullme_ray.model.latent_attention import LatentAttention

        latent = job.model.latent_attention
        with torch.device("meta"):
            head = _count(LatentAttention(config.get_text_config().hidden_size, latent.latents, latent.heads))
        parameters, trainable = parameters + head, trainable + head
    text = config.get_text_config()
    return Shape(
        parameters=parameters,
        trainable=trainable,
        linear=linear,
        hidden_size=text.hidden_size,
        width=max(text.hidden_size, getattr(text, "num_attention_heads", 0) * (getattr(text, "head_dim", None) or 0)),
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        layers=text.num_hidden_layers,
        vocab_size=text.vocab_size,
        notes=notes,
    )


def _count(model: nn.Module, *, trained_only: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained_only)


def _config(job: JobSpec) -> Any:
    """The base model's config; of a hub or S3 model only `config.json` is fetched."""
    from ullme_ray.model.backbone import load_config

    model = job.model
    if model.base == "scratch":
        from ullme_ray.model.scratch import scratch_config

        return scratch_config(model.scratch, max_tokens=model.max_tokens, vocab_size=model.scratch.vocab_size)
    folder = os.path.expanduser(model.base)
    if os.path.isdir(folder):
        return load_config(folder, trust_remote_code=model.trust_remote_code)
    if storage.is_remote(model.base):
        try:
            content = storage.read_bytes(storage.join(model.base, "config.json"))
        except (UllmeError, FileNotFoundError) as error:
            raise ModelError(f"model.base = {model.base} has no readable config.json: {error}") from error
        with tempfile.TemporaryDirectory() as local:
            storage.write_bytes(f"{local}/config.json", content)
            return load_config(local, trust_remote_code=model.trust_remote_code)
    if folder.startswith((".", "/")) or folder.count("/") > 1:
        raise ModelError(f"model.base = {model.base} is not a folder")
    return load_config(_fetch_hub_config(job), trust_remote_code=model.trust_remote_code)


def _fetch_hub_config(job: JobSpec) -> str:
    from huggingface_hub import hf_hub_download

    model = job.model
    token = model.hub_token.reveal().get_secret_value() if model.hub_token else None
    try:
        return os.path.dirname(hf_hub_download(model.base, "config.json", revision=model.revision, token=token))
    except Exception as error:  # noqa: BLE001 - the hub client raises many kinds; all mean that the config is not to be had
        raise ModelError(
            f"model.base = {model.base} is no local folder, and its config cannot be had from the Hugging Face hub"
            f" ({type(error).__name__}); check the name and the network"
        ) from None
