"""Distillation: a teacher's scores of one query's passages, taught to the embeddings (METHOD: losses).

Cost: K numbers per query.
"""

from __future__ import annotations

from torch import Tensor


def distill_kl(cosines: Tensor, teacher_scores: Tensor, *, temperature: float, teacher_temperature: float) -> Tensor:
    """temperature^2 * KL(P_teacher || P_student) over the same K passages (Hinton et al. 2015; Lin et al. 2020).

    The factor keeps the gradient's size while the temperature changes; so sentence-transformers' DistillKLDivLoss has it.

    Args:
        cosines: (B, K) cosine of a query and its own passages.
        teacher_scores: (B, K) any scale; a fixed target.
        temperature: divides the cosines.
        teacher_temperature: divides the teacher's scores.

    Returns:
        (B,)
    """
    log_student = (cosines / temperature).log_softmax(dim=1)  # (B, K)
    log_teacher = (teacher_scores.detach().to(cosines.dtype) / teacher_temperature).log_softmax(dim=1)  # (B, K)
    return temperature**2 * (log_teacher.exp() * (log_teacher - log_student)).sum(dim=1)
