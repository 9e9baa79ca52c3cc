"""Pods of a rendered cluster: one container each, not as root, with the job file mounted and secrets by reference.

A pod asks for as much as it may use, so that Ray's and Kubernetes' idea of its size agree, and nothing is killed for memory
that another pod took.
"""

from __future__ import annotations

import hashlib
from typing import Any

from ullme_ray import logs, reach
from ullme_ray.deploy.versions import image
from ullme_ray.errors import JobFileError, Problem
from ullme_ray.spec.cluster import WorkerGroupSpec
from ullme_ray.spec.job import JobSpec
from ullme_ray.spec.secrets import SecretRef
from ullme_ray.spec.section import Section

JOB_FOLDER = "/etc/ullme"
JOB_FILE = f"{JOB_FOLDER}/job.yaml"
STORAGE_MOUNT = "/mnt/ullme"
SERVE_PORT = 8000
DASHBOARD_PORT = 8265
METRICS_PORT = 8080
USER_ID = 1000  # `ray` in Ray's images
_AWS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_ENDPOINT_URL")
# With Ray's own settings a task on a host whose cable is cut was still waiting after 400 s; with these it went on after 47 s.
_KEEPALIVE = {"RAY_grpc_client_keepalive_time_ms": "10000", "RAY_grpc_client_keepalive_timeout_ms": "5000"}
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}


def labels(job: JobSpec) -> dict[str, str]:
    """What every object of the job carries, and what the network policy goes by.

    `app.kubernetes.io/name` is KubeRay's own: a pod with another value is not found by the head's service.
    """
    return {"app.kubernetes.io/part-of": "ullme-ray", "app.kubernetes.io/instance": job.name}


def metadata(job: JobSpec, name: str | None = None) -> dict[str, Any]:
    return {"name": name or job.name, "namespace": job.cluster.namespace, "labels": labels(job)}


def secret_name(job: JobSpec) -> str:
    return job.cluster.secret or f"{job.name}-secrets"


def config_name(job: JobSpec) -> str:
    return f"{job.name}-job"


def volume_name(job: JobSpec) -> str:
    return f"{job.name}-storage"


def secret_variables(job: JobSpec) -> list[str]:
    """Names of the environment variables that the job's secrets are references to, in order.

    Raises:
        JobFileError: a secret is a file, which no pod has.
    """
    found: dict[str, None] = {}
    problems = []
    for where, reference in _references(job, ""):
        kind, _, target = reference.reference.partition(":")
        if kind == "env":
            found[target] = None
        else:
            problems.append(
                Problem(where, f"= {reference.reference} is a file of this machine; use env:NAME, a key of cluster.secret")
            )
    if problems:
        raise JobFileError(job.name, problems)
    return sorted(found)


def _references(value: Any, where: str) -> list[tuple[str, SecretRef]]:
    if isinstance(value, Section):
        return [found for key, below in value for found in _references(below, f"{where}.{key}" if where else key)]
    if isinstance(value, tuple):
        return [found for i, below in enumerate(value) for found in _references(below, f"{where}.{i}")]
    return [(where, value)] if isinstance(value, SecretRef) else []


def from_secret(job: JobSpec, key: str, *, optional: bool = False) -> dict[str, Any]:
    reference: dict[str, Any] = {"name": secret_name(job), "key": key}
    return {"secretKeyRef": reference | ({"optional": True} if optional else {})}


def environment(job: JobSpec) -> list[dict[str, Any]]:
    """The variables of every Ray container. Values of secrets stay in Kubernetes' Secret."""
    plain = {**_KEEPALIVE, **_QUIET, logs.VARIABLE: "json", reach.ROOTS: STORAGE_MOUNT}
    variables: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in plain.items()]
    needed = [name for name in secret_variables(job) if name != _redis_variable(job)]
    variables += [{"name": name, "valueFrom": from_secret(job, name)} for name in needed]
    for name in _AWS:  # optional: a pod with an IAM role has no keys
        if job.storage.startswith("s3://") and name not in needed:
            variables.append({"name": name, "valueFrom": from_secret(job, name, optional=True)})
    return variables


