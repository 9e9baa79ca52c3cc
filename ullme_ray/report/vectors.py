"""What a report says of vectors: lengths and a map from the table, similarities of held-out pairs from the model.

The table is sampled: at most `_PARTS` of its parts are opened, so a billion rows cost what a million do. Similarities load the
model and encode a few hundred texts.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ullme_ray.errors import UllmeError
from ullme_ray.report.inputs import Missing
from ullme_ray.retrieval.held_out import read_held_out
from ullme_ray.retrieval.local_set import LocalSet, read_local_set
from ullme_ray.spec.job import JobSpec
from ullme_ray.spec.run_folder import RunFolder
from ullme_ray.table import id_column, open_table
from ullme_ray.vectors import format_of

MAP_POINTS = 1000
_PARTS, _MAP_PARTS = 64, 8
_GROUPS = 6  # named ones; the rest is one more
_EXCERPT_CHARS = 180
_BATCH = 32  # texts of a padded batch that padding is told for
_STREAM = 7  # an independent random stream of the job's seed


@dataclass(frozen=True)
class TableSample:
    """Rows of the embeddings table: lengths of many, vectors and texts of some."""

    table_rows: int
    num_tokens: np.ndarray  # (M,)
    truncated: int  # of these
    vectors: np.ndarray  # (N, D) float32, unit length
    ids: tuple[str, ...]
    texts: tuple[str, ...]  # an excerpt each; empty where the table has no text
    group_name: str  # the column that the groups come from, or ""
    group_labels: tuple[str, ...]
    groups: tuple[int, ...]  # of each of the N rows


@dataclass(frozen=True)
class Similarity:
    """Cosines of held-out queries with their own passages and with others', by one model."""

    model: Literal["base", "trained"]
    positives: np.ndarray  # (n,)
    negatives: np.ndarray  # (m,)
    alignment: float
    uniformity: float | None  # of a single passage there is none


def sample_table(job: JobSpec) -> TableSample:
    """Reads a seeded sample of the job's table.

    Raises:
        Missing: no table, an unreadable one, or one without rows.
    """
    if job.embed is None:
        raise Missing("the job has no embed section")
    generator = np.random.default_rng([job.seed, _STREAM])
    try:
        table = open_table(RunFolder.of(job).resolve(job.embed.output.path))
        parts = sorted(table.to_pyarrow_dataset().get_fragments(), key=lambda part: str(part.path))
        table_rows = sum(part.count_rows() for part in parts)
        parts = [parts[i] for i in generator.permutation(len(parts))[:_PARTS]]
        lengths = [part.to_table(columns=["num_tokens", "truncated"]) for part in parts]
        rows = _map_rows(parts[:_MAP_PARTS], job, generator)
    except UllmeError as error:
        raise Missing(str(error)) from None
    except (OSError, KeyError, ValueError) as error:
        raise Missing(f"the table cannot be read ({str(error).splitlines()[0]}); run `ullme-ray embed` again") from None
    if not rows:
        raise Missing("the embeddings table has no rows")
    name, labels, groups = _groups([row["columns"] for row in rows])
    return TableSample(
        table_rows=table_rows,
        num_tokens=np.concatenate([part["num_tokens"].to_numpy() for part in lengths]),
        truncated=sum(int(np.sum(part["truncated"].to_numpy())) for part in lengths),
        vectors=np.stack([row["vector"] for row in rows]),
        ids=tuple(row["id"] for row in rows),
        texts=tuple(row["text"] for row in rows),
        group_name=name,
        group_labels=labels,
        groups=groups,
    )


