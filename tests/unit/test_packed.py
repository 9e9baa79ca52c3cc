"""Unpadded against padded: the same vectors from both, family by family, and a control that lets texts see each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_families import FAMILIES as DECODERS
from test_families import save_tiny
from tiny_encoders import FAMILIES as ENCODERS
from tiny_encoders import save_encoder

from ullme_ray.errors import ModelError
from ullme_ray.model import Encoder, Tokens, packed
from ullme_ray.model.backbone import load_backbone
from ullme_ray.model.encode import encode_batch, forward_states, pad_batch
from ullme_ray.model.encoder import EncoderSettings, load_encoder
from ullme_ray.model.packed import BACKEND, Packing, encode_packed, pack_batch, packed_states, try_packing
from ullme_ray.model.pooling import pool, pool_packed, pooling_mask
from ullme_ray.spec.job import ModelSpec

POOLINGS = ("mean", "lasttoken", "cls", "weightedmean")
# Texts of many lengths, two of the same length apart and two side by side, one of a single token, one that is padding ids.
LENGTHS = (9, 3, 3, 1, 17, 9, 2)
# Families that keep padding, and why.
PADDED = {
    "gemma2": "its attention is eager",
    "stablelm": "its attention is eager",
    "nemotron": "its attention is eager",
    "t5": "not computed without padding",
    "mt5": "not computed without padding",
    "modernbert": "longer than the window",  # of its tiny config
}


def make_texts(vocab_size: int = 128) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]


def save(family: str, folder: Path) -> str:
    return save_encoder(family, str(folder)) if family in ENCODERS else save_tiny(family, folder)


def load(family: str, folder: Path) -> Any:
    """The backbone, with weights that make attention matter: with those of a fresh model all texts look alike."""
    path = save(family, folder)
    backbone = load_backbone(path, ModelSpec(base=path))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for name, parameter in backbone.named_parameters():
            if parameter.dim() == 2 and "embed" not in name and "wte" not in name:
                parameter.normal_(std=0.2, generator=generator)
    return backbone


FAMILIES = [*(f for f, (_, end) in DECODERS.items() if end in ("sdpa", "eager")), *ENCODERS]


@pytest.mark.parametrize("family", FAMILIES)
def test_family_gives_the_same_vectors_without_padding_or_keeps_it(family: str, tmp_path: Path) -> None:
    backbone = load(family, tmp_path)
    texts = make_texts()
    before = backbone.config._attn_implementation
    passes = (True, False) if family in DECODERS else (True,)
    padded = pad_batch(texts, 2, 1)
    for bidirectional in passes:
        with torch.inference_mode():
            wanted = {p: encode_batch(backbone, padded, p, bidirectional=bidirectional) for p in POOLINGS}
        packing = try_packing(backbone, bidirectional=bidirectional)
        if family in PADDED:
            assert PADDED[family] in str(packing)
            assert backbone.config._attn_implementation == before
            continue
        assert isinstance(packing, Packing), packing
        assert backbone.config._attn_implementation == BACKEND
        batch = pack_batch(texts, 2, padding_id=packing.padding_id)
        with torch.inference_mode():
            got = {p: encode_packed(backbone, batch, p, bidirectional=bidirectional) for p in POOLINGS}
            still = encode_batch(backbone, padded, "mean", bidirectional=bidirectional)
        for pooling in POOLINGS:
            torch.testing.assert_close(got[pooling], wanted[pooling], atol=1e-5, rtol=0)
        assert torch.equal(still, wanted["mean"]), "a padded call through the packed backend is plain sdpa"
        backbone.set_attn_implementation(before)


@pytest.mark.parametrize("family", ["llama", "xlm-roberta"])
def test_texts_that_see_each_other_are_found(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: attention over the whole row gives other vectors, and the probe refuses the model."""
    backbone = load(family, tmp_path)
    texts = make_texts()
    with torch.inference_mode():
        wanted = encode_batch(backbone, pad_batch(texts, 0, 1), "mean")
        packing = try_packing(backbone, bidirectional=True)
        assert isinstance(packing, Packing)
        batch = pack_batch(texts, 0, padding_id=packing.padding_id)
        batch.layout.lengths = [sum(LENGTHS)]
        leaking = encode_packed(backbone, batch, "mean")
    assert (leaking - wanted).abs().max() > 1e-2
    backbone.set_attn_implementation("sdpa")
    monkeypatch.setattr(packed.Layout, "runs", property(lambda layout: [(1, sum(layout.lengths))]))
    assert "states differ" in str(try_packing(backbone, bidirectional=True))
    assert backbone.config._attn_implementation == "sdpa"


