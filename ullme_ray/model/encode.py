"""The one forward pass that training, embedding and serving share: token ids -> unit vectors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ullme_ray.model.family import generates
from ullme_ray.model.pooling import pool, pooling_mask
from ullme_ray.model.tokenizing import Tokens


@dataclass(frozen=True)
class TokenBatch:
    """Texts padded on the right to one length."""

    input_ids: Tensor  # (B, L)
    attention_mask: Tensor  # (B, L)
    prompt_lengths: Tensor  # (B,)

    def to(self, device: torch.device | str) -> TokenBatch:
        return TokenBatch(self.input_ids.to(device), self.attention_mask.to(device), self.prompt_lengths.to(device))

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, start: int, stop: int) -> TokenBatch:
        """Rows [start, stop), without the columns that are padding for all of them."""
        mask = self.attention_mask[start:stop]
        longest = int(mask.sum(dim=1).max())
        return TokenBatch(self.input_ids[start:stop, :longest], mask[:, :longest], self.prompt_lengths[start:stop])


def pad_batch(input_ids: Sequence[Sequence[int]], prompt_lengths: int | Sequence[int], pad_id: int) -> TokenBatch:
    """Right-pads lists of ids to (B, L)."""
    longest = max(len(ids) for ids in input_ids)
    ids = torch.full((len(input_ids), longest), pad_id, dtype=torch.long)  # (B, L)
    mask = torch.zeros_like(ids)
    for row, row_ids in enumerate(input_ids):
        ids[row, : len(row_ids)] = torch.as_tensor(row_ids)
        mask[row, : len(row_ids)] = 1
    lengths = [prompt_lengths] * len(input_ids) if isinstance(prompt_lengths, int) else list(prompt_lengths)
    return TokenBatch(ids, mask, torch.tensor(lengths))


def pad_tokens(tokens: Tokens, rows: Sequence[int], pad_id: int) -> TokenBatch:
    """The chosen rows of `tokens` as a batch."""
    return pad_batch([tokens.input_ids[row] for row in rows], tokens.prompt_length, pad_id)


@lru_cache(maxsize=64)
def accepts(forward: Callable[..., Any], argument: str) -> bool:
    """Whether a model's (unbound) forward function has a parameter of this name."""
    return argument in inspect.signature(forward).parameters


def forward_inputs(module: Any, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
    """Arguments of either pass. Positions count real tokens only, so padding on any side changes nothing.

    Encoders number their tokens themselves, each family in its own way (RoBERTa from its padding id + 1, counted over ids
    that are no padding id). They are left to it: padding is on the right here, and sentence-transformers does the same.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    if not generates(module.config):
        return inputs
    inputs["use_cache"] = False
    if accepts(type(module).forward, "position_ids"):
        inputs["position_ids"] = (attention_mask.cumsum(dim=1) - 1).clamp_min(0)
    return inputs


def forward_states(backbone: Any, input_ids: Tensor, attention_mask: Tensor, *, bidirectional: bool) -> Tensor:
    """Last hidden states (B, L, D).

    Attention goes both ways through the per-call flag, never an attribute of the model: with activation checkpointing the
    recomputed pass must see the same flag, and it gets the same keyword arguments. Encoders have no such flag.
    """
    assert bidirectional or generates(backbone.config), "an encoder has no causal pass"
    flags = {"is_causal": False} if bidirectional and generates(backbone.config) else {}
    return backbone(**forward_inputs(backbone, input_ids, attention_mask), **flags).last_hidden_state


def encode_batch(backbone: Any, batch: TokenBatch, pooling: str, head: Any = None, *, bidirectional: bool = True) -> Tensor:
    """Texts -> embedding (B, D), float32, unit length (METHOD: encode).

    Args:
        head: of `latent_attention` pooling: a layer between the token states and their mean.
        bidirectional: false for a foreign decoder that was trained to embed causally.
    """
    states = forward_states(backbone, batch.input_ids, batch.attention_mask, bidirectional=bidirectional)  # (B, L, D)
    assert (head is not None) == (pooling == "latent_attention")
    hidden_states = states if head is None else head(states)  # (B, L, D)
    own = pooling_mask(batch.attention_mask, batch.prompt_lengths)
    return pool(hidden_states, batch.attention_mask, own, "mean" if head is not None else pooling)
