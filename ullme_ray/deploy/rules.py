"""What only KubeRay's operator refuses, checked before anything is sent: the CRDs' schemas know nothing of these rules.

Collected from the operator's own validation (v1.7.0). Schemas are checked by the API server, and by our tests.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ullme_ray.deploy.text import Manifest
from ullme_ray.spec.cron import Cron

# Names become those of pods and services, with suffixes: DNS-1035 labels of 63 characters in all.
NAME_LIMITS = {"RayCluster": 53, "RayJob": 47, "RayService": 47, "RayCronJob": 36, "CronJob": 36}
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
_FT_ENV = ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "RAY_external_storage_namespace")


def broken_rules(manifest: Manifest) -> list[str]:
    """Sentences about what the operator would refuse; none for objects of other kinds."""
    kind, name, spec = manifest.get("kind", ""), manifest.get("metadata", {}).get("name", ""), manifest.get("spec") or {}
    found = list(_name(kind, name))
    if kind == "RayCluster":
        found += _cluster(spec)
    elif kind == "RayJob":
        found += _job(spec)
    elif kind == "RayService":
        found += _cluster(spec.get("rayClusterConfig") or {})
    elif kind == "RayCronJob":
        found += [*_schedule(spec), *_job(spec.get("jobTemplate") or {})]
    elif kind == "CronJob":
        found += _schedule(spec)
        if spec.get("concurrencyPolicy", "Allow") not in ("Allow", "Forbid", "Replace"):
            found.append("concurrencyPolicy is none of Allow, Forbid, Replace")
    return [f"{kind} {name}: {sentence}" for sentence in found]


def _name(kind: str, name: str) -> Iterator[str]:
    limit = NAME_LIMITS.get(kind)
    if limit is None:
        return
    if len(name) > limit:
        yield f"the name has {len(name)} characters; {kind} takes {limit} at most"
    if not _NAME.fullmatch(name):
        yield "the name must begin with a letter, and hold lower-case letters, digits and dashes only"


def _job(spec: Manifest) -> Iterator[str]:
    mode, shuts_down = spec.get("submissionMode", _MODES[0]), spec.get("shutdownAfterJobFinishes", False)
    if mode not in _MODES:
        yield f"submissionMode {mode} is none of {', '.join(_MODES)}"
    if spec.get("suspend") and not shuts_down:
        yield "suspend needs shutdownAfterJobFinishes: true"
    if spec.get("ttlSecondsAfterFinished", 0) and not shuts_down:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true"
    if spec.get("ttlSecondsAfterFinished", 0) < 0:
        yield "ttlSecondsAfterFinished is below 0"
    for deadline in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if deadline in spec and spec[deadline] <= 0:
            yield f"{deadline} must be above 0"
    if spec.get("backoffLimit", 0) < 0:
        yield "backoffLimit is below 0"
    if spec.get("backoffLimit", 0) and (spec.get("clusterSelector") or mode == "InteractiveMode"):
        yield "backoffLimit must be 0 with clusterSelector or InteractiveMode"
    if mode == "SidecarMode" and (spec.get("submitterPodTemplate") or spec.get("clusterSelector")):
        yield "SidecarMode takes neither submitterPodTemplate nor clusterSelector"
    if mode != "InteractiveMode" and not spec.get("entrypoint"):
        yield "entrypoint is missing"
    if not spec.get("rayClusterSpec") and not spec.get("clusterSelector"):
        yield "one of rayClusterSpec and clusterSelector is needed"
    yield from _cluster(spec.get("rayClusterSpec") or {})


def _cluster(spec: Manifest) -> Iterator[str]:
    if spec.get("authOptions", {}).get("mode") == "token" and not spec.get("rayVersion"):
        yield "authOptions.mode token needs rayVersion"
    groups = spec.get("workerGroupSpecs") or []
    templates = [spec.get("headGroupSpec", {}).get("template") or {}, *(group.get("template") or {} for group in groups)]
    names = [group.get("groupName") for group in groups]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"two worker groups are named {name}"
    for group in groups:
        if group.get("minReplicas", 0) > group.get("maxReplicas", 0):
            yield f"group {group.get('groupName')}: minReplicas is above maxReplicas"
    for template in templates:
        pod = template.get("spec") or {}
        if spec and not pod.get("containers"):
            yield "a pod has no container"
        is_v2 = spec.get("enableInTreeAutoscaling") and spec.get("autoscalerOptions", {}).get("version") == "v2"
        if is_v2 and pod.get("restartPolicy", "Always") != "Never":
            yield "the autoscaler's version v2 needs restartPolicy Never in every pod"
        if spec.get("gcsFaultToleranceOptions"):
            set_by_hand = {variable["name"] for c in pod.get("containers", ()) for variable in c.get("env", ())}
            for name in sorted(set_by_hand & set(_FT_ENV)):
                yield f"gcsFaultToleranceOptions excludes the variable {name}"
            if "ray.io/ft-enabled" in (template.get("metadata") or {}).get("annotations", {}):
                yield "gcsFaultToleranceOptions excludes the annotation ray.io/ft-enabled"


def _schedule(spec: Manifest) -> Iterator[str]:
    schedule = spec.get("schedule", "")
    if schedule.startswith(("TZ=", "CRON_TZ=")):
        yield "schedule holds a time zone; it belongs into timeZone"
        return
    try:
        Cron.parse(schedule)
    except ValueError as error:
        yield f"schedule {schedule!r} should be {error}"
