"""Loaded by every Python process that has this folder on PYTHONPATH: writes down the units that are read, embedded, written.

The job under test is not changed for it: three of its functions are wrapped when their modules are imported. A line is one JSON
object in the file that FAULTS_TRACE names.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any


def _write(event: str, unit: str) -> None:
    line = json.dumps({"time": time.monotonic(), "pid": os.getpid(), "event": event, "unit": unit}) + "\n"
    handle = os.open(os.environ["FAULTS_TRACE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def _hook_reading(module: ModuleType) -> None:
    read_unit = module.read_unit

    def traced(unit: Any, *args: Any, **kwargs: Any) -> Any:
        _write("read", f"{unit.file.path} {unit.start}")
        return read_unit(unit, *args, **kwargs)

    module.read_unit = traced  # type: ignore[attr-defined]


def _hook_steps(module: ModuleType) -> None:
    embed, write = module.EmbedActor._embed, module._write

    def traced_embed(self: Any, unit: Any, texts: Any) -> Any:
        embedded = embed(self, unit, texts)
        if len(texts.ids):
            _write("embedded", f"{unit.file.path} {unit.start}")
        return embedded

    def traced_write(unit: Any, *args: Any) -> Any:
        _write("writing", f"{unit.file.path} {unit.start}")
        return write(unit, *args)

    module.EmbedActor._embed = traced_embed
    module._write = traced_write


_HOOKS: dict[str, Callable[[ModuleType], None]] = {
    "ullme_ray.embed.reading": _hook_reading,
    "ullme_ray.embed.steps": _hook_steps,
}


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        hook = _HOOKS.get(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path) if hook else None
        if hook is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            hook(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "FAULTS_TRACE" in os.environ:
    sys.meta_path.insert(0, _Finder())
