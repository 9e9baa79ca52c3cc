"""Every loss against a few lines of float64 numpy, written from the formula and not from our code: values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ullme_ray.losses import (
    Candidates,
    alignment_kl,
    contrastive_loss,
    distill_kl,
    dpo,
    hinge,
    ipo,
    kto,
    log_ratio_sums,
    sft,
    truncate,
)

B, P, N, D = 5, 2, 3, 8
K = P + N


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def assert_same(
    ours: Callable[..., Tensor], by_hand: Callable[..., np.ndarray], *inputs: np.ndarray, rtol: float = 1e-9, fixed: int = 0
) -> None:
    """Values, and the slope along a random direction of every input that is not among the `fixed` last ones.

    Values are weighted differently per query, so that a gradient in the wrong row shows. Float64, so central differences are
    good to about 1e-8.
    """
    rng = np.random.default_rng(17)
    tensors = [torch.tensor(x, requires_grad=position < len(inputs) - fixed) for position, x in enumerate(inputs)]
    got = ours(*tensors)
    expected = by_hand(*inputs)
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=rtol, atol=1e-12)
    weight = rng.uniform(1, 2, size=expected.shape)
    (got * torch.tensor(weight)).sum().backward()
    step = 1e-5
    for position, tensor in enumerate(tensors):
        if not tensor.requires_grad:
            assert tensor.grad is None
            continue
        direction = rng.normal(size=tensor.shape)
        before, after = inputs[:position], inputs[position + 1 :]
        up, down = (by_hand(*before, inputs[position] + bump * direction, *after) for bump in (step, -step))
        slope = float(((up - down) * weight).sum() / (2 * step))
        assert tensor.grad is not None
        assert float((tensor.grad * torch.tensor(direction)).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-8)


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


# --- contrastive


def distinct(
    num_rows: int = B, *, first_row: int = 0, own: int | None = None, num_positives: int = P, k: int = K
) -> Candidates:
    """All texts differ."""
    keys = torch.arange(num_rows * k).view(num_rows, k) + 1000
    return Candidates(torch.arange(num_rows), keys, first_row, num_rows if own is None else own, num_positives)


def repeated(num_rows: int = B, *, first_row: int = 0, own: int | None = None) -> Candidates:
    """Queries 0 and 2 are the same; row 1's hard negative is row 0's first positive; row 3's own positive is its negative."""
    base = distinct(num_rows, first_row=first_row, own=own)
    query_keys, passage_keys = base.query_keys.clone(), base.passage_keys.clone()
    query_keys[2] = query_keys[0]
    passage_keys[1, P] = passage_keys[0, 0]
    passage_keys[3, P + 1] = passage_keys[3, 1]
    return base._replace(query_keys=query_keys, passage_keys=passage_keys)


def contrastive_by_hand(
    q: np.ndarray,
    p: np.ndarray,
    candidates: Candidates,
    *,
    temperature: float,
    form: str = "infonce",
    miner_epsilon: float | None = None,
    margin: float | None = None,
    ratio: float | None = None,
    in_batch_negatives: bool = True,
) -> np.ndarray:
    """Loops over queries, rows and passages."""
    query_keys, keys, num_positives = candidates.query_keys.tolist(), candidates.passage_keys.tolist(), candidates.num_positives
    p = p.reshape(*candidates.passage_keys.shape, -1)
    losses = []
    for i, row in enumerate(range(candidates.first_row, candidates.first_row + candidates.num_rows)):
        positives = [float(q[i] @ p[row, j]) for j in range(num_positives)]
        negatives = []
        for other in range(len(p)) if in_batch_negatives else [row]:
            for j in range(p.shape[1]):
                known_positive = j < num_positives and query_keys[other] == query_keys[row]
                if not known_positive and keys[other][j] not in keys[row][:num_positives]:
                    negatives.append(float(q[i] @ p[other, j]))
        lowest = min(positives)
        if margin is not None:
            negatives = [s for s in negatives if not s > lowest - margin]
        if ratio is not None:
            negatives = [s for s in negatives if not s > (ratio * lowest if lowest > 0 else lowest + (1 - ratio) * lowest)]
        if miner_epsilon is not None:
            hardest = max(negatives, default=-np.inf)
            negatives = [s for s in negatives if s + miner_epsilon > lowest]
            positives = [s for s in positives if s - miner_epsilon < hardest]
        negative_sum = sum(np.exp(s / temperature) for s in negatives)
        positive_sum = sum(np.exp(s / temperature) for s in positives)
        terms = []
        for s in positives:
            share = np.exp(s / temperature) / (negative_sum + (positive_sum if form == "supcon" else np.exp(s / temperature)))
            terms.append(-np.log(share))
        losses.append(np.mean(terms) if terms else 0.0)
    return np.array(losses)


