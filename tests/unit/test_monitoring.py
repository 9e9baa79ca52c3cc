"""Dashboard and alerts name metrics that exist, and the code sets every metric that it declares."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ruamel.yaml import YAML

from ullme_ray.telemetry import METRICS

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "cluster" / "monitoring"
_KNOWN_BY_OTHERS = {"kube_job_failed"}  # of kube-state-metrics
_FUNCTIONS = {"rate", "increase", "changes", "sum", "max", "by", "and", "histogram_quantile"}
_LABELS = {"job", "fate", "err", "le", "method", "model", "app_kubernetes_io_instance"}
_SERVE = (ROOT / "ullme_ray" / "serve" / "metrics.py").read_text(encoding="utf-8")


def names(expression: str) -> set[str]:
    """The metrics of a PromQL expression."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]", "", expression)
    return set(re.findall(r"[a-z_]{2,}", bare)) - _FUNCTIONS - _LABELS


def wrong(expression: str) -> set[str]:
    """Metrics that nobody has; a rate of a gauge and a bare counter are as wrong."""
    served = {name for name in names(expression) if f'"{name.removesuffix("_bucket")}"' in _SERVE}
    found = names(expression) - _KNOWN_BY_OTHERS - served
    unknown = {name for name in found if name.removeprefix("ray_") not in METRICS or not name.startswith("ray_")}
    for name in found - unknown:
        is_counter = METRICS[name.removeprefix("ray_")][0] == "counter"
        is_rate = re.search(rf"(rate|increase)\({name}\b", expression) is not None
        if is_counter != is_rate:
            unknown.add(name)
    return unknown


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    board = json.loads((MONITORING / "dashboard.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert {expression: bad for expression in expressions if (bad := wrong(expression))} == {}
    shown = {name.removeprefix("ray_") for expression in expressions for name in names(expression)}
    assert {name for name in shown if name.startswith("ullme_")} == set(METRICS)
    assert "te_request_count" in shown
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in board["panels"]}) == len(places)


def test_alerts_name_metrics_that_exist() -> None:
    (rules,) = YAML(typ="safe").load((MONITORING / "alerts.yaml").read_text())["spec"]["groups"]
    assert len(rules["rules"]) >= 5
    for rule in rules["rules"]:
        assert names(rule["expr"])
        assert wrong(rule["expr"]) == set(), rule["alert"]
        assert set(rule["annotations"]) == {"summary", "description"}


def test_the_check_sees_a_wrong_name_and_a_wrong_kind() -> None:
    """The control."""
    assert wrong("rate(ray_ullme_embed_tokens_totals[5m])")
    assert wrong("rate(ray_ullme_train_loss[5m])")
    assert wrong("ray_ullme_embed_units_total > 3")
    assert wrong("ullme_train_loss > 3")
    assert wrong("rate(te_request_counts[5m])")
    assert not wrong('rate(ray_ullme_embed_tokens_total{job="a"}[5m]) > 3')


def test_every_metric_is_set_somewhere() -> None:
    source = "".join(path.read_text() for path in (ROOT / "ullme_ray").rglob("*.py") if path.name != "telemetry.py")
    unset = [name for name, (_, _, field) in METRICS.items() if not field and f'"{name}"' not in source]
    assert unset == []
