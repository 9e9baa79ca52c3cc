"""How many pods of which size a job's stages ask for, where the job file names no groups itself."""

from __future__ import annotations

from ullme_ray.runtime import Pool, pools
from ullme_ray.spec.cluster import WorkerGroupSpec
from ullme_ray.spec.job import JobSpec

_GB_PER_CPU = 4.0
_GB_PER_GPU = 32.0
_MIN_GB = 8.0
_WRITERS_CPUS = 1  # beside the processes of a pod: the tasks that read, tokenise and write


def worker_groups(job: JobSpec, stages: tuple[str, ...]) -> list[WorkerGroupSpec]:
    """The job's own groups, or one for each stage that has a pool of processes: a pod per process, from zero but for serve.

    Never none, for the head takes no work.
    """
    own = list(job.cluster.groups_for(*stages))
    return own or [_group(pool) for pool in pools(job, stages)] or [WorkerGroupSpec(name="work", cpus=4, memory_gb=16.0)]


def _group(pool: Pool) -> WorkerGroupSpec:
    gpus = -(-pool.gpus // 1) if pool.gpus else 0
    per_pod = int(gpus / pool.gpus) if pool.gpus else 1
    cpus = max(1, round(pool.cpus * per_pod)) + _WRITERS_CPUS
    return WorkerGroupSpec(
        name=pool.stage,
        stages=(pool.stage,),  # type: ignore[arg-type]
        min=-(-pool.min // per_pod) if pool.stage == "serve" else 0,
        max=-(-pool.max // per_pod),
        cpus=cpus,
        memory_gb=max(_MIN_GB, cpus * _GB_PER_CPU, gpus * _GB_PER_GPU),
        gpus=int(gpus),
    )
