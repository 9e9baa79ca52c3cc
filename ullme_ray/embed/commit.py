"""The commit: one Delta transaction that adds the new parts and removes those they replace. Readers see all or nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

import pyarrow as pa
from deltalake import DeltaTable, Schema
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, CommitProperties, RemoveAction, create_table_with_add_actions

from ullme_ray.embed.parts import Part, PartName
from ullme_ray.errors import EmbedError, StorageError
from ullme_ray.storage import is_remote
from ullme_ray.table import delta_options, find_table, reason_of

_MAX_ATTEMPTS = 20
_MAX_FAILURES = 5  # of the store; waits 2, 4, 8, 16 s between them


def active_parts(table: DeltaTable | None) -> dict[PartName, Part]:
    """The parts of a table's newest version. Costs the table's log, no data.

    Raises:
        EmbedError: the table holds files that are no parts, so this job must not touch it.
    """
    if table is None:
        return {}
    parts = {}
    for action in pa.table(table.get_add_actions(flatten=True)).select(["path", "size_bytes", "num_records"]).to_pylist():
        name = PartName.parse(action["path"])
        if name is None or action["num_records"] is None:
            raise EmbedError(
                f"the table {table.table_uri} holds {action['path']}, which no embed job wrote; change embed.output.path"
            )
        parts[name] = Part(name, action["num_records"], action["size_bytes"])
    return parts


def commit(path: str, wanted: Mapping[PartName, Part], schema: pa.Schema, *, job_name: str, fingerprint: str) -> int:
    """Makes the table at `path` hold exactly the parts `wanted`; if it does already, nothing is written.

    A run that loses a race reads the winner's version and compares again: mostly there is nothing left to do.

    Returns:
        The version of the table that holds them.

    Raises:
        EmbedError: the table belongs to another job, or could not be committed to.
    """
    delta_schema = Schema.from_arrow(schema)
    note = CommitProperties(custom_metadata={"ullme_ray": {"job": job_name, "fingerprint": fingerprint}}, max_commit_retries=0)
    failures = 0
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
                return 0
            active = active_parts(table)
            same_columns = table.schema() == delta_schema
            if same_columns and active.keys() == wanted.keys():
                return table.version()
            if same_columns:
                changes: list[AddAction | RemoveAction] = [_add(part) for name, part in wanted.items() if name not in active]
                changes += [_remove(part) for name, part in active.items() if name not in wanted]
                table.create_write_transaction(changes, "append", delta_schema, commit_properties=note)
            else:  # other columns make other part names, so nothing is kept and the schema can change with the files
                table.create_write_transaction(
                    [_add(part) for part in wanted.values()], "overwrite", delta_schema, commit_properties=note
                )
            return table.version() + 1  # without retries it is the next version or none; the handle stays at the one it read
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


def check_owner(table: DeltaTable | None, job_name: str) -> None:
    """Raises EmbedError for a table that another job made: its rows would be taken for removed ones."""
    if table is not None and table.metadata().name != job_name:
        raise EmbedError(
            f"the table {table.table_uri} belongs to job {table.metadata().name!r}, and this is {job_name!r}; "
            f"choose another embed.output.path"
        )


def _add(part: Part) -> AddAction:
    now_ms = time.time_ns() // 1_000_000
    return AddAction(str(part.name), part.num_bytes, {}, now_ms, True, json.dumps({"numRecords": part.num_rows}))


def _remove(part: Part) -> RemoveAction:
    return RemoveAction(str(part.name), True, time.time_ns() // 1_000_000, part.num_bytes, {})
