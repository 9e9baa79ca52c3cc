"""Unpadded attention: a batch as one row of real tokens, where each text attends to itself alone.

Linear layers, norms and activations see no padding; attention runs over runs of neighbouring texts of one length (sort them),
or on a GPU in half precision through torch's varlen kernel, in one call. Which models can do it is found by experiment at
load, and costs a few forward passes over some dozen tokens; all others keep the padded way.

The backend is registered with transformers under a name of its own and used by encoders alone: a model in training keeps its
backend, and a padded call through this one is plain sdpa.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ullme_ray.errors import ModelError
from ullme_ray.model.backbone import first_position
from ullme_ray.model.encode import accepts, forward_states, pad_batch
from ullme_ray.model.family import generates, position_limit
from ullme_ray.model.pooling import pool_packed

BACKEND = "ullme_packed"
_LENGTHS = (7, 5, 5, 2, 1)  # of the probe's texts: neighbours of one length, and a text of one token
_SHORT_POSITIONS = 1024  # a family whose positions end here may keep tables of that length: the probe's row is longer
_NOT_UNDERSTOOD = ("softcap", "s_aux", "position_bias")  # arguments of the attention interface that change its result


@dataclass
class Layout:
    """Where the texts of a row lie: in their order, without gaps."""

    lengths: list[int]
    offsets: Tensor  # (N + 1,) int32 on the device: text i is tokens [offsets[i], offsets[i + 1])
    causal: bool = False  # tokens see none after them; this alone decides, whatever the layer says of itself
    windows: set[int] = field(default_factory=set)  # of layers that attend to near tokens only, noted while they run

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """(number of texts, their length) of neighbours of one length."""
        return [(len(list(texts)), length) for length, texts in itertools.groupby(self.lengths)]


@dataclass(frozen=True)
class PackedBatch:
    """Texts as one row of tokens."""

    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T), from each text's start
    layout: Layout
    prompt_length: int


def pack_batch(
    input_ids: Sequence[Sequence[int]], prompt_length: int, *, padding_id: int | None = None, device: Any = "cpu"
) -> PackedBatch:
    """Lists of ids -> one row.

    Args:
        padding_id: of a family (RoBERTa) that counts positions from it, over all tokens that are not it; None counts from 0.
    """
    lengths = [len(ids) for ids in input_ids]
    flat = np.fromiter(itertools.chain.from_iterable(input_ids), dtype=np.int64, count=sum(lengths))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if padding_id is None:
        positions = np.arange(len(flat)) - np.repeat(offsets[:-1], lengths)
    else:
        counted = np.concatenate([[0], np.cumsum(flat != padding_id)])
        positions = (counted[1:] - np.repeat(counted[offsets[:-1]], lengths)) * (flat != padding_id) + padding_id
    layout = Layout(lengths, torch.from_numpy(offsets.astype(np.int32)).to(device))
    return PackedBatch(
        torch.from_numpy(flat)[None].to(device), torch.from_numpy(positions)[None].to(device), layout, prompt_length
    )


def packed_states(backbone: Any, batch: PackedBatch, *, bidirectional: bool) -> Tensor:
    """Last hidden states (1, T, D), as `forward_states` but without padding."""
    # transformers takes a mask of four dimensions as it is, so none of T x T is made; the attention below needs none.
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": no_mask}
    if generates(backbone.config):
        inputs |= {"use_cache": False} | ({"is_causal": False} if bidirectional else {})
    if accepts(type(backbone).forward, "position_ids"):
        inputs["position_ids"] = batch.position_ids
    layout = replace(batch.layout, causal=not bidirectional)
    return backbone(**inputs, packed=layout).last_hidden_state


def encode_packed(backbone: Any, batch: PackedBatch, pooling: str, head: Any = None, *, bidirectional: bool = True) -> Tensor:
    """Texts -> embedding (N, D), float32, unit length: what `encode_batch` computes from a padded batch."""
    states = packed_states(backbone, batch, bidirectional=bidirectional)  # (1, T, D)
    hidden_states = states if head is None else head(states)
    return pool_packed(hidden_states[0], batch.layout.offsets, batch.prompt_length, "mean" if head is not None else pooling)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Layout | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """The attention function: each text of a packed row to itself; without `packed`, transformers' own sdpa.

    Args:
        query, key, value: (1, H, T, D); keys and values may have fewer heads.

    Returns:
        (1, T, H, D).
    """
    if packed is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    if any(settings.get(name) is not None for name in _NOT_UNDERSTOOD) or settings.get("dropout"):
        raise ModelError("an attention with a softcap, sinks, a position bias or dropout is not computed without padding")
    if (window := settings.get("sliding_window")) is not None:
        packed.windows.add(window)
        assert max(packed.lengths) <= window, "texts longer than the window are to be padded"
    parts, shared = (query[0], key[0], value[0]), query.shape[1] != key.shape[1]  # (H, T, D) each
    scale: float | None = settings.get("scaling")
    varlen = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    return (_varlen if varlen else _run_by_run)(*parts, packed, scale, shared)[None], None


def _varlen(query: Tensor, key: Tensor, value: Tensor, packed: Layout, scale: float | None, shared: bool) -> Tensor:
    """One call for all texts: flash attention on a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    offsets, longest = packed.offsets, max(packed.lengths)
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))  # (T, H, D)
    window = (-1, 0) if packed.causal else (-1, -1)
    out = varlen_attn(query, key, value, offsets, offsets, longest, longest, scale=scale, window_size=window, enable_gqa=shared)
    assert isinstance(out, Tensor)
    return out  # (T, H, D)


