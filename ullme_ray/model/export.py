"""The trained embedder as an ordinary sentence-transformers folder.

It must load, with equal vectors, in SentenceTransformer and AutoModel of current and older stacks. What older ones need:
module paths of sentence-transformers 3 to 5, the verbose pooling schema, a plain tokenizer class. What none of them tells: a
transformers older than 5.2 ignores `is_causal: false` and computes causal vectors in silence, hence probe.json and the check
in the model card.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ullme_ray.model import latent_attention
from ullme_ray.model.encoder import _POOLING_KEYS, PROBE_FILE, Encoder, EncoderSettings, load_encoder, probe_cosine, probe_floor
from ullme_ray.model.family import generates, kind_of
from ullme_ray.model.latent_attention import LatentAttention
from ullme_ray.spec.job import JobSpec, ModelSpec

_TRANSFORMER, _POOLING, _NORMALIZE = (
    ("", "sentence_transformers.models.Transformer"),
    ("1_Pooling", "sentence_transformers.models.Pooling"),
    ("2_Normalize", "sentence_transformers.models.Normalize"),
)
_LATENT_ATTENTION = (latent_attention.FOLDER, "ullme_ray.model.latent_attention.LatentAttentionPooling")
_PROBE_TEXTS = (
    "How do I make a bucket private?",
    "An embedding is a vector whose direction holds what a text is about.",
    "42",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 日本語のテキスト",
)


def export_encoder(
    backbone: Any, tokenizer: Any, job: JobSpec, folder: str, *, training: dict[str, Any], head: LatentAttention | None = None
) -> Encoder:
    """Writes the export to a local folder, reads it back, and stores probe vectors.

    Args:
        backbone: the model without its head, LoRA merged, on the CPU.
        tokenizer: the transformers tokenizer.
        job: gives pooling, prompts, length and dtype.
        folder: an empty local folder.
        training: facts for the model card (objective, steps, ...).
        head: of `latent_attention` pooling, on the CPU.

    Returns:
        The encoder as loaded from the written folder.

    Raises:
        ModelError: the folder cannot be read back as an embedder.
    """
    settings = EncoderSettings.of(job.model)
    decoder = generates(backbone.config)
    if decoder:  # transformers >= 5.2 then attends both ways, where it shall, without being asked at each call
        backbone.config.is_causal = settings.causal
    try:
        backbone.save_pretrained(folder)
    finally:
        if decoder:
            backbone.config.is_causal = True
    tokenizer.save_pretrained(folder)
    _plain_tokenizer_class(folder, settings.max_tokens)
    dim = int(backbone.config.get_text_config().hidden_size)
    parts = [_TRANSFORMER, *([_LATENT_ATTENTION] if head is not None else []), _POOLING, _NORMALIZE]
    modules = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(parts)]
    _write_json(folder, "modules.json", modules)
    if head is not None:
        head.write(os.path.join(folder, latent_attention.FOLDER))
    _write_json(folder, "sentence_bert_config.json", {"max_seq_length": settings.max_tokens, "do_lower_case": False})
    _write_json(
        folder,
        "config_sentence_transformers.json",
        {
            "prompts": {
                "query": settings.query_prompt,
                "passage": settings.passage_prompt,
                "document": settings.passage_prompt,
            },
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    pooling: dict[str, Any] = {"word_embedding_dimension": dim, "include_prompt": False}
    pooling |= {key: mode == ("mean" if head is not None else settings.pooling) for mode, key in _POOLING_KEYS.items()}
    pooling |= {"pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False}
    _write_json(folder, "1_Pooling/config.json", pooling)
    os.makedirs(os.path.join(folder, "2_Normalize"), exist_ok=True)
    _write_json(folder, "2_Normalize/config.json", {})

    model = _export_spec(job.model)
    exact = load_encoder(
        folder, replace(settings, dtype="float32"), model.model_copy(update={"dtype": "float32"}), device="cpu"
    )
    entries = _probe_entries(exact)
    if settings.dtype == "float32":
        encoder = exact
    else:
        del exact  # two copies of the weights in float32 and their own type would be the most memory of the whole run
        encoder = load_encoder(folder, settings, model, device="cpu")
    cosine = probe_cosine(encoder, entries)
    _write_json(folder, PROBE_FILE, {"dtype": settings.dtype, "cosine": cosine, "entries": entries})
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as stream:
        stream.write(_model_card(job, backbone.config, encoder.fingerprint, training, probe_floor(encoder, cosine)))
    return encoder


def _export_spec(model: ModelSpec) -> ModelSpec:
    return model.model_copy(update={"lora": None})


def _plain_tokenizer_class(folder: str, max_tokens: int) -> None:
    """`TokenizersBackend` is unknown before transformers 5; `PreTrainedTokenizerFast` loads in both."""
    path = os.path.join(folder, "tokenizer_config.json")
    with open(path, encoding="utf-8") as stream:
        config = json.load(stream)
    if config.get("tokenizer_class") in (None, "TokenizersBackend"):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config |= {"model_max_length": max_tokens, "padding_side": "right"}
    _write_json(folder, "tokenizer_config.json", config)


def _write_json(folder: str, name: str, content: Any) -> None:
    path = os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2, ensure_ascii=False)
        stream.write("\n")


def _probe_entries(encoder: Encoder, texts: Sequence[str] = _PROBE_TEXTS) -> list[dict[str, Any]]:
    return [
        {"prompt": prompt, "text": text, "embedding": [round(float(x), 7) for x in encoder.encode([text], prompt)[0]]}
        for prompt in ("query", "passage")
        for text in texts
    ]


def _quoted(prompt: str) -> str:
    """A prompt as it stands in a cell of a Markdown table."""
    return f"`{json.dumps(prompt, ensure_ascii=False)}`".replace("|", "\\|") if prompt else "none"


def _model_card(job: JobSpec, config: Any, fingerprint: str, training: dict[str, Any], floor: float) -> str:
    model, kind = job.model, kind_of(config)
    attention = "Attention goes both ways, as this family always has it."
    if not model.bidirectional:
        attention = "Attention is causal, as the decoder was pretrained."
    elif kind == "decoder":
        attention = (
            "Attention goes both ways (`is_causal: false` in config.json), which needs **transformers >= 5.2**: an older one\n"
            "computes wrong vectors silently."
        )
    option = ""
    if model.pooling == "latent_attention":
        attention += (
            "\nPooling is NV-Embed's latent attention, a module that ullme_ray holds: sentence-transformers needs ullme_ray\n"
            "installed, and `trust_remote_code=True` to import it."
        )
        option = ", trust_remote_code=True"
    facts = "\n".join(f"| {key} | {value} |" for key, value in training.items())
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, ullme, grl]
---

# {job.name}

A text embedder made from the {kind} `{model.base}` with ullme_ray, an implementation of ULLME (arXiv 2408.03402).
{attention}

| | |
| --- | --- |
| vector | {config.get_text_config().hidden_size} numbers, unit length, cosine similarity |
| pooling | {model.pooling} over the text's own tokens, prompt left out |
| prompts | query {_quoted(model.prompts.query)}, passage {_quoted(model.prompts.passage)} |
| longest text | {model.max_tokens} tokens |
| weights | {model.dtype}{", LoRA merged" if model.lora is not None else ""} |
{facts}
| fingerprint | `{fingerprint}` |

Check your installation in three lines; it prints at least {floor:.4f} when this model's vectors come out right:

```python
import json; from sentence_transformers import SentenceTransformer; m = SentenceTransformer(path := "."{option})
probe = json.load(open(f"{{path}}/probe.json"))["entries"]
print(min(float(m.similarity(m.encode([e["text"]], prompt_name=e["prompt"]), [e["embedding"]])) for e in probe))
```
"""
