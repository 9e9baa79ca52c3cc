"""What training minimises, as the job file says it: `train.objective`, filled from a preset (METHOD: presets)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, GetJsonSchemaHandler, PositiveInt, model_validator
from pydantic_core import CoreSchema

from ullme_ray.spec.presets import PRESETS
from ullme_ray.spec.section import NonNegative, Positive, Section, name_or_mapping


class MatryoshkaSpec(Section):
    dims: Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)] = Field(
        description="Widths at which embeddings shall be good too: cut to the first so many values, then renormalised."
    )
    weights: Annotated[tuple[Positive, ...], Field(strict=False)] | None = Field(
        None, description="Weight of the loss at each of `dims`; absent means 1 each. The full width always counts 1."
    )


class ObjectiveSpec(Section):
    """What is minimised (METHOD: presets). A preset fills the fields; a field set in the job goes over it."""

    preset: Literal["cl", "sft", "dpo", "grl", "genc"] = Field("grl", description="Named set of the values below.")
    contrastive_weight: NonNegative = Field(description="Weight of the contrastive loss.")
    generation_weight: NonNegative = Field(description="Weight of the generation loss.")
    alignment_weight: NonNegative = Field(description="Weight of the KL term between embedding and generation relevance.")
    distill_weight: NonNegative = Field(description="Weight of the KL term that teaches the teacher's `scores` of each row.")
    contrastive: Literal["infonce", "supcon"] = Field(description="Form of the contrastive loss.")
    miner_epsilon: NonNegative | None = Field(
        description="Multi-similarity miner: keep pairs that are hard within this cosine; null keeps all."
    )
    negative_margin: NonNegative | None = Field(
        description="Drop a negative whose cosine is above the positive's minus this, as a false one; null drops none."
    )
    negative_ratio: Positive | None = Field(
        description="Drop a negative whose cosine is above this times the positive's, as a false one; null drops none."
    )
    temperature: Positive = Field(description="Divides cosine similarities in the contrastive loss.")
    rep_temperature: Positive = Field(description="Divides cosine similarities in the alignment and the distillation term.")
    gen_temperature: Positive = Field(description="Divides mean token log-probabilities in the alignment term.")
    teacher_temperature: Positive = Field(description="Divides the teacher's scores in the distillation term.")
    generation: Literal["sft", "dpo", "ipo", "hinge", "kto"] = Field(description="Form of the generation loss.")
    dpo_beta: Positive = Field(description="Strength of the pull to the reference model in dpo, ipo, hinge and kto.")
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = Field(description="Share of DPO pairs assumed mislabelled.")
    dpo_pairs: Literal["all", "first"] = Field(
        description="Preference pairs of one query: every positive x negative, or the first of each."
    )
    reference: Literal["auto", "adapter_off", "frozen_copy", "precomputed", "none"] = Field(
        description="Reference model of dpo, ipo, hinge, kto; auto is adapter_off with LoRA and frozen_copy without. "
        "precomputed scores all rows of the run once, before training."
    )
    alignment_direction: Literal["rep_gen", "gen_rep"] = Field(
        description="KL(P_rep || P_gen) as in the paper, or the reverse."
    )
    detach_gen: bool = Field(description="Treat generation relevance as a fixed target in the alignment term.")
    matryoshka: MatryoshkaSpec | None = Field(
        description="Also apply the contrastive and the alignment term to shortened embeddings; null does not."
    )

    @model_validator(mode="before")
    @classmethod
    def fill_from_preset(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"preset": value}
        if isinstance(value, dict):
            preset = PRESETS.get(str(value.get("preset", "grl")), PRESETS["grl"])
            return {**preset, **value}
        return value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """A preset's name alone, or a mapping in which nothing is required, since the preset fills it."""
        return name_or_mapping(handler, schema, {"type": "string", "enum": list(PRESETS)})

    @property
    def needs_generation(self) -> bool:
        return self.generation_weight > 0 or self.alignment_weight > 0

    @property
    def compares_pairs(self) -> bool:
        """Whether the generation loss is one of the preference losses."""
        return self.generation_weight > 0 and self.generation != "sft"

    @property
    def needs_reference(self) -> bool:
        return self.compares_pairs and self.reference != "none"

    @property
    def needs_negatives(self) -> bool:
        return self.compares_pairs or self.alignment_weight > 0 or self.distill_weight > 0

    @property
    def widths(self) -> tuple[tuple[int | None, float], ...]:
        """(width, weight) at which the terms on embeddings apply; None is the full width."""
        if self.matryoshka is None:
            return ((None, 1.0),)
        weights = self.matryoshka.weights or (1.0,) * len(self.matryoshka.dims)
        return ((None, 1.0), *zip(self.matryoshka.dims, weights))
