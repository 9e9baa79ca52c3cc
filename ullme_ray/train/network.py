"""How ranks of several hosts find each other.

gloo and NCCL guess the network interface by themselves: gloo by what the host's name resolves to, which may be loopback, NCCL
by the order of the interfaces. Here they take the one over which Ray itself reaches the host, unless GLOO_SOCKET_IFNAME or
NCCL_SOCKET_IFNAME says otherwise.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


@dataclass
class NetworkConfig(TorchConfig):
    """Ray Train's set-up of the process group, with the interface chosen before."""

    @property
    def backend_cls(self) -> Any:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)


def choose_interface() -> None:
    """Names the interface with this node's Ray address to gloo and NCCL, in a worker process before its process group is made.

    Where all ranks share one host whose Ray address is loopback, NCCL is left alone: it needs no interface there.
    """
    name = interface_of(ray.util.get_node_ip_address())
    if name is None:
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    if not name.startswith("lo"):
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # = takes the name whole, not as a prefix


def interface_of(address: str) -> str | None:
    """The network interface that has an IP address; None where none of this host has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family in (socket.AF_INET, socket.AF_INET6) and a.address.partition("%")[0] == address for a in addresses):
            return name
    return None
