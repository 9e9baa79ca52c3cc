"""What a job would do and need: one worker's memory, the job's work, and an embedding run at scale, simulated from costs."""

from ullme_ray.plan.job_plan import Plan, make_plan
from ullme_ray.plan.scale import ScalePlan, plan_scale

__all__ = ["Plan", "ScalePlan", "make_plan", "plan_scale"]
