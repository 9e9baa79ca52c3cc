"""The job file: YAML -> frozen, typed `JobSpec`. Costs no torch and no ray."""

from ullme_ray.spec.job import JobSpec
from ullme_ray.spec.load import load_job, parse_job
from ullme_ray.spec.run_folder import RunFolder, absolute_paths

__all__ = ["JobSpec", "RunFolder", "absolute_paths", "load_job", "parse_job"]
