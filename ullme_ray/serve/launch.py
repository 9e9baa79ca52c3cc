"""Starting and stopping the server on a running Ray. Ray Serve is one per cluster, and so is ours.

Replicas import this module with the package, so torch (through `model`) is imported in functions: the ingress never loads it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import httpx
import ray
from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

import ullme_ray
from ullme_ray.errors import ServeError
from ullme_ray.serve.embedder import Embedder
from ullme_ray.serve.front import MESSAGES
from ullme_ray.serve.ingress import Ingress, Listener
from ullme_ray.serve.keys import KeyRing
from ullme_ray.serve.limits import longest_request_s
from ullme_ray.serve.models import Served, published_version, served_models
from ullme_ray.serve.warden import Guard, clear_leftover, end_by_force
from ullme_ray.spec.job import JobSpec, ReplicasSpec, ServeSpec

APP_NAME = "ullme_ray"
START_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 30.0
STARTS_TRIED = 2  # of a replica whose model fails to load
REQUESTS_PER_REPLICA = 16  # in flight on average, above which a replica is added
UPSCALE_DELAY_S = 5.0
END_S = 10.0  # for a process to end once its last request is answered; then Serve kills it
LISTENERS = 2  # one answers, one is ready to take over
INGRESS_CPUS = 0.1
_ONE_MORE = 1  # percent, which Serve rounds up to one replica more than wanted, while it replaces them
_HEAD_NODE = {"node:__internal_head__": 0.001}  # a resource that Ray gives every head node
# Ray Serve's own switch: no thread of their own for a replica's code and for the router. Alone it would
# also open an HTTP port of Serve's in the listener, without our keys and limits, and keep one that shall end alive for 30 s.
_SHORT_WAYS = {"env_vars": {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0", **MESSAGES}}
_LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)


class Server:
    """A running server; use it as a context manager, or call `stop`."""

    def __init__(self, url: str, address: tuple[str, int]) -> None:
        self.url = url
        self._address = address
        self._guard = Guard()

    def update(self, job: JobSpec) -> None:
        """Rolls a changed job out while the server answers: replicas are added, ended after their last request, or replaced.

        Host and port stay.

        Raises:
            UllmeError: the changed model cannot be served; what ran before may be gone in part.
        """
        with _quiet():
            _deploy(job, self._address)
            _wait_until_healthy(self.url)

    def stop(self) -> None:
        """Lets running requests finish if they do so soon, ends all processes of the server and frees the port."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        self._guard.release()
        with _quiet():
            if controller := _controller():
                # serve.shutdown() waits on a call that the controller's own end breaks off, and Ray prints that to stdout
                ray.get(controller.graceful_shutdown.remote(wait=False))
            while _controller() and time.monotonic() < deadline:
                time.sleep(0.1)
            end_by_force()
            serve.shutdown()  # forgets the handles of this process
        while not _is_free(*self._address) and time.monotonic() < deadline:
            time.sleep(0.1)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def preflight(job: JobSpec) -> None:
    """What can be known before long work: the port is free, the keys are readable, and a model that is not trained here exists.

    On a cluster the port is one of its head, and may yet be held by the server of a driver that died: `start_server` looks.

    Raises:
        UllmeError: one of them is not so.
    """
    settings = _settings(job)
    KeyRing(settings.api_keys)
    if not (job.cluster.address or os.environ.get("RAY_ADDRESS")):
        _check_port(settings)
    if job.train is None and job.model.base != "scratch":
        from ullme_ray.model import base_folder

        base_folder(job)


def _check_port(settings: ServeSpec) -> None:
    if settings.port and not _is_free(settings.host, settings.port):
        raise ServeError(
            f"serve.port = {settings.port} is in use on {settings.host}; stop what uses it, or set 0 for a free one"
        )


def start_server(job: JobSpec) -> Server:
    """Serves the job's model and returns once it answers. Ray must be running.

    Raises:
        UllmeError: the model does not exist, the port or keys cannot be used, or no replica came up healthy.
    """
    settings = _settings(job)
    preflight(job)
    from ullme_ray.model import encoder_folder

    for model in served_models(job):
        encoder_folder(model.job)
    if not clear_leftover():
        raise ServeError("Ray Serve already runs in this cluster; end it with `serve shutdown`, or use another cluster")
    _check_port(settings)
    address = settings.host, settings.port or _free_port(settings.host)
    server = Server(f"http://{_reachable(settings.host)}:{address[1]}", address)
    with _quiet():
        try:
            serve.start(proxy_location="Disabled", logging_config=_LOGGING)
            _deploy(job, address)
            _wait_until_healthy(server.url)
        except BaseException:
            server.stop()
            raise
    return server


def _deploy(job: JobSpec, address: tuple[str, int]) -> None:
    target = serve.RunTarget(build_app(job, address), name=APP_NAME, route_prefix=None, logging_config=_LOGGING)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def build_app(job: JobSpec, address: tuple[str, int] | None = None) -> Application:
    """The Ray Serve application: listeners or a small ingress, and model replicas. API keys go along as a reference only.

    Args:
        address: where listeners of our own open a port on the head node; None leaves HTTP to Serve's proxy.
    """
    settings = _settings(job)
    served = served_models(job)
    replicas = [_embedder(model, position, settings) for position, model in enumerate(served)]
    front = settings.model_copy(update={"replicas": ReplicasSpec(), "models": (), "adapters": ()})
    targets = [(model.names, model.pool.min == 0) for model in served]
    common: dict[str, Any] = {
        "max_ongoing_requests": 100_000,  # our own limit answers in JSON; Serve's would not
        "max_constructor_retry_count": STARTS_TRIED,
        "health_check_period_s": 1.0,
        **_drain(settings),
    }
    if address is None:
        ingress = serve.deployment(serve.ingress()(Ingress)).options(  # type: ignore[attr-defined]
            ray_actor_options={"num_cpus": INGRESS_CPUS}, **common
        )
        return ingress.bind(front, targets, *replicas)
    listener = serve.deployment(Listener, name="Ingress").options(  # type: ignore[attr-defined]
        num_replicas=LISTENERS,
        # No CPU of Ray's: a head that has none to give, or gave its last to a replica, would never get its listeners.
        ray_actor_options={"num_cpus": 0, "resources": _HEAD_NODE, "runtime_env": _SHORT_WAYS},
        max_surge_percent=_ONE_MORE,
        **common,
    )
    return _bound(listener, front, address, targets, handles=replicas)


