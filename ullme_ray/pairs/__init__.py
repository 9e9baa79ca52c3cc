"""Training rows: from files of many kinds to a random-access table of checked (query, positives, negatives).

One row is one query. Its shapes, in JSON keys or in columns, may be mixed within a file:

- `query` (or sentence-transformers' `anchor`): text.
- `positive` or `positives`: text or list of texts; also `positive_1`, `positive_2`, ...; at least one in all.
- `negative` or `negatives`: the same for hard negatives, `negative_1` ... `negative_n` too; may be absent.
- `positive_passages`, `negative_passages` (MS MARCO as tevatron has it): lists of `{title, text}`; title and text are joined.
- `scores`, for distillation: one teacher score per passage, positives first. sentence-transformers' `score`, `label`, `labels`
  are taken where they can mean only one thing: one number per passage; with one positive, a list of one margin (positive -
  negative) per negative; with one positive and one negative, a single float, their margin.

Null is absent. CSV cells are text, an empty cell is absent, and the columns with plural names hold JSON lists.

rows.py says what a row is, readers.py reads one file, listing.py finds the files, store.py keeps the rows on local disk: each
source is read once per machine as a stream, and then costs no memory however many rows it has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ullme_ray import storage
from ullme_ray.errors import DataError
from ullme_ray.pairs.listing import DataFiles, list_data
from ullme_ray.pairs.rows import TOO_FEW_NEGATIVES, Pair
from ullme_ray.pairs.store import SourceFiles, StoredSource, open_store
from ullme_ray.spec.job import JobSpec, PromptsSpec, SourceSpec, TrainSpec
from ullme_ray.spec.run_folder import RunFolder

__all__ = ["Pair", "Source", "check_sources", "data_fingerprint", "read_sources"]


@dataclass(frozen=True)
class Source:
    """All usable rows of one `train.data` entry, in the order of its files, and why others were left out."""

    path: str
    weight: float
    pairs: Sequence[Pair]
    prompts: PromptsSpec | None = None
    in_batch_negatives: bool = True
    fingerprint: str = ""  # of the usable rows' content and order
    rejected: dict[str, int] = field(default_factory=dict)  # reason -> rows
    notes: tuple[str, ...] = ()  # sentences for a person


def read_sources(job: JobSpec, *, publish_rejects: bool = True) -> list[Source]:
    """Opens every source of the job, after reading it into this machine's cache if no process here has done so.

    Args:
        publish_rejects: put the list of rejected rows into the run's folder; one rank is enough.

    Raises:
        DataError: a source has no file, a file cannot be read to its end, no row of it is usable, or more than
            `train.max_rejected_share` of its rows were rejected.
        StorageError: the store cannot be reached, or the cache cannot be written.
    """
    train, run = job.train, RunFolder.of(job)
    assert train is not None
    listed = [list_data(run.resolve(source.path), i) for i, source in enumerate(train.data)]
    wanted = [
        SourceFiles(data.files, _least_negatives(train, spec), _needs_scores(train)) for spec, data in zip(train.data, listed)
    ]
    store = open_store(wanted)
    complaints = [_complaint(job, i, stored) for i, stored in enumerate(store.sources)]
    if publish_rejects or any(complaints):
        if store.rejects is not None:
            storage.put_file(store.rejects, run.rejects)
        else:
            storage.remove(run.rejects)
    if any(complaints):
        raise DataError("\n".join(filter(None, complaints)))
    return [
        Source(
            run.resolve(spec.path),
            spec.weight,
            stored.pairs,
            spec.prompts,
            spec.in_batch_negatives,
            stored.fingerprint,
            stored.rejected,
            tuple(_notes(job, i, data, stored)),
        )
        for i, (spec, data, stored) in enumerate(zip(train.data, listed, store.sources))
    ]


def _complaint(job: JobSpec, position: int, stored: StoredSource) -> str | None:
    """Why a source must not be trained on."""
    train, run = job.train, RunFolder.of(job)
    assert train is not None
    name = f"train.data.{position}.path = {run.resolve(train.data[position].path)}"
    if not stored.num_rows:
        return f"{name} holds no row at all; check the files"
    if not stored.pairs:
        return f"{name} holds no usable row; all {stored.num_rows} were left out ({stored.reasons}), see {run.rejects}"
    faulty = sum(number for reason, number in stored.rejected.items() if reason != TOO_FEW_NEGATIVES)  # that one is no fault
    if faulty > train.max_rejected_share * stored.num_rows:
        return (
            f"{name}: {faulty} of {stored.num_rows} rows were rejected ({stored.reasons}), which is more than "
            f"train.max_rejected_share = {train.max_rejected_share}; repair what {run.rejects} lists, or raise the share"
        )
    return None


def _notes(job: JobSpec, position: int, data: DataFiles, stored: StoredSource) -> Iterator[str]:
    name = f"train.data.{position}"
    if data.note:
        yield f"{name}: {data.note}"
    if stored.rejected:
        left_out = stored.num_rows - len(stored.pairs)
        yield f"{name}: {left_out} of {stored.num_rows} rows left out ({stored.reasons}); listed in {RunFolder.of(job).rejects}"
    if stored.dropped_negatives:
        yield f"{name}: {stored.dropped_negatives} hard negatives dropped that another row of the same query calls positive"


def check_sources(job: JobSpec) -> None:
    """Before long work: every source names at least one file, and only files of a known kind.

    Raises:
        DataError: naming the source.
    """
    assert job.train is not None
    for position, source in enumerate(job.train.data):
        list_data(RunFolder.of(job).resolve(source.path), position)


def data_fingerprint(sources: Sequence[Source]) -> str:
    """Tells whether a resumed run would see other rows, or the same in another order; where they lie does not matter."""
    return hashlib.sha256("\n".join(source.fingerprint for source in sources).encode()).hexdigest()


def _needs_scores(train: TrainSpec) -> bool:
    return train.objective.distill_weight > 0


def _least_negatives(train: TrainSpec, source: SourceSpec) -> int:
    """Hard negatives below which a row is left out. Other rows' passages fill up only where they may be negatives, unscored."""
    may_fill = train.missing_negatives == "sample" and source.in_batch_negatives and not _needs_scores(train)
    return 0 if may_fill else train.negatives_per_query
