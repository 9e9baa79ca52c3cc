"""The two steps of a unit on Ray: read and tokenize (CPU task), then embed and write the part (actor with the model).

Reading looks up every text in the table's index: what is known is copied, and of equal new texts one goes to the model.
An actor writes what it embedded while it embeds the next unit, and takes no further one before: a crash costs the work on those
two, and vectors never pass through Ray's object store.
Between steps a unit is one row of bytes, so that Ray Data can neither split nor mix units. An error meant for the user travels
the same way, for Ray Data would bury it in its own.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray

from ullme_ray.embed.index import ContentIndex
from ullme_ray.embed.parts import ChunkRows, Part, PartSettings, build_part, write_dead_letters, write_part
from ullme_ray.embed.reading import read_unit
from ullme_ray.embed.units import Unit, embed_section
from ullme_ray.errors import EmbedError, UllmeError
from ullme_ray.ray_data import Attempts
from ullme_ray.spec.job import JobSpec

if TYPE_CHECKING:
    from ullme_ray.model import Encoder, TextTokenizer, TokenBudget, Tokens

Row = dict[str, Any]


@dataclass(frozen=True)
class EmbedContext:
    """What every step needs to know of the run."""

    job: JobSpec
    folder: str  # of the table
    settings: PartSettings
    index: ContentIndex | None = None  # of what the table holds; None: nothing can be copied

    def close(self) -> None:
        """Removes what the run keeps on the disks of the nodes."""
        if self.index is not None:
            self.index.close()


@dataclass(frozen=True)
class UnitTexts:
    """A unit on its way to the actor; ids flat, as one array costs a tenth of nested lists."""

    good: pa.Table  # one row per document
    copied: ChunkRows | None  # of documents that the table holds already
    new_documents: np.ndarray  # (N,) places in `good` of the others
    text_of: np.ndarray  # (N,) which of the distinct texts each of them is
    text_of_chunk: np.ndarray  # (M,) ascending
    ids: np.ndarray  # int32, all M chunks one after another
    lengths: np.ndarray  # (M,) int32
    prompt_length: int
    truncated: np.ndarray  # (M,) bool
    num_dead: int
    retries: int


@dataclass(frozen=True)
class Forward:
    """What the model did for a unit."""

    num_tokens: int
    num_positions: int  # padding included
    seconds: float
    flop: float  # of the unit's tokens, padding not counted
    peak_flop: float  # what the device could have done in that time
    actor: str
    not_compiled: str | None  # why the layers were not compiled though the job asks for it


@dataclass(frozen=True)
class Outcome:
    """What became of a unit. Its rows = embedded + copied + dead."""

    part: Part
    num_embedded: int
    num_copied: int
    num_dead: int
    num_truncated: int  # of the table's rows
    forward: Forward
    retries: int


def unit_row(unit: Unit) -> Row:
    """The row in which a unit enters the pipeline."""
    return {"unit": pickle.dumps(unit), "work": pickle.dumps(None)}


def outcome_of(row: Row) -> Outcome:
    """What a row holds that leaves the pipeline.

    Raises:
        UllmeError: whatever a step raised on purpose.
    """
    work = pickle.loads(row["work"])
    if isinstance(work, UllmeError):
        raise work
    assert isinstance(work, Outcome)
    return work


def _advance(row: Row, step: Callable[[Unit, Any], Any]) -> Row:
    """Takes a unit one step on, unless an earlier one failed."""
    work = pickle.loads(row["work"])
    if not isinstance(work, UllmeError):
        try:
            work = step(pickle.loads(row["unit"]), work)
        except UllmeError as error:
            work = error
    return {"unit": row["unit"], "work": pickle.dumps(work)}


@contextlib.contextmanager
def _counted(step: str, unit: Unit, attempts: Attempts) -> Iterator[int]:
    """Gives how often this step of the unit was begun before."""
    where = f"rows {unit.start} to {unit.stop} of {unit.file.path}"
    with attempts.at(f"{step} {where}", shown=f"{step} {where}") as attempt:
        yield attempt - 1


def read_step(row: Row, context: EmbedContext, attempts: Attempts) -> Row:
    """Unit -> its good rows, copied or as tokens; the bad ones go to the dead letters."""

    def read(unit: Unit, _: None) -> UnitTexts:
        with _counted("reading", unit, attempts) as retries:
            return _read(unit, context, retries)

    return _advance(row, read)


def _read(unit: Unit, context: EmbedContext, retries: int) -> UnitTexts:
    rows = read_unit(unit, context.settings.input, context.settings.types)
    write_dead_letters(context.folder, context.settings.key_of(unit), rows.dead)
    hashes = rows.good["content_hash"].to_pylist()
    copied = context.index.find(hashes).read(hashes) if context.index is not None and hashes else None
    is_new = np.ones(len(hashes), bool)
    if copied is not None:
        is_new[copied.document] = False
    new_documents = np.flatnonzero(is_new)
    distinct = {hashes[document]: rows.texts[document] for document in new_documents}  # each text once, in order
    number = {content_hash: place for place, content_hash in enumerate(distinct)}
    tokens, text_of_chunk = tokenize(list(distinct.values()), context)
    lengths = np.array([len(ids) for ids in tokens.input_ids], np.int32)
    return UnitTexts(
        good=rows.good,
        copied=copied,
        new_documents=new_documents,
        text_of=np.array([number[hashes[document]] for document in new_documents], np.int64),
        text_of_chunk=text_of_chunk,
        ids=np.concatenate([np.array(i, np.int32) for i in tokens.input_ids]) if len(lengths) else np.empty(0, np.int32),
        lengths=lengths,
        prompt_length=tokens.prompt_length,
        truncated=np.array(tokens.truncated, bool),
        num_dead=rows.dead.num_rows,
        retries=retries,
    )


def tokenize(texts: list[str], context: EmbedContext) -> tuple[Tokens, np.ndarray]:
    """All chunks of the texts, and the number of the text that each of them is from (M,), ascending."""
    tokenizer, chunks = _tokenizer(context.job, context.settings.fingerprint), context.settings.input.chunks
    if chunks is not None:
        return tokenizer.tokenize_chunks(texts, "passage", chunk_tokens=chunks.tokens, overlap=chunks.overlap)
    tokens = tokenizer.tokenize(texts, "passage")
    return tokens, np.arange(len(tokens.input_ids))


@lru_cache(maxsize=1)
def _tokenizer(job: JobSpec, fingerprint: str) -> TextTokenizer:
    """Loaded once per worker process and model."""
    from ullme_ray.model import open_tokenizer

    return open_tokenizer(job)


class EmbedActor:
    """Holds the model; one call embeds one unit and writes its part. Two calls at a time overlap these, on one model."""

    CALLS_AT_ONCE = 2

    def __init__(self, context: EmbedContext, attempts: Attempts) -> None:
        self._context = context
        self._attempts = attempts
        self._embedding = threading.Lock()
        self._name = ray.get_runtime_context().get_actor_id() or ""
        self._encoder: Encoder | UllmeError
        try:
            with attempts.at(f"load in {self._name}", shown="loading the model"):
                self._encoder = _open_encoder(context)
                self._budget = _budget(context, self._encoder)
                self._not_compiled = _compile(self._encoder, self._budget) if embed_section(context.job).compile else None
                self._flop_per_token, self._peak = _speed_of(self._encoder)
        except UllmeError as error:
            self._encoder = error  # goes out with the first unit; Ray would start the actor again and again

    def __call__(self, row: Row) -> Row:
        return _advance(row, self._attempt)

    def _attempt(self, unit: Unit, texts: UnitTexts) -> Outcome:
        with _counted("embedding", unit, self._attempts) as retries:
            with self._embedding:
                vectors, forward = self._embed(unit, texts)
                if retries:  # alone this time: one unit that ends its process must not end the writing of another every time
                    return _write(unit, texts, vectors, forward, retries, self._context)
            return _write(unit, texts, vectors, forward, retries, self._context)

    def _embed(self, unit: Unit, texts: UnitTexts) -> tuple[np.ndarray, Forward]:
        """The vectors (M, D) float32, and what they cost."""
        if isinstance(self._encoder, UllmeError):
            raise self._encoder
        from ullme_ray.model import Tokens

        lengths = texts.lengths
        input_ids = [ids.tolist() for ids in np.split(texts.ids, np.cumsum(lengths)[:-1])] if len(lengths) else []
        tokens = Tokens(input_ids, texts.prompt_length, texts.truncated.tolist())
        started, positions = time.perf_counter(), self._budget.positions
        vectors = self._encoder.embed_tokens(tokens, tokens_per_batch=self._budget)  # (M, D)
        seconds = time.perf_counter() - started
        if not np.isfinite(vectors).all():
            raise EmbedError(
                f"the model gave vectors that are not finite for rows {unit.start} to {unit.stop} of {unit.file.path}"
            )
        num_tokens = len(texts.ids)
        forward = Forward(
            num_tokens=num_tokens,
            num_positions=self._budget.positions - positions,
            seconds=seconds,
            flop=num_tokens * self._flop_per_token,
            peak_flop=seconds * self._peak,
            actor=self._name,
            not_compiled=self._not_compiled,
        )
        return vectors, forward


def sample_vectors(units: list[Unit], most: int, context: EmbedContext) -> np.ndarray:
    """(N, D) float32 of the first texts of these units, the same number of each, `most` at most in all."""
    texts: list[str] = []
    for unit in units:
        texts += read_unit(unit, context.settings.input, context.settings.types).texts[: -(-most // len(units))]
    tokens, _ = tokenize(texts[:most], context)
    encoder = _open_encoder(context)
    return encoder.embed_tokens(tokens, tokens_per_batch=_budget(context, encoder))


def _open_encoder(context: EmbedContext) -> Encoder:
    import torch

    from ullme_ray.model import open_encoder

    embed = embed_section(context.job)
    actors = embed.actors
    if not actors.gpus_per_actor:
        torch.set_num_threads(actors.cpus_per_actor)
    encoder = open_encoder(context.job, device="cuda" if actors.gpus_per_actor else "cpu", unpadded=embed.unpadded)
    if encoder.fingerprint != context.settings.fingerprint:
        raise EmbedError("the model was changed while this run embedded with it; run again")
    return encoder


def _budget(context: EmbedContext, encoder: Encoder) -> TokenBudget:
    from ullme_ray.model import TokenBudget

    wanted = embed_section(context.job).tokens_per_batch
    return encoder.find_budget() if wanted == "auto" else TokenBudget(wanted)


def _compile(encoder: Encoder, budget: TokenBudget) -> str | None:
    from ullme_ray.model import compile_where_faster

    return compile_where_faster(encoder, budget)


def _speed_of(encoder: Encoder) -> tuple[float, float]:
    """FLOP of one token (2 per parameter of the layers), and the device's peak in FLOP/s."""
    from ullme_ray.model import non_embedding_parameters, peak_flops

    dtype = next(encoder.backbone.parameters()).dtype
    return 2.0 * non_embedding_parameters(encoder.backbone), peak_flops(encoder.device, dtype)


