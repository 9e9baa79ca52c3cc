"""Prometheus metrics of training and embedding, through Ray's own endpoint: each node's metrics port shows them as `ray_NAME`.

All of them stand in METRICS. The dashboard and the alerts in cluster/monitoring name no other, which a test checks. They
are set by the driver, a few numbers per step or unit; where Ray does not run they cost nothing and go nowhere.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

METRICS: dict[str, tuple[str, str, str]] = {  # name: (kind, what it tells, the field of a training record)
    "ullme_train_step": ("gauge", "Optimizer steps done.", "step"),
    "ullme_train_steps_left": ("gauge", "Optimizer steps that the run still has to do; 0 once it is at its end.", ""),
    "ullme_train_loss": ("gauge", "Loss of the last logged step.", "loss"),
    "ullme_train_grad_norm": ("gauge", "Global gradient norm of the last logged step.", "grad_norm"),
    "ullme_train_learning_rate": ("gauge", "Learning rate of the last logged step.", "learning_rate"),
    "ullme_train_tokens_per_s": ("gauge", "Tokens per second over all ranks.", "tokens_per_s"),
    "ullme_train_mfu": ("gauge", "Share of the peak FLOP/s of all ranks that is useful work, 0 to 1.", "mfu"),
    "ullme_train_memory_bytes": ("gauge", "Most memory that rank 0 held so far.", "memory_bytes"),
    "ullme_train_validation_ndcg": ("gauge", "nDCG of the last validation.", "validation_ndcg"),
    "ullme_embed_units_total": ("counter", "Units embedded and written.", ""),
    "ullme_embed_units_left": ("gauge", "Units that the run still has to do.", ""),
    "ullme_embed_rows_total": ("counter", "Rows by fate: embedded, copied, dead.", ""),
    "ullme_embed_tokens_total": ("counter", "Tokens that went through the model.", ""),
    "ullme_embed_bytes_total": ("counter", "Bytes of parts written.", ""),
    "ullme_embed_retries_total": ("counter", "Units begun again after a process died.", ""),
}
_TAGS = {"ullme_embed_rows_total": ("job", "fate")}


@lru_cache(maxsize=1)
def _registered() -> dict[str, Any]:
    from ray.util.metrics import Counter, Gauge

    return {
        name: (Counter if kind == "counter" else Gauge)(name, description=text, tag_keys=_TAGS.get(name, ("job",)))
        for name, (kind, text, _) in METRICS.items()
    }


def _metric(name: str) -> Any | None:
    import ray

    return _registered()[name] if ray.is_initialized() else None


def gauge(name: str, value: float, job: str) -> None:
    if (metric := _metric(name)) is not None:
        metric.set(float(value), tags={"job": job})


def count(name: str, by: float, job: str, **tags: str) -> None:
    if by > 0 and (metric := _metric(name)) is not None:
        metric.inc(float(by), tags={"job": job, **tags})


def train_record(job: str, record: dict[str, Any]) -> None:
    """One record of training, as `metrics/train.jsonl` has it."""
    for name, (_, _, field) in METRICS.items():
        if field and isinstance(record.get(field), (int, float)):
            gauge(name, record[field], job)
