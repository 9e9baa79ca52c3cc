"""Prometheus metrics under the names of TEI, so that its dashboards work. One registry per process that listens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from ullme_ray.serve.access import CLIENT_GONE, Record

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_TOKENS = tuple(2**power for power in range(3, 20, 2))
_COUNTERS = {
    "te_request_count": ("Requests to a route that runs the model, whatever became of them.", ("method",)),
    "te_request_success": ("Those answered with 200.", ("method",)),
    "te_request_failure": ("Those answered otherwise, by reason.", ("err",)),
    "te_embed_count": ("Texts that were sent to be embedded.", ()),
    "te_embed_success": ("Texts that were embedded.", ()),
    "te_embed_tokens": ("Tokens of the embedded texts, prompts included.", ()),
    "te_embed_truncated": ("Embedded texts that were longer than the model takes.", ()),
}
_BACKEND_GAUGES = {
    "replicas": ("te_replicas", "Model replicas that are up."),
    "queue_requests": ("te_queue_requests", "Requests that wait in the replicas for a forward pass."),
    "queue_tokens": ("te_queue_tokens", "Tokens that wait in the replicas for a forward pass."),
    "batches": ("te_batch_count", "Forward passes since the replicas' start."),
    "batch_rows": ("te_batch_next_size_sum", "Texts in all forward passes; over te_batch_count it is their mean size."),
    "batch_tokens": ("te_batch_next_tokens_sum", "Tokens in all forward passes, without padding."),
    "padded_tokens": ("te_batch_padded_tokens_sum", "Tokens in all forward passes, padding included."),
    "inference_seconds": ("te_batch_inference_duration_sum", "Seconds spent in forward passes."),
}
_RUNS_THE_MODEL = ("/v1/embeddings", "/", "/embed", "/embed_all", "/similarity")
_REASONS = {400: "validation", 404: "model", 408: "timeout", 413: "batch_size", 415: "validation", 422: "validation"}
_REASONS |= {401: "key", 424: "inference", 429: "overloaded", CLIENT_GONE: "client_gone", 503: "unhealthy", 504: "timeout"}


class Metrics:
    """Counts finished requests; `page` is what Prometheus reads."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._counts = _Counts()
        self._registry.register(self._counts)
        self._queue = Gauge("te_queue_size", "Requests inside the server now.", registry=self._registry)

        def histogram(name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, meaning, buckets=buckets, registry=self._registry)

        self._durations = {
            "tokenization": histogram("te_request_tokenization_duration", "Seconds of tokenizing a request.", _SECONDS),
            "queue": histogram("te_request_queue_duration", "Seconds a request waited for its forward pass.", _SECONDS),
            "inference": histogram("te_request_inference_duration", "Seconds of a request's forward passes.", _SECONDS),
        }
        self._duration = histogram("te_request_duration", "Seconds from a request's arrival to its answer.", _SECONDS)
        self._tokens = histogram("te_request_input_length", "Tokens of a request.", _TOKENS)

    def add(self, record: Record) -> None:
        """One finished request."""
        if record.route not in _RUNS_THE_MODEL or record.method != "POST":
            return
        count, kind = self._counts.add, "batch" if record.num_inputs > 1 else "single"
        count("te_request_count", kind)
        count("te_embed_count", amount=record.num_inputs)
        if record.status != 200:
            count("te_request_failure", _REASONS.get(record.status, "other"))
            return
        count("te_request_success", kind)
        count("te_embed_success", amount=record.num_inputs)
        count("te_embed_tokens", amount=record.num_tokens)
        count("te_embed_truncated", amount=record.num_truncated)
        self._duration.observe(record.elapsed_s)
        self._tokens.observe(record.num_tokens)
        for stage, histogram in self._durations.items():
            if stage in record.seconds:
                histogram.observe(record.seconds[stage])

    def page(self, num_inside: int, load: Mapping[str, Mapping[str, float]]) -> bytes:
        """Prometheus' text form, with what the replicas say of themselves."""
        self._queue.set(num_inside)
        return generate_latest(self._registry) + generate_latest(_once(load))


class _Counts(Collector):
    """Counters under names that do not end with _total, which TEI's do not and the library's own must."""

    def __init__(self) -> None:
        self._values: Counter[tuple[str, str]] = Counter()
        for name, (_, labels) in _COUNTERS.items():
            if not labels:
                self._values[name, ""] = 0

    def add(self, name: str, label: str = "", amount: float = 1) -> None:
        self._values[name, label] += amount  # type: ignore[assignment]

    def collect(self) -> Iterator[Metric]:
        for name, (meaning, labels) in _COUNTERS.items():
            metric = Metric(name, meaning, "unknown")
            for (known, label), value in sorted(self._values.items()):
                if known == name:
                    metric.add_sample(name, {labels[0]: label} if labels else {}, value)
            yield metric


def _once(load: Mapping[str, Mapping[str, float]]) -> CollectorRegistry:
    registry = CollectorRegistry()
    for key, (name, meaning) in _BACKEND_GAUGES.items():
        gauge = Gauge(name, meaning, ["model"], registry=registry)
        for model, values in load.items():
            if key in values:
                gauge.labels(model).set(values[key])
    return registry
