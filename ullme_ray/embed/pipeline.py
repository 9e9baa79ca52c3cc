"""Batch embedding from corpus to table. Read `run_embed` first: plan, embed what is missing, commit once.

A crash at any point leaves only parts, and the next run embeds only the units that have none. A run without changes costs a
listing of the corpus and the table's log. Rows of a changed file are not compared one by one: it is embedded anew.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import ray

from ullme_ray import storage
from ullme_ray.embed.actor import EmbedContext, Outcome
from ullme_ray.embed.commit import active_parts, check_owner, commit
from ullme_ray.embed.flow import STAGE, run_units
from ullme_ray.embed.parts import (
    DEAD_LETTERS,
    Part,
    PartName,
    PartSettings,
    check_column_names,
    list_parts,
    open_part,
    remove_stale_dead_letters,
)
from ullme_ray.embed.planning import list_input, split_file
from ullme_ray.embed.reading import column_types
from ullme_ray.embed.units import InputFile, Unit, embed_section
from ullme_ray.errors import EmbedError
from ullme_ray.progress import Progress
from ullme_ray.ray_data import explained
from ullme_ray.spec.job import JobSpec
from ullme_ray.spec.run_folder import RunFolder
from ullme_ray.store_probes import keeps_exclusive_puts
from ullme_ray.table import find_table

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbedReport:
    """What a run did. `rows` = `rows_embedded` + `rows_reused` + `rows_dead`; `tokens` and the rate count this run's work."""

    files: int
    units_total: int
    units_embedded: int
    units_reused: int
    rows: int
    rows_embedded: int
    rows_reused: int
    rows_dead: int
    tokens: int
    seconds: float
    tokens_per_s: float
    table: str
    version: int
    fingerprint: str


@dataclass(frozen=True)
class Plan:
    """What a run has to do: parts that are done, and units that have none."""

    files: list[InputFile]
    done: dict[PartName, Part]
    missing: list[Unit]

    @property
    def num_rows(self) -> int:
        return sum(name.num_rows for name in self.done) + sum(unit.num_rows for unit in self.missing)


def preflight(job: JobSpec) -> None:
    """Fails before any long work: no input, a column that is not there, a table that cannot be written or is another job's.

    Input below `run:` may be written by an earlier stage, so it is looked at only where it exists.
    """
    embed, folder = embed_section(job), RunFolder.of(job)
    check_column_names(embed.input)
    if not embed.input.path.startswith("run:") or storage.exists(folder.resolve(embed.input.path)):
        column_types(list_input(job)[0], embed.input)
    table = folder.resolve(embed.output.path)
    storage.check_writable(table)
    if not keeps_exclusive_puts(table):
        logger.warning("the store of %s ignores If-None-Match: let only one run at a time write this table", table)
    check_owner(find_table(table), job.name)


def run_embed(job: JobSpec, *, progress: bool = True) -> EmbedReport:
    """Brings the table at `embed.output.path` in line with the corpus and the model. Ray must be initialised.

    Raises:
        EmbedError: an input file cannot be read, no row can be embedded, or the table cannot be committed to. The parts written
            so far stay, and the next run goes on from them.
    """
    from ullme_ray.model import encoder_fingerprint

    started = time.monotonic()
    embed = embed_section(job)
    check_column_names(embed.input)
    files = list_input(job)
    settings = PartSettings(embed.input, column_types(files[0], embed.input), encoder_fingerprint(job))
    context = EmbedContext(job, RunFolder.of(job).resolve(embed.output.path), settings)
    table = find_table(context.folder)
    check_owner(table, job.name)

    plan = make_plan(files, context, active_parts(table))
    outcomes = _embed_missing(plan, context, progress) if plan.missing else []
    wanted = {**plan.done, **{outcome.part.name: outcome.part for outcome in outcomes}}
    _check_all_rows_accounted(plan, outcomes, wanted, context.folder)
    version = commit(context.folder, wanted, settings.schema, job_name=job.name, fingerprint=settings.fingerprint)
    remove_stale_dead_letters(context.folder, wanted)

    seconds = time.monotonic() - started
    tokens = sum(outcome.num_tokens for outcome in outcomes)
    rows_in_table = sum(part.num_rows for part in wanted.values())
    rows_embedded = sum(outcome.part.num_rows for outcome in outcomes)
    report = EmbedReport(
        files=len(files),
        units_total=len(wanted),
        units_embedded=len(outcomes),
        units_reused=len(plan.done),
        rows=plan.num_rows,
        rows_embedded=rows_embedded,
        rows_reused=rows_in_table - rows_embedded,
        rows_dead=plan.num_rows - rows_in_table,
        tokens=tokens,
        seconds=seconds,
        tokens_per_s=tokens / seconds,
        table=context.folder,
        version=version,
        fingerprint=settings.fingerprint,
    )
    storage.write_text(storage.join(RunFolder.of(job).root, "embed_report.json"), json.dumps(asdict(report), indent=2) + "\n")
    return report