def _redis_variable(job: JobSpec) -> str | None:
    password = job.cluster.redis_password
    return password.reference.removeprefix("env:") if password is not None else None


def locked_down() -> dict[str, Any]:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def pod_security() -> dict[str, Any]:
    return {
        "runAsNonRoot": True,
        "runAsUser": USER_ID,
        "runAsGroup": USER_ID,
        "fsGroup": USER_ID,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def head_pod(job: JobSpec, job_text: str) -> dict[str, Any]:
    size = job.cluster.head
    ports = {"gcs-server": 6379, "dashboard": DASHBOARD_PORT, "client": 10001, "serve": SERVE_PORT, "metrics": METRICS_PORT}
    head = _container(job, "ray-head", size.cpus, size.memory_gb, gpus=0, ports=ports)
    return _pod(job, head, job_text)


def worker_pod(job: JobSpec, group: WorkerGroupSpec, job_text: str) -> dict[str, Any]:
    ports = {"serve": SERVE_PORT, "metrics": METRICS_PORT}
    worker = _container(job, "ray-worker", group.cpus, group.memory_gb, gpus=group.gpus, ports=ports)
    template = _pod(job, worker, job_text)
    spec = template["spec"]
    if group.node_labels:
        spec["nodeSelector"] = dict(label.split("=", 1) for label in group.node_labels)
    tolerations = []
    if group.gpus:
        tolerations.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
    if group.spot:
        for key in ("cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority", "karpenter.sh/capacity-type", "spot"):
            tolerations.append({"key": key, "operator": "Exists", "effect": "NoSchedule"})
    if tolerations:
        spec["tolerations"] = tolerations
    return template


def _container(job: JobSpec, name: str, cpus: int, memory_gb: float, *, gpus: int, ports: dict[str, int]) -> dict[str, Any]:
    size = {"cpu": str(cpus), "memory": f"{round(memory_gb * 1024)}Mi"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    mounts = [{"name": "job", "mountPath": JOB_FOLDER, "readOnly": True}, {"name": "shm", "mountPath": "/dev/shm"}]
    if job.cluster.volume_gb is not None:
        mounts.append({"name": "storage", "mountPath": STORAGE_MOUNT})
    return {
        "name": name,
        "image": image(job, gpus=gpus > 0),
        "env": environment(job),
        "ports": [{"name": port, "containerPort": number} for port, number in ports.items()],
        "resources": {"requests": size, "limits": dict(size)},
        "securityContext": locked_down(),
        "volumeMounts": mounts,
    }


def _pod(job: JobSpec, container: dict[str, Any], job_text: str) -> dict[str, Any]:
    memory = container["resources"]["limits"]["memory"]
    volumes: list[dict[str, Any]] = [
        {"name": "job", "configMap": {"name": config_name(job)}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{int(memory.removesuffix('Mi')) // 3}Mi"}},
    ]
    if job.cluster.volume_gb is not None:
        volumes.append({"name": "storage", "persistentVolumeClaim": {"claimName": volume_name(job)}})
    account = {"serviceAccountName": job.cluster.service_account} if job.cluster.service_account else {}
    return {
        "metadata": {
            "labels": labels(job),
            # A changed job file is a changed pod: a RayService then brings up a new cluster beside the old one.
            "annotations": {"ullme-ray/job-sha256": hashlib.sha256(job_text.encode()).hexdigest()},
        },
        "spec": {
            **account,
            "restartPolicy": "Never",  # wanted by the autoscaler's second version: a pod that ends is replaced
            "terminationGracePeriodSeconds": 60,
            "securityContext": pod_security(),
            "containers": [container],
            "volumes": volumes,
        },
    }
