"""Where and when a job runs: the Ray cluster it joins, the one that `ullme-ray render` describes, and its schedule."""

from __future__ import annotations

from typing import Annotated, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, Field, PositiveInt

from ullme_ray.spec.cron import Cron
from ullme_ray.spec.secrets import SecretRef
from ullme_ray.spec.section import Positive, Section

_LABEL = r"^[a-z]([a-z0-9-]{0,28}[a-z0-9])?$"


def _cron(value: str) -> str:
    Cron.parse(value)
    return value


def _zone(value: str) -> str:
    try:
        ZoneInfo(value)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError("a time zone such as UTC or Europe/Berlin") from None
    return value


class HeadSpec(Section):
    cpus: PositiveInt = Field(2, description="CPU cores of the head pod, which runs no stage's work.")
    memory_gb: Positive = Field(8.0, description="Memory of the head pod in GiB.")


class WorkerGroupSpec(Section):
    name: Annotated[str, Field(pattern=_LABEL)] = Field(description="Name of the group: lower-case letters, digits, dashes.")
    stages: Annotated[tuple[Literal["train", "evaluate", "embed", "serve"], ...], Field(strict=False)] = Field(
        (), description="Stages that the group is for; absent means all."
    )
    min: Annotated[int, Field(ge=0)] = Field(0, description="Pods kept at least; 0 lets the autoscaler start from nothing.")
    max: PositiveInt = Field(1, description="Pods at most.")
    cpus: PositiveInt = Field(1, description="CPU cores of one pod.")
    memory_gb: Positive = Field(8.0, description="Memory of one pod in GiB.")
    gpus: Annotated[int, Field(ge=0)] = Field(0, description="GPUs of one pod.")
    node_labels: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="Labels that a Kubernetes node must have, each as key=value."
    )
    spot: bool = Field(
        False, description="Tolerate the taints of spot nodes; a node that goes costs at most a unit, or a step."
    )


class ClusterSpec(Section):
    address: str | None = Field(None, description="Ray cluster to join, such as auto or host:6379; absent starts a local one.")
    image: str | None = Field(
        None, description="Container image with ullme_ray, made by cluster/Dockerfile; absent means ullme-ray:VERSION or -cuda."
    )
    namespace: Annotated[str, Field(pattern=_LABEL)] = Field("ullme", description="Kubernetes namespace of what is rendered.")
    secret: str | None = Field(
        None, description="Kubernetes Secret whose keys are the job's env:NAME secrets and AWS_*; absent means NAME-secrets."
    )
    service_account: str | None = Field(
        None, description="Kubernetes service account of the pods, such as one bound to an IAM role for the bucket."
    )
    volume_gb: PositiveInt | None = Field(
        None, description="Size of a shared (ReadWriteMany) volume for a local `storage`; absent where storage is on S3."
    )
    storage_class: str | None = Field(None, description="Storage class of that volume; absent means the cluster's default.")
    head: HeadSpec = Field(HeadSpec(), description="The head pod.")
    workers: Annotated[tuple[WorkerGroupSpec, ...], Field(strict=False)] = Field(
        (), description="Groups of worker pods; absent means one group per stage, of the size that the stage asks for."
    )
    idle_seconds: PositiveInt = Field(300, description="An idle worker pod is taken away after so many seconds.")
    retries: Annotated[int, Field(ge=0)] = Field(
        2, description="Fresh clusters tried after a failed one; each resumes what is done."
    )
    deadline_hours: Positive | None = Field(None, description="A run is ended after so many hours; absent means never.")
    keep_minutes: Annotated[int, Field(ge=0)] = Field(10, description="Minutes that a finished run's cluster stays for a look.")
    redis: str | None = Field(
        None, description="host:port of a Redis that keeps the state of Ray's head over its restart; absent means none."
    )
    redis_password: SecretRef | None = Field(None, description="Password of that Redis, as env:NAME (a key of `secret`).")

    def groups_for(self, *stages: str) -> tuple[WorkerGroupSpec, ...]:
        """The job's own groups of workers that are for one of these stages."""
        return tuple(group for group in self.workers if not group.stages or set(group.stages) & set(stages))


class ScheduleSpec(Section):
    cron: Annotated[str, AfterValidator(_cron)] = Field(
        description='When runs begin: minute hour day month weekday, such as "0 3 * * *", or @daily.'
    )
    timezone: Annotated[str, AfterValidator(_zone)] = Field("UTC", description="Time zone of `cron`, such as Europe/Berlin.")
    stages: Annotated[tuple[Literal["train", "evaluate", "embed"], ...], Field(strict=False)] = Field(
        (), description="Stages of a scheduled run; absent means all of the job's but serve."
    )
    webhook: SecretRef | None = Field(
        None, description="URL that is told of a failed run by a POST of JSON, as env:NAME or file:PATH."
    )
    suspend: bool = Field(False, description="Keep the schedule without starting runs.")
