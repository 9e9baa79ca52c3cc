"""Does this model really attend both ways in encode mode, and one way in generate mode? Asked at every load, by experiment.

Some families and attention backends ignore `is_causal=False` and would compute causal vectors without a word. Cost: a dozen
forward passes over eight tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ullme_ray.errors import ModelError
from ullme_ray.model.encode import forward_states
from ullme_ray.model.family import generates

_NUM_TOKENS, _NUM_PADDING = 8, 3
_ONE_WAY = {True: "ignores is_causal=False", False: "is said to be an encoder, but attends one way"}


@torch.no_grad()
def probe_attention(backbone: Any, vocab_size: int) -> None:
    """Changes the last token and watches the first token's state, with and without padding (METHOD: two passes).

    An encoder is asked for its one pass only.

    Raises:
        ModelError: the state does not move in encode mode, moves in generate mode, or padding changes the vectors.
    """
    family = backbone.config.model_type
    backend = getattr(backbone.config, "_attn_implementation", "its own")
    device = next(backbone.parameters()).device
    fp32 = next(backbone.parameters()).dtype == torch.float32
    tolerance = 1e-5 if fp32 else 1e-2
    ids = torch.randint(0, vocab_size, (1, _NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % vocab_size
    full = torch.ones_like(ids)
    padding = torch.zeros(1, _NUM_PADDING, dtype=torch.long)
    padded_mask = torch.cat([full, padding], dim=1)

    passes = (True, False) if generates(backbone.config) else (True,)

    was_training = backbone.training
    backbone.eval()
    try:
        plain: dict[bool, Tensor] = {}
        for padded in (False, True):
            mask = (padded_mask if padded else full).to(device)
            one, two = (torch.cat([i, padding], dim=1) if padded else i for i in (ids, changed))
            for bidirectional in passes:
                states = forward_states(backbone, one.to(device), mask, bidirectional=bidirectional)[0, :_NUM_TOKENS].float()
                other = forward_states(backbone, two.to(device), mask, bidirectional=bidirectional)[0, 0].float()
                moved = _relative_change(states[0], other) > tolerance
                if moved != bidirectional:
                    fault = (
                        _ONE_WAY[generates(backbone.config)]
                        if bidirectional
                        else "lets early tokens see later ones in generate mode"
                    )
                    raise ModelError(
                        f"model family {family} with {backend} attention {fault}"
                        f"{' under padding' if padded else ''}, so it cannot be an embedder here; choose another family"
                    )
                if padded and _relative_change(plain[bidirectional], states) > max(tolerance * 10, 1e-4):
                    raise ModelError(f"model family {family} with {backend} attention computes other vectors under padding")
                plain.setdefault(bidirectional, states)
    finally:
        backbone.train(was_training)


def _relative_change(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / a.norm().clamp_min(1e-12))
