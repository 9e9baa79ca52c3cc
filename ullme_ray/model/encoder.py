"""The embedder as every stage uses it: weights, tokenizer, prompts and pooling in one object.

Loading costs the weights' size in memory and one probe; `open_tokenizer` and `encoder_fingerprint` load no weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch

from ullme_ray import storage
from ullme_ray.errors import ModelError, StorageError
from ullme_ray.model.backbone import base_folder, first_position, load_backbone
from ullme_ray.model.encode import encode_batch, pad_tokens
from ullme_ray.model.family import check_length
from ullme_ray.model.tokenizing import PromptName, TextTokenizer, Tokens, load_tokenizer
from ullme_ray.spec.job import JobSpec, ModelSpec
from ullme_ray.spec.run_folder import RunFolder

Which = Literal["trained", "base"]
_POOLING_KEYS = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "lasttoken": "pooling_mode_lasttoken",
    "weightedmean": "pooling_mode_weightedmean_tokens",
}


@dataclass(frozen=True)
class EncoderSettings:
    """All that decides a text's vector beside weights and tokenizer."""

    pooling: str
    max_tokens: int
    query_prompt: str
    passage_prompt: str
    dtype: str

    @classmethod
    def of(cls, model: ModelSpec) -> EncoderSettings:
        return cls(model.pooling, model.max_tokens, model.prompts.query, model.prompts.passage, model.dtype)


class Encoder:
    """Texts in, unit vectors out; one process, one device."""

    def __init__(self, backbone: Any, tokenizer: TextTokenizer, settings: EncoderSettings, fingerprint: str) -> None:
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.settings = settings
        self.fingerprint = fingerprint
        self.dim = int(backbone.config.get_text_config().hidden_size)
        self.device = next(backbone.parameters()).device

    def encode(self, texts: Sequence[str], prompt: PromptName = "passage", *, tokens_per_batch: int = 8192) -> np.ndarray:
        """(N, D) float32 unit rows, in the order of `texts`."""
        return self.embed_tokens(self.tokenizer.tokenize(texts, prompt), tokens_per_batch=tokens_per_batch)

    @torch.inference_mode()
    def embed_tokens(self, tokens: Tokens, *, tokens_per_batch: int = 8192) -> np.ndarray:
        """(N, D) float32 unit rows in input order; inside, length-sorted batches of up to `tokens_per_batch` padded tokens."""
        vectors = np.empty((len(tokens.input_ids), self.dim), dtype=np.float32)
        for rows in token_budget_batches([len(ids) for ids in tokens.input_ids], tokens_per_batch):
            batch = pad_tokens(tokens, rows, self.tokenizer.pad_id).to(self.device)
            vectors[rows] = encode_batch(self.backbone, batch, self.settings.pooling).cpu().numpy()
        return vectors


