"""What a run has to do: which files are new, changed, gone or as before, and which units have no part yet.

Files as before are not opened. The others are split into units on the cluster, since counting the rows of text files reads
them; a unit whose part a broken run left behind is done.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from ullme_ray.embed.commit import Listing
from ullme_ray.embed.flow import STAGE
from ullme_ray.embed.parts import Part, PartKey, PartSettings, count_dead_letters, list_parts, open_part
from ullme_ray.embed.planning import split_file
from ullme_ray.embed.units import InputFile, Unit
from ullme_ray.ray_data import explained
from ullme_ray.spec.job import EmbedSpec


@dataclass(frozen=True)
class RunPlan:
    """Every unit of the corpus is in `done` or in `missing`."""

    files: list[InputFile]
    new: list[InputFile]
    changed: list[InputFile]  # or to be embedded another way than before
    num_removed: int  # files of the table, or groups of plain texts, that the corpus has no more
    same_recipe: bool  # as all vectors of the table, so that new ones may stand beside them
    done: dict[PartKey, Part]
    missing: list[Unit]
    missing_keys: list[PartKey]
    dead: dict[PartKey, int]  # bad rows of units that are done
    listing: Listing | None  # that it goes by

    @property
    def num_rows(self) -> int:
        """Of the corpus."""
        return sum(key.num_rows for key in self.done) + sum(unit.num_rows for unit in self.missing)

    def parts_of_whole_files(self, parts: Mapping[PartKey, Part]) -> dict[PartKey, Part]:
        """Of the parts there are so far, those of files that have all of theirs: a commit never holds half a file."""
        unfinished = {key.file for key in self.missing_keys if key not in parts}
        return {key: part for key, part in parts.items() if key.file not in unfinished}


def make_plan(
    files: list[InputFile],
    folder: str,
    settings: PartSettings,
    active: Mapping[PartKey, Part],
    embed: EmbedSpec,
    listing: Listing | None = None,
) -> RunPlan:
    """Compares the corpus with the table's newest version.

    A file with parts of the wanted version in the table is done whole, for a commit never holds half a file. A part left behind
    counts until half the time after which another run would remove it, so that it is still there when this one commits.
    """
    in_table: dict[str, dict[PartKey, Part]] = defaultdict(dict)
    for key, part in active.items():
        in_table[key.file][key] = part
    done: dict[PartKey, Part] = {}
    new: list[InputFile] = []
    changed: list[InputFile] = []
    versions = {file.path: settings.version_of(file) for file in files}  # once per file: it is most of a key's cost
    for file in files:
        version = versions[file.path]
        parts = {key: part for key, part in in_table.get(file.key, {}).items() if key.version == version}
        done |= parts
        if not parts:
            (changed if file.key in in_table else new).append(file)
    num_removed = len(in_table.keys() - {file.key for file in files})
    missing, missing_keys = [], []
    if new or changed:
        left_behind = list_parts(folder)
        hours = embed.output.retention_hours
        oldest_s = time.time() - 3600.0 * hours / 2 if hours is not None else 0.0
        for unit in _split_on_ray([*new, *changed], embed.rows_per_unit):
            key = settings.key_of(unit, versions[unit.file.path])
            readable = (open_part(info) for info in left_behind.get(key, []) if info.modified_s >= oldest_s)
            found = next((part for part in readable if part is not None), None)
            if found is not None:
                done[key] = found
            else:
                missing.append(unit)
                missing_keys.append(key)
    return RunPlan(
        files=files,
        new=new,
        changed=changed,
        num_removed=num_removed,
        same_recipe=all(key.recipe == settings.recipe for key in active),
        done=done,
        missing=missing,
        missing_keys=missing_keys,
        dead=count_dead_letters(folder) if done else {},
        listing=listing,
    )


def _split_on_ray(files: list[InputFile], rows_per_unit: int) -> Iterator[Unit]:
    """Units of these files, in their order."""
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