def _bound(deployment: Any, *args: Any, handles: Sequence[Application] = (), files: object = None) -> Application:
    """The deployment with what its replicas are given, and a version made of that.

    Serve would make up a version at each update, and replace every process at a change that it does not even know of, such as
    its pool's size.

    Args:
        files: tells the files that a replica reads when it starts from those of another time.
    """
    version = hashlib.sha256(repr((ullme_ray.__version__, args, files)).encode()).hexdigest()[:16]
    bound: Application = deployment.options(version=version, _internal=True).bind(*args, *handles)
    return bound


def _without_pools(model: Served) -> Served:
    """What a replica knows of its model: not how many there are."""
    assert model.job.serve is not None
    settings = model.job.serve.model_copy(update={"replicas": ReplicasSpec(), "models": (), "adapters": ()})
    return replace(model, job=model.job.model_copy(update={"serve": settings}), pool=ReplicasSpec())


def _embedder(model: Served, position: int, settings: ServeSpec) -> Application:
    deployment = serve.deployment(Embedder, name="Embedder" if position == 0 else f"Embedder-{position}").options(  # type: ignore[attr-defined]
        ray_actor_options={
            "num_cpus": settings.cpus_per_replica,
            "num_gpus": settings.gpus_per_replica,
            "runtime_env": _SHORT_WAYS,
        },
        max_ongoing_requests=settings.max_queued_requests,  # all at once: the batcher chooses from what it sees
        max_constructor_retry_count=STARTS_TRIED,
        health_check_period_s=1.0,  # how soon a dead replica is replaced
        max_surge_percent=_ONE_MORE if _has_room(settings) else 0,
        **_drain(settings),
        **_replicas(model.pool),
    )
    files = None if settings.reload_s else published_version(model)  # with reload_s replicas take up new files by themselves
    return _bound(deployment, _without_pools(model), files=files)


def _drain(settings: ServeSpec) -> dict[str, float]:
    """A process that is told to end answers what it has, however long that takes, and ends at once where it has nothing."""
    return {
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": longest_request_s(settings) + END_S,
    }


def _has_room(settings: ServeSpec) -> bool:
    """Whether a replica's successor can start before the replica ends. Without room it would wait for it for ever."""
    if not ray.is_initialized():
        return False
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node().values()
    return any(
        node.get("CPU", 0) >= settings.cpus_per_replica and node.get("GPU", 0) >= settings.gpus_per_replica for node in free
    )


def _replicas(pool: ReplicasSpec) -> dict[str, Any]:
    if pool.min == pool.max:
        return {"num_replicas": pool.min}
    return {
        "autoscaling_config": {
            "min_replicas": pool.min,
            "initial_replicas": max(pool.min, 1),  # a model that cannot be loaded must show at the start
            "max_replicas": pool.max,
            "target_ongoing_requests": REQUESTS_PER_REPLICA,
            "downscale_delay_s": pool.idle_s,
            "upscale_delay_s": UPSCALE_DELAY_S,
        }
    }


def _controller() -> Any | None:
    """Ray Serve's controller, if one runs in this cluster."""
    try:
        return ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return None


def _wait_until_healthy(url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        app = serve.status().applications.get(APP_NAME)
        status = app.status.value if app else "NOT_STARTED"
        reasons = [d.message for d in app.deployments.values() if d.message] if app else []
        if app and status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise ServeError(f"the server did not start: {_cause(reasons) or app.message}")
        if status == "RUNNING" and _is_healthy(url):
            return
        if time.monotonic() > deadline:
            raise ServeError(f"the server was not healthy within {START_TIMEOUT_S:.0f} s: {_cause(reasons) or status}")
        time.sleep(0.2)


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=10, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def _cause(reasons: list[str]) -> str:
    """The line that says why: of a remote traceback the last that names an error, else the first of the status."""
    for reason in reasons:
        lines = [line.strip() for line in reason.splitlines() if line.strip()]
        errors = [
            line for line in lines if line.partition(":")[0].endswith(("Error", "Exception")) and " " not in line.split(":")[0]
        ]
        if errors:
            return errors[-1]
        if lines:
            return lines[0]
    return ""


def _settings(job: JobSpec) -> ServeSpec:
    if job.serve is None:
        raise ServeError("the job has no serve section; add `serve: {}` for the defaults")
    return job.serve


def _reachable(host: str) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _is_free(host: str, port: int) -> bool:
    try:
        _bind(host, port)
    except ServeError:
        raise
    except OSError:
        return False
    return True


def _free_port(host: str) -> int:
    return _bind(host, 0)


def _bind(host: str, port: int) -> int:
    """Binds and lets go; gives the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger after a stop do not count
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
            raise ServeError(f"serve.host = {host}, port {port}: cannot listen there ({error.strerror})") from error
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray Serve's own INFO lines are not for our users."""
    log = logging.getLogger("ray.serve")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)
