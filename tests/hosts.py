"""Several hosts on one machine, each with its own network, processes, name, /tmp/ray and /dev/shm, joined by a switch.

A host is a network, mount, process and name namespace, tied by a cable (veth) to a bridge in a namespace of its own; addresses
are 10.77.0.1, 10.77.0.2, ... and nothing leads from there to the machine's network. A cut cable is silent, as a real one: no
packet comes back, not even a refusal. Needs Linux and the rights of root; `reason_to_skip` says what is missing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

_TOOLS = ("ip", "setpriv", "unshare", "nsenter", "mount", "bash")
_START_TIMEOUT_S = 60.0
RAY_PORT = 6379
# What makes Ray notice a silent host in seconds: without the first two its calls to a dead host hang for minutes.
RAY_ENVIRONMENT = {
    "RAY_grpc_client_keepalive_time_ms": "5000",
    "RAY_grpc_client_keepalive_timeout_ms": "10000",
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "10000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_worker_niceness": "0",  # else Ray's workers give way to everything else on this machine
}


def reason_to_skip() -> str | None:
    """Why hosts cannot be made here; None where they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts in network namespaces need Linux and root"
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"hosts in network namespaces need {', '.join(missing)}"
    name = f"ullme-{uuid.uuid4().hex[:6]}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return f"network namespaces cannot be made here: {tried.stderr.strip()}"
    try:
        inside = ["ip", "netns", "exec", name, "unshare", "--mount", "--pid", "--uts", "--fork", "--mount-proc", "true"]
        tried = subprocess.run(inside, capture_output=True, text=True)
        cable = ["ip", "-n", name, "link", "add", "name", "a", "type", "veth", "peer", "name", "b"]
        tried = tried if tried.returncode else subprocess.run(cable, capture_output=True, text=True)
        return f"hosts cannot be made here: {tried.stderr.strip()}" if tried.returncode else None
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)


class Host:
    """One machine of the network, by its number from 1."""

    def __init__(
        self, number: int, netns: str, init: subprocess.Popen[bytes], private: Path, environment: dict[str, str]
    ) -> None:
        self.address = f"10.77.0.{number}"
        self.netns = netns
        self._init = init
        self._shared, self._own = environment, {"HOME": str(private), "TMPDIR": str(private)}
        self._enter = ["nsenter", "--target", str(_child_of(init)), "--mount", "--pid", "--uts", "--net", "--"]

    def start(self, command: list[str], *, told: Path, environment: Mapping[str, str] = {}) -> subprocess.Popen[bytes]:
        """A process on this host; what it says goes to the file `told`."""
        with told.open("wb") as stream:
            return subprocess.Popen(
                [*self._enter, *command],
                stdout=stream,
                stderr=stream,
                env=self._with(environment),
                cwd="/",
                preexec_fn=_hear_interrupts,
            )

    def run(self, command: list[str], *, timeout_s: float = 120.0, environment: Mapping[str, str] = {}) -> str:
        """What a command on this host printed.

        Raises:
            AssertionError: it failed; with the end of what it said.
        """
        done = subprocess.run(
            [*self._enter, *command],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=self._with(environment),
            cwd="/",
        )
        assert done.returncode == 0, f"{' '.join(command)[:200]}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def _with(self, environment: Mapping[str, str]) -> dict[str, str]:
        return self._shared | self._own | dict(environment)

    @property
    def prefix(self) -> list[str]:
        """Before a command, makes it run on this host."""
        return list(self._enter)

    def power_off(self) -> None:
        """Ends the host and all its processes at once."""
        if self._init.poll() is None:
            with contextlib.suppress(ProcessLookupError, FileNotFoundError, IndexError):
                os.kill(_child_of(self._init), signal.SIGKILL)  # the first process of its namespace: the kernel ends the others
            with contextlib.suppress(ProcessLookupError):
                self._init.kill()
            self._init.wait()


