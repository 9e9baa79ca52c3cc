"""The three steps of a unit on Ray: read and tokenize (CPU task), embed (actor with the model), write the part (CPU task).

Between steps a unit is one row of bytes, so that Ray Data can neither split nor mix units.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ullme_ray.embed.parts import PartSettings, build_part, write_dead_letters, write_part
from ullme_ray.embed.reading import read_unit
from ullme_ray.embed.units import Unit, embed_section
from ullme_ray.errors import EmbedError
from ullme_ray.spec.job import JobSpec

if TYPE_CHECKING:
    from ullme_ray.model import TextTokenizer

Row = dict[str, Any]


@dataclass(frozen=True)
class EmbedContext:
    """What every step needs to know of the run."""

    job: JobSpec
    folder: str  # of the table
    settings: PartSettings


@dataclass(frozen=True)
class _UnitTokens:
    """A unit on its way to the actor; ids flat, as one array costs a tenth of nested lists."""

    good: pa.Table
    ids: np.ndarray  # int32, all rows one after another
    lengths: np.ndarray
    prompt_length: int
    truncated: list[bool]
    num_dead: int


@dataclass(frozen=True)
class _UnitVectors:
    part: pa.Table
    num_dead: int


def read_step(row: Row, context: EmbedContext) -> Row:
    """Unit -> its good rows as tokens; the bad ones go to the dead letters."""
    unit: Unit = pickle.loads(row["unit"])
    rows = read_unit(unit, context.settings.input, context.settings.types)
    write_dead_letters(context.folder, context.settings.part_name(unit), rows.dead)
    tokens = _tokenizer(context.job, context.settings.fingerprint).tokenize(rows.texts, "passage")
    lengths = np.array([len(ids) for ids in tokens.input_ids], np.int32)
    ids = np.concatenate([np.array(i, np.int32) for i in tokens.input_ids]) if len(lengths) else np.empty(0, np.int32)
    work = _UnitTokens(rows.good, ids, lengths, tokens.prompt_length, tokens.truncated, rows.dead.num_rows)
    return {"unit": row["unit"], "work": pickle.dumps(work)}


@lru_cache(maxsize=1)
def _tokenizer(job: JobSpec, fingerprint: str) -> TextTokenizer:
    """Loaded once per worker process and model."""
    from ullme_ray.model import open_tokenizer

    return open_tokenizer(job)


class EmbedActor:
    """Holds the model; one call embeds one unit.

    Raises:
        EmbedError: the model it finds is not the one the run was planned with.
    """

    def __init__(self, context: EmbedContext) -> None:
        import torch

        from ullme_ray.model import open_encoder

        embed = embed_section(context.job)
        if not embed.actors.gpus_per_actor:
            torch.set_num_threads(embed.actors.cpus_per_actor)
        self.tokens_per_batch = embed.tokens_per_batch
        self.encoder = open_encoder(context.job, device="cuda" if embed.actors.gpus_per_actor else "cpu")
        if self.encoder.fingerprint != context.settings.fingerprint:
            raise EmbedError("the model was changed while this run embedded with it; run again")

    def __call__(self, row: Row) -> Row:
        from ullme_ray.model import Tokens

        work: _UnitTokens = pickle.loads(row["work"])
        input_ids = [ids.tolist() for ids in np.split(work.ids, np.cumsum(work.lengths)[:-1])] if len(work.lengths) else []
        tokens = Tokens(input_ids, work.prompt_length, work.truncated)
        vectors = self.encoder.embed_tokens(tokens, tokens_per_batch=self.tokens_per_batch)  # (N, D)
        if not np.isfinite(vectors).all():
            raise EmbedError(f"the model gave vectors that are not finite for rows of {pickle.loads(row['unit']).file.path}")
        part = build_part(work.good, vectors, work.lengths.tolist(), work.truncated)
        return {"unit": row["unit"], "work": pickle.dumps(_UnitVectors(part, work.num_dead))}


def write_step(row: Row, context: EmbedContext) -> Row:
    """Vectors -> a part in the table's folder, not yet in the table."""
    unit: Unit = pickle.loads(row["unit"])
    work: _UnitVectors = pickle.loads(row["work"])
    part = write_part(context.folder, context.job.name, unit, context.settings, work.part)
    num_tokens = int(np.sum(work.part["num_tokens"].to_numpy()))
    return {"part": pickle.dumps(part), "num_dead": work.num_dead, "num_tokens": num_tokens}
