"""Manifests as YAML text: keys in the order in which they are built, long texts as blocks, the same bytes for the same job."""

from __future__ import annotations

import io
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.representer import SafeRepresenter

Manifest = dict[str, Any]


class _Representer(SafeRepresenter):
    """No anchors, and `|` for texts of several lines."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(representer: SafeRepresenter, value: str) -> Any:
    style = "|" if "\n" in value else None
    return representer.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Representer.add_representer(str, _text)


def dump(*manifests: Manifest) -> str:
    """One YAML document each."""
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.width = 10_000  # a line that wraps makes a diff hard to read
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump_all(manifests, stream) if len(manifests) != 1 else yaml.dump(manifests[0], stream)
    return stream.getvalue()
