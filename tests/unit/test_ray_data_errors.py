"""Ray's failures in a sentence: what a user reads when a pipeline stops."""

from __future__ import annotations

import ray.exceptions

from ullme_ray.embed.flow import STAGE
from ullme_ray.errors import EmbedError
from ullme_ray.ray_data import explained


def test_a_lack_of_memory_is_named_with_a_way_out() -> None:
    killed = ray.exceptions.OutOfMemoryError("Task was killed.\nRefer to the documentation on how to address the issue")
    for error in (killed, ray.exceptions.RaySystemError(f"caused by ray.exceptions.OutOfMemoryError: {killed}")):
        told = explained(STAGE, error)
        assert isinstance(told, EmbedError)
        assert "memory was nearly full; lower embed" in str(told)
        assert "Refer to" not in str(told)


def test_an_error_raised_on_purpose_comes_out_as_it_was() -> None:
    cause = EmbedError("corpus.jsonl cannot be read")
    wrapped = ray.exceptions.RayTaskError("read", "a traceback", cause)
    assert explained(STAGE, wrapped) is cause


def test_of_a_long_report_the_first_error_is_told() -> None:
    report = "The worker died.\n  File x\nValueError: a number\nray.exceptions.OwnerDiedError: later"
    assert "embedding stopped: ValueError: a number; the next run" in str(
        explained(STAGE, ray.exceptions.RaySystemError(report))
    )
