"""How fast a device could be, and how much work a model is: what MFU is made of."""

from __future__ import annotations

import time
from typing import Any

import torch

# Dense bf16 peaks of the vendors' data sheets, FLOP/s.
_GPU_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12, "B200": 2250e12}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the device: the data sheet's for a known GPU, else measured with a square matrix product of `dtype`."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, peak in _GPU_PEAKS.items():
            if key in name:
                return peak
    size, repeats = 1024, 5
    a = torch.randn(size, size, device=device).to(dtype)
    a @ a
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def non_embedding_parameters(lm: Any) -> int:
    """Parameters that every token is multiplied with: those of the layers, neither token table nor head."""
    embedding = lm.get_input_embeddings()
    return sum(p.numel() for p in lm.base_model.parameters()) - sum(p.numel() for p in embedding.parameters())
