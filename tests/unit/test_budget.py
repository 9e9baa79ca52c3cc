"""The token budget: rows done once whatever memory does, and the fastest number found by timing."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from ullme_ray.errors import EmbedError
from ullme_ray.model import Encoder, TokenBudget, Tokens
from ullme_ray.model.budget import count_rows, find_budget
from ullme_ray.model.encoder import EncoderSettings, load_encoder
from ullme_ray.spec.job import ModelSpec

LENGTHS = [5, 40, 1, 40, 7, 33, 12, 12, 64, 2] * 4


class Limited(torch.nn.Module):
    """A device with room for so many tokens, before the real backbone. Errors are those of torch's allocators."""

    def __init__(self, backbone: Any, max_tokens: int, kind: type[Exception], message: str) -> None:
        super().__init__()
        self.backbone, self.config = backbone, backbone.config
        self.max_tokens, self.error = max_tokens, kind(message)
        self.refused: list[int] = []
        self.passed: list[int] = []

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **inputs: Any) -> Any:
        if input_ids.numel() > self.max_tokens:
            self.refused.append(input_ids.numel())
            raise self.error
        self.passed.append(input_ids.numel())
        return self.backbone(input_ids=input_ids, position_ids=position_ids, **inputs)


CUDA = (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = (RuntimeError, "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate")


def make_encoder(folder: str, unpadded: Any = "auto") -> Encoder:
    spec = ModelSpec(base=folder, max_tokens=64)
    return load_encoder(folder, EncoderSettings.of(spec), spec, device="cpu", unpadded=unpadded)


def make_tokens() -> Tokens:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 128, (length,), generator=generator).tolist() for length in LENGTHS]
    return Tokens(ids, 1, [False] * len(ids))


@pytest.mark.parametrize("unpadded", ["on", "off"])
@pytest.mark.parametrize(("kind", "message"), [CUDA, CPU], ids=["cuda", "cpu"])
def test_every_vector_is_there_though_memory_holds_few_tokens(
    tiny_base: str, unpadded: str, kind: type[Exception], message: str
) -> None:
    encoder, tokens = make_encoder(tiny_base, unpadded), make_tokens()
    wanted = encoder.embed_tokens(tokens)
    limited = Limited(encoder.backbone, 100, kind, message)
    encoder.backbone = limited
    budget = TokenBudget(4096)
    np.testing.assert_allclose(encoder.embed_tokens(tokens, tokens_per_batch=budget), wanted, atol=1e-6)
    assert limited.refused
    assert 50 <= budget.tokens <= 100
    if unpadded == "on":
        assert sum(limited.passed) == tokens.num_tokens, "no row is computed twice"
    # What was learned stays: the next unit meets no refusal.
    limited.refused.clear()
    encoder.embed_tokens(tokens, tokens_per_batch=budget)
    assert limited.refused == []


def test_a_text_that_does_not_fit_alone_is_named_with_a_way_out(tiny_base: str) -> None:
    encoder = make_encoder(tiny_base)
    encoder.backbone = Limited(encoder.backbone, 63, *CUDA)
    with pytest.raises(EmbedError, match=r"a single text of 64 tokens does not fit .* lower model\.max_tokens"):
        encoder.embed_tokens(make_tokens())


def test_another_error_is_not_taken_for_memory(tiny_base: str) -> None:
    """The control: only memory makes it try again."""
    encoder = make_encoder(tiny_base)
    limited = Limited(encoder.backbone, 100, RuntimeError, "expected all tensors on one device")
    encoder.backbone = limited
    with pytest.raises(RuntimeError, match="one device"):
        encoder.embed_tokens(make_tokens())
    assert len(limited.refused) == 1


def test_a_real_allocator_that_refuses_is_survived(tiny_base: str) -> None:
    """A process of its own with little address space left: the words of torch's CPU allocator are as the code expects."""
    script = f"""
import json, resource, sys
sys.path[:0] = {sys.path!r}
import numpy as np, torch
torch.set_num_threads(1)
from test_budget import make_encoder
from ullme_ray.model import TokenBudget, Tokens
encoder = make_encoder({tiny_base!r}, "off")
tokens = Tokens([[5] * 64] * 3000, 0, [False] * 3000)
wanted = encoder.embed_tokens(tokens, tokens_per_batch=1024)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 40 * 2**20, resource.RLIM_INFINITY))
budget = TokenBudget(3000 * 64)
vectors = encoder.embed_tokens(tokens, tokens_per_batch=budget)
print(json.dumps([budget.tokens, float(np.abs(vectors - wanted).max())]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    tokens, difference = json.loads(done.stdout)
    assert tokens < 3000 * 64, "the allocator is to have refused"
    assert difference <= 1e-6


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("tokens", [1, 7, 64, 10**6])
def test_batches_hold_every_row_once_within_budget(padded: bool, tokens: int) -> None:
    batches: list[list[int]] = []
    TokenBudget(tokens).work(LENGTHS, batches.append, padded=padded)
    assert sorted(row for rows in batches for row in rows) == list(range(len(LENGTHS)))
    for rows in batches:
        size = len(rows) * LENGTHS[rows[0]] if padded else sum(LENGTHS[row] for row in rows)
        assert size <= tokens or len(rows) == 1
    assert count_rows([4, 2, 2], 8, padded=False) == 3
    assert count_rows([4, 2, 2], 8, padded=True) == 2


class Device:
    """Its own clock, a fixed cost for each call, and room for so many tokens."""

    def __init__(self, call_s: float, tokens_per_s: float, max_tokens: int) -> None:
        self.call_s, self.tokens_per_s, self.max_tokens = call_s, tokens_per_s, max_tokens
        self.now = 0.0
        self.calls: list[int] = []

    def forward(self, tokens: int) -> None:
        self.calls.append(tokens)
        if tokens > self.max_tokens:
            raise torch.OutOfMemoryError(CUDA[1])
        self.now += max(self.call_s, tokens / self.tokens_per_s)

    def find(self, kind: str = "cpu") -> int:
        return find_budget(self.forward, kind, clock=lambda: self.now).tokens


def test_the_smallest_budget_near_the_best_is_found() -> None:
    assert Device(call_s=0.01, tokens_per_s=1e5, max_tokens=10**9).find() == 1024  # 1000 tokens fill a call
    assert Device(call_s=0.1, tokens_per_s=1e7, max_tokens=10**9).find("cuda") == 2**18  # it never fills: the largest
    assert Device(call_s=0.1, tokens_per_s=1e7, max_tokens=5000).find("cuda") == 4096  # what memory holds


def test_a_slow_model_is_timed_long_enough_and_not_for_ever() -> None:
    device = Device(call_s=2.0, tokens_per_s=1000, max_tokens=10**9)  # as a model of 135M parameters on two cores
    assert device.find() == 2048
    assert device.now < 20
    device = Device(call_s=0.0, tokens_per_s=20, max_tokens=10**9)
    assert device.find() == 256
    assert device.calls == [256]


def test_encoder_finds_a_budget_of_its_own(tiny_base: str) -> None:
    assert make_encoder(tiny_base).find_budget().tokens in [2**n for n in range(8, 14)]
