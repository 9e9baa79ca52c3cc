"""`ullme-ray render`: a job file -> a folder of Kubernetes manifests for KubeRay, the same text for the same job.

Read `render_job` first. Nothing is asked of a cluster, and no secret is read.
"""

from __future__ import annotations

from pathlib import Path

from ullme_ray.deploy import objects, rayobjects
from ullme_ray.deploy.groups import worker_groups
from ullme_ray.deploy.pods import STORAGE_MOUNT, secret_variables
from ullme_ray.deploy.rules import broken_rules
from ullme_ray.deploy.text import Manifest, dump
from ullme_ray.errors import JobFileError, Problem, StorageError
from ullme_ray.spec.job import JobSpec
from ullme_ray.spec.places import places

_BATCH = ("train", "evaluate", "embed")
_HEAD = "# Made by `ullme-ray render` from the job {name}; change the job file and render again.\n"


def render_job(job: JobSpec) -> dict[str, str]:
    """File name -> text of every manifest of a job, `kustomization.yaml` among them.

    Raises:
        JobFileError: the job cannot run on Kubernetes as it is; names every reason.
    """
    _check(job)
    secret_variables(job)
    batch = tuple(stage for stage in job.stages if stage in _BATCH)
    inside = _inside(job, batch)
    job_text = _job_text(inside)
    manifests: dict[str, list[Manifest]] = {
        "configmap.yaml": [objects.config_map(inside, job_text)],
        "networkpolicy.yaml": [objects.network_policy(inside)],
    }
    if job.cluster.volume_gb is not None:
        manifests["storage.yaml"] = [objects.volume_claim(inside)]
    if batch and job.schedule is None:
        manifests["rayjob.yaml"] = [rayobjects.ray_job(inside, batch, job_text)]
    if job.serve is not None:
        manifests["rayservice.yaml"] = [rayobjects.ray_service(inside, job_text)]
    beside: dict[str, list[Manifest]] = {}
    if job.schedule is not None:
        stages = tuple(stage for stage in batch if not job.schedule.stages or stage in job.schedule.stages)
        manifests["cronjob.yaml"] = objects.cron_job(inside, rayobjects.ray_job(inside, stages, job_text))
        beside["raycronjob.yaml"] = [rayobjects.ray_cron_job(inside, stages, job_text)]
    every = [manifest for part in (manifests, beside) for group in part.values() for manifest in group]
    if problems := [sentence for manifest in every for sentence in broken_rules(manifest)]:
        raise JobFileError(job.name, [Problem("", sentence) for sentence in problems])
    head = _HEAD.format(name=job.name)
    texts = {name: head + dump(*group) for name, group in (manifests | beside).items()}
    if beside:
        texts["raycronjob.yaml"] = (
            head
            + "# Instead of cronjob.yaml, where the operator's feature gate RayCronJob is on; never both.\n"
            + dump(*beside["raycronjob.yaml"])
        )
    return {"kustomization.yaml": head + dump(objects.kustomization(sorted(manifests))), **texts}


def write_manifests(job: JobSpec, folder: Path) -> list[Path]:
    """Renders into a folder; files of an earlier rendering that are no longer made are removed.

    Raises:
        JobFileError: as `render_job`.
        StorageError: the folder cannot be written.
    """
    texts = render_job(job)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.yaml"):
            if old.name not in texts and old.read_text(encoding="utf-8").startswith(_HEAD.split("{", 1)[0]):
                old.unlink()
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{folder} cannot be written ({error.strerror}); give another folder with -o") from error
    return [folder / name for name in texts]


def _inside(job: JobSpec, batch: tuple[str, ...]) -> JobSpec:
    """The job as the pods see it: in the cluster they are, with the groups that its autoscaler may start."""
    tree = job.model_dump(mode="json")
    groups = {
        group.name: group.model_dump(mode="json")
        for stages in ((batch,) if batch else ()) + ((("serve",),) if job.serve else ())
        for group in worker_groups(job, stages)
    }
    tree["cluster"] |= {"address": "auto", "workers": list(groups.values())}
    if job.cluster.volume_gb is not None:
        tree["storage"] = STORAGE_MOUNT
    return JobSpec.model_validate(tree)


def _job_text(job: JobSpec) -> str:
    """The job file without what is default anyway, so that the manifests stay as they are when defaults are added."""
    tree = job.model_dump(mode="json", exclude_defaults=True)
    assert JobSpec.model_validate(tree) == job
    return dump(tree)


def _check(job: JobSpec) -> None:
    problems = []
    is_remote = job.storage.startswith("s3://")
    if not is_remote and job.cluster.volume_gb is None:
        problems.append(
            Problem("storage", f"= {job.storage} is a folder of this machine; use s3://bucket/prefix, or set cluster.volume_gb")
        )
    if is_remote and job.cluster.volume_gb is not None:
        problems.append(Problem("cluster.volume_gb", "is for a local storage, and this one is on S3; remove it"))
    for where, path in places(job).items():
        if not path.startswith(("s3://", "run:", f"{STORAGE_MOUNT}/")):
            problems.append(Problem(where, f"= {path} is on this machine; put it on S3, or below {STORAGE_MOUNT}"))
    if problems:
        raise JobFileError(job.name, problems)
