"""Removing what the table needs no more: parts that left it, parts of broken runs that never came into it, uploads cut off.

Delta's own vacuum does it, but for dead letters, which go once no part of the table is of their unit. A file goes once it has
been out of the table, or lain beside it, for `retention_hours`: until then slow readers and time travel find it, and a broken
run can be taken up again.
"""

from __future__ import annotations

import time

from deltalake.exceptions import DeltaError

from ullme_ray.embed.commit import active_parts
from ullme_ray.embed.parts import remove_old_dead_letters
from ullme_ray.embed.units import embed_section
from ullme_ray.errors import StorageError
from ullme_ray.spec.job import JobSpec
from ullme_ray.spec.run_folder import RunFolder
from ullme_ray.storage import remove_unfinished
from ullme_ray.store_probes import abort_stale_uploads
from ullme_ray.table import find_table


def remove_old_files(job: JobSpec, *, retention_hours: int | None = None) -> list[str]:
    """Removes them and gives their names; writes nothing where there is nothing to remove. Costs two listings.

    Args:
        retention_hours: over the job's.

    Raises:
        EmbedError: the table holds files that are no parts.
        StorageError: the table's folder cannot be listed or changed.
    """
    output = embed_section(job).output
    hours = retention_hours if retention_hours is not None else output.retention_hours
    folder = RunFolder.of(job).resolve(output.path)
    abort_stale_uploads(folder)
    remove_unfinished(folder)
    table = find_table(folder)
    if table is None or hours is None:
        return []
    try:
        dead = remove_old_dead_letters(folder, active_parts(table), time.time() - 3600.0 * hours)
        old = table.vacuum(hours, dry_run=True, enforce_retention_duration=False, full=True)
        return dead + (table.vacuum(hours, dry_run=False, enforce_retention_duration=False, full=True) if old else [])
    except (DeltaError, OSError) as error:
        raise StorageError(f"old files of the table {table.table_uri} cannot be removed ({error})") from error