def test_positions_that_go_on_over_texts_are_found(tmp_path: Path) -> None:
    backbone = load("gpt2", tmp_path)
    texts = make_texts()
    with torch.inference_mode():
        wanted = encode_batch(backbone, pad_batch(texts, 0, 0), "mean")
        assert isinstance(try_packing(backbone, bidirectional=True), Packing)
        batch = pack_batch(texts, 0)
        batch.position_ids.copy_(torch.arange(sum(LENGTHS)))
        assert (encode_packed(backbone, batch, "mean") - wanted).abs().max() > 1e-3


def test_a_causal_row_sees_nothing_ahead(tmp_path: Path) -> None:
    backbone = load("llama", tmp_path)
    texts = make_texts()
    changed = [[*text[:-1], (text[-1] + 1) % 128] for text in texts]
    assert isinstance(try_packing(backbone, bidirectional=False), Packing)
    with torch.inference_mode():
        for bidirectional in (False, True):
            one, two = (packed_states(backbone, pack_batch(t, 0), bidirectional=bidirectional)[0] for t in (texts, changed))
            assert torch.equal(one[0], two[0]) is not bidirectional


def test_roberta_counts_positions_over_tokens_that_are_no_padding_id(tmp_path: Path) -> None:
    """A text may hold the padding id itself: `<pad>` written out."""
    backbone = load("xlm-roberta", tmp_path)
    texts = [[0, 9, 1, 1, 8, 2], [0, 2], [1]]
    with torch.inference_mode():
        wanted = encode_batch(backbone, pad_batch(texts, 0, 1), "mean")
        packing = try_packing(backbone, bidirectional=True)
        assert isinstance(packing, Packing)
        assert packing.padding_id == 1
        torch.testing.assert_close(
            encode_packed(backbone, pack_batch(texts, 0, padding_id=1), "mean"), wanted, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("prompt_length", [0, 2, 20])
def test_pooling_of_packed_states_is_that_of_padded_ones(pooling: str, prompt_length: int) -> None:
    torch.manual_seed(0)
    states = [torch.randn(length, 4) for length in LENGTHS]
    padded = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(length) for length in LENGTHS], batch_first=True)
    wanted = pool(padded, mask, pooling_mask(mask, torch.full((len(LENGTHS),), prompt_length)), pooling)
    offsets = torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32)
    torch.testing.assert_close(pool_packed(torch.cat(states), offsets, prompt_length, pooling), wanted)


def make_encoder(folder: str, **changes: Any) -> Encoder:
    spec = ModelSpec(base=folder, max_tokens=64)
    return load_encoder(folder, EncoderSettings.of(spec), spec, device="cpu", **changes)


def test_encoder_uses_it_by_itself_and_any_batch_gives_the_same(tiny_base: str) -> None:
    tokens = Tokens(make_texts(), 2, [False] * len(LENGTHS))
    unpadded, padded = make_encoder(tiny_base), make_encoder(tiny_base, unpadded="off")
    assert unpadded.packing is not None
    assert padded.packing is None
    assert padded.backbone.config._attn_implementation == "sdpa"
    wanted = padded.embed_tokens(tokens)
    for tokens_per_batch in (1, 12, 8192):
        np.testing.assert_allclose(unpadded.embed_tokens(tokens, tokens_per_batch=tokens_per_batch), wanted, atol=1e-6)


def test_encoder_that_is_told_to_and_cannot_says_why(tmp_path: Path) -> None:
    folder = save_encoder("t5", str(tmp_path))
    assert make_encoder(folder).packing is None
    with pytest.raises(ModelError, match=r"embed\.unpadded = on, but the model in .* needs padding: an attention with"):
        make_encoder(folder, unpadded="on")


def test_texts_longer_than_a_window_are_padded(tmp_path: Path) -> None:
    """ModernBERT's local layers see half of `local_attention` to each side of a token, and the token."""
    folder = save_encoder("modernbert", str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"local_attention": 16}))
    unpadded, padded = make_encoder(folder), make_encoder(folder, unpadded="off")
    assert unpadded.packing is not None
    assert unpadded.packing.longest == 9
    tokens = Tokens(make_texts(), 0, [False] * len(LENGTHS))
    np.testing.assert_allclose(unpadded.embed_tokens(tokens, tokens_per_batch=17), padded.embed_tokens(tokens), atol=1e-6)
    with pytest.raises(AssertionError, match="longer than the window"):
        packed_states(unpadded.backbone, pack_batch(tokens.input_ids, 0), bidirectional=True)


def test_training_keeps_its_backend(tiny_base: str) -> None:
    """An encoder in the same process changes nothing for a backbone that is not its own."""
    spec = ModelSpec(base=tiny_base)
    backbone = load_backbone(tiny_base, spec)
    batch = pad_batch(make_texts(), 0, 0)
    with torch.inference_mode():
        before = forward_states(backbone, batch.input_ids, batch.attention_mask, bidirectional=True)
        assert make_encoder(tiny_base).packing is not None
        after = forward_states(backbone, batch.input_ids, batch.attention_mask, bidirectional=True)
    assert backbone.config._attn_implementation == "sdpa"
    assert torch.equal(before, after)
