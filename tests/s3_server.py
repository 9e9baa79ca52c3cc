"""A real S3 server (SeaweedFS) on loopback for tests; starts in 3 to 5 s, and in 15 to 17 s again after a kill."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

START_TIMEOUT_S = 60.0
_KEY, _SECRET = "test-access-key", "test-secret-key"


class S3Server:
    """A store whose data lie in `folder`, so that they survive `kill` and the next `start`.

    Args:
        address: where it listens.
        prefix: before its command, such as one that enters a network namespace; `kill` ends this alone.
    """

    def __init__(self, folder: Path, *, address: str = "127.0.0.1", prefix: Sequence[str] = ()) -> None:
        self.address = address
        self.log = folder / "weed.log"
        identity = {
            "name": "rw",
            "credentials": [{"accessKey": _KEY, "secretKey": _SECRET}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        }
        (folder / "identities.json").write_text(json.dumps({"identities": [identity]}))
        (folder / "data").mkdir()
        master, volume, filer, self.port = _free_ports(4)
        weed = Path(sys.executable).with_name("weed")  # of this environment, which need not be on PATH
        command = (
            f"{weed} -logtostderr=true server -dir={folder}/data -ip={address} -ip.bind={address} -master.port={master} "
            f"-volume.port={volume} -filer.port={filer} -master.telemetry=false -master.volumeSizeLimitMB=64 -volume.max=1000 "
            f"-filer -s3 -s3.port={self.port} -s3.config={folder}/identities.json -s3.port.iceberg=0 -s3.port.lance=0"
        )
        self._command = [*prefix, *command.split()]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://{self.address}:{self.port}"

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """The AWS_* variables of a client of this store, or of a proxy before it."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": _KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }

    def start(self) -> None:
        with self.log.open("ab") as stream:
            self._process = subprocess.Popen(self._command, stdout=stream, stderr=stream, start_new_session=True)

    def kill(self) -> None:
        """SIGKILL to the server and all it started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def wait_until_ready(self) -> None:
        """An unsigned GET / is answered with 403 once the store can tell identities apart."""
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self._process.poll() is None, f"SeaweedFS ended at once: {self._end_of_log()}"
            try:
                urllib.request.urlopen(self.endpoint, timeout=2).close()
            except urllib.error.HTTPError as answer:
                if answer.code == 403:
                    return
            except OSError:
                pass
            time.sleep(0.2)
        raise AssertionError(f"SeaweedFS did not answer within {START_TIMEOUT_S} s: {self._end_of_log()}")

    def bucket(self, name: str) -> str:
        """Makes a bucket, unless it is there, and gives its address. Goes by this process's AWS_* variables."""
        from ullme_ray import storage

        store = storage.filesystem("s3://")
        if not store.exists(name):
            store.mkdir(name)
        return f"s3://{name}"

    def _end_of_log(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]


def _free_ports(count: int) -> list[int]:
    """Ports that are free together with port + 10000, where SeaweedFS puts gRPC; below the range the system hands out."""
    found: list[int] = []
    candidate = 12000 + os.getpid() % 4000
    while len(found) < count:
        candidate += 7
        with contextlib.suppress(OSError), socket.socket() as plain, socket.socket() as grpc:
            plain.bind(("127.0.0.1", candidate))
            grpc.bind(("127.0.0.1", candidate + 10000))
            found.append(candidate)
    return found
