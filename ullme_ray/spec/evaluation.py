"""The `evaluate` section: which sets, which tasks, and which models stand beside the job's own."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, GetJsonSchemaHandler, PositiveInt, model_validator
from pydantic_core import CoreSchema

from ullme_ray.spec.section import Name, PromptsSpec, Section, name_or_mapping


class LocalSetSpec(Section):
    path: str = Field(
        min_length=1,
        description="Folder in BEIR layout (corpus.jsonl, queries.jsonl, qrels/test.tsv), or a file or glob of rows "
        "{query, positive(s), negative(s)} as `train.data` has them, whose passages are the corpus.",
    )
    corpus: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="Further files of such rows: their passages are searched as well, their queries not asked."
    )
    table: bool = Field(
        False,
        description="Search the job's embeddings table in place of the set's own corpus: it is streamed, so it may be of any "
        "size; judged passages are then named by embed.input.id.",
    )
    max_queries: PositiveInt | None = Field(None, description="Queries asked at most (seeded choice); absent means all.")


class OtherModelSpec(Section):
    """Any sentence-transformers model, run by that library; a name alone is enough."""

    base: str = Field("", description="Hugging Face name, local or s3:// folder of a sentence-transformers model.")
    revision: str | None = Field(None, description="Branch, tag or commit of a Hugging Face name.")
    name: Name | None = Field(None, description="Its name in tables; absent means the last part of `base`.")
    prompts: PromptsSpec | None = Field(None, description="Prompts; absent means those in the model's folder, else none.")

    @model_validator(mode="before")
    @classmethod
    def from_name(cls, value: Any) -> Any:
        return {"base": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return name_or_mapping(handler, schema, {"type": "string"})


class EvaluateSpec(Section):
    local: Annotated[tuple[LocalSetSpec, ...], Field(strict=False)] = Field((), description="Held-out retrieval sets.")
    models: Annotated[tuple[OtherModelSpec, ...], Field(strict=False)] = Field(
        (), description="sentence-transformers models measured on the same sets."
    )
    compare_base: bool = Field(True, description="Also measure the model as it was before training.")
    bm25: bool = Field(True, description="Also measure BM25 on the same sets.")
    k: PositiveInt = Field(10, description="Cut-off of nDCG@k, recall@k and MRR@k.")
    depth: PositiveInt = Field(100, description="Passages ranked per query, k at least: for recall@depth, MAP and TREC runs.")

    @property
    def ranked(self) -> int:
        """Passages ranked per query."""
        return max(self.k, self.depth)
