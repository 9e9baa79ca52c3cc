"""Rendered manifests: taken by the schemas and the operator's rules, the same text every time, no secret."""

from __future__ import annotations

import copy
import re
import shlex
import tomllib
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
from jsonschema import ValidationError
from manifests import complaints, read
from ruamel.yaml import YAML

from ullme_ray.cli import app
from ullme_ray.deploy import render_job, write_manifests
from ullme_ray.deploy.rules import broken_rules
from ullme_ray.deploy.versions import RAY_VERSION
from ullme_ray.errors import JobFileError
from ullme_ray.spec import JobSpec, load_job, parse_job

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
EXAMPLES = {"nightly": "jobs/nightly.yaml", "training": "jobs/llama3_8b_grl.yaml"}  # folder in cluster/ -> job file


@cache
def texts(job: JobSpec) -> dict[str, str]:
    return render_job(job)


@cache
def rendered(job: JobSpec) -> tuple[dict[str, Any], ...]:
    """Not to be changed: it is made once."""
    return tuple(manifest for text in texts(job).values() for manifest in read(text))


def on_a_volume(path: Path) -> JobSpec:
    """A job of jobs/, its local storage put on a volume."""
    job = load_job(path)
    return job if job.storage.startswith("s3://") else load_job(path, ["cluster.volume_gb=50"])


def find(job: JobSpec, kind: str) -> dict[str, Any]:
    (found,) = [manifest for manifest in rendered(job) if manifest["kind"] == kind]
    return found


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_job_renders_to_manifests_that_are_taken(path: Path) -> None:
    job = on_a_volume(path)
    found = rendered(job)
    assert {manifest["kind"] for manifest in found} >= {"Kustomization", "ConfigMap", "NetworkPolicy"}
    assert {manifest["kind"] for manifest in found} & {"RayJob", "RayService", "CronJob"}
    assert {
        m["kind"]: wrong for m in found if (wrong := complaints(m))
    } == {}  # nothing changed: what every mutation starts from
    for inner in (read(m["data"]["rayjob.yaml"])[0] for m in found if "rayjob.yaml" in m.get("data", {})):
        assert complaints(inner) == []


def test_there_are_jobs() -> None:
    assert len(JOBS) >= 8


NIGHTLY = load_job(ROOT / "jobs" / "nightly.yaml")
TRAINING = load_job(ROOT / "jobs" / "llama3_8b_grl.yaml")
Mutation = Callable[[dict[str, Any]], Any]


