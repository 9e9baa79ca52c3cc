"""Which engine a job gets by its ZeRO stage: plain data parallelism, or DeepSpeed."""

from __future__ import annotations

from ullme_ray.model.two_pass import TwoPassModel
from ullme_ray.spec.job import JobSpec
from ullme_ray.train.data_parallel import DataParallelEngine
from ullme_ray.train.engine import Engine


def open_engine(module: TwoPassModel, job: JobSpec, world_size: int) -> Engine:
    """The engine of the job's ZeRO stage; takes the module over."""
    assert job.train is not None
    if job.train.deepspeed.zero_stage == 0:
        return DataParallelEngine(module, job, world_size)
    from ullme_ray.train.deepspeed import DeepSpeedEngine  # its import takes seconds

    return DeepSpeedEngine(module, job, world_size)
