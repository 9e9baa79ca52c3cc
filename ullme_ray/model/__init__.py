"""Decoders and encoders as embedders: tokenizing, encoding, pooling, export. Knows nothing of Ray or DeepSpeed."""

from ullme_ray.model.backbone import base_folder, check_base
from ullme_ray.model.base import ensure_base
from ullme_ray.model.budget import TokenBudget
from ullme_ray.model.compiled import compile_where_faster
from ullme_ray.model.encoder import (
    Encoder,
    EncoderSettings,
    check_probe,
    encoder_fingerprint,
    encoder_folder,
    open_encoder,
    open_tokenizer,
)
from ullme_ray.model.speed import non_embedding_parameters, peak_flops
from ullme_ray.model.tokenizing import TextTokenizer, Tokens

__all__ = [
    "Encoder",
    "EncoderSettings",
    "TextTokenizer",
    "TokenBudget",
    "Tokens",
    "base_folder",
    "check_base",
    "check_probe",
    "compile_where_faster",
    "encoder_fingerprint",
    "encoder_folder",
    "ensure_base",
    "non_embedding_parameters",
    "open_encoder",
    "open_tokenizer",
    "peak_flops",
]
