"""Batch embedding from corpus to table. Read `run_embed` first: plan, embed what is missing, commit once.

A crash at any point leaves only parts, and the next run embeds only the units that have none. A run without changes costs a
listing of the corpus and of the table's folder, and the table's log. Of a changed or new file, only texts that the table does
not hold yet are embedded.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ullme_ray import storage, telemetry
from ullme_ray.embed.calibration import measure_ranges
from ullme_ray.embed.commit import Listing, active_parts, can_grow, check_owner, commit
from ullme_ray.embed.duplicates import Duplicates, find_duplicate_ids
from ullme_ray.embed.flow import run_units
from ullme_ray.embed.index import build_index
from ullme_ray.embed.parts import (
    DEAD_LETTERS,
    Part,
    PartKey,
    PartSettings,
    check_column_names,
    missing_parts,
    remove_dead_letters,
)
from ullme_ray.embed.planning import list_input
from ullme_ray.embed.reading import column_types
from ullme_ray.embed.report import GAVE_WAY, EmbedReport, last_rate, save_report
from ullme_ray.embed.run_plan import RunPlan, make_plan
from ullme_ray.embed.steps import EmbedContext, Forward, Outcome
from ullme_ray.embed.units import embed_section, num_files
from ullme_ray.embed.vacuum import remove_old_files
from ullme_ray.errors import EmbedError
from ullme_ray.progress import Progress
from ullme_ray.spec.job import JobSpec
from ullme_ray.spec.run_folder import RunFolder
from ullme_ray.store_probes import keeps_exclusive_puts
from ullme_ray.table import find_table
from ullme_ray.vectors import VectorFormat, find_ranges

logger = logging.getLogger(__name__)

_ACTIVE_ACTOR_S = 60.0  # an actor that finished a unit within this time counts as at work,
_ACTIVE_UNITS = 3.0  # or within so many times as long as that unit took
_RECENT_UNITS = 100  # that the bar tells the padding of


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


def check_chunks(job: JobSpec) -> None:
    """Raises ModelError where a chunk, with the prompt around it, is too long for the model. Opens the tokenizer."""
    chunks = embed_section(job).input.chunks
    if chunks is not None:
        from ullme_ray.model import open_tokenizer

        open_tokenizer(job).check_chunks(chunks.tokens, "passage")


def run_embed(job: JobSpec, *, progress: bool = True) -> EmbedReport:
    """Brings the table at `embed.output.path` in line with the corpus and the model. Ray must be initialised.

    Raises:
        EmbedError: an input file cannot be read, no row can be embedded, or the table cannot be committed to. The parts written
            so far stay, and the next run goes on from them.
    """
    started = time.monotonic()
    check_chunks(job)
    context, plan = open_run(job)
    run = _Run(context, plan, started, plan_seconds=time.monotonic() - started)
    try:
        if plan.missing:
            _embed_missing(run, show=progress)
    finally:
        context.close()
    wanted = run.all_parts()
    _check_all_rows_accounted(run, wanted)
    run.commit(wanted, whole=True)
    has_changed = run.newer is None and bool(run.outcomes or run.has_written)
    remove_old_files(job)
    report = _report(run, wanted, find_duplicate_ids(context, wanted) if has_changed else Duplicates(None))
    save_report(job, report)
    return report


def open_run(job: JobSpec, *, measure: bool = True) -> tuple[EmbedContext, RunPlan]:
    """What every step of the run needs to know, and what there is to do. Ray must be initialised.

    Args:
        measure: whether to measure the ranges of int8 and uint8 vectors, and keep them, where the table has none yet. Without
            them it has no part of the wanted kind.
    """
    from ullme_ray.model import encoder_fingerprint

    embed = embed_section(job)
    check_column_names(embed.input)
    folder = RunFolder.of(job).resolve(embed.output.path)
    table = find_table(folder)
    check_owner(table, job.name)
    listing = Listing(table.version() if table is not None else -1, time.time())
    files = list_input(job)
    types, vectors = column_types(files[0], embed.input), VectorFormat.of(embed.output)
    settings = PartSettings(embed.input, types, encoder_fingerprint(job), vectors)
    if vectors.is_scaled:
        known = find_ranges(folder, settings.fingerprint, vectors)
        if known is None and measure:
            known = measure_ranges(EmbedContext(job, folder, settings), files)
        settings = replace(settings, vectors=known or vectors)
    active = active_parts(table)
    plan = make_plan(files, folder, settings, active, embed, listing)
    reusable = [part for key, part in active.items() if key.recipe == settings.recipe]
    index = build_index(folder, reusable) if plan.missing else None
    return EmbedContext(job, folder, settings, index), plan


@dataclass
class _Run:
    """A run while it goes on."""

    context: EmbedContext
    plan: RunPlan
    started: float
    outcomes: list[Outcome] = field(default_factory=list)
    plan_seconds: float = 0.0
    commit_seconds: float = 0.0
    version: int = -1
    has_written: bool = False  # a version of the table
    newer: dict[PartKey, Part] | None = None  # what the table holds by a run that listed the corpus later

    def all_parts(self) -> dict[PartKey, Part]:
        return {**self.plan.done, **{outcome.part.key: outcome.part for outcome in self.outcomes}}

    def commit(self, wanted: dict[PartKey, Part], *, whole: bool) -> None:
        """Makes the table hold the parts, unless a run that listed the corpus later was faster.

        Raises:
            EmbedError: one of them is gone, or the table could not be committed to.
        """
        context, began = self.context, time.monotonic()
        if (self.plan.new or self.plan.changed) and (gone := missing_parts(context.folder, wanted.values())):
            raise EmbedError(
                f"{len(gone)} parts of this run, such as {gone[0]}, were removed from {context.folder} before they came into "
                f"the table, as a vacuum meanwhile does; let embed.output.retention_hours be longer than a run, then run again"
            )
        done = commit(
            context.folder,
            wanted,
            context.settings.schema,
            job_name=context.job.name,
            fingerprint=context.settings.fingerprint,
            whole=whole,
            listing=self.plan.listing,
        )
        self.commit_seconds += time.monotonic() - began
        self.version = done.version
        self.has_written |= done.is_new
        self.newer = done.newer
        remove_dead_letters(context.folder, done.removed)


def _embed_missing(run: _Run, *, show: bool) -> None:
    """Runs the missing units through the pipeline, and publishes finished files on the way where the job asks for it."""
    plan = run.plan
    started = published = time.monotonic()
    every = embed_section(run.context.job).publish_every_minutes
    grows = every is not None and plan.same_recipe and can_grow(run.context.folder, run.context.settings.schema)
    rows_before = sum(key.num_rows for key in plan.done)
    rows, tokens, told = rows_before, 0, set()
    last_seen: dict[str, tuple[float, float]] = {}
    with Progress("embed", plan.num_rows) if show else _Silent() as bar:
        if plan.done:
            bar.note(f"{len(plan.done):,} units are done already, {len(plan.missing):,} are left")
        bar.update(rows)
        telemetry.gauge("ullme_embed_units_left", len(plan.missing), run.context.job.name)
        for outcome in run_units(plan.missing, run.context):
            now = time.monotonic()
            run.outcomes.append(outcome)
            rows += outcome.part.key.num_rows
            tokens += outcome.forward.num_tokens
            last_seen[outcome.forward.actor] = now, outcome.forward.seconds
            if (reason := outcome.forward.not_compiled) is not None and reason not in told:
                told.add(reason)
                bar.note(f"embed.compile is left out in an actor: {reason}")
            padding = f"{_padding_share([done.forward for done in run.outcomes[-_RECENT_UNITS:]]):.1%}"
            _tell_of_unit(run, outcome)
            bar.update(rows, tokens_per_s=tokens / (now - started), padding=padding, actors=_num_at_work(last_seen, now))
            if grows and every is not None and now - published > 60.0 * every:
                if finished := plan.parts_of_whole_files(run.all_parts()):
                    run.commit(finished, whole=False)
                    grows = run.newer is None
                    bar.note(f"published {len(finished):,} units as version {run.version}" if grows else GAVE_WAY)
                published = time.monotonic()


def _num_at_work(last_seen: Mapping[str, tuple[float, float]], now: float) -> int:
    """How many actors are at work, by when each finished its last unit and how long it took, both in seconds."""
    return sum(now - at < max(_ACTIVE_ACTOR_S, _ACTIVE_UNITS * took) for at, took in last_seen.values())


def _tell_of_unit(run: _Run, outcome: Outcome) -> None:
    """To the log and to Prometheus, a few numbers per unit."""
    job, part = run.context.job.name, outcome.part
    fates = {"embedded": outcome.num_embedded, "copied": outcome.num_copied, "dead": outcome.num_dead}
    for fate, rows in fates.items():
        telemetry.count("ullme_embed_rows_total", rows, job, fate=fate)
    telemetry.count("ullme_embed_units_total", 1, job)
    telemetry.count("ullme_embed_tokens_total", outcome.forward.num_tokens, job)
    telemetry.count("ullme_embed_bytes_total", part.num_bytes, job)
    telemetry.count("ullme_embed_retries_total", outcome.retries, job)
    telemetry.gauge("ullme_embed_units_left", len(run.plan.missing) - len(run.outcomes), job)
    logger.info("unit done", extra={"unit": part.name, "tokens": outcome.forward.num_tokens, **fates})


def _padding_share(forwards: Sequence[Forward]) -> float:
    positions = sum(forward.num_positions for forward in forwards)
    return 1.0 - sum(forward.num_tokens for forward in forwards) / positions if positions else 0.0


def _num_actors(forwards: Sequence[Forward], most: int) -> int:
    """That embedded; one that took a dead one's place does not count beside it."""
    return min(most, len({forward.actor for forward in forwards if forward.num_tokens}))


