"""Token states -> one unit vector per text. Right for left and right padding; always float32."""

from __future__ import annotations

import torch
from torch import Tensor


def pooling_mask(attention_mask: Tensor, prompt_lengths: Tensor) -> Tensor:
    """Marks the text's own tokens: attended to, and not of the prompt.

    Args:
        attention_mask: (B, L), 1 for real tokens; padding on either side.
        prompt_lengths: (B,), leading real tokens that belong to the prompt.

    Returns:
        (B, L) mask. A text that is nothing but its prompt keeps all its tokens, so that no vector is 0/0.
    """
    position = attention_mask.cumsum(dim=1) - 1  # (B, L) index among real tokens
    own = (attention_mask > 0) & (position >= prompt_lengths[:, None])
    empty = ~own.any(dim=1, keepdim=True)
    return torch.where(empty, attention_mask > 0, own).to(attention_mask.dtype)


def pool(hidden_states: Tensor, attention_mask: Tensor, own_tokens: Tensor, method: str, *, normalize: bool = True) -> Tensor:
    """Pools states over a text's tokens and scales to unit length (METHOD: encode).

    Args:
        hidden_states: (B, L, D) of any float type.
        attention_mask: (B, L).
        own_tokens: (B, L) from `pooling_mask`.
        method: mean | weightedmean (weight = position among all real tokens, as SGPT) | lasttoken | cls (first own token).

    Returns:
        (B, D) float32, each row of length 1 unless told otherwise.
    """
    states = hidden_states.float()
    position = attention_mask.cumsum(dim=1)  # (B, L), real tokens count from 1
    if method in ("mean", "weightedmean"):
        weight = own_tokens.float() * (position.float() if method == "weightedmean" else 1.0)
        # einsum, not a broadcast product: no (B, L, D) temporary
        pooled = torch.einsum("bld,bl->bd", states, weight) / weight.sum(dim=1, keepdim=True)
    else:
        rank = torch.where(own_tokens > 0, position, 0 if method == "lasttoken" else position.shape[1] + 1)
        index = rank.argmax(dim=1) if method == "lasttoken" else rank.argmin(dim=1)  # (B,)
        pooled = states[torch.arange(len(states), device=states.device), index]
    return torch.nn.functional.normalize(pooled, dim=-1) if normalize else pooled


def pool_packed(states: Tensor, offsets: Tensor, prompt_length: int, method: str) -> Tensor:
    """As `pool`, for texts that lie one after another without padding.

    Args:
        states: (T, D) of any float type.
        offsets: (N + 1,), text i is tokens [offsets[i], offsets[i + 1]).
        prompt_length: leading tokens of every text that belong to the prompt; a text without others keeps them.

    Returns:
        (N, D) float32, each row of length 1.
    """
    starts, ends = offsets[:-1].long(), offsets[1:].long()
    lengths = ends - starts
    left_out = torch.where(lengths > prompt_length, prompt_length, 0)  # (N,)
    if method in ("mean", "weightedmean"):
        position = torch.arange(len(states), device=states.device) - starts.repeat_interleave(lengths)  # (T,)
        weight = (position >= left_out.repeat_interleave(lengths)).float()
        if method == "weightedmean":
            weight = weight * (position + 1)
        # A sum in place of a mean: they differ in length alone, and the length becomes 1.
        pooled = torch.segment_reduce(states.float() * weight[:, None], "sum", lengths=lengths, axis=0)
    else:
        pooled = states[ends - 1 if method == "lasttoken" else starts + left_out].float()
    return torch.nn.functional.normalize(pooled, dim=-1)
