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
from collections.abc import Sequence
from dataclasses import dataclass, field

from ullme_ray import storage
from ullme_ray.errors import DataError
from ullme_ray.pairs.listing import list_data
from ullme_ray.pairs.rows import TOO_FEW_NEGATIVES, Pair
from ullme_ray.pairs.store import SourceFiles, open_store
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
    store = open_store(
        [SourceFiles(data.files, _least_negatives(train, s), _needs_scores(train)) for s, data in zip(train.data, listed)]
    )
    sources, errors = [], []
    for i, (spec, data, kept) in enumerate(zip(train.data, listed, store.sources)):
        name = f"train.data.{i}.path = {run.resolve(spec.path)}"
        total = len(kept.pairs) + sum(kept.rejected.values())
        faulty = sum(number for reason, number in kept.rejected.items() if reason != TOO_FEW_NEGATIVES)
        reasons = sorted(kept.rejected.items(), key=lambda item: (-item[1], item[0]))
        commonest = "; ".join(f"{number} x {reason}" for reason, number in reasons[:3])
        notes = [f"train.data.{i}: {data.note}"] if data.note else []
        if kept.rejected:
            notes.append(
                f"train.data.{i}: {total - len(kept.pairs)} of {total} rows left out ({commonest}); listed in {run.rejects}"
            )
        if kept.dropped_negatives:
            notes.append(f"train.data.{i}: {kept.dropped_negatives} hard negatives dropped that another row calls positive")
        if not total:
            errors.append(f"{name} holds no row at all; check the files")
        elif not kept.pairs:
            errors.append(f"{name} holds no usable row; all {total} were left out ({commonest}), see {run.rejects}")
        elif faulty > train.max_rejected_share * total:
            errors.append(
                f"{name}: {faulty} of {total} rows were rejected ({commonest}), which is more than "
                f"train.max_rejected_share = {train.max_rejected_share}; repair what {run.rejects} lists, or raise the share"
            )
        sources.append(
            Source(
                run.resolve(spec.path),
                spec.weight,
                kept.pairs,
                spec.prompts,
                spec.in_batch_negatives,
                kept.fingerprint,
                kept.rejected,
                tuple(notes),
            )
        )
    if publish_rejects or errors:
        if store.rejects is not None:
            storage.put_file(store.rejects, run.rejects)
        else:
            storage.remove(run.rejects)
    if errors:
        raise DataError("\n".join(errors))
    return sources


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
