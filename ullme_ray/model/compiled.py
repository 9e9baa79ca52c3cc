"""torch.compile for a loaded encoder: layer by layer, and kept only where it is measured to be faster.

All layers run the same code, so it is compiled once, for any number of tokens. Attention without padding stays as it is: it
depends on every text's length. Compiling takes some ten seconds in each process, and a C++ compiler on the machine; whether it
pays differs with device, model and batch, which is why it is timed against the layers as they were.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ullme_ray.model.budget import TokenBudget
from ullme_ray.model.packed import BACKEND, packed_attention
from ullme_ray.model.tokenizing import Tokens

if TYPE_CHECKING:
    from ullme_ray.model.encoder import Encoder

_MIN_GAIN = 1.03
_MIN_COSINE = {"float32": 0.99999, "bfloat16": 0.999}  # to the vectors of the layers as they were
_REPEATS = 3


def compile_where_faster(
    encoder: Encoder, budget: TokenBudget, *, backend: str | Callable[..., Any] = "inductor"
) -> str | None:
    """Compiles the layers of `encoder` if that makes it faster; else leaves it as it was and says why.

    Args:
        budget: tokens of a batch, as the work will have them.
        backend: of torch.compile.
    """
    tokens = _sample(encoder, budget.tokens)
    plain_s, plain = _timed(encoder, tokens, budget)
    layers = _layers(encoder.backbone)
    if not layers:
        return "its layers were not found"
    try:
        _leave_attention_alone()
        for layer in layers:
            layer.compile(dynamic=True, backend=backend)
        compiled_s, compiled = _timed(encoder, tokens, budget)
        cosine = float((compiled * plain).sum(axis=1).min())
        if not cosine >= _MIN_COSINE[encoder.settings.dtype]:
            reason = f"compiled layers compute other vectors: cosine {cosine:.5f}"
        elif plain_s < _MIN_GAIN * compiled_s:
            reason = f"compiled layers take {compiled_s / plain_s:.2f} times as long"
        else:
            return None
    except Exception as error:  # noqa: BLE001 - whatever compiler or model does not manage, the plain layers do
        said = " ".join(str(error).split())  # the compiler names itself in the first line, and what failed in the next
        reason = f"{type(error).__name__}: {said[:200]}"
    for layer in layers:
        layer._compiled_call_impl = None
    torch.compiler.reset()
    return reason


def _layers(backbone: Any) -> list[torch.nn.Module]:
    """The blocks that a model repeats: its longest list of modules."""
    lists = [list(module) for module in backbone.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=len, default=[])


def _leave_attention_alone() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(BACKEND, torch.compiler.disable(packed_attention))


def _sample(encoder: Encoder, tokens_per_batch: int) -> Tokens:
    """Texts of mixed lengths that fill some batches."""
    generator = np.random.default_rng(5)
    most, lengths = encoder.settings.max_tokens, list[int]()
    while sum(lengths) < 3 * tokens_per_batch:
        lengths.append(int(np.clip(generator.lognormal(np.log(min(90, most / 2)), 0.9), 1, most)))
    vocab_size = encoder.backbone.config.get_text_config().vocab_size
    ids = [generator.integers(0, vocab_size, length).tolist() for length in lengths]
    return Tokens(ids, 0, [False] * len(ids))


def _timed(encoder: Encoder, tokens: Tokens, budget: TokenBudget) -> tuple[float, np.ndarray]:
    """Seconds of the fastest of a few runs, after one that warms up (and compiles), and the vectors."""
    seconds = []
    for _ in range(1 + _REPEATS):
        own = TokenBudget(budget.tokens)
        start = time.perf_counter()
        vectors = encoder.embed_tokens(tokens, tokens_per_batch=own)
        seconds.append(time.perf_counter() - start)
        if own.tokens < budget.tokens:
            raise MemoryError("memory does not hold a batch")
    return min(seconds[1:]), vectors
