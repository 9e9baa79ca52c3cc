"""Job file -> JobSpec. All problems of a file are found and reported together, each with its line and a way out."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ullme_ray.errors import JobFileError, Problem
from ullme_ray.spec.checks import contradictions
from ullme_ray.spec.explain import explain, field_at, section_in
from ullme_ray.spec.job import JobSpec
from ullme_ray.spec.yaml_tree import MAX_JOB_FILE_BYTES, KeyPath, YamlTree, dotted, may_hold_secret

_SHORT_FOR: dict[KeyPath, str] = {("train", "objective"): "preset", ("mine", "encoder"): "base"}  # a name alone means this key
_REPAIRS = 8  # rounds: a placeholder section may need placeholders inside, as deep as the spec goes


def load_job(path: str | Path, overrides: typing.Sequence[str] = ()) -> JobSpec:
    """Reads, overrides and validates a job file.

    Args:
        path: a local YAML file of at most 256 KiB.
        overrides: `section.key=value` strings; the value is read as YAML.

    Raises:
        JobFileError: with every problem found in the file and the overrides.
    """
    source = str(path)
    try:
        with open(path, "rb") as stream:
            raw = stream.read(MAX_JOB_FILE_BYTES + 1)
    except OSError as error:
        problem = Problem("", f"cannot be read ({error.strerror or error}); `ullme-ray init` writes a starter file")
        raise JobFileError(source, [problem]) from None
    return parse_job(raw, source=source, overrides=overrides)


def parse_job(raw: bytes, *, source: str = "job", overrides: typing.Sequence[str] = ()) -> JobSpec:
    """As `load_job`, from bytes."""
    document = _Document(source)
    document.read(raw)
    for override in overrides:
        document.apply_override(override)
    spec = document.validate()
    if document.problems or spec is None:
        raise JobFileError(source, document.problems)
    return spec


class _Document:
    """One job file on its way to a spec: the tree, the line of every path, and the problems met so far."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.tree: dict[str, Any] = {}
        self.lines: dict[KeyPath, int | None] = {}  # None: set on the command line
        self.problems: list[Problem] = []

    def read(self, raw: bytes) -> None:
        yaml = YamlTree(self.source)
        yaml.read(raw)
        self.tree, self.problems = yaml.tree, yaml.problems
        self.lines = dict(yaml.lines)

    def apply_override(self, override: str) -> None:
        name, separator, text = override.partition("=")
        keys = name.split(".")
        if not separator or not all(keys):
            self._refuse_override("", f"{override!r} is not an override; write section.key=value")
            return
        value = self._override_value(name, text)
        if value is None:
            return
        here: Any = self.tree
        path: KeyPath = ()
        for position, key in enumerate(keys):
            if isinstance(here, list) and not (key.isdigit() and int(key) < len(here)):
                self._refuse_override(name, f"names no item of a list of {len(here)}; items count from 0")
                return
            step: Any = int(key) if isinstance(here, list) else key
            path = (*path, step)
            if position == len(keys) - 1:
                here[step] = value[0]
                self._set_on_command_line(path)
                return
            here = self._go_down(here, step, path)

    def _override_value(self, name: str, text: str) -> tuple[Any] | None:
        """The value in a tuple (it may be null), or None after noting why there is none."""
        if not text:
            return ("",)
        value = YamlTree(self.source)
        try:
            value.read(f"value: {text}".encode(errors="surrogatepass"))
        except JobFileError:
            value.problems.append(Problem("", "unreadable"))
        if value.problems or list(value.tree) != ["value"]:
            shown = "" if may_hold_secret(tuple(name.split("."))) else f"= {text!r} "
            self._refuse_override(name, f"{shown}is not a plain YAML value; quote it: '{name}=\"...\"'")
            return None
        return (value.tree["value"],)

    def _go_down(self, here: Any, step: Any, path: KeyPath) -> Any:
        below = here[step] if isinstance(here, list) else here.get(step)
        if path in _SHORT_FOR and isinstance(below, str):
            below = {_SHORT_FOR[path]: below}
        if not isinstance(below, (dict, list)):
            below = {}
            self._set_on_command_line(path)
        here[step] = below
        return below

    def _set_on_command_line(self, path: KeyPath) -> None:
        for known in [known for known in self.lines if known[: len(path)] == path]:
            del self.lines[known]
        self.lines[path] = None

    def _refuse_override(self, where: str, message: str) -> None:
        self.problems.append(Problem(where, f"{message} (command line)"))

    def validate(self) -> JobSpec | None:
        """The spec, or the nearest valid one, so that contradictions between the good fields are reported in the same go."""
        overridden = {dotted(path) for path, line in self.lines.items() if line is None}
        reported = {problem.where for problem in self.problems if problem.where} - overridden
        spec: JobSpec | None = None
        repaired: set[str] = set(reported)
        for attempt in range(_REPAIRS):
            try:
                spec = JobSpec.model_validate(self.tree)
                break
            except ValidationError as error:
                details = error.errors(include_url=False)
            for detail in details:
                path: KeyPath = detail["loc"]
                if attempt == 0 and not any(_is_within(dotted(path), known) for known in reported):
                    self._problem(path, explain(detail))
                repaired.add(dotted(_repair(self.tree, path)))
        if spec is not None:
            for found in contradictions(spec):
                if not any(_is_within(field, bad) for field in found.fields for bad in repaired):
                    self._problem(_key_path(found.fields[0]), found.message)
        return spec

    def _problem(self, path: KeyPath, message: str) -> None:
        line = next((self.lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.lines), None)
        place = " (command line)" if line is None and self.lines else ""
        self.problems.append(Problem(dotted(path), message + place, line))


def _is_within(name: str, other: str) -> bool:
    return name == other or name.startswith(other + ".")


def _key_path(name: str) -> KeyPath:
    return tuple(int(step) if step.isdigit() else step for step in name.split("."))


def _repair(tree: Any, path: KeyPath) -> KeyPath:
    """Makes the bad value at `path` harmless: left out where the spec has a default, a placeholder where it needs a value.

    Returns:
        The path that was changed, which is above `path` where the tree ends earlier.
    """
    for position, step in enumerate(path):
        at = path[: position + 1]
        is_last = position == len(path) - 1
        if isinstance(tree, list) and isinstance(step, int) and step < len(tree):
            below = tree[step]
            if is_last or not isinstance(below, (dict, list)):
                tree[step] = _placeholder(at)
                return at
        elif isinstance(tree, dict):
            below = tree.get(str(step))
            if is_last or not isinstance(below, (dict, list)):
                field = field_at(at)
                if field is not None and field.is_required():
                    tree[str(step)] = _placeholder(at)
                else:
                    tree.pop(str(step), None)
                return at
        else:
            return at
        tree = below
    return path


def _placeholder(path: KeyPath) -> Any:
    """A value of the right kind; sections start empty and are filled by the next round of repairs."""
    is_item = isinstance(path[-1], int)
    field = field_at(path[:-1] if is_item else path)
    annotation = field.annotation if field else None
    inner: Any = {} if section_in(annotation) else "placeholder"
    if typing.get_origin(annotation) is tuple and not is_item:
        return [inner]
    if typing.get_origin(annotation) is typing.Literal:
        return typing.get_args(annotation)[0]
    return inner
