"""Dropout whose mask is a function of the row, not of a random state.

A mask is a hash of (the row's seed, the layer, the position, the feature). So a row is dropped alike in any chunk, on any rank,
in the second pass of GradCache and in the recompute of activation checkpointing, and there is no random state to save. Cost:
five int32 operations per element.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ullme_ray.errors import ModelError

_MIX_1, _MIX_2, _STRIDE = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, -0x61C8864680B583EB  # splitmix64's constants as int64
_SPREAD_1, _SPREAD_2 = -0x61C88647, 0x2C1B3C6D  # odd, as int32: the high bits of a product depend on all bits of the factor


class RowSeeds:
    """The seeds of the rows now in the model; one object is shared by all RowDropout modules of a model."""

    def __init__(self) -> None:
        self.current: Tensor | None = None  # (B,) int64

    @contextlib.contextmanager
    def use(self, seeds: Tensor | None) -> Iterator[None]:
        before, self.current = self.current, seeds
        try:
            yield
        finally:
            self.current = before


class RowDropout(nn.Module):
    """nn.Dropout with masks from row seeds. Input (B, L, F), or (B*L, F) in row order."""

    def __init__(self, p: float, layer: int, seeds: RowSeeds) -> None:
        super().__init__()
        self.p = p
        self.layer = layer
        self.seeds = seeds

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        seeds = self.seeds.current
        if seeds is None:
            raise ModelError("dropout needs row seeds in training mode; wrap the forward pass in RowSeeds.use(...)")
        if x.shape[0] % len(seeds):
            raise ModelError(
                f"a layer mixes the rows of a batch (shape {tuple(x.shape)} for {len(seeds)} rows), so dropout cannot follow a "
                f"row; set model.lora.dropout: 0"
            )
        rows = x.view(len(seeds), -1, x.shape[-1])  # (B, L, F); a no-op for 3-D input
        keep = keep_mask(seeds, self.layer, rows.shape[1], rows.shape[2], self.p)
        return (rows * keep.to(x.dtype).mul_(1.0 / (1.0 - self.p))).view_as(x)


def keep_mask(seeds: Tensor, layer: int, length: int, width: int, p: float) -> Tensor:
    """(B, L, F) bool, True with probability 1 - p; entry (b, l, f) depends on seeds[b], layer, l and f only."""
    position = torch.arange(length, device=seeds.device)
    feature = torch.arange(width, device=seeds.device)
    token = _mix(seeds[:, None] + (position + 1) * _STRIDE + _wrapped(layer * _MIX_1))  # (B, L), well mixed and few
    # Per element int32 operations only, mostly in place: the whole cost, since F is in the thousands.
    bits = token.to(torch.int32)[:, :, None] ^ _mix((feature + 1) * _STRIDE).to(torch.int32)  # (B, L, F)
    bits.mul_(_SPREAD_1)
    bits ^= bits >> 15  # without this, features whose constants differ in a few high bits would be dropped together
    return bits.mul_(_SPREAD_2) >= int(p * 2**32) - 2**31


def _wrapped(number: int) -> int:
    """A Python integer as int64 arithmetic would have it."""
    return (number + 2**63) % 2**64 - 2**63


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finalizer (Steele et al. 2014), in wrapping int64 arithmetic."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def row_seeds(seed: int, step: int, rows: Tensor, slot: int) -> Tensor:
    """Seeds of texts: row numbers (B,) of a global batch at a step, and which text of the row (`slot`)."""
    start = torch.tensor(seed, dtype=torch.int64, device=rows.device)
    for part in (step, slot):
        start = _mix(start + _wrapped((part + 1) * _STRIDE))
    return _mix(start + (rows.to(torch.int64) + 1) * _STRIDE)


def replace_dropout(module: nn.Module, seeds: RowSeeds) -> int:
    """Puts a RowDropout in the place of every nn.Dropout that drops something; returns how many."""
    found = [(name, child) for name, child in module.named_modules() if isinstance(child, nn.Dropout) and child.p > 0]
    for layer, (name, child) in enumerate(found):
        parent_name, _, attribute = name.rpartition(".")
        parent = module.get_submodule(parent_name)
        replacement = RowDropout(child.p, layer, seeds)
        replacement.train(child.training)
        if isinstance(parent, nn.ModuleDict):
            parent[attribute] = replacement
        else:
            setattr(parent, attribute, replacement)
    return len(found)
