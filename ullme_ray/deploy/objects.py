"""Kubernetes' own objects beside KubeRay's: job file, storage volume, network policy, and a CronJob that starts the RayJob."""

from __future__ import annotations

from typing import Any

from ullme_ray.deploy.pods import (
    DASHBOARD_PORT,
    METRICS_PORT,
    SERVE_PORT,
    config_name,
    labels,
    locked_down,
    metadata,
    pod_security,
    volume_name,
)
from ullme_ray.deploy.text import Manifest, dump
from ullme_ray.deploy.versions import image
from ullme_ray.spec.job import JobSpec

# Azure's 168.63.129.16 stays reachable: it is also the name server of its machines.
_METADATA_HOSTS = {"0.0.0.0/0": ["169.254.169.254/32", "100.100.100.200/32"], "::/0": ["fd00:ec2::254/128"]}
_LATE_S = 3600  # a run that could not start for so long is skipped: the next one does its work too
RUN_FOLDER = "/etc/ullme-run"
RUN_FILE = f"{RUN_FOLDER}/rayjob.yaml"


def config_map(job: JobSpec, job_text: str) -> Manifest:
    """The job file. It holds references to secrets, never a secret."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(job, config_name(job)),
        "data": {"job.yaml": job_text},
    }


def volume_claim(job: JobSpec) -> Manifest:
    spec: Manifest = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": f"{job.cluster.volume_gb}Gi"}},
    }
    if job.cluster.storage_class is not None:
        spec["storageClassName"] = job.cluster.storage_class
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata(job, volume_name(job)), "spec": spec}


def network_policy(job: JobSpec) -> Manifest:
    """Who may reach the job's pods: they themselves, KubeRay's operator, and clients of the server; and what they may reach.

    Ray trusts whoever reaches its ports, so this is the outer door and the token the inner one. The address of the cloud's
    metadata service is out of reach, since it hands the node's credentials to anyone.
    """
    own = {"podSelector": {"matchLabels": labels(job)}}
    operator = {
        "namespaceSelector": {},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
    }
    monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    ingress: list[Manifest] = [
        {"from": [own]},
        {"from": [operator], "ports": _ports(DASHBOARD_PORT, SERVE_PORT)},
        {"from": [monitoring], "ports": _ports(METRICS_PORT, SERVE_PORT)},
    ]
    if job.serve is not None:
        clients = {"podSelector": {"matchLabels": {"ullme-ray/client": "true"}}, "namespaceSelector": {}}
        ingress.append({"from": [clients], "ports": _ports(SERVE_PORT)})
    egress: list[Manifest] = [{"to": [{"namespaceSelector": {}}]}]  # pods, which Cilium does not count among addresses
    for everywhere, hosts in _METADATA_HOSTS.items():
        egress.append({"to": [{"ipBlock": {"cidr": everywhere, "except": list(hosts)}}]})
    spec = {
        "podSelector": {"matchLabels": labels(job)},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": ingress,
        "egress": egress,
    }
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata(job), "spec": spec}


def _ports(*numbers: int) -> list[Manifest]:
    return [{"protocol": "TCP", "port": number} for number in numbers]


def cron_job(job: JobSpec, run: Manifest) -> list[Manifest]:
    """A CronJob whose pod creates the RayJob `run`, waits for its end and fails with it; with the rights that this takes.

    Unlike RayCronJob it is stable, keeps a history of runs with their success, and never lets two runs overlap.
    """
    assert job.schedule is not None
    name = starter_name(job)
    account = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": metadata(job, name),
        "automountServiceAccountToken": False,
    }
    role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": metadata(job, name),
        "rules": [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}],
    }
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": metadata(job, name),
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": job.cluster.namespace}],
    }
    template = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(job, name),
        "data": {"rayjob.yaml": dump(run)},
    }
    spec = {
        "schedule": job.schedule.cron,
        "timeZone": job.schedule.timezone,
        "suspend": job.schedule.suspend,
        "concurrencyPolicy": "Forbid",
        "startingDeadlineSeconds": _LATE_S,
        "successfulJobsHistoryLimit": 7,
        "failedJobsHistoryLimit": 7,
        "jobTemplate": {"spec": _starter_job(job, name)},
    }
    cron = {"apiVersion": "batch/v1", "kind": "CronJob", "metadata": metadata(job), "spec": spec}
    return [account, role, binding, template, cron]


def starter_name(job: JobSpec) -> str:
    return f"{job.name}-starter"


def _starter_job(job: JobSpec, name: str) -> Manifest:
    size = {"cpu": "100m", "memory": "256Mi"}
    own_labels = {"app.kubernetes.io/name": "ullme-ray-starter", "app.kubernetes.io/instance": job.name}
    container: dict[str, Any] = {
        "name": "starter",
        "image": image(job, gpus=False),
        "command": ["python", "-m", "ullme_ray.deploy.starter", RUN_FILE],
        "env": [_label("JOB_NAME", "job-name"), _label("JOB_UID", "controller-uid")],
        "resources": {"requests": size, "limits": dict(size)},
        "securityContext": locked_down(),
        "volumeMounts": [{"name": "run", "mountPath": RUN_FOLDER, "readOnly": True}],
    }
    return {
        "backoffLimit": 2,  # of the starter alone: one that dies finds its RayJob by name and goes on waiting
        "template": {
            "metadata": {"labels": own_labels},
            "spec": {
                "serviceAccountName": name,
                "automountServiceAccountToken": True,
                "restartPolicy": "Never",
                "securityContext": pod_security(),
                "containers": [container],
                "volumes": [{"name": "run", "configMap": {"name": name}}],
            },
        },
    }


def _label(variable: str, label: str) -> Manifest:
    """A variable with what Kubernetes notes on the pod of its Job."""
    return {"name": variable, "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['batch.kubernetes.io/{label}']"}}}


def kustomization(files: list[str]) -> Manifest:
    return {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": files}
