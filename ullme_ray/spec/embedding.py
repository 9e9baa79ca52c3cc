"""The `embed` section: the corpus, the table of embeddings, and the processes between them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from ullme_ray.spec.section import AutoOrCount, Positive, Section


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
    rows_per_unit: PositiveInt = Field(
        4096, description="Rows of one unit; a crash costs the units at work and those embedded but not yet written."
    )
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