def make_plan(files: list[InputFile], context: EmbedContext, active: dict[PartName, Part]) -> Plan:
    """Finds what is done. A file with parts of the wanted version in the table is done whole: a commit never holds half a file.

    Only the other files are opened. Their units are compared with parts that a broken run may have left in the folder.
    """
    in_table: dict[tuple[str, str], list[Part]] = {}
    for name, part in active.items():
        in_table.setdefault((name.file_key, name.version), []).append(part)
    done: dict[PartName, Part] = {}
    to_split = []
    for file in files:
        parts = in_table.get((file.key, context.settings.version_of(file)))
        if parts is None:
            to_split.append(file)
        else:
            done.update((part.name, part) for part in parts)
    missing = []
    if to_split:
        left_behind = list_parts(context.folder)
        for unit in _split_on_ray(to_split, embed_section(context.job).rows_per_unit):
            name = context.settings.part_name(unit)
            found = open_part(context.folder, name, left_behind[name]) if name in left_behind else None
            if found is None:
                missing.append(unit)
            else:
                done[name] = found
    return Plan(files, done, missing)


def _split_on_ray(files: list[InputFile], rows_per_unit: int) -> Iterator[Unit]:
    """As `units.split_files`, but on the cluster, since counting the rows of text files reads them."""
    split = ray.remote(split_file).options(num_cpus=1)
    window = max(1, int(ray.cluster_resources().get("CPU", 1)))
    pending: list[Any] = []
    for position in range(len(files) + window):
        if position < len(files):
            pending.append(split.remote(files[position], rows_per_unit))
        if position >= window and pending:
            yield from _get(pending.pop(0))
    for reference in pending:
        yield from _get(reference)


def _get(reference: Any) -> list[Unit]:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        raise explained(STAGE, error) from error


def _embed_missing(plan: Plan, context: EmbedContext, show: bool) -> list[Outcome]:
    """Runs the missing units through the pipeline."""
    done_before = sum(name.num_rows for name in plan.done)
    outcomes: list[Outcome] = []
    started = time.monotonic()
    rows, tokens = done_before, 0
    with Progress("embed", plan.num_rows) if show else _Silent() as bar:
        if plan.done:
            bar.note(f"{len(plan.done)} units are done already, {len(plan.missing)} are left")
        bar.update(done_before)
        for outcome in run_units(plan.missing, context):
            outcomes.append(outcome)
            rows += outcome.part.name.num_rows
            tokens += outcome.num_tokens
            bar.update(rows, tokens_per_s=tokens / (time.monotonic() - started))
    return outcomes


class _Silent:
    """Stands in for Progress where nobody watches."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, done: int, **figures: float | int | str) -> None:
        pass

    def note(self, text: str) -> None:
        pass


def _check_all_rows_accounted(plan: Plan, outcomes: list[Outcome], wanted: dict[PartName, Part], folder: str) -> None:
    """Rows in = embedded + dead-lettered, unit by unit, before anything is committed.

    Raises:
        EmbedError: not a single row could be embedded.
    """
    assert len(outcomes) == len(plan.missing), f"{len(plan.missing)} units went in, {len(outcomes)} came out"
    assert len(wanted) == len(plan.done) + len(outcomes), "a unit came out twice"
    for outcome in outcomes:
        name, num_rows = outcome.part.name, outcome.part.num_rows
        assert name.num_rows == num_rows + outcome.num_dead, (
            f"{name}: {name.num_rows} rows in, {num_rows} + {outcome.num_dead} out"
        )
    if plan.num_rows and not any(part.num_rows for part in wanted.values()):
        raise EmbedError(
            f"none of the {plan.num_rows} rows could be embedded; {storage.join(folder, DEAD_LETTERS)} tells why, row by row; "
            f"check embed.input.text and embed.input.id"
        )
