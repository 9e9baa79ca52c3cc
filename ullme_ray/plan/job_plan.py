"""What a job would do, before it does it: batch arithmetic, steps, parameters, memory per worker, units to embed.

Loads no weights: parameters are counted on torch's meta device. Costs a few seconds of imports and a listing of the corpus.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ullme_ray.errors import ModelError, UllmeError
from ullme_ray.plan.memory import ZERO_STAGES, Memory, memory_of, memory_table, verdict_of
from ullme_ray.plan.shape import shape_of
from ullme_ray.runtime import pools
from ullme_ray.spec import JobSpec, RunFolder
from ullme_ray.spec.job import TrainSpec


@dataclass(frozen=True)
class Plan:
    """Everything `ullme-ray plan` prints; absent parts are explained in `notes`."""

    name: str
    folder: str
    stages: tuple[str, ...]
    processes: dict[str, str]
    batch: str | None = None
    steps: str | None = None
    parameters: int | None = None
    trainable_parameters: int | None = None
    memory: tuple[Memory, ...] = ()
    zero_stage: int | None = None
    verdict: str | None = None
    embed: dict[str, int] | None = None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"memory": [asdict(m) | {"total": m.total} for m in self.memory]}

    def to_text(self) -> str:
        lines = [f"{self.name}: {' -> '.join(self.stages)}", f"  folder      {self.folder}"]
        lines += [f"  {stage:<11} {text}" for stage, text in self.processes.items()]
        if self.parameters is not None:
            lines.append(f"  parameters  {self.parameters:,}, of which {self.trainable_parameters or 0:,} are trained")
        if self.batch:
            lines += [f"  batch       {self.batch}", f"  steps       {self.steps}"]
        if self.memory:
            lines.append("  memory per worker, estimated:")
            lines += [f"    {line}" for line in memory_table(self.memory, self.zero_stage)]
        if self.verdict is not None:
            lines.append(f"    {self.verdict}")
        if self.embed is not None:
            lines.append("  to embed    " + ", ".join(f"{count:,} {name}" for name, count in self.embed.items()))
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def make_plan(job: JobSpec) -> Plan:
    """Works it out. What cannot be known yet (a hub model without network, data not yet written) becomes a note."""
    notes: list[str] = []
    plan: dict[str, Any] = {
        "name": job.name,
        "folder": RunFolder.of(job).root,
        "stages": job.stages,
        "processes": {pool.stage: _processes(pool.min, pool.max, pool.cpus, pool.gpus) for pool in pools(job)},
    }
    shape = None
    try:
        shape = shape_of(job)
        plan |= {"parameters": shape.parameters, "trainable_parameters": shape.trainable if job.train else 0}
        notes += shape.notes
    except ModelError as error:
        notes.append(f"parameters and memory are unknown: {error}")
    if job.train:
        from ullme_ray.train.ranks import batch_arithmetic

        plan |= {
            "batch": batch_arithmetic(job.train, job.train.workers.num_workers),
            "steps": _steps(job.train),
            "zero_stage": job.train.deepspeed.zero_stage,
        }
        if shape:
            plan["memory"] = tuple(memory_of(job, job.train, shape, stage) for stage in ZERO_STAGES)
            plan["verdict"] = verdict_of(job, job.train, shape)
    if job.embed:
        try:
            plan["embed"] = _units(job)
        except (UllmeError, FileNotFoundError) as error:
            later = job.dataset is not None and job.embed.input.path.startswith("run:data")
            notes.append("units to embed: known once `run` has written the data set" if later else f"units to embed: {error}")
    return Plan(**plan, notes=tuple(notes))


def _units(job: JobSpec) -> dict[str, int]:
    from ullme_ray.embed import num_files, plan_units

    units = plan_units(job)
    files = num_files({unit.file for unit in units})
    return {"rows": sum(unit.num_rows for unit in units), "units": len(units), "files": files}


def _processes(least: int, most: int, cpus: float, gpus: float) -> str:
    count = str(least) if least == most else f"{least} to {most}"
    return f"{count} x ({cpus:g} CPU" + (f", {gpus:g} GPU)" if gpus else ")")


def _steps(train: TrainSpec) -> str:
    return (
        f"{train.max_steps:,} x {train.global_batch_size:,} queries = {train.max_steps * train.global_batch_size:,}; "
        f"{train.warmup_steps:,} warm-up steps, then {train.lr_schedule} from {train.learning_rate:g}; "
        f"a checkpoint every {train.checkpoint_every_steps:,}"
    )
