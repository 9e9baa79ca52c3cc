"""Retrieval quality on held-out queries, and search over an embeddings table."""

from ullme_ray.evaluate.report import EvaluationReport, ModelScores, SetScores
from ullme_ray.evaluate.run import preflight, run_evaluate

__all__ = ["EvaluationReport", "ModelScores", "SetScores", "preflight", "run_evaluate"]
