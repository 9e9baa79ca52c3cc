"""What `ullme-ray table` tells of a job's table: versions, rows, size, model, dead letters; and whether its vectors are true.

The overview costs the table's log and a listing. Verifying reads some parts and the units of the corpus that they came from,
embeds a sample of their texts again and compares.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ullme_ray import storage
from ullme_ray.embed.commit import active_parts, commit_note
from ullme_ray.embed.parts import Part, PartSettings, count_dead_letters, dead_letters_path, reading_part
from ullme_ray.embed.planning import list_input
from ullme_ray.embed.reading import column_types, read_unit
from ullme_ray.embed.report import size_text
from ullme_ray.embed.steps import EmbedContext, tokenize
from ullme_ray.embed.units import InputFile, Unit, embed_section
from ullme_ray.errors import EmbedError
from ullme_ray.spec.job import JobSpec
from ullme_ray.spec.run_folder import RunFolder
from ullme_ray.table import PROVENANCE_KEY, id_column, open_table
from ullme_ray.vectors import VectorFormat, find_ranges

_VERSIONS_SHOWN = 10
_TEXTS_PER_PART = 16
_LEAST_COSINE = {"float32": 0.99999, "bfloat16": 0.999}  # another batch rounds otherwise, but not by more


@dataclass(frozen=True)
class TableVersion:
    version: int
    time: str  # UTC
    fingerprint: str | None  # of the model; None for a version that only removed old files


@dataclass(frozen=True)
class TableOverview:
    table: str
    versions: tuple[TableVersion, ...]  # newest first, ten at most
    rows: int
    parts: int
    num_bytes: int
    fingerprint: str | None  # of the newest version's model
    current_model: bool  # whether that is the model that the job has now
    dead_letters: int
    reasons: tuple[tuple[str, int], ...]  # of dead letters, most frequent first

    def to_text(self) -> str:
        state = "the job's model" if self.current_model else "not the job's present model: the next run embeds all again"
        lines = [
            f"{self.table}: {self.rows:,} rows in {self.parts:,} parts, {size_text(self.num_bytes)}",
            f"model {(self.fingerprint or 'unknown')[:16]} ({state})",
            f"{self.dead_letters:,} dead letters",
            *(f"  {count:,} x {reason}" for reason, count in self.reasons),
            "versions:",
            *(f"  {v.version}  {v.time}  {(v.fingerprint or '-')[:16]}" for v in self.versions),
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Verification:
    rows: int  # compared
    parts: int
    parts_skipped: int  # whose input is no longer there as it was
    lowest_cosine: float

    def to_text(self) -> str:
        skipped = f" ({self.parts_skipped:,} parts skipped, for their input has changed)" if self.parts_skipped else ""
        return f"verified {self.rows:,} rows of {self.parts:,} parts: lowest cosine {self.lowest_cosine:.6f}{skipped}"


def describe_table(job: JobSpec) -> TableOverview:
    """Looks at the newest version of the job's table.

    Raises:
        EmbedError: a file of dead letters is damaged.
        StorageError: there is no table, or it cannot be read.
    """
    from ullme_ray.model import encoder_fingerprint

    folder = RunFolder.of(job).resolve(embed_section(job).output.path)
    table = open_table(folder)
    parts = active_parts(table)
    versions = tuple(_version(entry) for entry in table.history(_VERSIONS_SHOWN))
    fingerprint = next((v.fingerprint for v in versions if v.fingerprint), None)
    dead = {key: count for key, count in count_dead_letters(folder).items() if key in parts}
    reasons: Counter[str] = Counter()
    for key, count in dead.items():
        with reading_part(storage.join(folder, dead_letters_path(key, count))) as stream:
            reasons.update(pq.read_table(stream, columns=["reason"])["reason"].to_pylist())
    return TableOverview(
        table=folder,
        versions=versions,
        rows=sum(part.num_rows for part in parts.values()),
        parts=len(parts),
        num_bytes=sum(part.num_bytes for part in parts.values()),
        fingerprint=fingerprint,
        current_model=fingerprint == encoder_fingerprint(job),
        dead_letters=sum(dead.values()),
        reasons=tuple(reasons.most_common(10)),
    )


def _version(entry: dict[str, Any]) -> TableVersion:
    time = datetime.fromtimestamp(entry["timestamp"] / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
    return TableVersion(int(entry["version"]), time, commit_note(entry).get("fingerprint"))


def verify_table(job: JobSpec, *, num_rows: int) -> Verification:
    """Embeds about `num_rows` rows of the table again, chosen by the job's seed, in this process.

    Raises:
        EmbedError: a vector is not what the job's model gives, or a part does not hold the rows it should.
        StorageError: there is no table.
    """
    from ullme_ray.model import open_encoder

    embed, encoder = embed_section(job), open_encoder(job)
    folder = RunFolder.of(job).resolve(embed.output.path)
    parts = [part for part in active_parts(open_table(folder)).values() if part.num_rows]
    files = {file.path: file for file in list_input(job)}
    types = column_types(next(iter(files.values())), embed.input)
    asked = VectorFormat.of(embed.output)
    vectors = (find_ranges(folder, encoder.fingerprint, asked) or asked) if asked.is_scaled else asked
    context = EmbedContext(job, folder, PartSettings(embed.input, types, encoder.fingerprint, vectors))
    choice = random.Random(job.seed)
    choice.shuffle(parts)
    cosines: list[float] = []
    compared = skipped = 0
    for part in parts:
        if len(cosines) >= num_rows:
            break
        unit = _unit_of(part, folder, files, context.settings)
        if unit is None:
            skipped += 1
            continue
        compared += 1
        cosines += _compare(part, unit, context, encoder, choice, num_rows - len(cosines))
    if not cosines:
        raise EmbedError("no part could be verified: the corpus or the model has changed since; run `ullme-ray embed` first")
    if not min(cosines) >= min(_LEAST_COSINE[encoder.settings.dtype], vectors.least_cosine):
        raise EmbedError(
            f"the table {folder} holds a vector that differs from the model's (cosine {min(cosines):.5f}); remove the table's "
            f"folder and run `ullme-ray embed` to make it anew"
        )
    return Verification(len(cosines), compared, skipped, min(cosines))


def _unit_of(part: Part, folder: str, files: dict[str, InputFile], settings: PartSettings) -> Unit | None:
    """The rows of the corpus that a part was made from, if they are still there."""
    with reading_part(storage.join(folder, part.name)) as stream:
        made = json.loads(pq.read_schema(stream).metadata[PROVENANCE_KEY])
    file = files.get(made["file"])
    if file is None:
        return None
    start, stop = made["rows"]
    unit = Unit(file, start, stop, made["offset"])
    return unit if settings.key_of(unit) == part.key else None


def _compare(part: Part, unit: Unit, context: EmbedContext, encoder: Any, choice: random.Random, most: int) -> list[float]:
    """Cosines of some of a part's vectors with those that its texts have now."""
    with reading_part(storage.join(context.folder, part.name)) as stream:
        stored = pq.read_table(stream)
    rows = read_unit(unit, context.settings.input, context.settings.types)
    first_chunks = np.flatnonzero(stored["chunk"].to_numpy() == 0)
    firsts = stored.take(pa.array(first_chunks))
    for column in (id_column(context.settings.input), "content_hash"):
        if firsts[column].to_pylist() != rows.good[column].to_pylist():
            raise EmbedError(f"{part.name} in {context.folder} does not hold the rows of {unit.file.path} that it should")
    documents = sorted(choice.sample(range(len(rows.texts)), min(_TEXTS_PER_PART, most, len(rows.texts))))
    tokens, text_of_chunk = tokenize([rows.texts[document] for document in documents], context)
    form = context.settings.vectors
    vectors = form.decode(form.encode(encoder.embed_tokens(tokens)))  # (M, D)
    width = np.bincount(text_of_chunk, minlength=len(documents))
    places = np.concatenate([first_chunks[d] + np.arange(n) for d, n in zip(documents, width)])
    kept = form.decode(form.from_arrow(stored["embedding"].combine_chunks().take(pa.array(places))))  # (M, D)
    return [float(cosine) for cosine in (kept * vectors).sum(axis=1)]
