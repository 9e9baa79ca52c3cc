"""YAML text -> plain dicts and lists, remembering the line of every path.

Reads YAML 1.2 parser events, never objects: no tag can construct anything, no alias can blow up the tree, and each
problem is known with the line on which it stands.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
)
from ruamel.yaml.nodes import ScalarNode

from ullme_ray.errors import JobFileError, Problem

MAX_JOB_FILE_BYTES = 1 << 18
MAX_DEPTH = 16
KeyPath = tuple[str | int, ...]  # keys and list positions from the file's root

_ABSENT = object()  # a node that must not enter the tree; its problem is already noted
_SECRET_WORDS = ("key", "token", "secret", "password")


def dotted(path: KeyPath) -> str:
    """`("train", "data", 0, "path")` -> `train.data.0.path`."""
    return ".".join(str(step) for step in path)


def may_hold_secret(path: KeyPath) -> bool:
    """Whether a value at `path` could be a secret written out, so that no message may show it."""
    return any(word in str(step).lower() for step in path for word in _SECRET_WORDS)


def parse_scalar(text: str) -> Any:
    """One plain scalar as YAML 1.2 reads it (2e-4 is a float, yes is text)."""
    return _Scalars().plain(text)


class YamlTree:
    """One job file as read: its `tree`, the `lines` of its paths, and the `problems` met on the way."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.tree: dict[str, Any] = {}
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[Problem] = []
        self._scalars = _Scalars()

    def read(self, raw: bytes) -> None:
        """Fills the tree.

        Raises:
            JobFileError: when the text cannot be read at all, so that there is nothing more to check.
        """
        if len(raw) > MAX_JOB_FILE_BYTES:
            self._give_up(f"is {len(raw)} bytes; a job file holds at most {MAX_JOB_FILE_BYTES}")
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            self._give_up(f"is not UTF-8 text (byte {error.start}); save the file as UTF-8", line)
        try:
            self._read_document(YAML(typ="safe", pure=True).parse(text))
        except MarkedYAMLError as error:
            mark: Any = error.problem_mark or error.context_mark
            reason = f"{error.problem or error.context}"
            if "'\\t'" in reason:
                reason = "a tab is used for indentation; use spaces"
            self._give_up(f"is not valid YAML: {reason}", mark.line + 1 if mark else None)
        except YAMLError as error:
            position = getattr(error, "position", None)
            first_line = str(error).splitlines()[0]
            self._give_up(
                f"is not valid YAML: {first_line}", text.count("\n", 0, position) + 1 if isinstance(position, int) else None
            )

    def _give_up(self, message: str, line: int | None = None) -> NoReturn:
        raise JobFileError(self.source, [*self.problems, Problem("", message, line)])

    def _read_document(self, events: Iterator[Event]) -> None:
        sections = "must be a mapping of sections, such as `name: ...` and `model: ...`"
        root: Any = _ABSENT
        for event in events:
            if isinstance(event, DocumentStartEvent):
                if root is not _ABSENT:
                    self._give_up("holds a second YAML document; keep one job per file", _line(event))
                first = next(events)
                if not isinstance(first, MappingStartEvent):
                    self._give_up(sections, _line(first))
                self.lines[()] = _line(first)
                root = self._build(first, events, ())
        if root is _ABSENT:
            self._give_up(f"is empty; it {sections}", 1)
        self.tree = root

    def _build(self, event: Event, events: Iterator[Event], path: KeyPath) -> Any:
        if len(path) > MAX_DEPTH:
            self._give_up(f"is nested more than {MAX_DEPTH} levels deep", _line(event))
        self.lines.setdefault(path, _line(event))
        if isinstance(event, AliasEvent):
            self._problem(path, event, f"is the YAML alias *{event.anchor}, which job files do not allow; write the value out")
            return _ABSENT
        if isinstance(event, ScalarEvent):
            return self._scalar(event, path)
        is_mapping = isinstance(event, MappingStartEvent)
        value: Any = self._mapping(events, path) if is_mapping else self._sequence(events, path)
        tag = getattr(event, "tag", None)
        if tag is not None and str(tag) not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            self._problem(path, event, f"has the YAML tag {tag}, which job files do not allow; write a plain value")
            return _ABSENT
        return value

    def _mapping(self, events: Iterator[Event], path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        seen: dict[str, int] = {}
        for event in events:
            if isinstance(event, MappingEndEvent):
                break
            if not isinstance(event, ScalarEvent):
                self._problem(path, event, "has a key that is not plain text")
                if not isinstance(event, AliasEvent):
                    self._build(event, events, (*path, "?"))
                self._build(next(events), events, (*path, "?"))
                continue
            key = str(event.value)
            below = (*path, key)
            if key in seen:
                self._problem(below, event, f"is given twice (first on line {seen[key]}); keep one")
                self._build(next(events), events, below)
                continue
            seen[key] = self.lines[below] = _line(event)
            value = self._build(next(events), events, below)
            if value is not _ABSENT:
                result[key] = value
        return result

    def _sequence(self, events: Iterator[Event], path: KeyPath) -> list[Any]:
        items: list[Any] = []
        for event in events:
            if isinstance(event, SequenceEndEvent):
                break
            value = self._build(event, events, (*path, len(items)))
            items.append(None if value is _ABSENT else value)
        return items

    def _scalar(self, event: ScalarEvent, path: KeyPath) -> Any:
        if event.value == "" and event.style is None and event.tag is None:
            self._problem(path, event, "is empty; give it a value or remove it (null says: none on purpose)")
            return _ABSENT
        try:
            return self._scalars.of(event)
        except _UnknownTagError:
            self._problem(path, event, f"has the YAML tag {event.tag}, which job files do not allow; write a plain value")
        except (YAMLError, ValueError, OverflowError):
            shown = "" if may_hold_secret(path) else f"= {_short(event.value)} "
            self._problem(path, event, f"{shown}is not readable as {str(event.tag or 'a number').rsplit(':', 1)[-1]}")
        return _ABSENT

    def _problem(self, path: KeyPath, event: Event, message: str) -> None:
        # An empty value has no place of its own: the parser is already on the next line, the key is not.
        line = self.lines[path] if isinstance(event, ScalarEvent) and event.value == "" else _line(event)
        self.problems.append(Problem(dotted(path), message, line))


class _UnknownTagError(Exception):
    pass


class _Scalars:
    """Scalars of the YAML 1.2 core schema: text, int, float, bool, null. Anything else stays text or is refused."""

    def __init__(self) -> None:
        self._yaml = YAML(typ="safe", pure=True)

    def of(self, event: ScalarEvent) -> Any:
        if event.tag is None:
            return self._construct(event.value, event.implicit)
        kind = str(event.tag).removeprefix("tag:yaml.org,2002:")
        if kind not in ("str", "int", "float", "bool", "null"):
            raise _UnknownTagError
        return self._node(str(event.tag), event.value)

    def plain(self, text: str) -> Any:
        return self._construct(text, (True, False))

    def _construct(self, text: str, implicit: Any) -> Any:
        tag = str(self._yaml.resolver.resolve(ScalarNode, text, implicit))
        # Dates, `=` and `<<` have tags of their own in ruamel; in a job file they are text.
        is_core = tag.rsplit(":", 1)[-1] in ("int", "float", "bool", "null")
        return self._node(tag, text) if is_core else text

    def _node(self, tag: str, text: str) -> Any:
        return self._yaml.constructor.construct_object(ScalarNode(tag, text, None, None))


def _line(event: Event) -> int:
    return int(event.start_mark.line) + 1


def _short(value: str) -> str:
    return value if len(value) <= 60 else value[:57] + "..."
