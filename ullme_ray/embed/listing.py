"""The files of a corpus and their versions: a file, a folder, a glob, or a Delta table. Costs a listing, reads no rows."""

from __future__ import annotations

import glob
import hashlib
import os
from urllib.parse import unquote

import pyarrow as pa
from deltalake.exceptions import DeltaError

from ullme_ray import storage
from ullme_ray.embed.formats.columns import wanted_columns
from ullme_ray.embed.units import KINDS, InputFile, TextFile, embed_section, format_of
from ullme_ray.errors import EmbedError
from ullme_ray.spec.job import EmbedInputSpec, JobSpec
from ullme_ray.spec.run_folder import RunFolder
from ullme_ray.table import find_table

_DELTA_LOG = "_delta_log"


def list_input(job: JobSpec) -> list[InputFile]:
    """The files of `embed.input.path`, sorted by path. A table that lies inside the input folder is left out.

    Raises:
        EmbedError: there are none, or one is of a kind that cannot be read.
    """
    embed, folder = embed_section(job), RunFolder.of(job)
    pattern, table = folder.resolve(embed.input.path), folder.resolve(embed.output.path)
    if storage.exists(storage.join(pattern, _DELTA_LOG)):
        return _delta_files(pattern, embed.input)
    below = [info for info in storage.list_files(pattern, hidden=True) if not info.path.startswith(table.rstrip("/") + "/")]
    found = [info for info in below if not storage.is_hidden(info.path, pattern)]
    if not found:
        raise EmbedError(f"embed.input.path = {embed.input.path} matches no file ({pattern}); name a file, a folder or a glob")
    root = _root(pattern, [info.path for info in found])
    inside = next((info.path.partition(f"/{_DELTA_LOG}/")[0] for info in below if f"/{_DELTA_LOG}/" in info.path), None)
    if inside is not None or storage.exists(storage.join(root, _DELTA_LOG)):
        raise EmbedError(
            f"embed.input.path = {embed.input.path} {'holds' if inside else 'lies in'} a Delta table, whose folder also has "
            f"files that are no longer in it; name the table itself: {inside or root.rstrip('/')}"
        )
    files, texts, strangers = [], [], []
    for info in found:
        kind, name = format_of(info.path), info.path.removeprefix(root)
        if kind is None:
            strangers.append(info.path)
        elif kind == "text":
            texts.append(TextFile(name, info.version))
        else:
            files.append(InputFile(info.path, name, info.version, kind))
    if strangers:
        raise EmbedError(
            f"embed.input.path = {embed.input.path} matches {len(strangers)} files that are not {KINDS}, such as "
            f"{strangers[0]}; narrow it with a glob, such as {embed.input.path}/**/*.jsonl"
        )
    if files and texts:
        raise EmbedError(
            f"embed.input.path = {embed.input.path} matches plain texts, such as {root}{texts[0].name}, and files of rows, "
            f"such as {files[0].path}; narrow it to one of them with a glob"
        )
    return files or _groups(root, texts, embed.rows_per_unit)


def _root(pattern: str, paths: list[str]) -> str:
    """The folder, with its closing slash, that the job's pattern names before its first wildcard."""
    if paths == [pattern]:
        return pattern[: pattern.rindex("/") + 1]
    fixed = pattern
    while glob.has_magic(fixed) and not os.path.exists(fixed):
        fixed = fixed[: fixed.rindex("/")]
    return fixed.rstrip("/") + "/"


def _groups(root: str, texts: list[TextFile], at_most: int) -> list[InputFile]:
    """Plain texts in groups of `at_most`, as input files of one unit each.

    Where a group begins depends on names alone, so that a text that comes or goes leaves all groups but its own as they were.
    """
    groups: list[list[TextFile]] = []
    for text in texts:
        begins = int.from_bytes(hashlib.sha256(text.name.encode()).digest()[:8]) % at_most == 0
        if not groups or begins or len(groups[-1]) == at_most:
            groups.append([])
        groups[-1].append(text)
    return [InputFile(root + group[0].name, group[0].name, _version(group), "text", members=tuple(group)) for group in groups]


def _version(group: list[TextFile]) -> str:
    return hashlib.sha256(repr([(text.name, text.version) for text in group]).encode()).hexdigest()[:32]


def _delta_files(path: str, spec: EmbedInputSpec) -> list[InputFile]:
    """The files of a Delta table's newest version. They never change, so path and size tell one from another.

    Raises:
        EmbedError: the table's rows are not simply those of its files.
    """
    table = find_table(path)
    if table is None:
        raise EmbedError(f"embed.input.path = {path} has a {_DELTA_LOG} folder but is no Delta table; repair or remove that")
    if table.metadata().configuration.get("delta.columnMapping.mode", "none") != "none":
        raise EmbedError(f"embed.input.path: the Delta table {path} maps its columns to other names; write it without")
    if "deletionVectors" in (table.protocol().reader_features or []):
        try:
            num_marked = pa.table(table.deletion_vectors().read_all()).num_rows
        except DeltaError:
            num_marked = 1
        if num_marked:
            raise EmbedError(
                f"embed.input.path: the Delta table {path} has deletion vectors, that is, its files hold deleted rows; "
                "run REORG TABLE ... APPLY (PURGE) on it"
            )
    for name in wanted_columns(spec):
        if name in table.metadata().partition_columns:
            raise EmbedError(
                f"embed.input names column {name}, by which the Delta table {path} is partitioned, so that its files do not "
                "hold it; leave it out, or write the table without that partition"
            )
    root = path.rstrip("/") + "/"
    actions = pa.table(table.get_add_actions(flatten=True)).select(["path", "size_bytes"]).to_pylist()
    files = []
    for action in actions:
        name = unquote(action["path"])
        at = name.removeprefix("file://") if "://" in name or name.startswith("/") else root + name
        files.append(InputFile(at, name, str(action["size_bytes"]), "parquet", immutable=True))
    if not files:
        raise EmbedError(f"embed.input.path: the Delta table {path} has no rows")
    return sorted(files, key=lambda file: file.path)
