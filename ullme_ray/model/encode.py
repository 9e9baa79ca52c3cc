"""The one forward pass that training, embedding and serving share: token ids -> unit vectors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

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

    def take(self, rows: Tensor) -> TokenBatch:
        """The rows of these numbers, without the columns that are padding for all of them."""
        chosen = TokenBatch(self.input_ids[rows], self.attention_mask[rows], self.prompt_lengths[rows])
        return chosen.rows(0, len(rows))

    @staticmethod
    def join(batches: Sequence[TokenBatch]) -> TokenBatch:
        """The rows of all, one batch after the other; the new padding is masked like all padding."""
        width = max(batch.input_ids.shape[1] for batch in batches)
        ids = [pad(batch.input_ids, (0, width - batch.input_ids.shape[1])) for batch in batches]
        masks = [pad(batch.attention_mask, (0, width - batch.attention_mask.shape[1])) for batch in batches]
        return TokenBatch(torch.cat(ids), torch.cat(masks), torch.cat([batch.prompt_lengths for batch in batches]))


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


def groups_of_like_length(lengths: Sequence[int], num_groups: int) -> list[list[int]]:
    """Rows in the groups that cost the fewest positions when each is padded to its own longest row.

    Always min(num_groups, rows) groups: ranks that shard parameters must run the model equally often.

    Returns:
        Row numbers of each group, shortest rows first.
    """
    order = np.argsort(lengths, kind="stable")
    # Places where a group may end; of very many rows not every place is looked at: the search takes places^2.
    places = np.unique(np.linspace(0, len(order), min(len(order), max(128, num_groups)) + 1).round().astype(int))
    longest = np.asarray(lengths)[order[places[1:] - 1]]
    cost = (places[None, 1:] - places[:-1, None]) * longest.astype(float)  # [i, j]: a group from place i up to place j + 1
    cost[np.tril_indices_from(cost, -1)] = np.inf
    best, cuts = cost[0], []  # best[j]: cost of all rows up to place j + 1
    for _ in range(min(num_groups, len(order)) - 1):
        total = best[:-1, None] + cost[1:]
        cuts.append(total.argmin(axis=0) + 1)
        best = total.min(axis=0)
    ends = [len(places) - 1]
    for cut in reversed(cuts):
        ends.append(int(cut[ends[-1] - 1]))
    return [order[a:b].tolist() for a, b in pairwise([0, *(int(places[end]) for end in reversed(ends))])]


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


def encode_batch(
    backbone: Any,
    batch: TokenBatch,
    pooling: str,
    head: Any = None,
    *,
    bidirectional: bool = True,
    normalize: bool = True,
) -> Tensor:
    """Texts -> embedding (B, D), float32, unit length (METHOD: encode).

    Args:
        head: of `latent_attention` pooling: a layer between the token states and their mean.
        bidirectional: false for a foreign decoder that was trained to embed causally.
    """
    states = forward_states(backbone, batch.input_ids, batch.attention_mask, bidirectional=bidirectional)  # (B, L, D)
    assert (head is not None) == (pooling == "latent_attention")
    hidden_states = states if head is None else head(states)  # (B, L, D)
    own = pooling_mask(batch.attention_mask, batch.prompt_lengths)
    return pool(hidden_states, batch.attention_mask, own, "mean" if head is not None else pooling, normalize=normalize)
