"""Rows -> tensors of one rank's batch. Row i is query i with its own K passages, in every tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ullme_ray.model.encode import TokenBatch, pad_batch
from ullme_ray.model.tokenizing import TextTokenizer
from ullme_ray.model.two_pass import GenerationBatch
from ullme_ray.spec.job import PromptsSpec


@dataclass(frozen=True)
class Example:
    """One row of a step: a query, its P positives and N hard negatives, and its number in the global batch."""

    row: int
    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    scores: tuple[float, ...] | None = None  # a teacher's, of `passages`
    prompts: PromptsSpec | None = None  # of the row's source; None: the model's own
    in_batch_negatives: bool = True  # whether passages of other rows count as negatives

    @property
    def passages(self) -> tuple[str, ...]:
        return (*self.positives, *self.negatives)


def shortest_first(examples: Sequence[Example]) -> list[Example]:
    """The examples by the length of their longest text, so that the rows of a chunk are alike and pad little.

    Changes no gradient: dropout follows `Example.row`. The longest come last, for pass 1 spares the last chunk its second
    encoding.
    """
    return sorted(examples, key=lambda example: max(map(len, (example.query, *example.passages))))


@dataclass(frozen=True)
class TrainBatch:
    """B rows of one rank, or C rows of a chunk of it."""

    queries: TokenBatch  # (B, L)
    passages: TokenBatch  # (B*K, L); passage j of query i is row i*K + j
    generation: GenerationBatch | None  # (B*K, L'), in the order of `passages`
    query_keys: Tensor  # (B,) hashes of the texts
    passage_keys: Tensor  # (B, K)
    rows: Tensor  # (B,) numbers in the global batch
    num_positives: int
    teacher_scores: Tensor | None = None  # (B, K)
    reference_logps: Tensor | None = None  # (B, K) summed, where they were computed before training
    in_batch_negatives: bool = True

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_passages(self) -> int:
        return self.passage_keys.shape[1]

    @property
    def num_encode_tokens(self) -> int:
        return int(self.queries.attention_mask.sum() + self.passages.attention_mask.sum())

    @property
    def num_generate_tokens(self) -> int:
        return int(self.generation.attention_mask.sum()) if self.generation is not None else 0

    def chunks(self, chunk_size: int) -> list[TrainBatch]:
        """The batch in pieces of `chunk_size` queries; the last may be smaller."""
        return [self._slice(start, min(start + chunk_size, len(self))) for start in range(0, len(self), chunk_size)]

    def _slice(self, start: int, stop: int) -> TrainBatch:
        first, last = start * self.num_passages, stop * self.num_passages
        own = slice(start, stop)
        return replace(
            self,
            queries=self.queries.rows(start, stop),
            passages=self.passages.rows(first, last),
            generation=self.generation.rows(first, last) if self.generation is not None else None,
            query_keys=self.query_keys[own],
            passage_keys=self.passage_keys[own],
            rows=self.rows[own],
            teacher_scores=self.teacher_scores[own] if self.teacher_scores is not None else None,
            reference_logps=self.reference_logps[own] if self.reference_logps is not None else None,
        )

    def to(self, device: torch.device | str) -> TrainBatch:
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in held.items() if hasattr(value, "to")})


def collate(
    examples: Sequence[Example], tokenizer: TextTokenizer, *, with_generation: bool, max_generation_tokens: int
) -> TrainBatch:
    """Tokenizes and pads one rank's examples; all have the same P and N and come from one source."""
    tokenizer = _own_prompts(tokenizer, examples[0])
    queries = tokenizer.tokenize([e.query for e in examples], "query")
    flat = [(e, passage) for e in examples for passage in e.passages]  # B*K, row-major
    passages = tokenizer.tokenize([passage for _, passage in flat], "passage")
    generation = generation_batch(flat, tokenizer, max_tokens=max_generation_tokens) if with_generation else None
    return TrainBatch(
        queries=pad_batch(queries.input_ids, queries.prompt_length, tokenizer.pad_id),
        passages=pad_batch(passages.input_ids, passages.prompt_length, tokenizer.pad_id),
        generation=generation,
        query_keys=torch.tensor([text_key(e.query) for e in examples]),
        passage_keys=torch.tensor([[text_key(passage) for passage in e.passages] for e in examples]),
        rows=torch.tensor([e.row for e in examples]),
        num_positives=len(examples[0].positives),
        teacher_scores=torch.tensor([e.scores for e in examples]) if examples[0].scores is not None else None,
        in_batch_negatives=examples[0].in_batch_negatives,
    )


def generation_batch(pairs: Sequence[tuple[Example, str]], tokenizer: TextTokenizer, *, max_tokens: int) -> GenerationBatch:
    """(query, passage) pairs as rows to score, each with the prompts of its source."""
    scored = [
        _own_prompts(tokenizer, example).tokenize_generation(example.query, passage, max_tokens=max_tokens)
        for example, passage in pairs
    ]
    padded = pad_batch([s.input_ids for s in scored], 0, tokenizer.pad_id)
    return GenerationBatch(padded.input_ids, padded.attention_mask, torch.tensor([s.passage_length for s in scored]))


def _own_prompts(tokenizer: TextTokenizer, example: Example) -> TextTokenizer:
    return tokenizer.with_prompts(example.prompts.query, example.prompts.passage) if example.prompts else tokenizer


def text_key(text: str) -> int:
    """63 bits that tell texts apart across ranks."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
