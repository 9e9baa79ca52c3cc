"""The embedder as every stage uses it: weights, tokenizer, prompts and pooling in one object.

Loading costs the weights' size in memory and one probe; `open_tokenizer` and `encoder_fingerprint` load no weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch

from ullme_ray import storage
from ullme_ray.errors import ModelError, StorageError
from ullme_ray.model.backbone import base_folder, first_position, load_backbone, load_config
from ullme_ray.model.budget import TIMING_S, TokenBudget, find_budget
from ullme_ray.model.encode import encode_batch, forward_states, pad_batch
from ullme_ray.model.family import check_length, generates
from ullme_ray.model.latent_attention import FOLDER, make_head
from ullme_ray.model.packed import Packing, encode_packed, pack_batch, try_packing
from ullme_ray.model.tokenizing import PromptName, TextTokenizer, Tokens, load_tokenizer
from ullme_ray.spec.job import JobSpec, ModelSpec, Unpadded
from ullme_ray.spec.run_folder import RunFolder

Which = Literal["trained", "base"]
_POOLING_KEYS = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "lasttoken": "pooling_mode_lasttoken",
    "weightedmean": "pooling_mode_weightedmean_tokens",
}
# Beside weights and code: what decides which ids a text becomes, and what the model does with them.
_FINGERPRINTED = frozenset(
    [
        *("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    ]
)
_TIMED_LENGTH = 128  # tokens of the texts that a budget is timed with
_NO_LENGTH = 10**9  # transformers writes 10**30 where a tokenizer has no limit


@dataclass(frozen=True)
class EncoderSettings:
    """All that decides a text's vector beside weights and tokenizer."""

    pooling: str
    max_tokens: int
    query_prompt: str
    passage_prompt: str
    dtype: str
    latent_attention: tuple[int, int] | None = None  # latents and heads
    causal: bool = False  # a decoder that was not trained to attend both ways
    prompt_is_pooled: bool = False  # so sentence-transformers does unless told otherwise

    @classmethod
    def of(cls, model: ModelSpec) -> EncoderSettings:
        shape = (model.latent_attention.latents, model.latent_attention.heads) if model.pooling == "latent_attention" else None
        return cls(
            pooling=model.pooling,
            max_tokens=model.max_tokens,
            query_prompt=model.prompts.query,
            passage_prompt=model.prompts.passage,
            dtype=model.dtype,
            latent_attention=shape,
            causal=not model.bidirectional,
        )


