"""Every loss against a few lines of float64 numpy, written from the formula and not from our code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ullme_ray.losses import alignment_kl, candidate_masks, dpo, infonce, sft

B, P, N, D = 5, 2, 3, 8
K = P + N


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def infonce_by_hand(q: np.ndarray, p: np.ndarray, temperature: float) -> np.ndarray:
    """Loops over queries and positives; all texts distinct."""
    losses = []
    for i in range(len(q)):
        scores = np.einsum("d,bkd->bk", q[i], p) / temperature
        others = np.concatenate([scores[j] if j != i else scores[i, P:] for j in range(len(q))])
        own = [np.log(np.exp(s) + np.exp(others).sum()) - s for s in scores[i, :P]]
        losses.append(np.mean(own))
    return np.array(losses)


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_infonce_value_and_gradient(rng: np.random.Generator, temperature: float) -> None:
    q, p = unit(rng, B, D), unit(rng, B, K, D)
    masks = candidate_masks(torch.arange(B), torch.arange(B * K).view(B, K) + 100, first_row=0, num_rows=B, num_positives=P)
    tq = torch.tensor(q, dtype=torch.float32, requires_grad=True)
    tp = torch.tensor(p, dtype=torch.float32, requires_grad=True)
    loss = infonce(tq, tp.flatten(0, 1), masks, temperature=temperature)
    np.testing.assert_allclose(loss.detach().numpy(), infonce_by_hand(q, p, temperature), rtol=2e-5)
    loss.sum().backward()
    step = 1e-6
    bumped = p.copy()
    bumped[1, 2, 3] += step
    slope = (infonce_by_hand(q, bumped, temperature).sum() - infonce_by_hand(q, p, temperature).sum()) / step
    assert tp.grad is not None
    assert float(tp.grad[1, 2, 3]) == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_query_without_negatives_has_loss_zero_and_finite_gradient() -> None:
    q = torch.ones(1, 2, requires_grad=True)
    masks = candidate_masks(torch.tensor([1]), torch.tensor([[5]]), first_row=0, num_rows=1, num_positives=1)
    loss = infonce(q, torch.ones(1, 2), masks, temperature=0.01)
    loss.sum().backward()
    assert loss.item() == 0.0
    assert q.grad is not None
    assert torch.isfinite(q.grad).all()


def test_false_negatives_are_masked_by_exact_text() -> None:
    # Rows 0 and 2 ask the same; row 1's hard negative is row 0's positive; two rows live on the other rank.
    query_keys = torch.tensor([7, 8, 7, 9])
    passage_keys = torch.tensor([[1, 2], [3, 1], [4, 5], [6, 2]])
    masks = candidate_masks(query_keys, passage_keys, first_row=0, num_rows=2, num_positives=1)
    assert masks.positive.int().tolist() == [[1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0]]
    # columns:                              1 2  3 1  4 5  6 2
    assert masks.negative.int().tolist() == [[0, 1, 1, 0, 0, 1, 1, 1], [1, 1, 0, 1, 1, 1, 1, 1]]
    second_rank = candidate_masks(query_keys, passage_keys, first_row=2, num_rows=2, num_positives=1)
    assert second_rank.negative.int().tolist() == [[0, 1, 1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 1]]


def test_sft_is_mean_nll_of_positives(rng: np.random.Generator) -> None:
    mean_logps = rng.normal(size=(B, K))
    got = sft(torch.tensor(mean_logps), num_positives=P).numpy()
    np.testing.assert_allclose(got, [-(row[0] + row[1]) / 2 for row in mean_logps])


@pytest.mark.parametrize("pairs", ["all", "first"])
@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo(rng: np.random.Generator, pairs: str, with_reference: bool, smoothing: float) -> None:
    logps, reference = rng.normal(size=(B, K)) * 9, rng.normal(size=(B, K)) * 9

    def sigmoid(x: float) -> float:
        return 1 / (1 + np.exp(-x))

    expected = []
    for i in range(B):
        losses = []
        for c in range(P if pairs == "all" else 1):
            for r in range(P, K if pairs == "all" else P + 1):
                base = reference[i, c] - reference[i, r] if with_reference else 0.0
                margin = 0.1 * (logps[i, c] - logps[i, r] - base)
                losses.append(-(1 - smoothing) * np.log(sigmoid(margin)) - smoothing * np.log(sigmoid(-margin)))
        expected.append(np.mean(losses))
    got = dpo(
        torch.tensor(logps),
        torch.tensor(reference) if with_reference else None,
        num_positives=P,
        beta=0.1,
        label_smoothing=smoothing,
        pairs=pairs,  # type: ignore[arg-type]
    )
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("direction", ["rep_gen", "gen_rep"])
def test_alignment_kl(rng: np.random.Generator, direction: str) -> None:
    cosines, mean_logps = rng.uniform(-1, 1, size=(B, K)), rng.normal(size=(B, K)) - 3

    def softmax(x: np.ndarray) -> np.ndarray:
        return np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)

    rep, gen = softmax(cosines / 0.1), softmax(mean_logps / 0.7)
    a, b = (rep, gen) if direction == "rep_gen" else (gen, rep)
    t_cos, t_gen = torch.tensor(cosines, requires_grad=True), torch.tensor(mean_logps, requires_grad=True)
    for detach in (True, False):
        t_cos.grad = t_gen.grad = None
        got = alignment_kl(
            t_cos,
            t_gen,
            rep_temperature=0.1,
            gen_temperature=0.7,
            direction=direction,
            detach_gen=detach,  # type: ignore[arg-type]
        )
        np.testing.assert_allclose(got.detach().numpy(), (a * np.log(a / b)).sum(axis=1), rtol=1e-9)
        got.sum().backward()
        assert t_cos.grad is not None
        assert (t_gen.grad is None) == detach
