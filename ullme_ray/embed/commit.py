"""The commit: one Delta transaction that adds the new parts and removes those they replace. Readers see all or nothing.

A run that listed the corpus before another one did must not commit after it: it would take the newer rows out again. So the
last commit of a run notes when it listed, and a run gives way to one of the same model that came in between and listed later.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable, Schema
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, CommitProperties, RemoveAction, create_table_with_add_actions

from ullme_ray.embed.parts import Part, PartKey, parse_part_name
from ullme_ray.errors import EmbedError, StorageError
from ullme_ray.storage import is_remote
from ullme_ray.table import delta_options, find_table, open_table, reason_of

logger = logging.getLogger(__name__)

_MAX_ATTEMPTS = 20
_CHECKPOINT_CHANGES = 10_000  # of a commit that a checkpoint follows at once; after smaller ones deltalake makes one in 100
_MAX_FAILURES = 5  # of the store; waits 2, 4, 8, 16 s between them


def active_parts(table: DeltaTable | None) -> dict[PartKey, Part]:
    """The parts of a table's newest version. Costs the table's log, no data.

    Raises:
        EmbedError: the table holds files that are no parts, so this job must not touch it.
    """
    if table is None:
        return {}
    parts = {}
    for action in pa.table(table.get_add_actions(flatten=True)).select(["path", "size_bytes", "num_records"]).to_pylist():
        parsed = parse_part_name(action["path"])
        if parsed is None or action["num_records"] is None:
            raise EmbedError(
                f"the table {table.table_uri} holds {action['path']}, which this version of ullme_ray did not write; "
                f"change embed.output.path"
            )
        parts[parsed[0]] = Part(*parsed, action["num_records"], action["size_bytes"])
    return parts


@dataclass(frozen=True)
class Listing:
    """From what a run goes out."""

    version: int  # of the table, before the corpus was listed; -1 where there was none
    time_s: float  # when that was, since 1970


@dataclass(frozen=True)
class Commit:
    """The version that holds the wanted parts, and the parts that this commit took out of the table."""

    version: int
    removed: dict[PartKey, Part]
    is_new: bool = True  # False: the table held all that already
    newer: dict[PartKey, Part] | None = None  # what the table holds instead, by a run that listed the corpus later


def commit(
    path: str,
    wanted: Mapping[PartKey, Part],
    schema: pa.Schema,
    *,
    job_name: str,
    fingerprint: str,
    whole: bool = True,
    listing: Listing | None = None,
) -> Commit:
    """Makes the table at `path` hold the parts `wanted`; if it does already, nothing is written.

    A run that loses a race reads the winner's version and compares again: mostly there is nothing left to do.

    Args:
        whole: `wanted` is all that the table shall hold; else it is all parts of some files, and other files' parts stay.
        listing: what `wanted` goes by; absent means the table and the corpus as they are now.

    Raises:
        EmbedError: the table belongs to another job, or could not be committed to.
    """
    delta_schema = Schema.from_arrow(schema)
    made = {"job": job_name, "fingerprint": fingerprint} | ({"listed_s": listing.time_s} if listing and whole else {})
    note = CommitProperties(custom_metadata={"ullme_ray": made}, max_commit_retries=0)
    failures = 0
    files = {key.file for key in wanted}
    for attempt in range(_MAX_ATTEMPTS):
        table = find_table(path)
        check_owner(table, job_name)
        try:
            if table is None:
                create_table_with_add_actions(
                    path,
                    delta_schema,
                    [_add(part) for part in wanted.values()],
                    name=job_name,
                    storage_options=delta_options(path),
                    commit_properties=note,
                )
                _checkpoint_after(path, len(wanted))
                return Commit(0, {})
            active = active_parts(table)
            if listing is not None and _listed_later(table, listing, fingerprint):
                return Commit(table.version(), {}, is_new=False, newer=active)
            removed = {key: part for key, part in active.items() if key not in wanted and (whole or key.file in files)}
            if table.schema() == delta_schema:
                added = [part for key, part in wanted.items() if key not in active]
                if not added and not removed:
                    return Commit(table.version(), {}, is_new=False)
                changes: list[AddAction | RemoveAction] = [*map(_add, added), *map(_remove, removed.values())]
                table.create_write_transaction(changes, "append", delta_schema, commit_properties=note)
            else:  # other columns make other parts, so nothing is kept and the schema can change with the files
                assert whole, "a table cannot have the columns of some files only"
                changes = [_add(part) for part in wanted.values()]
                table.create_write_transaction(changes, "overwrite", delta_schema, commit_properties=note)
            _checkpoint_after(path, len(changes))
            # Without retries it is the next version or none; the handle stays at the one it read.
            return Commit(table.version() + 1, removed)
        except CommitFailedError:
            pass  # another run was faster
        except (DeltaError, OSError) as error:
            if table is None and find_table(path) is not None:
                continue  # made by another run since
            # deltalake does not try a put on a condition again, since the store may have taken it; the table itself tells.
            failures += 1
            if failures == _MAX_FAILURES or not is_remote(path):
                raise StorageError(f"cannot commit to the table {path} ({reason_of(error)})") from error
            time.sleep(2.0**failures)
        time.sleep(0.05 * (attempt + 1))
    raise EmbedError(f"the table {path} could not be committed to in {_MAX_ATTEMPTS} attempts, since other runs did; run again")


def _listed_later(table: DeltaTable, listing: Listing, fingerprint: str) -> bool:
    """Whether a run of the same model, whose listing of the corpus is newer, came in since this one began."""
    since = table.version() - listing.version
    notes = [commit_note(entry) for entry in table.history(since)] if since > 0 else []
    return any(made.get("fingerprint") == fingerprint and made.get("listed_s", 0.0) > listing.time_s for made in notes)


def commit_note(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What `commit` noted, from an entry of the table's history; empty for one that is not ours, such as a vacuum's."""
    note = entry.get("ullme_ray") or "{}"
    return dict(json.loads(note) if isinstance(note, str) else note)


def _checkpoint_after(path: str, num_changes: int) -> None:
    """After a large commit, keeps what the table holds as one Parquet file beside the log, a third of the commit's size.

    Readers then read that instead. Costs 7 us and 100 bytes a part. The table is whole without, so a fault here is only told.
    """
    if num_changes < _CHECKPOINT_CHANGES:
        return
    try:
        open_table(path).create_checkpoint()
    except (DeltaError, OSError, StorageError) as error:
        logger.warning("the log of %s got no checkpoint (%s); readers go through all of it", path, reason_of(error))


def can_grow(path: str, schema: pa.Schema) -> bool:
    """Whether parts of some files can be added before those of all others: not where the columns change."""
    table = find_table(path)
    return table is None or table.schema() == Schema.from_arrow(schema)


def check_owner(table: DeltaTable | None, job_name: str) -> None:
    """Raises EmbedError for a table that another job made: its rows would be taken for removed ones."""
    if table is not None and table.metadata().name != job_name:
        raise EmbedError(
            f"the table {table.table_uri} belongs to job {table.metadata().name!r}, and this is {job_name!r}; "
            f"choose another embed.output.path"
        )


def _add(part: Part) -> AddAction:
    now_ms = time.time_ns() // 1_000_000
    return AddAction(part.name, part.num_bytes, {}, now_ms, True, json.dumps({"numRecords": part.num_rows}))


def _remove(part: Part) -> RemoveAction:
    return RemoveAction(part.name, True, time.time_ns() // 1_000_000, part.num_bytes, {})
