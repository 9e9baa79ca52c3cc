"""A question as a vector: by the job's model in this process, or by a running server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from ullme_ray.errors import DataError, ServeError
from ullme_ray.model import open_encoder
from ullme_ray.spec import JobSpec
from ullme_ray.spec.secrets import SecretRef

REQUEST_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Question:
    vector: np.ndarray  # (D,) float32, unit length
    fingerprint: str  # of the model that made it


def embed_question(job: JobSpec, question: str, *, url: str | None = None, key: str | None = None) -> Question:
    """Embeds a question.

    Args:
        url: a running server; absent loads the model in this process.
        key: of that server, as env:NAME or file:PATH; absent takes the first of `serve.api_keys`.

    Raises:
        DataError: the question is empty, or the key is no reference.
        ServeError: the server does not answer, or refuses.
        ModelError: the model cannot be loaded.
    """
    if not question.strip():
        raise DataError("the question is empty; ask something")
    if url is None:
        encoder = open_encoder(job)
        return Question(encoder.encode([question], "query")[0], encoder.fingerprint)
    return _ask_server(job, question, url, _key(job, key))


def _key(job: JobSpec, given: str | None) -> str | None:
    if given is not None:
        if not given.startswith(("env:", "file:")):
            raise DataError("--key must be a reference, env:NAME or file:PATH: a key on the command line is seen by everyone")
        return SecretRef(given).reveal_list()[0].get_secret_value()
    keys = job.serve.api_keys.reveal_list() if job.serve and job.serve.api_keys else []
    return keys[0].get_secret_value() if keys else None


def _ask_server(job: JobSpec, question: str, url: str, key: str | None) -> Question:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    body = {"model": job.name, "input": question, "input_type": "query"}
    use_proxies = httpx.URL(url).host not in ("127.0.0.1", "localhost", "::1")
    with httpx.Client(base_url=url, headers=headers, timeout=REQUEST_TIMEOUT_S, trust_env=use_proxies) as client:
        info = _answer(client, "GET", "/info")
        vector = _answer(client, "POST", "/v1/embeddings", json=body)["data"][0]["embedding"]
    return Question(np.asarray(vector, dtype=np.float32), info["fingerprint"])


def _answer(client: httpx.Client, method: str, route: str, **request: Any) -> dict[str, Any]:
    try:
        response = client.request(method, route, **request)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServeError(
            f"no answer from {client.base_url} ({error}); start a server with `ullme-ray serve`, or search without --server"
        ) from None
    try:
        content = response.json()
    except ValueError:
        content = None
    if response.status_code != 200 or not isinstance(content, dict):
        raise ServeError(f"{client.base_url} answered {route} with {response.status_code}: {_reason(content, response.text)}")
    return content


def _reason(content: Any, text: str) -> str:
    """OpenAI's errors are {"error": {"message": ...}}, text-embeddings-inference's {"error": ...}."""
    error = content.get("error") if isinstance(content, dict) else None
    if isinstance(error, dict):
        return str(error.get("message", error))
    return str(error or text[:200])