def _run_by_run(query: Tensor, key: Tensor, value: Tensor, packed: Layout, scale: float | None, shared: bool) -> Tensor:
    """One call for each run of neighbours of one length, which need no mask."""
    outs, start = [], 0
    for count, length in packed.runs:
        own = slice(start, start + count * length)
        # (H, n L, D) -> (n, H, L, D), without a copy
        q, k, v = (x[:, own].unflatten(1, (count, length)).transpose(0, 1) for x in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, is_causal=packed.causal, scale=scale, enable_gqa=shared)
        outs.append(out.transpose(1, 2).flatten(0, 1))  # (n L, H, D)
        start += count * length
    return outs[0] if len(outs) == 1 else torch.cat(outs)  # (T, H, D)


@dataclass(frozen=True)
class Packing:
    """A backbone that was found to compute the same without padding."""

    padding_id: int | None  # see `pack_batch`
    longest: int | None  # of a text that no layer's window cuts; longer ones are padded


@torch.inference_mode()
def try_packing(backbone: Any, *, bidirectional: bool) -> Packing | str:
    """Gives a backbone the packed backend if it computes the same with it, else leaves it as it was and says why.

    It must agree with padding, and a text must not move when all others are changed.
    """
    before = backbone.config._attn_implementation
    if before != "sdpa":
        return f"its attention is {before}, which has no unpadded form here"
    if not getattr(backbone, "_can_set_attn_implementation", lambda: False)():
        return "its attention cannot be exchanged"
    _register()
    first = 0 if generates(backbone.config) else first_position(backbone, backbone.config)
    padding_id = first - 1 if first else None
    vocab_size = backbone.config.get_text_config().vocab_size
    device = next(backbone.parameters()).device
    # Another kernel rounds otherwise, which many layers of bfloat16 blow up; what a text must not feel is the same kernel's.
    tolerance, unfelt = (1e-4, 1e-5) if next(backbone.parameters()).dtype == torch.float32 else (0.3, 1e-2)
    limit = position_limit(backbone.config) or 0
    repeats = 1 + (limit // sum(_LENGTHS) if limit <= _SHORT_POSITIONS else 0)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in _LENGTHS * repeats]
    changed = [texts[0], *([(token + 1) % vocab_size for token in text] for text in texts[1:])]
    padded = pad_batch(texts, 0, padding_id or 0)
    ids, mask = padded.input_ids.to(device), padded.attention_mask.to(device)

    def pack(texts: list[list[int]]) -> PackedBatch:
        return pack_batch(texts, 0, padding_id=padding_id, device=device)

    wanted = forward_states(backbone, ids, mask, bidirectional=bidirectional)[mask > 0].float()  # (T, D)
    reason = None
    try:
        backbone.set_attn_implementation(BACKEND)
        still = forward_states(backbone, ids, mask, bidirectional=bidirectional)[mask > 0].float()
        batch = pack(texts)
        one = packed_states(backbone, batch, bidirectional=bidirectional)[0].float()
        other = packed_states(backbone, pack(changed), bidirectional=bidirectional)[0].float()
        if not torch.equal(still, wanted):
            reason = "padded texts get other states through this backend"
        elif not _apart(one, wanted) <= tolerance:
            reason = f"states differ from those of padded texts by {_apart(one, wanted):.1g} of their length"
        elif not _apart(other[: _LENGTHS[0]], one[: _LENGTHS[0]]) <= unfelt:
            reason = "texts of one row feel each other"
    except ModelError as error:
        reason = str(error)
    except Exception as error:  # noqa: BLE001 - whatever a family does not understand, padding it does
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if reason is not None:
        backbone.set_attn_implementation(before)
        return reason
    return Packing(padding_id, min(batch.layout.windows, default=None))


def _apart(states: Tensor, wanted: Tensor) -> float:
    """Distance from the wanted states, of their length."""
    return float((states - wanted).norm() / wanted.norm().clamp_min(1e-12))


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(BACKEND, packed_attention)
    AttentionMaskInterface.register(BACKEND, sdpa_mask)