def _model_rate(forwards: Sequence[Forward], most_actors: int) -> float | None:
    """Tokens/s of all actors while they embedded."""
    seconds = sum(forward.seconds for forward in forwards if forward.num_tokens)
    return _num_actors(forwards, most_actors) * sum(forward.num_tokens for forward in forwards) / seconds if seconds else None


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


def _check_all_rows_accounted(run: _Run, wanted: dict[PartKey, Part]) -> None:
    """Rows in = embedded + copied + dead-lettered, unit by unit, before anything is committed.

    Raises:
        EmbedError: not a single row could be embedded.
    """
    plan, outcomes = run.plan, run.outcomes
    assert len(outcomes) == len(plan.missing), f"{len(plan.missing)} units went in, {len(outcomes)} came out"
    assert len(wanted) == len(plan.done) + len(outcomes), "a unit came out twice"
    for outcome in outcomes:
        num_rows = outcome.num_embedded + outcome.num_copied
        assert outcome.part.key.num_rows == num_rows + outcome.num_dead, f"{outcome.part.name}: rows are missing"
        assert outcome.part.num_rows >= num_rows, f"{outcome.part.name}: documents without a vector"
    if plan.num_rows and not any(part.num_rows for part in wanted.values()):
        raise EmbedError(
            f"none of the {plan.num_rows} rows could be embedded; {storage.join(run.context.folder, DEAD_LETTERS)} tells why, "
            f"row by row; check embed.input.text and embed.input.id"
        )


