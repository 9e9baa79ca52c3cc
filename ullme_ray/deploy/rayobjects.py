"""KubeRay's objects: RayJob for train, evaluate and embed as one run, RayService for serve, RayCronJob for the schedule."""

from __future__ import annotations

from typing import Any

from ullme_ray.deploy.groups import worker_groups
from ullme_ray.deploy.pods import (
    JOB_FILE,
    SERVE_PORT,
    from_secret,
    head_pod,
    labels,
    locked_down,
    metadata,
    pod_security,
    worker_pod,
)
from ullme_ray.deploy.text import Manifest, dump
from ullme_ray.deploy.versions import RAY_VERSION, image
from ullme_ray.spec.job import JobSpec

API = "ray.io/v1"
_LAST_S = 30  # of a serving pod, after its longest request
_START_LIMIT_S = 1800  # a cluster that has no pods by then waits for machines that nobody has


def ray_cluster(job: JobSpec, stages: tuple[str, ...], job_text: str) -> Manifest:
    """The cluster of a RayJob or RayService: token authentication on, workers by the autoscaler."""
    settings = job.cluster
    groups = [
        {
            "groupName": group.name,
            "replicas": group.min,
            "minReplicas": group.min,
            "maxReplicas": group.max,
            "idleTimeoutSeconds": settings.idle_seconds,
            "rayStartParams": {},
            "template": worker_pod(job, group, job_text),
        }
        for group in worker_groups(job, stages)
    ]
    spec: Manifest = {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "idleTimeoutSeconds": settings.idle_seconds,
            "resources": {"requests": {"cpu": "200m", "memory": "512Mi"}, "limits": {"cpu": "500m", "memory": "1Gi"}},
            "securityContext": locked_down(),
        },
    }
    if settings.redis is not None:
        options: Manifest = {"redisAddress": settings.redis}
        if settings.redis_password is not None:
            key = settings.redis_password.reference.removeprefix("env:")
            options["redisPassword"] = {"valueFrom": from_secret(job, key)}
        spec["gcsFaultToleranceOptions"] = options
    spec["headGroupSpec"] = {
        "serviceType": "ClusterIP",  # never a public address: whoever reaches the dashboard may run code
        "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},  # no stage's work on the head
        "template": head_pod(job, job_text),
    }
    spec["workerGroupSpecs"] = groups
    return spec


def ray_job_spec(job: JobSpec, stages: tuple[str, ...], job_text: str) -> Manifest:
    """`spec` of a RayJob, which a RayCronJob has as its template too."""
    settings = job.cluster
    spec: Manifest = {
        "entrypoint": f"python -m ullme_ray run {JOB_FILE} --stages {','.join(stages)}",
        "submissionMode": "K8sJobMode",
        "backoffLimit": settings.retries,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": settings.keep_minutes * 60,
        "preRunningDeadlineSeconds": _START_LIMIT_S,
    }
    if settings.deadline_hours is not None:
        spec["activeDeadlineSeconds"] = round(settings.deadline_hours * 3600)
    spec["submitterPodTemplate"] = _submitter(job)
    spec["rayClusterSpec"] = ray_cluster(job, stages, job_text)
    return spec


def _submitter(job: JobSpec) -> Manifest:
    size = {"cpu": "500m", "memory": "512Mi"}
    return {
        "metadata": {"labels": labels(job)},
        "spec": {
            "restartPolicy": "Never",
            "securityContext": pod_security(),
            "containers": [
                {
                    "name": "ray-job-submitter",
                    "image": image(job, gpus=False),
                    "resources": {"requests": size, "limits": dict(size)},
                    "securityContext": locked_down(),
                }
            ],
        },
    }


def ray_job(job: JobSpec, stages: tuple[str, ...], job_text: str) -> Manifest:
    """Its name is not that of the RayService beside it: the operator makes a service NAME-head-svc for each."""
    name = metadata(job, f"{job.name}-run" if job.serve else job.name)
    return {"apiVersion": API, "kind": "RayJob", "metadata": name, "spec": ray_job_spec(job, stages, job_text)}


def ray_service(job: JobSpec, job_text: str) -> Manifest:
    """Serving that outlives drivers: KubeRay keeps it running, and replaces it when job file or image change."""
    application: dict[str, Any] = {
        "name": "ullme_ray",
        "import_path": "ullme_ray.deploy.serve_app:application",
        "route_prefix": "/",
        "args": {"job": JOB_FILE},
    }
    config = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": SERVE_PORT},
        "applications": [application],
    }
    spec = {
        "serviceUnhealthySecondThreshold": 900,
        "deploymentUnhealthySecondThreshold": 300,
        "serveConfigV2": dump(config),
        "rayClusterConfig": _serving_cluster(job, job_text),
    }
    return {"apiVersion": API, "kind": "RayService", "metadata": metadata(job), "spec": spec}


def _serving_cluster(job: JobSpec, job_text: str) -> Manifest:
    from ullme_ray.serve.front import CALLBACK

    assert job.serve is not None
    cluster = ray_cluster(job, ("serve",), job_text)
    pods = [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]
    for pod in pods:  # Serve's own proxy stands before the ingress here; start_server has none
        pod["spec"]["containers"][0]["env"] += [{"name": name, "value": value} for name, value in CALLBACK.items()]
        pod["spec"]["terminationGracePeriodSeconds"] = round(job.serve.request_timeout_s) + _LAST_S
    return cluster


def ray_cron_job(job: JobSpec, stages: tuple[str, ...], job_text: str) -> Manifest:
    """KubeRay's own schedule; alpha, and without a policy for runs that overlap, which are harmless but cost a cluster each."""
    assert job.schedule is not None
    spec = {
        "schedule": job.schedule.cron,
        "timeZone": job.schedule.timezone,
        "suspend": job.schedule.suspend,
        "jobTemplate": ray_job_spec(job, stages, job_text),
    }
    return {"apiVersion": API, "kind": "RayCronJob", "metadata": metadata(job), "spec": spec}
