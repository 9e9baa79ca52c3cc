"""The `train` section: rows, batches, optimizer, ranks, checkpoints."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from ullme_ray.spec.objective import ObjectiveSpec
from ullme_ray.spec.secrets import SecretRef
from ullme_ray.spec.section import Fraction, NonNegative, Positive, PromptsSpec, Section


class SourceSpec(Section):
    path: str = Field(
        min_length=1,
        description="File, folder or glob of JSONL, JSON, CSV (each plain or .gz, .zst, .bz2, .lz4), Parquet or Arrow rows "
        "{query, positive(s), negative(s), scores}; a Hugging Face dataset folder too.",
    )
    weight: Positive = Field(1.0, description="Share of the batches drawn from this source, relative to the others.")
    prompts: PromptsSpec | None = Field(None, description="Prompts for this source's rows; absent means model.prompts.")
    in_batch_negatives: bool = Field(
        True,
        description="Passages of other rows count as negatives; false for classes and clusters, where they may be as right.",
    )


class WorkersSpec(Section):
    num_workers: PositiveInt = Field(1, description="Training ranks W.")
    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] = Field(0, description="GPUs of one rank: 0 (CPU, gloo) or 1 (NCCL).")
    cpus_per_worker: PositiveInt = Field(1, description="CPU cores reserved for one rank.")
    min_workers: PositiveInt | None = Field(
        None,
        description="After a loss of ranks go on with as few as so many, the most that divide global_batch_size; absent means "
        "wait until num_workers fit again.",
    )
    timeout_s: Annotated[int, Field(ge=1)] = Field(
        600, description="Seconds that ranks wait for one another in an operation; then the run names who did not answer."
    )
    gpu_memory_gb: Positive | None = Field(
        None, description="Memory of one GPU in GiB, such as 80: `plan` then says what fits; absent means that it does not."
    )


class DeepSpeedSpec(Section):
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="ZeRO stage: shard nothing, optimizer, + gradients, + parameters.")
    offload_optimizer: bool = Field(False, description="Keep optimizer state in CPU memory and update there (ZeRO 1 to 3).")
    offload_parameters: bool = Field(False, description="Keep the sharded parameters in CPU memory (ZeRO 3).")


class ValidationSpec(Section):
    path: str = Field(min_length=1, description="Held-out folder in BEIR layout: corpus.jsonl, queries.jsonl, qrels/test.tsv.")
    every_steps: PositiveInt = Field(50, description="Steps between two validations, each by all ranks together.")
    max_queries: PositiveInt = Field(500, description="Queries used at most (seeded choice).")
    max_passages: PositiveInt = Field(5000, description="Passages searched at most: the relevant ones, then a seeded choice.")
    k: PositiveInt = Field(10, description="Cut-off of the nDCG@k that decides.")
    patience: PositiveInt | None = Field(
        None, description="Stop after so many validations without a better nDCG; absent means never."
    )
    export: Literal["best", "last"] = Field(
        "best", description="Which weights become the model: the best validated or the last."
    )


class TrainSpec(Section):
    objective: ObjectiveSpec = Field(
        ObjectiveSpec.model_validate("grl"),
        description="cl | sft | dpo | grl | genc, or a mapping {preset: grl, temperature: 0.02, ...}.",
    )
    data: Annotated[tuple[SourceSpec, ...], Field(strict=False, min_length=1)] = Field(
        description="Where training rows come from."
    )
    global_batch_size: Annotated[int, Field(ge=2)] = Field(64, description="Queries in one optimizer step, over all ranks.")
    chunk_size: PositiveInt = Field(8, description="Queries of one GradCache chunk: memory only, never the gradient.")
    positives_per_query: PositiveInt = Field(1, description="Positive passages P taken from a row in one step.")
    negatives_per_query: Annotated[int, Field(ge=0)] = Field(1, description="Hard negatives N taken from a row in one step.")
    missing_negatives: Literal["sample", "reject"] = Field(
        "sample", description="A row with too few hard negatives: fill up with passages of other rows, or leave the row out."
    )
    max_rejected_share: Fraction = Field(
        0.1, description="Share of a source's rows that may be unusable (0 to 1); beyond it the run stops before it trains."
    )
    max_steps: PositiveInt = Field(500, description="Optimizer steps.")
    learning_rate: Positive = Field(1e-4, description="Peak learning rate of AdamW.")
    weight_decay: NonNegative = Field(0.0, description="Decoupled weight decay.")
    warmup_ratio: Fraction = Field(0.1, description="Share of the steps that warms the learning rate up.")
    lr_schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Learning rate after warm-up.")
    max_grad_norm: NonNegative = Field(0.0, description="Clip the global gradient norm to this; 0 is no clipping.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass to save memory.")
    max_generation_tokens: Annotated[int, Field(ge=8)] | None = Field(
        None, description="Cut of prompt + passage in the generation pass; absent means model.max_tokens."
    )
    workers: WorkersSpec = Field(WorkersSpec(), description="Ray Train workers.")
    deepspeed: DeepSpeedSpec = Field(DeepSpeedSpec(), description="DeepSpeed engine.")
    validation: ValidationSpec | None = Field(None, description="Retrieval quality on held-out queries while training runs.")
    checkpoint_every_steps: PositiveInt = Field(50, description="Steps between two checkpoints.")
    checkpoint_key: SecretRef | None = Field(
        None, description="Key that signs checkpoints, as env:NAME or file:PATH; others are then refused. Absent: hashes alone."
    )
    keep_checkpoints: PositiveInt = Field(2, description="Newest checkpoints kept.")
    max_failures: Annotated[int, Field(ge=0)] = Field(
        3, description="Worker deaths survived by restarting from the last checkpoint."
    )
    log_every_steps: PositiveInt = Field(1, description="Steps between two lines of metrics.")
    trackers: Annotated[tuple[Literal["wandb", "mlflow"], ...], Field(strict=False)] = Field(
        (), description="Services that get the metrics as well; absent means that nothing leaves the machine."
    )

    @property
    def warmup_steps(self) -> int:
        return math.ceil(self.warmup_ratio * self.max_steps)
