"""Rows of many requests -> forward passes of one token budget. Plain asyncio: knows nothing of Ray, HTTP or torch.

Requests take turns: each batch is built around the longest waiting row of the request that was served least recently, then
filled with rows of any request that are about as long (padding is work thrown away). So a request waits at most one batch per
request before it, a huge one gives way after each batch, and none starves. While a batch runs in its thread, the next
collects in the queue.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ullme_ray.errors import ServeError

Forward = Callable[[list[list[int]], int], np.ndarray]  # ids of N rows, their prompt length -> (N, D)

MAX_PADDING_RATIO = 1.25  # padded tokens / real tokens of a batch
CHEAP_TOKENS = 256  # below this size a forward costs the same whatever is in it, so padding is free


class TokenBatcher:
    """Shares forward passes between concurrent `submit` calls. Bound to the event loop of the first one.

    Args:
        forward: called in a thread of its own, one batch at a time, with rows of one prompt length.
        tokens_per_batch: rows x longest row of a batch; a longer row goes alone.
        wait_s: how long a row may wait for company while the forward is idle.
    """

    def __init__(self, forward: Forward, *, tokens_per_batch: int, wait_s: float) -> None:
        self._forward = forward
        self._tokens_per_batch = tokens_per_batch
        self._wait_s = wait_s
        self._queue = _Queue()
        self._unanswered: set[_Request] = set()
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="forward")
        self._loop_task: asyncio.Task[None] | None = None
        self._closed = False

    async def submit(self, input_ids: Sequence[list[int]], prompt_length: int) -> np.ndarray:
        """(N, D) vectors of the rows, in their order. Cancelling the call takes its waiting rows out of the queue.

        Raises:
            ServeError: the batcher was closed.
            Exception: whatever `forward` raised for a batch of this request's rows alone.
        """
        if self._closed:
            raise ServeError("the server is stopping")
        loop = asyncio.get_running_loop()
        if self._loop_task is None:
            self._loop_task = loop.create_task(self._run())
        request = _Request(input_ids, prompt_length, loop)
        self._queue.add(request)
        self._unanswered.add(request)
        self._arrival.set()
        try:
            return await request.result
        finally:
            self._queue.remove(request)
            self._unanswered.remove(request)

    @property
    def waiting_tokens(self) -> int:
        return self._queue.num_tokens

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
            time_left = next(iter(self._queue.requests)).arrived + self._wait_s - loop.time()
            if time_left <= 0 or self._queue.num_tokens >= self._tokens_per_batch:
                return
            try:
                async with asyncio.timeout(time_left):
                    await self._arrival.wait()
            except TimeoutError:
                pass

    async def _serve(self, rows: list[_Row]) -> None:
        ids, prompt_length = [row.ids for row in rows], rows[0].request.prompt_length
        try:
            vectors = await asyncio.get_running_loop().run_in_executor(self._thread, self._forward, ids, prompt_length)
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
            for row, vector in zip(rows, vectors, strict=True):
                row.request.take(row.position, vector)


class _Row:
    """One text of a request."""

    __slots__ = ("ids", "position", "request")

    def __init__(self, request: _Request, position: int, ids: list[int]) -> None:
        self.request, self.position, self.ids = request, position, ids


class _Request:
    """Rows submitted together, and the vectors they got so far."""

    def __init__(self, input_ids: Sequence[list[int]], prompt_length: int, loop: asyncio.AbstractEventLoop) -> None:
        self.prompt_length = prompt_length
        self.arrived = loop.time()
        self.result: asyncio.Future[np.ndarray] = loop.create_future()
        self.rows = [_Row(self, position, ids) for position, ids in enumerate(input_ids)]
        self.waiting = OrderedDict.fromkeys(sorted(self.rows, key=lambda row: len(row.ids)))  # longest last
        self._vectors: list[np.ndarray | None] = [None] * len(self.rows)
        self._missing = len(self.rows)

    def take(self, position: int, vector: np.ndarray) -> None:
        self._vectors[position] = vector
        self._missing -= 1
        if not self._missing and not self.result.done():
            self.result.set_result(np.stack(self._vectors))  # type: ignore[arg-type]

    def fail(self, error: Exception) -> None:
        if not self.result.done():
            self.result.set_exception(error)


class _Queue:
    """Waiting rows, found by turn (which request is next) and by length (which rows fit a batch)."""

    def __init__(self) -> None:
        self.requests: OrderedDict[_Request, None] = OrderedDict()  # least recently served first
        self.num_tokens = 0
        # prompt length -> row length -> rows in order of arrival
        self._buckets: dict[int, dict[int, OrderedDict[_Row, None]]] = defaultdict(dict)

    def add(self, request: _Request) -> None:
        if not request.rows:
            raise ValueError("a request needs at least one row")
        self.requests[request] = None
        buckets = self._buckets[request.prompt_length]
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
        buckets = self._buckets.get(request.prompt_length, {})
        for length in sorted(buckets, key=lambda length: abs(length - len(seed.ids))):
            while length in buckets:
                padded = max(longest, length) * (len(rows) + 1)
                if padded > tokens_per_batch or padded > max(CHEAP_TOKENS, MAX_PADDING_RATIO * (real + length)):
                    break
                row = next(iter(buckets[length]))
                self._take(row)
                rows.append(row)
                longest, real = max(longest, length), real + length
        return rows

    def _take(self, row: _Row) -> None:
        request, length = row.request, len(row.ids)
        buckets = self._buckets[request.prompt_length]
        del buckets[length][row], request.waiting[row]
        if not buckets[length]:
            del buckets[length]
        if not buckets:
            del self._buckets[request.prompt_length]
        if not request.waiting:
            del self.requests[request]
        self.num_tokens -= length
