"""The losses that a library has too, against that library: values and gradients, in float64.

trl dropped its paired KTO and its label smoothing; those two have the numpy test only.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ullme_ray.losses import Candidates, contrastive_loss, distill_kl, dpo, hinge, ipo, truncate

B, P, N, D = 6, 2, 3, 8
K = P + N
TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def rows(seed: int, *shape: int) -> Tensor:
    """Not of length 1: the libraries normalise, and their gradient goes through that."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def candidates(num_positives: int) -> Candidates:
    return Candidates(torch.arange(B), torch.arange(B * K).view(B, K) + 100, 0, B, num_positives)


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs, retain_graph=True))


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for got, expected in zip(ours, theirs, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(got, expected, **TIGHT)


# --- pytorch-metric-learning: queries are the anchors, passages the references, a row's positives share the query's label


@pytest.mark.parametrize("epsilon", [None, 0.2])
def test_supcon_and_miner(epsilon: float | None) -> None:
    from pytorch_metric_learning.losses import SupConLoss
    from pytorch_metric_learning.miners import MultiSimilarityMiner
    from pytorch_metric_learning.reducers import DoNothingReducer

    q, noise = rows(0, B, D), rows(1, B * K, D)
    is_positive = (torch.arange(B * K) % K < P)[:, None]
    row = torch.arange(B).repeat_interleave(K)
    # The first two rows' positives lie so near that the miner drops them.
    near = q.detach()[row] + noise * torch.where(row < 2, 0.01, 0.7)[:, None]
    p = torch.where(is_positive, near, noise)
    labels = torch.arange(B)
    reference_labels = torch.where(is_positive[:, 0], row, -1)  # -1: nobody's positive
    mined = None if epsilon is None else MultiSimilarityMiner(epsilon=epsilon)(q, labels, p, reference_labels)
    arguments = (q, labels, mined, p, reference_labels)

    def our_losses(epsilon: float | None) -> Tensor:
        unit_q, unit_p = normalize(q, dim=-1), normalize(p, dim=-1)
        return contrastive_loss(
            unit_q, unit_p, candidates(P), temperature=0.1, form="supcon", miner_epsilon=epsilon, tile_passages=7
        )

    ours = our_losses(epsilon)
    theirs = SupConLoss(temperature=0.1, reducer=DoNothingReducer())(*arguments)["loss"]["losses"]  # (B,)
    weight = 1 + torch.arange(B) / B  # below 2: a query without pairs has it divided by the smallest float64 in their backward
    assert_equal([ours, *gradients((ours * weight).sum(), q, noise)], [theirs, *gradients((theirs * weight).sum(), q, noise)])
    # Its default reducer divides by the queries whose loss is not 0; ours leaves the division to the caller.
    reduced = SupConLoss(temperature=0.1)(*arguments)
    torch.testing.assert_close(ours.sum() / (ours > 0).sum(), reduced, **TIGHT)
    if epsilon is not None:
        assert 0 < int((ours == 0).sum()) < B
        assert not torch.allclose(ours.mean(), reduced)
        assert not torch.allclose(our_losses(0.1), theirs)  # the control: another epsilon


# --- sentence-transformers


class Table(nn.Module):
    """An embedding model whose input is its output."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["vectors"]}

    def get_embedding_dimension(self) -> int:
        return D


def columns(q: Tensor, p: Tensor) -> list[dict[str, Tensor]]:
    return [{"vectors": q}, *({"vectors": column} for column in p.view(B, K, D).unbind(dim=1))]


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_infonce_is_multiple_negatives_ranking(temperature: float) -> None:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    q, p = rows(0, B, D), rows(1, B * K, D)
    theirs = MultipleNegativesRankingLoss(Table(), scale=1 / temperature)(columns(q, p), torch.empty(0))

    def our_loss(num_positives: int) -> Tensor:
        unit_q, unit_p = normalize(q, dim=-1), normalize(p, dim=-1)
        return contrastive_loss(unit_q, unit_p, candidates(num_positives), temperature=temperature, tile_passages=7).mean()

    ours = our_loss(1)
    assert_equal([ours, *gradients(ours, q, p)], [theirs, *gradients(theirs, q, p)])
    assert not torch.allclose(our_loss(2), theirs, rtol=1e-3)  # the control: one hard negative counted as a positive


def test_distill_kl_is_theirs() -> None:
    from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss
    from sentence_transformers.util import pairwise_cos_sim

    q, p, scores = rows(0, B, D), rows(1, B * K, D), rows(2, B, K).detach() * 4
    loss = DistillKLDivLoss(Table(), similarity_fct=pairwise_cos_sim, student_temperature=0.2, teacher_temperature=3.0)
    theirs = loss(columns(q, p), scores)
    cosines = torch.einsum("bd,bkd->bk", normalize(q, dim=-1), normalize(p, dim=-1).view(B, K, D))
    ours = distill_kl(cosines, scores, temperature=0.2, teacher_temperature=3.0).mean()
    assert_equal([ours, *gradients(ours, q, p)], [theirs, *gradients(theirs, q, p)])
    other_way = distill_kl(scores / 3.0, cosines / 0.2, temperature=1.0, teacher_temperature=1.0).mean() * 0.2**2
    assert not torch.allclose(other_way, theirs, rtol=1e-3)  # the control: KL in the other direction


def test_matryoshka_of_infonce_is_theirs() -> None:
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

    q, p = rows(0, B, D), rows(1, B * K, D)
    dims, weights = [D, 4, 2], [1.0, 0.5, 0.25]
    model = Table()
    loss = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model, scale=10.0), dims, weights)
    theirs = loss(columns(q, p), torch.empty(0))

    def our_loss(cut: Any) -> Tensor:
        unit_q, unit_p = normalize(q, dim=-1), normalize(p, dim=-1)
        parts = (contrastive_loss(cut(unit_q, dim), cut(unit_p, dim), candidates(1), temperature=0.1) for dim in dims)
        return torch.stack([weight * part.mean() for weight, part in zip(weights, parts)]).sum()

    ours = our_loss(truncate)
    assert_equal([ours, *gradients(ours, q, p)], [theirs, *gradients(theirs, q, p)])
    cut_only = our_loss(lambda embedding, dim: embedding[..., :dim])  # the control: not of length 1 again
    assert not torch.allclose(cut_only, theirs, rtol=1e-3)


# --- trl


class Scored(nn.Module):
    """A language model that gives the same log-probabilities whatever it reads; the rest is what the trainer logs."""

    def __init__(self, log_probs: Tensor) -> None:
        super().__init__()
        self.log_probs = log_probs

    def forward(self, **_: Any) -> SimpleNamespace:
        zeros = torch.zeros_like(self.log_probs)
        return SimpleNamespace(log_probs=self.log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def trl_loss(form: str, beta: float, token_logps: Tensor, reference_logps: Tensor, mask: Tensor) -> Tensor:
    """DPOTrainer's own loss, without its model, data and optimizer."""
    from accelerate import Accelerator
    from trl import DPOTrainer

    trainer = object.__new__(DPOTrainer)
    trainer.model = Scored(token_logps)
    trainer.accelerator = Accelerator(cpu=True)
    trainer.loss_types, trainer.loss_weights, trainer.beta = [form], [1.0], beta
    trainer.f_divergence_type, trainer.ld_alpha, trainer.use_weighting, trainer.aux_loss_enabled = (
        "reverse_kl",
        None,
        False,
        False,
    )
    trainer.precompute_ref_logps = True
    trainer._metrics, trainer._total_train_tokens, trainer._tp_size = {"train": defaultdict(list)}, 0, 1
    chosen, rejected = reference_logps.chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    return trainer._compute_loss(trainer.model, inputs, return_outputs=False)


@pytest.mark.parametrize(("name", "ours"), [("sigmoid", dpo), ("hinge", hinge), ("ipo", ipo)])
def test_preference_is_that_of_trl(name: str, ours: Any) -> None:
    num_tokens = 9
    lengths = torch.arange(2 * B) % 5 + 3  # of the passages, which follow a prompt of one token or more
    mask = (torch.arange(num_tokens) >= num_tokens - lengths[:, None]).long()  # (2B, L), chosen above rejected
    logits = rows(5, 2 * B, num_tokens - 1)
    token_logps = -logits.exp() * mask[:, 1:]  # (2B, L - 1), 0 outside the passage
    reference_logps = token_logps.detach().sum(dim=1) + rows(6, 2 * B).detach()
    theirs = trl_loss(name, 0.3, token_logps, reference_logps, mask)

    def by_query(values: Tensor) -> Tensor:
        return torch.stack(values.chunk(2), dim=1)  # (2B,) -> (B, 2)

    divisor = lengths if name == "ipo" else 1
    logps, reference = by_query(token_logps.sum(dim=1) / divisor), by_query(reference_logps / divisor)
    mine = ours(logps, reference, num_positives=1, beta=0.3).mean()
    assert_equal([mine, *gradients(mine, logits)], [theirs, *gradients(theirs, logits)])
    assert not torch.allclose(ours(logps, None, num_positives=1, beta=0.3).mean(), theirs, rtol=1e-3)  # the control
