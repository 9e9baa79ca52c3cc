"""What passes between the HTTP side and the model replicas, and the one error that both may raise. No torch, no ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np


class ApiError(Exception):
    """An answer other than success; `answers` writes it in the form of the API that was asked.

    Args:
        kind: OpenAI's `type`.
        param: the field at fault.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind, self.param, self.code = kind, param, code
        self.headers = headers or {}


class InputRefusedError(Exception):
    """Input that only the tokenizer can judge: the replica raises it, the HTTP side answers in the form of the route's API.

    Args:
        reason: too_long (text `position` has more than `limit` tokens, and `truncate` is false) or too_many_tokens (all
            texts together; `position` is 0).
        num_tokens: how many there are.
    """

    def __init__(self, reason: Literal["too_long", "too_many_tokens"], position: int, num_tokens: int, limit: int) -> None:
        super().__init__(reason, position, num_tokens, limit)
        self.reason, self.position, self.num_tokens, self.limit = reason, position, num_tokens, limit

    def __str__(self) -> str:
        if self.reason == "too_many_tokens":
            return f"the texts have at least {self.num_tokens} tokens together; send at most {self.limit} in one request"
        given = f"text {self.position} has {self.num_tokens} tokens, and the model takes {self.limit}"
        return f"{given}; shorten it or allow truncation"


@dataclass(frozen=True)
class ServedModel:
    """One served model, as its replica describes it."""

    name: str
    fingerprint: str
    dim: int
    max_tokens: int  # of one text, prompt and special tokens included
    vocab_size: int
    pooling: str
    dtype: str
    tokens_per_batch: int = 0  # of one forward pass
    prompts: dict[str, str] = field(default_factory=lambda: {"query": "", "passage": ""})  # name -> text
    created: int = 0  # seconds since 1970; when the replica loaded it
    parent: str | None = None  # of an adapter: the served name of its backbone
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EmbedCall:
    """What the ingress asks of a model replica: texts with the prompt they get, or token ids taken as they are."""

    model: str  # a served name
    texts: list[str] | None
    token_ids: list[list[int]] | None = None
    prompt: str = "passage"  # a name out of ServedModel.prompts
    dimensions: int | None = None  # cut, then normalised again where `normalize` says so
    normalize: bool = True  # False: the pooled state as it is
    truncate: bool = True  # False: InputRefusedError where a text is longer than max_tokens
    truncation_direction: Literal["right", "left"] = "right"  # the end that is cut off
    pool: bool = True  # False: the states of all tokens
    max_request_tokens: int | None = None  # after truncation, over all texts; beyond it InputRefusedError
    deadline_s: float | None = None  # seconds from now; later than that nobody waits for the answer


@dataclass(frozen=True)
class EmbedReply:
    vectors: np.ndarray | list[np.ndarray]  # (N, D) float32; without pooling N times (L, D), prompt tokens included
    num_tokens: list[int]  # of each input, prompt included, after truncation
    num_truncated: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # of this request: tokenization, queue, inference
    fingerprint: str = ""  # of the model that made them

    @property
    def num_bytes(self) -> int:
        return sum(row.nbytes for row in self.vectors)


@dataclass(frozen=True)
class TokenizeCall:
    model: str
    texts: list[str]
    prompt: str = "passage"
    add_special_tokens: bool = True
    max_request_tokens: int | None = None  # over all texts; beyond it InputRefusedError


@dataclass(frozen=True)
class Token:
    """One token of a text; start and stop count characters of prompt + text, and are None for special tokens."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


@dataclass(frozen=True)
class TokenizeReply:
    tokens: list[list[Token]]  # of each text; never truncated


@dataclass(frozen=True)
class DecodeCall:
    model: str
    token_ids: list[list[int]]
    skip_special_tokens: bool = True


class Backend(Protocol):
    """Where vectors come from. Every method raises ApiError where no replica can answer (503) or all are full (429)."""

    def models(self) -> list[str]:
        """The served names, the default one first."""
        ...

    async def describe(self, model: str, *, wake: bool = True) -> ServedModel:
        """Without `wake` ApiError (503) where only a sleeping replica could tell."""
        ...

    async def embed(self, call: EmbedCall) -> EmbedReply:
        """Cancelling it drops the work. Raises InputRefusedError as the call asks for it."""
        ...

    async def tokenize(self, call: TokenizeCall) -> TokenizeReply:
        """Raises InputRefusedError as the call asks for it."""
        ...

    async def decode(self, call: DecodeCall) -> list[str]: ...

    async def load(self) -> dict[str, dict[str, float]]:
        """For each served name what is known of its replicas, summed over them, for /metrics and the status page.

        Keys, each of which may be absent: replicas, queue_requests, queue_tokens (now); batches, batch_rows, batch_tokens,
        padded_tokens, inference_seconds (since the start).
        """
        ...
