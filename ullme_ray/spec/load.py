"""Job file -> JobSpec. All problems of a file are found and reported together, each with its line and a way out."""

from __future__ import annotations

import difflib
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ullme_ray.errors import JobFileError, Problem
from ullme_ray.spec.checks import cross_field_problems
from ullme_ray.spec.job import JobSpec

MAX_JOB_FILE_BYTES = 1 << 20
Path_ = tuple[str | int, ...]  # keys and list positions from the file's root


def load_job(path: str | Path, overrides: typing.Sequence[str] = ()) -> JobSpec:
    """Reads, overrides and validates a job file.

    Args:
        path: a local YAML file of at most 1 MiB.
        overrides: `section.key=value` strings; the value is read as YAML.

    Raises:
        JobFileError: with every problem found in the file and the overrides.
    """
    source = str(path)
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise JobFileError(source, [Problem("", f"cannot be read ({reason}); `ullme-ray init` writes a starter file")]) from None
    return parse_job(raw, source=source, overrides=overrides)


def parse_job(raw: bytes, *, source: str = "job", overrides: typing.Sequence[str] = ()) -> JobSpec:
    """As `load_job`, from bytes."""
    if len(raw) > MAX_JOB_FILE_BYTES:
        raise JobFileError(source, [Problem("", f"is {len(raw)} bytes; a job file holds at most {MAX_JOB_FILE_BYTES}")])
    document = _Document(source)
    tree = document.read(raw)
    for override in overrides:
        document.apply_override(tree, override)
    spec = document.validate(tree)
    if document.problems or spec is None:
        raise JobFileError(source, document.problems)
    return spec


