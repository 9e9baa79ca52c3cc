"""The `model` section: the backbone, how its states become a vector, and what is trained of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from ullme_ray.spec.secrets import SecretRef
from ullme_ray.spec.section import PromptsSpec, Section


class LoraSpec(Section):
    rank: PositiveInt = Field(16, description="Rank of the LoRA update matrices.")
    alpha: PositiveInt = Field(32, description="LoRA scale; the update is multiplied by alpha / rank.")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.1, description="Dropout on the LoRA input, 0 to 1.")
    adapters: Literal["shared", "separate"] = Field(
        "shared", description="One adapter for both passes, or one to encode and one to generate; only the first is exported."
    )
    quantize_base: Literal["nf4"] | None = Field(
        None, description="Hold the frozen base weights in 4 bits while training (QLoRA); needs a GPU and bitsandbytes."
    )


class ScratchSpec(Section):
    hidden_size: PositiveInt = Field(256, description="Width D of the decoder built for `base: scratch`.")
    layers: PositiveInt = Field(2, description="Number of decoder layers.")
    heads: PositiveInt = Field(4, description="Number of attention heads; divides hidden_size.")
    vocab_size: Annotated[int, Field(ge=300)] = Field(8192, description="Size V of the byte-level BPE vocabulary.")


class LatentAttentionSpec(Section):
    latents: PositiveInt = Field(512, description="Number of trained latents that every token attends to.")
    heads: PositiveInt = Field(8, description="Attention heads; divides the backbone's width.")


class ModelSpec(Section):
    base: str = Field(
        min_length=1,
        description="Hugging Face name, local or s3:// folder of a decoder or encoder; `scratch` makes one from the texts.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hugging Face name.")
    pooling: Literal["mean", "lasttoken", "cls", "weightedmean", "latent_attention"] = Field(
        "mean", description="How token states become one vector; latent_attention is NV-Embed's, trained with the backbone."
    )
    latent_attention: LatentAttentionSpec = Field(LatentAttentionSpec(), description="Shape of `pooling: latent_attention`.")
    max_tokens: Annotated[int, Field(ge=8)] = Field(512, description="Texts are cut to this many tokens, prompt included.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Precision of weights and activations.")
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="Attention backend; auto takes the first of sdpa, eager that passes the bidirectional probe."
    )
    bidirectional: bool = Field(
        True, description="Tokens attend both ways when texts are embedded; false keeps a decoder's causal attention."
    )
    prompts: PromptsSpec = Field(PromptsSpec(), description="Prompts for queries and passages.")
    lora: LoraSpec | None = Field(None, description="Train LoRA adapters on all linear layers; absent means full fine-tuning.")
    scratch: ScratchSpec = Field(ScratchSpec(), description="Shape of the model built for `base: scratch`.")
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Off unless you trust its author."
    )
    hub_token: SecretRef | None = Field(None, description="Hugging Face token, as env:NAME or file:PATH.")