def _map_rows(parts: Sequence[Any], job: JobSpec, generator: np.random.Generator) -> list[dict[str, Any]]:
    assert job.embed is not None
    spec, found = job.embed.input, []
    for part in parts:
        names = part.physical_schema.names
        shown = [name for name in (id_column(spec), *spec.columns) if name in names]
        content = part.to_table(columns=[*shown, "embedding"])
        take = np.sort(generator.permutation(content.num_rows)[: -(-MAP_POINTS // len(parts))])
        content = content.take(take)
        if not content.num_rows:
            continue
        form = format_of(part.physical_schema.metadata)
        vectors = form.decode(form.from_arrow(content["embedding"].combine_chunks()))  # (n, D)
        for row, vector in zip(content.select(shown).to_pylist(), vectors):
            texts = [str(row[name]) for name in spec.text if row.get(name)]
            others = {name: value for name, value in row.items() if name not in spec.text and name != id_column(spec)}
            text = textwrap.shorten("\n".join(texts), _EXCERPT_CHARS, placeholder=" ...")
            found.append({"id": str(row[id_column(spec)]), "text": text, "vector": vector, "columns": others})
    return found


def _groups(rows: Sequence[dict[str, Any]]) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
    """The column with the fewest different values, if any has few enough to colour by; its most frequent values first."""
    counts = {name: Counter(str(row[name]) for row in rows) for name in (rows[0] if rows else {})}
    fitting = {name: count for name, count in counts.items() if 2 <= len(count) <= max(2, len(rows) // 2)}
    if not fitting:
        return "", (), (0,) * len(rows)
    name = min(fitting, key=lambda column: len(fitting[column]))
    top = [value for value, _ in fitting[name].most_common(_GROUPS)]
    labels = (*top, "others") if len(fitting[name]) > _GROUPS else tuple(top)
    place = {value: number for number, value in enumerate(top)}
    return name, labels, tuple(place.get(str(row[name]), len(top)) for row in rows)


def flatten(vectors: np.ndarray, *, seed: int) -> tuple[str, np.ndarray]:
    """Two dimensions for the eye: t-SNE by cosine, or PCA where there are too few rows for it. (method, (N, 2))."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if len(vectors) < 2:
        return "PCA", np.zeros((len(vectors), 2))
    if len(vectors) < 50:
        width = min(2, *vectors.shape)
        flat = PCA(width, random_state=seed).fit_transform(vectors)
        return "PCA", np.pad(flat, ((0, 0), (0, 2 - width)))
    return "t-SNE", TSNE(init="pca", perplexity=min(30, len(vectors) // 4), random_state=seed).fit_transform(vectors)


def padding_of_batches(num_tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Share of padding in every batch of 32 texts, as they come and sorted by length: what the engine saves itself."""
    return {"as they come": _padding(num_tokens), "sorted by length": _padding(np.sort(num_tokens))}


def _padding(num_tokens: np.ndarray) -> np.ndarray:
    batches = [num_tokens[start : start + _BATCH] for start in range(0, len(num_tokens), _BATCH)]
    return np.array([1.0 - batch.sum() / (batch.max() * len(batch)) for batch in batches if batch.max() > 0])


def measure_similarity(job: JobSpec, num_queries: int) -> list[Similarity]:
    """Held-out queries and their passages through the trained model, and through its base where the job trains.

    Raises:
        Missing: told to load no model, no held-out set, or no model to be had.
    """
    if not num_queries:
        raise Missing("no model was loaded, as asked (--queries 0)")
    held_out = _held_out(job)
    generator = np.random.default_rng([job.seed, _STREAM])
    ids = sorted(held_out.queries)
    chosen = [ids[i] for i in np.sort(generator.permutation(len(ids))[:num_queries])]
    right = {query: _relevant(held_out, query) for query in chosen}
    chosen = [query for query in chosen if right[query]]
    if len(chosen) < 2:
        raise Missing("the held-out set has fewer than two queries with a passage")
    texts = list(dict.fromkeys(right[query][0] for query in chosen))  # one that several queries share is a passage once
    own = np.array([texts.index(right[query][0]) for query in chosen])  # (N,)
    relevant = np.array([[text in right[query] for text in texts] for query in chosen])  # (N, P)
    from ullme_ray.model import open_encoder

    found = []
    models: tuple[Literal["base", "trained"], ...] = ("base", "trained") if job.train else ("base",)
    for which in models:
        try:
            encoder = open_encoder(job, which=which)
        except UllmeError as error:
            if which == models[-1]:
                raise Missing(str(error)) from None
            continue  # the base may be gone once a model is trained
        queries = encoder.encode([held_out.queries[query] for query in chosen], "query")
        passages = encoder.encode(texts, "passage")
        del encoder
        found.append(similarity(which, queries, passages, own, relevant))
    return found


def _relevant(held_out: LocalSet, query: str) -> list[str]:
    """The texts that answer a query; one judged 0 is there to be told from them."""
    return [held_out.passages[id_] for id_, score in held_out.qrels[query].items() if score > 0 and id_ in held_out.passages]


def similarity(
    which: Literal["base", "trained"], queries: np.ndarray, passages: np.ndarray, own: np.ndarray, relevant: np.ndarray
) -> Similarity:
    """From unit vectors of queries (N, D) and of passages (P, D), each passage once.

    Alignment and uniformity as Wang and Isola (2020) define them, with alpha = 2 and t = 2: lower is better for both.

    Args:
        own: (N,), the passage of each query.
        relevant: (N, P), which pairs are no negatives.
    """
    cosines = queries @ passages.T  # (N, P)
    between = np.clip(passages @ passages.T, -1, 1)[np.triu_indices(len(passages), 1)]  # squared distance is 2 - 2 cos
    positives = cosines[np.arange(len(queries)), own]
    return Similarity(
        which,
        positives,
        cosines[~relevant],
        alignment=float(np.mean(2 - 2 * positives)),
        uniformity=float(np.log(np.mean(np.exp(-2 * (2 - 2 * between))))) if len(between) else None,
    )


def _held_out(job: JobSpec) -> LocalSet:
    """The first held-out set of the job that is there.

    Raises:
        Missing: with the reason.
    """
    sets = job.evaluate.local if job.evaluate else ()
    position = next((number for number, local in enumerate(sets) if not local.table), None)
    try:
        if position is not None:
            return read_held_out(job, position)
        if job.train and job.train.validation:
            return read_local_set(RunFolder.of(job).resolve(job.train.validation.path))
    except UllmeError as error:
        raise Missing(str(error)) from None
    raise Missing("the job names no held-out set with passages of its own (evaluate.local or train.validation)")
