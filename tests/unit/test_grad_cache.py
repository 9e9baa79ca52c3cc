"""GradCache changes memory, never the gradient; checked against one plain backward written without our step.

METHOD's invariants on one rank: chunk sizes 1, 2, 3, B and none, dropout on, LoRA and full fine-tuning, with and without
activation checkpointing, all presets. Ranks and ZeRO stages: tests/integration/test_zero_gradients.py.
"""

from __future__ import annotations

import pytest
import torch
from grl_reference import (
    SEED,
    STEP,
    B,
    PlainEngine,
    examples,
    gradient,
    make_batch,
    make_module,
    objective,
    plain_gradient,
    relative_error,
)

from ullme_ray.errors import TrainingError
from ullme_ray.model.dropout import RowDropout, keep_mask, row_seeds
from ullme_ray.model.tokenizing import load_tokenizer
from ullme_ray.train.step import backward_step, train_step


@pytest.mark.parametrize("lora", [True, False], ids=["lora-dropout", "full"])
@pytest.mark.parametrize("preset", ["cl", "sft", "dpo", "grl"])
def test_gradient_is_that_of_plain_training_for_every_chunk_size(tiny_base: str, preset: str, lora: bool) -> None:
    batch, spec = make_batch(tiny_base), objective(preset)
    module = make_module(tiny_base, lora=lora)
    assert lora == any(isinstance(m, RowDropout) and m.p > 0 for m in module.modules())
    expected = plain_gradient(module, batch, spec)
    for chunk_size in (1, 2, 3, B, B + 5):
        for checkpointing in (False, True):
            other = make_module(tiny_base, lora=lora, checkpointing=checkpointing)
            backward_step(PlainEngine(other), batch, spec, chunk_size=chunk_size, step=STEP, seed=SEED)
            assert relative_error(gradient(other), expected) <= 1e-5, (chunk_size, checkpointing)
    # Controls that must fail: another dropout mask (LoRA), and chunks whose gradients do not add up.
    if lora:
        other = make_module(tiny_base, lora=lora)
        backward_step(PlainEngine(other), batch, spec, chunk_size=3, step=STEP + 1, seed=SEED)
        assert relative_error(gradient(other), expected) > 1e-2
    other = make_module(tiny_base, lora=lora)
    backward_step(PlainEngine(other, forget=True), batch, spec, chunk_size=3, step=STEP, seed=SEED)
    assert relative_error(gradient(other), expected) > 1e-2


def test_rows_of_a_batch_keep_their_own_passages(tiny_base: str) -> None:
    batch, rows = make_batch(tiny_base), examples(B)
    hf = load_tokenizer(tiny_base)
    for chunk_size in (1, 3, B):
        row = 0
        for chunk in batch.chunks(chunk_size):
            for i in range(len(chunk)):
                assert hf.decode(chunk.queries.input_ids[i], skip_special_tokens=True) == "Find:\n" + rows[row].query
                for j, passage in enumerate(rows[row].passages):
                    flat = i * chunk.num_passages + j
                    assert hf.decode(chunk.passages.input_ids[flat], skip_special_tokens=True) == passage
                    assert chunk.generation is not None
                    scored = chunk.generation.input_ids[flat][chunk.generation.attention_mask[flat] > 0]
                    length = int(chunk.generation.passage_lengths[flat])
                    assert hf.decode(scored[-length:], skip_special_tokens=True) == passage
                row += 1
        assert row == B


def test_losses_do_not_depend_on_chunk_size(tiny_base: str) -> None:
    batch, spec = make_batch(tiny_base), objective("grl")
    losses = [
        backward_step(PlainEngine(make_module(tiny_base, lora=True)), batch, spec, chunk_size=c, step=0, seed=0)
        for c in (1, 3, B)
    ]
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_before_the_update(tiny_base: str) -> None:
    module = make_module(tiny_base, lora=False)
    with torch.no_grad():
        next(module.parameters()).fill_(float("nan"))
    engine = PlainEngine(module)
    with pytest.raises(TrainingError, match=r"step 1: .*contrastive.* loss is not finite on ranks \[0\]"):
        train_step(engine, make_batch(tiny_base), objective("grl"), chunk_size=2, step=0, seed=0)
    assert not engine.stepped


def test_dropout_masks_follow_the_row_and_keep_the_right_share() -> None:
    seeds = row_seeds(1, 2, torch.arange(64), 0)
    mask = keep_mask(seeds, 3, 50, 64, 0.3)
    assert mask.float().mean().item() == pytest.approx(0.7, abs=0.005)
    # no row, position or feature stands out, and neighbours are unrelated
    for dim in ((1, 2), (0, 2), (0, 1)):
        assert (mask.float().mean(dim=dim) - 0.7).abs().max() < 0.05
    centred = mask.float() - mask.float().mean()
    for dim in range(3):
        neighbours = (centred.narrow(dim, 0, mask.shape[dim] - 1) * centred.narrow(dim, 1, mask.shape[dim] - 1)).mean()
        assert abs(float(neighbours)) / 0.21 < 0.02
    # any two features are dropped independently of each other: 64 x 50 tokens, so chance alone gives about 0.018
    by_feature = centred.reshape(-1, 64)
    correlation = torch.corrcoef(by_feature.T) - torch.eye(64)
    assert correlation.abs().max() < 0.1
    assert correlation.std() < 0.025
    assert torch.equal(keep_mask(seeds[5:6], 3, 20, 64, 0.3), mask[5:6, :20])  # alone and shorter: the same mask
    assert not torch.equal(keep_mask(seeds[5:6], 4, 20, 64, 0.3), mask[5:6, :20])
