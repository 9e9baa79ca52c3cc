"""Removing what the table needs no more: parts that left it, parts of broken runs that never came into it, uploads cut off.

Delta's own vacuum does it. A file goes once it has been out of the table, or lain beside it, for `retention_hours`: until then
slow readers and time travel find it, and a broken run can be taken up again.
"""

from __future__ import annotations

from deltalake.exceptions import DeltaError

from ullme_ray.embed.units import embed_section
from ullme_ray.errors import StorageError
from ullme_ray.spec.job import JobSpec
from ullme_ray.spec.run_folder import RunFolder
from ullme_ray.store_probes import abort_stale_uploads
from ullme_ray.table import find_table


def remove_old_files(job: JobSpec, *, retention_hours: int | None = None) -> list[str]:
    """Removes them and gives their names; writes nothing where there is nothing to remove. Costs a listing.

    Args:
        retention_hours: over the job's.

    Raises:
        StorageError: the table's folder cannot be listed or changed.
    """
    output = embed_section(job).output
    hours = retention_hours if retention_hours is not None else output.retention_hours
    folder = RunFolder.of(job).resolve(output.path)
    abort_stale_uploads(folder)
    table = find_table(folder)
    if table is None or hours is None:
        return []
    try:
        old = table.vacuum(hours, dry_run=True, enforce_retention_duration=False, full=True)
        return table.vacuum(hours, dry_run=False, enforce_retention_duration=False, full=True) if old else []
    except (DeltaError, OSError) as error:
        raise StorageError(f"old files of the table {table.table_uri} cannot be removed ({error})") from error