def _report(run: _Run, wanted: dict[PartKey, Part], duplicates: Duplicates) -> EmbedReport:
    plan, outcomes = run.plan, run.outcomes
    seconds = time.monotonic() - run.started
    forwards = [outcome.forward for outcome in outcomes]
    tokens, peak_flop = sum(f.num_tokens for f in forwards), sum(f.peak_flop for f in forwards)
    embedded, copied = sum(o.num_embedded for o in outcomes), sum(o.num_copied for o in outcomes)
    dead_before = sum(plan.dead.get(key, 0) for key in plan.done)
    embed = embed_section(run.context.job)
    price, most_actors = embed.price_per_hour, embed.actors.max
    worked = embedded + copied
    held = wanted if run.newer is None else run.newer
    return EmbedReport(
        files=num_files(plan.files),
        files_new=num_files(plan.new),
        files_changed=num_files(plan.changed),
        files_removed=plan.num_removed,
        units_total=len(wanted),
        units_embedded=len(outcomes),
        units_reused=len(plan.done),
        rows=plan.num_rows,
        rows_embedded=embedded,
        rows_copied=copied,
        rows_reused=sum(key.num_rows for key in plan.done) - dead_before,
        rows_dead=dead_before + sum(outcome.num_dead for outcome in outcomes),
        table_rows=sum(part.num_rows for part in held.values()),
        truncated_rows=sum(outcome.num_truncated for outcome in outcomes),
        duplicate_ids=duplicates.num_ids,
        duplicate_examples=duplicates.examples,
        tokens=tokens,
        padding_share=_padding_share(forwards),
        seconds=seconds,
        plan_seconds=run.plan_seconds,
        commit_seconds=run.commit_seconds,
        tokens_per_s=tokens / seconds,
        actors=_num_actors(forwards, most_actors),
        model_tokens_per_s=_model_rate(forwards, most_actors) or last_rate(run.context.job),
        rows_per_s=worked / seconds,
        mfu=sum(f.flop for f in forwards) / peak_flop if peak_flop and tokens else None,
        retries=sum(outcome.retries for outcome in outcomes),
        bytes_written=sum(outcome.part.num_bytes for outcome in outcomes),
        table_bytes=sum(part.num_bytes for part in held.values()),
        cost_per_million_rows=price * seconds / 3600.0 / worked * 1e6 if price is not None and worked else None,
        table=run.context.folder,
        version=run.version,
        gave_way=run.newer is not None,
        fingerprint=run.context.settings.fingerprint,
    )