def token_budget_batches(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Row numbers grouped so that rows x longest row stays within the budget; a longer row goes alone. Longest first."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    start = 0
    while start < len(order):
        rows = max(1, tokens_per_batch // max(1, lengths[order[start]]))
        yield order[start : start + rows]
        start += rows


def encoder_folder(job: JobSpec, which: Which = "trained") -> str:
    """Local folder of the weights: the run's export for a job that trains, else its base.

    Raises:
        ModelError: the model is not there (not trained yet, or the base cannot be found).
    """
    if which == "base" or job.train is None:
        return base_folder(job)
    export = RunFolder.of(job).export
    if not storage.exists(storage.join(export, "modules.json")):
        raise ModelError(f"{export} holds no trained model yet; run `ullme-ray train` on this job first")
    try:
        return storage.fetch_folder(export)
    except StorageError as error:
        raise ModelError(f"the trained model cannot be read: {error}") from error


def read_settings(job: JobSpec, folder: str) -> EncoderSettings:
    """The settings of a model folder: those saved with an export, which the job may not contradict; else the job's.

    Raises:
        ModelError: the job sets a pooling, prompt or length other than the one the model was trained with.
    """
    wanted = EncoderSettings.of(job.model)
    saved = _saved_settings(folder, job.model)
    if saved is None:
        return wanted
    given: set[str] = set(job.model.model_fields_set)
    prompts_given = job.model.prompts.model_fields_set if "prompts" in given else set()
    claims = {
        "pooling": ("pooling", wanted.pooling, "pooling" in given),
        "max_tokens": ("max_tokens", wanted.max_tokens, "max_tokens" in given),
        "query_prompt": ("prompts.query", wanted.query_prompt, "query" in prompts_given),
        "passage_prompt": ("prompts.passage", wanted.passage_prompt, "passage" in prompts_given),
    }
    for key, (field, value, is_given) in claims.items():
        if (is_given or job.train is not None) and saved[key] != value:
            raise ModelError(
                f"model.{field} = {value!r}, but the model in {folder} was trained with {saved[key]!r}; put that value "
                f"in the job, or train again under another name"
            )
    return EncoderSettings(**saved, dtype=job.model.dtype)


def _saved_settings(folder: str, model: ModelSpec) -> dict[str, Any] | None:
    """Pooling, length and prompts of a sentence-transformers folder, or None for any other folder."""
    names = ("config_sentence_transformers.json", "1_Pooling/config.json", "sentence_bert_config.json")
    if not all(os.path.isfile(os.path.join(folder, name)) for name in names):
        return None
    general, pooling, limits = (json.loads(storage.read_text(os.path.join(folder, name))) for name in names)
    on = [key for key, value in pooling.items() if key.startswith("pooling_mode_") and value]
    modes = [mode for mode, key in _POOLING_KEYS.items() if [key] == on or pooling.get("pooling_mode") == mode]
    if len(modes) != 1:
        raise ModelError(
            f"the sentence-transformers model in {folder} pools by {' + '.join(on) or pooling.get('pooling_mode')}; "
            f"only one of {', '.join(_POOLING_KEYS)} can be computed here"
        )
    prompts = general.get("prompts") or {}
    return {
        "pooling": modes[0],
        "max_tokens": int(limits.get("max_seq_length") or model.max_tokens),
        "query_prompt": prompts.get("query", ""),
        "passage_prompt": prompts.get("passage", prompts.get("document", "")),
    }


def open_tokenizer(job: JobSpec, *, which: Which = "trained") -> TextTokenizer:
    """The job's tokenizer with prompts and length limit; loads no weights."""
    folder = encoder_folder(job, which)
    return _text_tokenizer(folder, read_settings(job, folder), job.model)


def _text_tokenizer(folder: str, settings: EncoderSettings, model: ModelSpec) -> TextTokenizer:
    return TextTokenizer(
        load_tokenizer(folder, trust_remote_code=model.trust_remote_code),
        max_tokens=settings.max_tokens,
        query_prompt=settings.query_prompt,
        passage_prompt=settings.passage_prompt,
    )


def encoder_fingerprint(job: JobSpec, *, which: Which = "trained") -> str:
    """sha256 over weights, tokenizer, pooling, prompts, max_tokens and dtype: equal fingerprints give equal vectors."""
    folder = encoder_folder(job, which)
    return _fingerprint(folder, read_settings(job, folder))


def _fingerprint(folder: str, settings: EncoderSettings) -> str:
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    names = sorted(n for n in os.listdir(folder) if n.endswith(".safetensors") or n in ("tokenizer.json", "config.json"))
    for name in names:
        path = os.path.join(folder, name)
        stat = os.stat(path)
        digest.update(name.encode() + _file_digest(path, stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()


@lru_cache(maxsize=64)
def _file_digest(path: str, num_bytes: int, mtime_ns: int) -> bytes:
    """Hash of a file's content; size and time are part of the key so that a changed file is read again."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def open_encoder(job: JobSpec, *, which: Which = "trained", device: str | None = None) -> Encoder:
    """Loads the job's embedder and proves it: attention both ways, and an export's own probe vectors.

    Args:
        which: `trained` is the run's export where the job trains, else the base; `base` the model before training.
        device: torch device; absent means a GPU where there is one.

    Raises:
        ModelError: it cannot be loaded, attends one way, or computes other vectors than when it was exported.
    """
    folder = encoder_folder(job, which)
    encoder = load_encoder(folder, read_settings(job, folder), job.model, device=device)
    if os.path.isfile(os.path.join(folder, PROBE_FILE)):
        check_probe(encoder, folder)
    return encoder


def load_encoder(folder: str, settings: EncoderSettings, model: ModelSpec, *, device: str | None = None) -> Encoder:
    """An encoder from a local folder of weights and tokenizer."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    backbone = load_backbone(folder, model, device=device)
    check_length("model.max_tokens", settings.max_tokens, backbone.config, first_position(backbone, backbone.config))
    return Encoder(backbone, _text_tokenizer(folder, settings, model), settings, _fingerprint(folder, settings))


PROBE_FILE = "probe.json"


def check_probe(encoder: Encoder, folder: str) -> float:
    """Encodes the texts stored with an export and compares: a stack that ignores `is_causal: false` is caught here.

    Returns:
        The smallest cosine between a stored vector and its recomputation.

    Raises:
        ModelError: it is below 0.9999 (0.999 in bfloat16).
    """
    probe = json.loads(storage.read_text(os.path.join(folder, PROBE_FILE)))
    smallest = 1.0
    for entry in probe["entries"]:
        vector = encoder.encode([entry["text"]], entry["prompt"])[0]
        smallest = min(smallest, float(vector @ np.asarray(entry["embedding"], dtype=np.float32)))
    floor = 0.9999 if encoder.settings.dtype == "float32" else 0.999
    if smallest < floor:
        raise ModelError(
            f"the model in {folder} computes other vectors than when it was exported (cosine {smallest:.5f}, at least {floor} "
            f"needed): the installed transformers, or a changed file, does not give this model's embeddings"
        )
    return smallest
