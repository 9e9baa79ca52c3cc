"""Runs in the pod of a rendered CronJob: creates the run's RayJob, waits for its end, and fails if it failed.

The RayJob is named after the CronJob's own Job, so a starter that dies and is started again finds the run it began, and
belongs to it, so that both leave the history of runs together. Speaks to the Kubernetes API with the pod's service account,
which may create and get RayJobs and nothing else.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from ruamel.yaml import YAML

from ullme_ray.errors import UllmeError

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
POLL_S = 15.0
_OUTAGE_S = 600.0  # of the API server, such as its upgrade
_ENDED = {"Complete": 0, "Failed": 1, "ValidationFailed": 1}


class Kubernetes:
    """RayJobs of one namespace."""

    def __init__(self, url: str, namespace: str, token_file: Path, ca_file: Path | None) -> None:
        self._client = httpx.Client(base_url=url, verify=str(ca_file) if ca_file else True, timeout=30, trust_env=False)
        self._path = f"/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
        self._token_file = token_file

    def create(self, manifest: dict[str, Any]) -> bool:
        """False where one of that name exists."""
        answer = self._client.post(self._path, json=manifest, headers=self._headers())
        if answer.status_code == httpx.codes.CONFLICT:
            return False
        _check(answer, "refused the RayJob")
        return True

    def find(self, name: str) -> dict[str, Any] | None:
        """The RayJob as it is now; None where it is gone."""
        answer = self._client.get(f"{self._path}/{name}", headers=self._headers())
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        _check(answer, f"does not show RayJob {name}")
        return dict(answer.json())

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token_file.read_text().strip()}"}  # anew: Kubernetes replaces it every hour


def _check(answer: httpx.Response, what: str) -> None:
    if answer.is_client_error and answer.status_code != httpx.codes.TOO_MANY_REQUESTS:
        raise UllmeError(f"Kubernetes {what}: {answer.status_code} {answer.text[:500]}")
    answer.raise_for_status()


def of_job(manifest: dict[str, Any], job: str, uid: str, namespace: str) -> dict[str, Any]:
    """The RayJob of a Kubernetes Job, which owns it.

    Its name is not the Job's own: under that name KubeRay would make a Job to submit the work, find one, and submit nothing.
    """
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job, "uid": uid}
    own = {"name": f"{job}-r", "namespace": namespace, "ownerReferences": [owner]}
    return {**manifest, "metadata": {**manifest["metadata"], **own}}


def start_and_wait(cluster: Kubernetes, manifest: dict[str, Any], *, poll_s: float = POLL_S) -> int:
    """Exit code of the run: 0 complete, 1 failed or gone before its end was seen.

    Raises:
        UllmeError: the API server refuses, or does not answer for ten minutes; or a RayJob of this name belongs to another Job.
    """
    name = manifest["metadata"]["name"]
    seen_at, created, shown = time.monotonic(), False, ""
    while True:
        try:
            if not created:
                say = "created" if cluster.create(manifest) else "exists already, from a starter that ended; waiting for it"
                print(f"RayJob {name} {say}", flush=True)
                created = True
            found = cluster.find(name)
            seen_at = time.monotonic()
        except httpx.HTTPError as error:
            if time.monotonic() - seen_at > _OUTAGE_S:
                raise UllmeError(f"the Kubernetes API does not answer: {type(error).__name__}: {error}") from error
            time.sleep(poll_s)
            continue
        if found is None:
            print(f"RayJob {name} was removed before its end was seen", flush=True)
            return 1
        if _owners(found) != _owners(manifest):
            raise UllmeError(f"RayJob {name} belongs to an earlier Job of this name; delete it, or name this Job otherwise")
        status = found.get("status") or {}
        state = status.get("jobDeploymentStatus") or "New"
        if state != shown:
            print(f"RayJob {name}: {state} {status.get('jobStatus') or ''} {status.get('message') or ''}".rstrip(), flush=True)
            shown = state
        if state in _ENDED:
            return _ENDED[state] or int(status.get("jobStatus") not in ("SUCCEEDED", None))
        time.sleep(poll_s)


def _owners(manifest: dict[str, Any]) -> list[str]:
    return [owner["uid"] for owner in manifest["metadata"].get("ownerReferences", ())]


def main() -> int:
    template = YAML(typ="safe", pure=True).load(Path(sys.argv[1]).read_text(encoding="utf-8"))
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    namespace = (ACCOUNT / "namespace").read_text().strip()  # where an overlay has put us
    cluster = Kubernetes(url, namespace, ACCOUNT / "token", ACCOUNT / "ca.crt")
    try:
        return start_and_wait(cluster, of_job(template, os.environ["JOB_NAME"], os.environ["JOB_UID"], namespace))
    except UllmeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
