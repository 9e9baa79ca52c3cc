"""NV-Embed's latent attention (arXiv 2405.17428, section 3.1.1): a trained layer between the token states and mean pooling.

Every token state asks (cross attention) a table of trained latents, which are keys and values; a GELU MLP follows. Both are
added to the state, as in NV-Embed's released code. The two output matrices start at zero, so training starts from plain mean
pooling. Costs about one layer of the backbone: 10 D^2 + r D multiply-adds per token, D the width, r the number of latents.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from ullme_ray.errors import ModelError
from ullme_ray.model.backbone import DTYPES
from ullme_ray.spec.job import ModelSpec

FOLDER = "1_LatentAttention"  # inside an export


class LatentAttention(nn.Module):
    """Token states (B, L, D) -> token states (B, L, D), each token alone: padding changes nothing. Norms in float32.

    Args:
        width: D of the backbone.
        latents: number r of trained latents.
        heads: attention heads; divides the width.
    """

    def __init__(self, width: int, latents: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            divisors = [n for n in range(1, width + 1) if width % n == 0]
            near = sorted(sorted(divisors, key=lambda n: abs(n - heads))[:2])
            raise ModelError(
                f"model.latent_attention.heads = {heads} does not divide the model's width {width}; "
                f"use {' or '.join(map(str, near))}"
            )
        self.shape = {"width": width, "latents": latents, "heads": heads}
        self.heads = heads
        self.latents = nn.Parameter(torch.empty(latents, width))
        self.query_norm, self.latent_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def reset(self, seed: int) -> LatentAttention:
        """Initial weights, a function of the seed."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.latents.normal_(generator=generator)
            for layer in (self.query, self.key_value, self.mlp_in):
                layer.weight.normal_(std=self.shape["width"] ** -0.5, generator=generator)
            self.mlp_in.bias.zero_()
            for parameter in (self.attention_out.weight, self.mlp_out.weight, self.mlp_out.bias):
                parameter.zero_()
        return self

    def forward(self, states: Tensor) -> Tensor:
        states = states.to(self.latents.dtype)  # (B, L, D)
        batch, length, width = states.shape
        queries = self._split(self.query(_norm(self.query_norm, states)))  # (B, H, L, D / H)
        keys, values = self.key_value(_norm(self.latent_norm, self.latents))[None].chunk(2, dim=-1)  # (1, r, D) each
        keys, values = (self._split(x).expand(batch, -1, -1, -1) for x in (keys, values))  # (B, H, r, D / H)
        answers = scaled_dot_product_attention(queries, keys, values)  # (B, H, L, D / H)
        states = states + self.attention_out(answers.transpose(1, 2).reshape(batch, length, width))
        return states + self.mlp_out(gelu(self.mlp_in(_norm(self.mlp_norm, states))))

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def write(self, folder: str) -> None:
        """Shape and weights into a local folder."""
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as stream:
            json.dump(self.shape, stream, indent=2)
            stream.write("\n")
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, os.path.join(folder, "model.safetensors"))

    @classmethod
    def read(cls, folder: str) -> LatentAttention:
        """What `write` wrote, in the dtype it was written in.

        Raises:
            ModelError: the folder does not hold it.
        """
        try:
            with open(os.path.join(folder, "config.json"), encoding="utf-8") as stream:
                head = cls(**json.load(stream))
            weights = load_file(os.path.join(folder, "model.safetensors"))
            head.to(next(iter(weights.values())).dtype).load_state_dict(weights)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(f"no latent attention can be loaded from {folder}: {first_line}") from error
        return head


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """In float32, whatever the weights' type."""
    return torch.nn.functional.layer_norm(
        x.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps
    ).to(x.dtype)


def make_head(
    folder: str, model: ModelSpec, config: Any, *, seed: int = 0, dtype: torch.dtype | None = None
) -> LatentAttention | None:
    """The head of a model folder: the trained one of an export, else a fresh one; None where the pooling has none.

    Args:
        config: the backbone's.
        dtype: of the weights, over `model.dtype`.
    """
    if model.pooling != "latent_attention":
        return None
    if os.path.isdir(os.path.join(folder, FOLDER)):
        head = LatentAttention.read(os.path.join(folder, FOLDER))
    else:
        spec = model.latent_attention
        head = LatentAttention(config.get_text_config().hidden_size, spec.latents, spec.heads).reset(seed)
    return head.to(dtype or DTYPES[model.dtype])


class LatentAttentionPooling(nn.Module):
    """The layer as a module of sentence-transformers, between Transformer and mean Pooling.

    SentenceTransformer(folder, trust_remote_code=True) finds it where ullme_ray is installed.
    """

    def __init__(self, head: LatentAttention) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        return features | {"token_embeddings": self.head(features["token_embeddings"])}

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        self.head.write(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **options: Any) -> LatentAttentionPooling:
        from sentence_transformers.util import load_dir_path

        hub = {key: options[key] for key in ("token", "cache_folder", "revision", "local_files_only") if key in options}
        folder = load_dir_path(model_name_or_path, subfolder=subfolder, **hub)
        if folder is None:
            raise ModelError(f"{model_name_or_path} holds no folder {subfolder}")
        return cls(LatentAttention.read(folder))
