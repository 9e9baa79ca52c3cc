"""The losses of METHOD as plain functions: tensors in, one value per query out. No model, no ranks, no state.

Every loss returns values per query; who calls divides once, by the number of queries over all ranks and chunks.
"""

from ullme_ray.losses.alignment import alignment_kl
from ullme_ray.losses.contrastive import Candidates, contrastive_loss
from ullme_ray.losses.distillation import distill_kl
from ullme_ray.losses.matryoshka import truncate
from ullme_ray.losses.preference import dpo, hinge, ipo, kto, log_ratio_sums, sft

__all__ = [
    "Candidates",
    "alignment_kl",
    "contrastive_loss",
    "distill_kl",
    "dpo",
    "hinge",
    "ipo",
    "kto",
    "log_ratio_sums",
    "sft",
    "truncate",
]
