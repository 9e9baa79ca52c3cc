"""How often work was begun that may end its own process. Ray Data begins it again without end, so somebody must say stop."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import ray

from ullme_ray.errors import EmbedError


class _Counts:
    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, work: str) -> int:
        self._begun[work] += 1
        return self._begun[work]

    def done(self, work: str) -> None:
        del self._begun[work]


class Attempts:
    """Counts in a process of its own, which outlives those it counts for. Can be sent to them."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._counts: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Counts).remote()

    @contextlib.contextmanager
    def at(self, work: str, *, shown: str) -> Iterator[None]:
        """Counts an attempt at some work, and starts over once one ends otherwise than with its process.

        Args:
            work: tells it from all other work.
            shown: how the error names it.

        Raises:
            EmbedError: as many attempts in a row as are allowed ended their process.
        """
        if ray.get(self._counts.begin.remote(work)) > self._limit:
            raise EmbedError(
                f"{shown} ended its process {self._limit} times, as a lack of memory does; "
                f"lower embed.tokens_per_batch or embed.rows_per_unit, or give an actor more memory"
            )
        try:
            yield
        finally:
            self._counts.done.remote(work)