class Hosts:
    """A context manager around `count` hosts that leaves no process, mount or namespace behind."""

    def __init__(self, folder: Path, count: int = 3) -> None:
        self._folder = folder
        self._count = count
        self._name = f"ullme-{os.getpid()}-{uuid.uuid4().hex[:4]}"
        token = folder / "auth_token"
        token.write_text(uuid.uuid4().hex * 2)
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG", "OMP_NUM_THREADS") if name in os.environ}
        path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
        self.environment = kept | RAY_ENVIRONMENT | {"PATH": path, "RAY_AUTH_TOKEN_PATH": str(token)}  # of all hosts
        self._stack = contextlib.ExitStack()
        self._with_ray: set[int] = set()
        self.all: list[Host] = []

    def __enter__(self) -> Hosts:
        _remove_names_of_the_dead()
        with contextlib.ExitStack() as stack:
            switch = f"{self._name}-sw"
            self._add_netns(switch, stack)
            _ip("-n", switch, "link", "add", "sw", "type", "bridge")
            _ip("-n", switch, "link", "set", "sw", "up")
            for number in range(1, self._count + 1):
                self.all.append(self._add_host(number, switch, stack))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __getitem__(self, number: int) -> Host:
        return self.all[number - 1]

    def cut(self, number: int) -> None:
        """Pulls the host's cable: what it sends and what is sent to it is lost without a word."""
        _ip("-n", f"{self._name}-sw", "link", "set", f"port{number}", "down")

    def heal(self, number: int) -> None:
        _ip("-n", f"{self._name}-sw", "link", "set", f"port{number}", "up")

    def start_ray(self, number: int, *, num_cpus: int) -> None:
        """Ray's processes on a host; host 1 is the head. On a host that had them, those that are left end first."""
        host = self[number]
        head = ["--head", f"--port={RAY_PORT}", "--include-dashboard=false", "--disable-usage-stats"]
        where = head if number == 1 else [f"--address={self[1].address}:{RAY_PORT}"]
        if number in self._with_ray:
            host.run([sys.executable, "-m", "ray.scripts.scripts", "stop", "--force"])  # sees this host's processes alone
        self._with_ray.add(number)
        host.run(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", *where),
                f"--node-ip-address={host.address}",
                f"--num-cpus={num_cpus}",
                f"--object-store-memory={128 * 2**20}",
            ]
        )

    def _add_netns(self, name: str, stack: contextlib.ExitStack) -> None:
        _ip("netns", "add", name)
        stack.callback(subprocess.run, ["ip", "netns", "delete", name], capture_output=True)
        _ip("-n", name, "link", "set", "lo", "up")

    def _add_host(self, number: int, switch: str, stack: contextlib.ExitStack) -> Host:
        netns, port = f"{self._name}-{number}", f"port{number}"
        self._add_netns(netns, stack)
        _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", netns)
        _ip("-n", switch, "link", "set", port, "master", "sw", "up")
        _ip("-n", netns, "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
        _ip("-n", netns, "link", "set", "eth0", "up")
        # The same path is another folder on each host, so that nothing can pass from one to another but over the network.
        own, private = self._folder / f"host{number}", self._folder / "private"
        for folder in (own, own / "ray", private):
            folder.mkdir(exist_ok=True)
        Path("/tmp/ray").mkdir(exist_ok=True)
        ready = own / "ready"
        setup = (
            f"set -e; hostname host{number}; mount --bind {own} {private}; mount --bind {own}/ray /tmp/ray; "
            f"mount -t tmpfs -o size=1g tmpfs /dev/shm; touch {ready}; while :; do sleep 1000 & wait $!; done"
        )
        # The host ends with this process, however that ends; names that a killed one left are removed by the next.
        tied = ["setpriv", "--pdeathsig", "KILL"]
        unshare = ["unshare", "--mount", "--pid", "--uts", "--fork", "--mount-proc", "--kill-child=KILL"]
        init = subprocess.Popen([*tied, "ip", "netns", "exec", netns, *unshare, "bash", "-c", setup])
        stack.callback(_end, init)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not ready.exists():
            assert init.poll() is None, f"host {number} did not start"
            assert time.monotonic() < deadline, f"host {number} did not start within {_START_TIMEOUT_S:g} s"
            time.sleep(0.02)
        host = Host(number, netns, init, private, self.environment)
        stack.callback(host.power_off)
        return host


def interrupt(process: subprocess.Popen[bytes], number: signal.Signals = signal.SIGINT) -> None:
    """Ctrl-C, or another signal, to a process that `Host.start` gave: not to nsenter, which stands before it."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError, IndexError):
        os.kill(_child_of(process), number)


def _hear_interrupts() -> None:
    """A shell's background job, and all that it starts, ignores Ctrl-C: a driver would then serve on for ever."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _remove_names_of_the_dead() -> None:
    for netns in Path("/run/netns").glob("ullme-*-*-*"):
        if not Path(f"/proc/{netns.name.split('-')[1]}").exists():
            subprocess.run(["ip", "netns", "delete", netns.name], capture_output=True)


def _child_of(process: subprocess.Popen[bytes]) -> int:
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
