"""The `mine` section: which model looks for hard negatives, where, and which it takes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from ullme_ray.spec.embedding import ActorsSpec
from ullme_ray.spec.section import Fraction, NamedSection, NonNegative, PromptsSpec, Section


class EncoderSpec(NamedSection):
    """The model that mines: the job's own (`base`, `trained`), or any embedding model. A name alone is enough."""

    name_key = "base"

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
