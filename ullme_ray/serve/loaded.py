"""A model in memory as a replica uses it: one backbone, the adapters over it, and the forward pass for each kind of answer.

Adapters share weights, not forward passes: rows of one adapter go together, and the layers are told which one it is. A pass of
mixed rows would have to split them again in every adapted layer.
"""

from __future__ import annotations

import copy
import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ullme_ray import storage
from ullme_ray.errors import ModelError, ServeError
from ullme_ray.model import TokenBudget, Tokens, open_encoder
from ullme_ray.model.adapters import AdapterSwitch, inject_lora
from ullme_ray.serve.models import Served, published_version

Form = Literal["unit", "pooled", "tokens"]  # unit vectors, pooled states as they are, states of all tokens
_PUBLISHING_S = 60.0  # how long a start waits for a model that is being written
_WARM_LENGTHS = (8, 64)
_TIMING_S = 5.0  # of batches before a replica is ready; a batch that takes longer than half of it nobody should wait for


@dataclass(frozen=True)
class Lane:
    """What rows have in common that share a forward pass."""

    loaded: LoadedModel
    adapter: str | None
    prompt_length: int
    form: Form

    def forward(self, input_ids: list[list[int]]) -> Sequence[np.ndarray]:
        tokens = Tokens(input_ids, self.prompt_length, [False] * len(input_ids))
        return self.loaded.forward(tokens, self.adapter, self.form)


class LoadedModel:
    """Exists only once the weights are loaded and gave the vectors stored with the export.

    Args:
        tokens_per_batch: of a forward pass; "auto" finds the number, and takes some seconds.

    Raises:
        ModelError: the model or an adapter cannot be loaded, or computes other vectors than when it was exported.
        ServeError: the files changed all the time while they were read.
    """

    def __init__(self, served: Served, *, device: str | None, tokens_per_batch: int | Literal["auto"], warm_up: bool) -> None:
        self.created = int(time.time())
        deadline = time.monotonic() + _PUBLISHING_S
        while True:
            self.version = published_version(served)
            if self.version is not None:
                self.encoder = open_encoder(served.job, device=device)
                self._load_adapters(served)
                if published_version(served) == self.version:
                    break
            if time.monotonic() > deadline:
                raise ServeError(f"{served.name} is being published, or its publication broke off; publish it whole")
            time.sleep(0.5)
        # A tokenizer makes one call at a time: of this one large texts, so that the others need not wait for them.
        self.large_tokenizer = copy.deepcopy(self.encoder.tokenizer)
        self.fingerprints = {
            name: self.encoder.fingerprint if name == served.name else self._fingerprint(served.adapters[name])
            for name in served.names
        }
        self.budget = (
            self.encoder.find_budget(limit_s=_TIMING_S) if tokens_per_batch == "auto" else TokenBudget(tokens_per_batch)
        )
        if warm_up:
            self._warm_up()
        self.budget.positions = 0  # from here on of requests

    def _load_adapters(self, served: Served) -> None:
        # Named by number in the layers, where a served name might be no module's name.
        self._adapters: dict[str, str] = {}
        for position, (name, folder) in enumerate(served.adapters.items()):
            self._adapters[name] = f"adapter{position}"
            inject_lora(self.encoder.backbone, storage.fetch_folder(folder), self._adapters[name])
        self._switch = AdapterSwitch(self.encoder.backbone) if self._adapters else None

    def _fingerprint(self, folder: str) -> str:
        digest = hashlib.sha256(self.encoder.fingerprint.encode())
        local = storage.fetch_folder(folder)
        for name in sorted(os.listdir(local)):
            if name.endswith((".safetensors", ".json")):
                digest.update(name.encode() + storage.read_bytes(os.path.join(local, name)))
        return digest.hexdigest()

    def lane(self, name: str, prompt_length: int, form: Form) -> Lane:
        return Lane(self, self._adapters.get(name), prompt_length, form)

    def forward(self, tokens: Tokens, adapter: str | None, form: Form) -> Sequence[np.ndarray]:
        """N unit vectors or pooled states (D), or N times the token states (L, D); float32.

        Raises:
            ModelError: a number is not finite.
        """
        if self._switch is None:
            rows = self._run(tokens, form)
        else:
            with self._switch.use(adapter):
                rows = self._run(tokens, form)
        if not all(np.isfinite(row).all() for row in ([rows] if isinstance(rows, np.ndarray) else rows)):
            raise ModelError("the model computed a vector that is not finite")
        return rows

    def _run(self, tokens: Tokens, form: Form) -> Any:
        if form == "unit":
            return self.encoder.embed_tokens(tokens, tokens_per_batch=self.budget)
        compute = self.encoder.token_states if form == "tokens" else self.encoder.pooled_states
        answers: list[Any] = [None] * len(tokens.input_ids)

        def forward(rows: list[int]) -> None:
            part = Tokens([tokens.input_ids[row] for row in rows], tokens.prompt_length, [False] * len(rows))
            for row, answer in zip(rows, compute(part), strict=True):
                answers[row] = answer

        # These two pad, also where the batcher, for the model's sake, put texts of any lengths together.
        self.budget.work([len(ids) for ids in tokens.input_ids], forward, padded=True)
        return answers

    def _warm_up(self) -> None:
        """First passes are slow (memory, kernels, threads), and a batch too large for the GPU must show now, not under load."""
        longest = self.encoder.settings.max_tokens
        full = max(1, self.budget.tokens // longest) if self.encoder.device.type == "cuda" else 1
        for count, length in [*((1, min(length, longest)) for length in _WARM_LENGTHS), (full, longest)]:
            ids = [[1 % self.encoder.tokenizer.hf.vocab_size] * length] * count
            for adapter in (None, *self._adapters.values()):
                self.forward(Tokens(ids, 0, [False] * count), adapter, "unit")
