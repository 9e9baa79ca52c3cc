"""The job file as typed, frozen objects: every default, unit and allowed value lives here or in its section's module.

Imports neither torch nor ray, so `ullme-ray check` answers at once. The sections can be imported from here.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from ullme_ray.spec.cluster import ClusterSpec, ScheduleSpec
from ullme_ray.spec.embedding import ActorsSpec, ChunksSpec, EmbedInputSpec, EmbedOutputSpec, EmbedSpec, Unpadded
from ullme_ray.spec.evaluation import EvaluateSpec
from ullme_ray.spec.mining import CorpusSpec, EncoderSpec, MineSpec
from ullme_ray.spec.model import LatentAttentionSpec, LoraSpec, ModelSpec, ScratchSpec
from ullme_ray.spec.section import Name, PromptsSpec, Section
from ullme_ray.spec.serving import AdapterSpec, ReplicasSpec, ServedModelSpec, ServeSpec
from ullme_ray.spec.training import DeepSpeedSpec, SourceSpec, TrainSpec, ValidationSpec, WorkersSpec

__all__ = [
    "ActorsSpec",
    "AdapterSpec",
    "ChunksSpec",
    "ClusterSpec",
    "CorpusSpec",
    "DatasetSpec",
    "DeepSpeedSpec",
    "EmbedInputSpec",
    "EmbedOutputSpec",
    "EmbedSpec",
    "EncoderSpec",
    "EvaluateSpec",
    "JobSpec",
    "LatentAttentionSpec",
    "LoraSpec",
    "MineSpec",
    "ModelSpec",
    "PromptsSpec",
    "ReplicasSpec",
    "ScheduleSpec",
    "ScratchSpec",
    "SearchSpec",
    "ServeSpec",
    "ServedModelSpec",
    "SourceSpec",
    "TrainSpec",
    "Unpadded",
    "ValidationSpec",
    "WorkersSpec",
]


class DatasetSpec(Section):
    name: Literal["aws_api_docs"] = Field(
        description="A data set every installation has: aws_api_docs reads the API documentation inside botocore."
    )
    heldout_queries: PositiveInt = Field(300, description="Queries kept out of training, for evaluation.")
    negatives_per_query: Annotated[int, Field(ge=0)] = Field(
        4, description="Hard negatives: other operations of the same service."
    )
    max_pairs: PositiveInt | None = Field(None, description="Use only this many pairs (seeded choice); absent means all.")


class SearchSpec(Section):
    questions: Annotated[tuple[str, ...], Field(strict=False)] = Field((), description="Asked by `run` once the server is up.")
    top_k: PositiveInt = Field(3, description="Passages printed per question.")
    index: Literal["exact", "bits", "faiss"] = Field(
        "exact",
        description="exact compares every vector; bits and faiss find candidates in an index first, made when it is missing.",
    )
    oversample: PositiveInt = Field(20, description="Candidates of an index, per passage wanted, that are scored in float.")


class JobSpec(Section):
    """A whole job. Folders: everything lies under `storage`/`name`; a path `run:x` means x inside that folder."""

    name: Name = Field(description="Name of the run: lower-case letters, digits and dashes, at most 47.")
    storage: str = Field("runs", min_length=1, description="Local folder or s3:// prefix under which the run's folder is made.")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(13, description="Seed of data order, initial weights and dropout.")
    model: ModelSpec = Field(description="The backbone and how its states become a vector.")
    dataset: DatasetSpec | None = Field(None, description="A built-in data set, written to run:data before the first stage.")
    train: TrainSpec | None = Field(None, description="Fine-tuning on Ray Train and DeepSpeed.")
    evaluate: EvaluateSpec | None = Field(None, description="Quality: held-out retrieval, MTEB, generation.")
    mine: MineSpec | None = Field(None, description="Hard negatives for the training data; `ullme-ray mine` alone runs it.")
    embed: EmbedSpec | None = Field(None, description="Batch embedding on Ray Data into a Delta table.")
    serve: ServeSpec | None = Field(None, description="HTTP serving on Ray Serve.")
    search: SearchSpec = Field(SearchSpec(), description="Questions asked of the table.")
    schedule: ScheduleSpec | None = Field(None, description="When the job runs by itself, on Kubernetes.")
    cluster: ClusterSpec = Field(ClusterSpec(), description="Where the job runs.")

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that this job has, in the order in which `run` takes them."""
        # Queries over the embeddings table wait for it.
        embed_first = self.evaluate is not None and any(local.table for local in self.evaluate.local)
        middle = ("embed", "evaluate") if embed_first else ("evaluate", "embed")
        return tuple(stage for stage in ("train", *middle, "serve") if getattr(self, stage) is not None)
