"""GradCache changes memory, never the gradient; checked against one plain backward written without our step.

METHOD's invariants on one rank: chunk sizes 1, 2, 3, B and none, dropout on, LoRA and full fine-tuning, with and without
activation checkpointing, all presets. Ranks and ZeRO stages: tests/integration/test_zero_gradients.py.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from grl_reference import (
    CASES,
    SEED,
    STEP,
    B,
    PlainEngine,
    case_module,
    examples,
    gradient,
    make_batch,
    make_module,
    objective,
    plain_gradient,
    relative_error,
)
from torch.utils.checkpoint import checkpoint, noop_context_fn

from ullme_ray.errors import ModelError, TrainingError
from ullme_ray.model.adapters import merge_lora
from ullme_ray.model.dropout import RowDropout, keep_mask, row_seeds
from ullme_ray.model.encode import encode_batch, groups_of_like_length
from ullme_ray.model.tokenizing import TextTokenizer, load_tokenizer
from ullme_ray.train.collate import TrainBatch, collate, shortest_first
from ullme_ray.train.step import backward_step, train_step


def batch_of(folder: str, case: str) -> TrainBatch:
    """Scores computed before training come with the batch only where the case says so."""
    batch = make_batch(folder)
    return batch if objective(case).reference == "precomputed" else replace(batch, reference_logps=None)


@pytest.mark.parametrize("case", CASES)
def test_gradient_is_that_of_plain_training_for_every_chunk_size(tiny_base: str, case: str) -> None:
    batch, spec = batch_of(tiny_base, case), objective(case)
    module = case_module(tiny_base, case)
    lora = CASES[case][1] in ("shared", "separate")
    assert lora == any(isinstance(m, RowDropout) and m.p > 0 for m in module.modules())
    expected = plain_gradient(module, batch, spec)
    for chunk_size, checkpointing in [(1, False), (2, False), (3, False), (B, False), (B + 5, False), (2, True), (B, True)]:
        other = case_module(tiny_base, case, checkpointing=checkpointing)
        backward_step(PlainEngine(other), batch, spec, chunk_size=chunk_size, step=STEP, seed=SEED)
        assert relative_error(gradient(other), expected) <= 1e-5, (chunk_size, checkpointing)
    # Controls that must fail: another dropout mask (LoRA), and chunks whose gradients do not add up.
    if lora:
        other = case_module(tiny_base, case)
        backward_step(PlainEngine(other), batch, spec, chunk_size=3, step=STEP + 1, seed=SEED)
        assert relative_error(gradient(other), expected) > 1e-2
    other = case_module(tiny_base, case)
    backward_step(PlainEngine(other, forget=True), batch, spec, chunk_size=3, step=STEP, seed=SEED)
    assert relative_error(gradient(other), expected) > 1e-2


def test_separate_adapters_are_each_trained_by_their_own_pass(tiny_base: str) -> None:
    batch = batch_of(tiny_base, "grl-separate")
    encode_only = case_module(tiny_base, "grl-separate")
    backward_step(PlainEngine(encode_only), batch, objective("cl"), chunk_size=3, step=STEP, seed=SEED)
    assert gradient(encode_only).keys() == {n for n, _ in encode_only.named_parameters() if ".default." in n}
    both = case_module(tiny_base, "grl-separate")
    backward_step(PlainEngine(both), batch, objective("grl-separate"), chunk_size=3, step=STEP, seed=SEED)
    assert {n.split(".default.")[0] for n in gradient(both) if ".default." in n} == {
        n.split(".generate.")[0] for n in gradient(both) if ".generate." in n
    }
    assert len(gradient(both)) == 2 * len(gradient(encode_only))


def test_only_the_adapter_that_encodes_is_merged_for_the_export(tiny_base: str) -> None:
    queries = make_batch(tiny_base).queries
    module = case_module(tiny_base, "grl-separate").eval()
    with torch.no_grad():
        expected = module(queries)[0]
        merged = encode_batch(merge_lora(copy.deepcopy(module.lm)).base_model, queries, "mean")
        other = copy.deepcopy(module.lm).merge_and_unload(adapter_names=["generate"])
        control = encode_batch(other.base_model, queries, "mean")
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)
    assert (control - expected).abs().max() > 1e-2


def test_recompute_sees_the_mode_and_the_adapter_of_the_first_time(tiny_base: str) -> None:
    """A checkpointed layer is run again in backward; a recompute under another adapter gives another gradient."""
    batch, spec = batch_of(tiny_base, "grl-separate"), objective("grl-separate")
    expected = plain_gradient(case_module(tiny_base, "grl-separate"), batch, spec)
    wrong = case_module(tiny_base, "grl-separate", checkpointing=True)
    for layer in wrong.causal_lm.modules():
        if hasattr(layer, "_gradient_checkpointing_func"):
            plain = layer._gradient_checkpointing_func.keywords | {"context_fn": noop_context_fn}
            layer._gradient_checkpointing_func = functools.partial(checkpoint, **plain)
    with pytest.raises(ModelError, match="dropout needs row seeds"):  # nobody tells the recompute whose rows these are
        backward_step(PlainEngine(wrong), batch, spec, chunk_size=3, step=STEP, seed=SEED)
    right = case_module(tiny_base, "grl-separate", checkpointing=True)
    calls: list[tuple[str | None, bool]] = []
    inside = right.causal_lm.base_model.layers[0].mlp  # a hook on the layer itself would not run again
    inside.register_forward_pre_hook(lambda *_: calls.append((right.adapters.current, torch.is_grad_enabled())))
    backward_step(PlainEngine(right), batch, spec, chunk_size=B, step=STEP, seed=SEED)
    assert relative_error(gradient(right), expected) <= 1e-5
    # encode, generate, reference; then the recomputations, the last pass first; each pass in three groups of like length
    passes = ["default", "generate", None, "generate", "default"]
    assert [adapter for adapter, _ in calls] == [adapter for adapter in passes for _ in range(3)]


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


def test_gradient_does_not_depend_on_the_order_of_rows(tiny_base: str) -> None:
    """Rows may be sorted by length: their dropout follows their number, not their place."""
    tokenizer = TextTokenizer(load_tokenizer(tiny_base), max_tokens=64, query_prompt="Find:\n", passage_prompt="")
    rows = [replace(example, query=example.query * (1 + 5 * i % 3)) for i, example in enumerate(examples(B))]
    ordered = shortest_first(rows)
    lengths = [max(len(text) for text in (e.query, *e.passages)) for e in ordered]
    assert lengths == sorted(lengths)
    assert [e.row for e in ordered] != sorted(e.row for e in ordered) == [e.row for e in rows]
    renumbered = [replace(example, row=place) for place, example in enumerate(ordered)]  # the control
    gradients = []
    for order in (rows, ordered, renumbered):
        batch = collate(order, tokenizer, with_generation=True, max_generation_tokens=128)
        module = case_module(tiny_base, "grl-separate")
        backward_step(PlainEngine(module), batch, objective("grl"), chunk_size=3, step=STEP, seed=SEED)
        gradients.append(gradient(module))
    assert relative_error(gradients[1], gradients[0]) <= 1e-5
    assert relative_error(gradients[2], gradients[0]) > 1e-2


def test_groups_of_like_length_cost_least() -> None:
    generator = torch.Generator().manual_seed(0)
    for num_rows in (1, 2, 3, 7):
        lengths = torch.randint(1, 30, (num_rows,), generator=generator).tolist()
        for num_groups in (1, 2, 3, 9):
            groups = groups_of_like_length(lengths, num_groups)
            assert sorted(row for group in groups for row in group) == list(range(num_rows))
            assert len(groups) == min(num_groups, num_rows)
            ordered = sorted(lengths)
            cheapest = min(
                sum((b - a) * ordered[b - 1] for a, b in pairwise((0, *cut, num_rows)))
                for cut in combinations(range(1, num_rows), len(groups) - 1)
            )
            assert sum(len(group) * max(lengths[row] for row in group) for group in groups) == cheapest
    # Ranks must run the model equally often, also when all rows are alike, and when there are very many.
    assert [len(groups_of_like_length([5] * num_rows, 3)) for num_rows in (2, 3, 1000)] == [2, 3, 3]
    assert sorted(row for group in groups_of_like_length(list(range(1000)), 3) for row in group) == list(range(1000))


def test_losses_do_not_depend_on_chunk_size(tiny_base: str) -> None:
    batch, spec = make_batch(tiny_base), objective("grl")
    losses = [
        backward_step(PlainEngine(make_module(tiny_base, "shared")), batch, spec, chunk_size=c, step=0, seed=0)
        for c in (1, 3, B)
    ]
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_before_the_update(tiny_base: str) -> None:
    module = make_module(tiny_base, "full")
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
