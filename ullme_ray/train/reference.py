"""`reference: precomputed`: log p(passage | query) under the untrained weights, for every pair the run will meet, once.

Saves the memory of a frozen copy and the time of a reference pass per step. Costs one generation pass over the run's distinct
pairs before the first step, and for each pair 12 bytes on storage and about 150 in the memory of every rank; while the table is
made, the texts too.
"""

from __future__ import annotations

import io

import numpy as np
import torch
import torch.distributed as dist

from ullme_ray import storage
from ullme_ray.errors import TrainingError
from ullme_ray.model.tokenizing import TextTokenizer
from ullme_ray.spec.job import JobSpec
from ullme_ray.spec.run_folder import RunFolder
from ullme_ray.train.collate import Example, generation_batch, text_key
from ullme_ray.train.collectives import gather_objects, world
from ullme_ray.train.data import BatchSampler
from ullme_ray.train.engine import Engine

PAIRS_PER_FORWARD = 16
Table = dict[int, float]  # key of a pair -> summed log-probability


def pair_key(example: Example, passage: str) -> int:
    """63 bits that tell apart what is scored: prompt, query and passage."""
    prompt = example.prompts.query if example.prompts else ""
    return text_key(f"{text_key(prompt)} {text_key(example.query)} {text_key(passage)}")


def reference_logps(examples: list[Example], table: Table) -> torch.Tensor:
    """(B, K) of a batch."""
    return torch.tensor([[table[pair_key(e, passage)] for passage in e.passages] for e in examples])


def ensure_reference(
    engine: Engine, sampler: BatchSampler, tokenizer: TextTokenizer, job: JobSpec, *, steps_done: int
) -> Table:
    """The table of the run: computed with the engine's weights at its start, read when it resumes; a collective call.

    One that is there at the start is of a run that never reached a checkpoint, maybe of another model: it is made anew.

    Raises:
        TrainingError: the weights are trained already, and it does not exist.
    """
    path = storage.join(RunFolder.of(job).root, "reference.npz")
    rank, world_size = world()
    if steps_done == 0:
        table = _compute(engine, sampler, tokenizer, job)
        if rank == 0:
            buffer = io.BytesIO()
            np.savez(buffer, keys=np.array(list(table), dtype=np.int64), logps=np.array(list(table.values()), dtype=np.float32))
            storage.write_bytes(path, buffer.getvalue())
        if world_size > 1:
            dist.barrier()
        return table
    if not storage.exists(path):
        raise TrainingError(f"{path} is missing, and only untrained weights can make it again; give the job another name")
    with np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False) as stored:
        return dict(zip(stored["keys"].tolist(), stored["logps"].tolist()))


@torch.no_grad()
def _compute(engine: Engine, sampler: BatchSampler, tokenizer: TextTokenizer, job: JobSpec) -> Table:
    train = job.train
    assert train is not None
    max_tokens = train.max_generation_tokens or job.model.max_tokens
    rank, world_size = world()
    pairs: dict[int, tuple[Example, str]] = {}
    for step in range(train.max_steps):
        for example in sampler.examples(step, 0, train.global_batch_size):
            for passage in example.passages:
                pairs.setdefault(pair_key(example, passage), (example, passage))
    keys = sorted(pairs, key=lambda key: (len(pairs[key][0].query) + len(pairs[key][1]), key))  # alike in length together
    per_round = PAIRS_PER_FORWARD * world_size
    own: Table = {}
    engine.module.eval()
    try:
        for start in range(0, len(keys), per_round):  # as many forward calls on every rank: sharded parameters require it
            mine = keys[start + rank : start + per_round : world_size] or keys[-1:]
            batch = generation_batch([pairs[key] for key in mine], tokenizer, max_tokens=max_tokens).to(engine.device)
            total = engine(None, None, batch)[2]  # (pairs,)
            own |= dict(zip(mine, total.tolist()))
    finally:
        engine.module.train()
    return {key: logp for part in gather_objects(own) for key, logp in part.items()}
