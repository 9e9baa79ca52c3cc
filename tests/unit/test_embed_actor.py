"""What an embed actor does at once: it writes one unit while it embeds the next, and does neither beside one tried again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock
from typing import Any

import pytest

from ullme_ray.embed import steps
from ullme_ray.embed.steps import EmbedActor

WAIT_S = 30.0


class Seen:
    def __init__(self) -> None:
        self.writing, self.embedding_second, self.finish = Event(), Event(), Event()


def actor(monkeypatch: pytest.MonkeyPatch, seen: Seen, retries: int) -> Any:
    """One whose first unit is being written until the test lets it go."""

    @contextlib.contextmanager
    def counted(*_: Any) -> Iterator[int]:
        yield retries

    def embed(self: Any, unit: str, texts: Any) -> tuple[None, None]:
        if unit == "second":
            seen.embedding_second.set()
        return None, None

    def write(unit: str, *_: Any) -> str:
        if unit == "first":
            seen.writing.set()
            assert seen.finish.wait(WAIT_S)
        return unit

    monkeypatch.setattr(steps, "_counted", counted)
    monkeypatch.setattr(steps, "_write", write)
    monkeypatch.setattr(EmbedActor, "_embed", embed)
    new: Any = EmbedActor.__new__(EmbedActor)
    new._embedding, new._attempts, new._context = Lock(), None, None
    return new


@contextlib.contextmanager
def two_units(new: Any, seen: Seen) -> Iterator[None]:
    """The block runs while the first is being written and the second was handed over; then both must end well."""
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(new._attempt, "first", None)
        assert seen.writing.wait(WAIT_S)
        second = pool.submit(new._attempt, "second", None)
        yield
        assert not first.done()
        seen.finish.set()
        assert (first.result(), second.result()) == ("first", "second")


def test_the_next_unit_is_embedded_while_one_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen()
    with two_units(actor(monkeypatch, seen, retries=0), seen):
        assert seen.embedding_second.wait(WAIT_S)


def test_nothing_is_embedded_beside_a_unit_that_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen()
    with two_units(actor(monkeypatch, seen, retries=1), seen):
        assert not seen.embedding_second.wait(0.2)
