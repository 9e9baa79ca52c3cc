"""A model folder in an object store is as good as a local one."""

from __future__ import annotations

from typing import Any

import pytest

from ullme_ray import storage
from ullme_ray.errors import ModelError
from ullme_ray.model import check_base, encoder_fingerprint, open_encoder
from ullme_ray.spec import JobSpec


def make_job(base: str) -> JobSpec:
    model = {"base": base, "max_tokens": 64}
    return JobSpec.model_validate({"name": "t", "model": model, "embed": {"input": {"path": "x"}}})


def test_base_on_s3_gives_the_vectors_of_the_local_folder(tiny_base: str, s3: Any) -> None:
    remote = f"{s3.bucket('models')}/some/base"
    storage.put_folder(tiny_base, remote)
    check_base(make_job(remote))
    here, there = open_encoder(make_job(tiny_base), device="cpu"), open_encoder(make_job(remote), device="cpu")
    texts = ["make a bucket private", "a"]
    assert (here.encode(texts) * there.encode(texts)).sum(axis=1).min() >= 0.999999
    assert here.fingerprint == there.fingerprint == encoder_fingerprint(make_job(remote))


@pytest.mark.parametrize("path", ["models/nothing/here", "no-such-bucket/base"])
def test_base_that_is_not_there_is_told(s3: Any, path: str) -> None:
    s3.bucket("models")
    with pytest.raises(ModelError, match=rf"model\.base = s3://{path} cannot be read"):
        check_base(make_job(f"s3://{path}"))
