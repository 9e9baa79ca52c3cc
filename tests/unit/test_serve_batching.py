"""The batcher against a fake model whose answer a person can compute: a row's vector is (sum of its ids, prompt length)."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest

from ullme_ray.errors import ServeError
from ullme_ray.serve.batching import CHEAP_TOKENS, MAX_PADDING_RATIO, TokenBatcher

POISON = 666


class FakeModel:
    """Records the batches it gets; `hold` keeps the forward waiting, so that requests queue up behind it."""

    def __init__(self) -> None:
        self.batches: list[list[list[int]]] = []
        self.open = threading.Event()
        self.open.set()

    def __call__(self, input_ids: list[list[int]], prompt_length: int) -> np.ndarray:
        assert self.open.wait(20)
        self.batches.append(input_ids)
        if any(POISON in ids for ids in input_ids):
            raise ValueError("poisoned")
        return np.array([[sum(ids), prompt_length] for ids in input_ids], dtype=np.float32)


def answer(input_ids: list[list[int]], prompt_length: int) -> list[list[float]]:
    return [[float(sum(ids)), float(prompt_length)] for ids in input_ids]


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test, 30)

    asyncio.run(bounded())


async def queued(
    batcher: TokenBatcher, *requests: list[list[int]], prompt_length: int = 0
) -> list[asyncio.Task[list[np.ndarray]]]:
    """Submits requests one after the other, without waiting for their answers."""
    tasks = []
    for input_ids in requests:
        before = batcher.waiting_tokens
        tasks.append(asyncio.create_task(batcher.submit(input_ids, prompt_length)))
        while batcher.waiting_tokens == before:
            await asyncio.sleep(0)
    return tasks


async def held(model: FakeModel, batcher: TokenBatcher) -> asyncio.Task[list[np.ndarray]]:
    """A first request that occupies the model until `model.open` is set."""
    model.open.clear()
    first = asyncio.create_task(batcher.submit([[1]], 0))
    await asyncio.sleep(0.05)
    assert batcher.waiting_tokens == 0, "the first request should be in the forward by now"
    return first


def test_every_row_gets_its_own_answer_in_any_mix_and_order() -> None:
    async def test() -> None:
        model, shuffle = FakeModel(), random.Random(5)
        batcher = TokenBatcher(model, tokens_per_batch=512, wait_s=0.001)
        requests = [
            (
                [[shuffle.randrange(100) for _ in range(shuffle.randrange(1, 90))] for _ in range(shuffle.randrange(1, 9))],
                shuffle.randrange(3),
            )
            for _ in range(200)
        ]
        answers = await asyncio.gather(*(batcher.submit(ids, prompt_length) for ids, prompt_length in requests))
        for vectors, (ids, prompt_length) in zip(answers, requests, strict=True):
            assert np.stack(vectors).tolist() == answer(ids, prompt_length)
        assert sum(map(len, model.batches)) == sum(len(ids) for ids, _ in requests), "each row runs once"
        assert len(model.batches) < len(requests), "requests share batches"
        await batcher.close()

    run(test())


def test_batches_keep_to_the_budget_and_waste_little_on_padding() -> None:
    async def test() -> None:
        model, shuffle = FakeModel(), random.Random(6)
        batcher = TokenBatcher(model, tokens_per_batch=2000, wait_s=0.001)
        await asyncio.gather(*(batcher.submit([[1] * shuffle.randrange(1, 400)], 0) for _ in range(300)))
        for batch in model.batches:
            padded, real = len(batch) * max(map(len, batch)), sum(map(len, batch))
            assert padded <= 2000
            assert padded <= max(CHEAP_TOKENS, MAX_PADDING_RATIO * real)
        await batcher.close()

    run(test())


def test_a_row_over_the_budget_goes_alone() -> None:
    async def test() -> None:
        model = FakeModel()
        batcher = TokenBatcher(model, tokens_per_batch=10, wait_s=0.001)
        await asyncio.gather(batcher.submit([[1] * 30, [1] * 3], 0), batcher.submit([[1] * 2], 0))
        assert [1] * 30 in [batch[0] for batch in model.batches if len(batch) == 1]
        await batcher.close()

    run(test())


def test_rows_of_different_prompts_never_share_a_batch() -> None:
    async def test() -> None:
        model = FakeModel()
        batcher = TokenBatcher(model, tokens_per_batch=1000, wait_s=0.02)
        await asyncio.gather(*(batcher.submit([[7, n]], n % 2) for n in range(8)))
        assert sorted(sorted(ids[1] % 2 for ids in batch) for batch in model.batches) == [[0] * 4, [1] * 4]
        await batcher.close()

    run(test())


def test_an_oversized_request_gives_way_to_small_ones_after_each_batch() -> None:
    async def test() -> None:
        model = FakeModel()
        batcher = TokenBatcher(model, tokens_per_batch=1000, wait_s=0)
        first = await held(model, batcher)
        huge, small, other = await queued(batcher, [[2] * 500] * 40, [[3] * 5], [[4] * 50])  # 20 batches, then 1 each
        model.open.set()
        await asyncio.gather(first, small, other)
        assert not huge.done()
        assert [len(batch) for batch in model.batches[:2]] == [1, 2], "the huge one came first, so it takes the first turn"
        assert any([3] * 5 in batch for batch in model.batches[:4])
        assert any([4] * 50 in batch for batch in model.batches[:4])
        assert np.stack(await huge).tolist() == answer([[2] * 500] * 40, 0)
        await batcher.close()

    run(test())


def test_an_odd_length_does_not_starve_under_a_stream_of_others() -> None:
    async def test() -> None:
        model = FakeModel()
        batcher = TokenBatcher(model, tokens_per_batch=600, wait_s=0)
        stop = False

        async def stream() -> None:
            while not stop:
                await batcher.submit([[1] * 300] * 2, 0)

        streams = [asyncio.create_task(stream()) for _ in range(4)]
        await asyncio.sleep(0.05)
        before = len(model.batches)
        await batcher.submit([[5]], 0)
        waited = next(p for p, batch in enumerate(model.batches[before:]) if [5] in batch)
        assert waited <= 6, "at most a batch per request before it, and the one that was running"
        stop = True
        await asyncio.gather(*streams)
        await batcher.close()

    run(test())


def test_an_error_reaches_the_request_that_caused_it_and_no_other() -> None:
    async def test() -> None:
        model = FakeModel()
        batcher = TokenBatcher(model, tokens_per_batch=1000, wait_s=0)
        first = await held(model, batcher)
        good, bad, better = await queued(batcher, [[1, 2]], [[3, 4], [POISON, 5]], [[6, 7]])
        model.open.set()
        await asyncio.gather(first, good, better)
        assert np.stack(good.result()).tolist() == answer([[1, 2]], 0)
        assert np.stack(better.result()).tolist() == answer([[6, 7]], 0)
        with pytest.raises(ValueError, match="poisoned"):
            await bad
        assert np.stack(await batcher.submit([[8]], 0)).tolist() == answer([[8]], 0), "the batcher goes on"
        await batcher.close()

    run(test())


def test_a_failed_request_wastes_no_further_batches() -> None:
    async def test() -> None:
        model = FakeModel()
        batcher = TokenBatcher(model, tokens_per_batch=10, wait_s=0)
        with pytest.raises(ValueError, match="poisoned"):
            await batcher.submit([[POISON] * 9, *([1] * 8 for _ in range(20))], 0)
        assert batcher.waiting_tokens == 0
        assert np.stack(await batcher.submit([[1]], 0)).tolist() == answer([[1]], 0)
        assert len(model.batches) <= 3
        await batcher.close()

    run(test())


def test_a_cancelled_request_leaves_the_queue() -> None:
    async def test() -> None:
        model = FakeModel()
        batcher = TokenBatcher(model, tokens_per_batch=1000, wait_s=0)
        first = await held(model, batcher)
        gone, stays = await queued(batcher, [[41, 1], [42, 1]], [[43, 1]])
        gone.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        model.open.set()
        await asyncio.gather(first, stays)
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert model.batches == [[[1]], [[43, 1]]]
        await batcher.close()

    run(test())


def test_a_request_cancelled_in_the_forward_harms_nobody() -> None:
    async def test() -> None:
        model = FakeModel()
        batcher = TokenBatcher(model, tokens_per_batch=1000, wait_s=0)
        first = await held(model, batcher)
        (behind,) = await queued(batcher, [[9, 9]])
        first.cancel()
        model.open.set()
        assert np.stack(await behind).tolist() == answer([[9, 9]], 0)
        await batcher.close()

    run(test())


def test_closing_fails_what_waits_and_what_comes_after() -> None:
    async def test() -> None:
        model = FakeModel()
        batcher = TokenBatcher(model, tokens_per_batch=1000, wait_s=0)
        first = await held(model, batcher)
        (waiting,) = await queued(batcher, [[2]])
        closing = asyncio.create_task(batcher.close())
        model.open.set()
        await closing
        for task in (first, waiting):
            with pytest.raises(ServeError, match="stopping"):
                await task
        with pytest.raises(ServeError, match="stopping"):
            await batcher.submit([[1]], 0)

    run(test())


def test_without_padding_a_batch_holds_any_lengths() -> None:
    async def test() -> None:
        for padded in (True, False):
            model = FakeModel()
            batcher = TokenBatcher(model, tokens_per_batch=1000, wait_s=0, padded=padded)
            first = await held(model, batcher)
            waiting = await queued(batcher, *([[2] * length] for length in (500, 300, 150, 40, 400)))
            model.open.set()
            await asyncio.gather(first, *waiting)
            sizes = [sorted(map(len, batch)) for batch in model.batches[1:]]
            assert sizes == ([[400, 500], [300], [150], [40]] if padded else [[40, 400, 500], [150, 300]])
            await batcher.close()

    run(test())


def test_a_lone_request_does_not_wait_for_company_and_one_among_others_does() -> None:
    async def test() -> None:
        model = FakeModel()
        batcher = TokenBatcher(model, tokens_per_batch=1000, wait_s=30)  # so long that waiting for it fails the test
        for _ in range(2):
            await asyncio.wait_for(batcher.submit([[1, 2]], 0), 10)
        first = await held(model, batcher)
        together = await queued(batcher, [[3]], [[4]])
        model.open.set()
        await first
        waiting = asyncio.gather(*together)
        await asyncio.sleep(0.1)
        assert not waiting.done(), "several requests at once: worth waiting for more"
        filling = [batcher.submit([[5] * 500], 0), batcher.submit([[6] * 600], 0)]
        await asyncio.wait_for(asyncio.gather(waiting, *filling), 10)
        assert batcher.work.rows == 7
        await batcher.close()

    run(test())


def test_what_was_done_is_counted() -> None:
    async def test() -> None:
        model = FakeModel()
        batcher = TokenBatcher(model, tokens_per_batch=1000, wait_s=0)
        await batcher.submit([[1, 2, 3], [4]], 0)
        assert (batcher.work.rows, batcher.work.tokens, batcher.work.batches) == (2, 4, len(model.batches))
        assert batcher.waiting_requests == 0
        await batcher.close()

    run(test())
