"""Hard negatives for a job's training data: passages that an encoder ranks high for a query and that are not its positives."""

from ullme_ray.mine.report import MineReport
from ullme_ray.mine.run import preflight, run_mine

__all__ = ["MineReport", "preflight", "run_mine"]