OPTIONS: dict[str, dict[str, Any]] = {
    "infonce": {},
    "supcon": {"form": "supcon"},
    "supcon_mined": {"form": "supcon", "miner_epsilon": 0.2},
    "infonce_mined": {"miner_epsilon": 0.2},
    "margin": {"margin": 0.1},
    "ratio": {"ratio": 0.95},
    "margin_and_ratio_mined": {"margin": 0.02, "ratio": 0.9, "miner_epsilon": 0.5, "form": "supcon"},
    "own_passages": {"in_batch_negatives": False},
    "own_passages_mined": {"in_batch_negatives": False, "form": "supcon", "miner_epsilon": 0.2, "margin": 0.01},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("make", [distinct, repeated])
def test_contrastive(
    rng: np.random.Generator, options: dict[str, Any], temperature: float, make: Callable[..., Candidates]
) -> None:
    """Of two ranks with 8 rows each, the second; tiles that divide neither rows nor passages."""
    candidates = make(16, first_row=0 if make is repeated else 8, own=8)
    # Positives near their query, as after some training; one row in four is not, for the filters and the miner to tell apart.
    q, p = unit(rng, 8, D), unit(rng, 16, K, D)
    near = q[:, None] + np.array([0.1, 1.2])[:, None] * unit(rng, 8, P, D)  # the first nearer, for the miner to drop it alone
    p[candidates.own, :P] = np.where(
        np.arange(8)[:, None, None] % 4 > 0, near / np.linalg.norm(near, axis=-1, keepdims=True), -near
    )
    p = p.reshape(-1, D)
    assert_same(
        lambda tq, tp: contrastive_loss(tq, tp, candidates, temperature=temperature, tile_passages=7, **options),
        lambda nq, np_: contrastive_by_hand(nq, np_, candidates, temperature=temperature, **options),
        q,
        p,
    )
    plain = contrastive_by_hand(q, p, candidates, temperature=temperature)
    by_hand = contrastive_by_hand(q, p, candidates, temperature=temperature, **options)
    assert not options or np.abs(plain - by_hand).max() > 1e-3, "the option must matter here, or the test shows nothing"


def both(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    """A loss per query with its gradients, rows weighted differently."""
    return [loss.detach(), *torch.autograd.grad((loss * torch.arange(1, len(loss) + 1)).sum(), inputs)]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_tiles_do_not_change_the_result(rng: np.random.Generator, options: dict[str, Any]) -> None:
    q = torch.tensor(unit(rng, B, D), requires_grad=True)
    p = torch.tensor(unit(rng, 4 * B * K, D), requires_grad=True)
    candidates = repeated(4 * B, first_row=B, own=B)

    def run(tile: int) -> list[Tensor]:
        return both(contrastive_loss(q, p, candidates, temperature=0.05, tile_passages=tile, **options), q, p)

    whole = run(4 * B * K)
    for tile in (3, 7, K, 64, 10_000):
        for got, expected in zip(run(tile), whole):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    # The control: one passage forgotten, as by a wrong last tile, is seen in every output.
    forgotten = candidates._replace(passage_keys=candidates.passage_keys.clone())
    forgotten.passage_keys[-1, -1] = forgotten.passage_keys[B, 0]
    if options.get("in_batch_negatives", True) and not options.get("margin") and not options.get("ratio"):
        candidates = forgotten
        assert all(not torch.allclose(got, expected, rtol=1e-6, atol=1e-9) for got, expected in zip(run(64), whole))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns, forward and backward."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def largest_tensor(num_rows: int, tile: int) -> int:
    """With as many queries on this rank as rows in all, the worst case."""
    q, p = torch.randn(num_rows, D, requires_grad=True), torch.randn(num_rows * K, D, requires_grad=True)
    with Largest() as seen:
        loss = contrastive_loss(
            q, p, distinct(num_rows), temperature=1.0, form="supcon", miner_epsilon=0.2, margin=0.1, tile_passages=tile
        )
        loss.sum().backward()
    return seen.largest


def test_memory_is_linear_in_the_number_of_passages() -> None:
    for num_rows in (50, 100, 200):
        num_passages = num_rows * K
        assert largest_tensor(num_rows, tile=20) == num_passages * D  # the passages themselves, and their gradient
        assert largest_tensor(num_rows, tile=num_passages) == num_rows * num_passages  # the control: one tile is quadratic


def test_contrastive_of_bfloat16_and_float32_rows(rng: np.random.Generator) -> None:
    q, p = unit(rng, B, D), unit(rng, B * K, D)
    expected = contrastive_by_hand(q, p, distinct(), temperature=0.05)
    for dtype, rtol in ((torch.float32, 2e-5), (torch.bfloat16, 0.1)):
        tq, tp = torch.tensor(q, dtype=dtype, requires_grad=True), torch.tensor(p, dtype=dtype, requires_grad=True)
        loss = contrastive_loss(tq, tp, distinct(), temperature=0.05)
        loss.sum().backward()
        assert loss.dtype == torch.float32
        assert tq.grad is not None
        assert tq.grad.dtype == dtype
        np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=rtol)


@pytest.mark.parametrize("form", ["infonce", "supcon"])
@pytest.mark.parametrize("epsilon", [None, 0.2])
@pytest.mark.parametrize("in_batch", [True, False])
def test_query_without_negatives_has_loss_zero_and_finite_gradient(form: Any, epsilon: float | None, in_batch: bool) -> None:
    """One positive and nothing else; then negatives that the filter drops to the last."""
    for k, margin in ((1, None), (3, 3.0)):
        q, p = torch.ones(1, 2, requires_grad=True), torch.ones(k, 2, requires_grad=True)
        loss = contrastive_loss(
            q,
            p,
            distinct(1, num_positives=1, k=k),
            temperature=0.01,
            form=form,
            miner_epsilon=epsilon,
            margin=margin,
            in_batch_negatives=in_batch,
        )
        loss.sum().backward()
        assert loss.item() == 0.0
        for tensor in (q, p):
            assert tensor.grad is not None
            assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_query_whose_positives_are_all_easy_has_loss_zero_under_the_miner() -> None:
    q = torch.tensor([[1.0, 0.0]], requires_grad=True)
    p = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    candidates = distinct(1, num_positives=1, k=2)

    def loss(epsilon: float) -> Tensor:
        return contrastive_loss(q, p, candidates, temperature=0.1, form="supcon", miner_epsilon=epsilon)

    easy = loss(0.9)  # positive at cosine 1, negative at 0
    easy.sum().backward()
    assert easy.item() == 0.0
    assert q.grad is not None
    assert torch.equal(q.grad, torch.zeros(1, 2))
    assert loss(1.1).item() > 0


@pytest.mark.parametrize("form", ["infonce", "supcon"])
@pytest.mark.parametrize("in_batch", [True, False])
def test_miner_keeps_one_positive_of_two(form: Any, in_batch: bool) -> None:
    cosines = torch.tensor([0.9, 0.3, 0.2])  # the first is easy: 0.9 - 0.2 >= 0.2
    p = torch.stack([cosines, (1 - cosines**2).sqrt()], dim=1)
    candidates = distinct(1, num_positives=2, k=3)
    options: dict[str, Any] = {"temperature": 0.1, "form": form, "miner_epsilon": 0.2, "in_batch_negatives": in_batch}
    loss = contrastive_loss(torch.tensor([[1.0, 0.0]]), p, candidates, **options)
    assert loss.item() == pytest.approx(np.log(1 + np.exp((0.2 - 0.3) / 0.1)), rel=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("bad", ["query", "positive", "negative"])
def test_nan_is_never_filtered_away(rng: np.random.Generator, options: dict[str, Any], bad: str) -> None:
    q, p = torch.tensor(unit(rng, B, D)), torch.tensor(unit(rng, B * K, D))
    assert contrastive_loss(q, p, distinct(), temperature=0.1, **options).isfinite().all()
    (q if bad == "query" else p)[{"query": 2, "positive": 2 * K, "negative": 2 * K + P}[bad], 0] = torch.nan
    assert contrastive_loss(q, p, distinct(), temperature=0.1, **options)[2].isnan()


def test_score_filter_takes_the_lowest_positive_and_survives_a_negative_cosine() -> None:
    q = torch.tensor([[1.0, 0.0]])

    def kept(positives: list[float], negatives: list[float], **options: float) -> list[float]:
        """The negatives that matter, told by their gradient."""
        cosines = torch.tensor(positives + negatives)
        p = torch.stack([cosines, (1 - cosines**2).sqrt()], dim=1).requires_grad_()
        candidates = distinct(1, num_positives=len(positives), k=len(cosines))
        contrastive_loss(q, p, candidates, temperature=0.5, **options).sum().backward()
        assert p.grad is not None
        return [s for s, pull in zip(negatives, p.grad[len(positives) :, 0].tolist()) if pull != 0]

    assert kept([0.9, 0.5], [0.8, 0.55, 0.45, 0.3]) == [0.8, 0.55, 0.45, 0.3]
    assert kept([0.9, 0.5], [0.8, 0.55, 0.45, 0.3], margin=0.0) == [0.45, 0.3]
    assert kept([0.9, 0.5], [0.8, 0.55, 0.45, 0.3], margin=0.1) == [0.3]
    assert kept([0.9, 0.5], [0.8, 0.55, 0.49, 0.3], ratio=0.95) == [0.3]
    assert kept([-0.2], [-0.15, -0.205, -0.22], ratio=0.95) == [
        -0.22
    ]  # plain 0.95 * -0.2 would keep a higher one than the positive


def test_false_negatives_are_masked_by_exact_text() -> None:
    # Rows 0 and 2 ask the same; row 1's hard negative is row 0's positive; two rows live on the other rank.
    query_keys = torch.tensor([7, 8, 7, 9])
    passage_keys = torch.tensor([[1, 2], [3, 1], [4, 5], [6, 2]])
    first_rank = Candidates(query_keys, passage_keys, first_row=0, num_rows=2, num_positives=1)
    # columns:                                         1 2  3 1  4 5  6 2
    assert first_rank.negatives(0, 8).int().tolist() == [[0, 1, 1, 0, 0, 1, 1, 1], [1, 1, 0, 1, 1, 1, 1, 1]]
    second_rank = first_rank._replace(first_row=2)
    assert second_rank.negatives(0, 8).int().tolist() == [[0, 1, 1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 1]]
    assert torch.equal(second_rank.negatives(3, 6), second_rank.negatives(0, 8)[:, 3:6])
    assert first_rank.own_negatives().int().tolist() == [[0, 1], [0, 1]]


# --- generation


def test_sft_is_mean_nll_of_positives(rng: np.random.Generator) -> None:
    assert_same(
        lambda mean_logps: sft(mean_logps, num_positives=P),
        lambda mean_logps: np.array([-(row[0] + row[1]) / 2 for row in mean_logps]),
        rng.normal(size=(B, K)),
    )


BETA, SMOOTHING = 0.1, 0.15
KL = (0.7, -0.4)  # chosen, rejected: the second is cut off at 0
PREFERENCES: dict[str, tuple[Callable[..., Tensor], Callable[[float, float], float]]] = {
    # of one pair with log-ratios c and r
    "dpo": (dpo, lambda c, r: -np.log(sigmoid(BETA * (c - r)))),
    "dpo_smoothed": (
        lambda *args, **kwargs: dpo(*args, label_smoothing=SMOOTHING, **kwargs),
        lambda c, r: -(1 - SMOOTHING) * np.log(sigmoid(BETA * (c - r))) - SMOOTHING * np.log(sigmoid(BETA * (r - c))),
    ),
    "ipo": (ipo, lambda c, r: (c - r - 1 / (2 * BETA)) ** 2),
    "hinge": (hinge, lambda c, r: max(0.0, 1 - BETA * (c - r))),
    "kto": (
        lambda *args, **kwargs: kto(*args, kl=(torch.tensor(KL[0]), torch.tensor(KL[1])), **kwargs),
        lambda c, r: (1 - sigmoid(BETA * (c - 0)) + 1 - sigmoid(BETA * (0.7 - r))) / 2,
    ),
}


@pytest.mark.parametrize("name", PREFERENCES)
@pytest.mark.parametrize("pairs", ["all", "first"])
@pytest.mark.parametrize("with_reference", [True, False])
def test_preference(rng: np.random.Generator, name: str, pairs: str, with_reference: bool) -> None:
    ours, of_pair = PREFERENCES[name]

    def by_hand(logps: np.ndarray, reference: np.ndarray) -> np.ndarray:
        ratios = logps - reference if with_reference else logps
        chosen, rejected = (range(P), range(P, K)) if pairs == "all" else ([0], [P])
        return np.array([np.mean([of_pair(row[c], row[r]) for c in chosen for r in rejected]) for row in ratios])

    assert_same(
        lambda logps, reference: ours(logps, reference if with_reference else None, num_positives=P, beta=BETA, pairs=pairs),
        by_hand,
        rng.normal(size=(B, K)) * 9,
        rng.normal(size=(B, K)) * 9,
        fixed=1,
    )


def test_kto_estimates_are_the_same_over_any_chunks(rng: np.random.Generator) -> None:
    logps, reference = (torch.tensor(rng.normal(size=(B, K)) + shift, requires_grad=True) for shift in (1, 0))
    ratios = (logps - reference).detach().numpy()
    for pairs, chosen, rejected in (("all", ratios[:, :P], ratios[:, P:]), ("first", ratios[:, 0], ratios[:, P])):
        sums = sum(
            log_ratio_sums(logps[rows], reference[rows], num_positives=P, pairs=pairs)  # type: ignore[arg-type]
            for rows in (slice(0, 3), slice(3, B))
        )
        assert isinstance(sums, Tensor)
        assert not sums.requires_grad
        np.testing.assert_allclose((sums[:, 0] / sums[:, 1]).numpy(), [chosen.mean(), rejected.mean()], rtol=1e-12)
    # The control: averaging the chunks' means weighs the rows of the smaller chunk more.
    means = [ratios[:3, :P].mean(), ratios[3:, :P].mean()]
    assert np.mean(means) != pytest.approx(ratios[:, :P].mean(), rel=1e-6)


def test_kto_estimates_carry_no_gradient(rng: np.random.Generator) -> None:
    logps = torch.tensor(rng.normal(size=(B, K)) + 1, requires_grad=True)
    kl = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    kto(logps, None, num_positives=P, beta=BETA, kl=(kl, kl)).sum().backward()
    assert kl.grad is None


def test_preference_without_a_negative_is_refused() -> None:
    with pytest.raises(AssertionError, match="hard negative"):
        dpo(torch.zeros(2, 1), None, num_positives=1, beta=0.1)


# --- alignment, distillation, Matryoshka


@pytest.mark.parametrize("direction", ["rep_gen", "gen_rep"])
@pytest.mark.parametrize("detach", [True, False])
def test_alignment_kl(rng: np.random.Generator, direction: Any, detach: bool) -> None:
    cosines, mean_logps = rng.uniform(-1, 1, size=(B, K)), rng.normal(size=(B, K)) - 3

    def by_hand(cos: np.ndarray, logps: np.ndarray) -> np.ndarray:
        rep, gen = softmax(cos / 0.1), softmax(logps / 0.7)
        a, b = (rep, gen) if direction == "rep_gen" else (gen, rep)
        return (a * np.log(a / b)).sum(axis=1)

    def ours(cos: Tensor, logps: Tensor) -> Tensor:
        options = {"rep_temperature": 0.1, "gen_temperature": 0.7, "direction": direction, "detach_gen": detach}
        return alignment_kl(cos, logps if not detach else logps.requires_grad_(), **options)

    if not detach:
        assert_same(ours, by_hand, cosines, mean_logps)
        return
    assert_same(lambda cos: ours(cos, torch.tensor(mean_logps)), lambda cos: by_hand(cos, mean_logps), cosines)
    generation = torch.tensor(mean_logps, requires_grad=True)
    ours(torch.tensor(cosines, requires_grad=True), generation).sum().backward()
    assert generation.grad is None


def test_distill_kl(rng: np.random.Generator) -> None:
    def by_hand(cosines: np.ndarray, scores: np.ndarray) -> np.ndarray:
        student, teacher = softmax(cosines / 0.2), softmax(scores / 3.0)
        return 0.2**2 * (teacher * np.log(teacher / student)).sum(axis=1)

    assert_same(
        lambda cosines, scores: distill_kl(cosines, scores, temperature=0.2, teacher_temperature=3.0),
        by_hand,
        rng.uniform(-1, 1, size=(B, K)),
        rng.normal(size=(B, K)) * 4,
        fixed=1,
    )
    scores = torch.zeros(1, 2, requires_grad=True)
    distill_kl(torch.zeros(1, 2, requires_grad=True), scores, temperature=1, teacher_temperature=1).sum().backward()
    assert scores.grad is None


def test_truncate(rng: np.random.Generator) -> None:
    def by_hand(x: np.ndarray) -> np.ndarray:
        return x[..., :3] / np.sqrt((x[..., :3] ** 2).sum(axis=-1, keepdims=True))

    assert_same(lambda x: truncate(x, 3), by_hand, unit(rng, B, K, D))
    with pytest.raises(AssertionError, match="cannot cut"):
        truncate(torch.ones(2, 4), 5)
