"""Rows of many requests -> forward passes of one token budget. Plain asyncio: knows nothing of Ray, HTTP or torch.

Requests take turns: each batch is built around the longest waiting row of the request that was served least recently, then
filled with rows of any request that are about as long (padding is work thrown away). So a request waits at most one batch per
request before it, a huge one gives way after each batch, and none starves. While a batch runs in its thread, the next
collects in the queue.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ullme_ray.errors import ServeError

Lane = Hashable  # what rows must have in common to share a forward pass: prompt length, adapter, form of the answer
Forward = Callable[[list[list[int]], Any], Sequence[np.ndarray]]  # ids of N rows, their lane -> N answers

MAX_PADDING_RATIO = 1.25  # padded tokens / real tokens of a batch
CHEAP_TOKENS = 256  # below this size a forward costs the same whatever is in it, so padding is free


@dataclass
class Work:
    """What a batcher did since it began."""

    batches: int = 0
    rows: int = 0
    tokens: int = 0  # without padding
    forward_s: float = 0.0


class TokenBatcher:
    """Shares forward passes between concurrent `submit` calls. Bound to the event loop of the first one.

    Args:
        forward: called in a thread of its own, one batch at a time, with rows of one lane.
        tokens_per_batch: rows x longest row of a batch; a longer row goes alone.
        wait_s: how long a row may wait for company while the forward is idle. A row that follows one that had none does not
            wait: whoever asks alone is answered at once.
        padded: false for a model that computes no padding: a batch then holds rows of any lengths, `tokens_per_batch` in sum.
    """

    def __init__(self, forward: Forward, *, tokens_per_batch: int, wait_s: float, padded: bool = True) -> None:
        self.work = Work()
        self._forward = forward
        self._tokens_per_batch = tokens_per_batch
        self._wait_s = wait_s
        self._had_company = False  # whether the last batch was of several requests
        self._queue = _Queue(padded)
        self._unanswered: set[_Request] = set()
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="forward")
        self._loop_task: asyncio.Task[None] | None = None
        self._closed = False

    async def submit(
        self, input_ids: Sequence[list[int]], lane: Lane, *, seconds: dict[str, float] | None = None
    ) -> list[np.ndarray]:
        """What the forward gives for each row, in their order. Cancelling the call takes its waiting rows out of the queue.

        Args:
            seconds: gets `queue`, the time until the first row was taken, and `inference`, the time from then on.

        Raises:
            ServeError: the batcher was closed.
            Exception: whatever `forward` raised for a batch of this request's rows alone.
        """
        if self._closed:
            raise ServeError("the server is stopping")
        loop = asyncio.get_running_loop()
        if self._loop_task is None:
            self._loop_task = loop.create_task(self._run())
        request = _Request(input_ids, lane, loop)
        self._queue.add(request)
        self._unanswered.add(request)
        self._arrival.set()
        try:
            rows = await request.result
            if seconds is not None:
                seconds["queue"] = request.began - request.arrived
                seconds["inference"] = loop.time() - request.began
            return rows
        finally:
            self._queue.remove(request)
            self._unanswered.remove(request)

    async def run_at_once(self, input_ids: list[list[int]], lane: Lane) -> Sequence[np.ndarray]:
        """A batch of its own, after the one that runs and before all that wait."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._forward, input_ids, lane)

    @property
    def waiting_tokens(self) -> int:
        return self._queue.num_tokens

    @property
    def waiting_requests(self) -> int:
        return len(self._queue.requests)

    async def close(self) -> None:
        """Ends the loop and fails whatever has no answer yet."""
        self._closed = True
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.wait([self._loop_task])
        for request in self._unanswered:
            request.fail(ServeError("the server is stopping"))
        self._thread.shutdown(wait=False)

    async def _run(self) -> None:
        while True:
            await self._collect()
            await self._serve(self._queue.take_batch(self._tokens_per_batch))

    async def _collect(self) -> None:
        """Returns once rows wait, and either fill a batch or have waited long enough for others."""
        loop = asyncio.get_running_loop()
        while True:
            self._arrival.clear()
            if not self._queue.requests:
                await self._arrival.wait()
                continue
            wait_s = self._wait_s if self._had_company or len(self._queue.requests) > 1 else 0.0
            time_left = next(iter(self._queue.requests)).arrived + wait_s - loop.time()
            if time_left <= 0 or self._queue.num_tokens >= self._tokens_per_batch:
                return
            try:
                async with asyncio.timeout(time_left):
                    await self._arrival.wait()
            except TimeoutError:
                pass

    async def _serve(self, rows: list[_Row]) -> None:
        ids, lane, loop = [row.ids for row in rows], rows[0].request.lane, asyncio.get_running_loop()
        self._had_company = any(row.request is not rows[0].request for row in rows)
        began = loop.time()
        for row in rows:
            row.request.began = row.request.began or began
        try:
            vectors = await loop.run_in_executor(self._thread, self._forward, ids, lane)
            if len(vectors) != len(rows):
                raise ServeError(f"the forward gave {len(vectors)} vectors for {len(rows)} rows")
        except Exception as error:  # noqa: BLE001 - whatever it is, it must reach the request that caused it
            shares: dict[_Request, list[_Row]] = defaultdict(list)
            for row in rows:
                shares[row.request].append(row)
            if len(shares) == 1:
                rows[0].request.fail(error)
                self._queue.remove(rows[0].request)
                return
            for share in shares.values():  # one bad request must not fail its neighbours: each runs again alone
                await self._serve(share)
        else:
            self.work.batches += 1
            self.work.rows += len(rows)
            self.work.tokens += sum(map(len, ids))
            self.work.forward_s += loop.time() - began
            for row, vector in zip(rows, vectors, strict=True):
                row.request.take(row.position, vector)


