"""The losses of METHOD as plain functions: tensors in, one value per query out. No model, no ranks, no state.

Every function returns values per query; who calls divides once, by the number of queries over all ranks and chunks.
"""

from ullme_ray.losses.alignment import alignment_kl
from ullme_ray.losses.contrastive import CandidateMasks, candidate_masks, infonce
from ullme_ray.losses.preference import dpo, sft

__all__ = ["CandidateMasks", "alignment_kl", "candidate_masks", "dpo", "infonce", "sft"]
