"""The job file as typed, frozen objects: every default, unit and allowed value lives here, in objective.py or evaluation.py.

Imports neither torch nor ray, so `ullme-ray check` answers at once.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, GetJsonSchemaHandler, NonNegativeInt, PositiveInt, model_validator
from pydantic_core import CoreSchema

from ullme_ray.spec.cluster import ClusterSpec, ScheduleSpec
from ullme_ray.spec.evaluation import EvaluateSpec
from ullme_ray.spec.objective import ObjectiveSpec
from ullme_ray.spec.secrets import SecretRef
from ullme_ray.spec.section import (
    AutoOrCount,
    Fraction,
    Name,
    NonNegative,
    Positive,
    PromptsSpec,
    Section,
    ServedName,
    name_or_mapping,
)


class LoraSpec(Section):
    rank: PositiveInt = Field(16, description="Rank of the LoRA update matrices.")
    alpha: PositiveInt = Field(32, description="LoRA scale; the update is multiplied by alpha / rank.")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.1, description="Dropout on the LoRA input, 0 to 1.")
    adapters: Literal["shared", "separate"] = Field(
        "shared", description="One adapter for both passes, or one to encode and one to generate; only the first is exported."
    )
    quantize_base: Literal["nf4"] | None = Field(
        None, description="Hold the frozen base weights in 4 bits while training (QLoRA); needs a GPU and bitsandbytes."
    )


class ScratchSpec(Section):
    hidden_size: PositiveInt = Field(256, description="Width D of the decoder built for `base: scratch`.")
    layers: PositiveInt = Field(2, description="Number of decoder layers.")
    heads: PositiveInt = Field(4, description="Number of attention heads; divides hidden_size.")
    vocab_size: Annotated[int, Field(ge=300)] = Field(8192, description="Size V of the byte-level BPE vocabulary.")


class LatentAttentionSpec(Section):
    latents: PositiveInt = Field(512, description="Number of trained latents that every token attends to.")
    heads: PositiveInt = Field(8, description="Attention heads; divides the backbone's width.")


class ModelSpec(Section):
    base: str = Field(
        min_length=1,
        description="Hugging Face name, local or s3:// folder of a decoder or encoder; `scratch` makes one from the texts.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hugging Face name.")
    pooling: Literal["mean", "lasttoken", "cls", "weightedmean", "latent_attention"] = Field(
        "mean", description="How token states become one vector; latent_attention is NV-Embed's, trained with the backbone."
    )
    latent_attention: LatentAttentionSpec = Field(LatentAttentionSpec(), description="Shape of `pooling: latent_attention`.")
    max_tokens: Annotated[int, Field(ge=8)] = Field(512, description="Texts are cut to this many tokens, prompt included.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Precision of weights and activations.")
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="Attention backend; auto takes the first of sdpa, eager that passes the bidirectional probe."
    )
    bidirectional: bool = Field(
        True, description="Tokens attend both ways when texts are embedded; false keeps a decoder's causal attention."
    )
    prompts: PromptsSpec = Field(PromptsSpec(), description="Prompts for queries and passages.")
    lora: LoraSpec | None = Field(None, description="Train LoRA adapters on all linear layers; absent means full fine-tuning.")
    scratch: ScratchSpec = Field(ScratchSpec(), description="Shape of the model built for `base: scratch`.")
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Off unless you trust its author."
    )
    hub_token: SecretRef | None = Field(None, description="Hugging Face token, as env:NAME or file:PATH.")


class DatasetSpec(Section):
    name: Literal["aws_api_docs"] = Field(
        description="A data set every installation has: aws_api_docs reads the API documentation inside botocore."
    )
    heldout_queries: PositiveInt = Field(300, description="Queries kept out of training, for evaluation.")
    negatives_per_query: Annotated[int, Field(ge=0)] = Field(
        4, description="Hard negatives: other operations of the same service."
    )
    max_pairs: PositiveInt | None = Field(None, description="Use only this many pairs (seeded choice); absent means all.")


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


class ChunksSpec(Section):
    tokens: PositiveInt = Field(256, description="Tokens of the document in one chunk, prompt and special tokens not counted.")
    overlap: Annotated[int, Field(ge=0)] = Field(32, description="Tokens that a chunk repeats of the one before it.")


class EmbedInputSpec(Section):
    path: str = Field(
        min_length=1,
        description="File, folder or glob of JSONL or CSV (each plain or .gz, .zst, .bz2, .lz4) or Parquet rows; a folder of "
        ".txt and .md files, each one document; or the folder of a Delta table.",
    )
    id: str | None = Field(
        None, description="Column with a unique id, text or whole numbers; absent means file and row number, or a text's file."
    )
    text: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = Field(
        ("text",), description="Columns joined with a newline to make the text."
    )
    columns: Annotated[tuple[str, ...], Field(strict=False)] = Field((), description="Further columns copied into the table.")
    chunks: ChunksSpec | None = Field(
        None, description="Split long documents into chunks of one row each; absent means cut to model.max_tokens, with a mark."
    )


class EmbedOutputSpec(Section):
    path: str = Field("run:embeddings", min_length=1, description="Folder of the Delta table of Parquet parts.")
    dtype: Literal["float32", "int8", "uint8", "binary", "ubinary"] = Field(
        "float32",
        description="Storage of a number: 4 bytes, 1 byte (by ranges measured once per table), or 1 bit (its sign).",
    )
    dims: PositiveInt | None = Field(
        None, description="Keep the first so many numbers of a vector, scaled to unit length (Matryoshka); absent means all."
    )
    mantissa_bits: Annotated[int, Field(ge=1, le=22)] | None = Field(
        None, description="Round float32 to so many of its 23 mantissa bits; with 10 a table takes half the bytes. Absent: all."
    )
    retention_hours: PositiveInt | None = Field(
        168, description="Hours that files which left the table stay for readers and time travel; null keeps them for ever."
    )


class ActorsSpec(Section):
    min: PositiveInt = Field(1, description="Embedding processes kept at least.")
    max: PositiveInt = Field(1, description="Embedding processes at most.")
    gpus_per_actor: Annotated[float, Field(ge=0.0)] = Field(0.0, description="GPUs of one actor; fractions share a GPU.")
    cpus_per_actor: PositiveInt = Field(1, description="CPU cores reserved for one actor.")


Unpadded = Literal["auto", "on", "off"]


class EmbedSpec(Section):
    input: EmbedInputSpec = Field(description="The corpus.")
    output: EmbedOutputSpec = Field(EmbedOutputSpec(), description="The embeddings table.")
    actors: ActorsSpec = Field(ActorsSpec(), description="The pool of embedding processes.")
    rows_per_unit: PositiveInt = Field(4096, description="Rows of one unit: what a crash can cost at most per actor.")
    tokens_per_batch: AutoOrCount = Field(
        "auto", description="Tokens of one forward pass; auto times a few numbers when an actor starts and takes the fastest."
    )
    unpadded: Unpadded = Field(
        "auto", description="Attention without padding: auto uses it where the model computes the same, on insists, off pads."
    )
    compile: bool = Field(
        False,
        description="Compile the model's layers with torch.compile when an actor starts, and keep that where it is faster.",
    )
    publish_every_minutes: Positive | None = Field(
        None, description="Also commit finished files so often while the run goes on; absent means one commit at its end."
    )
    price_per_hour: Positive | None = Field(
        None, description="Price of the whole cluster per hour, in any currency: the report then tells cost per million rows."
    )


class EncoderSpec(Section):
    """The model that mines: the job's own (`base`, `trained`), or any embedding model. A name alone is enough."""

    base: str = Field(
        "base",
        min_length=1,
        description="`base` or `trained` of this job, or a Hugging Face name, local or s3:// folder of an embedding model.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hugging Face name.")
    pooling: Literal["mean", "lasttoken", "cls", "weightedmean"] | None = Field(
        None, description="How token states become one vector; absent means as the model's folder says, else mean."
    )
    max_tokens: Annotated[int, Field(ge=8)] | None = Field(
        None, description="Texts are cut to this many tokens; absent means as the model's folder says, else 512."
    )
    prompts: PromptsSpec | None = Field(None, description="Prompts; absent means those in the model's folder, else none.")

    @property
    def is_own(self) -> bool:
        """Whether it is a model of this job, with the settings of its model section."""
        return self.base in ("base", "trained")

    @model_validator(mode="before")
    @classmethod
    def from_name(cls, value: Any) -> Any:
        return {"base": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return name_or_mapping(handler, schema, {"type": "string"})


class CorpusSpec(Section):
    path: str = Field(
        min_length=1, description="File, folder or glob of JSONL (plain or .gz, .zst, .bz2, .lz4) or Parquet rows."
    )
    text: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = Field(
        ("text",), description="Columns joined with a newline to make a passage."
    )


class MineSpec(Section):
    output: Annotated[str, Field(pattern=r"\.jsonl$")] = Field(
        "run:mined/train.jsonl",
        description="File ending in .jsonl for rows {query, positives, negatives, scores}, for `train.data` to name; "
        "with several sources one file each, NAME-0.jsonl, NAME-1.jsonl, ...",
    )
    encoder: EncoderSpec = Field(
        EncoderSpec(), description="Model whose cosines rank the passages: base | trained | a model's name, or a mapping."
    )
    corpus: CorpusSpec | None = Field(
        None, description="Passages to take negatives from; absent means all passages in `train.data`."
    )
    negatives_per_query: PositiveInt = Field(4, description="Hard negatives written for a row, in place of those it had.")
    depth: PositiveInt = Field(256, description="Best-ranked passages looked at for a query, its positives not counted.")
    skip_first: Annotated[int, Field(ge=0)] = Field(
        30, description="Best-ranked of those that `margin` and `ratio` left, passed over as likely unmarked positives."
    )
    margin: NonNegative | None = Field(
        None, description="A negative's cosine is below that of the query's worst positive by more than this; absent: no limit."
    )
    ratio: Fraction | None = Field(
        None, description="A negative's cosine is below this times that of the query's worst positive; absent: no limit."
    )
    choose: Literal["top", "random"] = Field("random", description="Which of the rest: the best-ranked, or a seeded choice.")
    actors: ActorsSpec = Field(ActorsSpec(), description="The pool of processes that encode, then search.")
    tokens_per_batch: PositiveInt = Field(8192, description="Tokens of one forward pass, padding included.")


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
    tokens_per_batch: PositiveInt = Field(8192, description="Tokens of one forward pass, padding included.")
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