class _Document:
    """One job file being read: the line of every path, and the problems met so far."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines: dict[Path_, int | None] = {}
        self.problems: list[Problem] = []

    def read(self, raw: bytes) -> dict[str, Any]:
        try:
            node = YAML(typ="safe", pure=True).compose(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise JobFileError(self.source, [Problem("", f"is not UTF-8 text (byte {error.start})")]) from None
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else None
            raise JobFileError(self.source, [Problem("", f"is not valid YAML: {error.problem or error.context}", line)]) from None
        except (YAMLError, ValueError) as error:
            first_line = str(error).splitlines()[0]
            raise JobFileError(self.source, [Problem("", f"is not valid YAML: {first_line}")]) from None
        except RecursionError:
            raise JobFileError(self.source, [Problem("", "is nested too deeply")]) from None
        if not isinstance(node, MappingNode):
            raise JobFileError(self.source, [Problem("", "must be a mapping of sections, such as `name: ...` and `model: ...`", 1)])
        try:
            return self._build(node, (), set())
        except RecursionError:
            raise JobFileError(self.source, [Problem("", "is nested too deeply")]) from None

    def _build(self, node: Node, path: Path_, seen: set[int]) -> Any:
        line = node.start_mark.line + 1
        self.lines.setdefault(path, line)
        if id(node) in seen:  # an alias shares its anchor's node
            self._problem(path, "is a YAML alias, which job files do not allow; write the value out")
            return None
        seen.add(id(node))
        if isinstance(node, MappingNode):
            result: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key_line = key_node.start_mark.line + 1
                if not isinstance(key_node, ScalarNode):
                    self.problems.append(Problem(dotted(path), "has a key that is not plain text", key_line))
                    continue
                key = key_node.value
                if key in result:
                    first = self.lines[(*path, key)]
                    self.problems.append(
                        Problem(dotted((*path, key)), f"is given twice (first on line {first}); keep one", key_line)
                    )
                    continue
                self.lines[(*path, key)] = key_line
                result[key] = self._build(value_node, (*path, key), seen)
            return result
        if isinstance(node, SequenceNode):
            return [self._build(item, (*path, position), seen) for position, item in enumerate(node.value)]
        return self._scalar(node, path)

    def _scalar(self, node: ScalarNode, path: Path_) -> Any:
        kind = str(node.tag).rsplit(":", 1)[-1]
        if kind not in ("str", "int", "float", "bool", "null"):
            if kind == "timestamp":
                return node.value
            self._problem(path, f"has the YAML tag {node.tag}, which job files do not allow; write a plain value")
            return None
        try:
            return YAML(typ="safe", pure=True).constructor.construct_object(node)
        except (YAMLError, ValueError, OverflowError):
            self._problem(path, f"= {node.value[:60]} is not a readable {kind}")
            return None

    def apply_override(self, tree: dict[str, Any], override: str) -> None:
        name, separator, text = override.partition("=")
        keys = name.split(".")
        if not separator or not all(keys):
            self.problems.append(Problem("", f"{override!r} is not an override; write section.key=value"))
            return
        try:
            value = YAML(typ="safe", pure=True).load(text) if text else ""
        except YAMLError:
            self.problems.append(Problem(name, f"= {text!r} (command line) is not valid YAML; quote it"))
            return
        here: Any = tree
        path: Path_ = ()
        for position, key in enumerate(keys):
            step: str | int = int(key) if isinstance(here, list) and key.isdigit() else key
            path = (*path, step)
            if isinstance(here, list) and not (isinstance(step, int) and step < len(here)):
                self.problems.append(Problem(name, f"(command line) names no item of a list of {len(here)}"))
                return
            if position == len(keys) - 1:
                here[step] = value
                self._forget_lines(path)
                return
            below = here[step] if isinstance(here, list) else here.get(step)
            if keys[: position + 1] == ["train", "objective"] and isinstance(below, str):
                below = {"preset": below}  # `objective: grl` is short for {preset: grl}
            if not isinstance(below, (dict, list)):
                below = {}
                self.lines.setdefault(path, None)
            here[step] = below
            here = below

    def _forget_lines(self, path: Path_) -> None:
        for known in [p for p in self.lines if p[: len(path)] == path]:
            del self.lines[known]
        self.lines[path] = None

    def validate(self, tree: dict[str, Any]) -> JobSpec | None:
        spec, bad = self._try_validate(tree, report=True)
        if spec is None:
            # Put the bad fields back to their defaults, so that checks between the good ones are reported in the same go.
            for path in bad:
                _drop(tree, path)
            spec, _ = self._try_validate(tree, report=False)
        if spec is not None:
            self.problems += [
                Problem(p.where, p.message, self._line(tuple(p.where.split("."))))
                for p in cross_field_problems(spec)
                if not any(p.where == dotted(path) or p.where.startswith(dotted(path) + ".") for path in bad)
            ]
        return spec

    def _try_validate(self, tree: dict[str, Any], *, report: bool) -> tuple[JobSpec | None, list[Path_]]:
        try:
            return JobSpec.model_validate(tree), []
        except ValidationError as error:
            details = error.errors(include_url=False)
        if report:
            for detail in details:
                self._problem(detail["loc"], _explain(detail))
        return None, [detail["loc"] for detail in details if detail["type"] != "missing"]

    def _problem(self, path: Path_, message: str) -> None:
        self.problems.append(Problem(dotted(path), message, self._line(path)))

    def _line(self, path: Path_) -> int | None:
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return self.lines[path[:length]]
        return None


def dotted(path: Path_) -> str:
    """`("train", "data", 0, "path")` -> `train.data.0.path`."""
    return ".".join(str(step) for step in path)


def _drop(tree: Any, path: Path_) -> None:
    for step in path[:-1]:
        try:
            tree = tree[step]
        except (KeyError, IndexError, TypeError):
            return
    if isinstance(tree, dict):
        tree.pop(path[-1], None)


def _explain(detail: Any) -> str:
    """A pydantic error as: what is wrong, the value, what to do."""
    kind, path, context = detail["type"], detail["loc"], detail.get("ctx", {})
    if kind == "missing":
        return "is missing; " + _description(path)
    if kind == "extra_forbidden":
        known = _known_keys(path[:-1])
        near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        return f"is not a known key; did you mean {near[0]}?" if near else f"is not a known key; known here: {', '.join(known)}"
    if kind == "secret_reference":
        return detail["msg"]  # never with the value: it may be the secret itself
    shown = repr(detail["input"])
    value = shown if len(shown) <= 60 else shown[:57] + "..."
    if kind == "string_pattern_mismatch":
        return f"= {value} is not allowed; {_description(path)}"
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return f"= {value} must be a mapping with keys {', '.join(_known_keys(path))}"
    if kind == "literal_error":
        return f"= {value} must be one of {context['expected']}"
    message = detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"= {value} should be {message}; {_description(path)}"


def _model_at(path: Path_) -> type[BaseModel] | None:
    """The section that the file has at `path`, found by following field annotations."""
    model: type[BaseModel] | None = JobSpec
    for step in path:
        if model is None:
            return None
        if isinstance(step, int):
            continue  # list items: the annotation below the list was already unwrapped
        field = model.model_fields.get(step)
        model = _section_in(field.annotation) if field else None
    return model


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple, typing.Annotated):
        for argument in typing.get_args(annotation):
            if (found := _section_in(argument)) is not None:
                return found
    return None


def _known_keys(path: Path_) -> list[str]:
    model = _model_at(path)
    return list(model.model_fields) if model else []


def _description(path: Path_) -> str:
    parent = _model_at(path[:-1])
    field = parent.model_fields.get(str(path[-1])) if parent and path else None
    return (field.description or "") if field else "see `ullme-ray check --schema`"