def cluster(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    found: dict[str, Any] = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec["jobTemplate"]["rayClusterSpec"]
    return found


def head(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = cluster(manifest)["headGroupSpec"]["template"]["spec"]
    return found


def put(at: Callable[[dict[str, Any]], dict[str, Any]], **values: Any) -> Mutation:
    return lambda manifest: at(manifest).update(values)


def spec(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["spec"]
    return found


def container(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = head(manifest)["containers"][0]
    return found


MUTATIONS: dict[str, tuple[JobSpec, str, Mutation]] = {
    "misspelt entrypoint": (TRAINING, "RayJob", put(spec, entryPoint="python")),
    "no cluster": (TRAINING, "RayJob", lambda m: spec(m).pop("rayClusterSpec")),
    "no entrypoint": (TRAINING, "RayJob", lambda m: spec(m).pop("entrypoint")),
    "retries as text": (TRAINING, "RayJob", put(spec, backoffLimit="2")),
    "retries below 0": (TRAINING, "RayJob", put(spec, backoffLimit=-1)),
    "unknown submission mode": (TRAINING, "RayJob", put(spec, submissionMode="Job")),
    "ttl without shutdown": (TRAINING, "RayJob", put(spec, shutdownAfterJobFinishes=False)),
    "suspend without shutdown": (
        TRAINING,
        "RayJob",
        put(spec, shutdownAfterJobFinishes=False, ttlSecondsAfterFinished=0, suspend=True),
    ),
    "deadline 0": (TRAINING, "RayJob", put(spec, activeDeadlineSeconds=0)),
    "deadline beyond int32": (TRAINING, "RayJob", put(spec, activeDeadlineSeconds=2**31)),
    "sidecar with a submitter": (TRAINING, "RayJob", put(spec, submissionMode="SidecarMode")),
    "retries in an interactive job": (TRAINING, "RayJob", put(spec, submissionMode="InteractiveMode")),
    "managed by nobody": (TRAINING, "RayJob", put(spec, managedBy="me")),
    "half a deletion strategy": (TRAINING, "RayJob", put(spec, deletionStrategy={"onSuccess": {"policy": "DeleteCluster"}})),
    "name too long": (TRAINING, "RayJob", put(lambda m: m["metadata"], name="a" * 48)),
    "name begins with a digit": (TRAINING, "RayJob", put(lambda m: m["metadata"], name="7nights")),
    "no head": (TRAINING, "RayJob", lambda m: cluster(m).pop("headGroupSpec")),
    "token without rayVersion": (TRAINING, "RayJob", lambda m: cluster(m).pop("rayVersion")),
    "unknown auth mode": (TRAINING, "RayJob", put(cluster, authOptions={"mode": "password"})),
    "unknown autoscaler": (TRAINING, "RayJob", put(lambda m: cluster(m)["autoscalerOptions"], version="v3")),
    "restart policy of v1": (TRAINING, "RayJob", put(head, restartPolicy="Always")),
    "min above max": (TRAINING, "RayJob", put(lambda m: cluster(m)["workerGroupSpecs"][0], minReplicas=9)),
    "group without a template": (TRAINING, "RayJob", lambda m: cluster(m)["workerGroupSpecs"][0].pop("template")),
    "two groups of a name": (
        TRAINING,
        "RayJob",
        lambda m: cluster(m)["workerGroupSpecs"].append(cluster(m)["workerGroupSpecs"][0]),
    ),
    "two containers of a name": (TRAINING, "RayJob", lambda m: head(m)["containers"].append(container(m))),
    "no container": (TRAINING, "RayJob", put(head, containers=[])),
    "container without a name": (TRAINING, "RayJob", lambda m: container(m).pop("name")),
    "memory that is no quantity": (
        TRAINING,
        "RayJob",
        put(lambda m: container(m)["resources"]["limits"], memory="8 gigabytes"),
    ),
    "port as text": (TRAINING, "RayJob", put(lambda m: container(m)["ports"][0], containerPort="6379")),
    "variable with an unknown source": (
        TRAINING,
        "RayJob",
        lambda m: container(m)["env"].append({"name": "X", "valueFrom": {"secret": "x"}}),
    ),
    "label that is a number": (TRAINING, "RayJob", put(lambda m: m["metadata"]["labels"], run=7)),
    "fault tolerance twice": (
        TRAINING,
        "RayJob",
        lambda m: (
            cluster(m).update(gcsFaultToleranceOptions={"redisAddress": "redis:6379"}),
            container(m)["env"].append({"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}),
        ),
    ),
    "serve config as a mapping": (NIGHTLY, "RayService", put(spec, serveConfigV2={"applications": []})),
    "misspelt cluster of a service": (
        NIGHTLY,
        "RayService",
        lambda m: spec(m).update(rayClusterSpec=spec(m).pop("rayClusterConfig")),
    ),
    "four fields of cron": (NIGHTLY, "RayCronJob", put(spec, schedule="0 3 * *")),
    "hour 25": (NIGHTLY, "RayCronJob", put(spec, schedule="0 25 * * *")),
    "zone inside the schedule": (NIGHTLY, "RayCronJob", put(spec, schedule="TZ=UTC 0 3 * * *")),
    "concurrency policy of a RayCronJob": (NIGHTLY, "RayCronJob", put(spec, concurrencyPolicy="Forbid")),
    "cron name too long": (NIGHTLY, "RayCronJob", put(lambda m: m["metadata"], name="a" * 37)),
    "unknown concurrency policy": (NIGHTLY, "CronJob", put(spec, concurrencyPolicy="Never")),
    "CronJob without a schedule": (NIGHTLY, "CronJob", lambda m: spec(m).pop("schedule")),
    "misspelt history": (NIGHTLY, "CronJob", put(spec, failedJobHistoryLimit=3)),
    "policy without a selector": (NIGHTLY, "NetworkPolicy", lambda m: spec(m).pop("podSelector") and spec(m).update(pods={})),
    "policy of an unknown type": (NIGHTLY, "NetworkPolicy", put(spec, policyTypes="Ingress")),
    "config that is a number": (NIGHTLY, "ConfigMap", put(lambda m: m["data"], retries=3)),
    "misspelt resources": (NIGHTLY, "Kustomization", lambda m: m.update(resource=m.pop("resources"))),
    "a resource twice": (NIGHTLY, "Kustomization", lambda m: m["resources"].append(m["resources"][0])),
}


@pytest.mark.parametrize(("job", "kind", "mutate"), MUTATIONS.values(), ids=list(MUTATIONS))
def test_a_manifest_with_one_thing_wrong_is_refused(job: JobSpec, kind: str, mutate: Mutation) -> None:
    manifest = next(m for m in rendered(job) if m["kind"] == kind and "rayjob.yaml" not in m.get("data", {}))
    wrong = copy.deepcopy(manifest)
    mutate(wrong)
    assert wrong != manifest
    assert complaints(wrong)


def test_a_key_that_stands_twice_is_refused() -> None:
    text = texts(NIGHTLY)["networkpolicy.yaml"]
    with pytest.raises(Exception, match="duplicate key"):
        read(text.replace("kind: NetworkPolicy\n", "kind: NetworkPolicy\nkind: NetworkPolicy\n"))


def test_the_same_job_gives_the_same_text_and_another_job_another() -> None:
    assert render_job(NIGHTLY) == render_job(load_job(ROOT / "jobs" / "nightly.yaml"))
    other = load_job(ROOT / "jobs" / "nightly.yaml", ["embed.rows_per_unit=1024"])
    changed = {name for name, text in render_job(other).items() if text != texts(NIGHTLY)[name]}
    assert changed == {"configmap.yaml", "rayservice.yaml", "cronjob.yaml", "raycronjob.yaml"}  # the rest does not depend on it


@pytest.mark.parametrize(("folder", "job"), EXAMPLES.items(), ids=list(EXAMPLES))
def test_the_examples_in_cluster_are_what_render_prints(folder: str, job: str) -> None:
    wanted = texts(load_job(ROOT / job))
    found = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "cluster" / folder).iterdir()}
    assert found == wanted, f"run: ullme-ray render {job} -o cluster/{folder}"


def test_stages_run_as_one_job_and_a_server_by_itself() -> None:
    path = ROOT / "jobs" / "quickstart.yaml"
    job = load_job(path, ["cluster.volume_gb=50", "serve.keep_running=true"])
    assert find(job, "RayJob")["spec"]["entrypoint"].endswith("/etc/ullme/job.yaml --stages train,evaluate,embed")
    groups = [group["groupName"] for group in cluster(find(job, "RayJob"))["workerGroupSpecs"]]
    assert groups == ["train", "embed"]
    assert [group["groupName"] for group in cluster(find(job, "RayService"))["workerGroupSpecs"]] == ["serve"]


def test_a_run_and_a_server_of_one_job_have_names_of_their_own() -> None:
    """KubeRay makes a service NAME-head-svc for each RayJob and each RayService."""
    job = load_job(ROOT / "jobs" / "quickstart.yaml", ["cluster.volume_gb=50"])
    assert find(job, "RayJob")["metadata"]["name"] != find(job, "RayService")["metadata"]["name"]


def test_no_pod_of_ray_has_a_name_that_the_heads_service_does_not_look_for() -> None:
    for manifest in (*rendered(TRAINING), *rendered(NIGHTLY), *read(find_cron_template(NIGHTLY))):
        if manifest["kind"].startswith("Ray"):
            assert "app.kubernetes.io/name" not in str(manifest)


def test_gpu_workers_start_from_zero_on_spot_nodes_and_serving_ones_stay() -> None:
    run = read(find_cron_template(NIGHTLY))[0]
    (embed,) = cluster(run)["workerGroupSpecs"]
    assert (embed["groupName"], embed["minReplicas"], embed["maxReplicas"]) == ("embed", 0, 8)
    assert embed["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {"key": "spot", "operator": "Exists", "effect": "NoSchedule"} in embed["template"]["spec"]["tolerations"]
    (serve,) = cluster(find(NIGHTLY, "RayService"))["workerGroupSpecs"]
    assert (serve["groupName"], serve["minReplicas"]) == ("serve", 1)


def find_cron_template(job: JobSpec) -> str:
    (text,) = [m["data"]["rayjob.yaml"] for m in rendered(job) if "rayjob.yaml" in m.get("data", {})]
    return str(text)


def test_every_container_is_limited_and_locked_down() -> None:
    seen = 0
    for job in (NIGHTLY, TRAINING):
        for pod in pods([*rendered(job), *(read(find_cron_template(job)) if job.schedule else [])]):
            assert pod["securityContext"]["runAsNonRoot"] is True
            for box in pod["containers"]:
                seen += 1
                assert box["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
                assert set(box["resources"]["limits"]) >= {"cpu", "memory"}
    assert seen >= 10


def pods(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        own = [value] if "containers" in value else []
        return own + [pod for below in value.values() for pod in pods(below)]
    return [pod for item in value for pod in pods(item)] if isinstance(value, list) else []


def test_ray_has_one_version_everywhere() -> None:
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (ray,) = [need for need in needs if need.startswith("ray[")]
    assert ray.endswith(f"=={RAY_VERSION}")
    assert version("ray") == RAY_VERSION
    dockerfile = (ROOT / "cluster" / "Dockerfile").read_text()
    assert re.findall(r"^ARG RAY_VERSION=(.*)$", dockerfile, flags=re.MULTILINE) == [RAY_VERSION]
    assert cluster(find(NIGHTLY, "RayService"))["rayVersion"] == RAY_VERSION


def test_a_secret_that_is_set_here_is_nowhere_in_the_manifests(monkeypatch: pytest.MonkeyPatch) -> None:
    canary = "canary-7f3a9c"
    for name in ("ULLME_API_KEYS", "ULLME_WEBHOOK", "HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, canary)
    text = "".join((*render_job(NIGHTLY).values(), *render_job(TRAINING).values()))
    assert canary not in text
    assert text.count("key: ULLME_API_KEYS") >= 2
    assert "key: HF_TOKEN" in text


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("serve.api_keys=file:/home/me/keys", "serve.api_keys = file:/home/me/keys is a file of this machine"),
        ("storage=runs", "storage = runs is a folder of this machine"),
        ("embed.input.path=corpus.jsonl", "embed.input.path = corpus.jsonl is on this machine"),
        ("model.base=/models/own", "model.base = /models/own is on this machine"),
        ("serve.adapters=[{name: a, path: adapter}]", "serve.adapters.0.path = adapter is on this machine"),
        ("cluster.volume_gb=10", "cluster.volume_gb is for a local storage"),
        ("name=7nights", "must begin with a letter"),
        (f"name={'a' * 40}", "takes 36 at most"),
    ],
)
def test_a_job_that_cannot_run_on_kubernetes_is_refused_with_a_way_out(override: str, match: str) -> None:
    with pytest.raises(JobFileError, match=match):
        render_job(load_job(ROOT / "jobs" / "nightly.yaml", [override]))


def test_files_of_an_earlier_rendering_go_and_those_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("kind: Mine\n")
    write_manifests(NIGHTLY, tmp_path)
    assert (tmp_path / "cronjob.yaml").exists()
    write_manifests(TRAINING, tmp_path)
    assert not (tmp_path / "cronjob.yaml").exists()
    assert (tmp_path / "mine.yaml").exists()


def test_other_options_are_taken_too() -> None:
    job = parse_job(
        b"""
name: all-options
storage: s3://bucket/x
model: {base: some/model}
evaluate: {local: [{path: "s3://bucket/heldout"}]}
cluster:
  image: registry.example/ullme:1
  namespace: search
  service_account: reader
  redis: redis.search:6379
  redis_password: env:REDIS_SECRET
  deadline_hours: 2.5
  retries: 0
  workers: [{name: cpu, min: 1, max: 2, cpus: 8, memory_gb: 30.5, node_labels: [kubernetes.io/arch=amd64]}]
"""
    )
    found = find(job, "RayJob")
    assert complaints(found) == []
    assert found["spec"]["activeDeadlineSeconds"] == 9000
    password = cluster(found)["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]
    assert password == {"name": "all-options-secrets", "key": "REDIS_SECRET"}
    assert head(found)["serviceAccountName"] == "reader"
    assert "REDIS_SECRET" not in {variable["name"] for variable in container(found)["env"]}
    (group,) = cluster(found)["workerGroupSpecs"]
    assert group["template"]["spec"]["nodeSelector"] == {"kubernetes.io/arch": "amd64"}


def test_the_commands_of_the_cluster_readme_exist() -> None:
    text = (ROOT / "cluster" / "README.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL))
    lines = [line.split("  #")[0] for line in blocks.splitlines() if line.startswith("ullme-ray ")]
    assert len(lines) >= 5
    group = typer.main.get_command(app)
    for line in lines:
        name, *words = shlex.split(line)[1:]
        group.commands[name].make_context(name, words, resilient_parsing=False)  # type: ignore[attr-defined]
    for path in re.findall(r"(?:cluster|jobs)/[\w./-]+\w", text):
        assert (ROOT / path).exists(), path


def test_rules_say_nothing_about_other_kinds() -> None:
    assert broken_rules({"kind": "ConfigMap", "metadata": {"name": "7" * 60}}) == []


def test_the_cluster_file_without_kubernetes_is_valid_for_ray() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    settings = YAML(typ="safe").load((ROOT / "cluster" / "ray-up.yaml").read_text())
    validate_config(prepare_config(dict(settings)))
    with pytest.raises(ValidationError, match="setup_command"):
        validate_config(prepare_config({**settings, "setup_command": []}))
