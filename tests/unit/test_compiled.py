"""Compiled layers: the same vectors, one compilation for all layers and lengths, and kept only where they are faster."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ullme_ray.model import Encoder, TokenBudget, Tokens, compiled
from ullme_ray.model.compiled import compile_where_faster
from ullme_ray.model.encoder import EncoderSettings, load_encoder
from ullme_ray.spec.job import ModelSpec


@pytest.fixture
def encoder(request: pytest.FixtureRequest, tiny_base: str) -> Encoder:
    spec = ModelSpec(base=tiny_base, max_tokens=64)
    unpadded = getattr(request, "param", "on")
    return load_encoder(tiny_base, EncoderSettings.of(spec), spec, device="cpu", unpadded=unpadded)


class Backend:
    """Runs the graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0
        self.calls = 0

    def __call__(self, module: torch.fx.GraphModule, _inputs: Any) -> Any:
        self.graphs += 1

        def run(*arguments: Any) -> Any:
            self.calls += 1
            return module.forward(*arguments)

        return run


def make_tokens(lengths: list[int]) -> Tokens:
    generator = np.random.default_rng(2)
    return Tokens([generator.integers(3, 128, length).tolist() for length in lengths], 1, [False] * len(lengths))


@pytest.mark.parametrize("encoder", ["on", "off"], indirect=True)
def test_compiled_layers_serve_all_lengths_with_the_same_vectors(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_MIN_GAIN", 0.0)
    tokens = make_tokens([5, 40, 1, 40, 7, 33, 12, 12, 64, 2])
    wanted = encoder.embed_tokens(tokens)
    backend = Backend()
    assert compile_where_faster(encoder, TokenBudget(128), backend=backend) is None
    graphs, calls = backend.graphs, backend.calls
    assert 0 < graphs < 12
    for tokens_per_batch in (64, 100, 4096):
        np.testing.assert_allclose(encoder.embed_tokens(tokens, tokens_per_batch=tokens_per_batch), wanted, atol=1e-5)
    assert backend.calls > calls, "the compiled code is to have run"
    # A padded batch of one row is a shape of its own to torch.compile; a packed batch always is one row.
    assert backend.graphs <= (graphs if encoder.packing else 2 * graphs), "other lengths are not to be compiled for"


def test_layers_that_are_not_faster_are_put_back(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_MIN_GAIN", 1e9)
    backend = Backend()
    assert "times as long" in (compile_where_faster(encoder, TokenBudget(128), backend=backend) or "")
    calls = backend.calls
    assert calls > 0
    encoder.embed_tokens(make_tokens([4, 9]))
    assert backend.calls == calls


def test_a_compiler_that_fails_or_computes_otherwise_is_not_used(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_MIN_GAIN", 0.0)

    def broken(_module: torch.fx.GraphModule, _inputs: Any) -> Any:
        raise OSError("no C++ compiler")

    def wrong(module: torch.fx.GraphModule, _inputs: Any) -> Any:
        return lambda *arguments: tuple(
            x.roll(1, -1) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in module.forward(*arguments)
        )

    wanted = encoder.embed_tokens(make_tokens([4, 9]))
    assert "no C++ compiler" in (compile_where_faster(encoder, TokenBudget(128), backend=broken) or "")
    assert "other vectors" in (compile_where_faster(encoder, TokenBudget(128), backend=wrong) or "")
    np.testing.assert_array_equal(encoder.embed_tokens(make_tokens([4, 9])), wanted)
