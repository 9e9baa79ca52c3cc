"""Which models an evaluation compares: the job's before and after training, others by name, and BM25."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ullme_ray.errors import UllmeError
from ullme_ray.evaluate import bm25
from ullme_ray.evaluate.encoding import Model
from ullme_ray.evaluate.others import other_fingerprint
from ullme_ray.model import encoder_fingerprint, ensure_base
from ullme_ray.model.encoder import Which
from ullme_ray.spec import JobSpec
from ullme_ray.spec.evaluation import OtherModelSpec
from ullme_ray.spec.job import EvaluateSpec


@dataclass(frozen=True)
class Contender:
    name: str  # base | trained | bm25 | the name of another
    fingerprint: str
    model: Model | None  # None: BM25


def settings_of(job: JobSpec) -> EvaluateSpec:
    """The job's evaluate section.

    Raises:
        UllmeError: it has none.
    """
    if job.evaluate is None:
        raise UllmeError("the job has no evaluate section; add evaluate: {local: [{path: FOLDER}]}")
    return job.evaluate


def newest(job: JobSpec) -> Which:
    """The model that the job is about: the trained one where it trains."""
    return "trained" if job.train else "base"


def contenders(job: JobSpec, names: Sequence[str] | None = None) -> list[Contender]:
    """The models in the order of the tables, the job's own first.

    Args:
        names: only these; absent means all that the job asks for.

    Raises:
        ModelError: one is missing or broken; all are looked at, so that this is known before long work.
    """
    spec = settings_of(job)
    own: list[Which] = [which for which in ("base", "trained") if _is_wanted(job, which, names)]
    if "base" in own:
        ensure_base(job)
    found = [Contender(which, encoder_fingerprint(job, which=which), which) for which in own]
    for other in spec.models:
        name = _free_name(other, [contender.name for contender in found])
        if names is None or name in names:
            found.append(Contender(name, other_fingerprint(job, other), other))
    if spec.bm25 if names is None else "bm25" in names:
        found.append(Contender("bm25", bm25.FINGERPRINT, None))
    return found


def _is_wanted(job: JobSpec, which: Which, names: Sequence[str] | None) -> bool:
    if names is not None:
        return which in names
    return which == newest(job) or (which == "base" and settings_of(job).compare_base)


def _free_name(other: OtherModelSpec, taken: Sequence[str]) -> str:
    name = other.name or other.base.rstrip("/").rpartition("/")[2]
    number = 2
    while name in (*taken, "base", "trained", "bm25"):
        name = f"{name.removesuffix(f'-{number - 1}')}-{number}"
        number += 1
    return name
