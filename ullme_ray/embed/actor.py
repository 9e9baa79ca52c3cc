"""The three steps of a unit on Ray: read and tokenize (CPU task), embed (actor with the model), write the part (CPU task).

Between steps a unit is one row of bytes, so that Ray Data can neither split nor mix units.
An error meant for the user travels the same way, for Ray Data would bury it in its own.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray

from ullme_ray.embed.parts import Part, PartSettings, build_part, write_dead_letters, write_part
from ullme_ray.embed.reading import read_unit
from ullme_ray.embed.units import Unit, embed_section
from ullme_ray.errors import EmbedError, UllmeError
from ullme_ray.ray_data import Attempts
from ullme_ray.spec.job import JobSpec

if TYPE_CHECKING:
    from ullme_ray.model import Encoder, TextTokenizer, TokenBudget

Row = dict[str, Any]


@dataclass(frozen=True)
class EmbedContext:
    """What every step needs to know of the run."""

    job: JobSpec
    folder: str  # of the table
    settings: PartSettings


@dataclass(frozen=True)
class UnitTokens:
    """A unit on its way to the actor; ids flat, as one array costs a tenth of nested lists."""

    good: pa.Table
    ids: np.ndarray  # int32, all rows one after another
    lengths: np.ndarray
    prompt_length: int
    truncated: list[bool]
    num_dead: int


@dataclass(frozen=True)
class UnitVectors:
    """A unit on its way to storage."""

    part: pa.Table
    num_dead: int


@dataclass(frozen=True)
class Outcome:
    """What became of a unit."""

    part: Part
    num_dead: int
    num_tokens: int


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


def read_step(row: Row, context: EmbedContext, attempts: Attempts) -> Row:
    """Unit -> its good rows as tokens; the bad ones go to the dead letters."""

    def read(unit: Unit, _: None) -> UnitTokens:
        with _counted("reading", unit, attempts):
            return _read(unit, context)

    return _advance(row, read)


def _counted(step: str, unit: Unit, attempts: Attempts) -> contextlib.AbstractContextManager[None]:
    where = f"rows {unit.start} to {unit.stop} of {unit.file.path}"
    return attempts.at(f"{step} {where}", shown=f"{step} {where}")


def _read(unit: Unit, context: EmbedContext) -> UnitTokens:
    rows = read_unit(unit, context.settings.input, context.settings.types)
    write_dead_letters(context.folder, context.settings.part_name(unit), rows.dead)
    tokens = _tokenizer(context.job, context.settings.fingerprint).tokenize(rows.texts, "passage")
    lengths = np.array([len(ids) for ids in tokens.input_ids], np.int32)
    ids = np.concatenate([np.array(i, np.int32) for i in tokens.input_ids]) if len(lengths) else np.empty(0, np.int32)
    return UnitTokens(rows.good, ids, lengths, tokens.prompt_length, tokens.truncated, rows.dead.num_rows)


@lru_cache(maxsize=1)
def _tokenizer(job: JobSpec, fingerprint: str) -> TextTokenizer:
    """Loaded once per worker process and model."""
    from ullme_ray.model import open_tokenizer

    return open_tokenizer(job)


class EmbedActor:
    """Holds the model; one call embeds one unit."""

    def __init__(self, context: EmbedContext, attempts: Attempts) -> None:
        self._attempts = attempts
        self._encoder: Encoder | UllmeError
        try:
            with attempts.at(f"load in {ray.get_runtime_context().get_actor_id()}", shown="loading the model"):
                self._encoder = _open_encoder(context)
                self._budget = _budget(context, self._encoder)
        except UllmeError as error:
            self._encoder = error  # goes out with the first unit; Ray would start the actor again and again

    def __call__(self, row: Row) -> Row:
        return _advance(row, self._attempt)

    def _attempt(self, unit: Unit, work: UnitTokens) -> UnitVectors:
        with _counted("embedding", unit, self._attempts):
            return self._embed(unit, work)

    def _embed(self, unit: Unit, work: UnitTokens) -> UnitVectors:
        if isinstance(self._encoder, UllmeError):
            raise self._encoder
        from ullme_ray.model import Tokens

        input_ids = [ids.tolist() for ids in np.split(work.ids, np.cumsum(work.lengths)[:-1])] if len(work.lengths) else []
        tokens = Tokens(input_ids, work.prompt_length, work.truncated)
        vectors = self._encoder.embed_tokens(tokens, tokens_per_batch=self._budget)  # (N, D)
        if not np.isfinite(vectors).all():
            raise EmbedError(
                f"the model gave vectors that are not finite for rows {unit.start} to {unit.stop} of {unit.file.path}"
            )
        part = build_part(work.good, vectors, work.lengths.tolist(), work.truncated)
        return UnitVectors(part, work.num_dead)


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


def write_step(row: Row, context: EmbedContext) -> Row:
    """Vectors -> a part in the table's folder, not yet in the table."""
    return _advance(row, lambda unit, work: _write(unit, work, context))


def _write(unit: Unit, work: UnitVectors, context: EmbedContext) -> Outcome:
    part = write_part(context.folder, context.job.name, unit, context.settings, work.part)
    return Outcome(part, work.num_dead, int(np.sum(work.part["num_tokens"].to_numpy())))
