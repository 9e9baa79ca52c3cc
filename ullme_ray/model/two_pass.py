"""The model in training: one backbone that encodes (both ways) and generates (one way), with or without LoRA."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ullme_ray.model.adapters import AdapterSwitch, add_lora
from ullme_ray.model.backbone import load_causal_lm
from ullme_ray.model.dropout import RowSeeds
from ullme_ray.model.encode import TokenBatch, accepts, encode_batch, forward_inputs, groups_of_like_length
from ullme_ray.model.latent_attention import make_head
from ullme_ray.spec.job import ModelSpec

# Forward passes over the texts of a chunk, and over its prompt + passage rows. On real texts of mixed lengths 3 leave 15 % of
# padding, where a pass for the queries and one for the passages left 40 %; a fourth would save 6 % more.
_NUM_GROUPS = 3


@dataclass(frozen=True)
class GenerationBatch:
    """Prompt + passage per row, padded on the right; the last `passage_lengths` real tokens of a row are scored."""

    input_ids: Tensor  # (R, L)
    attention_mask: Tensor  # (R, L)
    passage_lengths: Tensor  # (R,)

    def rows(self, start: int, stop: int) -> GenerationBatch:
        """Rows [start, stop), without the columns that are padding for all of them."""
        mask = self.attention_mask[start:stop]
        longest = int(mask.sum(dim=1).max())
        return GenerationBatch(self.input_ids[start:stop, :longest], mask[:, :longest], self.passage_lengths[start:stop])

    def take(self, rows: Tensor) -> GenerationBatch:
        """The rows of these numbers, without the columns that are padding for all of them."""
        chosen = GenerationBatch(self.input_ids[rows], self.attention_mask[rows], self.passage_lengths[rows])
        return chosen.rows(0, len(rows))

    def to(self, device: torch.device | str) -> GenerationBatch:
        return GenerationBatch(self.input_ids.to(device), self.attention_mask.to(device), self.passage_lengths.to(device))


class PassageLogps(NamedTuple):
    """log p(passage | prompt) per row, float32."""

    total: Tensor  # (R,)
    mean: Tensor  # (R,) per scored token


def passage_logps(lm: Any, batch: GenerationBatch) -> PassageLogps:
    """Scores the passages under causal attention; prompt and padding tokens count for nothing (METHOD: generate).

    Memory: logits from the first scored position on, and a float32 copy of the scored ones only, (num_scored, V).
    """
    lengths = batch.attention_mask.sum(dim=1)  # (R,)
    first_scored = lengths - batch.passage_lengths  # (R,)
    assert first_scored.min() > 0, "a passage must follow at least one prompt token, which predicts its first"
    width = batch.input_ids.shape[1]
    kept = width - int(first_scored.min()) + 1  # logits at t predict token t + 1, so one position before the first
    inputs = forward_inputs(lm, batch.input_ids, batch.attention_mask)
    if accepts(type(lm).forward, "logits_to_keep"):
        # As indices and not as a number: a slice of the states is not contiguous, and the head's matmul would then copy its
        # weight once per row.
        inputs["logits_to_keep"] = torch.arange(width - kept, width, device=lengths.device)
    logits = lm(**inputs).logits[:, -kept:-1]  # (R, kept - 1, V)
    targets = batch.input_ids[:, width - kept + 1 :]  # (R, kept - 1)
    column = torch.arange(width - kept + 1, width, device=targets.device)  # position of each target
    scored = (column >= first_scored[:, None]) & (column < lengths[:, None])  # (R, kept - 1)
    token_logps = -cross_entropy(logits[scored].float(), targets[scored], reduction="none")  # (num_scored,)
    row = scored.nonzero()[:, 0]
    total = torch.zeros(len(lengths), device=token_logps.device).index_add(0, row, token_logps)
    return PassageLogps(total, total / batch.passage_lengths)


_Rows = TypeVar("_Rows", TokenBatch, GenerationBatch)


class TwoPassModel(nn.Module):
    """Encode and generate in one forward call, so that an engine which shards parameters sees one module and one call.

    Args:
        lm: a causal language model, or an encoder, which has the encode pass alone; plain or wrapped by peft.
        pooling: of the encode pass, and its `head` where it has trained weights.
        bidirectional: whether the encode pass attends both ways; the generate pass never does.
        reference: scored within the forward call: `adapter_off`, `frozen_copy` or `none`.
    """

    def __init__(
        self, lm: Any, *, pooling: str, reference: str, seeds: RowSeeds, head: Any = None, bidirectional: bool = True
    ) -> None:
        super().__init__()
        self.lm = lm
        self.head = head
        self.pooling = pooling
        self.bidirectional = bidirectional
        self.reference = reference
        self.seeds = seeds
        self.adapters = AdapterSwitch(lm)
        # In a list, so that it is no submodule: nothing of it is trained, sharded or saved.
        self._frozen: list[Any] = [copy.deepcopy(lm).requires_grad_(False).eval()] if reference == "frozen_copy" else []

    @property
    def causal_lm(self) -> Any:
        """The language model below any adapter; LoRA lives inside its layers."""
        return self.lm.get_base_model() if hasattr(self.lm, "get_base_model") else self.lm

    def forward(
        self,
        queries: TokenBatch | None,
        passages: TokenBatch | None = None,
        generation: GenerationBatch | None = None,
        *,
        seeds: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
        with_reference: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Both passes over one chunk of C queries with K passages each; what is None is left out.

        Args:
            queries: (C, L) and passages: (C*K, L').
            generation: (C*K, L'') prompt + passage rows.
            seeds: dropout seeds of the rows of queries, passages and generation; needed in training mode.
            with_reference: also score `generation` under the reference model.

        Returns:
            query embedding (C, D), passage embedding (C*K, D), and, each (C*K,): summed log-probs, mean log-probs, the
            reference's summed log-probs.
        """
        num_groups = 1 if queries is None or passages is None else _NUM_GROUPS  # else the caller has sorted its texts already
        texts = [batch for batch in (queries, passages) if batch is not None]
        parts: list[Tensor] = []
        if texts:
            known = [s for s in seeds[:2] if s is not None]
            embedding = self._by_length(TokenBatch.join(texts), torch.cat(known) if known else None, num_groups, self._encode)
            parts = list(embedding.split([len(batch) for batch in texts]))
        query_embedding, passage_embedding = (parts.pop(0) if batch is not None else None for batch in (queries, passages))
        total = mean = reference = None
        if generation is not None:
            with self.adapters.use(self.adapters.generate):
                total, mean = self._by_length(generation, seeds[2], num_groups, self._score).unbind(dim=1)
            if with_reference and self.reference in ("adapter_off", "frozen_copy"):
                reference = self._by_length(generation, seeds[2], num_groups, self._reference_logps)
        return query_embedding, passage_embedding, total, mean, reference

    def _encode(self, batch: TokenBatch) -> Tensor:
        return encode_batch(self.causal_lm.base_model, batch, self.pooling, self.head, bidirectional=self.bidirectional)

    def _score(self, batch: GenerationBatch) -> Tensor:
        return torch.stack(passage_logps(self.causal_lm, batch), dim=1)  # (R, 2)

    def _by_length(self, batch: _Rows, seeds: Tensor | None, num_groups: int, run: Callable[[_Rows], Tensor]) -> Tensor:
        """`run` on groups of rows of like length, so that little of the work is padding; results in the order of the rows."""
        groups = groups_of_like_length(batch.attention_mask.sum(dim=1).tolist(), num_groups)
        results = []
        for group in groups:
            rows = torch.tensor(group, device=batch.attention_mask.device)
            with self.seeds.use(seeds[rows] if seeds is not None else None):
                results.append(run(batch.take(rows)))
        place = torch.tensor([row for group in groups for row in group]).argsort()
        return torch.cat(results)[place.to(batch.attention_mask.device)]

    @torch.no_grad()
    def _reference_logps(self, generation: GenerationBatch) -> Tensor:
        if self.reference == "frozen_copy":
            frozen = self._frozen[0].to(generation.input_ids.device)
            return passage_logps(frozen, generation).total
        with self.adapters.use(None):  # no adapter, so no dropout either: model/backbone.py turned off the base's own
            return passage_logps(self.causal_lm, generation).total

    def checkpoint_contexts(self) -> tuple[Any, Any]:
        """For torch.utils.checkpoint's context_fn: the recomputation sees the seeds and the adapter of the first time."""
        return contextlib.nullcontext(), self._again(self.seeds.current, self.adapters.current)

    @contextlib.contextmanager
    def _again(self, seeds: Tensor | None, adapter: str | None) -> Iterator[None]:
        with self.seeds.use(seeds), self.adapters.use(adapter):
            yield


