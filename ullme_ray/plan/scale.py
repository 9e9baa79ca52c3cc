"""An embedding run too large to try: its time, cost, parts, log and driver memory, simulated from what one unit costs.

Costs come from the job's last run (`embed_report.json`), from `--cost NAME=VALUE`, and else from the figures below.
No Ray, no torch; a million units take about a second.
"""

from __future__ import annotations

import heapq
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ullme_ray import storage
from ullme_ray.errors import JobFileError, Problem, StorageError
from ullme_ray.progress import duration
from ullme_ray.spec import JobSpec, RunFolder

_SEED = 13
_MOST_DOCUMENTS = 1e11  # simulated in half a minute
_OWN_SHARE = 0.01  # of the run that the driver's own work may take


def _cost(default: float, unit: str) -> Any:
    return field(default=default, metadata={"unit": unit})


@dataclass(frozen=True)
class Costs:
    """What one of each takes. Planning, handing out, commit, log and memory were measured by `tests/bench/driver.py` (2 cores
    AMD EPYC, 1M units); the others are assumptions, to be replaced by your own figures.
    """

    gpus: float = _cost(256, "GPUs, one embedding process each")
    tokens_per_s: float = _cost(20_000, "tokens/s of one embedding process")
    tokens_per_document: float = _cost(256, "tokens of a document, on average")
    spread: float = _cost(0.2, "standard deviation of a unit's time, as a share of it")
    start_s: float = _cost(60, "s until a process has loaded the model")
    write_mb_per_s: float = _cost(50, "MB/s at which one process writes its parts")
    bytes_per_document: float = _cost(4200, "bytes of a document's rows in the table")
    documents_per_file: float = _cost(1_000_000, "documents in one file of the corpus")
    list_s: float = _cost(0.2, "s to list 1,000 objects of the store")
    plan_us: float = _cost(52, "us of the driver to plan a unit and give it to Ray Data")
    dispatch_per_s: float = _cost(40, "units/s that the driver can hand out and take back")
    commit_us: float = _cost(90, "us to commit a part, checkpoint of the log included")
    log_bytes: float = _cost(410, "bytes of a part in the table's log")
    driver_bytes: float = _cost(6600, "bytes of the driver's memory for a unit")
    driver_base_mb: float = _cost(350, "MB of the driver before its first unit")
    price_per_gpu_hour: float = _cost(0, "price of a GPU for an hour, in any currency; 0 leaves the cost out")


@dataclass(frozen=True)
class ScalePlan:
    """The simulated run; times in seconds, sizes in bytes."""

    documents: int
    units: int
    costs: Costs
    sources: dict[str, str]  # where each cost that is no default comes from
    list_s: float
    plan_s: float
    start_s: float
    embed_s: float
    check_s: float  # listing the parts before the commit
    commit_s: float
    busy_share: float  # of the processes' time between model load and the last unit
    limit: str  # what the embedding waits for
    table_bytes: float
    log_bytes: float
    driver_memory_bytes: float
    cost: float | None

    @property
    def seconds(self) -> float:
        return self.list_s + self.plan_s + self.start_s + self.embed_s + self.check_s + self.commit_s

    @property
    def own_share(self) -> float:
        """Of the run, that the driver plans and commits while no process embeds."""
        return (self.seconds - self.start_s - self.embed_s) / self.seconds

    def _larger_units(self) -> str | None:
        """How large units must be for the driver not to hold the GPUs up."""
        if self.limit != "the driver":
            return None
        costs = self.costs
        documents_per_s = min(
            costs.gpus * costs.tokens_per_s / costs.tokens_per_document,
            costs.gpus * costs.write_mb_per_s * 1e6 / costs.bytes_per_document,
        )
        rows = 2 ** math.ceil(math.log2(2 * documents_per_s / costs.dispatch_per_s))  # so that it has half of its time to spare
        return f"too small, the processes wait for the driver; embed.rows_per_unit = {rows} would leave it half of its time"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"seconds": self.seconds, "own_share": self.own_share}

    def to_text(self) -> str:
        costs, tokens = self.costs, self.documents * self.costs.tokens_per_document
        price = f", {self.cost:,.0f} at {costs.price_per_gpu_hour:g} per GPU and hour" if self.cost is not None else ""
        verdict = "under" if self.own_share < _OWN_SHARE else "NOT under"
        lines = [
            f"{self.documents:,} documents, {tokens:,.0f} tokens, {self.units:,} units on {costs.gpus:,.0f} GPUs",
            f"  time        {duration(self.seconds)}{price}",
            f"    list      {duration(self.list_s)}, plan {duration(self.plan_s)}, load models {duration(self.start_s)}",
            f"    embed     {duration(self.embed_s)}; processes are busy {self.busy_share:.1%} of it; limited by {self.limit}",
            f"    publish   check parts {duration(self.check_s)}, commit {duration(self.commit_s)}",
            f"  driver      {self.own_share:.2%} of the run is its own work ({verdict} {_OWN_SHARE:.0%}); "
            f"{_size(self.driver_memory_bytes)} of memory; hands out {self.units / self.embed_s:,.1f} of the "
            f"{costs.dispatch_per_s:,.0f} units/s that it can",
            *([f"  units       {advice}"] if (advice := self._larger_units()) else []),
            f"  table       {self.units:,} parts, {_size(self.table_bytes)}; log {_size(self.log_bytes)}",
            "  costs",
        ]
        for cost in fields(Costs):
            source = self.sources.get(cost.name, "default")
            lines.append(f"    {cost.name:<20} {getattr(costs, cost.name):>14,.6g} {cost.metadata['unit']} ({source})")
        return "\n".join(lines)


