"""Matryoshka: the first numbers of an embedding are an embedding (Kusupati et al. 2022). Cost: a copy of what is kept."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize


def truncate(embedding: Tensor, dim: int) -> Tensor:
    """The first `dim` numbers of each row, of length 1 again: (..., D) -> (..., dim)."""
    assert 0 < dim <= embedding.shape[-1], f"cannot cut {embedding.shape[-1]} numbers to {dim}"
    return normalize(embedding[..., :dim], dim=-1)
