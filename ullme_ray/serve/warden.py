"""Ends a server whose driver is gone. Ray Serve belongs to the cluster, so it outlives a driver that is killed; ours must not.

The driver holds a named actor that Ray ends with it, however it dies; a detached actor looks for it and shuts Serve down when
it is gone. Costs two idle processes while a driver serves. A RayService has no driver, and no warden.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import ray
from ray import serve

NAMESPACE = "ullme_ray"
_OWNER = "server_owner"
_WARDEN = "server_warden"
_LOOK_EVERY_S = 1.0
_GONE_AFTER = 2  # looks in a row that do not find the owner
_CLEAR_S = 60.0
_CONTROLLER = "SERVE_CONTROLLER_ACTOR"  # goes first: it would start the others again


class _Owner:
    """Alive as long as its driver."""

    def ping(self) -> bool:
        return True


class _Warden:
    def watch(self) -> None:
        """Ends this process once the owner is gone and Serve is shut down."""
        missing = 0
        while missing < _GONE_AFTER:
            with contextlib.suppress(RuntimeError, ray.exceptions.RayError):  # Ray's head may be away for a while
                missing = 0 if _find(_OWNER) is not None else missing + 1
            time.sleep(_LOOK_EVERY_S)
        serve.shutdown()
        end_by_force()
        ray.actor.exit_actor()  # a detached actor would keep its name, and the next server could not have one


class Guard:
    """While it is held the server lives on."""

    def __init__(self) -> None:
        self._owner = _start(_Owner, name=_OWNER)
        ray.get(self._owner.ping.remote())  # before the warden looks for it
        self._warden = _start(_Warden, name=_WARDEN, lifetime="detached")
        self._watch = self._warden.watch.remote()

    def release(self) -> None:
        """The warden first, so that it does not take an ordinary end for a death."""
        for actor in (self._warden, self._owner):
            with contextlib.suppress(Exception):
                ray.kill(actor)


def end_by_force() -> None:
    """Ends what is left of Serve after a stop: a process that still has requests waits for them, as long as they may take."""
    for actor in sorted(ray.util.list_named_actors(all_namespaces=True), key=lambda actor: actor["name"] != _CONTROLLER):
        if actor["namespace"] == "serve" and (found := _find(actor["name"], "serve")) is not None:
            with contextlib.suppress(Exception):
                ray.kill(found)


def clear_leftover() -> bool:
    """Waits until the server of a driver that died is gone; False where a living driver, or somebody else, runs Serve."""
    deadline = time.monotonic() + _CLEAR_S
    while time.monotonic() < deadline:
        if _find(_CONTROLLER, "serve") is None:
            if _find(_OWNER) is None:
                _end_warden()
            return True
        if _find(_OWNER) is not None or _find(_WARDEN) is None:
            return False
        time.sleep(_LOOK_EVERY_S / 2)
    return False


def _start(kind: type, **options: str) -> Any:
    """Under a name that the actor of a server just stopped may hold for a moment yet."""
    deadline = time.monotonic() + _CLEAR_S
    while True:
        try:
            return ray.remote(kind).options(namespace=NAMESPACE, num_cpus=0, **options).remote()
        except ValueError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_LOOK_EVERY_S / 10)


def _end_warden() -> None:
    if (warden := _find(_WARDEN)) is not None:
        with contextlib.suppress(Exception):
            ray.kill(warden)


def _find(name: str, namespace: str = NAMESPACE) -> Any | None:
    try:
        return ray.get_actor(name, namespace=namespace)
    except ValueError:
        return None