def plan_scale(job: JobSpec, documents: float, given: Sequence[str] = ()) -> ScalePlan:
    """Simulates a first embedding of so many documents by the job.

    Args:
        given: costs as `NAME=VALUE`, over those of the job's last run and the defaults.

    Raises:
        JobFileError: the job embeds nothing, or a cost cannot be understood.
    """
    if job.embed is None:
        raise JobFileError("--scale", [Problem("embed", "is missing; a plan at scale is about this section")])
    if not 1 <= documents <= _MOST_DOCUMENTS:
        raise JobFileError("--scale", [Problem("documents", f"= {documents:g} is not between 1 and {_MOST_DOCUMENTS:g}")])
    measured = _measured(job)
    chosen = _parsed(given)
    costs = replace(Costs(), **(measured | chosen))
    sources = dict.fromkeys(measured, "last run") | dict.fromkeys(chosen, "given")
    return simulate(math.ceil(documents), job.embed.rows_per_unit, costs, sources)


def simulate(documents: int, documents_per_unit: int, costs: Costs, sources: dict[str, str] | None = None) -> ScalePlan:
    """Hands every unit to the process that is free first, no faster than the driver can, units differing by `spread`."""
    units = -(-documents // documents_per_unit)
    files = math.ceil(documents / costs.documents_per_file)
    compute_s = documents_per_unit * costs.tokens_per_document / costs.tokens_per_s
    write_s = documents_per_unit * costs.bytes_per_document / (costs.write_mb_per_s * 1e6)
    each_s = max(compute_s, write_s)  # a process embeds a unit while the one before it is written
    embed_s, busy_s = _run(units, int(costs.gpus), each_s, costs)
    rates = {
        "the GPUs": costs.gpus / compute_s,
        "writing": costs.gpus / write_s if write_s else math.inf,
        "the driver": costs.dispatch_per_s,
    }
    plan = ScalePlan(
        documents=documents,
        units=units,
        costs=costs,
        sources=sources or {},
        list_s=costs.list_s * math.ceil(files / 1000),
        plan_s=costs.plan_us * units / 1e6,
        start_s=costs.start_s,
        embed_s=embed_s,
        check_s=costs.list_s * math.ceil(units / 1000),
        commit_s=costs.commit_us * units / 1e6,
        busy_share=busy_s / (embed_s * min(units, int(costs.gpus))),
        limit=min(rates, key=lambda name: rates[name]),
        table_bytes=documents * costs.bytes_per_document,
        log_bytes=units * costs.log_bytes,
        driver_memory_bytes=costs.driver_base_mb * 1e6 + units * costs.driver_bytes,
        cost=None,
    )
    if costs.price_per_gpu_hour:
        plan = replace(plan, cost=plan.seconds / 3600 * costs.gpus * costs.price_per_gpu_hour)
    return plan


def _run(units: int, processes: int, each_s: float, costs: Costs) -> tuple[float, float]:
    """(time from the first unit to the end of the last, time that processes worked), in seconds."""
    generator = random.Random(_SEED)
    free_at = [0.0] * min(units, processes)
    worked_s = end_s = 0.0
    for unit in range(units):
        took_s = each_s * max(0.1, generator.gauss(1.0, costs.spread))
        done_s = max(free_at[0], unit / costs.dispatch_per_s) + took_s
        heapq.heapreplace(free_at, done_s)
        worked_s += took_s
        end_s = max(end_s, done_s)
    return end_s, worked_s


def _measured(job: JobSpec) -> dict[str, float]:
    """What the job's last embedding run tells; empty where it embedded nothing, or its storage cannot be reached from here."""
    try:
        report: dict[str, Any] = json.loads(storage.read_text(storage.join(RunFolder.of(job).root, "embed_report.json")))
    except (FileNotFoundError, StorageError):
        return {}
    found: dict[str, float] = {}
    embedded, written = report.get("rows_embedded", 0), report.get("bytes_written", 0)
    if embedded and report.get("actors"):
        found["tokens_per_document"] = report["tokens"] / embedded
        found["bytes_per_document"] = written / (embedded + report.get("rows_copied", 0))
        found["tokens_per_s"] = report["model_tokens_per_s"] / report["actors"]
    return {name: value for name, value in found.items() if value > 0}


def _parsed(given: Sequence[str]) -> dict[str, float]:
    names = [cost.name for cost in fields(Costs)]
    found, problems = {}, []
    for text in given:
        name, _, value = text.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        may_be_0 = name in ("spread", "start_s", "price_per_gpu_hour", "driver_base_mb", "list_s")
        if name not in names:
            problems.append(Problem(name or text, f"is no cost; use one of {', '.join(names)}"))
        elif not (math.isfinite(number) and (number > 0 or (number == 0 and may_be_0))):
            problems.append(Problem(name, f"= {value} is not a number above 0"))
        elif name == "gpus" and number != int(number):
            problems.append(Problem(name, f"= {value} is not a whole number"))
        else:
            found[name] = number
    if problems:
        raise JobFileError("--cost", problems)
    return found


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.4g} TB"
