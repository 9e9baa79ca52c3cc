"""The `evaluate` section: which sets, which tasks, and which models stand beside the job's own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt

from ullme_ray.spec.section import Name, NamedSection, PromptsSpec, Section

FolderType = Literal["retrieval", "sts", "pair_classification", "classification", "clustering"]


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


class OtherModelSpec(NamedSection):
    """Any sentence-transformers model, run by that library; a name alone is enough."""

    name_key = "base"

    base: str = Field("", description="Hugging Face name, local or s3:// folder of a sentence-transformers model.")
    revision: str | None = Field(None, description="Branch, tag or commit of a Hugging Face name.")
    name: Name | None = Field(None, description="Its name in tables; absent means the last part of `base`.")
    prompts: PromptsSpec | None = Field(None, description="Prompts; absent means those in the model's folder, else none.")


class MtebSpec(NamedSection):
    """Some tasks of MTEB. The name alone of a task or a benchmark is enough."""

    name_key = "name"

    name: str | None = Field(None, description="A task or benchmark of mteb, such as NFCorpus or `MTEB(eng, v2)`.")
    types: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="Only tasks of these types, such as Retrieval or STS; without a name, of all that mteb has."
    )
    languages: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="Only these languages, as mteb writes them (eng, deu-Latn)."
    )
    folder: str | None = Field(
        None, description="Local folder in mteb's dataset layout, in place of a name; nothing is then fetched from a hub."
    )
    type: FolderType | None = Field(None, description="What kind of task the folder holds; needed with `folder`.")


class GenerationChecksSpec(Section):
    path: str = Field(min_length=1, description="File or glob of held-out rows {query, positive(s), negative(s)}.")
    max_rows: PositiveInt = Field(200, description="Rows scored at most (seeded choice).")
    max_passages: Annotated[int, Field(ge=2)] = Field(
        8, description="Passages ranked per query: its own, then those of other rows (seeded choice) up to this many."
    )


class FrozenTexts(dict[str, str]):
    """Texts by name. Never changed once read, so a job can be a key of a cache, as it can with all its other values."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


class EvaluateSpec(Section):
    local: Annotated[tuple[LocalSetSpec, ...], Field(strict=False)] = Field((), description="Held-out retrieval sets.")
    mteb: Annotated[tuple[MtebSpec, ...], Field(strict=False)] = Field(
        (), description="MTEB tasks or benchmarks by name, or folders in mteb's dataset layout, for the job's newest model."
    )
    mteb_prompts: Annotated[dict[str, str], AfterValidator(FrozenTexts)] = Field(
        {},
        validate_default=True,
        description="Prompts by task for MTEB, over model.prompts: {NFCorpus-query: text, STS: text}; the name or type of a "
        "task, alone or with -query or -document.",
    )
    generation: GenerationChecksSpec | None = Field(
        None, description="Perplexity and preference of the generation pass, and whether it ranks passages as the vectors do."
    )
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