class _Row:
    """One text of a request."""

    __slots__ = ("ids", "position", "request")

    def __init__(self, request: _Request, position: int, ids: list[int]) -> None:
        self.request, self.position, self.ids = request, position, ids


class _Request:
    """Rows submitted together, and the vectors they got so far."""

    def __init__(self, input_ids: Sequence[list[int]], lane: Lane, loop: asyncio.AbstractEventLoop) -> None:
        self.lane = lane
        self.arrived = loop.time()
        self.began = 0.0
        self.result: asyncio.Future[list[np.ndarray]] = loop.create_future()
        self.rows = [_Row(self, position, ids) for position, ids in enumerate(input_ids)]
        self.waiting = OrderedDict.fromkeys(sorted(self.rows, key=lambda row: len(row.ids)))  # longest last
        self._vectors: list[np.ndarray | None] = [None] * len(self.rows)
        self._missing = len(self.rows)

    def take(self, position: int, vector: np.ndarray) -> None:
        self._vectors[position] = vector
        self._missing -= 1
        if not self._missing and not self.result.done():
            self.result.set_result(self._vectors)  # type: ignore[arg-type]

    def fail(self, error: Exception) -> None:
        if not self.result.done():
            self.result.set_exception(error)


class _Queue:
    """Waiting rows, found by turn (which request is next) and by length (which rows fit a batch)."""

    def __init__(self, padded: bool) -> None:
        self._padded = padded
        self.requests: OrderedDict[_Request, None] = OrderedDict()  # least recently served first
        self.num_tokens = 0
        # lane -> row length -> rows in order of arrival
        self._buckets: dict[Lane, dict[int, OrderedDict[_Row, None]]] = defaultdict(dict)

    def add(self, request: _Request) -> None:
        if not request.rows:
            raise ValueError("a request needs at least one row")
        self.requests[request] = None
        buckets = self._buckets[request.lane]
        for row in request.rows:
            buckets.setdefault(len(row.ids), OrderedDict())[row] = None
            self.num_tokens += len(row.ids)

    def remove(self, request: _Request) -> None:
        """Takes what still waits of a request out of the queue; nothing may be left of it."""
        for row in list(request.waiting):
            self._take(row)

    def take_batch(self, tokens_per_batch: int) -> list[_Row]:
        """The next batch, out of the queue; needs a waiting request."""
        request = next(iter(self.requests))
        self.requests.move_to_end(request)
        seed = next(reversed(request.waiting))
        self._take(seed)
        rows, longest, real = [seed], len(seed.ids), len(seed.ids)
        buckets = self._buckets.get(request.lane, {})
        for length in sorted(buckets, key=lambda length: abs(length - len(seed.ids))):
            while length in buckets:
                size = max(longest, length) * (len(rows) + 1) if self._padded else real + length
                if size > tokens_per_batch or size > max(CHEAP_TOKENS, MAX_PADDING_RATIO * (real + length)):
                    break
                row = next(iter(buckets[length]))
                self._take(row)
                rows.append(row)
                longest, real = max(longest, length), real + length
        return rows

    def _take(self, row: _Row) -> None:
        request, length = row.request, len(row.ids)
        buckets = self._buckets[request.lane]
        del buckets[length][row], request.waiting[row]
        if not buckets[length]:
            del buckets[length]
        if not buckets:
            del self._buckets[request.lane]
        if not request.waiting:
            del self.requests[request]
        self.num_tokens -= length