def build_two_pass(
    folder: str,
    model: ModelSpec,
    *,
    reference: str,
    gradient_checkpointing: bool = False,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> TwoPassModel:
    """Loads the base model for training.

    Args:
        folder: local model folder.
        reference: `auto`, `adapter_off`, `frozen_copy`, `precomputed` or `none`; auto is adapter_off with LoRA, else
            frozen_copy. Scores that are `precomputed` come with the batch.
        dtype: of the weights, over `model.dtype`.
        seed: of the start of LoRA matrices and latent attention.

    Raises:
        ModelError: the model cannot be loaded or cannot attend both ways.
    """
    lm = load_causal_lm(folder, model, dtype=dtype)
    seeds = RowSeeds()
    if model.lora is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            lm = add_lora(lm, model.lora, seeds)
    if reference == "auto":
        reference = "adapter_off" if model.lora is not None else "frozen_copy"
    head = make_head(folder, model, lm.config, seed=seed, dtype=dtype)
    module = TwoPassModel(
        lm, pooling=model.pooling, reference=reference, seeds=seeds, head=head, bidirectional=model.bidirectional
    )
    if gradient_checkpointing:
        causal_lm = module.causal_lm
        causal_lm.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={
                "use_reentrant": False,
                "preserve_rng_state": False,  # nothing here draws from a random state
                "context_fn": module.checkpoint_contexts,
            }
        )
        if model.lora is not None:
            causal_lm.enable_input_require_grads()
    return module.train()
