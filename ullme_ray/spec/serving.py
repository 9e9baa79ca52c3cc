"""The `serve` section: the models and their replicas, the port, keys and limits."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from ullme_ray.spec.secrets import SecretRef
from ullme_ray.spec.section import AutoOrCount, Name, NonNegative, Positive, Section, ServedName


class ReplicasSpec(Section):
    min: NonNegativeInt = Field(
        1, description="Serving processes kept at least; with 0 an idle model ends, and the next request waits for it to load."
    )
    max: PositiveInt = Field(1, description="Serving processes at most.")
    idle_s: Positive = Field(300.0, description="A process above `min` ends after so long without enough to do.")


class ServedModelSpec(Section):
    name: ServedName = Field(description="What clients ask for as `model`.")
    run: Name | None = Field(None, description="Another run under the same storage, whose model is served.")
    base: str | None = Field(
        None, min_length=1, description="Hugging Face name, local or s3:// folder of a model, instead of `run`."
    )
    replicas: ReplicasSpec = Field(ReplicasSpec(), description="The pool of serving processes of this model.")


class AdapterSpec(Section):
    name: ServedName = Field(description="What clients ask for as `model`.")
    path: str = Field(
        min_length=1,
        description="PEFT folder of a LoRA adapter for the job's own model, such as another run's `adapter`; prompts, pooling"
        " and length are the model's.",
    )


class ServeSpec(Section):
    host: str = Field("127.0.0.1", description="Address to bind; loopback unless you say otherwise.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="Port to bind; 0 picks a free one.")
    replicas: ReplicasSpec = Field(ReplicasSpec(), description="The pool of serving processes.")
    models: Annotated[tuple[ServedModelSpec, ...], Field(strict=False)] = Field(
        (), description="Further models, each with replicas of its own."
    )
    adapters: Annotated[tuple[AdapterSpec, ...], Field(strict=False)] = Field(
        (), description="LoRA adapters over the job's own model, which all share its replicas and weights."
    )
    reload_s: NonNegative = Field(
        0.0,
        description="How often replicas look for a newly published model and change over to it, in seconds; 0 never does."
        " A table embedded before answers no more to the new model's vectors.",
    )
    warm_up: bool = Field(True, description="Replicas run a full batch before they take requests.")
    gpus_per_replica: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="GPUs of one replica; a fraction shares a GPU and is held to that part of its memory."
    )
    cpus_per_replica: PositiveInt = Field(1, description="CPU cores reserved for one replica.")
    api_keys: SecretRef | None = Field(
        None, description="Accepted API keys, one per line or comma-separated, as env:NAME or file:PATH."
    )
    requests_per_minute: PositiveInt | None = Field(
        None, description="POST requests of one key per minute; beyond it the answer is 429. Absent: no limit."
    )
    access_log: bool = Field(True, description="A JSON line per request in Ray Serve's folder of logs; never a text or key.")
    tokens_per_batch: AutoOrCount = Field(
        "auto",
        description="Tokens of one forward pass; auto times a few numbers when a replica starts and takes the least that is"
        " about as fast as any, so that nobody waits longer than it pays.",
    )
    batch_wait_ms: Annotated[float, Field(ge=0.0, le=1000.0)] = Field(
        2.0, description="How long a request may wait for others to share its forward pass, while several are being served."
    )
    max_inputs: PositiveInt = Field(2048, description="Texts in one request at most.")
    max_body_bytes: PositiveInt = Field(8 * 2**20, description="Size of one request at most.")
    max_request_tokens: PositiveInt = Field(300_000, description="Tokens in one request at most, once its texts are cut.")
    request_timeout_s: Annotated[float, Field(gt=0.0, le=3600.0)] = Field(
        300.0, description="How long a request may take; then the answer is 504. A client may ask for less: x-timeout-ms."
    )
    max_queued_requests: PositiveInt = Field(512, description="Requests waiting at most; beyond it the answer is 429.")
    keep_running: bool = Field(
        True, description="`run` goes on serving until Ctrl-C; false stops after the questions of `search`."
    )
