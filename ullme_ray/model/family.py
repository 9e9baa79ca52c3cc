"""What kind of backbone a config describes, which class loads it, and how long its texts may be. Loads no weights.

A decoder has both passes, encode and generate. An encoder, and the encoder half of an encoder-decoder, has the encode pass
alone: its attention always goes both ways, so there is no flag to set and nothing to generate with.
"""

from __future__ import annotations

from typing import Any, Literal

from ullme_ray.errors import ModelError
from ullme_ray.spec.job import JobSpec

Kind = Literal["decoder", "encoder", "encoder-decoder"]


def kind_of(config: Any) -> Kind:
    """Decided by the config alone: what transformers has the family for, and what the checkpoint says of itself."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if getattr(config, "is_encoder_decoder", False) or config.model_type in _halves():
        return "encoder-decoder"  # also T5's encoder saved alone, which no longer calls itself one
    if getattr(config, "is_decoder", False):  # BERT and its kin can be built as decoders
        return "decoder"
    if getattr(config.get_text_config(), "use_bidirectional_attention", None) is True:  # a Gemma made into an encoder
        return "encoder"
    names = [*(getattr(config, "architectures", None) or ()), *(getattr(config, "auto_map", None) or ())]
    is_masked_lm = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES or any(n.endswith("ForMaskedLM") for n in names)
    return "encoder" if is_masked_lm else "decoder"


def _halves() -> list[str]:
    """Families of encoder-decoders whose encoder transformers can load alone."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES as ENCODERS

    return sorted(family for family, model in ENCODERS.items() if model.endswith("EncoderModel"))


def generates(config: Any) -> bool:
    """Whether the family has the generate pass."""
    return kind_of(config) == "decoder"


def training_class(config: Any) -> Any:
    """The auto class that training loads: with the language-model head for a decoder, the encoder alone otherwise.

    Raises:
        ModelError: an encoder-decoder whose encoder half transformers cannot load alone.
    """
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM if generates(config) else backbone_class(config)


def backbone_class(config: Any) -> Any:
    """The auto class that gives hidden states, without any head.

    Raises:
        ModelError: an encoder-decoder whose encoder half transformers cannot load alone.
    """
    from transformers import AutoModel, AutoModelForTextEncoding

    if kind_of(config) != "encoder-decoder":
        return AutoModel
    if config.model_type not in _halves():
        raise ModelError(
            f"model family {config.model_type} is an encoder-decoder whose encoder transformers cannot load alone; "
            f"use one of {', '.join(_halves())}, an encoder or a decoder"
        )
    return AutoModelForTextEncoding


def position_limit(config: Any, *, first_position: int = 0) -> int | None:
    """The longest text, in tokens, that the family's positions reach; None where positions are relative (T5).

    Args:
        first_position: of the first token; RoBERTa and its kin count from the padding id + 1.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    factor = rope.get("factor") if rope.get("rope_type", "default") != "default" else None
    if factor:  # the config stretches its rotary positions, and may name the length before or after that
        limit = max(limit, int(factor * (rope.get("original_max_position_embeddings") or limit)))
    return limit - first_position


def check_length(field: str, length: int, config: Any, first_position: int) -> None:
    """Texts must fit the family's positions: beyond them a table has no row, and rotary ones were never trained.

    Raises:
        ModelError: with the longest allowed value.
    """
    limit = position_limit(config, first_position=first_position)
    if limit is not None and length > limit:
        raise ModelError(
            f"{field} = {length}, but the positions of this model ({config.model_type}) reach {limit} tokens; "
            f"use {limit} or less"
        )


def check_dims(job: JobSpec, config: Any) -> None:
    """Refuses a table of more dimensions than the model's vectors have.

    Raises:
        ModelError: with the model's width.
    """
    dims, width = job.embed.output.dims if job.embed else None, int(config.get_text_config().hidden_size)
    if dims is not None and dims > width:
        raise ModelError(
            f"embed.output.dims = {dims}, but the vectors of model.base = {job.model.base} have {width} numbers; "
            f"use {width} or fewer"
        )


def check_attention(job: JobSpec, config: Any) -> None:
    """Only a decoder has causal attention to keep.

    Raises:
        ModelError: naming the family.
    """
    if not job.model.bidirectional and not generates(config):
        raise ModelError(
            f"model.bidirectional = false, but model.base = {job.model.base} is an {kind_of(config)} ({config.model_type}), "
            f"which always attends both ways; remove the key, or take a decoder"
        )


def check_objective(job: JobSpec, config: Any) -> None:
    """A model without the generate pass cannot have terms that need it.

    Raises:
        ModelError: naming family, objective and ways out.
    """
    if job.train is None or not job.train.objective.needs_generation or generates(config):
        return
    weights = ("generation_weight", "alignment_weight")
    needing = " and ".join(f"{w} = {getattr(job.train.objective, w):g}" for w in weights if getattr(job.train.objective, w) > 0)
    raise ModelError(
        f"train.objective = {job.train.objective.preset} ({needing}) needs a model that generates, and model.base = "
        f"{job.model.base} is an {kind_of(config)} ({config.model_type}), which only encodes; use objective cl, set both "
        f"weights to 0, or take a decoder"
    )