class Encoder:
    """Texts in, unit vectors out; one process, one device."""

    def __init__(
        self,
        backbone: Any,
        tokenizer: TextTokenizer,
        settings: EncoderSettings,
        fingerprint: str,
        head: Any = None,
        packing: Packing | None = None,
    ) -> None:
        self.backbone = backbone
        self.head = head
        self.tokenizer = tokenizer
        self.settings = settings
        self.fingerprint = fingerprint
        self.packing = packing
        self.dim = int(backbone.config.get_text_config().hidden_size)
        self.device = next(backbone.parameters()).device

    def encode(self, texts: Sequence[str], prompt: PromptName = "passage", *, tokens_per_batch: int = 8192) -> np.ndarray:
        """(N, D) float32 unit rows, in the order of `texts`."""
        return self.embed_tokens(self.tokenizer.tokenize(texts, prompt), tokens_per_batch=tokens_per_batch)

    def encode_prompted(self, texts: Sequence[str], prompt: str) -> np.ndarray:
        """As `encode`, with a prompt that is none of the model's own."""
        return self.embed_tokens(self.tokenizer.with_prompts(prompt, prompt).tokenize(texts, "query"))

    @torch.inference_mode()
    def embed_tokens(self, tokens: Tokens, *, tokens_per_batch: int | TokenBudget = 8192) -> np.ndarray:
        """(N, D) float32 unit rows in input order; inside, length-sorted batches of up to `tokens_per_batch` tokens.

        Args:
            tokens_per_batch: padding included, where the model needs it. A budget is lowered when memory runs out.

        Raises:
            EmbedError: memory does not hold a single text.
        """
        budget = tokens_per_batch if isinstance(tokens_per_batch, TokenBudget) else TokenBudget(tokens_per_batch)
        if self.settings.prompt_is_pooled:
            tokens = replace(tokens, prompt_length=0)
        vectors = np.empty((len(tokens.input_ids), self.dim), dtype=np.float32)

        def forward(rows: list[int]) -> None:
            vectors[rows] = self._forward(tokens, rows).cpu().numpy()

        budget.work([len(ids) for ids in tokens.input_ids], forward, padded=self.packing is None)
        return vectors

    def _forward(self, tokens: Tokens, rows: list[int]) -> torch.Tensor:
        """One batch; its longest row is the first."""
        ids = [tokens.input_ids[row] for row in rows]
        how: dict[str, Any] = {"pooling": self.settings.pooling, "head": self.head, "bidirectional": not self.settings.causal}
        if self.packing is not None and len(ids[0]) <= (self.packing.longest or len(ids[0])):
            packed = pack_batch(ids, tokens.prompt_length, padding_id=self.packing.padding_id, device=self.device)
            return encode_packed(self.backbone, packed, **how)
        return encode_batch(self.backbone, pad_batch(ids, tokens.prompt_length, self.tokenizer.pad_id).to(self.device), **how)

    @torch.inference_mode()
    def token_states(self, tokens: Tokens) -> list[np.ndarray]:
        """The last hidden states of each text's tokens, prompt and special tokens included: (L, D) float32 each."""
        batch = pad_batch(tokens.input_ids, tokens.prompt_length, self.tokenizer.pad_id).to(self.device)
        both_ways = not self.settings.causal
        states = forward_states(self.backbone, batch.input_ids, batch.attention_mask, bidirectional=both_ways)
        return [s[: len(ids)].float().cpu().numpy() for s, ids in zip(states, tokens.input_ids, strict=True)]

    @torch.inference_mode()
    def pooled_states(self, tokens: Tokens) -> np.ndarray:
        """(N, D) float32 rows as pooled, not scaled to unit length."""
        length = 0 if self.settings.prompt_is_pooled else tokens.prompt_length
        batch = pad_batch(tokens.input_ids, length, self.tokenizer.pad_id).to(self.device)
        both_ways = not self.settings.causal
        pooled = encode_batch(self.backbone, batch, self.settings.pooling, self.head, bidirectional=both_ways, normalize=False)
        return pooled.cpu().numpy()

    def find_budget(self, *, limit_s: float = TIMING_S) -> TokenBudget:
        """The number of tokens in a batch that this model runs fastest with on this device; takes up to `limit_s`, about."""
        length = min(_TIMED_LENGTH, self.settings.max_tokens)
        text = [1 % self.tokenizer.hf.vocab_size] * length

        def forward(num_tokens: int) -> None:
            count = max(1, num_tokens // length)
            self.embed_tokens(Tokens([text] * count, 0, [False] * count), tokens_per_batch=num_tokens)

        return find_budget(forward, self.device.type, limit_s=limit_s)


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
        if wanted.latent_attention is not None and job.train is None:
            raise ModelError(
                f"model.pooling = latent_attention has weights to be trained, and {folder} holds none; "
                f"add a train section, or choose another pooling"
            )
        return wanted
    given: set[str] = set(job.model.model_fields_set)
    prompts_given = job.model.prompts.model_fields_set if "prompts" in given else set()
    claims = {
        "pooling": ("pooling", wanted.pooling, "pooling" in given),
        "latent_attention": ("latent_attention", wanted.latent_attention, "latent_attention" in given),
        "max_tokens": ("max_tokens", wanted.max_tokens, "max_tokens" in given),
        "query_prompt": ("prompts.query", wanted.query_prompt, "query" in prompts_given),
        "passage_prompt": ("prompts.passage", wanted.passage_prompt, "passage" in prompts_given),
    }
    if "bidirectional" in given and saved["causal"] != wanted.causal:
        asked, trained = ("false", "true") if wanted.causal else ("true", "false")
        raise ModelError(
            f"model.bidirectional = {asked}, but the model in {folder} was trained with {trained}; "
            f"put that value in the job, or train again under another name"
        )
    for key, (field, value, is_given) in claims.items():
        if (is_given or job.train is not None) and saved[key] != value:
            raise ModelError(
                f"model.{field} = {value!r}, but the model in {folder} was trained with {saved[key]!r}; put that value "
                f"in the job, or train again under another name"
            )
    return EncoderSettings(**saved, dtype=job.model.dtype)


def _saved_settings(folder: str, model: ModelSpec) -> dict[str, Any] | None:
    """What a sentence-transformers folder says of itself, or None for any other folder.

    Raises:
        ModelError: it does what cannot be computed here.
    """
    parts = {part["type"].rpartition(".")[2]: part["path"] for part in _read_json(folder, "modules.json") or []}
    if not parts:
        return None
    unknown = sorted(set(parts) - {"Transformer", "Pooling", "Normalize", "LatentAttentionPooling"})
    limits = _read_json(folder, "sentence_bert_config.json") or {}
    if unknown or "Pooling" not in parts or limits.get("do_lower_case"):
        reason = ", ".join(unknown) or ("lower-casing" if limits.get("do_lower_case") else "no pooling")
        raise ModelError(
            f"the sentence-transformers model in {folder} has {reason}; only Transformer, Pooling, Normalize and "
            f"LatentAttentionPooling can be computed here"
        )
    pooling = _read_json(folder, os.path.join(parts["Pooling"], "config.json")) or {}
    on = [key for key, value in pooling.items() if key.startswith("pooling_mode_") and value]
    modes = [mode for mode, key in _POOLING_KEYS.items() if [key] == on or pooling.get("pooling_mode") == mode]
    if len(modes) != 1:
        raise ModelError(
            f"the sentence-transformers model in {folder} pools by {' + '.join(on) or pooling.get('pooling_mode')}; "
            f"only one of {', '.join(_POOLING_KEYS)} can be computed here"
        )
    latent = _read_json(folder, os.path.join(parts.get("LatentAttentionPooling", "-"), "config.json"))
    prompts = (_read_json(folder, "config_sentence_transformers.json") or {}).get("prompts") or {}
    length = limits.get("max_seq_length") or (_read_json(folder, "tokenizer_config.json") or {}).get("model_max_length")
    config = _read_json(folder, "config.json") or {}
    causal = {config.get("is_causal"), config.get("text_config", {}).get("is_causal")}
    return {
        "pooling": "latent_attention" if latent else modes[0],
        "max_tokens": int(length) if length and length < _NO_LENGTH else model.max_tokens,
        "query_prompt": prompts.get("query", ""),
        "passage_prompt": prompts.get("passage", prompts.get("document", "")),
        "latent_attention": (latent["latents"], latent["heads"]) if latent else None,
        "causal": False not in causal and generates(load_config(folder, trust_remote_code=model.trust_remote_code)),
        "prompt_is_pooled": bool(pooling.get("include_prompt", True)),
    }


def _read_json(folder: str, name: str) -> Any:
    """The content of a file, or None where there is no such file."""
    path = os.path.join(folder, name)
    return json.loads(storage.read_text(path)) if os.path.isfile(path) else None


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
    head = os.path.join(folder, FOLDER)
    names = [name for name in os.listdir(folder) if name.endswith((".safetensors", ".py")) or name in _FINGERPRINTED]
    names += [os.path.join(FOLDER, name) for name in os.listdir(head)] if os.path.isdir(head) else []
    for name in sorted(names):
        path = os.path.join(folder, name)
        stat = os.stat(path)
        digest.update(name.encode() + _file_digest(path, stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()


@lru_cache(maxsize=64)
def _file_digest(path: str, num_bytes: int, mtime_ns: int) -> bytes:
    """Hash of a file's content; size and time are part of the key so that a changed file is read again."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def open_encoder(job: JobSpec, *, which: Which = "trained", device: str | None = None, unpadded: Unpadded = "auto") -> Encoder:
    """Loads the job's embedder and proves it: attention both ways, and an export's own probe vectors.

    Args:
        which: `trained` is the run's export where the job trains, else the base; `base` the model before training.
        device: torch device; absent means a GPU where there is one.
        unpadded: as `embed.unpadded`.

    Raises:
        ModelError: it cannot be loaded, attends one way, or computes other vectors than when it was exported.
    """
    folder = encoder_folder(job, which)
    encoder = load_encoder(folder, read_settings(job, folder), job.model, device=device, unpadded=unpadded)
    if os.path.isfile(os.path.join(folder, PROBE_FILE)):
        check_probe(encoder, folder)
    return encoder


def load_encoder(
    folder: str,
    settings: EncoderSettings,
    model: ModelSpec,
    *,
    device: str | None = None,
    unpadded: Unpadded = "auto",
) -> Encoder:
    """An encoder from a local folder of weights and tokenizer.

    Raises:
        ModelError: it cannot be loaded, or cannot do without padding where it is told to.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    backbone = load_backbone(folder, model, device=device)
    check_length("model.max_tokens", settings.max_tokens, backbone.config, first_position(backbone, backbone.config))
    head = None
    if settings.latent_attention is not None:  # the base before training has none yet: a fresh one is mean pooling
        head = make_head(folder, model.model_copy(update={"pooling": "latent_attention"}), backbone.config)
        head = head.to(device).eval() if head is not None else None
    packing = try_packing(backbone, bidirectional=not settings.causal) if unpadded != "off" else None
    if isinstance(packing, str):
        if unpadded == "on":
            raise ModelError(f"embed.unpadded = on, but the model in {folder} needs padding: {packing}; use auto or off")
        packing = None
    return Encoder(backbone, _text_tokenizer(folder, settings, model), settings, _fingerprint(folder, settings), head, packing)


PROBE_FILE = "probe.json"


def check_probe(encoder: Encoder, folder: str) -> float:
    """Encodes the texts stored with an export and compares: a stack that ignores `is_causal: false` is caught here.

    Returns:
        The smallest cosine between a stored vector (computed in float32) and its recomputation.

    Raises:
        ModelError: it is below `probe_floor`.
    """
    probe = json.loads(storage.read_text(os.path.join(folder, PROBE_FILE)))
    smallest = probe_cosine(encoder, probe["entries"])
    floor = probe_floor(encoder, probe["cosine"] if probe.get("dtype") == encoder.settings.dtype else 1.0)
    if not smallest >= floor:  # a NaN must fail too
        raise ModelError(
            f"the model in {folder} computes other vectors than when it was exported (cosine {smallest:.5f}, at least "
            f"{floor:.5f} needed): the installed transformers, or a changed file, does not give this model's embeddings"
        )
    return smallest


def probe_cosine(encoder: Encoder, entries: Sequence[dict[str, Any]]) -> float:
    """The smallest cosine between the entries' vectors and what the encoder makes of their texts."""
    vectors = [encoder.encode([entry["text"]], entry["prompt"])[0] for entry in entries]
    return min(float(v @ np.asarray(entry["embedding"], dtype=np.float32)) for v, entry in zip(vectors, entries))


def probe_floor(encoder: Encoder, exported: float) -> float:
    """What a good recomputation reaches at least.

    Args:
        exported: the cosine that the export itself reached in this dtype: another machine rounds otherwise, but not by more
            than a few times as much.
    """
    usual = 0.9999 if encoder.settings.dtype == "float32" else 0.999
    return min(usual, 1.0 - 4.0 * (1.0 - exported))
