"""The clients of tests/bench/serve.py, in a process of their own: a JSON object per line in (a `Load`), one per line out.

Bodies are made before the clock runs and answers are not parsed, so that the clients take as little as they can from a server
on the same cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import resource
import sys
from dataclasses import dataclass
from typing import Any

import aiohttp

UNANSWERED, CUT = 0, -1  # in place of an HTTP status: still waiting when the load ended; the connection failed


@dataclass(frozen=True)
class Load:
    """Texts in turn, one a request, for some seconds: by clients that ask again once answered, or at a rate whatever comes."""

    url: str
    texts: list[str]
    seconds: float
    models: list[str]  # names in turn
    clients: int = 0
    rate: float = 0.0  # requests/s, by a Poisson process, where `clients` is 0
    requests: int = 10**9  # at most


@dataclass(frozen=True)
class Answer:
    text: int  # its number
    status: int
    ended_s: float  # since the load began
    took_s: float


async def send(load: Load) -> list[Answer]:
    """What came of every request, in order of their ends. A closed loop waits for its last answers, an open one hangs up."""
    bodies = [
        json.dumps({"model": model, "input": [text], "encoding_format": "base64"}).encode()
        for text, model in zip(load.texts, itertools.cycle(load.models))
    ]
    answers: list[Answer] = []
    loop = asyncio.get_running_loop()
    numbers = iter(range(load.requests))

    async def ask(session: aiohttp.ClientSession, number: int) -> None:
        text, began, status = number % len(bodies), loop.time(), UNANSWERED
        try:
            async with session.post(load.url, data=bodies[text], headers={"content-type": "application/json"}) as response:
                await response.read()
                status = response.status
        except (aiohttp.ClientError, OSError):
            status = CUT
        finally:
            answers.append(Answer(text, status, loop.time() - start, loop.time() - began))

    async def client(session: aiohttp.ClientSession) -> None:
        while loop.time() < end and (number := next(numbers, None)) is not None:
            await ask(session, number)

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as session:
        start = loop.time()
        end = start + load.seconds
        if load.clients:
            await asyncio.gather(*(client(session) for _ in range(load.clients)))
        else:
            choose, at, tasks = random.Random(7), start, []
            while (at := at + choose.expovariate(load.rate)) < end:
                await asyncio.sleep(max(0.0, at - loop.time()))
                tasks.append(asyncio.create_task(ask(session, next(numbers))))
            await asyncio.sleep(max(0.0, end - loop.time()))
            for task in tasks:
                task.cancel()
            for task in tasks:
                with contextlib.suppress(asyncio.CancelledError):
                    await task
    return answers


def main() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection for each request of an open loop
    for line in sys.stdin:
        values: dict[str, Any] = json.loads(line)
        answers = asyncio.run(send(Load(**values)))
        print(json.dumps([[a.text, a.status, a.ended_s, a.took_s] for a in answers]), flush=True)


if __name__ == "__main__":
    main()
