"""Fixtures shared by all tests: a tiny real decoder, made on the spot."""

from __future__ import annotations

from pathlib import Path

import pytest

WORDS = "the a bucket object policy access makes private public list deletes creates key table query returns value request"


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder with a 2-layer Llama of width 32 (random weights, fixed seed) and a byte-level BPE tokenizer."""
    from ullme_ray.model.scratch import build_scratch
    from ullme_ray.spec.job import ScratchSpec

    folder: Path = tmp_path_factory.mktemp("tiny_base")
    build_scratch(
        [WORDS] * 4,
        ScratchSpec(hidden_size=32, layers=2, heads=4, vocab_size=300),
        max_tokens=128,
        seed=7,
        folder=str(folder),
    )
    return str(folder)
