"""Whether a manifest would be taken: by the API server (schemas of Kubernetes and of KubeRay), then by KubeRay's operator."""

from __future__ import annotations

import gzip
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import celpy
import jsonschema
import kubernetes_validate
from celpy.adapter import json_to_cel
from ruamel.yaml import YAML

from ullme_ray.deploy.rules import broken_rules

KUBERNETES = "1.34"
_CRDS = Path(__file__).parent / "data" / "kuberay-crds-1.7.0.json.gz"
_LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")


def read(text: str) -> list[dict[str, Any]]:
    """The documents of a YAML text; a key that stands twice is refused."""
    yaml = YAML(typ="safe")
    yaml.allow_duplicate_keys = False
    return [document for document in yaml.load_all(text) if document is not None]


def complaints(manifest: dict[str, Any]) -> list[str]:
    """Why the manifest would be refused; empty where it would be taken."""
    kind, group = manifest.get("kind", ""), manifest.get("apiVersion", "")
    if kind == "Kustomization":
        return _kustomization(manifest)
    found = _labels(manifest)
    if group == "ray.io/v1":
        schema = _schemas()[kind]
        found += [f"{error.json_path} {error.message}" for error in _validator(kind).iter_errors(manifest)]
        found += _list_keys(manifest, schema, "$") + _cel(manifest, schema, "$")
    else:
        try:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{list(error.path)} {error.message}")
    if not found:
        found += broken_rules(manifest)
    return found


def _kustomization(manifest: dict[str, Any]) -> list[str]:
    """What we write of it, for no schema is to be had: files, each once."""
    files = manifest.get("resources")
    if set(manifest) != {"apiVersion", "kind", "resources"} or manifest["apiVersion"] != "kustomize.config.k8s.io/v1beta1":
        return ["a kustomization has apiVersion, kind and resources"]
    is_list = isinstance(files, list) and all(isinstance(name, str) and name.endswith(".yaml") for name in files)
    return [] if is_list and files and len(set(files)) == len(files) else ["resources is no list of files"]


@lru_cache(maxsize=1)
def _schemas() -> dict[str, Any]:
    crds = json.loads(gzip.decompress(_CRDS.read_bytes()))
    assert sorted(crds) == ["RayCluster", "RayCronJob", "RayJob", "RayService"]
    return {kind: _as_json_schema(schema) for kind, schema in crds.items()}


@lru_cache(maxsize=4)
def _validator(kind: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(_schemas()[kind])


def _as_json_schema(node: Any, *, is_metadata: bool = False) -> Any:
    """OpenAPI v3 as Kubernetes writes it -> JSON Schema that refuses what the API server would prune or refuse."""
    if isinstance(node, list):
        return [_as_json_schema(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]} | ({"pattern": node["pattern"]} if "pattern" in node else {})
    made = {key: value for key, value in node.items() if key not in ("format", "nullable")}
    if "properties" in node:
        made["properties"] = {
            key: _as_json_schema(below, is_metadata=key == "metadata") for key, below in node["properties"].items()
        }
        if not is_metadata and not node.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    elif isinstance(node.get("additionalProperties"), dict):
        made["additionalProperties"] = _as_json_schema(node["additionalProperties"])
    if "items" in node:
        made["items"] = _as_json_schema(node["items"])
    if node.get("format") == "int32":
        made |= {"minimum": -(2**31), "maximum": 2**31 - 1}
    return made


def _list_keys(value: Any, schema: dict[str, Any], at: str) -> list[str]:
    """Items of a list that is a map must differ in its keys."""
    found = []
    keys = schema.get("x-kubernetes-list-map-keys")
    if keys and isinstance(value, list):
        seen = [tuple(item.get(key, "TCP" if key == "protocol" else None) for key in keys) for item in value]
        found += [f"{at} has {key} twice" for key in sorted({str(k) for k in seen if seen.count(k) > 1})]
    for step, below, part in _below(value, schema):
        found += _list_keys(below, part, f"{at}.{step}")
    return found


def _cel(value: Any, schema: dict[str, Any], at: str) -> list[str]:
    """The CRDs' own rules; those about an older version of the object hold for a new one."""
    found = []
    for rule in schema.get("x-kubernetes-validations", ()):
        if "oldSelf" not in rule["rule"]:
            environment = celpy.Environment()
            program = environment.program(environment.compile(rule["rule"]))
            if not program.evaluate({"self": json_to_cel(value)}):
                found.append(f"{at} {rule['message']}")
    for step, below, part in _below(value, schema):
        found += _cel(below, part, f"{at}.{step}")
    return found


def _below(value: Any, schema: dict[str, Any]) -> list[tuple[str, Any, dict[str, Any]]]:
    if isinstance(value, list):
        return [(str(i), item, schema.get("items", {})) for i, item in enumerate(value)]
    if isinstance(value, dict):
        parts = schema.get("properties", {})
        return [(key, below, parts[key]) for key, below in value.items() if key in parts]
    return []


def _labels(value: Any, at: str = "$") -> list[str]:
    """Values of labels and selectors: text of at most 63 characters."""
    found = []
    if isinstance(value, dict):
        for key, below in value.items():
            if key in ("labels", "matchLabels", "nodeSelector") and isinstance(below, dict):
                found += [
                    f"{at}.{key}.{name} = {text!r} is no label value"
                    for name, text in below.items()
                    if not isinstance(text, str) or not _LABEL.fullmatch(text)
                ]
            found += _labels(below, f"{at}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            found += _labels(item, f"{at}.{i}")
    return found