def _write(unit: Unit, texts: UnitTexts, vectors: np.ndarray, forward: Forward, retries: int, context: EmbedContext) -> Outcome:
    """Vectors (M, D) -> a part in the table's folder, not yet in the table."""
    settings = context.settings
    chunks = _in_order(texts, settings.vectors.encode(vectors))
    rows = build_part(texts.good, chunks, settings.vectors)
    return Outcome(
        part=write_part(context.folder, context.job.name, unit, settings, rows),
        num_embedded=len(texts.new_documents),
        num_copied=texts.good.num_rows - len(texts.new_documents),
        num_dead=texts.num_dead,
        num_truncated=int(chunks.truncated.sum()),
        forward=forward,
        retries=texts.retries + retries,
    )


def _in_order(texts: UnitTexts, stored: np.ndarray) -> ChunkRows:
    """All documents' rows: those of new texts, given to every document that has this text, and the copied ones."""
    starts = np.searchsorted(texts.text_of_chunk, texts.text_of)
    counts = np.searchsorted(texts.text_of_chunk, texts.text_of, side="right") - starts
    chunk = np.concatenate([np.arange(count, dtype=np.int32) for count in counts] or [np.empty(0, np.int32)])
    rows = np.repeat(starts, counts) + chunk
    new = ChunkRows(np.repeat(texts.new_documents, counts), chunk, stored[rows], texts.lengths[rows], texts.truncated[rows])
    if texts.copied is None:
        return new
    both = ChunkRows.join([new, texts.copied])
    return both.take(np.argsort(both.document, kind="stable"))
