"""Where a job runs: joins the Ray cluster it names, or starts a local one that is large enough for its largest stage.

Imports ray only when a cluster is wanted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ullme_ray.errors import UllmeError
from ullme_ray.spec import JobSpec
from ullme_ray.spec.cluster import WorkerGroupSpec

SPARE_CPUS = 2  # beside a stage's own pool: its driver-side tasks (reading, writing), the server's ingress
CONNECT_TIMEOUT_S = 10.0
_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that outlives an interrupted run must not start a second Ray
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


@dataclass(frozen=True)
class Pool:
    """The processes that a stage needs at the same time, at least and at most."""

    stage: str
    min: int
    max: int
    cpus: float  # of one process
    gpus: float


def quiet_libraries() -> None:
    """Keeps libraries from talking over the job's own output. Call it before they are imported; what is set already stays.

    Nothing about keepalive is set here: a driver that pings a worker more often than the nodes were started for is cut off
    by it ("too many pings"), and the task that ran there is lost. A driver on a node inherits what the node has.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module=r"(accelerate|deepspeed|peft|ray|torch|transformers)\b")
    deepspeed_log = logging.getLogger("DeepSpeed")  # it sets its own level when it is imported, but keeps filters
    if not deepspeed_log.filters:
        deepspeed_log.addFilter(lambda record: record.levelno >= logging.ERROR)


def cluster_address(job: JobSpec) -> str | None:
    """Of the Ray cluster that the job joins; None where it starts one of its own."""
    return job.cluster.address or os.environ.get("RAY_ADDRESS")


def pools(job: JobSpec, stages: Sequence[str] | None = None) -> list[Pool]:
    """The pools of some stages; None means those that `run` takes."""
    found = []
    if job.train:
        workers = job.train.workers
        size = workers.num_workers
        found.append(Pool("train", size, size, workers.cpus_per_worker, workers.gpus_per_worker))
    for stage, section in (("mine", job.mine), ("embed", job.embed)):
        if section:
            actors = section.actors
            found.append(Pool(stage, actors.min, actors.max, actors.cpus_per_actor, actors.gpus_per_actor))
    if job.serve:
        models = [job.serve.replicas, *(model.replicas for model in job.serve.models)]
        # A model that may end when idle starts with one process all the same.
        least, most = sum(max(pool.min, 1) for pool in models), sum(pool.max for pool in models)
        found.append(Pool("serve", least, most, job.serve.cpus_per_replica, job.serve.gpus_per_replica))
    wanted = job.stages if stages is None else stages
    return [pool for pool in found if pool.stage in wanted]


def local_cpus(job: JobSpec) -> int:
    """Logical CPUs of a local Ray: never fewer than the largest stage asks for, so that no stage waits for ever."""
    needed = max((pool.max * pool.cpus for pool in pools(job, (*job.stages, "mine"))), default=0) + SPARE_CPUS
    return max(os.cpu_count() or 1, int(needed))


_asked_to_stop = threading.Event()


def _interrupt(*_: object) -> None:
    _asked_to_stop.set()
    raise KeyboardInterrupt


def _hear_interrupts() -> None:
    """Ctrl-C and SIGTERM interrupt the main thread, and are remembered: Python drops one that comes while it runs a weak
    reference's callback or a `__del__`. What a shell told this process to ignore stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)  # Ray's own ends the process without a word


def check_interrupt() -> None:
    """Raises KeyboardInterrupt if one came before and was dropped."""
    if _asked_to_stop.is_set():
        raise KeyboardInterrupt


def wait_for_interrupt() -> None:
    """Blocks until Ctrl-C or SIGTERM; not at all if one came before and was dropped."""
    _hear_interrupts()  # where Ray was there before us, nobody did
    with contextlib.suppress(KeyboardInterrupt):
        _asked_to_stop.wait()


@contextlib.contextmanager
def start_ray(job: JobSpec, stages: Sequence[str] | None = None, *, verbose: bool = False) -> Iterator[None]:
    """Ray for the length of a `with` block; leaves a Ray that was already running in this process alone.

    Args:
        stages: those that will run; None means all of the job's.
        verbose: show what the workers print.

    Raises:
        UllmeError: no cluster answers at the address, a local Ray does not start, or the pools cannot fit into it.
    """
    address = cluster_address(job)
    _asked_to_stop.clear()  # of a run before this one
    quiet_libraries()
    import ray

    if ray.is_initialized():
        yield
        return
    level = logging.INFO if verbose else logging.ERROR
    if address:
        _join(address, level, verbose)
    else:
        try:
            ray.init(
                address="local",  # without it, Ray joins any cluster that was started on this machine before
                num_cpus=local_cpus(job),
                include_dashboard=False,
                log_to_driver=verbose,
                logging_level=level,
                _node_ip_address="127.0.0.1",
            )
        except Exception as error:  # Ray raises no narrower one for a node that does not come up in time
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise UllmeError(
                f"a local Ray did not start ({reason}); this machine may be short of memory or time: run again, or name a"
                " cluster in cluster.address"
            ) from error
    _hear_interrupts()
    try:
        _check_pools_fit(pools(job, stages), address or "the local Ray", job.cluster.workers if address else ())
        yield
    finally:
        ray.shutdown()


def _join(address: str, level: int, verbose: bool) -> None:
    import ray

    try:
        _knock(address)
        ray.init(address=address, log_to_driver=verbose, logging_level=level)
    except (OSError, RuntimeError, ValueError) as error:  # ConnectionError and TimeoutError are OSErrors
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UllmeError(
            f"no Ray cluster answers at cluster.address = {address} ({reason}); start it, correct the address,"
            " or remove it (and RAY_ADDRESS) to run locally"
        ) from error


def _knock(address: str) -> None:
    """Opens the port of a host:port or ray://host:port address, for Ray itself tries a dead one for minutes."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()


def _check_pools_fit(wanted: Sequence[Pool], where: str, groups: Sequence[WorkerGroupSpec]) -> None:
    """On nodes that are there, or that an autoscaler may start: those of the job's own groups of workers."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(group.max > group.min for group in groups):
        nodes = [{"CPU": group.cpus, "GPU": group.gpus} for group in groups for _ in range(group.max)]
    for pool in wanted:
        for name, each in (("CPU", pool.cpus), ("GPU", pool.gpus)):
            slots = sum(int(node.get(name, 0) / each) for node in nodes) if each else pool.min
            if slots < pool.min:
                total = sum(node.get(name, 0) for node in nodes)
                field = {"train": "workers.num_workers", "serve": "replicas.min"}.get(pool.stage, "actors.min")
                raise UllmeError(
                    f"{pool.stage}.{field} = {pool.min} processes of {each:g} {name} each do not fit into {where},"
                    f" which has {total:g} {name} on {len(nodes)} nodes; lower the number, or add nodes"
                )
