"""What an embed run did, as numbers for programs and as a few lines for people."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from ullme_ray import storage
from ullme_ray.progress import duration
from ullme_ray.spec.job import JobSpec
from ullme_ray.spec.run_folder import RunFolder

GAVE_WAY = "a run that listed the corpus later was faster; the table stays as that one left it"


@dataclass(frozen=True)
class EmbedReport:
    """`rows` = `rows_embedded` + `rows_copied` + `rows_reused` + `rows_dead`. Work and rates are of this run alone."""

    files: int
    files_new: int  # a plain text counts as new or changed with the whole group that it is read in
    files_changed: int  # changed themselves, or embedded another way than before
    files_removed: int  # of plain texts, groups
    units_total: int
    units_embedded: int  # read in this run
    units_reused: int  # whose part was there already
    rows: int  # of the corpus
    rows_embedded: int
    rows_copied: int  # read, and found in the table by their text
    rows_reused: int  # not read: in parts that were there already
    rows_dead: int
    table_rows: int  # more than rows where documents are cut into chunks
    truncated_rows: int  # of those written in this run
    duplicate_ids: int | None  # ids that stand in the table for more than one row of the corpus; None: nothing has changed
    duplicate_examples: tuple[str, ...]
    tokens: int  # through the model
    padding_share: float  # of the positions that went through the model
    seconds: float
    plan_seconds: float  # of these: listing the corpus, counting rows, comparing with the table
    commit_seconds: float
    tokens_per_s: float
    actors: int  # that embedded
    model_tokens_per_s: float | None  # of all actors while they embedded; of an earlier run where this one embedded nothing
    rows_per_s: float  # embedded or copied
    mfu: float | None  # of the actors while they embedded; None where they had nothing to do
    retries: int  # units begun again after a process died
    bytes_written: int
    table_bytes: int
    cost_per_million_rows: float | None  # of embedded and copied rows; None without embed.price_per_hour
    table: str
    version: int
    gave_way: bool  # the table is as a run left it that listed the corpus later and was faster
    fingerprint: str

    def to_text(self) -> str:
        lines = [
            f"{self.rows:,} rows in {self.files:,} files = {self.rows_embedded:,} embedded + {self.rows_copied:,} copied"
            f" + {self.rows_reused:,} reused + {self.rows_dead:,} unusable"
        ]
        if self.units_embedded:
            mfu = f", MFU {self.mfu:.1%}" if self.mfu is not None else ""
            retries = f", {self.retries:,} retries" if self.retries else ""
            rates = f"{self.tokens_per_s:,.0f} tokens/s, {self.rows_per_s:,.0f} rows/s, {self.padding_share:.1%} padding{mfu}"
            written = f"{size_text(self.bytes_written)} written{retries}"
            lines.append(f"{self.tokens:,} tokens in {duration(self.seconds)} ({rates}), {written}")
        if self.cost_per_million_rows is not None and self.units_embedded:
            lines.append(f"{self.cost_per_million_rows:,.2f} per million rows at embed.price_per_hour")
        if self.truncated_rows:
            lines.append(f"{self.truncated_rows:,} rows were cut to the model's length; embed.input.chunks would keep all text")
        if self.duplicate_ids:
            shown = ", ".join(self.duplicate_examples)
            lines.append(f"{self.duplicate_ids:,} ids stand for more than one row, such as {shown}; all rows are in the table")
        if self.gave_way:
            lines.append(GAVE_WAY)
        lines.append(f"table version {self.version}: {self.table_rows:,} rows, {size_text(self.table_bytes)}, in {self.table}")
        return "\n".join(lines)


def size_text(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def report_path(job: JobSpec) -> str:
    return storage.join(RunFolder.of(job).root, "embed_report.json")


def save_report(job: JobSpec, report: EmbedReport) -> None:
    storage.write_text(report_path(job), json.dumps(asdict(report), indent=2) + "\n")


def last_rate(job: JobSpec) -> float | None:
    """Tokens/s of the actors in the job's last run that embedded something; None where there was none."""
    path = report_path(job)
    told = json.loads(storage.read_text(path)) if storage.exists(path) else {}
    return told.get("model_tokens_per_s") or told.get("tokens_per_s") or None
