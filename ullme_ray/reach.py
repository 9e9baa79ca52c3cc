"""What a job file may name and what it may not: no folder of the kernel or of Kubernetes' tokens, no link-local address.

A job file may come from somebody who may run jobs here, but not read everything that this machine can read. Where that
matters the operator sets ULLME_ROOTS, a colon-separated list of folders, on the machines of the cluster: local paths then
have to lie below one of them, links followed. Without it any folder that the process may read is fine, for on a laptop it
is the person's own.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from urllib.parse import urlsplit

ROOTS = "ULLME_ROOTS"
_NEVER = ("/proc", "/sys", "/dev", "/run/secrets", "/var/run/secrets")
_NAMES = ("metadata", "metadata.google.internal", "instance-data", "instance-data.ec2.internal")
# The metadata services that hand out a machine's credentials, beside all of 169.254.0.0/16 and fe80::/10.
_ADDRESSES = ("fd00:ec2::254", "100.100.100.200", "168.63.129.16")


def refused_path(path: str) -> str | None:
    """Why a local path must not be touched, or None. Globs are judged by the folder before their first wildcard."""
    plain = os.path.expanduser(path.removeprefix("file://"))
    magic = min((plain.index(character) for character in "*?[" if character in plain), default=len(plain))
    folder = plain if magic == len(plain) else os.path.dirname(plain[:magic])
    try:
        real = os.path.realpath(folder or ".")
    except ValueError:  # a character that no path can have; whoever opens it says so
        return None
    if any(_is_below(real, root) for root in _NEVER):
        return f"leads to {real}, which is no place for data; use a folder of files"
    roots = [os.path.realpath(root) for root in os.environ.get(ROOTS, "").split(":") if root]
    if roots and not any(_is_below(real, root) for root in roots):
        return f"leads to {real}, outside of {', '.join(roots)} ({ROOTS} on this machine); use a folder below one of them"
    return None


def refused_host(host: str, *, resolve: bool = False) -> str | None:
    """Why a host must not be contacted, or None.

    Args:
        resolve: also look its name up, since a name may stand for any address.
    """
    bare = host.strip("[]").partition("%")[0].rstrip(".").lower()
    if bare in _NAMES:
        return f"{host} is a cloud's metadata service, which hands out credentials"
    addresses = [bare]
    if resolve:
        with contextlib.suppress(OSError, UnicodeError):  # who connects will say so
            addresses += [str(found[4][0]) for found in socket.getaddrinfo(bare, None)]
    for address in addresses:
        if (kind := _link_local(address)) is not None:
            return f"{host} is {kind}"
    return None


def refused_url(url: str, *, resolve: bool = False) -> str | None:
    """As `refused_host`, of a URL or a host:port."""
    try:
        host = urlsplit(url if "://" in url else f"//{url}").hostname
    except ValueError:
        return "is no URL"
    return refused_host(host, resolve=resolve) if host else None


def _link_local(address: str) -> str | None:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        try:  # 0xA9FEA9FE, 2852039166 and 169.254.43518 are the same address to a resolver
            parsed = ipaddress.ip_address(socket.inet_aton(address))
        except (OSError, ValueError):
            return None
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    if parsed.is_link_local:
        return f"the link-local address {parsed}, where clouds hand out credentials"
    return f"the metadata address {parsed}" if str(parsed) in _ADDRESSES else None


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")
